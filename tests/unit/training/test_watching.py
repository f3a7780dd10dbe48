"""A run that looks wrong says so by name; one that is wrong stops; a save that differs is refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from rm_scale import training_run
from rm_scale.distributed import World
from rm_scale.errors import CheckpointError, TrainingError
from rm_scale.modeling.head import active_head
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.training.callbacks import EarlyWarnings, MetricsFile
from rm_scale.training.checkpoint.reload_check import disk_errors_explained, refuse_unsafe_pickles, verify_saved
from rm_scale.training.checkpoint.resume import choose_resume
from rm_scale.training.hang_report import explain_hang
from rm_scale.training.head_sync import head_weight
from rm_scale.training.slow_ranks import name_slow_ranks, slow_rank_text, slow_ranks
from rm_scale.training.watchdog import Watchdog, collective_failure

ARGS: Any = SimpleNamespace(spec=TrainingArguments)


def log(callback: Any, **logs: Any) -> None:
    state = TrainerState()
    state.is_world_process_zero = True
    callback.on_log(ARGS, state, TrainerControl(), logs=logs)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("rm_scale").propagate = True
    caplog.set_level(logging.WARNING)
    return caplog


def test_equal_rewards_are_named_once(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings()
    for _ in range(3):
        log(callback, loss=0.69, max_reward=0.5, min_reward=0.5)
    assert warnings.text.count("[rewards_equal] all rewards are 0.5") == 1


def test_accuracy_of_chance_is_named(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings(window=400)
    for _ in range(4):
        log(callback, loss=0.69, accuracy=0.51, num_pairs=100)
    assert "[accuracy_stuck] accuracy over the last 400 training pairs is 0.510" in warnings.text


def test_real_log_lines_feed_the_watch(trainer_and_config: Any) -> None:
    """The meter's own names, so that the watch can't go blind when they change."""
    trainer, _ = trainer_and_config
    (batch,) = next(iter(trainer.get_train_dataloader()))["micro_batches"]
    trainer.meter.add(torch.randn(len(batch["row_group"])), batch)
    assert {"num_pairs", "accuracy", "max_reward", "min_reward"} <= trainer.meter.read().keys()


def test_learning_is_not_warned_about(warnings: pytest.LogCaptureFixture) -> None:
    callback = EarlyWarnings(window=400)
    for _ in range(8):
        log(callback, loss=0.6, accuracy=0.7, num_pairs=100, max_reward=1.0, min_reward=0.0)
    assert "[" not in warnings.text


def test_metrics_file_has_one_object_a_line(tmp_path: Path) -> None:
    callback = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    log(callback, loss=0.5, tensor=torch.tensor(2.0))
    log(callback, loss=float("nan"))
    lines = [json.loads(line) for line in callback.path.read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 0.5, "tensor": 2.0}, {"step": 0, "loss": "nan"}]


def test_a_table_is_in_one_line_of_the_metrics_file(tmp_path: Path) -> None:
    callback = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    callback.details = {"load": {"share": [0.5, 0.5]}}
    log(callback, loss=0.5)
    log(callback, loss=0.25)
    lines = [json.loads(line) for line in callback.path.read_text().splitlines()]
    assert lines == [{"step": 0, "loss": 0.5, "load": {"share": [0.5, 0.5]}}, {"step": 0, "loss": 0.25}]


@pytest.fixture(scope="module")
def trainer_and_config(tiny_model: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real trainer on the tiny model, in this process."""
    from rm_scale.config_parsing import config_from_dict
    from rm_scale.planning.plan import make_plan

    output = tmp_path_factory.mktemp("watching") / "run"
    values = {"model_name_or_path": str(tiny_model), "dataset_path": str(pairs_file), "output_dir": str(output)}
    values |= {"max_steps": 3, "bf16": False, "eval_split_size": 10, "disable_tqdm": True, "logging_steps": 1}
    parsed = config_from_dict(values)
    config, plan = parsed.config, make_plan(parsed, 1, "cpu")
    tokenizer, encoder = training_run.load_text_encoder(config)
    data = training_run.load_data(config, encoder)
    plan = training_run.count_steps(plan, data, config)
    arguments = training_run.build_arguments(config, plan)
    loaded = training_run.load_model(config, plan, tokenizer)
    training_run.open_run_directory(config, plan, data, World())
    return training_run.build_trainer(config, plan, arguments, tokenizer, encoder, loaded, data), config


