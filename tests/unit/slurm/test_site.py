"""`site.env` as people write it: what bash would read otherwise is told with its line, at submit and in the job."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from rm_scale.errors import UserError
from rm_scale.slurm.header import read_header
from rm_scale.slurm.render import render
from rm_scale.slurm.site import known_variables, script_of_tier, site_variables, unknown_variables

REPOSITORY = Path(__file__).resolve().parents[3]

# What stands in the file, the number of the line that is told, and what is said of it.
FAULTS = [
    (b': "${RM_SCALE_GPU:=h100-80g}"\r\nRM_SCALE_LOGS=logs\r\n', 1, "ends like a line of Windows (CRLF)"),
    (b"# ours\r\n# and theirs\r\n", 1, "Fix: sed -i 's/\\r$//'"),
    (b"RM_SCALE_GPU = h100-80g\n", 1, "has a space beside =. Fix: NAME=value, without spaces"),
    (b"# ours\nexport SBATCH_PARTITION =gpu\n", 2, "has a space beside ="),
    (b"  RM_SCALE_GPU= h100-80g\n", 1, "has a space beside ="),
    (b"\xef\xbb\xbfRM_SCALE_GPU=h100-80g\n", 1, "begins with a byte order mark. Fix: sed -i"),
    (b"\n\nRM_SCALE_GPU=\xe2\x80\x9ch100-80g\xe2\x80\x9d\n", 3, "has the curly quotes of a word processor"),
    (b"RM_SCALE_GPU=\xe2\x80\x98h100-80g\xe2\x80\x99\n", 1, "has the curly quotes of a word processor"),
    (b"A='b' RM_SCALE_GPU=\xe2\x80\x9ch100 # x\n", 1, "has the curly quotes of a word processor"),
    (b"cat <<END\nX = 3\nEND\nRM_SCALE_GPU = x\n", 4, "has a space beside ="),
    (b"export\xc2\xa0RM_SCALE_GPU=h100-80g\n", 1, "has a no-break space"),
    (b': "${RM_SCALE_GPU:=h100-80g}\nRM_SCALE_LOGS=logs\n', 1, "bash can't read it: unexpected EOF while looking"),
    (b'A=1\nRM_SCALE_GPU="h100\nRM_SCALE_LOGS="logs"\nB=2\n', 2, "close the quote"),
    (b"if true; then\nA=1\n", 3, "bash can't read it: syntax error: unexpected end of file"),
    (b"A=1\nmodul load cuda\n", 2, "modul load cuda failed (code 127)"),
    (b"false\n", 1, "false failed (code 1)"),
]


def in_a_job(folder: Path, file: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Read the site's files as a job does at its start."""
    code = f"set -euo pipefail; source '{REPOSITORY}/slurm/common.sh'; rm_scale_load_site; declare -p RM_SCALE_DEVICE"
    env = {"PATH": "/usr/bin:/bin", "RM_SCALE_HOME": str(REPOSITORY), "RM_SCALE_SITE_ENV": str(file), **variables}
    return subprocess.run(["bash", "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("text", "line", "told"), FAULTS, ids=lambda value: repr(value)[:40])
def test_a_bad_line_is_told(text: bytes, line: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "it's site.env"
    own.write_bytes(text)
    monkeypatch.setenv("RM_SCALE_SITE_ENV", str(own))
    with pytest.raises(UserError) as caught:
        site_variables()
    begun = in_a_job(tmp_path, own)
    assert begun.returncode == 2
    shown = (text.splitlines(keepends=True) or [b""])[min(line, text.count(b"\n")) - 1]
    for message in (str(caught.value), begun.stderr):
        assert f"{own}, line {line}: " in message and told in message, message
        assert "Fix: " in message and "\r" not in message
    if line <= text.count(b"\n"):
        assert shown.decode().strip().strip("\ufeff") in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "# A = b in a comment, and it\u2019s \u201cfine\u201d\nRM_SCALE_GPU=x # = y\n",
        "RM_SCALE_GPU=x # the site\u2019s own \u201cx\u201d, and\u00a0more\n",
        "NOTE=\"the site\u2019s\" OTHER='\u201ca\u201d\u00a0b' # it's theirs\n",
        "CUDA_VISIBLE_DEVICES= true\n",
        "RM_SCALE_GPU= RM_SCALE_LOGS=logs\n",
        "NOTE=$(cat <<'END'\nX = 3\nRM_SCALE_GPU= x\nthe site\u2019s\nEND\n)\nRM_SCALE_GPU=x\n",
        "NOTE='\nX = 3\nthe site\u2019s\n'\n",
        "while IFS= read -r line; do :; done </dev/null\n",
        "[[ $HOME = /x ]] && RM_SCALE_GPU=x\n",
        'if [ "$HOME" = /x ]; then RM_SCALE_GPU=x; fi\n',
        "RM_SCALE_GPU=$NOT_SET_ANYWHERE\n",
        "grep -q x /dev/null || true\n",
        "RM_SCALE_MODULES='a\\\nb'\n".replace("\\\n", " "),
        "",
        "RM_SCALE_GPU=",
    ],
)
def test_sound_files_are_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "site.env"
    own.write_text(text, encoding="utf-8")
    monkeypatch.setenv("RM_SCALE_SITE_ENV", str(own))
    assert site_variables()["RM_SCALE_DEVICE"] == "auto"
    begun = in_a_job(tmp_path, own)
    assert begun.returncode == 0 and begun.stderr == "" and "RM_SCALE_DEVICE" in begun.stdout


def test_all_values_that_the_job_could_not_use_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "site.env"
    own.write_text("RM_SCALE_CHECK_SECONDS=soon RM_SCALE_KILL_SECONDS=0\nRM_SCALE_GPU='a\nb'\n")
    bad = {"RM_SCALE_RANKS_PER_NODE": "eight", "RM_SCALE_MAX_RESTARTS": "-1", "RM_SCALE_DEVICE": "gpu"}
    bad |= {"RM_SCALE_CONTAINER_ENGINE": "docker", "RM_SCALE_RETRIES": "x", "RM_SCALE_FORCE": "all"}
    bad |= {"RM_SCALE_UNPACK_SECONDS": "0", "RM_SCALE_PACKED_DAYS": "two", "RM_SCALE_RESUME": "yes"}
    for name, value in {**bad, "RM_SCALE_SITE_ENV": str(own)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        site_variables()
    begun = in_a_job(tmp_path, own, **bad)
    assert begun.returncode == 2
    names = {*bad, "RM_SCALE_CHECK_SECONDS", "RM_SCALE_KILL_SECONDS", "RM_SCALE_GPU"}
    for message in (str(caught.value), begun.stderr):
        for name in names:
            assert f"{name}=" in message
        assert "RM_SCALE_DEVICE=gpu: must be auto or cpu. Fix: " in message


def test_a_misspelt_variable_is_noticed() -> None:
    found = unknown_variables({"RM_SCALE_RANK_PER_NODE": "8", "RM_SCALE_CONTAINER": "x", "RM_SCALE_OUR_OWN_THING": "1"})
    assert len(found) == 1
    assert found[0].startswith("RM_SCALE_RANK_PER_NODE: no such variable; did you mean RM_SCALE_RANKS_PER_NODE?")


def special_lines() -> list[str]:
    """The lines that docs/slurm.md gives for the habits of clusters."""
    text = (REPOSITORY / "docs" / "slurm.md").read_text(encoding="utf-8")
    part = text.partition("## Your cluster is special\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (?!the cluster|---)[^|]* \| ([^|]*) \|$", part, re.M)
    return [line for cell in cells for line in re.findall(r"`((?:export |RM_SCALE_)[^`]*)`", cell) if "=" in line]


def test_there_are_lines_for_special_clusters() -> None:
    assert len(special_lines()) > 20


@pytest.mark.parametrize("line", special_lines())
def test_each_line_for_a_special_cluster_can_be_used(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bash reads it, every name in it is known, and a header can be written from it."""
    own = tmp_path / "site.env"
    own.write_text(f"{line}\n", encoding="utf-8")
    monkeypatch.setenv("RM_SCALE_SITE_ENV", str(own))
    site = site_variables()
    assert unknown_variables(site) == []
    names = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", line))
    assert all(site[name] for name in names)
    assert {name for name in names if name.startswith("RM_SCALE_")} <= known_variables()
    for tier in ("1b", "13b"):
        script = script_of_tier(tier)
        assert read_header(render(script, {}, {}, [], site))["ntasks-per-node"] == "1"
