"""Turn what a run saved into one plain folder that other engines load, and prove that it scores the same.

An export is written aside, loaded again by transformers alone in a process of its own, compared, and only then given
its name. A folder that exists under that name is therefore a verified one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rm_scale.data.encoding import TextEncoder
from rm_scale.data.preference_group import Text
from rm_scale.errors import CheckpointError, DiskError, ModelError
from rm_scale.inference.export.earlier_export import full_disk_named, take_place, target_problem
from rm_scale.inference.export.export_card import portable_name, write_export_card
from rm_scale.inference.export.foreign_source import (
    contract_of_source,
    fit_to_plain_classifier,
    tokenizer_of_source,
)
from rm_scale.inference.model_folder import local_folder, require_reward_model
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.logs import get_logger
from rm_scale.modeling.golden_scores import SCORE_TOLERANCE, allowed_drift, check_golden
from rm_scale.modeling.head import ScalarHead, active_head
from rm_scale.modeling.loading import describe_as_reward_model, load_reward_model
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.token_scores import score_sequences
from rm_scale.output_paths import list_files
from rm_scale.texts import one_line

logger = get_logger(__name__)

VERIFIER = "rm_scale.inference.export.score_in_fresh_process"
_VERIFY_SECONDS = 3600
_PROBES: tuple[tuple[Text, Text], ...] = (
    ("What is 2 + 2?", " 4"),
    ("Translate 'good morning' to German.", " Guten Morgen! Schöne Grüße 🌞"),
    ("", "A text without a prompt."),
    ("Say nothing.", ""),
)
_CHAT_PROBES: tuple[tuple[Text, Text], ...] = (
    ([{"role": "user", "content": "What is 2 + 2?"}], [{"role": "assistant", "content": "4"}]),
    (
        [
            {"role": "user", "content": "Hi!"},
            {"role": "assistant", "content": "Hello, how can I help?"},
            {"role": "user", "content": "Count to three."},
        ],
        [{"role": "assistant", "content": "1, 2, 3"}],
    ),
)


@dataclass(frozen=True)
class Probe:
    """A token sequence that the export must score like its source; where there is one, the text a pipeline takes.

    Attributes:
        input_ids: token ids.
        score: by the source, unquantised, backbone in fp32.
        text: what `pipeline` turns into these ids, or `None`.
    """

    input_ids: list[int]
    score: float
    text: str | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export came to.

    Attributes:
        folder: where it is.
        num_probes: sequences that were compared.
        largest_difference: between the source's scores and those of plain transformers.
        tolerance: what was allowed.
        drift: between the scores in training and the export's own.
        num_bytes: of its files.
        constant: by which all its scores are lower than the source's: the constant of another project's head.
        moved_by: why the scores are not quite those of training.
    """

    folder: Path
    num_probes: int
    largest_difference: float
    tolerance: float
    drift: float
    num_bytes: int
    constant: float = 0.0
    moved_by: str = ""


