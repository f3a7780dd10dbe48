"""What follows the backbone: reward heads, and the language-model losses of published measurements.

Each head frees its input, which no other variable refers to.
"""

from __future__ import annotations

from rm_scale.planning.activations.linear import product
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor


def head(step: MicroStep, final: SizedTensor) -> SizedTensor:
    """Replay the head that the options name, on the output of the final norm."""
    heads = {
        "score": _score,
        "score_all": _score_all,
        "lm": _language_model,
        "lm_chunked": _chunked_language_model,
    }
    return heads[step.options.head](step, final)


def _score(step: MicroStep, final: SizedTensor) -> SizedTensor:
    """Replay the reward head on each response's last token (rm_scale/modeling/packed_model.py)."""
    count = step.row.responses
    scored = Size("responses x hidden", count * step.shape.hidden_size)
    row = step.slice(final, final.size)
    picked = step.gather("scored tokens", row, scored)
    step.free(final, row)
    wide = step.cast("scored tokens in fp32", picked, 4)
    rewards = _rewards(step, wide, count)
    step.free(picked, wide)
    return rewards


def _score_all(step: MicroStep, final: SizedTensor) -> SizedTensor:
    """Replay the reward head on all tokens, as transformers' own class runs it."""
    wide = step.cast("head input in fp32", final, 4)
    rewards = _rewards(step, wide, step.row.tokens)
    step.free(final, wide)
    return rewards


def _rewards(step: MicroStep, wide: SizedTensor, count: int) -> SizedTensor:
    rewards = step.new("rewards", Size("rewards", count), 4, True)

    def backward(gradient: Allocation) -> Gradients:
        return [(wide, step.memory.allocate("gradient of head input", wide.size, 4))]

    return step.graph.record(rewards, [wide.allocation], backward)


def _language_model(step: MicroStep, final: SizedTensor) -> SizedTensor:
    """Replay the loss of transformers' Llama: logits, the same in fp32, and their log-softmax, which is kept."""
    vocabulary = Size("tokens x vocab", step.row.tokens * step.shape.vocab_size)
    logits = product(step, "logits", final, vocabulary, is_head=True)
    wide = step.cast("logits in fp32", logits, 4)
    normal = step.new("log-softmax", vocabulary, 4, True)

    def backward_of_softmax(gradient: Allocation) -> Gradients:
        return [(wide, step.memory.allocate("gradient of logits", vocabulary, 4))]

    step.graph.record(normal, [normal.allocation], backward_of_softmax)
    loss = step.new("loss", Size("1", 1), 4, True)

    def backward_of_loss(gradient: Allocation) -> Gradients:
        return [(normal, step.memory.allocate("gradient of log-softmax", vocabulary, 4))]

    step.graph.record(loss, [normal.allocation], backward_of_loss)
    step.free(final, logits, wide, normal)
    return loss


def _chunked_language_model(step: MicroStep, final: SizedTensor) -> SizedTensor:
    """Replay Liger's fused loss (ops/fused_linear_cross_entropy.py), which makes gradients in the forward pass."""
    hidden, vocab, width = step.shape.hidden_size, step.shape.vocab_size, step.product_width
    chunks = -(-vocab // hidden)
    rows = 1 << max(0, -(-step.row.tokens // chunks) - 1).bit_length()
    weight = Size("vocab x hidden", vocab * hidden)
    made = [step.memory.allocate("gradient of head input", step.hidden, width)]
    chunk = [step.memory.allocate("logits of a chunk", Size("chunk x vocab", rows * vocab), width)]
    if step.is_full:
        made.append(step.memory.allocate("gradient of head weight", weight, width))
        chunk.append(step.memory.allocate("gradient of head weight, a chunk's", weight, width))
    step.memory.release(*chunk)
    loss = step.new("loss", Size("1", 1), 4, True)
    step.graph.record(loss, made, lambda gradient: [(final, step.memory.keep(made[0]))])
    step.memory.release(*made)
    step.free(final)
    return loss
