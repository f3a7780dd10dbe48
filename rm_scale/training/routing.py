"""Mixtures of experts in training: the routers' load-balancing loss, and how many tokens each expert gets.

transformers computes that loss for language models alone. Here it is added to the gradient at the routers themselves,
in the backward pass. So it is right with each kind of gradient checkpointing, also where the forward pass keeps no
graph and layers run once more, and nothing is counted twice.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from rm_scale.distributed import sum_over_ranks
from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.experts import has_balancing_loss, num_uncounted_routers, reason_against_router_loss, routers
from rm_scale.planning.expert_settings import router_loss_problem

logger = get_logger(__name__)

EXPECTED_TOKENS = 200
"""An expert is called dead when it got no token while an equal share would have been this many."""
_NAMED = 5


def router_coefficient(asked: float | None, model: torch.nn.Module) -> float:
    """Return the coefficient of the routers' auxiliary loss: what was asked, else what the model's config.json trains.

    Like transformers it takes the config's `router_aux_loss_coef` only with `output_router_logits: true`.

    Raises:
        ModelError: a coefficient was asked for that this kind of model has no use for.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    found, uncounted = routers(model), num_uncounted_routers(model)
    problem = router_loss_problem(asked, config.model_type, reason_against_router_loss(model))
    if problem is not None:
        raise ModelError(problem)
    if uncounted:
        logger.info(
            f"{uncounted} routers of a {config.model_type} model choose experts in a way of their own: the load of "
            "these experts is not counted, and no auxiliary loss is added"
        )
    if not found:
        return 0.0
    own = float(getattr(config, "router_aux_loss_coef", None) or 0.0)
    own_is_on = bool(getattr(config, "output_router_logits", False)) and has_balancing_loss(model)
    used = asked if asked is not None else own if own_is_on else 0.0
    source = "as asked" if asked is not None else "as config.json says" if own_is_on else "off unless asked for"
    logger.info(
        f"{len(found)} layers with experts; router auxiliary loss: coefficient {used:g} ({source}; the model's own is "
        f"{own:g})"
    )
    return used


