"""Find the reward head that a checkpoint holds, by the names and shapes of its tensors: what made it does not matter.

transformers keeps a head as `score.weight`; others as `value_head.weight` (OpenRLHF), `v_head.summary.weight` (TRL), or
in a file of its own beside a language model (LLaMA-Factory).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.head import HEAD_NAMES
from rm_scale.modeling.head_layouts import COUNTERS, MOMENTS, refuse_unreadable_head
from rm_scale.modeling.token_reward import head_in_language_head, named_output
from rm_scale.modeling.weight_files import (
    ADAPTER_WEIGHTS_FILE,
    WEIGHTS_FILE,
    TensorPlace,
    checkpoint_tensors,
    file_of,
    open_weights,
    read_header,
    read_tensor,
)
from rm_scale.texts import one_line, printable

logger = get_logger(__name__)

SIDE_FILES = ("value_head.safetensors", "value_head.bin")
"""Files that hold a head alone, beside the weights of a language model, as LLaMA-Factory calls them."""
_HOLDS_NO_HEAD = re.compile(
    r"pytorch_model[\w.-]*\.bin"
    r"|consolidated[\d.of-]*\.(safetensors|bin)"
    r"|(optimizer|scheduler|scaler|training_args|random_states|rng_state)[\w.-]*\.(safetensors|bin)"
    r"|sglang_score_bias\.safetensors"
)
"""Files beside the weights that trainers and publishers leave there: the same under other names, a training's state,
the zero that an export holds for SGLang."""
_STARTS_OF_PICKLED = (b"PK\x03\x04", b"\x80")
"""How files begin that torch.save writes: a zip archive, formerly a bare pickle."""
_NOT_A_HEAD = ("embed", "position", "norm")
_OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight", "output.weight")
_PROMISES_A_HEAD = re.compile("SequenceClassification$|Reward|Score|Critic|ValueHead")
_SAYS_REWARD = re.compile(r"(^|[-_/ .])(rm|reward)([-_/ .]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class StoredHead:
    """A head of one output, in a checkpoint's file.

    Attributes:
        file: where it is.
        key: name of its weight, `(1, hidden_size)`, or `(outputs, hidden_size)` with a `row`.
        bias_key: name of its bias, `(outputs,)`; `None` without one.
        bias_file: where that is; default in `file`.
        row: which of several outputs is the reward; `None` for the only one.
        side_tensors: what `file` holds when it is no safetensors file.
        moment_places: where the mean and spread lie that its own code can normalise by; see `moments`.
    """

    file: Path
    key: str
    bias_key: str | None = None
    bias_file: Path | None = None
    row: int | None = None
    side_tensors: Mapping[str, torch.Tensor] | None = None
    moment_places: tuple[tuple[str, Path], tuple[str, Path], bool] | None = None

    def weight(self) -> torch.Tensor:
        """Return the weight as the file holds it: fp32, `(1, hidden_size)`."""
        return self._row_of(self.file, self.key).float()

    def offset(self) -> float:
        """Return the bias: a constant that is part of every reward, 0 without one."""
        return 0.0 if self.bias_key is None else float(self._row_of(self.bias_file or self.file, self.bias_key))

    def moments(self) -> tuple[float, float] | None:
        """Return mean and standard deviation of rewards, where the weights hold any that were ever set."""
        if self.moment_places is None:
            return None
        (mean_key, mean_file), (spread_key, spread_file), is_variance = self.moment_places
        mean, spread = (
            float(read_tensor(file, key)) for key, file in ((mean_key, mean_file), (spread_key, spread_file))
        )
        return None if (mean, spread) == (0.0, 1.0) else (mean, spread**0.5 if is_variance else spread)

    def used_keys(self) -> set[str]:
        """Return the names of all tensors that it is made of, and of those that only describe it."""
        moments = () if self.moment_places is None else (self.moment_places[0][0], self.moment_places[1][0])
        return {self.key, *moments, *COUNTERS} | ({self.bias_key} if self.bias_key is not None else set())

    def is_transformers_own(self) -> bool:
        """Tell whether it lies where transformers' sequence classifiers keep theirs."""
        return self.key in {f"{name}.weight" for name in HEAD_NAMES}

    def describe(self) -> str:
        """Return where it was found, for messages."""
        return f"{self.key}{'' if self.row is None else f'[{self.row}]'} in {self.file.name}"

    def _row_of(self, file: Path, key: str) -> torch.Tensor:
        """Return the reward's row of a tensor, which keeps its number of dimensions."""
        if self.side_tensors is not None:
            return self.side_tensors[key]
        if self.row is None:
            return read_tensor(file, key)
        with open_weights(file) as opened:
            found: torch.Tensor = opened.get_slice(key)[self.row : self.row + 1]
            return found


