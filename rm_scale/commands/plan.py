"""`rm-scale plan`: will a run fit, how fast is it, what does it cost. Arithmetic alone, without torch."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from typing import Any

from rm_scale.errors import ConfigError, collect_problems
from rm_scale.modeling.model_shape import shape_of
from rm_scale.planning import plan_text
from rm_scale.planning.advise import Request, recommend
from rm_scale.planning.changes import changes_that_fit
from rm_scale.planning.expert_settings import adapted_parameters, expert_names, targets_problem
from rm_scale.planning.group_lengths import LengthMix, full_rows
from rm_scale.planning.hardware import GBIT, Device, find_device
from rm_scale.planning.parameters import backbone_tensors
from rm_scale.planning.plan_checks import expert_names_problem, length_problem
from rm_scale.planning.plan_json import to_dict
from rm_scale.planning.scenario import Method
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config
from rm_scale.texts import one_line, range_rule
from rm_scale.tiers import model_tier

HELP = "will it fit, how fast, for how much: before anything is queued"
DESCRIPTION = "Predict memory, speed and cost of a run from the model's config.json and a machine's figures."
EXAMPLE = "rm-scale plan --tier 13b --method lora --gpus 8 --gpu h100-80g"
# The largest value that makes sense, those of config.py; the smallest is 1.
MOST_TOKENS = 1_000_000_000
_MOST = {
    "gpus": 100_000,
    "nodes": 100_000,
    "seq": MOST_TOKENS,
    "global_batch_size": 1_000_000_000,
    "max_tokens": MOST_TOKENS,
    "micro_batch": 1_000_000,
    "lora_r": 65_536,
    "pairs": 1_000_000_000_000,
}
SEQUENCE, LORA_RANK = 4096, 16
"""Tokens of the longest sequence, and rank of adapters, where none are given."""
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale plan`."""
    model = parser.add_argument_group("model")
    model.add_argument("--tier", help="1b, 3b, 7b or 13b (`rm-scale tiers`)")
    model.add_argument("--model", metavar="DIR|NAME", help="a folder, a config.json, or a hub name")
    model.add_argument("--exact", action="store_true", help="ask the model's own class (imports torch)")
    model.add_argument("--trust_remote_code", action="store_true", help="with --exact: run code that comes with it")
    model.add_argument("--method", choices=METHODS, default="full", help="default: full")
    model.add_argument("--lora_r", type=int, help=f"rank of the adapters; default: {LORA_RANK}")
    model.add_argument("--lora_target_modules", nargs="+", metavar="NAME", help="default: all linear layers")
    model.add_argument("--lora_target_parameters", nargs="+", metavar="NAME", help="of experts; default: none")
    model.add_argument("--use_bnb_nested_quant", action="store_true", help="double quantisation of 4-bit weights")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, default=8, help="devices in all; default: 8")
    machine.add_argument(
        "--gpu", default="h100-80g", help="default: h100-80g; a100-40g, a100-80g, h200, b200, l40s, ..."
    )
    machine.add_argument("--nodes", type=int, help="default: as many as the devices need")
    machine.add_argument(
        "--node_bandwidth_gbit", type=float, help="out of one node, all its cards; default: the kind's"
    )
    machine.add_argument("--hardware", metavar="FILE.yaml", help="devices of your own; see docs/planning.md")
    run = parser.add_argument_group("run")
    run.add_argument(
        *("--seq", "--max_length"),
        type=int,
        help=f"longest sequence; default: {SEQUENCE:,}, or as many as the model has positions",
    )
    run.add_argument("--data", metavar="FILE", help="preference file whose real lengths are used; default: full rows")
    run.add_argument(
        *("--packing",),
        choices=["none", "padding_free", "prefix_shared"],
        default="prefix_shared",
        help="default: prefix_shared",
    )
    run.add_argument("--global_batch_size", type=int, default=128, help="groups per optimizer step; default: 128")
    run.add_argument("--zero", type=int, choices=[0, 1, 2, 3], help="default: chosen; 0: without DeepSpeed")
    run.add_argument("--offload", choices=["none", "optimizer", "all", "nvme"], help="default: chosen")
    run.add_argument("--checkpointing", choices=["on", "off"], help="default: chosen")
    run.add_argument("--max_tokens", type=int, help="tokens of a packed row; default: chosen")
    run.add_argument("--micro_batch", type=int, help="groups of a padded micro-batch; default: chosen")
    run.add_argument("--hpz", action="store_true", help="a second partition of the weights within each node")
    run.add_argument("--pairs", type=float, help="pairs to train on; default: those of --data")
    run.add_argument("--gpu_hour_price", type=float, help="for the cost of a pass over the data")
    out = parser.add_argument_group("output")
    out.add_argument("--compare", action="store_true", help="all methods side by side")
    out.add_argument("--json", action="store_true", help="for scripts")
    out.add_argument("--explain", action="store_true", help="every formula with its numbers and source")
    out.add_argument("--cases", metavar="FILE.csv", help="predict published measurements; see docs/planning.md")
    out.add_argument("--output", metavar="FILE.csv", help="where --cases writes; default standard output")
    out.add_argument("--overwrite", action="store_true", help="replace a file there that holds no earlier predictions")