@dataclass
class _Pass:
    """One forward pass: what its routers chose, and what its backward pass needs of that.

    Attributes:
        mask: `(tokens,)` fp32, 1 for real tokens.
        counts, probabilities: `(experts,)` fp32 of each router in the order of the layers, sums over real tokens.
        scale: what the loss is multiplied with on its way to the gradient; known once the backward pass has begun.
    """

    mask: torch.Tensor
    counts: list[torch.Tensor] = field(default_factory=list)
    probabilities: list[torch.Tensor] = field(default_factory=list)
    scale: torch.Tensor | None = None

    def add(self, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        """Count one router: logits `(tokens, experts)`, chosen experts `(tokens, top_k)`."""
        top_k = chosen.shape[-1]
        counts = torch.zeros(logits.shape[-1], dtype=torch.float32, device=logits.device)
        self.counts.append(counts.scatter_add_(0, chosen.reshape(-1), self.mask.repeat_interleave(top_k)))
        self.probabilities.append((logits.float().softmax(-1) * self.mask[:, None]).sum(0))

    def num_rows(self) -> torch.Tensor:
        """Return the real tokens of all routers."""
        return (self.mask.sum() * len(self.counts)).clamp_min(1.0)

    def loss(self) -> torch.Tensor:
        """Return experts x sum over experts of (share of tokens) x (mean probability), over all layers together.

        The formula is transformers' `load_balancing_loss_func` (arXiv 2101.03961, eq. 4 to 6): at least top_k.
        """
        counts, probabilities = torch.stack(self.counts).sum(0), torch.stack(self.probabilities).sum(0)
        return counts.numel() * (counts * probabilities).sum() / self.num_rows().square()

    def gradient(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Return the loss's gradient by one router's logits; `None` when the loss took no part."""
        if self.scale is None:
            return None
        counts = torch.stack(self.counts).sum(0)
        of_probability = self.scale * counts.numel() * counts / self.num_rows().square()
        probability = logits.float().softmax(-1)
        inner = of_probability - (probability * of_probability).sum(-1, keepdim=True)
        return (probability * inner * self.mask[:, None]).to(logits.dtype)


class _AddAtRouter(torch.autograd.Function):
    """Hand on the routing weights; in the backward pass add the loss's gradient to that of the logits."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, logits: torch.Tensor, current: _Pass) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.current = current
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (logits,) = ctx.saved_tensors
        return gradient, ctx.current.gradient(logits), None


class _TellScale(torch.autograd.Function):
    """Hand on the loss's value; tell its pass how the loss is scaled, before the backward pass reaches a router.

    Of the nodes that are ready autograd runs the one made last first, so this must be the last of a forward pass.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, current: _Pass) -> torch.Tensor:
        ctx.current = current
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.current.scale = gradient
        return None, None


class Routing:
    """Watches a model's routers in training.

    Args:
        model: with or without experts; without, nothing is done.
        coefficient: of the auxiliary loss; 0 leaves it out, and only tokens are counted.
    """

    def __init__(self, model: torch.nn.Module, coefficient: float) -> None:
        self.coefficient = coefficient
        self.layers = list(routers(model))
        self._current: _Pass | None = None
        self._is_open = False
        self._counts: torch.Tensor | None = None
        self._loss_sum: torch.Tensor | None = None
        self._pairs = 0.0
        self._window: torch.Tensor | None = None
        self._warned = False
        for name, router in routers(model).items():
            router.register_forward_hook(functools.partial(self._after_router, name))

    @contextlib.contextmanager
    def watching(self, batch: dict[str, Any]) -> Iterator[None]:
        """Count what routers choose in the forward pass of this micro-batch within the block."""
        self._current = _Pass(_real_tokens(batch)) if self.layers else None
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            if self._current is not None:
                self._keep_counts(self._current)

    def _after_router(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) != 3:
            self._leave_out(name)
            return output
        logits, weights, chosen = output
        current = self._current
        if current is None or (not self._is_open and not torch.is_grad_enabled()):
            return output  # an evaluation
        if self._is_open:
            current.add(logits.detach(), chosen)
        # A layer that is run once more in the backward pass must make the same nodes as before.
        if not self.coefficient or not torch.is_grad_enabled():
            return output
        return logits, _AddAtRouter.apply(weights, logits, current), chosen  # type: ignore[no-untyped-call]

    def _leave_out(self, name: str) -> None:
        """Count one router no more, and say so once: what it gives is not known."""
        if name not in self.layers:
            return
        self.layers.remove(name)
        logger.warning(f"{name} gives no logits, weights and experts as other routers do: its load is not counted")

    def loss(self, num_pairs: int, step_pairs: float) -> torch.Tensor | float:
        """Return the auxiliary loss's part of the step's loss; call it last in a micro-batch, and add it.

        The step's auxiliary loss is the mean over its micro-batches on all ranks, each weighted by its pairs.

        Args:
            num_pairs: of the micro-batch.
            step_pairs: of the step, over all ranks.
        """
        current = self._current
        if current is None or not self.coefficient or not current.counts:
            return 0.0
        value = current.loss()
        self._loss_sum = value * num_pairs if self._loss_sum is None else self._loss_sum + value * num_pairs
        self._pairs += num_pairs
        told: torch.Tensor = _TellScale.apply(value.requires_grad_(), current)  # type: ignore[no-untyped-call]
        return self.coefficient * num_pairs / step_pairs * told

    def _keep_counts(self, current: _Pass) -> None:
        if current.counts:
            counts = torch.stack(current.counts).double()
            self._counts = counts if self._counts is None else self._counts + counts

    def read(self) -> dict[str, Any]:
        """Return the figures since the last call for a line of metrics, over all ranks; empty without experts.

        - `router_aux_loss_coef`, `router_aux_loss`: the coefficient, and the loss before it is multiplied by that.
        - `expert_load`: shares of the tokens' choices: of each expert over all layers (`share`), and of the fullest and
          emptiest expert of each layer (`layer_max`, `layer_min`). An equal share is 1 / experts.
        - `expert_load_max`, `expert_load_min`: the same of the fullest and emptiest expert of all layers.
        - `dead_experts`: experts of all layers that got no token.

        A collective.
        """
        if not self.layers or self._counts is None:
            return {}
        loss_sum = 0.0 if self._loss_sum is None else float(self._loss_sum)
        shape = self._counts.shape
        pairs, loss_sum, *flat = sum_over_ranks([self._pairs, loss_sum, *self._counts.flatten().tolist()])
        self._counts, self._loss_sum, self._pairs = None, None, 0.0
        counts = torch.tensor(flat, dtype=torch.float64).view(shape)
        self._watch(counts)
        figures: dict[str, Any] = {"router_aux_loss_coef": self.coefficient}
        if pairs:
            figures["router_aux_loss"] = loss_sum / pairs
        return {**figures, **_load(counts)}

    def _watch(self, counts: torch.Tensor) -> None:
        """Warn once of experts that get nothing; judged whenever an equal share would be `EXPECTED_TOKENS`."""
        self._window = counts if self._window is None else self._window + counts
        expected = float(self._window.sum(1).min()) / counts.shape[1]
        if expected < EXPECTED_TOKENS:
            return
        dead = (self._window == 0).nonzero().tolist()
        self._window = None
        if not dead or self._warned:
            return
        self._warned = True
        named = ", ".join(f"{expert} of {self.layers[layer]}" for layer, expert in dead[:_NAMED])
        more = f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else ""
        fix = "a higher router_aux_loss_coef" if self.coefficient else "router_aux_loss_coef (0.001, say)"
        logger.warning(
            f"[dead_experts] {len(dead)} of {counts.numel()} experts got no token while an equal share was "
            f"{expected:,.0f}: {named}{more}. They take memory and learn nothing. They may never have been used on "
            f"such text; if this run emptied them, lower the learning rate or set {fix}."
        )


def _real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Return which tokens of a micro-batch are real, `(tokens,)` fp32, in the order in which routers see them."""
    layout = batch.get("packed_layout")
    ids = batch["input_ids"]
    if layout is None:
        mask = batch["attention_mask"].reshape(-1).float()
    else:
        mask = (torch.arange(ids.numel(), device=ids.device) < layout.num_tokens).float()
    # A rank's fillers come alone, and count as nothing.
    return mask if batch["pair_better"].numel() else torch.zeros_like(mask)


def _load(counts: torch.Tensor) -> dict[str, Any]:
    """Return each expert's share of the choices, from counts `(layers, experts)`."""
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1.0)

    def rounded(values: torch.Tensor) -> list[float]:
        return [round(value, 6) for value in values.tolist()]

    load = {
        "share": rounded(shares.mean(0)),
        "layer_max": rounded(shares.amax(1)),
        "layer_min": rounded(shares.amin(1)),
    }
    extremes = {"expert_load_max": max(load["layer_max"]), "expert_load_min": min(load["layer_min"])}
    return {"expert_load": load, **extremes, "dead_experts": int((counts == 0).sum())}
