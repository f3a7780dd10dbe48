"""`rm-scale launch --slurm --dry_run`: the plan, and the sbatch command that would hand it on."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.cli import main as cli
from rm_scale.config_parsing import parse_config


@pytest.fixture
def words(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """Settings of a small run."""
    flags = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--max_length", "64"]
    return [*flags, "--output_dir", str(tmp_path / "it's out"), "--run_name", "$(touch pwned)"]


def command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the printed sbatch command, as a shell reads them."""
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch"))
    return shlex.split(line)


def test_the_command_says_all_that_was_planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--slurm", "--dry_run", "--tier", "1b", "--nodes", "4", "--gpus", "4", "--gpu", "h100-80g"]
    assert cli(["launch", *options, "--partition", "gpu", "--grace", "900", *words]) == 0
    told = command(capsys)
    head, settings = told[: told.index(next(w for w in told if w.endswith(".sh")))], told[-1:0:-1][::-1]
    settings = told[len(head) + 1 :]
    assert {"--nodes=4", "--gpus-per-node=4", "--partition=gpu", "--signal=B:USR1@900", "--job-name=rm_1b"} <= set(head)
    assert "--export=ALL,RM_SCALE_GPU=h100-80g,RM_SCALE_CONFIG=none" in head
    parsed = parse_config(settings)
    assert parsed.problems == () and parsed.config.run_name == "$(touch pwned)"
    assert {"max_tokens_per_device", "gradient_checkpointing"} <= parsed.given, "filled in by the plan"


def test_processors_and_forced_plans(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = ["launch", "--slurm", "--dry_run", "--gpu", "cpu", *words]
    assert cli([*base, "--gpus", "2", "--force", "plan"]) == 0
    told = command(capsys)
    assert "--export=ALL,RM_SCALE_DEVICE=cpu,RM_SCALE_RANKS_PER_NODE=2,RM_SCALE_FORCE=plan,RM_SCALE_CONFIG=none" in told
    assert not [word for word in told if word.startswith("--gpus-per-node")]
    assert any(word.endswith("rm_1b.sh") for word in told), "the script of the nearest size"


def test_the_header_is_written_as_the_site_asks(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["launch", "--slurm", "--dry_run", "--tier", "1b", "--gpu", "h100-80g", "--gpus", "4", *words]
    monkeypatch.setenv("RM_SCALE_GPU_REQUEST", "gres")
    monkeypatch.setenv("RM_SCALE_GPU_TYPE", "h100")
    assert cli([*base, "--time", "20"]) == 0
    told = capsys.readouterr().out
    assert "\n#SBATCH --gres=gpu:h100:4\n" in told and "\n#SBATCH --signal=B:USR1@300\n" in told
    assert told.rstrip().endswith("\nsbatch --parsable --export=ALL,RM_SCALE_GPU=h100-80g,RM_SCALE_CONFIG=none")
    monkeypatch.setenv("RM_SCALE_GPU_REQUEST", "none")
    assert cli(base) == 0
    told = capsys.readouterr().out
    assert "gpu" not in "".join(line for line in told.splitlines() if line.startswith("#SBATCH"))
    assert "RM_SCALE_RANKS_PER_NODE=4" in told, "the nodes are whole, and may have more"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (["--mem=0"], "--mem=0: is an option of sbatch"),
        (["--hostfile", "x"], "hostfile with slurm"),
        (["--auto_batch"], "auto_batch with slurm"),
        (["--nodes", "0"], "both must be at least 1"),
        (["--job_name", "a b"], "job_name='a b': must be letters"),
    ],
)
def test_what_does_not_go_together(
    bad: list[str], told: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["launch", "--slurm", "--dry_run", "--gpu", "h100-80g", *bad, *words]) == 2
    assert told in capsys.readouterr().err


def test_a_login_node_must_be_told_the_device(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_scale.slurm.planned_job.local_gpu_names", list)
    assert cli(["launch", "--slurm", "--dry_run", *words]) == 2
    assert "gpu: this machine has none to plan for. Fix: --gpu h100-80g" in capsys.readouterr().err


def test_slurm_commands_need_no_torch() -> None:
    code = (
        "import sys\nfrom rm_scale.cli import main\n"
        "main(['slurm', 'render', '--tier', '13b'])\n"
        "import rm_scale.slurm.prepare, rm_scale.slurm.node, rm_scale.slurm.requeue\n"
        "import rm_scale.slurm.status\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
