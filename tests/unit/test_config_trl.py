"""Every setting of the installed TRL is a setting here, another name of one, accepted as it is done, or refused."""

from __future__ import annotations

import importlib.util
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rm_scale.config import RunConfig
from rm_scale.config_parsing import ParsedConfig, config_from_dict, parse_config
from rm_scale.config_trl import DIFFERENT_DEFAULTS, FIXED, RENAMED, SAME_MEANING

BASE: dict[str, Any] = {"model_name_or_path": "m", "dataset_path": ["d.jsonl"]}
OTHER_VALUES = ("true", "false", "none", "7", "something_else")


def settings_tables() -> ModuleType:
    file = Path(__file__).resolve().parents[2] / "tools" / "settings_tables.py"
    spec = importlib.util.spec_from_file_location("settings_tables", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(**settings: Any) -> ParsedConfig:
    return config_from_dict({**BASE, **settings})


@pytest.mark.parametrize("name", settings_tables().trl_defaults())
def test_every_name_of_the_installed_trl_has_an_answer(name: str) -> None:
    """A name that is new in TRL: make it a setting, or add a line to rm_scale/config_trl.py."""
    assert [name in table for table in (RunConfig.model_fields, RENAMED, FIXED)].count(True) == 1, (
        f"{name}: TRL has this setting, and rm_scale/config_trl.py does not say what becomes of it"
    )


def test_other_names_are_those_of_settings() -> None:
    assert [ours for ours in RENAMED.values() if ours not in RunConfig.model_fields] == []
    assert not {*RENAMED, *FIXED} & set(RunConfig.model_fields)


@pytest.mark.parametrize("name", FIXED)
def test_what_a_run_does_anyway_is_accepted_and_all_else_refused_with_a_reason(name: str) -> None:
    fixed = FIXED[name]
    for value in fixed.accepted:
        typed = {"true": True, "false": False, "none": None, "empty": []}.get(value, value)
        assert parsed(**{name: typed}).problems == (), value
        if value != "empty":
            flags = ["--model_name_or_path", "m", "--dataset_path", "d.jsonl", f"--{name}", value]
            assert parse_config(flags).problems == (), value
    refused = [value for value in OTHER_VALUES if value not in fixed.accepted]
    assert refused
    for value in refused:
        (problem,) = parsed(**{name: value}).problems
        assert problem.startswith(f"{name}: {fixed.reason}")
        assert problem.endswith(f". Fix: {fixed.instead}.")
        assert "did you mean" not in problem


@pytest.mark.parametrize("name", FIXED)
def test_settings_to_use_instead_exist(name: str) -> None:
    """Words with an underscore in a fix are settings, commands or functions that exist."""
    others = {"CUDA_VISIBLE_DEVICES", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TENSORBOARD_LOGGING_DIR", "HF_TOKEN"}
    others |= {"adamw_8bit", "zero3_offload", "truncate_prompt_left", "docs/data_formats", "--auto_batch", "output_dir"}
    words = [word.strip(",.:()=") for word in FIXED[name].instead.replace(".md", "").split()]
    named = {word for word in words if "_" in word}
    assert named <= {*RunConfig.model_fields, *others}, named


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"activation_checkpointing": False}, "gradient_checkpointing", False),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs", None),
        ({"full_determinism": True}, "deterministic", True),
        ({"test_split_size": 0.2}, "eval_split_size", 0.2),
        ({"warmup_steps": 0.1}, "warmup_ratio", 0.1),
        ({"warmup_steps": "0.1"}, "warmup_ratio", 0.1),
        ({"warmup_steps": 5}, "warmup_steps", 5),
        ({"train_sampling_strategy": "sequential"}, "shuffle_train", False),
        ({"train_sampling_strategy": "random"}, "shuffle_train", True),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of", 1),
        ({"pad_to_multiple_of": "auto"}, "pad_to_multiple_of", 1),
        ({"pad_to_multiple_of": 16}, "pad_to_multiple_of", 16),
    ],
)
def test_other_names_and_values_mean_what_they_mean_in_trl(settings: dict[str, Any], name: str, value: Any) -> None:
    result = parsed(**settings)
    assert result.problems == ()
    given = next(iter(settings.values()))
    assert getattr(result.config, name) == (given if value is None else value)
    assert name in result.given