def run(options: argparse.Namespace) -> int:
    """Print the plan; return 0 when the run fits and 1 when it doesn't."""
    if options.cases:
        from rm_scale.planning.published.predict import predict_cases

        return predict_cases(options.cases, options.output, options.overwrite)
    request = read_request(options)
    num_pairs = options.pairs or request.lengths.num_groups
    if options.compare:
        return _compare(request, options, num_pairs)
    choice = recommend(request)
    fits = choice.estimate.fits
    changes = [] if fits else changes_that_fit(request)
    if options.json:
        print(json.dumps(to_dict(request, choice, changes), indent=2))
        return 0 if fits else 1
    print(plan_text.summary(request, choice, options.gpu_hour_price, num_pairs))
    if not fits:
        print("\n" + plan_text.refusal(request, choice, changes))
    if options.explain:
        print("\n" + plan_text.explanation(choice.estimate))
    return 0 if fits else 1


def _compare(request: Request, options: argparse.Namespace, num_pairs: float | None) -> int:
    rows = [(changed, recommend(changed)) for changed in (replace(request, method=name) for name in METHODS)]
    if options.json:
        print(json.dumps({r.method: to_dict(r, choice, []) for r, choice in rows}, indent=2))
    else:
        print(plan_text.comparison(rows, num_pairs))
    return 0 if any(choice.estimate.fits for _, choice in rows) else 1


