"""The scalar head: one output, held and computed in fp32 whatever the rest of the model runs in.

In bfloat16 a reward near 4 moves in steps of 0.03 and close rewards tie, so the head's product is done in fp32. Under
DeepSpeed's bf16 engine the weight that takes part in the forward pass is a bf16 copy of an fp32 master; `residual`
holds what the copy lost, so that the forward pass uses the master's exact value.
"""

from __future__ import annotations

import torch
from torch import nn

from rm_scale.errors import ModelError

HEAD_NAMES = ("score", "classifier")
"""Attribute names under which transformers' `ForSequenceClassification` models keep their head."""


class ScalarHead(nn.Linear):
    """A linear layer hidden_size -> 1 without bias whose product is fp32.

    Attributes:
        residual: fp32 tensor `(1, hidden_size)` on the weight's device; added to `weight` in the forward pass. Zero
            unless `weight` is a lower-precision copy of an fp32 master. Not saved: the saved weight is
            `effective_weight()`.
        offset: constant added to every reward: the bias of a head that another trainer saved. Not saved.
    """

    residual: torch.Tensor
    offset: float = 0.0

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> ScalarHead:
        """Take over the parameter of an existing head, without copying it (it may be sharded by ZeRO-3)."""
        with torch.device("meta"):
            head = cls(linear.in_features, 1, bias=False)
        head.weight = linear.weight
        # Nothing moves it later: DeepSpeed leaves models that `zero.Init` made where they are, as 4-bit ones stay.
        residual = torch.zeros(1, linear.in_features, dtype=torch.float32, device=linear.weight.device)
        head.register_buffer("residual", residual, persistent=False)
        return head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return rewards `(..., 1)` in fp32 of hidden states `(..., hidden_size)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = nn.functional.linear(hidden.float(), self.effective_weight())
            return rewards + self.offset if self.offset else rewards

    def effective_weight(self) -> torch.Tensor:
        """Return the fp32 weight `(1, hidden_size)` that rewards are computed with."""
        return self.weight.float() + self._residual_beside_weight()

    def set_residual(self, master: torch.Tensor) -> None:
        """Remember what the low-precision weight lost of `master` (fp32, `(1, hidden_size)`)."""
        rounded = master.to(self.weight.dtype).float()
        self.residual = (master.float() - rounded).to(self.weight.device)

    def _residual_beside_weight(self) -> torch.Tensor:
        """Return the residual in fp32, moved for good when somebody gave the head a weight on another device."""
        if self.residual.device != self.weight.device:
            self.residual = self.residual.to(self.weight.device)
        return self.residual.float()


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the head of a transformers sequence-classification model: its attribute name and the layer.

    Raises:
        ModelError: there is none we know, it has more than one output, or it has a bias.
    """
    for name in HEAD_NAMES:
        head = getattr(model, name, None)
        if head is None:
            continue
        outputs = getattr(head, "out_features", None)
        if not isinstance(head, nn.Linear) or outputs != 1 or getattr(head, "bias", None) is not None:
            raise ModelError(
                f"{type(model).__name__}.{name} is {type(head).__name__} with {outputs} outputs: a reward head is one "
                "linear layer with one output and no bias. Fix: use a decoder-only model (Llama, Qwen, Mistral, Gemma, "
                "Phi, ...) or a reward model trained with num_labels=1."
            )
        return name, head
    raise ModelError(
        f"{type(model).__name__} has no head called {' or '.join(HEAD_NAMES)}. "
        "Fix: use a decoder-only model that AutoModelForSequenceClassification knows."
    )


def install_scalar_head(model: nn.Module) -> str:
    """Replace the model's head by a `ScalarHead` around the same parameter; return the head's attribute name."""
    name, head = find_head(model)
    if not isinstance(head, ScalarHead):
        setattr(model, name, ScalarHead.from_linear(head))
    return name


def active_head(model: nn.Module) -> ScalarHead:
    """Return the `ScalarHead` of the forward pass: the trained copy when the model carries adapters.

    Raises:
        ModelError: the model has no such head, or the head is frozen beside trainable weights (it would be lost).
    """
    heads = {name: module for name, module in model.named_modules() if isinstance(module, ScalarHead)}
    trained = [head for name, head in heads.items() if ".modules_to_save." in name]
    candidates = trained or list(heads.values())
    if len(candidates) != 1:
        raise ModelError(
            f"expected one reward head in {type(model).__name__}, found {len(candidates)} of {sorted(heads)}. "
            "Fix: load the model with rm_scale.modeling.loading."
        )
    return candidates[0]


def check_head_trainable(model: nn.Module) -> None:
    """Refuse a model whose head would not be trained.

    Raises:
        ModelError: the head is frozen.
    """
    if not active_head(model).weight.requires_grad:
        raise ModelError(
            "the reward head is frozen: it would stay random and be lost at the save. "
            "Fix: leave lora_modules_to_save to rm_scale, which always trains the head in full."
        )