def test_switches_of_trls_command_line_are_read() -> None:
    words = ["--model_name_or_path", "m", "--dataset_path", "d.jsonl", "--no_disable_dropout"]
    found = parse_config([*words, "--no_gradient_checkpointing", "--no_logging_nan_inf_filter"])
    assert found.problems == ()
    assert not found.config.disable_dropout and not found.config.gradient_checkpointing
    (problem,) = parse_config([*words, "--no_dataloader_pin_memory"]).problems
    assert problem.startswith("no_dataloader_pin_memory: batches are built ahead")
    (problem,) = parse_config([*words, "--disable_dropout"]).problems
    assert problem.startswith("no_disable_dropout: is another name of disable_dropout, which is given too.")


def test_one_setting_under_two_names_is_refused() -> None:
    (problem,) = parsed(activation_checkpointing=True, gradient_checkpointing=True).problems
    assert problem == (
        "activation_checkpointing: is another name of gradient_checkpointing, which is given too. Fix: keep one of "
        "them."
    )


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"no_shuffle_train": True, "train_sampling_strategy": "random"}, "train_sampling_strategy no_shuffle_train"),
        ({"train_sampling_strategy": "sequential", "shuffle_train": True}, "train_sampling_strategy shuffle_train"),
        ({"shuffle_train": True, "no_shuffle_train": True}, "no_shuffle_train shuffle_train"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.2}, "warmup_steps warmup_ratio"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "torch_dtype dtype"),
        (
            {"activation_checkpointing": True, "no_gradient_checkpointing": True},
            "no_gradient_checkpointing activation_checkpointing",
        ),
    ],
)
def test_no_spelling_of_a_setting_overwrites_another(settings: dict[str, Any], names: str) -> None:
    for order in (settings, dict(reversed(settings.items()))):
        (problem,) = parsed(**order).problems
        assert all(name in problem for name in names.split()) and problem.endswith(
            "which is given too. Fix: keep one of them."
        )


def test_what_begins_with_no_and_is_no_switch_keeps_its_name() -> None:
    for name in ("no_such", "no_max_length", "no_hub_token"):
        (problem,) = parsed(**{name: True}).problems
        assert problem.startswith(f"{name}: no such setting.")
    (problem,) = parsed(no_dataloader_pin_memory=True).problems
    assert problem.startswith("no_dataloader_pin_memory: ")


@pytest.mark.parametrize("value", [0.1, "0.1", 0.5])
@pytest.mark.parametrize("name", ["logging_steps", "save_steps", "eval_steps"])
def test_shares_of_all_steps_are_refused_with_what_to_write(name: str, value: Any) -> None:
    (problem,) = parsed(**{name: value}).problems
    assert problem.startswith(f"{name}={value}: a share of all steps") and f"Fix: {name}: N" in problem


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("save_strategy", "best", "save_strategy=best: the best checkpoint is kept beside the newest"),
        ("debug", "underflow_overflow", "debug=underflow_overflow: "),
        ("debug", ["underflow_overflow"], "debug=underflow_overflow: "),
        ("debug", "tpu_metrics_debug", "debug=tpu_metrics_debug: "),
        ("debug", "underflow_overflow tpu_metrics_debug", "debug=underflow_overflow tpu_metrics_debug: "),
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "deepspeed={...}: "),
        ("deepspeed", '{"zero_optimization": {"stage": 2}}', "deepspeed={...}: "),
    ],
)
def test_values_that_only_trl_takes_are_refused_by_reason(name: str, value: Any, said: str) -> None:
    (problem,) = parsed(**{name: value}).problems
    assert problem.startswith(said) and "Fix: " in problem and "must be a valid" not in problem


def test_transformers_default_of_debug_is_no_debugging() -> None:
    for value in ("", [], None, False):
        result = parsed(debug=value)
        assert result.problems == () and result.config.debug is False


