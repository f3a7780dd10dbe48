"""`rm-scale merge`: merge an adapter into its backbone; another name of `rm-scale export`."""

from __future__ import annotations

from rm_scale.commands.export import DESCRIPTION, add_arguments, run

HELP = "fold an adapter into its backbone: another name of export"
EXAMPLE = "rm-scale merge --model outputs/lora --output outputs/merged"

__all__ = ["DESCRIPTION", "EXAMPLE", "HELP", "add_arguments", "run"]