def test_a_save_that_differs_is_refused(trainer_and_config: Any, tmp_path: Path) -> None:
    trainer, _ = trainer_and_config
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    contract, head = ScoringContract.load(folder), head_weight(trainer.model)
    verify_saved(folder, contract, head)
    good = load_file(folder / "model.safetensors")

    def damage(**changes: torch.Tensor) -> None:
        save_file({**good, **changes}, folder / "model.safetensors", metadata={"format": "pt"})

    damage(**{"score.weight": torch.zeros_like(good["score.weight"])})
    with pytest.raises(CheckpointError, match="the saved reward head is not the one in training"):
        verify_saved(folder, contract, head)
    name = "model.layers.0.mlp.up_proj.weight"
    damage(**{name: good[name] * 20})
    with pytest.raises(CheckpointError, match="the saved model scores differently"):
        verify_saved(folder, contract, head)
    damage(**{name: torch.full_like(good[name], float("nan"))})
    with pytest.raises(CheckpointError, match="empty or not finite"):
        verify_saved(folder, contract, head)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights were written"):
        verify_saved(folder, contract, head)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    (tmp_path / "global_step1").mkdir()
    torch.save({"module": torch.ones(2)}, tmp_path / "global_step1" / "good.pt")
    refuse_unsafe_pickles(tmp_path)
    torch.save({"module": Evil()}, tmp_path / "global_step1" / "zz_evil.pt")
    with pytest.raises(CheckpointError, match="would run code when it is loaded"):
        refuse_unsafe_pickles(tmp_path)
    (tmp_path / "global_step1" / "zz_evil.pt").rename(tmp_path / "rng_state_0.pth")
    with pytest.raises(CheckpointError, match=r"rng_state_0\.pth: can't be read as plain tensors"):
        refuse_unsafe_pickles(tmp_path)
    (tmp_path / "rng_state_0.pth").unlink()
    (tmp_path / "global_step1").rename(tmp_path / "other")
    (tmp_path / "latest").write_text("other")
    with pytest.raises(CheckpointError, match="names 'other', not a global_stepN folder"):
        refuse_unsafe_pickles(tmp_path)
    assert not marker.exists()


def test_a_head_that_is_not_finite_never_starts(trainer_and_config: Any) -> None:
    trainer, _ = trainer_and_config
    head = active_head(trainer.model)
    before = head.weight.data.clone()
    head.weight.data = torch.full_like(before, float("inf"))
    try:
        with pytest.raises(TrainingError, match="NaN or infinite weights before the first step"):
            trainer.train()
    finally:
        head.weight.data = before


def test_a_loss_that_is_not_finite_stops_the_run(trainer_and_config: Any) -> None:
    trainer, _ = trainer_and_config
    weight = trainer.model.get_input_embeddings().weight
    before = weight.data.clone()
    weight.data = torch.full_like(before, float("nan"))
    try:
        with pytest.raises(
            TrainingError,
            match=r"step 1: the loss is not finite on 1 ranks.*Groups .*nonfinite.jsonl",
        ):
            trainer.train()
    finally:
        weight.data = before


def test_resume_without_a_checkpoint_is_explained(trainer_and_config: Any, tmp_path: Path) -> None:
    _, config = trainer_and_config
    nowhere = config.model_copy(update={"resume_from_checkpoint": "last", "output_dir": str(tmp_path / "none")})
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        choose_resume(nowhere, World(), Path(nowhere.output_dir) / "run")