def head_to_start_from(name: str, revision: str = "main", trust_remote_code: bool = False) -> StoredHead | None:
    """Return the head that training goes on with, `None` for a language model, which gets a new one.

    Raises:
        ModelError: its config can't be used, or says that there is a head and the weights hold none; and what
            `find_stored_head` raises.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        _refuse_by_tensors(name, revision)
        raise ModelError(
            f"model_name_or_path={name!r}: its config can't be used ({one_line(error, 240)}). Fix: use a model that "
            "this transformers knows; for a model with its own code, --trust_remote_code if you trust it."
        ) from error
    stored = find_stored_head(name, revision)
    architecture = (getattr(config, "architectures", None) or [""])[0] or ""
    if stored is None and _PROMISES_A_HEAD.search(architecture):
        raise ModelError(
            f"model_name_or_path={name!r}: config.json says {architecture}, but the weights hold no head of one output "
            f"({' or '.join(HEAD_NAMES)}); it would be random. Fix: give the folder that holds the trained head."
        )
    if stored is None and _SAYS_REWARD.search(name.rstrip("/").split("/")[-1]):
        logger.warning(
            f"model_name_or_path={name!r}: is called a reward model, but its weights hold no reward head, so a new one "
            "is trained. If its reward is the logit of a token, that is not used"
        )
    return stored


def find_stored_head(name: str, revision: str = "main") -> StoredHead | None:
    """Return the head of a folder or hub model, `None` when its tensors hold none. Every weight file is looked at.

    Raises:
        ModelError: a weight file is missing or damaged; a head has several outputs, or there is more than one head; or
            the model's reward is a token of its language head; or an adapter lies beside the model.
    """
    refuse_model_and_adapter(Path(name))
    tensors = checkpoint_tensors(name, revision)
    refuse_unreadable_head(name, {key: place.shape for key, place in tensors.items()})
    heads = [_one_of_several(name, revision, key, tensors) for key in tensors if _has_several_outputs(key, tensors)]
    heads += [_stored(key, tensors) for key in tensors if _is_head(key, tensors[key].shape)]
    heads += _heads_in_side_files(name, revision, tensors)
    if len(heads) > 1:
        raise ModelError(
            f"{name}: holds {len(heads)} heads of one output ({'; '.join(head.describe() for head in heads)}), and "
            "nothing says which gives the reward. Fix: remove the one that does not."
        )
    if heads:
        return replace(heads[0], moment_places=_moment_places(tensors))
    found = head_in_language_head(name, revision, tensors, _OUTPUT_LAYERS)
    return None if found is None else _stored(found[0], tensors, found[1])


def _refuse_by_tensors(name: str, revision: str) -> None:
    """Refuse a known head that can't be used, where config.json is that of code which transformers does not have.

    Raises:
        ModelError: it holds one.
    """
    try:
        tensors = checkpoint_tensors(name, revision)
    except (ModelError, OSError):
        return  # what is wrong with the config is said
    refuse_unreadable_head(name, {key: place.shape for key, place in tensors.items()})


def _has_several_outputs(key: str, tensors: Mapping[str, TensorPlace]) -> bool:
    """Tell whether a tensor is the head of a sequence classifier with several outputs."""
    shape = tensors[key].shape
    return key in {f"{head}.weight" for head in HEAD_NAMES} and len(shape) == 2 and shape[0] != 1


def _one_of_several(name: str, revision: str, key: str, tensors: Mapping[str, TensorPlace]) -> StoredHead:
    """Return the output of a classifier that its config calls the reward.

    Raises:
        ModelError: it calls none so, or several.
    """
    outputs = tensors[key].shape[0]
    row = named_output(name, revision, outputs)
    if row is None:
        raise ModelError(
            f"{name}: is a classifier with {outputs} outputs ({key}), a reward model has 1. Fix: give a reward model "
            "or the causal language model it came from; if one of the outputs is the reward and the others are not "
            'used, call it so in config.json, e.g. "id2label": {"0": "unused", "1": "reward"}.'
        )
    return _stored(key, tensors, row)


def _moment_places(
    tensors: Mapping[str, TensorPlace],
) -> tuple[tuple[str, Path], tuple[str, Path], bool] | None:
    """Return where the mean and spread of rewards lie among the weights."""
    for mean, spread, is_variance in MOMENTS:
        if all(key in tensors and tensors[key].shape in {(), (1,)} for key in (mean, spread)):
            return (mean, tensors[mean].file), (spread, tensors[spread].file), is_variance
    return None


def refuse_model_and_adapter(folder: Path) -> None:
    """Refuse a folder that holds a whole model and an adapter: each would be loaded by somebody, without the other.

    Raises:
        ModelError: it holds both; names them.
    """
    models = [name for name in (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json") if (folder / name).is_file()]
    adapters = [name for name in ("adapter_config.json", ADAPTER_WEIGHTS_FILE) if (folder / name).is_file()]
    if models and adapters:
        raise ModelError(
            f"{folder}: holds a whole model ({models[0]}) and an adapter ({adapters[0]}), and nothing says which gives "
            "the reward. Fix: move the one that does not into a folder of its own."
        )


def _is_head(key: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor is a linear layer with one output that stands outside the layers."""
    parts = key.split(".")
    # Layers are numbered; some hold gates of one output.
    in_a_layer = any(part.isdigit() for part in parts)
    is_other = any(word in key for word in _NOT_A_HEAD)
    return parts[-1] == "weight" and len(shape) == 2 and shape[0] == 1 and not in_a_layer and not is_other


