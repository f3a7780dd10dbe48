"""`rm-scale export`: merge, convert, verify, and publish when asked."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rm_scale.errors import ConfigError
from rm_scale.logs import get_logger
from rm_scale.texts import printable

if TYPE_CHECKING:
    from rm_scale.inference.export.engine_facts import EngineReady

logger = get_logger(__name__)

HELP = "merge, convert, verify, and publish when asked"
EXAMPLE = "rm-scale export --model outputs/lora --output outputs/exported"
DESCRIPTION = (
    "Turn a run's output directory or checkpoint (model, LoRA or QLoRA adapter, ZeRO states) into one folder that "
    "transformers and other engines load (--engine vllm, sglang or tei), and prove that it scores the same. See "
    "docs/export.md."
)
ENGINES = ("vllm", "sglang", "tei")
_UNUSABLE = "rm-scale export: the options can't be used"
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale export`."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, metavar="DIR", help="a run's output directory, or a checkpoint")
    model.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    foreign = "take another project's model, without scoring_contract.json"
    model.add_argument("--no_contract", action="store_true", help=foreign)
    export = parser.add_argument_group("export")
    export.add_argument(
        "--output",
        metavar="DIR",
        help="the export; left out: --onnx, --engine or --push_to_hub for an export that exists",
    )
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export, once all is verified")
    export.add_argument("--dtype", choices=DTYPES, help="of the backbone in the file (default: as it was trained)")
    export.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a weights file (default 5GB)")
    export.add_argument(
        "--engine",
        action="append",
        choices=ENGINES,
        default=[],
        help="write what this engine needs, check it by the engine's rules, print its command; can be repeated",
    )
    export.add_argument("--onnx", action="store_true", help="also model.onnx, if it scores the same")
    hub = parser.add_argument_group("publishing")
    hub.add_argument("--push_to_hub", metavar="USER/NAME", help="show what would be published; with --yes, do it")
    hub.add_argument("--yes", action="store_true", help="with --push_to_hub: really upload (private repository)")


def run(options: argparse.Namespace) -> int:
    """Export; return 0.

    Raises:
        UserError: an option makes no sense, or what the parts of the work raise.
    """
    _check(options)
    from rm_scale.distributed import World, prepare_environment

    prepare_environment(World())
    if options.engine:
        _refuse_engines(options)
    ready: list[EngineReady] = []
    if options.output is not None:
        folder = _export(options, lambda partial: ready.extend(_prepare(partial, options)))
    else:
        folder = _verify(options)
        ready = _prepare(folder, options)
    if options.onnx and "tei" not in options.engine:
        from rm_scale.inference.export.onnx_export import ONNX_FILE, write_onnx

        difference = write_onnx(folder, options.trust_remote_code)
        print(f"{folder / ONNX_FILE}: the same scores in ONNX Runtime (largest difference {difference:.2g})")
    for one in ready:
        _tell(one, folder)
    if options.push_to_hub is not None:
        _publish(folder, options.push_to_hub, options.yes)
    return 0


def _prepare(folder: Path, options: argparse.Namespace) -> list[EngineReady]:
    if not options.engine:
        return []
    from rm_scale.inference.export.for_engines import prepare_for_engines

    return prepare_for_engines(folder, options.engine, options.trust_remote_code)


def _tell(ready: EngineReady, folder: Path) -> None:
    """Print what was checked, how the server is started and how it is asked for the raw score."""
    rows = [f"{ready.engine}: checked by the rules of {ready.version}", *(f"  {line}" for line in ready.checked)]
    rows += [f"  note: {note}" for note in ready.notes]
    rows += ["  start:", f"    {ready.command(folder)}", f"  raw score, as {ready.answer}:", f"    {ready.request()}"]
    print(printable("\n".join(rows)))


def _export(options: argparse.Namespace, finish: Callable[[Path], None]) -> Path:
    from rm_scale.inference.export.export_model import export
    from rm_scale.inference.export.zero_states import consolidated

    with consolidated(options.model, options.output) as source:
        report = export(
            source,
            options.output,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            trust_remote_code=options.trust_remote_code,
            allow_missing_contract=options.no_contract,
            finish=finish,
        )
    print(
        f"{report.folder}: {report.num_bytes / 1e6:,.1f} MB; {report.num_probes} texts score the same in plain "
        f"transformers (largest difference {report.largest_difference:.2g}, allowed {report.tolerance:.2g})"
    )
    if report.drift > report.tolerance:
        print(f"scores moved by up to {report.drift:.3g} from those in training: {report.moved_by}")
    if report.constant:
        print(f"scores are lower by {report.constant:.6g} than in {options.model}, all alike: its head's constant")
    return report.folder


def _verify(options: argparse.Namespace) -> Path:
    from rm_scale.inference.export.export_model import verify_export

    folder = Path(options.model)
    num_golden = verify_export(folder, options.trust_remote_code)
    print(f"{folder}: {num_golden} golden scores found again in plain transformers")
    return folder


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.yes and options.push_to_hub is None:
        problems.append("--yes: there is nothing to agree to. Fix: --push_to_hub USER/NAME, or leave it out.")
    if not re.fullmatch(r"\d+(MB|GB)", options.max_shard_size):
        problems.append(f"max_shard_size={options.max_shard_size}: is no size. Fix: 5GB, or 500MB.")
    if options.push_to_hub is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.push_to_hub):
        problems.append(f"push_to_hub={options.push_to_hub}: is no name of a repository. Fix: USER/NAME.")
    if options.output is None and not options.onnx and not options.engine and options.push_to_hub is None:
        problems.append("--output is missing. Fix: --output DIR, a folder for the export.")
    if options.output is None and (options.dtype is not None or options.overwrite):
        problems.append("--dtype and --overwrite are about a new export. Fix: --output DIR, or leave them out.")
    if options.output is not None and Path(options.model).exists():
        # Looked at once more where the base model is known; here nothing has been read yet, ZeRO's shards included.
        from rm_scale.inference.export.earlier_export import target_problem

        problem = target_problem(Path(options.output), options.overwrite, [("the model itself", options.model)])
        problems += [problem] if problem is not None else []
    if problems:
        raise ConfigError(problems, _UNUSABLE)


def _refuse_engines(options: argparse.Namespace) -> None:
    """Refuse engines that have no class for the model, before any weights are read."""
    from rm_scale.inference.export.for_engines import class_problems

    problems = class_problems(Path(options.model), options.engine)
    if problems:
        raise ConfigError(problems, _UNUSABLE)


def _publish(folder: Path, repo: str, really: bool) -> None:
    from rm_scale.inference.export.hub_upload import plan_upload, upload

    planned = plan_upload(folder, repo)
    print(printable("\n".join(["would be published" if not really else "publishing", *planned.lines()])))
    if really:
        print(f"published: {upload(folder, planned)}")
    else:
        again = shlex.join(["rm-scale", "export", "--model", str(folder), "--push_to_hub", repo, "--yes"])
        print(f"nothing was sent. To send it: {again}")
