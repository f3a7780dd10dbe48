"""Write an export as ONNX too: token ids and mask to raw scores, kept only if ONNX Runtime returns the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from rm_scale.batching.padding import pad_right
from rm_scale.errors import CheckpointError, ModelError
from rm_scale.inference.export.export_model import make_probes
from rm_scale.modeling.golden_scores import SCORE_TOLERANCE
from rm_scale.modeling.head import find_head
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.tokenizers import read_tokenizer
from rm_scale.texts import typed_line

ONNX_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "logits"
"""As transformers' classifiers call it, and as TEI looks it up: shape (batch, 1)."""
_OPSET = 18


class _Scores(torch.nn.Module):
    """Token ids `(N, T)` and attention mask `(N, T)`, padded on the right, to raw scores `(N, 1)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = getattr(model, model.base_model_prefix)
        self.head = find_head(model)[1]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # A causal model's real tokens see nothing of what comes after them, so padding needs no mask.
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        picked = hidden[torch.arange(input_ids.shape[0]), last]
        scores: torch.Tensor = self.head(picked.float())
        return scores


def write_onnx(folder: Path, trust_remote_code: bool = False) -> float:
    """Write `model.onnx` (and its weights, `model.onnx.data`) into an export; return the largest difference of scores.

    Weights are fp32. Compared are the contract's golden sequences and a few texts, alone and in padded batches.

    Raises:
        ModelError: the packages for it are not installed, or the model can't be traced.
        CheckpointError: ONNX Runtime scores differently; nothing of it was kept.
    """
    _require_packages()
    contract = ScoringContract.load(folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(folder),
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="eager",
        trust_remote_code=trust_remote_code,
    ).eval()
    tokenizer = read_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    examples = [probe.input_ids for probe in make_probes(model, tokenizer, contract)]
    scores = _Scores(model).eval()
    with _scratch_folder(folder) as scratch:
        _trace(scores, examples, contract.pad_token_id, scratch / ONNX_FILE)
        worst = _compare(scores, examples, contract.pad_token_id, scratch / ONNX_FILE, folder)
        for file in sorted(scratch.iterdir(), reverse=True):  # the weights before the graph that names them
            os.replace(file, folder / file.name)
    return worst


def _require_packages() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(f"--onnx needs {error.name}. Fix: pip install 'rm-scale[onnx]'.") from error


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    scratch = folder / f".onnx-{os.getpid()}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _trace(scores: _Scores, examples: Sequence[list[int]], pad_token_id: int, file: Path) -> None:
    padded = pad_right([*examples, *examples][:2], pad_token_id)
    shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        torch.onnx.export(
            scores,
            tuple(padded[name] for name in INPUTS),
            str(file),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=(shapes, shapes),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # the exporter raises whatever the model's code makes it meet
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outermost only says that it failed
            cause = cause.__cause__
        raise ModelError(
            f"{type(scores.backbone).__name__} can't be written as ONNX ({typed_line(cause, 200)}). "
            "Fix: leave out --onnx and --engine tei; the export itself is good."
        ) from error


def _compare(scores: _Scores, examples: Sequence[list[int]], pad_token_id: int, file: Path, folder: Path) -> float:
    """Return ONNX Runtime's largest difference to torch: each sequence alone, all in one batch, halves of them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst, scale = 0.0, 1.0
    for batch in (*([ids] for ids in examples), examples, [ids[: (len(ids) + 1) // 2] for ids in examples]):
        padded = pad_right(batch, pad_token_id)
        with torch.no_grad():
            expected = scores(*(padded[name] for name in INPUTS))[:, 0].tolist()
        found = session.run([OUTPUT], {name: padded[name].numpy() for name in INPUTS})[0][:, 0].tolist()
        differences = [abs(one - other) for one, other in zip(expected, found, strict=True)]
        worst = max([worst, *(float("inf") if difference != difference else difference for difference in differences)])
        scale = max([scale, *map(abs, expected)])
    if not worst <= SCORE_TOLERANCE["float32"] * scale:
        raise CheckpointError(
            f"{folder / ONNX_FILE}: ONNX Runtime's scores are off by {worst:.3g} (allowed "
            f"{SCORE_TOLERANCE['float32'] * scale:.2g}). It was not kept. Fix: leave out --onnx and --engine "
            "tei; the export itself is good."
        )
    return worst