@pytest.mark.parametrize(
    ("name", "value", "means"),
    [
        ("bf16", None, True),
        ("output_dir", None, "outputs/run"),
        ("dtype", None, "auto"),
        ("report_to", None, []),
        ("save_strategy", False, "no"),
        ("eval_strategy", False, "no"),
        ("evaluation_strategy", False, "no"),
        ("resume_from_checkpoint", True, "last"),
        ("resume_from_checkpoint", False, None),
    ],
)
def test_values_of_trl_have_their_meaning_here(name: str, value: Any, means: Any) -> None:
    result = parsed(**{name: value})
    assert result.problems == ()
    assert getattr(result.config, RENAMED.get(name, name)) == means


def test_no_without_quotes_in_yaml_is_the_word(tmp_path: Path) -> None:
    """YAML 1.1 reads `no` as false."""
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ndataset_path: d.jsonl\nsave_strategy: no\neval_strategy: no\n")
    found = parse_config(["--config", str(file)])
    assert found.problems == () and (found.config.save_strategy, found.config.eval_strategy) == ("no", "no")


OF_OTHER_VERSIONS = {
    "use_mps_device": "GPUs",
    "dataset_text_field": "dataset_format",
    "chat_template_kwargs": "chat_template_path",
    "max_prompt_length": "max_length",
    "max_completion_length": "max_length",
    "max_seq_length": "max_length",
    "adafactor": "optim: adafactor",
    "push_to_hub_token": "pushed",
    "beta": "reference",
}


@pytest.mark.parametrize("name", OF_OTHER_VERSIONS)
def test_names_of_other_versions_and_trainers_have_their_own_answer(name: str) -> None:
    (problem,) = parsed(**{name: "something"}).problems
    assert problem.startswith(f"{name}: ") and OF_OTHER_VERSIONS[name] in problem and "did you mean" not in problem


def test_a_refusal_names_the_file_and_tells_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ndataset_path: d.jsonl\nhub_token: hf_secret\nuse_cpu: true\n")
    found = parse_config(["--config", str(file)]).problems
    assert [text.split(" (in ")[0] for text in found] == ["hub_token", "use_cpu"]
    assert "hf_secret" not in "".join(found)
    assert all(str(file) in text for text in found)


def test_our_defaults_can_be_written_out() -> None:
    """No default of a setting is read as something else of TRL's."""
    fields = RunConfig.model_fields
    values = {name: info.get_default(call_default_factory=True) for name, info in fields.items()}
    values |= BASE
    assert parsed(**values).config.model_dump() == parsed().config.model_dump()
    assert typing.get_type_hints(RunConfig)  # every annotation resolves


def test_every_default_is_trls_or_told_to_differ() -> None:
    """A default that changes in TRL or here: say why in DIFFERENT_DEFAULTS, or follow."""
    fields = RunConfig.model_fields
    ours = {name: info.get_default(call_default_factory=True) for name, info in fields.items()}
    theirs = settings_tables().trl_defaults()
    for name, default in theirs.items():
        if name in fields and name not in SAME_MEANING:
            is_equal = ours[name] == getattr(default, "value", default)
            assert is_equal or name in DIFFERENT_DEFAULTS, f"{name}: {default!r} in TRL, {ours[name]!r} here"
        elif name in FIXED:
            assert parsed(**{name: default}).problems == () or name in DIFFERENT_DEFAULTS, (
                f"{name}: {default!r} in TRL is refused here"
            )
    assert set(DIFFERENT_DEFAULTS) <= set(theirs)


def test_the_tables_of_the_settings_page_are_those_of_the_installed_trl() -> None:
    """Run tools/settings_tables.py when this fails."""
    module = settings_tables()
    page = module.PAGE.read_text(encoding="utf-8")
    assert page.partition(module.TRL_BEGIN)[2].partition(module.TRL_END)[0].strip() == module.trl_tables()


def test_no_limit_on_the_length_is_refused_with_how_to_find_one() -> None:
    for value in (None, "none"):
        (problem,) = parsed(max_length=value).problems
        assert problem.startswith("max_length=none: memory is planned for the longest text")
        assert ". Fix: --max_length N" in problem
