"""A model's shape, read from its `config.json` alone, before any weights."""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rm_scale.errors import ModelError
from rm_scale.files import endless_model_file
from rm_scale.json_values import OBJECT, Rule, broken_rule, parse_json, shown, whole
from rm_scale.known_models import KNOWN_MODELS
from rm_scale.logs import get_logger
from rm_scale.planning import families
from rm_scale.planning.classifiers import WITHOUT_CLASSIFIER, no_classifier
from rm_scale.planning.layer_parts import DeltaNet, Experts, LatentAttention, LayerKind, LayerStyle, Mamba
from rm_scale.texts import some_names

if TYPE_CHECKING:
    from rm_scale.planning.model_class import ModelClass

logger = get_logger(__name__)

_PLAIN = LayerStyle()


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer.

    Attributes:
        model_type: transformers' name of the architecture.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: attention heads.
        num_kv_heads: key/value heads (grouped-query attention).
        head_dim: width of one head.
        intermediate_size: width of the MLP.
        vocab_size: rows of the embedding.
        style: what a plain layer is made of.
        max_positions: longest sequence the positions allow, `None` when there is no limit.
        quantization: method name when the checkpoint itself is quantised, else `None`.
        kinds: which parts each layer has, in order; empty where all are plain.
        experts, latent, delta, mamba: sizes of those parts, where a layer has them.
        left_out: part of the model's files that no figure counts, such as a vision tower.
        exact: what the model's own class says; `None`: the formulas know this kind. With it, layers are plain ones as
            far as anything else asks for them.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    style: LayerStyle = _PLAIN
    max_positions: int | None = None
    quantization: str | None = None
    kinds: tuple[LayerKind, ...] = ()
    experts: Experts | None = None
    latent: LatentAttention | None = None
    delta: DeltaNet | None = None
    mamba: Mamba | None = None
    left_out: str | None = None
    exact: ModelClass | None = None

    @property
    def note_on_towers(self) -> str | None:
        """What a plan says about a vision tower; `None` for a model without. Loading says it again, with its size."""
        return None if self.left_out is None else f"{self.left_out} left out: the plan counts the language model alone"

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan must say about the figures, one sentence each."""
        notes = [self.note_on_towers] if self.note_on_towers is not None else []
        if self.exact is not None:
            notes.append(
                f"{self.model_type}: the formulas don't know this kind of model; parameters, activations and "
                f"operations are counted on its class {self.exact.name}, element-wise work is as of a plain layer"
            )
        if self.quantization is not None:
            notes.append(
                f"its weights are stored in {self.quantization}, and training refuses them: the plan is that of a "
                "bfloat16 copy"
            )
        return tuple(notes)

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order."""
        return self.kinds[: self.num_layers] or (LayerKind(),) * self.num_layers

    @cached_property
    def layer_counts(self) -> dict[LayerKind, int]:
        """How many layers there are of each kind, in the order in which kinds first come."""
        return dict(Counter(self.layers))

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, which is also that of all value heads."""
        return self.num_kv_heads * self.head_dim


_LIMITS = {
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"): 1_000,
    ("hidden_size", "n_embd", "d_model"): 1_000_000,
    ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"): 100_000,
    ("intermediate_size", "n_inner", "ffn_dim"): 10_000_000,
    ("vocab_size", "max_position_embeddings", "n_positions"): 1_000_000_000,
}
"""The largest value of each size: far above any model, since a larger one is an error that keeps a machine busy."""
_ZERO_IS_AS_MANY = ("blt", "dia", "hunyuan_vl")
"""How the types begin that take 0 key heads for "as many as query heads"; transformers divides by it in all others."""
_KNOW_PADDING_IN_EMBEDDING = {"llama", "mistral", "gemma", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text"} | {
    *("olmo2", "phi3", "phi", "opt", "starcoder2")
}
"""Types whose embedding transformers makes for a padding token, which must be one of its rows."""
_TYPES = {
    "architectures": Rule(lambda value: _is_list_of_texts(value), "a list of texts").or_null(),
    "id2label": OBJECT.or_null(),
    "num_labels": whole(0, 1_000_000_000).or_null(),
    # Counted from the end below 0: -1 is what many have that know no padding token.
    "pad_token_id": whole(-1_000_000_000, 1_000_000_000).or_null(),
}


def check_sizes(config: dict[str, Any], where: str = "config.json") -> None:
    """Refuse sizes in `config.json` that no model has, zero heads or a hundred thousand layers, and other types.

    Args:
        config: its content.
        where: the file's name, for the message.

    Raises:
        ModelError: names the first such value.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        problem = broken_rule(part, _TYPES) or _wrong_size(part, str(part.get("model_type", config.get("model_type"))))
        if problem is not None:
            raise ModelError(f"{where}: {problem}. Fix: correct it, or download the model again.")


