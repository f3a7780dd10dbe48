"""Sequence classifiers that also take packed rows: pool the last token of each response and run the head on it alone.

transformers' own forward pass scores every token and then picks one per row of a rectangle, so it can't take a row with
several responses. The model gets a subclass of its own class whose forward pass knows both kinds of batch; weights,
names and what is saved stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from rm_scale.batching.packed.attention import PREFIX, register_backends
from rm_scale.batching.packed.layout import RowLayout
from rm_scale.errors import ModelError
from rm_scale.modeling.packed_layers import prepare_layers
from rm_scale.planning.layout_choice import refusal

# Any 4-D tensor is taken by transformers as a finished mask; ours is in the layout, and no mask must be built.
_NO_MASK = (1, 1, 1, 1)


class TakesPackedRows:
    """Mixed into a `ForSequenceClassification` class by `enable_packed_rows`."""

    # Of transformers' own sdpa, which some models need more than; it takes our backend of that name for it.
    _supports_sdpa = True

    def forward(self, *args: Any, packed_layout: RowLayout | None = None, **kwargs: Any) -> Any:
        """Score a padded batch as ever, or with `packed_layout` a packed row.

        A packed row is `input_ids`, `position_ids` `(1, width)` and `score_index` `(N,)`; its logits are `(N, 1)`.
        """
        if packed_layout is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        assert not args, "packed rows are given by name"
        return self._forward_packed(packed_layout, **kwargs)

    def _forward_packed(
        self,
        layout: RowLayout,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        score_index: torch.Tensor,
        **unused: Any,
    ) -> SequenceClassifierOutputWithPast:
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=torch.ones(_NO_MASK, dtype=torch.bool, device=input_ids.device),
            position_ids=position_ids,
            use_cache=False,
            packed_layout=layout,
        ).last_hidden_state
        head = self.score if hasattr(self, "score") else self.classifier  # type: ignore[attr-defined]
        return SequenceClassifierOutputWithPast(logits=head(hidden[0].index_select(0, score_index)))


def packed_rows_problem(model: PreTrainedModel) -> str | None:
    """Say why this model can't take packed rows, where config.json alone does not settle it; else `None`."""
    reason = refusal(model.config.to_dict())
    if reason is not None:
        return reason
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__}: its attention does not go through transformers' attention interface"
    if not isinstance(getattr(model, model.base_model_prefix, None), torch.nn.Module):
        return f"{type(model).__name__}: its backbone can't be told from its head"
    return None


def packed_backend(model: PreTrainedModel | PeftModel) -> str | None:
    """Return the attention backend by which a model takes packed rows; `None` where it takes padded ones alone."""
    name = str(getattr(model.config, "_attn_implementation", None))
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def enable_packed_rows(model: PreTrainedModel, backend: str) -> None:
    """Let the model take packed rows, with attention by this backend (see `rm_scale.batching.packed.attention`).

    Padded batches still work: their attention is transformers' sdpa.

    Raises:
        ModelError: the model can't take them.
    """
    problem = packed_rows_problem(model)
    if problem is not None:
        raise ModelError(f"packed rows can't be used with {problem}. Fix: set packing: none.")
    register_backends()
    kind = type(model)
    if not issubclass(kind, TakesPackedRows):
        # The same name, as it is what config.json calls the architecture.
        model.__class__ = type(kind.__name__, (TakesPackedRows, kind), {"__module__": kind.__module__})
    prepare_layers(model)
    model.set_attn_implementation(PREFIX + backend)