def test_a_full_disk_is_explained(trainer_and_config: Any) -> None:
    """/dev/full takes no byte: every write to it fails as on a full disk."""
    with (
        pytest.raises(CheckpointError, match=r"could not be written .*Fix: free disk space"),
        disk_errors_explained("out"),
    ):
        Path("/dev/full").write_text("x" * 100_000)


def hang_report(rank: int, given: int | dict[str, int], step: int = 7) -> dict[str, Any]:
    """Of a rank whose stack says nothing, as under NCCL: each waits for its GPU, which looks like work."""
    numbers = given if isinstance(given, dict) else {"0": given}
    groups = [{"group": name, "backend": "nccl", "ranks": None, "given": count} for name, count in numbers.items()]
    at = f"trainer.py:{10 + rank} (_get_grad_norm)"
    return {"rank": rank, "step": step, "place": "micro-batch 2 of 2", "state": "work", "at": at, "collectives": groups}


def test_under_nccl_the_rank_that_lacks_a_collective_is_named_and_no_other() -> None:
    """All four look busy. By their stacks every one of them, and so none, did not reach the collective."""
    text = explain_hang([hang_report(rank, 41 if rank == 2 else 42) for rank in range(4)], 4, "nothing has moved")
    assert text == (
        "step 7: nothing has moved: rank 2 did not reach the collective: rank 2 stands at trainer.py:12 "
        "(_get_grad_norm) in micro-batch 2 of 2, given 41 of 42 collectives of group 0 (nccl). Rank 0, 1, 3 waited for "
        "it in micro-batch 2 of 2. Fix: look at that rank's node and its stack; a longer wait is allowed by "
        "--ddp_timeout."
    )


def test_a_rank_that_looks_like_one_that_waits_is_named_by_its_number() -> None:
    """In a collective of torch.distributed by its stack, and yet one behind: it waits in the one before."""
    reports = [hang_report(0, 42), hang_report(1, 41) | {"state": "collective"}]
    assert "rank 1 did not reach the collective" in explain_hang(reports, 2, "x")


def test_equal_numbers_mean_the_network_or_a_stuck_kernel() -> None:
    text = explain_hang([hang_report(rank, {"0": 42, "1": 9}) for rank in range(2)], 2, "nothing has moved")
    assert "no rank lacks a collective, all were given as many: 42 of group 0 (nccl), 9 of group 1 (nccl)." in text
    assert "it is the network, a kernel on a GPU, or what they all do there" in text
    assert "Rank 0: trainer.py:10 (_get_grad_norm) in micro-batch 2 of 2; Rank 1: trainer.py:11" in text
    assert "did not reach" not in text and "that rank's node" not in text


def test_a_silent_rank_is_named_and_those_that_wait_for_it_are_not() -> None:
    text = explain_hang([hang_report(rank, 42) for rank in (0, 1, 3)], 4, "nothing has moved")
    assert "rank 2 does not answer (dead, frozen, or its node is lost). Rank 0, 1, 3 waited for it" in text
    assert "did not reach" not in text
    # Of two ranks only one is left, with nobody to compare it with.
    text = explain_hang([hang_report(0, 42)], 2, "nothing has moved")
    assert "rank 1 does not answer" in text and "rank 0 did not reach" not in text


def test_beside_a_silent_rank_one_that_is_late_may_wait_for_it() -> None:
    text = explain_hang([hang_report(0, 42), hang_report(1, 40), hang_report(3, 42)], 4, "nothing has moved")
    assert "rank 2 does not answer" in text and "rank 1 did not reach the collective" in text
    assert "It may itself wait for rank 2. Rank 0, 3 waited for it" in text


