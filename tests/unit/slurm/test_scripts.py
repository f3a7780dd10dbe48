"""Job scripts and what is rendered from them, read by a real bash; options that must not become others."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.cli import main as cli
from rm_scale.config import RunConfig
from rm_scale.errors import ConfigError, UserError
from rm_scale.slurm.job_options import JOB_OPTIONS, add_job_options, sbatch_options, sbatch_options_among
from rm_scale.slurm.render import MARK, render, write_script
from rm_scale.slurm.settings_check import check_names
from rm_scale.slurm.site import script_of_tier, site_variables, variables_of_tier
from rm_scale.slurm.submit import Submission

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("rm_*.sh"))
SAME = "# --- The rest is the same in each of these scripts"

HOSTILE = [
    "",
    " ",
    "a b",
    "it's",
    '"',
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "&& touch pwned #",
    "a\nb",
    "\n#SBATCH --nodes=99\n",
    "\r\n",
    "$HOME ~ * ? [a] {b,c} !x",
    "\\",
    "\\'",
    "'; touch pwned; '",
    "-",
    "--wrap=touch pwned",
    "é ü 漢字 \u2028",
    "\x1b[31m\x07\t",
]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped scripts beside a common.sh that prints what it is handed."""
    home = tmp_path_factory.mktemp("it's a home")
    shutil.copytree(REPOSITORY / "slurm", home / "slurm")
    (home / "slurm" / "common.sh").write_text(
        'rm_scale_main() { shift; printf \'%s\\0\' "$RM_SCALE_TIER" "$@"; exit 0; }\n'
    )
    return home


def words_of(text: str, folder: Path, *arguments: str) -> list[str]:
    """What the script hands on when bash runs it as a job, from a spool folder."""
    script = folder / "slurm_script"
    script.write_text(text, encoding="utf-8")
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", str(script), *arguments], cwd=folder, env=env, capture_output=True, check=False)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["slurm_script"], "something ran"
    return [word.decode("utf-8", errors="surrogateescape") for word in done.stdout.split(b"\0")[:-1]]


def headers(text: str) -> list[str]:
    """The lines that sbatch reads."""
    return [line for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("tier", ["1b", "3b", "7b", "13b"])
def test_hostile_settings_arrive_as_they_are(stub: Path, tmp_path: Path, tier: str) -> None:
    source = stub / "slurm" / script_of_tier(tier).name
    text = render(source, {}, variables_of_tier(tier), ["--run_name", *HOSTILE])
    assert words_of(text, tmp_path, "--last", "x y") == [tier, "--run_name", *HOSTILE, "--last", "x y"]
    assert headers(text) == headers(source.read_text())


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30), max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_settings_arrive_as_they_are(
    stub: Path, tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    text = render(stub / "slurm" / "rm_7b.sh", {}, {}, words)
    assert words_of(text, tmp_path_factory.mktemp("spool")) == ["7b", *words]
    assert headers(text) == headers((REPOSITORY / "slurm" / "rm_7b.sh").read_text())


def parsed(**values: str) -> argparse.Namespace:
    """Options as they come from the command line."""
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    return parser.parse_args([f"--{name}={value}" for name, value in values.items()])


@pytest.mark.parametrize("option", JOB_OPTIONS, ids=lambda option: option.name)
def test_every_option_takes_its_example_and_nothing_hostile(option: object) -> None:
    name, example, flag = option.name, option.example, option.flag  # type: ignore[attr-defined]
    assert sbatch_options(parsed(**{name: example})) == {flag: f"B:USR1@{example}" if name == "grace" else example}
    for word in [
        *HOSTILE,
        f"{example}\n",
        f"{example} x",
        f"{example}'",
        f"{example};x",
        f"-{example}",
        f"{example}\u0660",
    ]:
        with pytest.raises(ConfigError, match=re.escape(f"--{name} {example}.")):
            sbatch_options(parsed(**{name: word}))


@given(st.text(max_size=40), st.sampled_from(JOB_OPTIONS))
@settings(max_examples=300, deadline=None)
def test_what_passes_has_no_space_quote_or_line_break(text: str, option: object) -> None:
    try:
        found = sbatch_options(parsed(**{option.name: text}))  # type: ignore[attr-defined]
    except ConfigError:
        return
    assert re.fullmatch(r"[\w./%@+=:&|,*()\[\]?-]+", "".join(found.values()), re.ASCII)


def test_all_bad_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"\(2 problems\)"):
        sbatch_options(parsed(job_name="a b", time="soon", nodes="2"))


