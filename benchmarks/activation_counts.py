"""Activation memory and operations of a micro-step as torch counts them, on fake tensors and on real ones."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch

from benchmarks.activation_cases import Case
from rm_scale.modeling.fake_step import Measured, hand_over, materialise, run_micro_step, set_up, weight_type


def build_model(case: Case) -> torch.nn.Module:
    """Return the model on the meta device, as `rm_scale.modeling.loading` would set it up."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rm_scale.modeling.head import install_scalar_head
    from rm_scale.modeling.packed_model import enable_packed_rows

    options, values = case.options, case.config
    config = AutoConfig.for_model(values.pop("model_type"), num_labels=1, pad_token_id=0, use_cache=False, **values)
    kind = AutoModelForCausalLM if options.head.startswith("lm") else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = kind.from_config(config, dtype=weight_type(options))
    if kind is AutoModelForSequenceClassification:
        install_scalar_head(model)
    if options.head == "score":
        enable_packed_rows(model, options.attention)
    return set_up(model, options)


def measure(case: Case) -> Measured:
    """Run the micro-step with fake tensors."""
    return run_micro_step(build_model(case), lambda: _batch(case), lambda model, batch: _loss(case, model, batch))


def measure_allocator(case: Case) -> int:
    """Run the micro-step with real CPU tensors; return the most bytes that the allocator had given out at once."""
    from torch.profiler import ProfilerActivity, profile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(case)
        materialise(model)
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.fill_(0.01)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(hand_over)
        batch = _batch(case)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _loss(case, model, batch).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes: list[int] = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def _batch(case: Case) -> dict[str, Any]:
    from rm_scale.batching.packed.layout import pack_row

    prompt = [5] * case.prompt
    group = [[*prompt, *[token] * case.response] for token in (7, 9)]
    if case.options.head != "score":
        ids = torch.tensor(group)
        return {"input_ids": ids, **({"labels": ids} if case.options.head == "lm" else {})}
    row = pack_row([group], case.shares, 0)
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "score_index": row.score_index,
        "packed_layout": row.layout,
    }


def _loss(case: Case, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.options.precision == "amp"):
        output = model(**batch, use_cache=False)
    if case.options.head == "lm":
        loss: torch.Tensor = output.loss
        return loss
    rewards = output.logits[:, 0].float()
    return -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).sum()