def test_ranks_that_wait_for_each_other_are_told_from_one_that_is_late() -> None:
    text = explain_hang([hang_report(0, {"0": 5, "1": 2}), hang_report(1, {"0": 4, "1": 3})], 2, "x")
    assert "rank 0, 1 wait for each other, each in another group" in text
    assert (
        "rank 0 was given 2 of 3 collectives of group 1 (nccl); rank 1 was given 4 of 5 collectives of group 0" in text
    )
    late = [hang_report(0, {"0": 5, "1": 3}), hang_report(1, {"0": 4, "1": 3}), hang_report(2, {"0": 4, "1": 2})]
    text = explain_hang(late, 3, "x")
    assert "rank 2 did not reach the collective" in text and "Rank 1 lacks one too, but is ahead of it" in text


def test_without_numbers_and_without_a_clue_nobody_is_named() -> None:
    text = explain_hang([hang_report(rank, {}) for rank in range(2)], 2, "x")
    assert "which rank lacks a collective is not known. Rank 0: trainer.py:10" in text and "did not reach" not in text


# As torch 2.x and NCCL print them (pytorch's NCCLUtils.cpp and ProcessGroupNCCL.cpp, issues of NVIDIA/nccl).
NCCL_ERROR = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"
)
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
TIMED_OUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=466119168, "
    "NumelOut=466119168, Timeout(ms)=600000) ran for 600004 milliseconds before timing out."
)
BROKE, LATE = "the connection to another rank broke", "a collective timed out"


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (
            "DistBackendError",
            NCCL_ERROR.format("remote process exited or there was a network error", REMOTE, "x"),
            BROKE,
        ),
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "unhandled system error", SYSTEM, "socketPollConnect: connect returned Connection refused"
            ),
            BROKE,
        ),
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "internal error", "ncclInternalError: Internal check failed.", "NET/IB : Got completion from"
            ),
            BROKE,
        ),
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "internal error",
                "ncclInternalError: Internal check failed.",
                "Net : Connection closed by remote peer node-7<47861>",
            ),
            BROKE,
        ),
        ("DistBackendError", "NCCL communicator was aborted on rank 1. ", BROKE),
        (
            "DistBackendError",
            f"NCCL communicator was aborted on rank 1.  Original reason for failure was: {TIMED_OUT}",
            LATE,
        ),
        ("DistBackendError", TIMED_OUT, LATE),
        ("DistBackendError", "NCCL timeout in communicator initialization.", LATE),
        (
            "DistNetworkError",
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
            BROKE,
        ),
        ("DistStoreError", "wait timeout after 8000ms, keys: /default_pg/0//0", LATE),
        ("DistStoreError", "Socket Timeout", LATE),
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711", BROKE),
        ("RuntimeError", "[unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete", LATE),
        # A rank's own mistakes: they end with their own traceback.
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "unhandled system error", SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-x"
            ),
            None,
        ),
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "invalid usage", "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.", "x"
            ),
            None,
        ),
        (
            "DistBackendError",
            NCCL_ERROR.format(
                "unhandled cuda error", "ncclUnhandledCudaError: Call to CUDA function failed.", "Cuda failure"
            ),
            None,
        ),
        ("RuntimeError", "CUDA error: device-side assert triggered", None),
    ],
)
def test_errors_of_another_rank_are_told_from_ones_own(kind: str, text: str, expected: str | None) -> None:
    error = (RuntimeError if kind == "RuntimeError" else getattr(torch.distributed, kind))(text)
    assert collective_failure(error) == expected


def test_only_runtime_errors_come_from_collectives() -> None:
    assert collective_failure(BrokenPipeError("Broken pipe")) is None


def watchdog(folder: Path, timeout: float = 1800.0) -> Watchdog:
    return Watchdog(folder, 0, 2, timeout, 1, lambda: True, lambda text: None)