def test_options_and_settings_have_different_names() -> None:
    """Else a word after the command could mean either."""
    own = {option.name for option in JOB_OPTIONS} | {"tier", "script", "output", "test_only"}
    assert own & set(RunConfig.model_fields) == set()


def test_header_is_changed_and_extended() -> None:
    job = {"nodes": "4", "account": "mine", "gpus-per-node": "4"}
    lines = headers(render(script_of_tier("13b"), job, {}, []))
    assert "#SBATCH --nodes=4" in lines and "#SBATCH --gpus-per-node=4" in lines and "#SBATCH --account=mine" in lines
    assert len(lines) == len(headers(script_of_tier("13b").read_text())) + 1
    without = headers(render(script_of_tier("1b"), {"gpus-per-node": "0"}, {}, []))
    assert not [line for line in without if "gpu" in line]


def test_render_writes_over_its_own_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.sh"
    for _ in range(2):
        assert cli(["slurm", "render", "--tier", "13b", "--nodes", "4", "--output", str(path), "--max_steps", "3"]) == 0
    assert os.access(path, os.X_OK) and MARK in path.read_text() and "#SBATCH --nodes=4" in path.read_text()
    path.write_text("mine")
    with pytest.raises(UserError, match="is no rendered script"):
        write_script(path, "")
    with pytest.raises(UserError, match="can't be written"):
        write_script(tmp_path / "no" / "x.sh", "")
    assert cli(["slurm", "render", "--tier", "3b"]) == 0
    assert "#SBATCH --job-name=rm_3b\n" in capsys.readouterr().out, "written from the script of 7b"
    assert cli(["slurm", "render", "--tier", "13b", "--max_stepz", "3"]) == 2
    assert "did you mean max_steps?" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a NUL character"):
        render(script_of_tier("1b"), {}, {}, ["a\0b"])


def test_scripts_differ_in_their_heads_only() -> None:
    bodies = {path.read_text().partition(SAME)[2] for path in SCRIPTS}
    assert len(SCRIPTS) == 3 and len(bodies) == 1 and "" not in bodies
    for path in SCRIPTS:
        head = headers(path.read_text())
        for line in ("--requeue", "--open-mode=append", "--ntasks-per-node=1", "--signal=B:USR1@600"):
            assert f"#SBATCH {line}" in head
        name = re.findall(r"RM_SCALE_CONFIG:-(.*)}", path.read_text())[0]
        assert (REPOSITORY / name).is_file()
        assert os.access(path, os.X_OK)


def test_no_site_detail_in_code() -> None:
    """Every variable that common.sh reads from a site is in site.env, with a comment above it."""
    site = (REPOSITORY / "slurm" / "site.env").read_text()
    known = set(re.findall(r"^: \"\$\{(RM_SCALE_\w+):=", site, re.M))
    documented = (REPOSITORY / "docs" / "slurm.md").read_text()
    assert [name for name in known if f"`{name}`" not in documented] == []
    assert not re.search(r"--(account|partition|qos)=", "".join(path.read_text() for path in SCRIPTS))
    for line, above in zip(site.splitlines()[1:], site.splitlines(), strict=False):
        assert not line.startswith(': "') or above.startswith("#") or above.startswith(': "'), line


