"""The planner against what others have measured, and the file that `rm-scale plan --cases` reads and writes."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from rm_scale.errors import ConfigError
from rm_scale.planning.estimate import activations, peak_memory
from rm_scale.planning.launches import num_launches
from rm_scale.planning.published.predict import COLUMNS, OUTPUT_COLUMNS, predict_cases, predict_row, read_cases
from rm_scale.planning.published.reported_memory import RESERVED, RESERVED_SHARDED
from rm_scale.planning.published.scenario_of_row import NotModelled, Row, scenario_of_row, techniques

CASES = Path(__file__).resolve().parents[4] / "benchmarks" / "data" / "published_measurements.csv"


def relative_errors(column: str) -> dict[str, float]:
    found = {}
    for row in read_cases(str(CASES)):
        answer = predict_row(row)
        predicted = answer.peak_memory if column == "peak_mem_gb" else answer.tokens_per_second
        if predicted is not None and row[column].replace(".", "", 1).isdigit():
            found[row["id"]] = predicted / float(row[column]) - 1
    return found


def unpredicted(column: str) -> set[str]:
    rows = read_cases(str(CASES))
    return {row["id"] for row in rows if row[column].replace(".", "", 1).isdigit()} - relative_errors(column).keys()


def test_memory_is_close() -> None:
    errors = relative_errors("peak_mem_gb")
    assert mean(map(abs, errors.values())) <= 0.065
    assert max(map(abs, errors.values())) <= 0.177


def test_speed_is_close_with_one_efficiency_per_device() -> None:
    errors = relative_errors("tok_s_gpu")
    assert mean(map(abs, errors.values())) <= 0.08
    assert max(map(abs, errors.values())) <= 0.25
    # The same rows run on either memory size: one figure for both.
    devices = {scenario_of_row(row).device for row in read_cases(str(CASES)) if row["source"] == "mosaicml/llm-foundry"}
    assert len({device.step_efficiency for device in devices if device.name.startswith("a100")}) == 1


def test_what_is_left_out_is_known_by_name() -> None:
    # Cards that are not named and recipes that vary, unpacked rows of unknown lengths, tensor and pipeline parallelism.
    common = {"a0346", "a0348", "a0350", "a0384", "a0386", "a0387"}
    assert unpredicted("peak_mem_gb") == common | {"a0397"}  # a model without its sizes
    assert unpredicted("tok_s_gpu") == common | {"a0390"}  # FP8


def case(name: str = "a0300", **changes: str) -> Row:
    row = next(row for row in read_cases(str(CASES)) if row["id"] == name)
    return {**row, **changes}


def memory(row: Row) -> float:
    found = predict_row(row).peak_memory
    assert found is not None
    return found


def speed(row: Row) -> float:
    found = predict_row(row).tokens_per_second
    assert found is not None
    return found


def still(**changes: str) -> Row:
    """Return a row without an update, whose memory is apart from what activations leave behind."""
    return case(method="lora, no optimizer", **changes)


def test_units_and_kinds() -> None:
    allocated = memory(still(mem_kind="max_memory_allocated", mem_unit="GB(1e9)"))
    context = peak_memory(scenario_of_row(still()))["framework"] / 1e9
    assert memory(still(mem_kind="max_memory_allocated", mem_unit="GiB")) == pytest.approx(allocated * 1e9 / 2**30)
    assert memory(still(mem_kind="peak reserved", mem_unit="GB(1e9)")) == pytest.approx(allocated * RESERVED)
    # Of two kinds the first counts.
    assert memory(still(mem_kind="peak active/reserved", mem_unit="GB(1e9)")) == pytest.approx(allocated)
    by_driver = memory(still(mem_kind="not stated (nvidia-smi-like)", mem_unit="GB(1e9)"))
    assert by_driver == pytest.approx(allocated * RESERVED + context)
    printed = memory(still(mem_unit="G as printed"))
    assert printed == pytest.approx((allocated * RESERVED + context) * 1e9 / 2**30)
    assert memory(still(mem_kind="", mem_unit="GB (screenshot)")) == pytest.approx(printed)


def test_what_an_update_and_activations_leave_behind_is_held_while_there_is_room() -> None:
    row = case("a0294", mem_kind="peak reserved", mem_unit="GB(1e9)")  # ZeRO-3: the update is the larger of both
    in_use = memory({**row, "mem_kind": "max_memory_allocated"})
    longer = {**row, "seq_len": "4096"}
    assert memory({**longer, "mem_kind": "max_memory_allocated"}) == pytest.approx(in_use)
    assert memory(longer) > memory(row) > in_use * RESERVED_SHARDED
    # Nothing is left of the device to ask for: what one phase left is given back to the other.
    assert memory({**row, "gpu": "A100-SXM4-40GB"}) == pytest.approx(in_use * RESERVED_SHARDED)
    assert memory({**row, "sharding": "FSDP", "act_ckpt": "full"}) == pytest.approx(
        memory({**row, "sharding": "FSDP", "act_ckpt": "full", "mem_kind": "max_memory_allocated"}) * RESERVED
    )


def test_fsdp_reduces_what_of_a_layer_is_trained_and_hooks_layers_not_modules() -> None:
    lora, full = (scenario_of_row(case("a0371", method=method)) for method in ("lora", "full"))
    assert lora.zero.reduce * 32 == lora.num_trained
    assert full.zero.reduce == full.zero.prefetch
    sharded = num_launches(lora)
    assert num_launches(replace(lora, zero_stage=None)) < sharded < num_launches(replace(lora, whole_layers=False))


def test_a_sum_over_devices_stays_a_sum() -> None:
    both = memory(case("a0321"))
    assert both == pytest.approx(2 * memory(case("a0321", mem_unit="G as printed")))


def test_whole_weights_that_come_and_go_leave_holes() -> None:
    reserved = memory(case("a0371"))
    in_use = memory(case("a0371", mem_kind="max_memory_allocated"))
    assert reserved == pytest.approx(in_use * RESERVED_SHARDED)


def test_measured_figures_are_not_read() -> None:
    for name in ("a0135", "a0282", "a0335", "a0341", "a0380"):
        row = case(name)
        blind = row | dict.fromkeys(("tok_s_gpu", "step_s", "mfu_pct", "hfu_pct", "peak_mem_gb"), "0")
        assert predict_row(blind) == predict_row(row)
        assert predict_row({column: row[column] for column in COLUMNS}) == predict_row(row)


def test_shared_prompts_are_computed_once() -> None:
    shared = scenario_of_row(case("a0246")).load
    assert (shared.tokens, shared.effective_tokens) == (8192 + 2 * 128, 2 * (8192 + 128))
    assert shared.squared == 8192**2 + 2 * 128 * (2 * 8192 + 128)


def test_lengths_of_padded_batches() -> None:
    scenario = scenario_of_row(case("a0380"))
    assert scenario.largest_tokens == 4 * 768
    assert scenario.load.effective_tokens == 4 * 210 < scenario.load.tokens < 4 * 768
    # Tokens that count are the real ones.
    assert speed(case("a0380")) < speed(case("a0380", seq_len="210"))
    note = predict_row(case("a0337")).note
    assert "Alpaca: 130 tokens on average assumed" in note


def test_global_batches_become_micro_steps() -> None:
    assert scenario_of_row(case("a0333")).num_micro_steps == 128 / 4
    assert scenario_of_row(case(grad_accum="GBS 64", n_gpus="8", micro_batch="2")).num_micro_steps == 4
    assert scenario_of_row(case(grad_accum="")).num_micro_steps == 1
    assert scenario_of_row(case("a0391")).load.responses == 2  # a pair


def test_a_cumulative_table_adds_up() -> None:
    assert techniques(case("a0353")) == {"packed", "compile", "chunked ce"}
    assert {"opt in bwd", "act offload", "8bit adamw"} <= techniques(case("a0357"))
    assert "opt in bwd" not in techniques(case("a0359"))  # adapters took its place
    assert techniques(case()) == frozenset()
    # Gradients used up on the way, 8-bit optimizer state, checkpoints on the host: each takes less.
    used_up, on_host, eight_bit = (memory(case(name)) for name in ("a0355", "a0356", "a0357"))
    assert eight_bit < on_host < used_up < memory(case("a0355", notes="cumulative: +act ckpt"))


def test_gradients_and_activations_of_a_single_micro_step_are_not_there_together() -> None:
    one, two = memory(case("a0379")), memory(case("a0379", grad_accum="2"))
    gradients = peak_memory(scenario_of_row(case("a0379")))["gradients"]
    assert two == pytest.approx(one + RESERVED * gradients / 1e9)


def test_selective_checkpointing_keeps_some() -> None:
    row = case("a0341")
    everything, some, nothing = (memory({**row, "act_ckpt": way}) for way in ("none", "selective (per-op)", "full"))
    assert nothing < some < everything
    assert speed({**row, "act_ckpt": "full"}) < speed(row) < speed({**row, "act_ckpt": "none"})


def test_compiled_layers_keep_less_and_are_faster() -> None:
    eager, compiled = (case("a0353", notes=f"cumulative: {last}") for last in ("packed", "+compile"))
    assert memory(compiled) < memory(eager)
    assert speed(compiled) > speed(eager)
    # No more than its head's logits are kept beside the layers' tensors.
    assert memory(case("a0353")) < memory(compiled)


def test_four_bits_of_other_makes() -> None:
    gptq, nf4 = scenario_of_row(case("a0303")), scenario_of_row(case("a0303", precision="bf16 + NF4"))
    assert (gptq.shape.quantization, nf4.shape.quantization) == ("gptq", None)
    assert speed(case("a0303")) < speed(case("a0303", precision="bf16 + NF4"))
    # Qwen's own code leaves logits in 16 bits unless autocast widens them.
    assert memory(case("a0307")) < memory(case("a0307", model="Qwen2.5-7B"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "TPU v4"}, "gpu 'TPU v4' is not a device the planner knows"),
        ({"layers": ""}, "the row lacks layers"),
        ({"sharding": "TP4 PP1"}, "tensor or pipeline parallelism"),
        ({"seq_len": "long"}, "seq_len 'long' has no number"),
        ({"method": "dora"}, "method 'dora'"),
        ({"method": "lora (emb)"}, "adapters with trained embeddings"),
        ({"precision": "int8"}, "8-bit weights"),
        ({"lora_targets": "router"}, "lora_targets 'router' name no layer of the model"),
    ],
)
def test_what_cannot_be_modelled_says_why(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(NotModelled, match=reason.split("'")[0].split("(")[0]):
        scenario_of_row(case(**changes))
    answer = predict_row(case(**changes))
    assert (answer.peak_memory, answer.tokens_per_second) == (None, None)
    assert reason in answer.note


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "FP8-CS"}, "no speed: FP8 products"),
        ({"gpu": '"runnable on" A6000'}, "no speed: the card that was measured is not named"),
        ({"seq_len": "<=2048"}, "no speed: mean length of sequences (<=2048) is not given"),
        ({"mem_unit": "", "mem_kind": ""}, "no memory: neither unit nor kind is asked for"),
        ({"act_ckpt": "varies by recipe"}, "no memory: activation checkpointing 'varies by recipe'"),
        ({"notes": "baseline unpacked"}, "no memory: real lengths of the padded sequences are not given"),
        (
            {"source": "Lightning-AI/litgpt", "sharding": "FSDP FULL_SHARD", "n_gpus": "2", "act_ckpt": "full"},
            "no memory: FSDP units that mix frozen and trained weights, which keep gradients of both",
        ),
    ],
)
def test_one_figure_may_be_missing(changes: dict[str, str], reason: str) -> None:
    answer = predict_row(case(**changes))
    assert reason in answer.note
    missing = answer.tokens_per_second if "no speed" in reason else answer.peak_memory
    assert missing is None


def test_writes_a_line_for_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert predict_cases(str(CASES), str(out)) == 0
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == OUTPUT_COLUMNS
    assert [line["id"] for line in lines] == [row["id"] for row in read_cases(str(CASES))]
    assert all(line["peak_memory_gb"] or line["tokens_per_second_per_device"] or line["note"] for line in lines)
    assert "148 rows predicted" in capsys.readouterr().err
    short = tmp_path / "short.csv"
    short.write_text("\n".join(CASES.read_text().splitlines()[:3]) + "\n")
    predict_cases(str(short), None)
    assert capsys.readouterr().out.splitlines()[0] == ",".join(OUTPUT_COLUMNS)


def test_needs_no_torch() -> None:
    code = "import sys, rm_scale.planning.published.predict; assert not {'torch', 'numpy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_replayed_does_not_outgrow_what_is_stored() -> None:
    found = activations(scenario_of_row(case()))
    assert 0 < found.stored_bytes < found.peak_bytes


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cases=.*none.csv: can't be read .* Fix: give a CSV file"):
        predict_cases(str(tmp_path / "none.csv"), None)
    bad = tmp_path / "bad.csv"
    bad.write_text("id,model\n1,x\n")
    with pytest.raises(ConfigError, match=r"lacks the columns layers, .* Fix: use the columns"):
        predict_cases(str(bad), None)
    bad.write_text(CASES.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match=r"holds no rows. Fix: one setup per line"):
        predict_cases(str(bad), None)
    bad.write_bytes(b"id\n\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"can't be read .* Fix: give a CSV file in UTF-8"):
        predict_cases(str(bad), None)
    with pytest.raises(ConfigError, match=r"out.csv: its folder does not exist. Fix: mkdir"):
        predict_cases(str(CASES), str(tmp_path / "no" / "out.csv"))