def _stored(key: str, tensors: Mapping[str, TensorPlace], row: int | None = None) -> StoredHead:
    bias = key.removesuffix("weight") + "bias"
    has_bias = bias in tensors and tensors[bias].shape == tensors[key].shape[:1]
    return StoredHead(tensors[key].file, key, bias if has_bias else None, tensors[bias].file if has_bias else None, row)


def head_beside_adapter(folder: Path) -> StoredHead | None:
    """Return the head in a file beside an adapter, as LLaMA-Factory writes it; `None` where there is none.

    Raises:
        ModelError: such a file holds anything but one head of one output and its bias.
    """
    heads = _heads_in([folder / name for name in SIDE_FILES if (folder / name).is_file()], {})
    return heads[0] if heads else None


def _heads_in_side_files(name: str, revision: str, tensors: Mapping[str, TensorPlace]) -> list[StoredHead]:
    """Return the heads in files beside the weights; see `_heads_in`."""
    return _heads_in(_side_files(name, revision, tensors), tensors)


def _heads_in(paths: Iterable[Path], tensors: Mapping[str, TensorPlace]) -> list[StoredHead]:
    """Return the heads in files that hold one alone. A pickled form is not read where the safe one is there.

    Args:
        paths: the files, the safe form first.
        tensors: of the model beside which they lie.

    Raises:
        ModelError: such a file holds anything but one head of one output and its bias.
    """
    heads, seen = [], set()
    for path in paths:
        if path.stem in seen:
            continue
        seen.add(path.stem)
        pickled = None if path.suffix == ".safetensors" else read_pickled(path)
        shapes = read_header(path) if pickled is None else {key: tuple(one.shape) for key, one in pickled.items()}
        if path.name not in SIDE_FILES and all(_is_copy(key, shape, tensors) for key, shape in shapes.items()):
            continue  # the weights again or a part of them, e.g. in another type
        keys = [key for key, shape in shapes.items() if _is_head(key, shape)]
        bias = keys[0].removesuffix("weight") + "bias" if keys else None
        if len(keys) != 1 or set(shapes) - {keys[0], bias}:
            raise ModelError(
                f"{path}: holds no head of one output alone but {printable(str(sorted(shapes)[:4]))}, so the model's "
                "reward is not known. Fix: give the causal language model it came from, in a folder without this file."
            )
        heads.append(StoredHead(path, keys[0], bias if bias in shapes else None, side_tensors=pickled))
    return heads


def _is_copy(key: str, shape: tuple[int, ...], tensors: Mapping[str, TensorPlace]) -> bool:
    """Tell whether a tensor is one of the model's again; its output layer may be left out of one of the two."""
    if key in tensors:
        return tensors[key].shape == shape
    return key in _OUTPUT_LAYERS and shape[:1] != (1,)


def _side_files(name: str, revision: str, tensors: Mapping[str, TensorPlace]) -> list[Path]:
    """Return the files beside the weights that may hold a head, the safe form first.

    Of a hub model those are seen that are on this machine, and those with the names that heads usually have.
    """
    usual = []
    for file in SIDE_FILES:
        try:
            path = file_of(name, file, revision)
        except OSError:  # no network to ask whether the hub has one
            path = None
        usual += [] if path is None else [path]
    weights = {place.file for place in tensors.values()}
    folders = {file.parent for file in weights}
    found = sorted(path for folder in folders for path in folder.iterdir() if _may_hold_a_head(path))
    others = [path for path in found if path not in weights and path.name not in SIDE_FILES]
    return usual + sorted(others, key=lambda path: path.suffix != ".safetensors")


def _may_hold_a_head(path: Path) -> bool:
    if path.suffix not in {".safetensors", ".bin"} or _HOLDS_NO_HEAD.fullmatch(path.name) or not path.is_file():
        return False
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(4).startswith(_STARTS_OF_PICKLED)  # other formats are called .bin too


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that torch.save wrote, without running code of it.

    Raises:
        ModelError: it can't be read so.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path}: can't be read as tensors ({one_line(error, 160)}). Fix: download or copy the file again."
        ) from error
    found = values if isinstance(values, dict) else {}
    return {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
