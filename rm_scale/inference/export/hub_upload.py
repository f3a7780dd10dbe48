"""Upload an export to the Hugging Face hub: only when asked twice, and only files that belong there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rm_scale.errors import ModelError
from rm_scale.inference.export.export_card import CARD_FILE
from rm_scale.logs import get_logger
from rm_scale.texts import one_line

logger = get_logger(__name__)

# What a published model consists of. Anything else (pickles, logs, training state) stays here.
_PUBLISHED = re.compile(r"[^.].*\.(safetensors|json|jinja|txt|md|model|tiktoken|onnx|onnx\.data|py)")
_TRAINING_STATE = re.compile(r"^(run|runs|optimizer_state|checkpoint-\d+|global_step\d+)/")
_SECRETS = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY-----")
_HOST_PATH = re.compile(r"(?<![\w.:/-])(/(?:home|root|Users|mnt|scratch|work|data|tmp|gpfs|lustre)/[^\s\"'`)]*)")
_TEXT_SUFFIXES = {".json", ".md", ".jinja", ".txt", ".py"}
_MOST_TEXT_BYTES = 32 * 2**20
_CARD_LINES = 12


@dataclass(frozen=True)
class Upload:
    """What would be sent.

    Attributes:
        repo: where to.
        files: path and bytes of each file.
        warnings: what a person should look at first.
        card: how the model card begins, without empty lines.
    """

    repo: str
    files: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]
    card: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the upload as lines for people."""
        total = sum(size for _, size in self.files)
        shown = [f"  {size / 1e6:10.2f} MB  {name}" for name, size in self.files]
        card = ["the model card begins:", *(f"  | {line}" for line in self.card)] if self.card else []
        return [f"to {self.repo}: {len(self.files)} files, {total / 1e6:.1f} MB", *shown, *card, *self.warnings]


def plan_upload(folder: Path, repo: str) -> Upload:
    """Look through a folder as it would be sent.

    Raises:
        ModelError: the name is none, or a file must not leave this machine.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ModelError(f"push_to_hub={repo}: is no name of a repository. Fix: USER/NAME.")
    files, warnings = [], []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if _TRAINING_STATE.search(name) or not _PUBLISHED.fullmatch(file.name):
            raise ModelError(
                f"{file}: is not published (only weights in safetensors or ONNX, config, tokenizer, contract and card "
                "are; pickles, logs and training state stay here). Fix: export into a folder of its own."
            )
        warnings += _look_into(file, name)
        files.append((name, file.stat().st_size))
    card = folder / CARD_FILE
    if not card.is_file():
        warnings.append(f"  look: there is no model card ({CARD_FILE})")
    return Upload(repo, tuple(files), tuple(warnings), _beginning(card))


def _look_into(file: Path, name: str) -> list[str]:
    """Return what a person should look at in a text file before it is public."""
    if file.suffix == ".py":
        return [f"  look: {name} is code that others would run"]
    if file.suffix not in _TEXT_SUFFIXES or file.stat().st_size > _MOST_TEXT_BYTES:
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    if _SECRETS.search(text):
        raise ModelError(f"{file}: holds what looks like a secret. Fix: remove it; change the secret.")
    found = _HOST_PATH.search(text) if file.suffix in {".json", ".md"} and file.name != "tokenizer.json" else None
    return [f"  look: {name} names a path of this machine ({found.group(1)[:80]})"] if found is not None else []


def _beginning(card: Path) -> tuple[str, ...]:
    if not card.is_file():
        return ()
    lines = (line.rstrip() for line in card.read_text(encoding="utf-8", errors="replace").splitlines())
    return tuple(line for line in lines if line)[:_CARD_LINES]


def upload(folder: Path, planned: Upload) -> str:
    """Send an export to a repository, a private one if it is new; return its address.

    The token comes from the environment (HF_TOKEN) or the hub's own login, never from an option.

    Raises:
        ModelError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(planned.repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=planned.repo,
            folder_path=str(folder),
            allow_patterns=[name for name, _ in planned.files],
            commit_message="Reward model, exported and verified by rm_scale",
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"push_to_hub={planned.repo}: the hub did not take it ({one_line(error, 200)}). The export "
            f"in {folder} is good. Fix: HF_TOKEN with write access in the environment, then --push_to_hub again."
        ) from error
    return f"{api.endpoint}/{planned.repo}"