def read_request(options: argparse.Namespace) -> Request:
    """Check the options together and read the model's shape.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    problems = _problems(options)
    device = collect_problems(problems, lambda: find_device(options.gpu, options.hardware))
    shape, name = collect_problems(problems, lambda: read_shape(options)) or (None, "")
    if problems:
        raise ConfigError(problems, heading="the plan can't be made")
    assert device is not None and shape is not None
    seq = options.seq or min(SEQUENCE, shape.max_positions or SEQUENCE)
    problems = [*_length_problems(shape, seq, options.max_tokens), *_adapter_problems(shape, options)]
    if problems:
        raise ConfigError(problems, heading="the plan can't be made")
    lowered = f"seq not given: {seq:,}, all positions that the model has"
    device = _with_network(device, options.node_bandwidth_gbit)
    nodes = options.nodes or math.ceil(options.gpus / device.devices_per_node)
    return Request(
        name=name,
        shape=shape,
        method=options.method,
        device=device,
        num_devices=options.gpus,
        num_nodes=nodes,
        max_length=seq,
        lengths=_lengths(options, seq),
        packing=options.packing,
        global_batch_size=options.global_batch_size,
        zero_stage=options.zero,
        offload=options.offload,
        checkpointing=None if options.checkpointing is None else options.checkpointing == "on",
        max_tokens=options.max_tokens,
        micro_batch=options.micro_batch,
        hpz=options.hpz,
        lora_rank=options.lora_r or LORA_RANK,
        lora_targets=tuple(options.lora_target_modules) if options.lora_target_modules else None,
        lora_parameters=adapted_parameters(options.lora_target_parameters, shape),
        nested_quant=options.use_bnb_nested_quant,
        notes=() if options.seq or seq == SEQUENCE else (lowered,),
    )


def read_shape(options: argparse.Namespace) -> tuple[ModelShape, str]:
    """Return the model's shape and name, by tier or by its config.json; with --exact by its class.

    Raises:
        ConfigError: neither or both are given, or there is no such tier.
        ModelError: the config can't be read, or the model needs --exact.
    """
    tier, model = options.tier, options.model
    if (tier is None) == (model is None):
        raise ConfigError(["tier and model: give one of them. Fix: --tier 7b, or --model FOLDER."])
    if tier is not None:
        chosen = model_tier(tier)
        return _shape(chosen.config, chosen.model, options), f"{chosen.name} ({chosen.model})"
    assert model is not None
    name = model.removesuffix("/config.json") if model.endswith("config.json") else model
    return _shape(read_model_config(name, or_known=True), name, options), name


def _shape(config: dict[str, Any], name: str, options: argparse.Namespace) -> ModelShape:
    if options.exact:
        return shape_of(config, name, trust_remote_code=options.trust_remote_code, exact=True)
    return shape_from_config(config)


def _problems(options: argparse.Namespace) -> list[str]:
    found = []
    for name, most in _MOST.items():
        value = getattr(options, name)
        rule = range_rule(f"--{name}", value, 1, most)
        found += [f"{name}={one_line(value, 40)}: {rule}"] if rule is not None else []
    for name in ("node_bandwidth_gbit", "gpu_hour_price"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            found.append(f"{name}={value:g}: must be a positive number below a billion. Fix: correct it.")
    if found:
        return found
    nodes = options.nodes or 1
    if nodes > options.gpus:
        found.append(
            f"nodes={nodes} with gpus={options.gpus}: a node has at least one. Fix: --gpus counts all devices."
        )
    elif options.gpus % nodes:
        found.append(
            f"gpus={options.gpus} with nodes={nodes}: nodes must have equally many. Fix: "
            f"--gpus {nodes * round(options.gpus / nodes)}."
        )
    if options.global_batch_size < options.gpus:
        found.append(
            f"global_batch_size={options.global_batch_size} with gpus={options.gpus}: every rank needs a group in each "
            f"step. Fix: --global_batch_size {options.gpus} or more, or fewer devices."
        )
    if options.hpz and nodes == 1 and options.nodes is not None:
        found.append("hpz with nodes=1: its second partition only helps across nodes. Fix: leave --hpz out.")
    if options.hpz and options.zero not in (None, 3):
        found.append(f"hpz with zero={options.zero}: it belongs to ZeRO-3. Fix: --zero 3.")
    if options.zero == 0 and options.offload not in (None, "none"):
        found.append(f"offload={options.offload} with zero=0: DeepSpeed does the offloading. Fix: --zero 3.")
    if options.offload in {"all", "nvme"} and options.zero not in (None, 3):
        found.append(
            f"offload={options.offload} with zero={options.zero}: weights leave the device under ZeRO-3 only. "
            "Fix: --zero 3."
        )
    if options.trust_remote_code and not options.exact:
        found.append("trust_remote_code=True without exact: no code is run. Fix: add --exact, or leave it out.")
    if options.max_tokens is not None and options.packing == "none":
        found.append("max_tokens with packing=none: padded rows are sized by --micro_batch. Fix: leave one out.")
    return found


def _length_problems(shape: ModelShape, seq: int, max_tokens: int | None) -> list[str]:
    too_long = length_problem("seq", seq, shape)
    if too_long is not None:
        return [too_long]
    if max_tokens is None or max_tokens >= seq:
        return []
    return [f"max_tokens={max_tokens} with seq={seq}: a row must hold a sequence. Fix: --max_tokens {2 * seq}."]


def _adapter_problems(shape: ModelShape, options: argparse.Namespace) -> list[str]:
    """Say which names of adapted layers the model doesn't have: their adapters would count nothing."""
    named = [name for name in (*_OF_ADAPTERS, "use_bnb_nested_quant") if getattr(options, name)]
    wrong = [] if options.compare else [_not_of_method(name, options) for name in named]
    if any(wrong):
        return [problem for problem in wrong if problem is not None]
    targets, kind = options.lora_target_modules or [], shape.model_type
    found = [
        expert_names_problem(targets, kind),
        targets_problem(options.lora_target_parameters or [], expert_names(shape), f"a model of type {kind}"),
    ]
    known = sorted({tensor.module for tensor in backbone_tensors(shape) if tensor.role == "linear"})
    unknown = [target for target in targets if target.rpartition(".")[2] not in known]
    if unknown and found[0] is None:
        fix = f"one of {', '.join(known)}"
        found.append(f"lora_target_modules={unknown}: this model has no such layer. Fix: {fix}.")
    return [problem for problem in found if problem is not None]


_OF_ADAPTERS = ("lora_r", "lora_target_modules", "lora_target_parameters")


def _not_of_method(name: str, options: argparse.Namespace) -> str | None:
    """Say why an option can't stand beside the method, of which it would change nothing."""
    given = f"{name}={getattr(options, name)} with method={options.method}"
    if name in _OF_ADAPTERS:
        return f"{given}: adapters are LoRA's. Fix: --method lora." if options.method == "full" else None
    return f"{given}: only QLoRA has 4-bit weights. Fix: --method qlora." if options.method != "qlora" else None


def _with_network(device: Device, gbit: float | None) -> Device:
    return device if gbit is None else replace(device, node_bandwidth=gbit * GBIT)


def _lengths(options: argparse.Namespace, seq: int) -> LengthMix:
    if options.data is None:
        return full_rows(seq)
    from rm_scale.data.measure_lengths import measure_lengths

    measured = measure_lengths([options.data], options.model)
    kept = measured.cut(seq)
    if not kept.groups:
        raise ConfigError([f"seq={seq}: every group of {options.data} is longer. Fix: a larger --seq."])
    return kept
