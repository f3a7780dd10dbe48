"""Reward heads of other projects: under which names they lie in weight files, and which are no single linear layer.

Names and shapes are enough to tell them apart, before any model is built. docs/foreign_models.md has the formula of
each, and its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rm_scale.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeadLayout:
    """A linear layer with one output, as projects name it. Other names are read too, if nothing else fits them.

    Attributes:
        projects: who writes it.
        weight: the whole name of its weight, `(1, hidden_size)`, as a regular expression; its bias is called alike.
    """

    projects: str
    weight: str


READ = (
    HeadLayout("transformers, TRL, ms-swift, OpenRLHF", r"(score|classifier)\.weight"),
    HeadLayout("OpenRLHF", r"value_head\.weight"),
    HeadLayout("LLaMA-Factory and TRL's value-head models", r"v_head\.summary\.weight"),
    HeadLayout("Starling", r"v_head\.weight"),
    HeadLayout("UltraRM and Eurus", r"regression_head\.weight"),
    HeadLayout("safe-rlhf (Beaver)", r"score_head\.weight"),
    HeadLayout("AlpacaFarm", r"reward_head\.weight"),
)
MOMENTS = (("mean", "std", False), ("normalizer.mean", "normalizer.var", True))
"""Names of the mean that a project's own code can take off rewards and of what it divides by, and whether that is a
variance."""
COUNTERS = ("normalizer.count",)
"""How many rewards a mean was made of: no part of any reward."""


@dataclass(frozen=True)
class UnreadableHead:
    """A head that one linear layer can't stand for.

    Attributes:
        projects: whose it is.
        tensors: regular expressions; each must match the whole name of a tensor, and the first names it in messages.
        why: what it computes.
        where: a condition on shapes beside that; `None` for none.
    """

    projects: str
    tensors: tuple[str, ...]
    why: str
    where: Callable[[Shapes], bool] | None = None


def _has_quantiles(shapes: Shapes) -> bool:
    objectives = shapes.get("reward_transform_matrix", (0,))[0]
    return shapes["regression_layer.weight"][0] > objectives > 0


_GATED = (r"regression_layer\.weight", r"gating\.layers\.\d+\.weight")
UNREADABLE = (
    UnreadableHead(
        "QRM",
        _GATED,
        "it predicts quantiles of several objectives and mixes their means by a second network that reads the prompt",
        _has_quantiles,
    ),
    UnreadableHead(
        "ArmoRM", _GATED, "it predicts several objectives and mixes them by a second network that reads the prompt"
    ),
    UnreadableHead(
        "LDL-Reward-Gemma",
        (r"regression_layer\.network\.\d+\.weight", r"gating_layer\.network\.\d+\.weight"),
        "it predicts distributions over several objectives, which a second network mixes",
    ),
    UnreadableHead(
        "URM",
        (r"weights\.fc\.\d+\.weight", r"score\.weight"),
        "it predicts mean and variance of several attributes, whose means a second network mixes",
    ),
    UnreadableHead(
        "InternLM2 reward models",
        (r"v_head\.weight", r"model\.tok_embeddings\.weight"),
        "it is read at a token of its own that its code appends to each text, and transformers has no such class",
    ),
    UnreadableHead("GRM", (r"v_head\.summary\.\d+\.weight",), "it has several layers with an activation between them"),
    UnreadableHead(
        "INF-ORM, WorldPM, Qwen2.5-Math-RM and -PRM",
        (r"score\.\d+\.weight",),
        "it has several layers with an activation between them",
    ),
)


def refuse_unreadable_head(name: str, shapes: Shapes) -> None:
    """Refuse a checkpoint with a head that is known, and is no single linear layer.

    Args:
        name: folder or hub name, for the message.
        shapes: of all its tensors, by name.

    Raises:
        ModelError: names the tensor, whose head it is, and why it can't be used.
    """
    for head in UNREADABLE:
        found = [next((key for key in sorted(shapes) if re.fullmatch(one, key)), None) for one in head.tensors]
        if None in found or (head.where is not None and not head.where(shapes)):
            continue
        raise ModelError(
            f"{name}: holds a head that can't be used here ({found[0]}), of the kind of {head.projects}: {head.why}, "
            "and a reward model here has one linear layer with one output. Fix: score with its own code, or train from "
            "the causal language model it came from; see docs/foreign_models.md."
        )


def is_head_in_adapter(key: str) -> bool:
    """Tell whether a tensor of an adapter is the whole weight of a head, below whatever PEFT calls the model."""
    return any(re.fullmatch(rf"(.*\.)?{layout.weight}", key) for layout in READ)


def is_part_of_head_in_adapter(key: str) -> bool:
    """Tell whether a tensor of an adapter is the whole weight of a head, or its bias."""
    return is_head_in_adapter(key.removesuffix("bias") + "weight" if key.endswith(".bias") else key)


def is_lora_on_head(key: str) -> bool:
    """Tell whether a tensor of an adapter is a low-rank change of a head."""
    heads = [layout.weight.removesuffix(r"\.weight") for layout in READ]
    return any(re.fullmatch(rf"(.*\.)?{head}\.lora_.+", key) for head in heads)


def projects_of(key: str) -> str | None:
    """Return whose name for a head's weight this is; `None` where nobody known calls it so."""
    return next((layout.projects for layout in READ if re.fullmatch(layout.weight, key)), None)
