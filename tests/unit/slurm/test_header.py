"""Headers as clusters want them: GPUs asked for in each way there is, and no line beside one it contradicts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rm_scale.cli import main as cli
from rm_scale.errors import ConfigError
from rm_scale.slurm.header import header_changes, read_header
from rm_scale.slurm.render import render
from rm_scale.slurm.site import script_of_tier
from rm_scale.slurm.time_limits import fitting_grace, grace_of, seconds_of

SITE = ("GPU_REQUEST", "GPU_TYPE", "MEMORY", "CPUS", "EXCLUSIVE", "SBATCH_OPTIONS")
ONE_OF = [("mem", "mem-per-gpu", "mem-per-cpu"), ("cpus-per-task", "cpus-per-gpu"), ("gpus-per-node", "gres")]


def header(tier: str, job: dict[str, str] | None = None, **site: str) -> dict[str, str]:
    """The header that is written for a site."""
    site = {f"RM_SCALE_{name}" if name in SITE else name: value for name, value in site.items()}
    return read_header(render(script_of_tier(tier), job or {}, {}, [], site))


def test_as_shipped_without_a_word_of_the_site() -> None:
    for tier in ("1b", "7b", "13b"):
        assert header(tier) == read_header(script_of_tier(tier).read_text())


@pytest.mark.parametrize(
    ("site", "job", "expected", "gone"),
    [
        ({"GPU_REQUEST": "gres"}, {}, {"gres": "gpu:8"}, {"gpus-per-node"}),
        ({"GPU_REQUEST": "gres"}, {"gpus-per-node": "4"}, {"gres": "gpu:4", "mem-per-gpu": "60G"}, {"gpus-per-node"}),
        ({"GPU_TYPE": "a100"}, {}, {"gpus-per-node": "a100:8"}, {"gres"}),
        ({"GPU_REQUEST": "gres", "GPU_TYPE": "a100"}, {}, {"gres": "gpu:a100:8"}, {"gpus-per-node"}),
        ({"GPU_REQUEST": "none"}, {}, {"mem": "0"}, {"gpus-per-node", "mem-per-gpu", "cpus-per-gpu"}),
        ({"GPU_REQUEST": "none", "MEMORY": "none"}, {}, {}, {"mem", "mem-per-gpu", "gpus-per-node"}),
        ({"MEMORY": "0"}, {}, {"mem": "0", "cpus-per-gpu": "8"}, {"mem-per-gpu"}),
        ({"MEMORY": "4G/core", "CPUS": "64"}, {}, {"mem-per-cpu": "4G", "cpus-per-task": "64"}, {"mem-per-gpu"}),
        ({"MEMORY": "none", "CPUS": "none"}, {}, {}, {"mem-per-gpu", "cpus-per-gpu"}),
        ({"CPUS": "12/gpu"}, {}, {"cpus-per-gpu": "12"}, {"cpus-per-task"}),
        ({"EXCLUSIVE": "yes"}, {}, {"exclusive": ""}, set()),
        (
            {"SBATCH_OPTIONS": "--mem=1T --no-requeue --mail-type=END"},
            {},
            {"mem": "1T", "mail-type": "END"},
            {"requeue"},
        ),
        ({"SBATCH_OPTIONS": "--qos=a"}, {"qos": "b"}, {"qos": "b"}, set()),
        ({"SBATCH_MEM_PER_NODE": "0"}, {}, {}, {"mem-per-gpu"}),
        ({}, {"gpus-per-node": "0"}, {}, {"gpus-per-node", "mem-per-gpu", "cpus-per-gpu"}),
    ],
)
def test_each_way_of_asking(
    site: dict[str, str], job: dict[str, str], expected: dict[str, str], gone: set[str]
) -> None:
    found = header("1b", job, **site)
    assert {name: found.get(name) for name in expected} == expected
    assert not gone & set(found)


def test_no_combination_says_a_thing_in_two_ways() -> None:
    requests = itertools.product(
        ("", "gres", "none", "gpus-per-node"), ("", "a100"), ("", "0", "60G", "4G/core", "none"), ("", "64", "none")
    )
    for request, kind, memory, cores in requests:
        for tier, exclusive in (("1b", "yes"), ("13b", "no"), ("13b", "")):
            found = header(tier, GPU_REQUEST=request, GPU_TYPE=kind, MEMORY=memory, CPUS=cores, EXCLUSIVE=exclusive)
            for group in ONE_OF:
                assert len(set(group) & set(found)) <= 1, (request, kind, memory, cores, found)
            assert ("exclusive" in found) == (exclusive != "no")


def test_a_comment_goes_with_its_line() -> None:
    text = render(script_of_tier("13b"), {}, {}, [], {"RM_SCALE_EXCLUSIVE": "no", "RM_SCALE_MEMORY": "500G"})
    assert "Whole nodes" not in text and "all their memory" not in text and "Slurm's second attempt" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPU_REQUEST", "tres"),
        ("GPU_TYPE", "a 100"),
        ("GPU_TYPE", "a100\n#SBATCH --x"),
        ("MEMORY", "lots"),
        ("CPUS", "8/core"),
        ("EXCLUSIVE", "maybe"),
        ("SBATCH_OPTIONS", "-p gpu"),
        ("SBATCH_OPTIONS", "--partition gpu"),
        ("SBATCH_OPTIONS", "--comment='a'"),
        ("SBATCH_OPTIONS", "--no-such-option=1"),
        ("SBATCH_OPTIONS", "--wrap=x"),
        ("SBATCH_OPTIONS", "--comment=$(touch)"),
    ],
)
def test_what_no_header_can_be_written_from(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"RM_SCALE_{name}.*Fix: "):
        header_changes({}, {}, {f"RM_SCALE_{name}": value})


def test_all_of_it_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"\(3 problems\)"):
        header("1b", GPU_REQUEST="none", MEMORY="60G/gpu", CPUS="8/gpu", EXCLUSIVE="x")


def test_short_options_of_a_script_are_read() -> None:
    text = "#!/bin/sh\n#SBATCH -t 10 -o logs/a.log\n#SBATCH --nodes 2 --exclusive # why\n\necho\n#SBATCH --mem=1\n"
    assert read_header(text) == {"time": "10", "output": "logs/a.log", "nodes": "2", "exclusive": ""}


# --- Grace -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("10:30", 630), ("1:00:00", 3600), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["UNLIMITED", "infinite", "", "Partition_Limit", "x", "1:2:3:4", "-1"])
def test_no_limit(text: str) -> None:
    assert seconds_of(text) is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"time": "40"}, {}),
        ({"time": "39:56"}, {"signal": "B:USR1@599"}),
        ({"time": "10"}, {"signal": "B:USR1@150"}),
        ({"time": "2"}, {"signal": "B:USR1@60"}),
        ({"time": "10", "signal": "B:USR1@500"}, {}),
        ({"time": "UNLIMITED"}, {}),
    ],
)
def test_a_short_limit_has_a_short_grace(asked: dict[str, str], expected: dict[str, str]) -> None:
    script = {"time": "12:00:00", "signal": "B:USR1@600"}
    assert fitting_grace(asked, script) == expected
    assert grace_of("B:USR1@600") == 600 and grace_of("USR1") == 60 and grace_of("") is None


@pytest.mark.parametrize("asked", [{"time": "1"}, {"time": "10", "signal": "B:USR1@600"}, {"signal": "USR1@50000"}])
def test_a_grace_as_long_as_the_limit_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"grace=\d+: must be shorter than the time limit.*Fix: a longer --time, or"):
        fitting_grace(asked, {"time": "12:00:00", "signal": "B:USR1@600"})


# --- The commands ----------------------------------------------------------------------------------------------------


def test_the_command_and_the_header_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    submit = ["slurm", "submit", "--tier", "1b", "--dry_run", "--time", "10", "--max_steps", "3"]
    assert cli(submit) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("sbatch --parsable --time=10 --signal=B:USR1@150 ")
    assert lines[0].endswith("rm_1b.sh --max_steps 3")
    monkeypatch.setenv("RM_SCALE_GPU_REQUEST", "gres")
    assert cli(submit) == 0
    told = capsys.readouterr().out
    assert "\n#SBATCH --gres=gpu:8\n" in told and "\n#SBATCH --signal=B:USR1@150\n" in told
    assert told.rstrip().endswith("\nsbatch --parsable")
    rendered = tmp_path / "own.sh"
    assert cli(["slurm", "render", "--tier", "1b", "--time", "10", "--output", str(rendered)]) == 0
    assert read_header(rendered.read_text())["gres"] == "gpu:8"
    assert cli(["slurm", "submit", "--script", str(rendered), "--dry_run", "--gpus", "4", "--time", "4"]) == 0
    assert {"--gres=gpu:4", "--time=4", "--signal=B:USR1@60"} < set(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [["submit", "--dry_run"], ["render"]])
def test_a_limit_of_the_site_has_a_short_grace_too(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever names the limit: the options of site.env, the environment over those, the command over both."""
    words = ["slurm", *command, "--tier", "1b"]
    monkeypatch.setenv("RM_SCALE_SBATCH_OPTIONS", "--time=10")
    assert cli(words) == 0
    told = capsys.readouterr().out
    assert "\n#SBATCH --time=10\n" in told and "\n#SBATCH --signal=B:USR1@150\n" in told
    for limit, over in (("20", []), ("4", ["--time", "4"])):
        monkeypatch.setenv("SBATCH_TIMELIMIT", "20")
        assert cli([*words, *over]) == 0
        assert f"\n#SBATCH --signal=B:USR1@{max(60, int(limit) * 15)}\n" in capsys.readouterr().out
    monkeypatch.setenv("RM_SCALE_SBATCH_OPTIONS", "--time=10 --signal=B:USR1@600")
    monkeypatch.delenv("SBATCH_TIMELIMIT")
    assert cli(words) == 2 and "grace=600: must be shorter than the time limit" in capsys.readouterr().err


def test_the_command_counts_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SBATCH_ variable of site.env counts before the lines of a script that was written for the job."""
    words = [
        "slurm",
        "submit",
        "--tier",
        "1b",
        "--dry_run",
        "--partition",
        "debug",
        "--account",
        "mine",
        "--time",
        "60",
    ]
    for name, value in (("RM_SCALE_GPU_REQUEST", "gres"), ("SBATCH_PARTITION", "gpu"), ("SBATCH_ACCOUNT", "ours")):
        monkeypatch.setenv(name, value)
    assert cli(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sbatch --parsable --account=mine --partition=debug"


def test_options_of_sbatch_after_the_command_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["slurm", "submit", "--tier", "1b", "--dry_run", "--mem=0", "--mail-type", "END", "-N4"]) == 2
    told = capsys.readouterr().err
    assert "(3 problems)" in told and "no such setting" not in told
    assert "--mem=0: is an option of sbatch, and no setting of a run. Fix: RM_SCALE_SBATCH_OPTIONS=--mem=0, in" in told
