"""From settings to a plan: defaults by size, batch arithmetic, and every refusal with its text."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from rm_scale.config_parsing import config_from_dict, parse_config
from rm_scale.errors import ConfigError, ModelError
from rm_scale.planning.deepspeed_config import ZERO_KEYS, engine_config, find_deepspeed_config, read_deepspeed_config
from rm_scale.planning.parameters import count_parameters
from rm_scale.planning.plan import Plan, dry_run_text, make_plan
from rm_scale.planning.plan_checks import check_output_dir
from rm_scale.planning.shape import read_model_config, shape_from_config
from rm_scale.train import main

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    return path


def plan(model: Path, data: Path, world_size: int = 2, device: str = "cuda", **settings: Any) -> Plan:
    values = {
        "model_name_or_path": str(model),
        "dataset_path": str(data),
        "output_dir": str(model.parent / "out"),
        **settings,
    }
    return make_plan(config_from_dict(values), world_size, device)


def test_parameters_of_known_models() -> None:
    # Published totals without the language-model head: Llama-3.1-8B 8.03e9 - 128256 x 4096; Llama-2-13B 13.02e9 - ...
    assert count_parameters(shape_from_config(LLAMA_8B)) == pytest.approx(8.030e9 - 128256 * 4096, rel=1e-3)
    llama_13b = {**LLAMA_8B, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40}
    llama_13b |= {"num_key_value_heads": 40, "intermediate_size": 13824, "vocab_size": 32000}
    assert count_parameters(shape_from_config(llama_13b)) == pytest.approx(13.016e9 - 32000 * 5120, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "hidden", "expected"), [(4, 512, (2e-5, 8)), (24, 2048, (1e-5, 4)), (32, 4096, (5e-6, 2))]
)
def test_defaults_by_size_are_applied_and_said(
    model: Path, data: Path, layers: int, hidden: int, expected: tuple[float, int]
) -> None:
    shape = {**LLAMA_8B, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": hidden * 7 // 2}
    (model / "config.json").write_text(json.dumps(shape))
    made = plan(model, data)
    assert (made.learning_rate, made.per_device_train_batch_size) == expected
    assert any(note.startswith("learning_rate not given") for note in made.notes)


def test_given_values_are_kept_without_a_note(model: Path, data: Path) -> None:
    values = {"learning_rate": 3e-4, "per_device_train_batch_size": 1, "num_train_epochs": 2, "packing": "none"}
    made = plan(model, data, device="cpu", **values)
    (only,) = plan(model, data, device="cuda", **values).notes
    assert only.startswith("optim adamw_torch runs fused on cuda")
    assert (made.learning_rate, made.per_device_train_batch_size, made.notes) == (3e-4, 1, ())


def test_global_batch_sets_accumulation(model: Path, data: Path) -> None:
    made = plan(model, data, world_size=4, packing="none", global_batch_size=64, per_device_train_batch_size=2)
    assert (made.gradient_accumulation_steps, made.global_batch_size) == (8, 64)
    fitted = plan(model, data, world_size=2, packing="none", global_batch_size=6)
    assert (fitted.per_device_train_batch_size, fitted.gradient_accumulation_steps) == (1, 3)


def test_impossible_global_batch_names_a_possible_one(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"multiple of per_device_train_batch_size x ranks = 2 x 4\. Fix: use 8"):
        plan(model, data, world_size=4, packing="none", global_batch_size=9, per_device_train_batch_size=2)


def test_steps_come_with_the_data(model: Path, data: Path) -> None:
    made = plan(model, data, per_device_train_batch_size=4, num_train_epochs=2).with_data(100, 10, -1)
    assert (made.steps_per_epoch, made.total_steps) == (13, 26)
    assert "100 groups to train on" in made.summary()
    assert json.loads(made.to_json())["total_steps"] == 26


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "float32"),
        ({"deepspeed": "zero3"}, "bfloat16"),
        ({"use_peft": True}, "bfloat16"),
        ({"use_peft": True, "bf16": False}, "float32"),
        ({"dtype": "float32", "deepspeed": "zero2"}, "float32"),
    ],
)
def test_weight_type(model: Path, data: Path, settings: dict[str, Any], expected: str) -> None:
    assert plan(model, data, **settings).dtype == expected


def test_problems_of_files_and_settings_come_together(tmp_path: Path, model: Path, data: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(model, tmp_path / "pears.jsonl", lora_r=0, model_name_or_path=str(tmp_path / "nowhere"), deepspeed="zero9")
    text = str(caught.value)
    assert "Did you mean" in text and "pairs.jsonl" in text
    for part in ("lora_r=0", "there is no such folder", "deepspeed='zero9': no such file"):
        assert part in text


def test_output_that_cannot_be_written(model: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be written"):
        plan(model, data, output_dir=str(data / "out"))


def test_probing_the_output_leaves_nothing_behind(model: Path, data: Path, tmp_path: Path) -> None:
    plan(model, data, output_dir=str(tmp_path / "a" / "b" / "c"))
    assert not (tmp_path / "a").exists()


def test_existing_run_is_not_overwritten_unasked(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "full"
    output.mkdir()
    (output / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"already holds files.*--force overwrite"):
        plan(model, data, output_dir=str(output))
    with pytest.raises(ConfigError, match=r"holds config.json, which no run of rm_scale wrote .*Fix: another"):
        plan(model, data, output_dir=str(output), force=["overwrite"])
    (output / "run").mkdir()
    (output / "run" / "run_config.yaml").write_text("{}")
    plan(model, data, output_dir=str(output), force=["overwrite"])
    pairs = output / "run" / "pairs.jsonl"
    pairs.write_text(data.read_text())
    with pytest.raises(ConfigError, match=r"pairs.jsonl lies in .*run, which is removed with the earlier run"):
        plan(model, pairs, output_dir=str(output), force=["overwrite"])
    (output / "merged").mkdir()
    (output / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"merged holds no merged model of ours, which would be lost"):
        plan(model, data, output_dir=str(output), force=["overwrite"])


def test_missing_checkpoint_and_template(model: Path, data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)chat_template_path=t.jinja.*resume_from_checkpoint=nowhere: no such folder"
    ):
        plan(model, data, chat_template_path="t.jinja", resume_from_checkpoint="nowhere")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optimizer": {"type": "Adam"}}, "has a 'optimizer' block"),
        ({"train_batch_size": 8}, "train_batch_size=8: batch and clipping come from the run"),
        ({"bf16": {"enabled": False}}, "bf16.enabled=False but the run has bf16=True"),
        ({"zero_optimization": {"stage": 3}}, "gather_16bit_weights_on_model_save is not true"),
        ({"zero_optimization": {"stage": 4}}, "The stage is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "quantised communication"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "does not divide the 2 ranks"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}},
            "is not a folder on this machine",
        ),
    ],
)
def test_deepspeed_file_is_checked(model: Path, data: Path, change: dict[str, Any], expected: str) -> None:
    file = model / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}, **change}))
    with pytest.raises(ConfigError) as caught:
        plan(model, data, deepspeed=str(file))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "zero_optimisation: DeepSpeed has no such key. Fix: did you mean zero_opti",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean overlap_comm?"),
        ({"zero_optimization": None}, "zero_optimization=None: must be a block"),
        ({"zero_optimization": {"stage": "two"}}, "stage='two': the stage is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer='cpu': must be a block"),
    ],
)
def test_deepspeed_file_has_known_keys_and_kinds(
    model: Path, data: Path, change: dict[str, Any], expected: str
) -> None:
    file = model / "mine.json"
    file.write_text(json.dumps(change))
    with pytest.raises(ConfigError) as caught:
        plan(model, data, deepspeed=str(file))
    assert expected in str(caught.value)


def test_rules_look_into_the_file_and_not_at_its_name(model: Path, data: Path) -> None:
    file = model / "mine.json"
    file.write_text(find_deepspeed_config("zero3_offload").read_text())
    with pytest.raises(ConfigError, match="silently swaps it for an Adam of its own"):
        plan(model, data, deepspeed=str(file), optim="paged_adamw_8bit")
    with pytest.raises(ConfigError, match="DoRA must read whole 4-bit weights"):
        plan(model, data, deepspeed=str(file), use_peft=True, load_in_4bit=True, use_dora=True)


def test_known_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {name for field, info in DeepSpeedZeroConfig.model_fields.items() for name in (field, info.alias) if name}
    assert names == ZERO_KEYS


def test_deepspeed_file_that_is_no_json(model: Path) -> None:
    (model / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is not valid JSON"):
        read_deepspeed_config(str(model / "ds.json"))
    (model / "ds.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"must hold one JSON object"):
        read_deepspeed_config(str(model / "ds.json"))


def test_shipped_deepspeed_files_are_found_by_name() -> None:
    assert find_deepspeed_config("zero3").name == "zero3.json"
    with pytest.raises(ConfigError, match=r"shipped names: .*zero2"):
        find_deepspeed_config("zero7")


def test_quantised_checkpoints_are_refused(model: Path, data: Path) -> None:
    (model / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match=r"already quantised \(gptq\)"):
        plan(model, data)


@pytest.mark.parametrize(("method", "name"), [("mxfp4", "Mxfp4Config"), ("fp8", "FineGrainedFP8Config")])
def test_what_is_published_quantised_alone_is_told_how_to_unpack(
    model: Path, data: Path, method: str, name: str
) -> None:
    (model / "config.json").write_text(json.dumps({**LLAMA_8B, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ConfigError, match=rf"\({method}\); .* Fix: save a bfloat16 copy once.*{name}\(dequantize=True"):
        plan(model, data)
    assert hasattr(transformers, name)
    shape = shape_from_config({**LLAMA_8B, "quantization_config": {"quant_method": method}})
    assert "bfloat16 copy" in shape.notes[-1]


def test_texts_longer_than_the_models_positions_are_refused(model: Path, data: Path) -> None:
    (model / "config.json").write_text(json.dumps({**LLAMA_8B, "max_position_embeddings": 512}))
    with pytest.raises(ConfigError, match=r"max_length=1024: the model has only 512 positions\. Fix: --max_length 512"):
        plan(model, data)


def test_output_must_not_hold_the_model_itself(model: Path, data: Path) -> None:
    for inside in (".", "merged", "checkpoint-4", "unverified-checkpoint-4", "later-checkpoint-4-0123abcd"):
        base = model / inside
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text(json.dumps(LLAMA_8B))
        with pytest.raises(ConfigError, match="holds the model that is to be trained from"):
            plan(base, data, output_dir=str(model), force=["overwrite"])


def test_nothing_that_a_run_reads_is_removed_with_the_earlier_run(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "full"
    (output / "run" / "data").mkdir(parents=True)
    for name in ("run_config.yaml", "ds.json"):
        (output / "run" / name).write_text("{}")
    (output / "run" / "data" / "pairs.jsonl").write_text(data.read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(output)}))
    values = {"model_name_or_path": str(model), "dataset_path": [str(data)], "output_dir": str(output)}
    for changed, seen in (
        ({"dataset_path": [str(output / "run" / "data" / "*.jsonl")]}, "pairs.jsonl lies in"),
        ({"eval_dataset_path": [str(output / "**" / "pairs.jsonl")]}, "pairs.jsonl lies in"),
        ({"deepspeed": str(output / "run" / "ds.json")}, "ds.json lies in"),
        ({"dataset_cache_dir": str(output / "run" / "cache")}, "cache lies in"),
        ({"model_name_or_path": str(adapter)}, "holds the model that is to be trained from"),
        ({}, "pairs.jsonl was not written by the earlier run"),
    ):
        config = config_from_dict({**values, "force": ["overwrite"], **changed}).config
        assert seen in " ".join(check_output_dir(config)), changed
    (output / "run" / "data" / "pairs.jsonl").unlink()
    config = config_from_dict({**values, "force": ["overwrite"]}).config
    assert "run_config.yaml lies in" in check_output_dir(config, str(output / "run" / "run_config.yaml"))[0]
    (output / "run" / "ds.json").unlink()
    assert check_output_dir(config) == []


def test_patterns_of_files_are_let_through(model: Path, data: Path) -> None:
    assert plan(model, data, dataset_path=[str(data.parent / "pa*.jsonl")]).method == "full"


def test_adapters_get_a_word_on_the_learning_rate(model: Path, data: Path) -> None:
    assert any("ten times higher" in note for note in plan(model, data, use_peft=True).notes)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        read_model_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds a LoRA adapter, not a model\. Fix: rm-scale export .* --no_contract"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"can't be read"):
        read_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"is not a JSON object"):
        read_model_config(str(tmp_path))
    with pytest.raises(ModelError, match=r"has none of hidden_size"):
        shape_from_config({"model_type": "llama"})
    with pytest.raises(ModelError, match=r"'strange'.*don't know this kind of model.*--exact"):
        shape_from_config({"model_type": "strange"})


def test_unknown_hub_name_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"the hub gave no config.json .*give a local folder of the model"):
        read_model_config("nobody/no-such-model")


def test_deepspeed_is_handed_the_file_less_what_waits_for_nothing() -> None:
    asked = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    handed = engine_config(asked, reduces_once=False)
    assert handed == {**asked, "timers": {"throughput": {"enabled": False}}}
    assert engine_config(asked, reduces_once=True)["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert asked == {"zero_optimization": {"stage": 2, "overlap_comm": True}}, "plan.json says what was asked"
    own = {"timers": {"throughput": {"enabled": True}}}
    assert engine_config(own, reduces_once=False) == own
    assert engine_config(None, reduces_once=False) is None


@pytest.mark.parametrize(
    ("stage", "more", "setting", "expected"),
    [
        ("zero2", {}, "each_step", True),
        ("zero2", {}, "each_micro_step", False),
        ("zero2", {}, "auto", False),  # on a processor
        ("zero1", {}, "each_step", False),
        ("zero2", {"data_types": {"grad_accum_dtype": "fp32"}}, "each_step", False),
    ],
)
def test_when_gradients_are_reduced_once(
    stage: str, more: dict[str, Any], setting: str, expected: bool, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    from rm_scale.training_run import _reduce_once_if_it_fits

    file = tmp_path / "zero.json"
    file.write_text(json.dumps(read_deepspeed_config(stage) | more))
    values = {"model_name_or_path": str(tiny_model), "dataset_path": str(pairs_file), "output_dir": str(tmp_path / "o")}
    parsed = config_from_dict({**values, "deepspeed": str(file), "gradient_reduction": setting})
    plan = make_plan(parsed, 1, "cpu")
    assert _reduce_once_if_it_fits(parsed.config, plan, None).reduces_once is expected  # type: ignore[arg-type]


def test_a_folder_that_another_job_has_begun_to_use_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs of an array find one folder missing; the other writes into it while this one probes."""
    import tempfile

    plain = tempfile.TemporaryFile

    def probe(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "seeds" / "task-1").mkdir()
        return plain(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", probe)
    values = {"model_name_or_path": "m", "dataset_path": "d", "output_dir": str(tmp_path / "seeds" / "task-0")}
    assert check_output_dir(config_from_dict(values).config) == []
    assert [path.name for path in (tmp_path / "seeds").iterdir()] == ["task-1"]


def test_json_without_a_dry_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model_name_or_path", "m", "--dataset_path", "d.jsonl", "--json"]) == 2
    assert "json: no such setting" in capsys.readouterr().err


def test_dry_run_shows_the_plan_and_its_notes_before_the_settings(model: Path, data: Path) -> None:
    made = plan(model, data)
    config = parse_config(["--model_name_or_path", str(model), "--dataset_path", str(data)]).config
    shown = dry_run_text(config, made, as_json=False)
    assert shown.index("learning_rate not given") < shown.index("\nmax_length: 1024\n")
    assert "local_rank" not in shown
    settings, _, rest = dry_run_text(config, made, as_json=True).partition("\n}\n")
    assert json.loads(settings + "}")["max_length"] == 1024 and json.loads(rest)["method"] == "full"


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("dataset_path", "folder", "is a folder, but not one written by datasets' save_to_disk. Fix: name the files"),
        ("dataset_cache_dir", "/dev/null", "dataset_cache_dir=/dev/null: /dev/null is no folder."),
        ("dataset_cache_dir", "/dev/null/below", "dataset_cache_dir=/dev/null/below: /dev/null is no folder."),
        ("hardware", "nosuch.yaml", "hardware=nosuch.yaml: can't be read (No such file or directory)."),
        ("report_to", "wandb", "report_to=wandb: the package that it needs is not installed."),
        ("eos_token", "nosuch", "eos_token='nosuch': is not in the tokenizer's vocabulary."),
    ],
)
def test_what_a_run_would_stop_at_is_one_problem_of_its_plan(
    tiny_model: Path, data: Path, tmp_path: Path, name: str, value: str, part: str
) -> None:
    if name == "report_to" and importlib.util.find_spec(value) is not None:
        pytest.skip(f"{value} is installed")
    if value == "folder":
        (tmp_path / value).mkdir()
        value = str(tmp_path / value)
    settings = {"model_name_or_path": str(tiny_model), "dataset_path": str(data), "output_dir": str(tmp_path / "out")}
    with pytest.raises(ConfigError) as caught:
        make_plan(config_from_dict({**settings, "bf16": False, name: value}), 1, "cpu")
    assert len(caught.value.problems) == 1
    assert part in caught.value.problems[0]


def test_folders_that_hold_or_will_hold_data_pass(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    cache = tmp_path / "cache" / "below"
    settings = {"model_name_or_path": str(tiny_model), "dataset_path": str(saved), "output_dir": str(tmp_path / "out")}
    make_plan(config_from_dict({**settings, "bf16": False, "dataset_cache_dir": str(cache)}), 1, "cpu")
    assert not cache.parent.exists()
