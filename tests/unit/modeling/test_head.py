"""The scalar head: found or refused, computed in fp32, and exact under a low-precision copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rm_scale.errors import ModelError
from rm_scale.modeling.head import ScalarHead, active_head, check_head_trainable, find_head, install_scalar_head


class Model(nn.Module):
    """A body and a head, as transformers lays them out."""

    def __init__(self, head: nn.Module, name: str = "score") -> None:
        super().__init__()
        self.model = nn.Linear(4, 4)
        setattr(self, name, head)


def test_head_is_replaced_around_the_same_parameter() -> None:
    linear = nn.Linear(4, 1, bias=False)
    model = Model(linear)
    assert install_scalar_head(model) == "score"
    assert active_head(model).weight is linear.weight
    assert list(dict(model.named_parameters())) == ["model.weight", "model.bias", "score.weight"]
    assert "score.residual" not in model.state_dict()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (nn.Linear(4, 2, bias=False), "Linear with 2 outputs"),
        (nn.Linear(4, 1, bias=True), "no bias"),
        (nn.Sequential(nn.Linear(4, 1)), "Sequential with None outputs"),
    ],
)
def test_other_heads_are_refused(head: nn.Module, expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        find_head(Model(head))


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="has no head called score or classifier"):
        find_head(Model(nn.Linear(4, 1, bias=False), name="lm_head"))


def test_frozen_head_is_refused() -> None:
    model = Model(nn.Linear(4, 1, bias=False))
    install_scalar_head(model)
    active_head(model).weight.requires_grad_(False)
    with pytest.raises(ModelError, match="the reward head is frozen"):
        check_head_trainable(model)


def test_two_heads_are_refused() -> None:
    model = Model(ScalarHead.from_linear(nn.Linear(4, 1, bias=False)))
    model.other = ScalarHead.from_linear(nn.Linear(4, 1, bias=False))
    with pytest.raises(ModelError, match="expected one reward head in Model, found 2"):
        active_head(model)


def test_rewards_are_fp32_even_under_autocast() -> None:
    head = ScalarHead.from_linear(nn.Linear(64, 1, bias=False))
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rewards = head(hidden)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, hidden.float() @ head.weight.T)


def test_residual_gives_back_the_master_exactly() -> None:
    """What the engine's bf16 copy lost is added again: rewards are those of the fp32 master."""
    master = torch.randn(1, 64)
    linear = nn.Linear(64, 1, bias=False).bfloat16()
    linear.weight.data = master.bfloat16()
    head = ScalarHead.from_linear(linear)
    hidden = torch.randn(5, 64)
    assert not torch.equal(head(hidden), hidden @ master.T)
    head.set_residual(master)
    assert torch.equal(head.effective_weight(), master)
    torch.testing.assert_close(head(hidden), hidden @ master.T)
    head(hidden).sum().backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.bfloat16
