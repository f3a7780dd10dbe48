"""`rm-scale COMMAND`. Heavy imports happen inside a command, never for `--help`."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rm_scale.commands import (
    assets,
    bench,
    data,
    doctor,
    export,
    launch,
    merge,
    plan,
    rank,
    report,
    score,
    serve,
    slurm,
    tiers,
    train,
)
from rm_scale.commands import eval as evaluate
from rm_scale.commands.help_formatter import HelpFormatter
from rm_scale.errors import UserError
from rm_scale.files import user_path
from rm_scale.guard import run_guarded
from rm_scale.logs import setup_logging
from rm_scale.texts import has_surrogates
from rm_scale.version import __version__

COMMANDS: dict[str, dict[str, ModuleType]] = {
    "before a run": {"plan": plan, "tiers": tiers, "data": data, "doctor": doctor, "bench": bench, "assets": assets},
    "train": {"train": train, "launch": launch, "slurm": slurm},
    "use a model": {"score": score, "rank": rank, "eval": evaluate, "serve": serve, "export": export, "merge": merge},
    "look back": {"report": report},
}
"""Every command's module by its name, grouped as `rm-scale --help` shows them.

A module has `HELP`, `DESCRIPTION`, `EXAMPLE`, `add_arguments(parser)` and `run(options)`; with `TAKES_SETTINGS` it also
takes settings of a run, as `run(options, settings)`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the command line; default `sys.argv[1:]`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    wrong = next((word for word in argv if has_surrogates(word)), None)
    if wrong is not None:
        return run_guarded(lambda: _refuse_word(wrong))
    if argv[:1] == ["train"]:  # its options, `--help` among them, are the settings of a run
        return train.run(argparse.Namespace(), argv[1:])
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    settings = [rest] if takes_settings(options) else []
    if rest and not settings:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    setup_logging(debug=options.debug)
    return run_guarded(
        lambda: options.run(options, *settings), debug=options.debug, command=f"rm-scale {options.command}"
    )


def _refuse_word(word: str) -> int:
    raise UserError(f"{word!a}: is not valid UTF-8. Fix: write it in UTF-8, and rename files whose names are not.")


def takes_settings(options: argparse.Namespace) -> bool:
    """Return whether the chosen command takes settings of a run beside its own options."""
    return len(inspect.signature(options.run).parameters) > 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; `options.run` is the chosen command's function."""
    parser = argparse.ArgumentParser(
        prog="rm-scale",
        description="Train reward models from a laptop to many GPU nodes.",
        epilog=_command_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rm-scale {__version__}")
    parser.add_argument("--debug", action="store_true", help="full tracebacks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in COMMANDS.values():
        for name, module in group.items():
            _add_command(commands, name, module)
    return parser


def _add_command(commands: Any, name: str, module: ModuleType) -> None:
    command = commands.add_parser(
        name,
        description=module.DESCRIPTION,
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=HelpFormatter,
        allow_abbrev=not getattr(module, "TAKES_SETTINGS", False),
    )
    command.set_defaults(run=getattr(module, "run", None))
    module.add_arguments(command)
    for action in command._actions:
        if isinstance(action.metavar, str) and _NAMES_A_PATH.search(action.metavar):
            action.type = _at_home if action.type is None else lambda text: Path(_at_home(text))


_NAMES_A_PATH = re.compile(r"DIR|FILE|RECORDS|\.json", re.IGNORECASE)


def _at_home(text: str) -> str:
    """Return a path with "~" replaced by the user's home, which the shell leaves in `--output=~/x`.

    A path of an unknown user stays as it is: where it is used, it is refused beside whatever else is wrong.
    """
    try:
        return str(user_path(text)) if text.startswith("~") else text
    except UserError:
        return text


def _command_list() -> str:
    lines = []
    for title, group in COMMANDS.items():
        lines += [f"{title}:", *(f"  {name:<8}{module.HELP}" for name, module in group.items()), ""]
    return "\n".join([*lines, "rm-scale COMMAND --help lists a command's options."])


if __name__ == "__main__":
    sys.exit(main())
