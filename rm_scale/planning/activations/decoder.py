"""The whole model: embedding, decoder layers with or without checkpointing, final norm and head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rm_scale.errors import ModelError
from rm_scale.planning.activations.attention import attention
from rm_scale.planning.activations.delta_net import delta_net
from rm_scale.planning.activations.experts import adapted_in_layer, experts
from rm_scale.planning.activations.heads import head
from rm_scale.planning.activations.latent_attention import latent_attention
from rm_scale.planning.activations.linear import is_adapted, leave_autocast
from rm_scale.planning.activations.micro_step import MicroStep
from rm_scale.planning.activations.mlp import mlp
from rm_scale.planning.activations.norms import norm
from rm_scale.planning.activations.repeated_layers import Layers, repeated_layers
from rm_scale.planning.activations.simulated_autograd import Allocation, Gradients, Size, SizedTensor
from rm_scale.planning.layer_parts import LayerKind


def forward(step: MicroStep) -> SizedTensor:
    """Replay the forward pass and return the loss."""
    embedded = _embed(step)
    dims = step.shape.latent.rope_dim if step.shape.latent else int(step.shape.head_dim * step.rotary_share)
    dims *= step.has_rope
    tables = Size("2 x tokens x rotated part of head_dim", 2 * step.row.tokens * dims)
    rotary = step.memory.allocate("rotary tables", tables, step.base_width)
    step.hold(embedded)  # a variable of the model's forward pass holds it to the end
    hidden = embedded
    kinds = _with_adapters(step)
    layers = repeated_layers(kinds)
    if step.options.precision == "amp":  # whose copies of weights last until the end
        layers = Layers(kinds, (), 0, ())
    hidden = _replay(step, hidden, layers.before)
    before = step.memory.counts.copy()
    hidden = _replay(step, hidden, layers.pattern)
    hidden = _leave_out(step, hidden, step.memory.counts - before, layers.left_out)
    hidden = _replay(step, hidden, layers.after)
    final = norm(step, "final norm", hidden)
    step.free(hidden, embedded)
    step.memory.keep(rotary)
    loss = head(step, final)
    leave_autocast(step)
    return loss


def _with_adapters(step: MicroStep) -> tuple[LayerKind, ...]:
    """Return the model's layers, those apart whose experts have adapters and those whose experts have none."""
    kinds, parameters = tuple(step.shape.layers), step.options.lora_parameters
    if step.is_full or not parameters:
        return kinds
    return tuple(replace(kind, adapted=adapted_in_layer(parameters, place)) for place, kind in enumerate(kinds))


def _replay(step: MicroStep, hidden: SizedTensor, kinds: Sequence[LayerKind]) -> SizedTensor:
    """Replay layers one after the other; the input goes out of scope."""
    run = _checkpointed if step.options.checkpointing == "full" else _layer
    for kind in kinds:
        after = run(step, hidden, kind)
        step.free(hidden)
        hidden = after
    return hidden


def _leave_out(step: MicroStep, hidden: SizedTensor, stored: Counter[tuple[str, str]], times: int) -> SizedTensor:
    """Stand for layers like the last ones, so many times over: they store as much, and need no more than the last.

    Backwards what they stored is released when all behind them has been run.
    """
    if not times:
        return hidden
    kept = [step.memory.allocate_alike(key, count * times) for key, count in stored.items()]
    after = step.view(hidden)
    step.graph.record(after, kept, lambda gradient: [(hidden, step.memory.keep(gradient))])
    step.free(hidden)
    step.memory.release(*kept)
    return after


def _embed(step: MicroStep) -> SizedTensor:
    # With adapters and checkpointing the embedding's output is made to need a gradient, or no layer would run one.
    needs_grad = step.is_full or step.options.checkpointing == "full"
    embedded = step.new("layer input", step.hidden, step.base_width, needs_grad)
    weight = Size("vocab x hidden", step.shape.vocab_size * step.shape.hidden_size)

    def backward(gradient: Allocation) -> Gradients:
        return [(None, step.memory.allocate("gradient of embedding", weight, step.base_width))]

    return step.graph.record(embedded, [], backward) if step.is_full else embedded


# --- Checkpointing ----------------------------------------------------------------------------------------------------


