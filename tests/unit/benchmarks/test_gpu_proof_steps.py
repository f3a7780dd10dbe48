"""The steps of the GPU proof, as far as they need no training: what they make of findings, counts and predictions."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_proof import checks, measures, ranks, step_observer
from benchmarks.gpu_proof.context import Context, Done, Settings, StepError
from benchmarks.gpu_proof.plan import REAL, SMALL


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_of(tmp_path, rehearse=True)


def context_of(tmp_path: Path, rehearse: bool, step: str = "doctor", **more: Any) -> Context:
    device = "cpu" if rehearse else "cuda"
    settings = Settings(
        step, rehearse, device, 1, tmp_path / "assets", tmp_path / "work", tmp_path / "results", 300.0, **more
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    return Context(settings)


def test_settings_reach_the_step_as_they_are(tmp_path: Path) -> None:
    settings = context_of(tmp_path, rehearse=False, step="syncs", memory_bytes=8, device_name="x").settings
    settings.save(tmp_path / "s.json")
    assert Settings.load(tmp_path / "s.json") == settings


def test_commands_leave_their_output_and_tell_of_their_end(context: Context) -> None:
    told: list[str] = []
    script = "import sys; print('out'); print('SomeError: bad', file=sys.stderr); sys.exit({})"
    commands = {name: [sys.executable, "-c", script.format(code)] for name, code in (("a", 0), ("b", 3))}
    done = context.run_together(commands, lambda name, done: told.append(f"{name}{done.code}"))
    assert sorted(told) == ["a0", "b3"] and done["a"].out == "out\n"
    assert done["b"].why().startswith("exit code 3: ") and "SomeError: bad" in done["b"].why()
    assert context.run("c", [sys.executable, "-c", "import os; print(os.environ['X'])"], X="7").out == "7\n"


def test_an_asset_that_could_not_be_made_is_said(context: Context) -> None:
    context.settings.assets.mkdir()
    (context.settings.assets / "failed").write_text("OSError: no room")
    with pytest.raises(StepError, match="tiny could not be made: OSError: no room"):
        context.asset("tiny")


# --- Doctor and tests ------------------------------------------------------------------------------------------------


def report(*checks_: tuple[str, str, str]) -> Done:
    found = [{"name": name, "status": status, "seen": seen, "fix": ""} for name, status, seen in checks_]
    return Done(1, "noise\n" + json.dumps({"ok": False, "counts": {}, "checks": found}), "", 1.0)


def test_another_torch_is_noted_and_does_not_stop_the_proof(context: Context) -> None:
    done = report(("torch", "fail", "2.11.0, needed >=2.13,<2.14"), ("gpus", "pass", "1"), ("nccl", "skip", ""))
    assert checks._judge_doctor(context, done) == []
    assert context.figures["doctor"]["versions"] == ["torch 2.11.0, needed >=2.13,<2.14"]
    bad = report(("torch", "fail", "2.11.0, needed >=2.13,<2.14"), ("gpu memory", "fail", "errors on GPU 0"))
    assert checks._judge_doctor(context, bad) == ["doctor: gpu memory: errors on GPU 0"]
    assert checks._judge_doctor(context, Done(2, "", "Traceback\nOSError: x", 1.0))[0].startswith("doctor: exit code 2")


JUNIT = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase>
<testcase name="c"><failure message="m">text</failure></testcase><testcase name="d"><error/></testcase></testsuite>
</testsuites>"""


def test_attention_tests_must_have_run(tmp_path: Path) -> None:
    context, file, done = context_of(tmp_path, rehearse=False), tmp_path / "t.xml", Done(5, "", "no tests", 1.0)
    assert checks._judge_tests(context, done, file)[0].startswith("tests/gpu: exit code 5")
    file.write_text(JUNIT)
    assert checks.count_tests(file) == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["c", "d"]}
    assert checks._judge_tests(context, done, file) == ["tests/gpu: 2 failed: c; d"]
    file.write_text('<testsuites><testsuite><testcase name="b"><skipped/></testcase></testsuite></testsuites>')
    assert "no packed attention test ran" in checks._judge_tests(context, done, file)[0], "skipped is not passed"
    assert checks._judge_tests(context_of(tmp_path, rehearse=True), done, file) == [], "but for a rehearsal it will do"


# --- Trainings -------------------------------------------------------------------------------------------------------


def left_by_a_run(folder: Path, losses: list[Any], device: str = "cpu") -> Path:
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": x}) + "\n" for n, x in enumerate(losses, 1))
    )
    (run / "plan.json").write_text(json.dumps({"device": device}))
    (run / "timing.json").write_text(json.dumps({"load_seconds": 1.5, "peak_memory": {"host_bytes": 7}}))
    (folder / "scoring_contract.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345")
    return folder


