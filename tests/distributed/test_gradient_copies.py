"""How many bytes of gradients real engines copy with their optimizer on the host, against what the planner counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rm_scale.planning.deepspeed_config import read_deepspeed_config
from rm_scale.planning.hardware import known_devices
from rm_scale.planning.host_link import copied_gradient_bytes
from rm_scale.planning.host_memory import offload_buffer_bytes
from rm_scale.planning.memory import partition_elements
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.shape import shape_from_config
from tests.support.launching import REPOSITORY, environment
from tests.support.row_loads import uniform_rows

pytestmark = [pytest.mark.distributed, pytest.mark.long]

RANKS, MICRO_STEPS = 2, 3
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 50,
}


def shipped(stage: int) -> dict[str, Any]:
    """The shipped file with buckets that fit the model, and memory that a processor can't lock left as it is."""
    zero: dict[str, Any] = read_deepspeed_config(f"zero{stage}_offload_optimizer")["zero_optimization"]
    zero |= {"reduce_bucket_size": 4096, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    automatic = [name for name, value in zero.items() if value == "auto"]
    return {name: value for name, value in zero.items() if name not in automatic}


def planned(stage: int) -> Scenario:
    return Scenario(
        shape=shape_from_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **MODEL}),
        device=known_devices()["cpu"],
        num_devices=RANKS,
        load=uniform_rows(1, 8, 8, "padding_free"),
        num_micro_steps=MICRO_STEPS,
        zero_stage=stage,
        offload_optimizer="cpu",
    )


def test_steps_copy_and_hold_the_gradients_that_are_planned(tmp_path: Path) -> None:
    case = {"model": MODEL, "zeros": [shipped(2), shipped(3)], "micro_steps": MICRO_STEPS, "ranks": RANKS}
    case["meeting"] = str(tmp_path / "meeting")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.gradient_copies_runner", json.dumps({**case, "rank": rank})],
            env=environment(OMP_NUM_THREADS="1"), cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    found = re.findall(r"stage (\d) passed (\d+) held (\d+) end", outputs[0])
    measured = {int(stage): (int(passed), int(held)) for stage, passed, held in found}
    two, three = planned(2), planned(3)
    passed, held = measured[2]
    assert passed == (2 * MICRO_STEPS - 1) * held, "down in each micro-step, up in all but the first"
    assert RANKS * MICRO_STEPS * copied_gradient_bytes(two) == pytest.approx(passed, rel=0.05)
    assert RANKS * (offload_buffer_bytes(two) - 4 * partition_elements(two)) == pytest.approx(held, rel=0.05)
    # ZeRO-3: what lies on the host and passes twice in each micro-step where the device is another memory.
    assert RANKS * MICRO_STEPS * copied_gradient_bytes(three) == 2 * measured[3][0]
