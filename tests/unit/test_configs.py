"""Everything in `configs/` and `ds_configs/` is valid, and its header and README say what is true."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rm_scale.config import RunConfig
from rm_scale.config_parsing import parse_config
from tools.ready_configs import DEVICES, READY, Ready, choice_on, text_of

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.y*ml"))
DS_CONFIGS = sorted((REPOSITORY / "ds_configs").rglob("*.json"))
METHODS = ("full", "lora", "qlora")
PROMISED_CONFIGS = {
    "demo_cpu",
    "smollm2_135m_hh_cpu",
    "qwen2.5_0.5b_ultrafeedback",
    "llama_3.2_1b",
    *(
        f"{model}_{method}"
        for model in ("qwen2.5_7b", "llama_3.1_8b", "llama_2_13b")
        for method in ("full", "lora", "qlora")
    ),
    "qwen2.5_14b_lora",
    "qwen2.5_14b_qlora",
}
PROMISED_DS_CONFIGS = {"zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "zero3_hpz"}
PROMISED_DS_CONFIGS |= {"zero2_offload_optimizer", "zero3_offload_optimizer"}


def relative(path: Path) -> str:
    """How the file is written in a command."""
    return path.relative_to(REPOSITORY).as_posix()


def header_commands(path: Path) -> list[list[str]]:
    """The commands in the comment at the top of a file that start a training run, as lists of words."""
    lines = path.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    assert all(line.startswith("#") for line in lines), f"{path.name} must open with a comment, then an empty line"
    text = "\n".join(line.lstrip("# ") for line in lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if "rm_scale/train.py" in line]


def test_promised_files_exist() -> None:
    assert {path.name.removesuffix(".yaml") for path in CONFIGS} >= PROMISED_CONFIGS
    assert {path.stem for path in DS_CONFIGS} >= PROMISED_DS_CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_header_commands_are_valid(path: Path) -> None:
    """Every command in the header is one that the real parser accepts, and there is one of each kind."""
    commands = header_commands(path)
    for words in commands:
        arguments = words[words.index("rm_scale/train.py") + 1 :]
        assert arguments[:2] == ["--config", relative(path)]
        parsed = parse_config(["--config", str(path), *arguments[2:]])
        assert parsed.problems == ()
    assert any("deepspeed" in words for words in commands)
    assert any("torchrun" in words for words in commands)
    assert any("--dry_run" in words for words in commands)


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_is_complete_by_itself(path: Path) -> None:
    """The file alone parses; only a data path that the header's commands give may be missing."""
    problems = list(parse_config(["--config", str(path)]).problems)
    if all("--dataset_path" in words for words in header_commands(path)):
        problems = [problem for problem in problems if not problem.startswith("dataset_path, dataset_name and ")]
    assert problems == []


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_says_what_it_needs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^# Needs( \(predicted, not measured\))?: ", text, re.M)
    assert re.search(r"^# Data: ", text, re.M)
    if "GPU" in re.findall(r"^# Needs.*", text, re.M)[0] and "cpu" not in path.name:
        assert "predicted, not measured" in text


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_names_a_shipped_deepspeed_file(path: Path) -> None:
    config = parse_config(["--config", str(path)]).config
    assert config.deepspeed in {file.stem for file in DS_CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_method_is_the_one_in_the_name(path: Path) -> None:
    config = parse_config(["--config", str(path)]).config
    method = next((word for word in ("qlora", "lora", "full") if path.stem.endswith(f"_{word}")), "full")
    assert config.method == method
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if method == "full":
        # The size tier decides, except for the demo's model, which is trained from nothing.
        assert ("learning_rate" in given) == (path.stem == "demo_cpu")
    else:
        assert config.learning_rate is not None
    if method == "qlora":
        assert config.use_bnb_nested_quant


def test_output_directories_are_distinct() -> None:
    outputs = [parse_config(["--config", str(path)]).config.output_dir for path in CONFIGS]
    assert len(set(outputs)) == len(outputs)


NUMBERS = {"one": 1, "two": 2}
OF_A_HUB_MODEL = [path for path in CONFIGS if path.stem not in {"demo_cpu", "smollm2_135m_hh_cpu"}]


def needs(path: Path) -> list[tuple[int, str]]:
    """The devices that the header promises to be enough: how many, and of which memory in GB."""
    text = path.read_text(encoding="utf-8").split("# Model:")[0]
    line = text[text.index("# Needs") :].splitlines()[0]
    found = re.findall(r"(one|two|\d+)(?: GPUs?)?(?: or one)? of (\d\d) GB", line)
    return [(int(NUMBERS.get(count, count)), memory) for count, memory in found]


@pytest.mark.parametrize("path", OF_A_HUB_MODEL, ids=relative)
def test_config_fits_where_its_header_says(path: Path) -> None:
    """The planner, with the file's own settings, finds that each kind of machine in the header is enough."""
    config = parse_config(["--config", str(path)]).config
    ready = Ready(path.stem, config.model_name_or_path, config.method, "", int(config.deepspeed[len("zero")]))
    promised = needs(path)
    assert promised
    for count, memory in promised:
        assert choice_on(ready, DEVICES[f"{memory} GB"], count).estimate.fits, (count, memory)


@pytest.mark.parametrize("ready", READY, ids=lambda ready: ready.name)
def test_config_is_what_the_tool_writes(ready: Ready) -> None:
    path = REPOSITORY / "configs" / f"{ready.name}.yaml"
    assert path.read_text(encoding="utf-8") == text_of(ready), "run: python tools/ready_configs.py"


@pytest.mark.parametrize("path", DS_CONFIGS, ids=relative)
def test_deepspeed_file(path: Path) -> None:
    """Valid, with one source for optimizer and batch size, explained, and able to save whole weights."""
    values = json.loads(path.read_text(encoding="utf-8"))
    assert not {"optimizer", "scheduler"} & set(values)
    for name in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert values[name] == "auto"
    assert values["bf16"] == {"enabled": "auto"}
    zero = values["zero_optimization"]
    assert str(zero["stage"]) in path.stem
    if zero["stage"] == 3:
        assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert not {"zero_quantized_weights", "zero_quantized_gradients"} & set(zero)


def test_auto_only_where_the_integration_fills_it() -> None:
    """transformers fills these and no others; DeepSpeed would fail on the word, or read it as true."""
    filled = {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "enabled",
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    }
    for path in DS_CONFIGS:
        autos = set(re.findall(r'"(\w+)": "auto"', path.read_text(encoding="utf-8")))
        assert autos <= filled, path.name


def test_deepspeed_readme_explains_every_file_and_key() -> None:
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for path in DS_CONFIGS:
        assert f"[`{path.name}`]({path.name})" in readme
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in [*values, *values["zero_optimization"]]:
            if key != "zero_optimization":
                assert f"`{key}" in readme or f".{key}`" in readme, f"{key} of {path.name} is not explained"


def test_readme_names_real_settings() -> None:
    """Right-hand sides of the README's table of auto values are settings of ours."""
    readme = (REPOSITORY / "ds_configs" / "README.md").read_text(encoding="utf-8")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "max_grad_norm"):
        assert f"`{name}`" in readme
        assert name in RunConfig.model_fields
