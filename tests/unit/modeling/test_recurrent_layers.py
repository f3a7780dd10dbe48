"""Packed rows through layers whose scans and convolutions are kernels of other packages, called as these name things.

The kernels run on GPUs alone: here torch's functions stand behind functions with the kernels' own arguments, found by
transformers the way it finds the kernels.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.errors import ModelError
from rm_scale.modeling.packed_model import enable_packed_rows
from rm_scale.modeling.recurrent_layers import KeepsResponsesApart
from rm_scale.modeling.token_scores import batch_rewards
from rm_scale.planning.layout_choice import TESTED_RECURRENT_TYPES
from tests.support.families import tiny_classifier

Kernel = Callable[..., Any]
GROUPS = [
    {"input_ids": [[3, 4, 5, 6, 7], [3, 4, 8]], "ranks": [0, 1], "index": 0, "margin": None, "soft_label": None},
    {"input_ids": [[9], [10, 11, 12]], "ranks": [0, 1], "index": 1, "margin": None, "soft_label": None},
]


def delta_rule_of_fla(plain: Kernel) -> Kernel:
    """Name arguments as flash-linear-attention 0.4 does."""

    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        assert scale is None
        rest = {"initial_state": initial_state, "output_final_state": output_final_state}
        return plain(q, k, v, g, beta, **rest, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)

    return chunk_gated_delta_rule


def convolution_of_causal_conv1d(plain: Kernel) -> Kernel:
    """Name arguments as causal-conv1d 1.5 does."""

    def causal_conv1d_fn(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        return_final_states: bool = False,
        activation: str | None = None,
    ) -> Any:
        assert seq_idx is None and initial_states is None and not return_final_states
        return plain(x, weight, bias, activation)

    return causal_conv1d_fn


def chunk_scan_of_mamba_ssm(plain: Kernel) -> Kernel:
    """Name arguments as mamba-ssm 2.2 does."""

    def mamba_chunk_scan_combined(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        chunk_size: int,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
    ) -> Any:
        assert z is None
        return plain(x, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)

    return mamba_chunk_scan_combined


def selective_scan_of_mamba_ssm(plain: Kernel) -> Kernel:
    """Name arguments as mamba-ssm 2.2 does."""

    def selective_scan_fn(
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        return plain(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    return selective_scan_fn


KERNELS: dict[str, tuple[str, str, Callable[[Kernel], Kernel]]] = {
    "torch_chunk_gated_delta_rule": ("fla", "ops.gated_delta_rule", delta_rule_of_fla),
    "causal_conv1d_fn": ("causal_conv1d", "", convolution_of_causal_conv1d),
    "mamba2_chunk_scan": ("mamba_ssm", "ops.triton.ssd_combined", chunk_scan_of_mamba_ssm),
    "mamba_selective_scan": ("mamba_ssm", "ops.selective_scan_interface", selective_scan_of_mamba_ssm),
}
"""The package of the kernel of each of transformers' functions, the module it is in, and its stand-in."""


def install_kernels(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let transformers find the kernels' packages; return the list to which each call of a kernel adds its name."""
    called: list[str] = []
    for name, (package, path, stand_in) in KERNELS.items():
        if not hasattr(module, name):
            continue
        plain = inspect.unwrap(getattr(module, name))
        kernel = _watched(stand_in(plain), called)
        monkeypatch.setitem(sys.modules, package, _package(package, path, kernel))
        found = use_kernel_func_from_hub_with_fallback(kernel.__name__, package)(plain)
        monkeypatch.setattr(module, name, found)
    return called


def _watched(kernel: Kernel, called: list[str]) -> Kernel:
    def run(*args: Any, **kwargs: Any) -> Any:
        called.append(kernel.__name__)
        return kernel(*args, **kwargs)

    run.__name__ = kernel.__name__
    # transformers drops the arguments that a kernel does not name.
    run.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    return run


def _package(name: str, path: str, kernel: Kernel) -> types.ModuleType:
    inner: Any = {kernel.__name__: kernel}
    for part in reversed([part for part in path.split(".") if part]):
        inner = {part: types.SimpleNamespace(**inner)}
    package = types.ModuleType(name)
    vars(package).update(inner)
    return package


def rewards(model: PreTrainedModel, share_prompts: bool | None) -> torch.Tensor:
    """Return rewards by packed rows, or by padded ones where `share_prompts` is `None`."""
    collate = PaddedCollator(0) if share_prompts is None else PackedCollator(0, share_prompts=share_prompts)
    with torch.no_grad():
        return batch_rewards(model, collate(GROUPS))


@pytest.mark.parametrize("model_type", sorted(TESTED_RECURRENT_TYPES))
def test_kernels_are_called_with_arguments_that_they_know(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_classifier(model_type, initializer_range=0.3).eval()
    wanted = rewards(model, None)
    called = install_kernels(sys.modules[type(model).__module__], monkeypatch)
    enable_packed_rows(model, "matmul")
    for share_prompts in (True, False):
        called.clear()
        torch.testing.assert_close(rewards(model, share_prompts), wanted, rtol=0, atol=1e-4)
        assert len(set(called)) == 2, "a convolution and a scan"


SCANS = {"torch_chunk_gated_delta_rule", "mamba2_chunk_scan", "mamba_selective_scan"}


@pytest.mark.parametrize("part", ["convolution", "scan"])
@pytest.mark.parametrize("model_type", sorted(TESTED_RECURRENT_TYPES))
def test_a_function_that_was_put_in_later_is_noticed(
    model_type: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a kernel: it would run on through the whole row."""
    model = tiny_classifier(model_type).eval()
    enable_packed_rows(model, "matmul")
    wanted = rewards(model, None)
    module = sys.modules[type(model).__module__]
    (name,) = {"causal_conv1d_fn"} if part == "convolution" else {name for name in SCANS if hasattr(module, name)}
    monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    with pytest.raises(ModelError, match=f"{type(recurrent(model)).__name__} ran its {part} by other code .* Fix: set"):
        rewards(model, True)
    assert torch.equal(rewards(model, None), wanted)


def recurrent(model: PreTrainedModel) -> torch.nn.Module:
    """Return the first layer that carries a state."""
    return next(module for module in model.modules() if isinstance(module, KeepsResponsesApart))