def test_what_counts_as_trained(context: Context, tmp_path: Path) -> None:
    fine = Done(0, "", "", 2.0)
    found = checks.trained(context, "x", fine, left_by_a_run(tmp_path / "good", [0.7, 0.6]))
    assert found["losses"] == [0.7, 0.6] and found["file_bytes"] == 5 and found["load_seconds"] == 1.5
    bad = {
        "exit code 1": (Done(1, "", "RuntimeError: x", 1.0), left_by_a_run(tmp_path / "a", [0.7])),
        "losses are": (fine, left_by_a_run(tmp_path / "b", [0.7, float("nan")])),
        r"losses are \[\]": (fine, left_by_a_run(tmp_path / "c", [])),
        "ran on cuda, not on cpu": (fine, left_by_a_run(tmp_path / "d", [0.7], "cuda")),
    }
    for text, (done, output) in bad.items():
        with pytest.raises(StepError, match=text):
            checks.trained(context, "x", done, output)
    unsaved = left_by_a_run(tmp_path / "e", [0.7])
    (unsaved / "scoring_contract.json").unlink()
    with pytest.raises(StepError, match="without a verified save"):
        checks.trained(context, "x", fine, unsaved)


def test_golden_scores_that_moved_or_are_nan() -> None:
    golden = {"training": [1.0], "cuda": [1.2], "moved": {"cuda": 0.2}, "allowed": 0.3}
    checks._require_golden(golden, "cuda")
    for moved in (0.4, float("nan")):
        with pytest.raises(StepError, match="score differently after the reload on cuda"):
            checks._require_golden({**golden, "moved": {"cuda": moved}}, "cuda")


def test_the_line_that_names_a_stopped_rank(context: Context, tmp_path: Path) -> None:
    line = "rm_scale: step 3: nothing has moved for 14 s (ddp_timeout): rank 1 does not answer (dead). Rank 0 waited"
    (context.settings.work / "train.out").write_text("")

    class Ended:
        def poll(self) -> int:
            return 1

    for text, rank, expected in ((f"x\n{line}\ny\n", 1, line), (f"{line}\n", 11, None), ("nothing\n", 1, None)):
        (context.settings.work / "train.log").write_text(text)
        assert ranks._wait_for_name(context, Ended(), rank) == expected


# --- Blocking calls and kernels --------------------------------------------------------------------------------------


@pytest.fixture
def calls() -> Iterator[step_observer.BlockingCalls]:
    with warnings.catch_warnings():
        yield step_observer.BlockingCalls("cpu")


def test_blocking_calls_are_counted_each_time_with_their_place(calls: step_observer.BlockingCalls) -> None:
    """The warning of torch's own text, which Python would show once per line; others are shown as before."""
    shown: list[str] = []
    warnings.showwarning = lambda message, *_: shown.append(str(message))  # type: ignore[assignment]
    calls.device = "cuda"
    calls._mode = lambda mode: None  # type: ignore[method-assign]
    calls.begin()
    for count in (2, 3):
        for _ in range(count):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", UserWarning, 1)
        warnings.warn("something else", UserWarning, 1)
        calls.next_step()
    calls.end()
    figures = calls.figures(num_forwards=4)
    assert figures["per_step"] == [2, 3] and figures["of_rm_scale"] == 0 and shown == ["something else"] * 2
    ((place, count),) = calls.places.items()
    assert count == 5 and "test_gpu_proof_steps.py:" in place


def test_places_are_of_the_line_outside_torch(tmp_path: Path) -> None:
    source = "def call(f):\n    return f()\n"
    for file, expected in (
        ("/x/site-packages/trl/trainer/a.py", "trl/trainer/a.py:2 (call)"),
        ("/x/site-packages/torch/nn/a.py", "test_gpu_proof_steps.py"),
        (f"{step_observer.REPOSITORY}/rm_scale/training/m.py", "rm_scale/training/m.py:2 (call)"),
    ):
        space: dict[str, Any] = {}
        exec(compile(source, file, "exec"), space)
        assert expected in space["call"](lambda: step_observer.place_of_call(sys._getframe(1)))


def test_kernels_of_a_profile() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            torch.mm(torch.ones(128, 128), torch.ones(128, 128))
    rows = step_observer.kernel_rows(profile.key_averages(), on_cuda=False)
    mm = next(row for row in rows if row["kernel"] == "aten::mm")
    assert mm["calls"] == 3 and mm["ms"] > 0 and sum(row["share"] for row in rows) == pytest.approx(1, abs=0.01)
    assert step_observer.busy_seconds(profile.key_averages(), on_cuda=False) > 0
    assert step_observer.kernel_rows(profile.key_averages(), on_cuda=True) == []


