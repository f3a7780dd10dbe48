"""The configuration is strict, names what is wrong, and says all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.config import RunConfig
from rm_scale.config_parsing import config_from_dict, parse_config
from rm_scale.errors import ConfigError

OK = ["--model_name_or_path", "m", "--dataset_path", "d.jsonl"]


def problem(*flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config([*OK, *flags]).raise_problems()
    return str(caught.value)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: a\ndataset_path: [x.jsonl]\nlearning_rate: 1e-4\nlora_r: 8\n")
    parsed = parse_config(["--local_rank=0", "--config", str(file), "--lora_r", "4"])
    parsed.raise_problems()
    assert (parsed.config.learning_rate, parsed.config.lora_r, parsed.config.dataset_path) == (1e-4, 4, ["x.jsonl"])
    assert {"learning_rate", "lora_r"} <= parsed.given


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("lora_rankk", "lora_"), ("learning_rat", "learning_rate"), ("dataset_pth", "dataset_path"), ("bf_16", "bf16")],
)
def test_typo_names_the_nearest_setting(flag: str, nearest: str) -> None:
    assert f"did you mean {nearest}" in problem(f"--{flag}", "1")


def test_typo_in_yaml_is_as_wrong_as_in_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: a\ndataset_path: x.jsonl\nlearning_rte: 1e-4\n")
    with pytest.raises(ConfigError, match=r"learning_rte .*did you mean learning_rate"):
        parse_config(["--config", str(file)]).raise_problems()


def test_all_problems_come_at_once() -> None:
    text = problem("--lora_r", "0", "--max_length", "abc", "--nonsense_setting", "1", "--load_in_4bit")
    assert "4 problems" in text
    for name in ("lora_r='0'", "max_length='abc'", "nonsense_setting", "load_in_4bit=True with use_peft=False"):
        assert name in text


@pytest.mark.parametrize(
    ("flag", "reason"),
    [("--load_in_8bit", "use load_in_4bit"), ("--push_to_hub", "nothing is pushed"), ("--hub_token", "set HF_TOKEN")],
)
def test_settings_refused_on_purpose_say_why(flag: str, reason: str) -> None:
    text = problem(flag)
    assert reason in text
    assert "Fix:" in text


def test_config_is_one_file() -> None:
    assert "must be one YAML file" in problem("--config", "a", "b")


def test_last_of_a_repeated_flag_counts() -> None:
    assert parse_config([*OK, "--lora_r", "3", "--lora_r", "4"]).config.lora_r == 4


def test_word_before_any_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.yaml: expected a --flag before it"):
        parse_config(["train.yaml", *OK]).raise_problems()


def test_required_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model_name_or_path: is required"):
        parse_config(["--dataset_path", "d"]).raise_problems()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "must be a mapping"),
        ("lora_r: 1\nlora_r: 2", "key lora_r is written twice"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert expected in problem("--config", str(file))


def test_missing_file_is_explained() -> None:
    assert "can't be read (No such file or directory)" in problem("--config", "nowhere.yaml")


def test_python_objects_in_yaml_are_not_built(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: !!python/object/apply:os.system ['true']")
    assert "not valid YAML" in problem("--config", str(file))


def test_lists_come_from_words_commas_and_none() -> None:
    assert parse_config([*OK, "--report_to", "wandb,tensorboard"]).config.report_to == ["wandb", "tensorboard"]
    assert parse_config([*OK, "--lora_target_modules", "q_proj", "v_proj"]).config.lora_target_modules == [
        "q_proj",
        "v_proj",
    ]
    assert parse_config([*OK, "--report_to", "none"]).config.report_to == []
    assert parse_config([*OK, "--lora_target_modules", "none"]).config.lora_target_modules is None


def test_method_follows_from_the_settings() -> None:
    base = {"model_name_or_path": "m", "dataset_path": "d"}
    assert config_from_dict(base).config.method == "full"
    assert config_from_dict({**base, "use_peft": True}).config.method == "lora"
    assert config_from_dict({**base, "use_peft": True, "load_in_4bit": True}).config.method == "qlora"


def test_every_field_is_documented_and_frozen() -> None:
    assert all(info.description for info in RunConfig.model_fields.values())
    config = config_from_dict({"model_name_or_path": "m", "dataset_path": "d"}).config
    with pytest.raises(ValueError, match=r"frozen"):
        config.lora_r = 3  # type: ignore[misc]


def test_a_flag_is_not_looked_for_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\nlearning_rat: 1e-5\n")
    problems = parse_config(["--config", str(file), "--lora_rank_of_all", "3", "--padding_side", "left"]).problems
    assert any(problem.startswith(f"learning_rat (in {file}): no such setting") for problem in problems)
    assert any(problem.startswith("lora_rank_of_all: no such setting") for problem in problems)
    assert any(problem.startswith("padding_side: rows are padded") for problem in problems)
