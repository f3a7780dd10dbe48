"""`rm-scale tiers`: the model sizes, and the smallest cluster that trains each."""

from __future__ import annotations

import argparse
import math

from rm_scale.commands.plan import METHODS, MOST_TOKENS
from rm_scale.errors import UserError
from rm_scale.known_models import KNOWN_MODELS
from rm_scale.planning.advise import Request, recommend
from rm_scale.planning.group_lengths import full_rows
from rm_scale.planning.hardware import Device, find_device
from rm_scale.planning.parameters import count_parameters
from rm_scale.planning.scenario import Method
from rm_scale.planning.shape import ModelShape, shape_from_config
from rm_scale.texts import one_line, range_rule
from rm_scale.tiers import MODEL_TIERS

HELP = "the sizes 1b to 13b, and the smallest cluster that trains each"
DESCRIPTION = "List the model sizes, and the smallest cluster of one kind of device that trains each by each method."
EXAMPLE = "rm-scale tiers --gpu a100-80g"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale tiers`."""
    parser.add_argument("--gpu", default="h100-80g", help="kind of device")
    parser.add_argument("--hardware", metavar="FILE.yaml", help="devices of your own")
    parser.add_argument("--seq", type=int, default=4096, help="longest sequence")


def run(options: argparse.Namespace) -> int:
    """List the tiers, with the smallest cluster of a kind that trains each by each method.

    Raises:
        UserError: there is no such device, or no model reads so long a sequence.
    """
    rule = range_rule("--seq", options.seq, 1, MOST_TOKENS)
    if rule is not None:
        raise UserError(f"seq={one_line(options.seq, 40)}: {rule}")
    device = find_device(options.gpu, options.hardware)
    print(
        f"{'tier':<6}{'model':<28}{'parameters':>12}   smallest {device.title} cluster that fits, by method (predicted)"
    )
    for tier in MODEL_TIERS:
        _print_row(tier.name, tier.model, shape_from_config(tier.config), device, options.seq)
        _print_row("", tier.current, shape_from_config(KNOWN_MODELS[tier.current]), device, options.seq)
    print(
        f"rows of sequences up to {options.seq:,} tokens, nothing offloaded; for the rest rm-scale plan --tier NAME "
        "(the first model of each) or --model NAME"
    )
    return 0


def _print_row(tier: str, model: str, shape: ModelShape, device: Device, seq: int) -> None:
    cells = [f"{method} {_smallest(shape, model, method, device, seq)}" for method in METHODS]
    print(f"{tier:<6}{model:<28}{count_parameters(shape) / 1e9:>11.2f}B   {', '.join(cells)}", flush=True)


def _smallest(shape: ModelShape, name: str, method: Method, device: Device, seq: int) -> str:
    """Return the fewest devices, doubling from one, that fit without offload, as "xN"; "none" when none do."""
    count = 1
    while count <= 64 * device.devices_per_node:
        request = Request(
            name=name,
            shape=shape,
            method=method,
            device=device,
            num_devices=count,
            num_nodes=math.ceil(count / device.devices_per_node),
            max_length=seq,
            lengths=full_rows(seq),
            global_batch_size=max(128, count),
            offload="none",
        )
        if recommend(request).estimate.fits:
            return f"x{count}"
        count *= 2
    return "none"