def _checkpointed(step: MicroStep, hidden: SizedTensor, kind: LayerKind) -> SizedTensor:
    """Replay a layer that keeps nothing but its input and is recomputed backwards (torch/utils/checkpoint.py)."""
    graph = step.graph
    graph.is_recording = False
    output = _layer(step, hidden, kind)
    graph.is_recording = True
    output.needs_grad = hidden.needs_grad or step.is_full
    reentrant = step.options.use_reentrant

    def backward(gradient: Allocation) -> Gradients:
        outer, graph.nodes = graph.nodes, []
        again = step.view(hidden)
        early = _gradients_before_recomputing(step, kind)
        step.stops_early = not reentrant
        result = _layer(step, again, kind)
        step.stops_early = False
        leave_autocast(step)
        step.memory.release(*early)
        result.grad = step.memory.keep(gradient) if reentrant else gradient
        graph.backward()
        step.free(result, again)
        graph.nodes = outer
        return [(hidden, again.grad)] if again.grad is not None else []

    return graph.record(output, [hidden.allocation], backward, takes_gradient=not reentrant)


def _gradients_before_recomputing(step: MicroStep, kind: LayerKind) -> list[Allocation]:
    """Allocate gradients that exist before the layer is recomputed.

    The newer checkpointing recomputes when a saved tensor is first asked for. A cast or a sum at the layer's end needs
    none, so that its gradient is there already.
    """
    last = "down_proj" if step.shape.style.gated_mlp else "fc2"
    casts = step.base_width > step.product_width
    if kind.feed_forward == "experts":
        return []
    if step.options.use_reentrant or _norms_follow(step) or not (is_adapted(step, last) or casts):
        return []
    return [step.memory.allocate("gradient before recomputation", step.hidden, step.product_width)]


# --- A layer ----------------------------------------------------------------------------------------------------------


def _layer(step: MicroStep, hidden: SizedTensor, kind: LayerKind) -> SizedTensor:
    if step.shape.style.num_norms == 1:
        return _parallel_layer(step, hidden)
    middle = _sublayer(step, hidden, "attention", kind)
    output = _sublayer(step, middle, "mlp", kind)
    step.free(middle)
    return output


def _sublayer(step: MicroStep, hidden: SizedTensor, name: str, kind: LayerKind) -> SizedTensor:
    """Replay attention or MLP with its norms and its residual sum."""
    before, after = not step.shape.style.norms_follow, _norms_follow(step)
    inner = norm(step, f"{name} norm", hidden) if before else step.hold(hidden)
    output = _mix(step, inner, kind) if name == "attention" else _feed_forward(step, inner, kind, is_last=not after)
    step.free(inner)
    if after:
        plain, output = output, norm(step, f"{name} norm after", output)
        step.free(plain)
    ends_layer = name == "mlp" and not after and kind.feed_forward == "mlp"
    total = step.add("layer input", hidden, output, step.unless_stopped(step.hidden, ends_layer))
    step.free(output)
    return total


def _mix(step: MicroStep, inner: SizedTensor, kind: LayerKind) -> SizedTensor:
    if kind.mixer == "delta" and step.shape.delta is not None:
        return delta_net(step, inner, step.shape.delta)
    if kind.mixer == "latent" and step.shape.latent is not None:
        return latent_attention(step, inner, step.shape.latent)
    if kind.mixer == "mamba":
        raise ModelError(
            f"{step.shape.model_type}: activation memory of Mamba layers is not modelled. Fix: plan with --exact, "
            "which asks the model's own class (it imports torch)."
        )
    return attention(step, inner)


def _feed_forward(step: MicroStep, inner: SizedTensor, kind: LayerKind, is_last: bool) -> SizedTensor:
    if kind.feed_forward == "experts" and step.shape.experts is not None:
        return experts(step, inner, step.shape.experts, kind.adapted)
    return mlp(step, inner, is_last)


def _norms_follow(step: MicroStep) -> bool:
    """Tell whether norms stand behind attention and MLP: there only (OLMo 2), or there too (Gemma 2 and 3)."""
    return step.shape.style.norms_follow or step.shape.style.num_norms == 4


def _parallel_layer(step: MicroStep, hidden: SizedTensor) -> SizedTensor:
    """Replay attention and MLP side by side on one norm's output (phi, gptj)."""
    inner = norm(step, "attention norm", hidden)
    of_attention, of_mlp = attention(step, inner), mlp(step, inner, is_last=True)
    both = step.add("attention and mlp", of_attention, of_mlp, step.unless_stopped(step.hidden, True))
    total = step.add("layer input", both, hidden, step.unless_stopped(step.hidden, True))
    step.free(inner, of_attention, of_mlp, both)
    return total
