"""Prepare single layers of a model for packed rows: those whose own code would not keep responses apart.

Most layers need nothing, as they hand the layout on to their attention. The classes named here are transformers' own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from rm_scale.batching.packed.layout import RowLayout
from rm_scale.modeling.recurrent_layers import RECURRENT_LAYERS, keep_responses_apart

_CHILD_WITHOUT_LAYOUT = {
    "JambaMambaDecoderLayer": "mamba",
    "NemotronDecoderLayer": "self_attn",
    "StableLmDecoderLayer": "self_attn",
}
"""Decoder layers that keep the layout from the child that needs it."""

_WINDOW_IN_MASK_ALONE = frozenset(["PhimoeAttention"])
"""Attention that is not told its window, since the mask, which packed rows do without, has it."""


class HandsLayoutOn:
    """Mixed into a decoder layer of `_CHILD_WITHOUT_LAYOUT`: the child finds the layout as its attribute."""

    def forward(self, *args: Any, packed_layout: RowLayout | None = None, **kwargs: Any) -> Any:
        """Run the layer. It is run again in the backward pass under gradient checkpointing, with the same arguments."""
        child = getattr(self, _CHILD_WITHOUT_LAYOUT[type(self).__name__])
        child.packed_layout = packed_layout
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            child.packed_layout = None


def prepare_layers(model: nn.Module) -> None:
    """Prepare every layer of a model for packed rows, where it needs it; padded rows stay as they are."""
    for layer in model.modules():
        kind = type(layer)
        if kind.__name__ in _CHILD_WITHOUT_LAYOUT and not isinstance(layer, HandsLayoutOn):
            layer.__class__ = type(kind.__name__, (HandsLayoutOn, kind), {"__module__": kind.__module__})
        elif kind.__name__ in _WINDOW_IN_MASK_ALONE:
            config: Any = layer.config
            layer.packed_window = config.sliding_window
        elif kind.__name__ in RECURRENT_LAYERS:
            keep_responses_apart(layer)
