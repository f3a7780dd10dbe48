"""Inside a job, before any rank: allocation, settings of attempts and arrays, ports, folders."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rm_scale import output_lock
from rm_scale.config_parsing import parse_config
from rm_scale.errors import ConfigError, UserError
from rm_scale.slurm import prepare as prepare_module
from rm_scale.slurm.allocation import Allocation, host_names, read_allocation
from rm_scale.slurm.job_start import end_path, read_fence, read_start
from rm_scale.slurm.prepare import (
    array_settings,
    default_settings,
    prepare,
    ranks_per_node,
    wait_for_earlier_attempt,
    with_array_output,
    with_resume,
)

REPOSITORY = Path(__file__).resolve().parents[3]
ALLOCATION = Allocation(7, 0, ("node1",), 8, None)
CPU = {"RM_SCALE_DEVICE": "cpu", "RM_SCALE_RANKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}


def test_allocation_is_read_and_no_job_is_told() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert read_allocation({**env, "SLURM_ARRAY_TASK_ID": "3"}) == Allocation(7, 2, ("node1",), 8, 3)
    assert read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"}) == Allocation(7, 0, ("a",), 0, None)
    for bad in ({}, {"SLURM_JOB_ID": "x; rm", "SLURM_JOB_NODELIST": "a"}):
        with pytest.raises(UserError, match=r"this is no Slurm job. Fix: submit the script with sbatch"):
            read_allocation(bad)
    with pytest.raises(UserError, match=r"SLURM_HET_SIZE=2: a heterogeneous job.*Fix: submit it without ':'"):
        read_allocation({**env, "SLURM_HET_SIZE": "2"})


def test_a_list_that_slurm_can_not_write_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="scontrol can't write it out"):
        host_names("node[1-2]")


def test_ranks_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks_per_node(ALLOCATION, {"RM_SCALE_DEVICE": "cpu"}) == 1
    assert ranks_per_node(ALLOCATION, CPU) == 2
    with pytest.raises(UserError, match=r"must be a whole number from 1"):
        ranks_per_node(ALLOCATION, {"RM_SCALE_RANKS_PER_NODE": "0"})
    monkeypatch.setattr(prepare_module, "local_gpu_names", list)
    with pytest.raises(UserError, match=r"has 8 GPUs per node, and nvidia-smi shows none"):
        ranks_per_node(ALLOCATION, {})
    monkeypatch.setattr(prepare_module, "local_gpu_names", lambda: ["H100"] * 4)
    assert ranks_per_node(replace(ALLOCATION, gpus_per_node=4), {}) == 4
    assert ranks_per_node(replace(ALLOCATION, gpus_per_node=0), {}) == 4, "a site that counts no GPUs"
    with pytest.raises(UserError, match=r"8 ranks per node, and .* shows 4 GPUs"):
        ranks_per_node(ALLOCATION, {})


def test_the_scripts_configuration_gives_way_to_the_users() -> None:
    env = {"RM_SCALE_CONFIG": "configs/llama_2_13b_full.yaml", "RM_SCALE_HOME": str(REPOSITORY)}
    assert default_settings([], ALLOCATION, env) == ["--config", str(REPOSITORY / "configs/llama_2_13b_full.yaml")]
    for asked in (["--config", "x.yaml"], ["--config=x.yaml"]):
        assert default_settings(asked, ALLOCATION, env) == []
    assert default_settings([], ALLOCATION, {"RM_SCALE_CONFIG": "none"}) == []
    with pytest.raises(UserError, match=r"RM_SCALE_CONFIG=nowhere\.yaml: no such file"):
        default_settings([], ALLOCATION, {**env, "RM_SCALE_CONFIG": "nowhere.yaml"})


def test_array_tasks_differ_by_seed_or_by_line(tmp_path: Path) -> None:
    assert array_settings(3, "", ["--seed", "10"]) == ["--seed", "13"]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--learning_rate 1e-5\n--run_name 'it is $(x)' --lora_r 8\n--run_name 'open\n")
    assert array_settings(1, str(sweep), []) == ["--run_name", "it is $(x)", "--lora_r", "8"]
    with pytest.raises(UserError, match=r"has 3 lines, counted from 0. Fix: --array=0-2\."):
        array_settings(3, str(sweep), [])
    with pytest.raises(UserError, match=r"line 3: No closing quotation. Fix: close the quotes"):
        array_settings(2, str(sweep), [])
    with pytest.raises(UserError, match=r"RM_SCALE_SWEEP=/nowhere: can't be read"):
        array_settings(0, "/nowhere", [])
    words = with_array_output(["--output_dir", "out"], replace(ALLOCATION, array_task=4))
    assert parse_config(words).config.output_dir == "out/task-4"
    assert with_array_output(["--seed", "1"], ALLOCATION) == ["--seed", "1"]


def test_each_attempt_resumes_and_the_first_as_asked() -> None:
    assert with_resume([], 0, {}) == ["--resume_from_checkpoint", "auto"]
    assert with_resume([], 3, {"RM_SCALE_RESUME": "none"}) == []
    asked = ["--resume_from_checkpoint", "old/checkpoint-8"]
    assert with_resume(asked, 0, {}) == asked
    assert with_resume(asked, 1, {})[-2:] == ["--resume_from_checkpoint", "auto"], "not from the old one again"


@pytest.fixture
def words(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    """Settings of a small run."""
    flags = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--max_length", "64"]
    return [*flags, "--output_dir", str(tmp_path / "out"), "--global_batch_size", "8"]


def folder_of(tmp_path: Path, attempt: int) -> Path:
    """As the job's script makes it."""
    folder = tmp_path / "logs" / "7" / f"attempt-{attempt}"
    folder.mkdir(parents=True)
    return folder


