"""A model's shape, read from its `config.json` alone, before any weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.errors import ModelError


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
        gated_mlp: three MLP matrices (gate, up, down) rather than two.
        vocab_size: rows of the embedding.
        max_positions: longest sequence the positions allow, `None` when there is no limit.
        quantization: method name when the checkpoint itself is quantised, else `None`.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    gated_mlp: bool
    vocab_size: int
    max_positions: int | None = None
    quantization: str | None = None

    @property
    def num_parameters(self) -> int:
        """Backbone parameters (embedding, layers, norms; no language-model head, which a reward model drops)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_layers * (attention + mlp + norms) + self.hidden_size


# Two-matrix MLPs; everything else transformers ships as a causal LM today is gated.
_PLAIN_MLP_TYPES = {"gpt2", "gpt_neox", "phi", "opt", "gptj", "bloom", "falcon", "starcoder2", "mpt"}


def shape_from_config(config: dict[str, Any]) -> ModelShape:
    """Read the shape from the dictionary in `config.json`.

    Raises:
        ModelError: a needed key is missing, so this is not a decoder-only transformer that we know how to read.
    """
    text = config.get("text_config", config)

    def need(*names: str) -> int:
        for name in names:
            if isinstance(text.get(name), int):
                return int(text[name])
        raise ModelError(
            f"config.json of model type {config.get('model_type')!r} has none of {', '.join(names)}: its "
            "shape can't be "
            "read. Fix: use a decoder-only language model in transformers' format."
        )

    hidden = need("hidden_size", "n_embd", "d_model")
    heads = need("num_attention_heads", "n_head", "n_heads")
    quantization = config.get("quantization_config") or {}
    return ModelShape(
        model_type=str(config.get("model_type", "unknown")),
        hidden_size=hidden,
        num_layers=need("num_hidden_layers", "n_layer", "n_layers"),
        num_heads=heads,
        num_kv_heads=int(text.get("num_key_value_heads") or heads),
        head_dim=int(text.get("head_dim") or hidden // heads),
        intermediate_size=int(text.get("intermediate_size") or text.get("n_inner") or 4 * hidden),
        gated_mlp=config.get("model_type") not in _PLAIN_MLP_TYPES,
        vocab_size=need("vocab_size"),
        max_positions=text.get("max_position_embeddings") or text.get("n_positions"),
        quantization=quantization.get("quant_method"),
    )


def read_model_config(name: str, revision: str = "main") -> dict[str, Any]:
    """The `config.json` of a local folder or a hub model.

    Raises:
        ModelError: nothing of that name, or the file can't be read.
    """
    folder = Path(name)
    if folder.exists():
        return _read_local(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(
            f"model_name_or_path={name!r}: there is no such folder. Fix: give a folder that holds config.json."
        )
    return _read_json(_download(name, revision), name)


def _read_local(folder: Path) -> dict[str, Any]:
    for file_name in ("config.json", "adapter_config.json"):
        path = folder / file_name
        if not path.is_file():
            continue
        if file_name == "adapter_config.json":
            raise ModelError(
                f"model_name_or_path={str(folder)!r}: holds a LoRA adapter, not a model. Fix: merge it first "
                "(merge_adapter: true when training it) and give the merged folder."
            )
        return _read_json(path, str(folder))
    raise ModelError(
        f"model_name_or_path={str(folder)!r}: the folder has no config.json. Fix: give a folder in "
        "transformers' format."
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: {path.name} can't be read ({error}). Fix: download the model again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"model_name_or_path={name!r}: {path.name} is not a JSON object. Fix: download the model again."
        )
    return config


def _download(name: str, revision: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, OSError, ValueError) as error:
        cause = type(error).__name__
        raise ModelError(
            f"model_name_or_path={name!r} (revision {revision}): not a folder here, and the hub gave no config.json "
            f"({cause}). Fix: check the name; for a gated model set HF_TOKEN; without network give a local folder."
        ) from error