# --- Attention and throughput ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [SMALL.attention[3], REAL.attention[3]])
def test_rows_of_short_and_long_texts(tokens: int) -> None:
    for name, layout in measures.layouts(tokens).items():
        assert layout.width == tokens and 0.7 * tokens <= layout.num_tokens <= tokens, name
        ends = [span.end for span in layout.spans]
        assert [span.start for span in layout.spans] == [0, *ends[:-1]], "without gaps"
    assert len(measures.layouts(16384)["short"].spans) == 68 and len(measures.layouts(16384)["long"].spans) == 2


def test_a_backend_that_is_off_fails_the_step(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    from rm_scale.batching.packed import attention

    measures.attention(context)
    rows = context.figures["tables"]["attention over 256 tokens"]
    assert [(row["texts"], row["backend"]) for row in rows] == [
        (texts, backend) for texts in ("short", "long") for backend in ("sdpa", "matmul")
    ]
    assert all(row["off"] < 0.05 for row in rows if row["off"] is not None) and "short sdpa" in context.verdict
    plain = attention.BACKENDS["matmul"]
    monkeypatch.setitem(attention.BACKENDS, "matmul", lambda *given: plain(*given) * 1.2)
    with pytest.raises(StepError, match=r"matmul on short is off by 0\.2"):
        measures.attention(context)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(attention.BACKENDS, "matmul", fails)
    with pytest.raises(StepError, match="matmul on long: no kernel image"):
        measures.attention(context)


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A 7B's configuration with a tokenizer, and pairs: no weights are read for a prediction."""
    from rm_scale.demo.assets import default_tokenizer

    folder = tmp_path_factory.mktemp("seven")
    default_tokenizer().save_pretrained(folder)
    shape = {**REAL.shapes["7b"], "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(shape))
    words = {"prompt": "one two three " * 40, "chosen": " yes it is so " * 10, "rejected": " no " * 12}
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(words) + "\n" for _ in range(40)))
    return {"7b": folder, "data-7b": pairs}


def seven(tmp_path: Path, assets: dict[str, Path], gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> Context:
    found = context_of(tmp_path, rehearse=False, step="7b_lora", memory_bytes=int(gigabytes * 1e9))
    found.settings.__dict__["device_name"] = "NVIDIA H200"
    monkeypatch.setattr(Context, "asset", lambda self, name: assets[name])
    monkeypatch.setattr(Context, "device", property(lambda self: "cpu"))  # plans for a GPU want one
    return found


def test_what_fits_is_tried_and_what_cannot_is_not(
    tmp_path: Path, seven_billion: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the planner's own figures: a card of 141 GB takes more pairs at once than one of 24, which must recompute."""
    large = seven(tmp_path, seven_billion, 141, monkeypatch)
    job = measures._case_job(large, "7b", "lora")
    assert job.case.num_parameters is not None and 6.5e9 < job.case.num_parameters < 6.9e9
    alone = measures.predicted_bytes(job, large, 1)
    assert 13e9 < alone < measures.predicted_bytes(job, large, 8)
    assert measures.predicted_bytes(measures.with_checkpointing(job, True), large, 8) < measures.predicted_bytes(
        job, large, 8
    )
    assert [micro for micro, checkpointing in measures.candidates(job, large) if not checkpointing][:2] == [8, 4]
    small = measures.candidates(job, seven(tmp_path, seven_billion, 17, monkeypatch))
    assert any(checkpointing for _, checkpointing in small)
    assert measures.candidates(job, seven(tmp_path, seven_billion, 1, monkeypatch)) == [(1, True)], "the least there is"


def test_key_numbers_of_a_case() -> None:
    ours = {"system": "rm_scale", "pairs/s": 8.0, "s/step": 2.0, "peak GB": 30.0, "predicted GB": 28.0, "save s": 3.0}
    trl = {"system": "trl", "pairs/s": 4.0, "s/step": 4.0, "peak GB": 60.0, "predicted GB": None, "save s": None}
    said = measures._line([ours, trl])
    assert "rm_scale 8 pairs/s, 2 s/step, 30.0 GB (predicted 28.0), saved in 3.0 s" in said and "2.00 times TRL" in said
    lost = measures._line([ours, {**trl, "pairs/s": None, "status": "out_of_memory"}])
    assert lost.endswith("trl: out_of_memory")
