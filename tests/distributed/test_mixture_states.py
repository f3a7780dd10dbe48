"""What DeepSpeed holds of mixtures of experts and of a hybrid on two real ranks, against what the planner says.

Model states are compared byte for byte, for every method under ZeRO-1, 2 and 3. Sizes are such that two ranks can't
divide them evenly and 4-bit blocks of 64 don't fit, so that every rounding shows; grouped products take multiples of 8.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.planning.deepspeed_config import shipped_file
from rm_scale.planning.estimate import gathered_bytes
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.memory import model_states, whole_small_tensors
from rm_scale.planning.scenario import Scenario, default_buckets
from rm_scale.planning.shape import read_model_config, shape_from_config
from tests.support.families import write_causal_model
from tests.support.launching import REPOSITORY, Launches, environment, read_json
from tests.support.row_loads import uniform_rows

pytestmark = pytest.mark.distributed

RUNNER = REPOSITORY / "tests" / "support" / "states_runner.py"
HIDDEN = 40
SIZES = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "intermediate_size": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24},
    # A shared expert with a gate of one output.
    "qwen2_moe": {
        "head_dim": 12,
        "num_experts": 5,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28,
    },
    # A shared expert, a first layer without experts, latent attention, and a buffer in fp32.
    "deepseek_v3": {
        "n_routed_experts": 5,
        "n_group": 1,
        "moe_intermediate_size": 24,
        "num_key_value_heads": 3,
        "q_lora_rank": 10,
        "kv_lora_rank": 14,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
    },
    # Biases of experts and router, and a sink per head.
    "gpt_oss": {"num_local_experts": 5},
    # No experts: a gated delta net's convolution, decays and step sizes.
    "qwen3_5_text": {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 14,
    },
}
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
METHODS: dict[str, list[str]] = {
    "full": ["--gradient_checkpointing", "true"],
    "lora": ["--use_peft"],
    "lora_of_experts": ["--use_peft", "--lora_target_parameters", *EXPERTS],
    "qlora": ["--use_peft", "--load_in_4bit", "--use_bnb_nested_quant"],
}
Cell = tuple[str, str, str]
CELLS: list[Cell] = [
    (stage, model, method)
    for stage in STAGES
    for model in MODELS
    for method in METHODS
    if (model, method) != ("qwen3_5_text", "lora_of_experts")
]
SHORT: list[Cell] = [("zero3", "qwen3_moe", method) for method in METHODS]

# A layer's experts have 46,080 weights, in tensors of 30,720 and 15,360; the embedding 16,000.
WIDE = {"num_experts": 16, "moe_intermediate_size": 24, "num_hidden_layers": 8}
GATHERED = {"qwen3_moe": WIDE, "llama": {"num_attention_heads": 4, "head_dim": 10, "intermediate_size": 120}}
PERSISTENT, PREFETCH = 100, 1440
GATHERING: list[tuple[str, str, int]] = [
    ("qwen3_moe", "full", 14_000),
    ("qwen3_moe", "qlora", 14_000),
    ("qwen3_moe", "full", 73_000),
    ("qwen3_moe", "qlora", 73_000),
    ("llama", "full", 20_000),
    ("llama", "qlora", 20_000),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from rm_scale.demo.assets import default_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("models"), default_tokenizer(400)
    wide = {f"wide_{name}": {"num_hidden_layers": 8, **sizes} for name, sizes in GATHERED.items()}
    return {
        name: write_causal_model(folder / name, name.removeprefix("wide_"), tokenizer, **{**SIZES, **sizes})
        for name, sizes in {**MODELS, **wide}.items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], pairs_file: Path) -> Launches:
    """One launch per stage, and one of what `make test` runs; the engines' states are in `run/states-RANK.json`."""
    common = ["--dataset_path", str(pairs_file), "--disable_tqdm", "--eval_split_size", "7", "--max_length", "128"]
    common += ["--per_device_train_batch_size", "2", "--max_steps", "2", "--logging_steps", "1"]
    common += ["--sample_scores", "0"]
    groups: dict[str, dict[str, list[str]]] = {}
    for stage, model, method in CELLS:
        group = groups.setdefault("short" if (stage, model, method) in SHORT else stage, {})
        flags = ["--model_name_or_path", str(models[model]), *common, *METHODS[method]]
        group["-".join((stage, model, method))] = [*flags, "--deepspeed", stage]
    folder = tmp_path_factory.mktemp("mixtures")
    for model, method, live in GATHERING:
        flags = ["--model_name_or_path", str(models[f"wide_{model}"]), *common, *METHODS[method]]
        file = with_live_parameters(folder / f"live-{live}.json", live)
        groups.setdefault("gathering", {})[f"{model}-{method}-{live}"] = [*flags, "--deepspeed", str(file)]
    return Launches(folder, groups, env=environment(OMP_NUM_THREADS="1"), runner=RUNNER)


def with_live_parameters(file: Path, live: int) -> Path:
    """Write a DeepSpeed file that keeps so many elements gathered at most, and few small tensors whole."""
    shipped = shipped_file("ds_configs", "zero3.json")
    assert shipped is not None
    values = read_json(shipped)
    values["zero_optimization"] |= {
        "stage3_max_live_parameters": live,
        "stage3_max_reuse_distance": live,
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_prefetch_bucket_size": PREFETCH,
    }
    file.write_text(json.dumps(values))
    return file


def scenario_of(cell: Cell, model: Path) -> Scenario:
    stage, _, method = cell
    return Scenario(
        shape=shape_from_config(read_model_config(str(model))),
        device=known_devices()["cpu"],
        num_devices=2,
        load=uniform_rows(2, 20, 10, "prefix_shared"),
        method="lora" if method == "lora_of_experts" else method,  # type: ignore[arg-type]
        lora_parameters=EXPERTS if method == "lora_of_experts" else (),
        nested_quant=method == "qlora",
        zero_stage=STAGES[stage],
    )


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, id="-".join(cell), marks=() if cell in SHORT else pytest.mark.long) for cell in CELLS],
)
def test_planned_model_states_are_the_engines(cell: Cell, runs: Launches, models: dict[str, Path]) -> None:
    predicted = model_states(scenario_of(cell, models[cell[1]]))
    for rank in (0, 1):
        measured = read_json(runs["-".join(cell)] / "run" / f"states-{rank}.json")
        assert {name: getattr(predicted, name) for name in ("weights", "masters", "moments", "gradients")} == {
            name: measured[name] for name in ("weights", "masters", "moments", "gradients")
        }


@pytest.mark.long
@pytest.mark.parametrize(("model", "method", "live"), GATHERING)
def test_gathered_weights_are_planned_for(
    model: str, method: str, live: int, runs: Launches, models: dict[str, Path]
) -> None:
    """At most what is planned, and not much less: limits are lower than a layer's experts, and higher."""
    limits = replace(default_buckets(HIDDEN), live=live, reuse=live, persistent=PERSISTENT, prefetch=PREFETCH)
    scenario = replace(scenario_of(("zero3", model, method), models[f"wide_{model}"]), buckets=limits)
    measured = read_json(runs[f"{model}-{method}-{live}"] / "run" / "states-0.json")["gathered_elements"]
    # Small tensors stay gathered, and the plan counts them with the weights.
    gathered = 2 * measured - whole_small_tensors(scenario)
    assert 0.8 * gathered_bytes(scenario) <= gathered <= gathered_bytes(scenario)