def export(
    folder: str | Path,
    target: str | Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_missing_contract: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> ExportReport:
    """Write a model, or an adapter merged into its base, as a plain sequence classifier, and verify it.

    Args:
        folder: a run's output directory, or one of its checkpoints.
        target: where the export goes.
        dtype: of the backbone in the file: float32, bfloat16 or float16; default as the model was trained.
        max_shard_size: of a weights file.
        overwrite: replace an earlier export that is there, once the new one has been verified.
        trust_remote_code: run Python code that comes with the model.
        allow_missing_contract: take a reward model of another project, by its tokenizer and config alone.
        finish: called with the verified export before it gets its name; what it raises keeps the name from it.

    Raises:
        ModelError: the source is no reward model, or has no contract and that was not allowed; or the target is in the
            way, from the beginning or by the end.
        DiskError: there is no space for it.
        CheckpointError: plain transformers does not score the export as the source scores.
    """
    source, target = local_folder(folder), Path(target)
    require_reward_model(source)
    contract = contract_of_source(source, trust_remote_code, allow_missing_contract)
    kept = (("the model itself", source), ("its base model", contract.base_model.name))
    problem = target_problem(target, overwrite, kept)
    if problem is not None:
        raise ModelError(problem)
    dtype = dtype or contract.dtype
    _require_space(source, contract, target, dtype)
    partial = target.parent / f".{target.name}.exporting-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(target):
            report = _write_and_verify(source, partial, contract, dtype, max_shard_size, trust_remote_code)
            if finish is not None:
                finish(partial)
        take_place(partial, target, overwrite, kept)
    except CheckpointError as error:
        raise CheckpointError(f"{error} What was written has been removed.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(report, folder=target, num_bytes=folder_bytes(target))


def _require_space(source: Path, contract: ScoringContract, target: Path, dtype: str) -> None:
    """Raise `DiskError` unless there is space for the source's weights in the new type."""
    files = list(source.glob("*.safetensors"))
    base = Path(contract.base_model.name)
    if (source / "adapter_config.json").is_file() and base.is_dir():
        files += list(base.glob("*.safetensors"))
    width = {"float32": 4, "bfloat16": 2, "float16": 2}
    needed = sum(file.stat().st_size for file in files) * width[dtype] / width[contract.dtype]
    free = shutil.disk_usage(target.resolve().parent).free
    if needed > free:
        raise DiskError(
            f"output={target}: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Fix: free disk space, "
            "--dtype bfloat16, or another disk."
        )


# --- Writing ---------------------------------------------------------------------------------------------------------


def _write_and_verify(
    source: Path, partial: Path, contract: ScoringContract, dtype: str, max_shard_size: str, trust_remote_code: bool
) -> ExportReport:
    tokenizer = tokenizer_of_source(source, trust_remote_code)
    model = load_reward_model(source, torch.float32, quantized=False, trust_remote_code=trust_remote_code)
    constant = fit_to_plain_classifier(model, contract, source)
    if contract.score_mean is not None:
        contract = replace(contract, score_mean=contract.score_mean - constant)
    probes = make_probes(model, tokenizer, contract)
    sequences = [probe.input_ids for probe in probes]
    plain = plain_model(model, tokenizer)
    merged = score_sequences(plain, sequences, contract.pad_token_id, batch_size=1, device="cpu")
    compare([probe.score for probe in probes], merged, partial)
    round_backbone(plain, dtype)
    # What the file will hold, its rounding included, computed in fp32: there it must agree to the last digits.
    stored = score_sequences(plain, sequences, contract.pad_token_id, batch_size=1, device="cpu")
    _as_stored(plain, dtype).save_pretrained(str(partial), max_shard_size=max_shard_size)
    _name_dtype_as_before(partial / "config.json", dtype)
    tokenizer.save_pretrained(str(partial))
    is_merged = isinstance(model, PeftModel)
    del model, plain
    found = scores_of_plain_transformers(partial, probes, ("float32", dtype), trust_remote_code)
    worst, tolerance = compare(stored, found["float32"], partial)
    _refuse_far_drift(contract, probes, found[dtype], dtype, partial)
    drift = _write_contract(contract, probes, found[dtype], partial, dtype)
    compare(stored, _scores_under_the_contract(partial, sequences, trust_remote_code), partial)
    facts = [
        ("made of", "an adapter, merged into its unquantised base" if is_merged else "a full model"),
        ("weights", f"{dtype}, head float32"),
        ("verified", f"{len(probes)} texts in plain transformers, in float32 off by {worst:.2g} at most"),
        ("moved from training by", f"{drift:.2g} at most, in {dtype}"),
    ]
    if constant:
        facts.append(("lower than before, all alike, by", f"{constant:.6g}, the constant of the head that it had"))
    write_export_card(source, partial, contract.base_model.name, facts)
    list_files(partial)
    moved_by = cause_of_drift(contract, dtype, is_merged)
    return ExportReport(partial, len(probes), worst, tolerance, drift, folder_bytes(partial), constant, moved_by)


def cause_of_drift(contract: ScoringContract, dtype: str, is_merged: bool) -> str:
    """Say why an export's scores are not quite those of training.

    Args:
        contract: the source's.
        dtype: of the exported weights.
        is_merged: an adapter was merged into them.
    """
    if contract.base_model.quantization:
        return "the adapter was trained beside 4-bit weights, and is merged into those that are not quantised"
    if dtype != contract.compute_dtype:
        return f"training computed in {contract.compute_dtype}, the export's weights are {dtype}"
    if is_merged:
        return f"the adapter is added to weights of {dtype}, which rounds their sums"
    return "it is computed text by text, in other kernels than in training"


def _scores_under_the_contract(folder: Path, sequences: Sequence[list[int]], trust_remote_code: bool) -> list[float]:
    """Return what `rm-scale score` will find, by its padded path: the packed one may differ in the last digits."""
    scorer = RewardScorer.from_pretrained(
        folder,
        device="cpu",
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
        packed=False,
        check_scores=False,  # whoever asks compares more texts than that
    )
    return scorer.score_tokens(sequences, batch_size=1)


def _refuse_far_drift(
    contract: ScoringContract, probes: Sequence[Probe], found: Sequence[float], dtype: str, folder: Path
) -> None:
    """Refuse a type in which the scores move further from the source's than precision explains."""
    moved = max((abs(probe.score - score) for probe, score in zip(probes, found, strict=True)), default=0.0)
    allowed = allowed_drift(contract, dtype, [probe.score for probe in probes])
    if not moved <= allowed:
        raise CheckpointError(
            f"{folder}: in {dtype} scores move by up to {moved:.3g} from the source's in float32 (allowed "
            f"{allowed:.2g}). Fix: --dtype float32, or bfloat16 in place of float16."
        )


def plain_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the model without adapters, head in fp32, described as a reward model.

    The sum of backbone and adapter is formed in the type the model was loaded in: fp32.
    """
    head = active_head(model).effective_weight().detach().clone()
    plain: Any = model.merge_and_unload() if isinstance(model, PeftModel) else model
    describe_as_reward_model(plain, tokenizer)
    _only_head(plain).weight.data = head
    return plain


def round_backbone(plain: PreTrainedModel, dtype: str) -> None:
    """Round the weights of the backbone to `dtype` while they stay fp32; the head is left alone."""
    head = _only_head(plain).weight
    # Weights alone: buffers such as rotary frequencies are not in the file.
    for weight in plain.parameters():
        if weight is not head:
            weight.data = weight.data.to(getattr(torch, dtype)).float()


def _as_stored(plain: PreTrainedModel, dtype: str) -> PreTrainedModel:
    head = _only_head(plain).weight.data
    stored: Any = plain.to(getattr(torch, dtype))
    _only_head(stored).weight.data = head
    return stored


def _name_dtype_as_before(config: Path, dtype: str) -> None:
    """Name the weights' type as transformers 4 did too: engines built on it take what is unnamed for float16."""
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "dtype": dtype, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _only_head(plain: PreTrainedModel) -> ScalarHead:
    heads = [module for module in plain.modules() if isinstance(module, ScalarHead)]
    assert len(heads) == 1, "a plain model has one head"
    return heads[0]


def make_probes(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, contract: ScoringContract) -> list[Probe]:
    """Return the contract's golden sequences and a few texts, with their scores in fp32."""
    encoder = TextEncoder.from_settings(tokenizer, contract.encoding)
    sequences: list[tuple[list[int], str | None]] = [
        (list(golden.input_ids), None) for golden in contract.golden_scores
    ]
    for prompt, completion in (*_PROBES, *(_CHAT_PROBES if encoder.chat_template else ())):
        try:
            ids = encoder.encode_one(prompt, completion)
        except ValueError as error:  # the template refuses it, or it is too long
            logger.info(f"not compared: {one_line(error, 160)}")
            continue
        sequences.append((ids, _text_of(encoder, prompt, completion)))
    scores = score_sequences(model, [ids for ids, _ in sequences], contract.pad_token_id, batch_size=1, device="cpu")
    return [Probe(ids, score, text) for (ids, text), score in zip(sequences, scores, strict=True)]


def _text_of(encoder: TextEncoder, prompt: Text, completion: Text) -> str | None:
    try:
        return encoder.render(prompt, completion)
    except ValueError as error:  # no text gives these ids, so that a pipeline can't be asked
        logger.warning(f"a plain pipeline can't be compared: {one_line(error, 300)}")
        return None


def _write_contract(
    contract: ScoringContract, probes: Sequence[Probe], found: Sequence[float], target: Path, dtype: str
) -> float:
    """Write the export's own contract and golden scores; return how far these are from training's."""
    # A model of another project brings none: what was compared stands for them.
    trained = [golden.score for golden in contract.golden_scores] or [probe.score for probe in probes]
    count = len(trained)
    drift = max((abs(a - b) for a, b in zip(trained, found[:count], strict=True)), default=0.0)
    base = replace(contract.base_model, name=portable_name(contract.base_model.name), quantization=None)
    own = replace(contract, base_model=base, dtype=dtype, compute_dtype=dtype)
    own.with_golden([probe.input_ids for probe in probes[:count]], list(found[:count])).save(target)
    return drift


# --- Verifying -------------------------------------------------------------------------------------------------------


def verify_export(folder: Path, trust_remote_code: bool = False) -> int:
    """Check that an export still has its golden scores in plain transformers; return how many there were.

    Raises:
        ModelError: it is no plain reward model with a contract.
        CheckpointError: it scores differently, or can't be loaded.
    """
    require_reward_model(folder)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: is an adapter, not an export. Fix: --output DIR, a folder for its export.")
    contract = ScoringContract.load(folder)
    golden = [Probe(one.input_ids, one.score) for one in contract.golden_scores]
    dtype = contract.compute_dtype
    found = scores_of_plain_transformers(folder, golden, [dtype], trust_remote_code)[dtype]
    check_golden([one.score for one in golden], found, dtype, str(folder))
    return len(golden)


def scores_of_plain_transformers(
    folder: Path, probes: Sequence[Probe], dtypes: Sequence[str], trust_remote_code: bool = False
) -> dict[str, list[float]]:
    """Score in a fresh process that knows nothing of rm_scale: by token ids, and by `pipeline` for texts.

    Args:
        folder: the export.
        probes: what to score.
        dtypes: types to load it in.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        For each type a score per probe.

    Raises:
        CheckpointError: the process failed, or the two ways differ.
    """
    job = {
        "folder": str(folder),
        "dtypes": list(dict.fromkeys(dtypes)),
        "trust_remote_code": trust_remote_code,
        "probes": [{"input_ids": probe.input_ids, "text": probe.text} for probe in probes],
    }
    done = subprocess.run(
        [sys.executable, "-m", VERIFIER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=_VERIFY_SECONDS,
        check=False,
    )
    if done.returncode:
        raise CheckpointError(
            f"{folder}: transformers can't load or score the export ({one_line(done.stderr)[-300:]}). "
            "Fix: export again; if it stays so, report it."
        )
    answers = json.loads(done.stdout.splitlines()[-1])
    for dtype, answer in answers.items():
        _compare_ways(folder, answer["by_ids"], answer["by_text"], dtype)
    return {dtype: [float(score) for score in answer["by_ids"]] for dtype, answer in answers.items()}


def _compare_ways(folder: Path, by_ids: Sequence[float], by_text: Sequence[float | None], dtype: str) -> None:
    scale = max([1.0, *(abs(score) for score in by_ids)])
    for number, (one, other) in enumerate(zip(by_ids, by_text, strict=True)):
        if other is not None and not abs(one - other) <= SCORE_TOLERANCE[dtype] * scale:
            raise CheckpointError(
                f"{folder}: pipeline gives {other:.5f} for the text of probe {number}, its token ids {one:.5f}: the "
                "tokenizer of the export reads texts differently. Fix: report this."
            )


def compare(stored: Sequence[float], found: Sequence[float], folder: Path) -> tuple[float, float]:
    """Return the largest difference in fp32 between scores written and scores read, and what is allowed.

    Raises:
        CheckpointError: it is larger.
    """
    scale = max([1.0, *(abs(score) for score in stored)])
    tolerance = SCORE_TOLERANCE["float32"] * scale
    differences = [abs(one - other) for one, other in zip(stored, found, strict=True)]
    if not all(difference <= tolerance for difference in differences):
        worst = max(
            range(len(stored)), key=lambda place: (differences[place] != differences[place], differences[place])
        )
        raise CheckpointError(
            f"{folder}: the export scores {found[worst]:.5f} where its source scores {stored[worst]:.5f} (allowed "
            f"difference {tolerance:.2g}). Fix: report this with both scores."
        )
    return max(differences, default=0.0), tolerance


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