def test_site_is_read_by_bash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "site.env"
    own.write_text(': "${RM_SCALE_GPU:=h100-80g}"\nexport SBATCH_PARTITION="a b"\n')
    monkeypatch.setenv("RM_SCALE_SITE_ENV", str(own))
    monkeypatch.setenv("RM_SCALE_RESUME", "none")
    found = site_variables()
    assert (found["RM_SCALE_GPU"], found["SBATCH_PARTITION"]) == ("h100-80g", "a b")
    assert (found["RM_SCALE_RESUME"], found["RM_SCALE_MAX_RESTARTS"]) == ("none", "100")
    own.write_text("false\n")
    with pytest.raises(UserError, match=r"site\.env, line 1: false\n +false failed"):
        site_variables()


def test_settings_are_checked_before_they_are_sent() -> None:
    check_names(["--max_steps", "3"])  # model and data may come from the script's configuration
    with pytest.raises(ConfigError, match=r"(?s)max_stepz.*learning_rate='quick'"):
        check_names(["--max_stepz", "3", "--learning_rate", "quick"])


@pytest.mark.parametrize("command", [["submit", "--dry_run"], ["render"]])
def test_a_tier_beside_a_model_of_another_size_is_refused(
    command: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours later, in the job, nobody would be there to read it."""
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {tiny_model}\n")
    assert cli(["slurm", *command, "--tier", "13b", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert f"tier='13b': model_name_or_path={str(tiny_model)!r} has " in told
    assert "a model of tier 1b. Fix: --tier 1b, or name another model." in told
    assert cli(["slurm", *command, "--tier", "1b", "--config", str(config)]) == 0
    missing = str(tmp_path / "on the compute nodes only")
    assert cli(["slurm", *command, "--tier", "13b", "--model_name_or_path", missing]) == 0
    assert cli(["slurm", *command, "--tier", "13b"]) == 0


def test_variables_with_commas_are_refused() -> None:
    with pytest.raises(UserError, match="sbatch cuts it at commas"):
        Submission({}, {"A": "b,C=d"}, Path("x.sh"), ()).command()


@pytest.mark.parametrize(
    ("answer", "code", "told"),
    [
        ("echo '12;cluster'", 0, "job 12 "),
        ("echo hello", 2, "sbatch answered 'hello', not a job's number"),
        (
            "echo 'sbatch: error: Invalid account' >&2; exit 1",
            2,
            "sbatch refused the job: sbatch: error: Invalid account",
        ),
    ],
)
def test_what_sbatch_answers_is_checked(
    answer: str,
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Answers that a healthy cluster does not give."""
    for name, text in (("sbatch", answer), ("squeue", "echo 'PENDING|gpu|1|12:00:00|PartitionTimeLimit'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cli(["slurm", "submit", "--tier", "1b", "--max_steps", "3"]) == code
    out, err = capfd.readouterr()
    assert told in out + err
    assert (
        code != 0
        or "will not start: its time limit is longer than the partition allows. Fix: another --time (Part" in out
    )


def test_submit_needs_one_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["slurm", "submit"]) == 2
    assert cli(["slurm", "submit", "--script", "nowhere.sh"]) == 2
    err = capsys.readouterr().err
    assert "tier and script: give one of them" in err and "script=nowhere.sh: no such file" in err


@pytest.mark.parametrize("way", ["link", "copy in a folder below", "submitted from below", "installed", "nowhere"])
def test_a_script_finds_what_it_needs(stub: Path, tmp_path: Path, way: str) -> None:
    """Slurm runs a copy from its spool folder; where the script lay is what scontrol says, with the words after it."""
    tools, elsewhere = tmp_path / "bin", tmp_path / "else where"
    tools.mkdir()
    elsewhere.mkdir()
    script, submitted_from = elsewhere / "my run.sh", elsewhere
    if way == "link":
        script.symlink_to(stub / "slurm" / "rm_1b.sh")
    elif way == "copy in a folder below":
        script = stub / "experiments" / "one.sh"
        script.parent.mkdir(exist_ok=True)
        script.write_text("")
    elif way == "submitted from below":
        submitted_from = stub / "slurm" / "common"
    elif way == "installed":
        (tools / "python3").write_text(f"#!/bin/sh\necho {shlex.quote(str(stub / 'rm_scale'))}\n")
        (stub / "rm_scale").mkdir(exist_ok=True)
    (tools / "scontrol").write_text(f"#!/bin/sh\necho {shlex.quote(f'   Command={script} --run_name a b')}\n")
    if way != "installed":
        (tools / "python3").write_text("#!/bin/sh\nexit 1\n")
    stray = tmp_path / "python"  # where the job runs: nobody has asked for this one
    stray.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(tmp_path / 'ran'))}\nexit 1\n")
    for tool in (*tools.iterdir(), stray):
        tool.chmod(0o755)
    spool = tmp_path / "slurm_script"
    spool.write_text((REPOSITORY / "slurm" / "rm_1b.sh").read_text())
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(submitted_from)}
    done = subprocess.run(
        ["bash", str(spool), "--x"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert not (tmp_path / "ran").exists()
    if way == "nowhere":
        assert done.returncode == 2 and "slurm/common.sh was not found. Fix: submit from the repository" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "1b\0--x\0", "")


def test_the_folder_of_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.sh"
    own.write_text("#!/bin/bash\n#SBATCH -o of_header/%j.log\n#SBATCH --error=errors/%j.log\necho\n")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 12\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert cli(["slurm", "submit", "--script", str(own), "--dry_run"]) == 0
    assert not (tmp_path / "of_header").exists()
    assert cli(["slurm", "submit", "--script", str(own)]) == 0
    assert "made the folder of the log: of_header" in capsys.readouterr().out and (tmp_path / "errors").is_dir()
    assert cli(["slurm", "submit", "--script", str(own), "--log", "own.sh/a.log"]) == 2
    assert "log=own.sh/: the folder is not there and can't be made" in capsys.readouterr().err
    assert cli(["slurm", "submit", "--script", str(own), "--log", "a-%j/b.log", "--dry_run"]) == 2
    assert "log=a-%j/b.log: the folder must have no % pattern" in capsys.readouterr().err


WORDS = ["--time=10", "--max_steps", "3", "-N", "4", "--run_name", "-N", "--job_name", "a b", "--mail-type", "END"]
WORDS += ["--grace", "60", "--exclusive", "-H", "--wrap=x"]


def test_options_of_sbatch_among_settings() -> None:
    """What is told as the fix is taken by sbatch as it stands, values that were words of their own included."""
    found = sbatch_options_among(WORDS, after_script=True)
    heads, fixes = zip(*(message.split(": is an option of sbatch") for message in found), strict=True)
    assert heads == ("--time=10", "-N", "--job_name", "--mail-type", "--grace", "--exclusive", "-H", "--wrap=x")
    assert [fix.partition("(sbatch ")[2].partition(" SCRIPT)")[0] for fix in fixes] == [
        *("--time=10", "--nodes=4", "'--job-name=a b'", "--mail-type=END", "--signal=B:USR1@60", "--exclusive"),
        *("--hold", "--wrap=x"),
    ]
    assert sbatch_options_among(["--output_dir", "x", "--seed=3", "--config", "a.yaml", "-1"], after_script=True) == []


def test_options_of_sbatch_among_the_words_of_our_own_commands() -> None:
    """There is no script there to write them before."""
    found = sbatch_options_among(WORDS, after_script=False)
    assert [message.partition("Fix: ")[2].split(", in the")[0].split(":")[0].rstrip(".") for message in found] == [
        *("--time 10", "--nodes 4", "--job_name 'a b'", "RM_SCALE_SBATCH_OPTIONS=--mail-type=END", "--grace 60"),
        *("RM_SCALE_SBATCH_OPTIONS=--exclusive", "leave it out", "leave it out"),
    ]
    assert "script" not in "".join(found)
