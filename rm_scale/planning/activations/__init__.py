"""Activation memory of a micro-step, predicted by replaying forward and backward pass with sizes instead of tensors.

- `predict.py` answers: `activation_memory` returns the peak and what was alive at it.
- `settings.py` holds what the answer depends on beside the model: the row's tokens and how the step is run.
- `simulated_autograd.py` plays torch's autograd: it counts the bytes that tensors, saved tensors and gradients keep.
- `micro_step.py` holds the state of one replay and the elementary operations: add, cast, slice, multiply.
- `linear.py`, `norms.py`, `attention.py`, `latent_attention.py`, `delta_net.py`, `mlp.py`, `experts.py`, `heads.py` and
  `decoder.py` are the layers, made of those.

The layers follow transformers 5.23 (`modeling_llama.py` and its kin) and PEFT 0.21 (`lora/layer.py`) operation by
operation. Nothing is fitted: benchmarks/activations.py compares the result with what torch allocates for the real
classes at their real sizes. No torch is imported.
"""