@pytest.mark.parametrize("timeout", [10.0, 20.0, 100.0, 300.0, 1800.0, 7200.0])
def test_the_ranks_have_spoken_before_the_collective_gives_up(tmp_path: Path, timeout: float) -> None:
    watched = watchdog(tmp_path, timeout)
    assert timeout / 2 <= watched.limit and watched.limit + watched.grace < timeout


def test_no_share_of_work_is_given_where_waiting_does_not_block_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NCCL as the backend, and the same thread with gloo: the first has no figure however long it watches."""
    known = {}
    for backend in ("nccl", "gloo"):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        monkeypatch.setattr("rm_scale.training.watchdog.count_collectives", list)
        monkeypatch.setattr("rm_scale.training.watchdog._LEAST_SAMPLES", 1)
        watched = watchdog(tmp_path)
        watched.start()
        while backend == "gloo" and not any(watched._samples.values()):
            watched.join(0.01)
        watched.join(0.5)
        watched.stop()
        watched.join()
        known[backend] = (watched.knows_work, watched.work_share())
    assert known["nccl"] == (False, None)
    assert known["gloo"][0] and known["gloo"][1] is not None


def test_a_rank_is_slow_beside_one_that_was_never_seen_at_work(tmp_path: Path) -> None:
    """On a quick machine a rank can finish its steps between two looks; it is the others' measure all the same."""
    shares = []
    for samples in ({"work": 0, "collective": 60}, {"work": 58, "collective": 2}):
        watched = watchdog(tmp_path)
        watched._samples = samples
        shares.append(watched.work_share() or 0.0)
    assert [rank for rank, _ in slow_ranks([share * 6.6 for share in shares])] == [1]


def test_the_first_interval_of_a_process_names_no_slow_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled in it, by one rank for all; its samples are used up all the same."""
    shares = iter([0.9, 0.9])
    watching = SimpleNamespace(knows_work=True, work_share=lambda: next(shares))
    monkeypatch.setattr("rm_scale.training.slow_ranks.gather_from_ranks", lambda mine: [mine, mine / 3, mine / 3])
    assert name_slow_ranks(cast(Watchdog, watching), 10.0, is_first=True) == {}
    assert name_slow_ranks(cast(Watchdog, watching), 10.0) == {"slow_ranks": [0]}
    assert next(shares, None) is None


def test_the_line_of_a_slow_rank_says_what_was_measured() -> None:
    text = slow_rank_text(3, 2.2, 2.04)
    assert "[slow_rank] rank 3 worked 2.20 s since the last log line, 2.0 times as long as the median rank" in text
    assert "time outside collectives" in text and "wait" not in text


def test_after_an_error_the_line_that_raised_it_is_where_the_rank_stands(tmp_path: Path) -> None:
    """Not the watchdog's own frames, which the main thread is in by then and which look like work."""
    try:
        torch.ones(2) @ torch.ones(3)
    except RuntimeError:
        found = watchdog(tmp_path)._where()
    assert found["state"] == "collective" and "test_watching.py" in found["at"]


def test_reports_of_an_earlier_run_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    """A run without a record of attempts is always in its first."""
    folder = tmp_path / "hang-attempt1"
    folder.mkdir()
    (folder / "rank-00001.json").write_text("{}")
    watched = watchdog(tmp_path)
    watched._look_seconds = float("inf")  # or it would leave, and take this process with it
    watched.start()
    try:
        assert watched._reports() == []
        (folder / "rank-00000.json").write_text("{}")
        assert [name for name, _ in watched._reports()] == ["rank-00000.json"]
    finally:
        watched.stop()
        watched.join()


def test_a_rank_that_can_not_write_where_it_stands_still_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os._exit", sys.exit)
    (tmp_path / "hang-attempt1").touch()  # a file where the folder belongs
    with pytest.raises(SystemExit) as left:
        watchdog(tmp_path).report_and_leave("nothing has moved")
    assert left.value.code == 1
    assert "rank 0: nothing has moved; who is missing can't be said: FileExistsError" in capsys.readouterr().err
