"""Attention over a packed row by FlexAttention: compiled once for all rows, with a mask of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from rm_scale.batching.packed.attention_rules import AttentionRules
from rm_scale.batching.packed.backend_choice import has_little_shared_memory
from rm_scale.batching.packed.index_arrays import (
    BLOCK,
    FlexIndex,
    TokenRanges,
    find_index,
    sees_by_ranges,
)
from rm_scale.batching.packed.layout import RowLayout
from rm_scale.errors import ModelError
from rm_scale.texts import first_line


def flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rules: AttentionRules
) -> torch.Tensor:
    """Attend by FlexAttention: compiled on CUDA, by its eager path (which holds all scores) on a CPU."""
    index: FlexIndex = find_index(layout, ("flex", rules.window), query.device)
    attend = _flex_for(query.device.type)
    # Windows are in the ranges. What is left are numbers, given as text: compilers take text for a constant, but make a
    # float of their own an input of the kernel, which FlexAttention can't have.
    cap = None if rules.softcap is None else repr(float(rules.softcap))
    edge = None
    if query.device.type == "cuda":
        capability = torch.cuda.get_device_capability(query.device)
        edge = flex_block_edge(capability, query.element_size(), query.shape[-1])
    numbers = (repr(float(rules.scaling)), cap, None if edge is None else str(edge))
    return attend(query[None], key[None], value[None], index.ranges, index.blocks, *numbers, rules.sinks)[0]


def _flex_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: TokenRanges,
    blocks: dict[str, torch.Tensor],
    scaling: str,
    softcap: str | None,
    edge: str | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend over a row; compiled. What differs between rows is a tensor, so that one graph serves all of them.

    Args:
        query, key, value: `(1, heads, width, head_dim)`.
        ranges, blocks: see `FlexIndex`.
        scaling, softcap: see `AttentionRules`.
        edge: see `flex_block_edge`.
        sinks: see `AttentionRules`.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    if query.device.type != "cpu" and not torch.compiler.is_dynamo_compiling():
        raise ModelError(
            "packed_attention=flex runs uncompiled, which would hold the scores of all pairs of tokens: torch.compile "
            "is switched off here. Fix: unset TORCHDYNAMO_DISABLE, or set packed_attention: matmul."
        )

    def mask_mod(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return sees_by_ranges(ranges, query, key)

    score_mod = None
    if softcap is not None:
        cap = float(softcap)

        def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return cap * torch.tanh(score / cap)

    width = query.shape[2]
    mask = BlockMask(seq_lengths=(width, width), **blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)  # type: ignore[arg-type]
    result = flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=float(scaling),
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_kernel_options(None if edge is None else int(edge)),
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        assert isinstance(result, torch.Tensor)
        return result
    out, aux = result
    assert isinstance(out, torch.Tensor) and isinstance(aux.lse, torch.Tensor)
    # What a sink takes of the weights: the rest stays with the keys.
    return out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].to(out.dtype)


def flex_block_edge(capability: tuple[int, int], bytes_per_number: int, head_dim: int) -> int | None:
    """Return how many queries and keys FlexAttention's kernels should take at once; `None` for what torch chooses.

    What torch 2.13 chooses asks for more shared memory than some GPUs have. Compiled by Triton 3.7.1 without a card:

    | numbers per head | 64 | 80 | 128 | 256 | a block has |
    |---|---|---|---|---|---|
    | 8.6, 8.9, half precision | 50 KiB | 88 | 96 | 148; with 32: 64 | 99 |
    | 8.6, 8.9, fp32 | 80 | 176; with 16: 33 | 144; with 16: 33 | 132; with 16: 65 | 99 |
    | 8.0, half precision | 50 | 88 | 96 | 148 | 163 |
    | 8.0, fp32 | 80 | 176 | 144 | 132 | 163 |
    | 9.0, half precision | 114 | 163 | 163 | 194 | 227 |
    | 7.5, half precision | | | 64 | with 16: 48 | 64 |

    Args:
        capability: of the GPU.
        bytes_per_number: of queries and keys.
        head_dim: size of a head.
    """
    if bytes_per_number == 4:
        return 16 if head_dim > 64 else None
    if head_dim > 128 and has_little_shared_memory(capability):
        return 32 if capability >= (8, 0) else 16
    return None


def _kernel_options(edge: int | None) -> Any:
    # Rows under 128 tokens would get a kernel for decoding, which has no block size for most grouped heads.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if edge is not None:
        options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": edge, "num_stages": 1, "num_warps": 4}
        options |= {f"bwd_BLOCK_{name}": edge for name in ("M1", "N1", "M2", "N2")}
    return options


def _flex_for(device_type: str) -> Callable[..., torch.Tensor]:
    return _flex_row if device_type == "cpu" else compiled_flex_row


MAX_FLEX_GRAPHS = 32
"""Graphs that FlexAttention is compiled to. A model needs one or two each for training and for scoring, per type."""


@functools.cache
def _compiler_of_flex() -> Callable[..., torch.Tensor]:
    # fullgraph: past the limit torch would run the row uncompiled without a word; so it raises.
    return torch.compile(_flex_row, fullgraph=True, dynamic=True)


def compiled_flex_row(*args: Any) -> torch.Tensor:
    """Run `_flex_row` compiled.

    Raises:
        ModelError: it can't be compiled, or was compiled so often that something must be wrong.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError
    from torch.fx.experimental import _config as shapes

    limit: Any = config.patch(recompile_limit=MAX_FLEX_GRAPHS)  # torch.compile takes it itself from 2.12 on
    # Else sizes that happen to be equal in one row, such as blocks and heads, would be taken for the same.
    apart: Any = shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    try:
        with limit, apart:
            return _compiler_of_flex()(*args)
    except FailOnRecompileLimitHit as error:
        raise ModelError(
            f"packed_attention=flex was compiled {MAX_FLEX_GRAPHS} times and a row asks for one more: one graph should "
            "serve all rows. Fix: set packed_attention: matmul, and report this with what TORCH_LOGS=recompiles prints."
        ) from error
    except (TorchDynamoException, InductorError) as error:
        raise ModelError(
            f"packed_attention=flex can't be compiled here: {first_line(error)} Fix: set packed_attention: matmul."
        ) from error
