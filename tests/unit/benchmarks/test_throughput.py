"""The parts of the throughput benchmark that need no training: the grid, what endings mean, FLOPs, data."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from benchmarks import predicted, smoke, workloads
from rm_scale.demo.assets import make_tiny_model
from rm_scale.planning.shape import read_model_config, shape_from_config
from rm_scale.reporting.benchmarks.sealed_records import Case, case_name, write_record
from tests.support.records import case, record

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import throughput  # noqa: E402
import throughput_case  # noqa: E402
import throughput_peer  # noqa: E402


def options(*words: str) -> Any:
    found = throughput.parse_arguments(["--tier", "tiny", *words])
    found.num_nodes = 1
    return found


def test_the_grid_puts_peers_beside_ours() -> None:
    asked = options(
        "--methods", "full,qlora", "--packing", "all", "--stages", "0,offload", "--ranks", "1,2", "--peers", "trl"
    )
    cases = list(throughput.grid(asked, "tiny", 1000))
    assert len(cases) == 2 * 2 * 2 * (1 + 3) and len({case_name(one) for one in cases}) == len(cases)
    assert [one.system for one in cases[:4]] == ["trl", "rm_scale", "rm_scale", "rm_scale"]
    assert {(one.zero_stage, one.offload) for one in cases} == {(0, False), (3, True)}
    assert [one.micro_batch for one in cases[:4]] == ["4 groups", "4 groups", "planned tokens", "planned tokens"]


@pytest.mark.parametrize(
    ("words", "text"), [(["--methods", "full,half"], "'half'"), (["--stages", "5"], "'5'"), (["--packing", "x"], "'x'")]
)
def test_words_that_are_unknown(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert text in capsys.readouterr().err


def test_missing_peers_are_named() -> None:
    def why(**more: Any) -> str | None:
        return throughput.missing_peer(case(packing="padding", **more))

    assert why(system="trl") is None and why(system="rm_scale") is None
    assert why(system="openrlhf") == "openrlhf is not installed"
    assert why(system="nonesuch") == "unknown peer; known are trl, openrlhf, llamafactory"
    assert why(system="trl", num_nodes=2, num_ranks=4) == "peers are run on one node only"


def test_only_sound_results_count_as_finished(tmp_path: Path) -> None:
    for status, expected in (("ok", True), ("out_of_memory", True), ("failed", False), ("killed", False)):
        written = record(status=status, reason="r")
        write_record(written, tmp_path)
        assert (throughput.finished(written.case, tmp_path, 3, 1) is not None) == expected
    path = write_record(record(), tmp_path)
    path.write_text(path.read_text().replace("8000000000", "1"))
    assert path.read_text().count("\n") == 1, "each took the place of the one before"
    assert throughput.finished(record().case, tmp_path, 3, 1) is None, "an edited record is measured again"


def test_a_record_of_fewer_steps_does_not_count_as_finished(tmp_path: Path) -> None:
    write_record(record(), tmp_path)
    assert throughput.finished(record().case, tmp_path, 2, 1) is not None
    assert throughput.finished(record().case, tmp_path, 4, 1) is None, "more steps were asked for"
    assert throughput.finished(record().case, tmp_path, 3, 2) is None, "another warm-up"
    assert throughput.finished(case(further="--lora_r 64"), tmp_path, 3, 1) is None, "other settings"


def test_padded_rows_need_a_batch_that_can_be_split(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--global_batch_size", "6", "--micro_batch", "4", "--peers", "trl")
    assert "needs a multiple" in (said := capsys.readouterr().err) or "need a multiple" in said
    assert options("--global_batch_size", "6", "--packing", "prefix_shared").global_batch_size == 6


def test_records_name_no_folder_however_deep_it_stands() -> None:
    job = throughput_case.Job(
        case(), Path("/m/model"), Path("/d/x"), "auto", Path("/w/runs/a"), None, 1, 1, None, 4, 9.0
    )
    config = {"job": {"model": "/m/model", "places": ["/w/runs/a/run", {"data": "/d/x"}]}, "steps": 3}
    clean = throughput_case.without_folders(config, job)
    assert clean == {"job": {"model": "MODEL", "places": ["OUTPUT", {"data": "DATA"}]}, "steps": 3}


def test_records_name_no_host() -> None:
    figures = {"devices": {"cpu-secret": {"title": "A"}}, "measured": {"host": "secret", "links": {}}}
    assert throughput_case.without_host(figures) == {"devices": {"device-0": {"title": "A"}}, "measured": {"links": {}}}
    assert throughput_case.without_host({}) == {}


def test_figures_of_another_machine_are_not_taken(tmp_path: Path) -> None:
    here = throughput_case.environment_here()
    file, name = tmp_path / "hardware-1.yaml", here["gpus"][0] if here["gpus"] else here["cpu"]
    for device, host, expected in ((name, None, True), (name, "elsewhere", False), ("Other", None, False)):
        file.write_text(yaml.safe_dump({"measured": {"device_name": device} | ({"host": host} if host else {})}))
        assert throughput.is_of_this_machine(file) == expected


def test_the_watch_sees_how_much_a_process_holds() -> None:
    with subprocess.Popen([sys.executable, "-c", "x = b'1' * 300_000_000; input()"], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 600
        while throughput_case.resident(process.pid) < 300e6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 300e6 <= throughput_case.resident(process.pid) < 900e6
        process.kill()
    assert throughput_case.resident(process.pid) == 0, "it has ended"


@pytest.mark.parametrize(
    ("code", "why", "log", "status"),
    [
        (0, "", "fine", "ok"),
        (-9, "", "", "killed"),
        (1, "", "launcher: exits with return code = -9", "killed"),
        (2, "", "x\ntraining stopped: out of memory: CUDA out of memory. Tried\nbye", "out_of_memory"),
        (-15, "ended when less than 600 MB of the host's memory were left", "", "out_of_memory"),
        (-15, "not done after 5 s", "", "killed"),
        (1, "", "Traceback\nValueError: no", "failed"),
    ],
)
def test_what_an_ending_means(code: int, why: str, log: str, status: str) -> None:
    found = throughput_case.judge(code, why, log, 1.0)
    assert found.status == status and (found.reason or status == "ok")


def job(tmp_path: Path, model: Path, one: Case, **more: Any) -> throughput_case.Job:
    plain: dict[str, Any] = {
        "case": one,
        "model": model,
        "data": tmp_path / "pairs.jsonl",
        "data_format": "explicit_prompt",
        "work": tmp_path / "work" / "case",
        "hardware": None,
        "steps": 1,
        "warmup": 0,
        "max_tokens": None,
        "micro_batch": 4,
        "time_limit": 60.0,
    }
    return throughput_case.Job(**{**plain, **more})


def test_a_case_that_takes_too_long_or_too_much_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(tmp_path, tmp_path, case(), time_limit=1.0)
    asked.work.mkdir(parents=True)
    sleeper = [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(1200)'])",
    ]
    found = throughput_case.watched(sleeper, asked)
    assert (found.status, found.reason) == ("killed", "not done after 1 s") and found.seconds < 600
    monkeypatch.setattr(throughput_case, "MINIMAL_FREE_BYTES", 1e18)
    found = throughput_case.watched(sleeper, job(tmp_path, tmp_path, case()))
    assert found.status == "out_of_memory" and "of the host's memory were left" in found.reason


def test_records_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    asked = job(tmp_path, tmp_path / "model", case())
    words = [
        sys.executable,
        str(throughput_case.REPOSITORY / "rm_scale" / "train.py"),
        *throughput_case.settings(asked),
    ]
    text = throughput_case.public_command(words, asked)
    assert (
        text.startswith("python rm_scale/train.py --model_name_or_path MODEL --dataset_path DATA")
        and str(tmp_path) not in text
    )
    config = {
        "output_dir": str(asked.output),
        "hardware": str(tmp_path / "work" / "h.yaml"),
        "dataset_path": [str(asked.data)],
    }
    assert throughput_case.without_folders(config, asked) == {
        "output_dir": "OUTPUT",
        "hardware": ".../h.yaml",
        "dataset_path": ["DATA"],
    }


def test_flops_by_hand(tmp_path: Path) -> None:
    shape = shape_from_config(read_model_config(str(make_tiny_model(tmp_path / "m"))))
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    full = throughput_case.FlopCounter(case(), shape)
    assert full.useful(100, 0) == 6 * linear * 100
    assert full.useful(0, 100) == 3 * 2 * 2 * 64 * 100  # three passes, QK and AV, halved for causality, two layers
    lora = throughput_case.FlopCounter(case(method="lora"), shape)
    adapters = 16 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    assert lora.useful(100, 0) == pytest.approx(2 * linear * 100 * (2 + adapters / linear))
    again = throughput_case.FlopCounter(case(gradient_checkpointing=True), shape)
    assert full.executed(100, 0) == 6 * linear * 100 < again.executed(100, 0) <= 8 * linear * 100


def test_peer_counts_padded_batches() -> None:
    import torch

    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert throughput_peer.counts_of([{"attention_mask": mask}] * 2) == {
        "pairs": 2,
        "real": 10,
        "processed": 16,
        "squares": 26,
        "attended_pairs": 40,
    }


@pytest.mark.parametrize("name", list(workloads.MIXES))
def test_length_mixes_have_the_lengths_they_name(name: str) -> None:
    mix = workloads.MIXES[name]
    pairs = workloads.synthetic_pairs(mix, 1.0, 4000, 8192)
    prompts = [len(pair["prompt"].split()) for pair in pairs]
    answers = [len(pair["chosen"].split()) for pair in pairs]
    assert mean(prompts) == pytest.approx(mix.prompt, rel=0.08) and mean(answers) == pytest.approx(
        mix.response, rel=0.08
    )
    assert len({pair["chosen"] for pair in pairs}) == len(pairs)
    assert workloads.synthetic_pairs(mix, 1.0, 50, 8192) == pairs[:50], "the same every time"
    short = workloads.synthetic_pairs(mix, 1.0, 500, 256)
    assert max(len(p["prompt"].split()) + len(p["chosen"].split()) for p in short) < 256


def test_unknown_models_and_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--tier 9b: neither a known size .* nor a folder"):
        workloads.make_model("9b", tmp_path)
    with pytest.raises(SystemExit, match=r"--data nowhere.jsonl: neither a file nor one of hh-like"):
        workloads.make_data("nowhere.jsonl", tmp_path, tmp_path, 1, 64)


def test_smoke_flags_what_has_fallen() -> None:
    before = {"a": 3.0, "b": 2.0, "c": 1.0}
    assert smoke.compare({"a": 2.1, "b": 1.0, "d": 9.0}, before) == [
        "c: not measured any more",
        "b: 1.00, and it was 2.00",
    ]
    assert set(json.loads(smoke.REFERENCE.read_text())) == {
        "prefix_shared over TRL",
        "padding_free over TRL",
        "none over TRL",
        "prefix_shared over padding_free",
    }


@pytest.mark.long
def test_predicted_page_is_up_to_date() -> None:
    assert predicted.OUTPUT.read_text() == predicted.page(), "python benchmarks/predicted.py writes it"
    rows = list(predicted.predictions())
    assert len(rows) == 24 and all(not math.isnan(float(str(row[3]))) for row in rows)
