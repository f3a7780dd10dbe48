"""What a model's own class says of it, for kinds of model that the formulas don't know. Filled in where torch may be
imported (`rm_scale.modeling.exact_shape`); here is only what the formulas need of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rm_scale.planning.activations.activation_memory import ActivationMemory
    from rm_scale.planning.activations.settings import Options, Row
    from rm_scale.planning.parameters import Tensor


@dataclass(frozen=True)
class Operations:
    """What a forward pass of all layers multiplies, by the terms that `rm_scale.planning.flops` has.

    Attributes:
        weights: multiplications per token, whatever the length; of experts those that are chosen.
        attention_width: what a query and a key cost, in multiplications, over all layers.
    """

    weights: int
    attention_width: int


class MicroSteps(Protocol):
    """Micro-steps of a class, run without content."""

    def operations(self) -> Operations:
        """Count the operations of a forward pass.

        Raises:
            ModelError: the class can't be run so.
        """

    def activations(self, row: Row, options: Options) -> ActivationMemory:
        """Say what a micro-step of padded rows needs.

        Raises:
            ModelError: the class can't be run so.
        """


@dataclass(frozen=True)
class ModelClass:
    """A class's parameters, and how to try a micro-step of it.

    Attributes:
        name: of the class.
        tensors: all parameters of the backbone, without a head.
        micro_steps: runs it.
        expert_names: full names of the experts' 3-D tensors.
        no_router_loss: why its routers have no load-balancing loss; `None`: they have one.
    """

    name: str
    tensors: tuple[Tensor, ...]
    micro_steps: MicroSteps
    expert_names: tuple[str, ...] = ()
    no_router_loss: str | None = None