def test_an_attempt_is_written_down_and_the_next_has_its_settings(words: list[str], tmp_path: Path) -> None:
    first = folder_of(tmp_path, 0)
    assert prepare(first, words, CPU) == 0
    start = read_start(first / "start.json")
    assert (start.nodes, start.world_size, start.output_dir) == (("node1",), 2, str(tmp_path / "out"))
    assert "--max_tokens_per_device" in start.settings, "filled in by the plan"
    # The machine looks different now: less memory, say, would have led to other rows.
    changed = replace(start, settings=(*start.settings, "--max_tokens_per_device", "4096"))
    changed.write()
    second = folder_of(tmp_path, 1)
    assert prepare(second, words, {**CPU, "SLURM_RESTART_COUNT": "1"}) == 0
    again = read_start(second / "start.json")
    assert again.settings == (*changed.settings, "--resume_from_checkpoint", "auto")
    assert read_fence(tmp_path / "logs" / "7") == 1 and again.master_port != start.master_port


def test_a_model_that_the_script_is_not_for_is_told(
    words: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The settings' model counts before the script's."""
    for place, tier in enumerate(("1b", "13b")):
        assert prepare(folder_of(tmp_path, place), [*words, "--dry_run"], {**CPU, "RM_SCALE_TIER": tier}) == 64
        told = "a model of tier 1b, and this job's script asks for what tier 13b takes. Fix: " in caplog.text
        assert told is (tier == "13b")


def test_dry_run_writes_nothing(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, 0)
    assert prepare(folder, [*words, "--dry_run"], CPU) == 64
    assert "would start 1 x 2 ranks" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not list(folder.iterdir())


def test_what_the_disk_refuses_is_not_refused_for_good(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script of a later attempt tries again on this code, and on 2 it ends the chain."""
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    folder = folder_of(tmp_path, 1)
    (folder.parent / "current_attempt").mkdir()  # stands for a disk that does not take the file
    assert prepare_module.main([str(folder), *words]) == prepare_module.EXIT_TRY_AGAIN
    assert "current_attempt" in capsys.readouterr().err
    assert prepare_module.main([str(folder), *words, "--max_length", "-4"]) == 2


def test_what_can_not_work_is_refused(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"global_batch_size=8 on 1 nodes x 9 ranks: every rank needs a group"):
        prepare(folder, words, {**CPU, "RM_SCALE_RANKS_PER_NODE": "9"})
    huge = tmp_path / "huge.yaml"
    huge.write_text("devices:\n  cpu-small:\n    like: cpu\n    memory_bytes: 1000\n")
    with pytest.raises(ConfigError, match=r"the plan needs .* GB per device, and there are"):
        prepare(folder, [*words, "--hardware", str(huge)], CPU)
    assert prepare(folder, [*words, "--hardware", str(huge)], {**CPU, "RM_SCALE_FORCE": "plan"}) == 0
    monkeypatch.setattr(output_lock, "_job_may_run", lambda owner: owner.job == 6)
    lock = tmp_path / "out" / output_lock.LOCK_FILE
    lock.parent.mkdir(exist_ok=True)
    theirs = replace(output_lock.this_process({}), host="elsewhere", job=6)
    lock.write_text(json.dumps(asdict(theirs)))
    with pytest.raises(UserError, match=r"job 6 is running and writes there .*Fix: another --output_dir, or scancel 6"):
        prepare(folder, words, CPU)
    lock.write_text(json.dumps(asdict(replace(theirs, job=5))))
    assert prepare(folder, words, CPU) == 0


def test_an_attempt_waits_for_lost_nodes_a_moment(words: list[str], tmp_path: Path) -> None:
    first = folder_of(tmp_path, 0)
    assert prepare(first, words, CPU) == 0
    again = replace(read_start(first / "start.json"), attempt=1, folder=str(first.with_name("attempt-1")))
    begun = time.monotonic()
    wait_for_earlier_attempt(again, 0.5)
    assert time.monotonic() - begun >= 0.5, "a node that is lost never says how it ended"
    end_path(first, "node1").write_text("{}")
    begun = time.monotonic()
    wait_for_earlier_attempt(again, 1200)
    assert time.monotonic() - begun < 600
    wait_for_earlier_attempt(replace(again, attempt=0), 30)
