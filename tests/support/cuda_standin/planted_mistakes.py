"""Train on the stand-in with a device mistake put into the code, one after the other, and say how each run ended.

python tests/support/cuda_standin/planted_mistakes.py FOLDER NAME,NAME SETTINGS...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import leave
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.train import main


def residual_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """The head as it was: a buffer made beside a model that nobody moves."""
    from rm_scale.modeling.head import ScalarHead

    def from_linear(cls: Any, linear: torch.nn.Linear) -> ScalarHead:
        with torch.device("meta"):
            made = ScalarHead(linear.in_features, 1, bias=False)
        made.weight = linear.weight
        made.register_buffer("residual", torch.zeros(1, linear.in_features), persistent=False)
        return made

    patch.setattr(ScalarHead, "from_linear", classmethod(from_linear))

    def set_residual(self: Any, master: torch.Tensor) -> None:
        rounded = master.to(self.weight.dtype).float()
        self.residual = (master.float() - rounded).to(self.residual.device)

    patch.setattr(ScalarHead, "set_residual", set_residual)
    patch.setattr(ScalarHead, "_residual_beside_weight", lambda self: self.residual.float())


def label_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """A tensor of the batch that is not moved."""
    from rm_scale.training import trainer

    plain = trainer.move_batch
    patch.setattr(
        trainer, "move_batch", lambda batch, device: {**plain(batch, device), "pair_margin": batch["pair_margin"]}
    )


def index_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """Positions made beside the device, inside the model."""
    from rm_scale.modeling.packed_model import TakesPackedRows

    plain = TakesPackedRows._forward_packed

    def forward(self: Any, layout: Any, input_ids: Any, position_ids: Any, score_index: Any, **rest: Any) -> Any:
        return plain(self, layout, input_ids, position_ids, score_index.cpu(), **rest)

    patch.setattr(TakesPackedRows, "_forward_packed", forward)


def texts_on_the_host(patch: pytest.MonkeyPatch) -> None:
    """Golden texts of a save that are scored from the host."""
    from rm_scale.training.checkpoint import reload_check

    plain = reload_check.score_sequences
    patch.setattr(reload_check, "score_sequences", lambda *args, **kwargs: plain(*args, **{**kwargs, "device": "cpu"}))


def collective_over_host_memory(patch: pytest.MonkeyPatch) -> None:
    """A sum over ranks through NCCL of numbers on the host."""
    from rm_scale.training import trainer

    def sums(values: Any) -> Any:
        total = torch.tensor(list(values))
        torch.distributed.all_reduce(total)
        return total.tolist()

    patch.setattr(trainer, "sum_over_ranks", sums)


def none(patch: pytest.MonkeyPatch) -> None:
    """The code as it is."""


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    mistake.__name__: mistake
    for mistake in (
        residual_on_the_host,
        label_on_the_host,
        index_on_the_host,
        texts_on_the_host,
        collective_over_host_memory,
        none,
    )
}


def run(folder: Path, names: list[str], settings: list[str]) -> int:
    """Train with each mistake; write the exit codes to FOLDER/codes.json."""
    world = detect_world()
    prepare_environment(world)
    prepare_extensions(world.local_rank)
    init_process_group(world, uses_deepspeed=True, timeout_seconds=300)
    codes: dict[str, int] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"=== {name}", flush=True)
        with pytest.MonkeyPatch.context() as patch:
            MISTAKES[name](patch)
            codes[name] = main([*settings, "--output_dir", str(folder / name)])
        (folder / "codes.json").write_text(json.dumps(codes))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(run(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]))
