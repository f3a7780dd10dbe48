"""What the activations of a micro-step depend on beside the model: the tokens of its row, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["none", "full"]
Method = Literal["full", "lora", "qlora"]
Precision = Literal["bf16", "amp", "fp32"]
Attention = Literal["varlen", "sdpa", "matmul"]
Head = Literal["score", "score_all", "lm", "lm_chunked"]

QUERIES_PER_BLOCK = 256
"""The matmul backend (rm_scale/batching/packed/matmul_backend.py) cuts a prompt's or a response's queries into blocks
of about this many, each with the keys up to its own end only. It stands here, where no torch is needed, because the
planner counts the attention weights that these blocks keep."""


@dataclass(frozen=True)
class Row:
    """The tokens of one micro-step.

    Attributes:
        tokens: tokens that the linear layers process, padding included.
        key_tokens: keys of attention: each response's own tokens and its prompt's. As many as `tokens` unless prompts
            are shared.
        responses: how many responses are scored.
        pairs: query-key pairs whose attention weights the matmul backend keeps, per head and layer.
        longest: most keys that a query sees.
    """

    tokens: int
    key_tokens: int
    responses: int
    pairs: int = 0
    longest: int = 0

    @classmethod
    def of(cls, groups: Sequence[tuple[int, Sequence[int]]], share_prompts: bool, multiple: int = 1) -> Row:
        """Make the row that holds these groups.

        Args:
            groups: for each group the tokens of its prompt and of each of its responses.
            share_prompts: the prompt stands once per group.
            multiple: the row is padded to a multiple of this.
        """
        tokens = keys = pairs = longest = responses = 0
        for prompt, lengths in groups:
            tokens += (prompt if share_prompts else prompt * len(lengths)) + sum(lengths)
            keys += sum(prompt + length for length in lengths)
            longest = max(longest, *(prompt + length for length in lengths))
            pairs += _kept_pairs(prompt, lengths, share_prompts)
            responses += len(lengths)
        padding = -tokens % multiple
        return cls(tokens + padding, keys + padding, responses, pairs, longest)


def _kept_pairs(prompt: int, lengths: Sequence[int], share_prompts: bool) -> int:
    """Count attention weights per head, where queries go in blocks and a block sees the keys up to its own end."""

    def causal_weights(queries: int, keys_before: int) -> int:
        blocks = max(1, round(queries / QUERIES_PER_BLOCK))
        return queries * keys_before + queries * (queries + -(-queries // blocks)) // 2

    if not share_prompts:
        return sum(causal_weights(prompt + length, 0) for length in lengths)
    return causal_weights(prompt, 0) + sum(causal_weights(length, prompt) for length in lengths)


@dataclass(frozen=True)
class Options:
    """How the micro-step is run.

    Attributes:
        checkpointing: "full" recomputes each layer in the backward pass.
        use_reentrant: torch's older kind of checkpointing, which recomputes a layer to its very end.
        method: full, lora or qlora.
        lora_rank: rank of the adapters.
        lora_targets: module names such as "q_proj"; `None` for all linear layers.
        lora_parameters: adapted tensors of experts, as `expert_settings.adapted_parameters` gives them.
        lora_dropout: with any dropout each adapter keeps an input and a mask of its own.
        precision: "bf16" (all in bfloat16, as in DeepSpeed's engine), "amp" (trained weights fp32, products in bfloat16
            by autocast; a frozen backbone is bfloat16), or "fp32".
        attention: backend of packed rows; varlen also stands for flash-attention as such.
        head: "score" (a reward head on the scored tokens of packed rows), "score_all" (the same on all tokens, as with
            padded batches), "lm" (logits of all tokens, for published numbers of language models), "lm_chunked"
            (Liger's fused loss).
        as_tracked: count what torch's MemTracker sees. It differs from a device in two ways: workspaces inside kernels
            are invisible to it, and it keeps autograd from adding gradients in place.
    """

    checkpointing: Checkpointing = "full"
    use_reentrant: bool = False
    method: Method = "full"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_parameters: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    precision: Precision = "bf16"
    attention: Attention = "varlen"
    head: Head = "score"
    as_tracked: bool = False
