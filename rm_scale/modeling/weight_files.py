"""Look into safetensors files without loading them: which tensors a checkpoint holds, and what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from rm_scale.errors import ModelError
from rm_scale.texts import one_line

WEIGHTS_FILE = "model.safetensors"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
LFS_START = b"version https://git-lfs"
"""How the text begins that Git leaves in place of a large file."""
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself refuses a longer header."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor of a checkpoint lies.

    Attributes:
        file: the safetensors file.
        shape: its sizes.
    """

    file: Path
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in a safetensors file, by name. Reads the header alone.

    Raises:
        ModelError: the file is missing, empty, cut short, a Git LFS pointer or no safetensors file; names it.
    """
    again = "Fix: download or copy the file again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_START))
            file.seek(8)
            length = int.from_bytes(start[:8], "little")
            header = file.read(length) if 2 <= length <= min(size - 8, _LONGEST_HEADER) else b""
    except OSError as error:
        raise ModelError(f"{path}: the weights can't be read ({error.strerror or error}). {again}") from error
    if size == 0:
        raise ModelError(f"{path}: is empty (0 bytes). {again}")
    if start == LFS_START:
        raise ModelError(
            f"{path}: is a Git LFS pointer of {size} bytes, not the weights. "
            "Fix: git lfs pull in that folder, or download the file itself."
        )
    try:
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        shapes = {name: tuple(int(one) for one in value["shape"]) for name, value in tensors.items()}
        end = 8 + length + max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if 8 < size < 8 + length <= _LONGEST_HEADER:
            raise ModelError(f"{path}: is cut short ({size} bytes, its header alone has {length}). {again}") from error
        raise ModelError(f"{path}: is no safetensors file (it has no readable header). {again}") from error
    if size != end:
        what = "is cut short" if size < end else "holds more than its header says"
        raise ModelError(f"{path}: {what} ({size} bytes, its header says {end}). {again}")
    return shapes


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file to read tensors from it.

    Raises:
        ModelError: it is damaged; names the file.
    """
    read_header(path)
    try:
        with safe_open(str(path), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ModelError(
            f"{path}: can't be read as safetensors ({one_line(error, 200)}). Fix: download or copy the file again."
        ) from error


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """Return one tensor of a safetensors file, in the type it is stored in.

    Raises:
        ModelError: the file is damaged.
    """
    with open_weights(path) as tensors:
        found: torch.Tensor = tensors.get_tensor(key)
        return found


def file_of(name: str, file: str, revision: str = "main") -> Path | None:
    """Return where a file of a folder or hub model lies on this machine, `None` when it has none of that name."""
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def checkpoint_tensors(name: str, revision: str = "main") -> dict[str, TensorPlace]:
    """Return all tensors of a safetensors checkpoint, sharded or not, by name. Its files are seen to be whole.

    Raises:
        ModelError: there are no safetensors weights, a shard is missing, or a file is damaged.
    """
    single = file_of(name, WEIGHTS_FILE, revision)  # where there are both, transformers loads this one too
    index = None if single is not None else file_of(name, _INDEX_FILE, revision)
    if index is None and single is None:
        raise ModelError(
            f"model_name_or_path={name!r}: has no safetensors weights; other formats can run code when they are read. "
            "Fix: convert the model with save_pretrained(..., safe_serialization=True)."
        )
    if single is not None:
        return {key: TensorPlace(single, shape) for key, shape in read_header(single).items()}
    assert index is not None
    found: dict[str, TensorPlace] = {}
    for shard in _shards(index):
        path = file_of(name, shard, revision)
        if path is None:
            raise ModelError(f"{index}: names {shard}, which is not there. Fix: download or copy the model again.")
        found |= {key: TensorPlace(path, shape) for key, shape in read_header(path).items()}
    return found


def _shards(index: Path) -> list[str]:
    """Return the file names in a sharded checkpoint's index."""
    try:
        return sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: is no index of weights ({one_line(error, 120)}). Fix: download or copy the file again."
        ) from error
