"""Load the tokenizer of a run, and settle its EOS token, padding token and chat template."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.errors import ModelError
from rm_scale.logs import KEPT, get_logger
from rm_scale.modeling.padding_token import require_in_vocabulary, settle_pad_token
from rm_scale.modeling.weight_files import LFS_START, file_of
from rm_scale.planning.shape import refuse_endless_files
from rm_scale.texts import typed_line

logger = get_logger(__name__)

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_OTHER_VOCABULARIES = ("merges.txt", "vocab.txt", "tiktoken.model", "qwen.tiktoken")


def load_tokenizer(
    name: str,
    revision: str = "main",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer and settle its EOS, padding token and chat template.

    Args:
        name: folder or hub name.
        revision: hub branch, tag or commit.
        trust_remote_code: run code that comes with the tokenizer.
        eos_token: replaces the tokenizer's EOS; must be in the vocabulary.
        pad_token: replaces the choice below; must be in the vocabulary and differ from EOS.
        chat_template_path: Jinja file that replaces the chat template, or a tokenizer (folder or hub name) whose
            template and EOS do, as in TRL.

    Raises:
        ModelError: no tokenizer there, a token is unknown, or pad and EOS are the same.
    """
    tokenizer = read_tokenizer(name, revision, trust_remote_code)
    if eos_token is not None:
        require_in_vocabulary(tokenizer, "eos_token", eos_token)
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name!r} has no EOS token. Fix: name one with --eos_token.")
    if chat_template_path is not None:
        _take_chat_template(tokenizer, chat_template_path, keeps_eos=eos_token is not None)
    settle_pad_token(tokenizer, pad_token)
    tokenizer.padding_side = "right"
    return tokenizer


def _take_chat_template(tokenizer: PreTrainedTokenizerBase, path: str, keeps_eos: bool) -> None:
    """Give a tokenizer another chat template; from another tokenizer with its EOS, unless one was named.

    TRL adds tokens that only the other tokenizer has to this one. Their embeddings would be random, and adapters are
    saved without embeddings, so they are refused where the template writes them; all others do no harm missing.

    Raises:
        ModelError: there is no template, or it writes such a token.
    """
    if Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        return
    source = read_tokenizer(path)
    if not source.chat_template:
        raise ModelError(f"chat_template_path={path}: that tokenizer has no chat template. Fix: give a Jinja file.")
    vocabulary = tokenizer.get_vocab()
    added = [token.content for token in source.added_tokens_decoder.values()]
    missing = [token for token in added if token not in vocabulary and token in str(source.chat_template)]
    if missing:
        raise ModelError(
            f"chat_template_path={path}: its template writes {', '.join(missing[:5])}, which the model's tokenizer "
            "does not have as a token. Fix: a template whose tokens it has, or add them to model and tokenizer first "
            "(TRL's clone_chat_template does)."
        )
    tokenizer.chat_template = source.chat_template
    if not keeps_eos and source.eos_token in vocabulary:
        tokenizer.eos_token = source.eos_token
    logger.info(f"chat template: that of {path}; EOS is {tokenizer.eos_token}", extra=KEPT)


def read_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is saved.

    Args:
        name: folder or hub name.
        revision: hub branch, tag or commit.
        trust_remote_code: run code that comes with the tokenizer.

    Raises:
        ModelError: it can't be loaded; says which file or package is to blame where that is certain.
    """
    refuse_endless_files(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises plain `Exception` for a damaged file
        cause = _damaged_file(name, revision) or _missing_package(name, revision) or _no_files(name)
        # Where the cause is not known the error stands alone: a fix for another cause sends people the wrong way.
        raise ModelError(f"{name}: its tokenizer can't be loaded ({cause or typed_line(error, 400)})") from error


def _file(name: str, file: str, revision: str) -> Path | None:
    try:
        return file_of(name, file, revision)
    except OSError:
        return None


def _damaged_file(name: str, revision: str) -> str | None:
    """Return which of the tokenizer's files can't be what it should be, and why."""
    for file in (*_JSON_FILES, *_SENTENCEPIECE_FILES):
        path = _file(name, file, revision)
        if path is None:
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            return f"{path} can't be read: {error.strerror}"
        if not content:
            return f"{path} is empty. Fix: download or copy the file again"
        if content.startswith(LFS_START):
            return f"{path} is a Git LFS pointer. Fix: git lfs pull in that folder, or download the file itself"
        if path.suffix == ".json" and not _is_json_object(content):
            return f"{path} is no JSON object, or is cut short. Fix: download or copy the file again"
    return None


def _is_json_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _missing_package(name: str, revision: str) -> str | None:
    """Return which package is missing to read a vocabulary that is there in SentencePiece's form alone."""
    beside = next((file for file in _SENTENCEPIECE_FILES if _file(name, file, revision) is not None), None)
    if beside is None or _file(name, "tokenizer.json", revision) is not None:
        return None
    packages = ("sentencepiece", "google.protobuf")
    missing = [package.rpartition(".")[2] for package in packages if not _is_installed(package)]
    if not missing:
        return None
    return (
        f"it comes as {beside}, without tokenizer.json, and to read that the package {' and '.join(missing)} is "
        f"needed and not installed. Fix: pip install {' '.join(missing)}"
    )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def _no_files(name: str) -> str | None:
    """Return that a folder holds no vocabulary at all, if it does not."""
    folder = Path(name)
    vocabularies = ("tokenizer.json", "vocab.json", *_SENTENCEPIECE_FILES, *_OTHER_VOCABULARIES)
    if not folder.is_dir() or any((folder / file).is_file() for file in vocabularies):
        return None
    return "there are no tokenizer files in that folder. Fix: put the tokenizer's files beside the model"