def _wrong_size(part: dict[str, Any], model_type: str) -> str | None:
    has_own_code = "auto_map" in part  # which may take 0 for whatever it likes
    for names, most in _LIMITS.items():
        for name in names:
            value, least = part.get(name), _least(name, model_type, has_own_code)
            if isinstance(value, int | float) and (isinstance(value, bool) or not least <= value <= most):
                return f"{name}={shown(value)}: must be from {least} to {most:,}"
    pad, rows = part.get("pad_token_id"), part.get("vocab_size")
    if model_type in _KNOW_PADDING_IN_EMBEDDING and isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        return f"pad_token_id={pad}: must be below vocab_size={rows}"
    return None


def _least(name: str, model_type: str, has_own_code: bool) -> int:
    if name == "num_key_value_heads" and (has_own_code or model_type.startswith(_ZERO_IS_AS_MANY)):
        return 0
    return 0 if name in {"max_position_embeddings", "n_positions"} else 1  # 0 for "no limit"


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def text_config(config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the part of `config.json` that describes the language model, and that model's type."""
    text = config.get("text_config", config)
    text = text if isinstance(text, dict) else {}
    kind = str(text.get("model_type", config.get("model_type")))
    return text, families.TEXT_TYPES.get(kind, kind)


def is_known(config: dict[str, Any], trust_remote_code: bool = False) -> bool:
    """Tell whether the formulas know this kind of model; else only its class can say what it holds.

    Args:
        config: the content of `config.json`.
        trust_remote_code: code that comes with the model is run; if it has a classifier, that is what is trained.
    """
    return text_config(config)[1] in families.LAYER_STYLES and not _runs_own_code(config, trust_remote_code)


def _runs_own_code(config: dict[str, Any], trust_remote_code: bool) -> bool:
    return trust_remote_code and _CLASSIFIER in (config.get("auto_map") or {})


def refuse_without_classifier(config: dict[str, Any], trust_remote_code: bool = False) -> None:
    """Refuse a kind of model that no reward head can be put on.

    Args:
        config: the content of `config.json`.
        trust_remote_code: code that comes with the model is run, and may have a classifier of its own.

    Raises:
        ModelError: transformers has it as a causal model alone.
    """
    kind = text_config(config)[1]
    if kind in WITHOUT_CLASSIFIER and not _runs_own_code(config, trust_remote_code):
        raise ModelError(no_classifier(f"config.json of model type {config.get('model_type')!r}", kind))


_CLASSIFIER = "AutoModelForSequenceClassification"
_TOWERS = {"vision_config": "vision tower", "audio_config": "audio tower"}


def left_out(config: dict[str, Any]) -> str | None:
    """Name the parts beside the language model that a `config.json` describes; `None`: there are none."""
    found = [
        f"{what} ({part.get('model_type', 'of an unnamed type')})"
        for name, what in _TOWERS.items()
        if isinstance(part := config.get(name), dict)
    ]
    return " and ".join(found) or None


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """Read the shape from the dictionary in `config.json`.

    Raises:
        ModelError: a needed key is missing or its value impossible, or this is a kind of model that no reward head can
            be put on, or one that the formulas don't know.
    """
    check_sizes(config)
    refuse_without_classifier(config)
    text, kind = text_config(config)
    named = config.get("model_type")

    def refuse(problem: str) -> ModelError:
        return ModelError(
            f"config.json of model type {named!r}: {problem}. Fix: use a decoder-only language model in transformers' "
            "format."
        )

    if kind not in families.LAYER_STYLES:
        raise _unknown(named)
    text = families.with_class_defaults(text, kind)
    numbers = families.Numbers(text, refuse)
    hidden = numbers.need("hidden_size", "n_embd", "d_model")
    heads = numbers.need("num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = numbers.need("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    vocabulary = numbers.need("vocab_size")
    quantization = config.get("quantization_config")
    latent = families.latent_attention(kind, numbers)
    plain_head = numbers.get("head_dim", default=max(1, hidden // heads))
    return ModelShape(
        model_type=kind,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=families.key_heads(text, kind, heads, numbers),
        head_dim=plain_head if latent is None else latent.head_dim,
        intermediate_size=numbers.get(
            "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=_mlp_width(text, hidden)
        ),
        vocab_size=vocabulary,
        style=families.style_of(text, kind),
        max_positions=numbers.get("max_position_embeddings", "n_positions") or None,
        quantization=quantization.get("quant_method") if isinstance(quantization, dict) else None,
        kinds=families.layer_kinds(text, kind, layers, numbers),
        experts=families.experts(kind, numbers),
        latent=latent,
        delta=families.delta_net(kind, numbers),
        mamba=families.mamba(kind, numbers, hidden),
        left_out=left_out(config),
    )


def _mlp_width(text: dict[str, Any], hidden: int) -> int:
    ratio = text.get("expansion_ratio")
    return int((ratio if isinstance(ratio, int | float) and ratio else 4) * hidden)


def _unknown(named: Any) -> ModelError:
    return ModelError(
        f"config.json of model type {named!r}: the planner's formulas don't know this kind of model, and an estimate "
        "as of a plain one could be wrong many times over. Fix: plan with --exact, which asks the model's own class "
        "(it imports torch)."
    )


def read_model_config(name: str, revision: str = "main", or_known: bool = False) -> dict[str, Any]:
    """Read the `config.json` of a local folder or a hub model.

    Args:
        name: the folder, or the model's name on the hub.
        revision: of a hub model.
        or_known: where the hub gives none, return the shape that comes with rm_scale, if there is one of this name: a
            plan needs no more. It is warned of once.

    Raises:
        ModelError: nothing of that name, the file can't be read, or it holds sizes that no model has.
    """
    if not name.strip():
        raise ModelError(f"model_name_or_path={name!r}: must not be empty. Fix: give a folder or a hub name.")
    folder = Path(name)
    if folder.exists():
        return _read_local(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(
            f"model_name_or_path={name!r}: there is no such folder. Fix: give a folder that holds config.json."
        )
    try:
        return _read_json(_download(name, revision), name)
    except ModelError:
        if not or_known or name not in KNOWN_MODELS:
            raise
    _warn_of_known_shape(name)
    return KNOWN_MODELS[name]


@cache
def _warn_of_known_shape(name: str) -> None:
    logger.warning(f"the hub gave no config.json of {name}: planned with the shape that comes with rm_scale")


def refuse_endless_files(name: str | Path) -> None:
    """Refuse a folder where a file of the model is a pipe or a device, which libraries would read for ever.

    Raises:
        ModelError: names the file. Not for a hub name.
    """
    endless = endless_model_file(Path(name)) if Path(name).is_dir() else None
    if endless is not None:
        raise ModelError(f"{name}: {endless}, and reading it might never end. Fix: copy the model again.")


def _read_local(folder: Path) -> dict[str, Any]:
    refuse_endless_files(folder)
    for file_name in ("config.json", "adapter_config.json"):
        path = folder / file_name
        if not path.is_file():
            continue
        if file_name == "adapter_config.json":
            raise ModelError(
                f"model_name_or_path={str(folder)!r}: holds a LoRA adapter, not a model. Fix: rm-scale export "
                f"--model {folder} --output MERGED (another project's with --no_contract), and give that folder."
            )
        return _read_json(path, str(folder))
    raise ModelError(
        f"model_name_or_path={str(folder)!r}: the folder has no config.json. Fix: give a folder in "
        "transformers' format."
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: {path.name} can't be read ({error}). Fix: download the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"model_name_or_path={name!r}: {path.name} is not a JSON object. Fix: download the model again."
        )
    check_sizes(config, f"model_name_or_path={name!r}: {path.name}")
    return config


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The hub's client waits and tries again for a minute where a machine has no network.
    offline = not _hub_has_an_address()
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
    except (HfHubHTTPError, OSError, ValueError) as error:
        no_network = isinstance(error, LocalEntryNotFoundError) or offline
        cause = "no network" if no_network else type(error).__name__
        raise ModelError(
            f"model_name_or_path={name!r} (revision {revision}): not a folder here, and the hub gave no config.json "
            f"({cause}). Fix: {_WITHOUT_NETWORK if no_network else _WITH_NETWORK}"
        ) from error


_WITH_NETWORK = "check the name; for a gated model set HF_TOKEN; or give a local folder of the model."
_WITHOUT_NETWORK = (
    "give a local folder of the model; for a plan one that holds its config.json will do. Plans and dry runs of "
    f"{some_names(KNOWN_MODELS, 3)} (docs/planning.md names all) need no network."
)


def _hub_has_an_address() -> bool:
    """Tell whether the hub's name can be resolved; a proxy may resolve what this machine can't."""
    from huggingface_hub.constants import ENDPOINT

    if any(name.lower() in {"https_proxy", "http_proxy", "all_proxy"} for name in os.environ):
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True
