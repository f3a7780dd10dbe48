"""A model's shape as its own class has it, on the meta device: for kinds of model that the formulas don't know.

Nothing is downloaded but `config.json`, and of a model with code of its own that code, where the run trusts it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from rm_scale.errors import ModelError
from rm_scale.logs import get_logger
from rm_scale.modeling.adapters import default_targets
from rm_scale.modeling.experts import expert_tensors, reason_against_router_loss, routers
from rm_scale.modeling.fake_step import Batch, Measured, count_forward, run_micro_step, set_up, weight_type
from rm_scale.modeling.head import HEAD_NAMES, active_head, install_scalar_head
from rm_scale.modeling.loading import NO_CLASS
from rm_scale.modeling.zero_init import without_zero_init
from rm_scale.planning.activations.activation_memory import ActivationMemory, Part
from rm_scale.planning.activations.settings import Options, Row
from rm_scale.planning.classifiers import no_classifier
from rm_scale.planning.layer_parts import Experts
from rm_scale.planning.model_class import ModelClass, Operations
from rm_scale.planning.parameters import Role, Tensor, backbone_tensors
from rm_scale.planning.shape import ModelShape, is_known, shape_from_config
from rm_scale.texts import one_line

logger = get_logger(__name__)

_ROWS, _LENGTH = 2, 256
"""Size of the smallest micro-step tried, in sequences and tokens; others have twice as many of one of them."""
_LINEAR = (torch.nn.Linear, Conv1D)
"""Conv1D is GPT-2's linear layer, as adapters and 4-bit weights know it; its matrix is the other way round."""


def exact_shape(
    name: str, revision: str = "main", trust_remote_code: bool = False, values: dict[str, Any] | None = None
) -> ModelShape:
    """Return the shape of a model as its class has it.

    Args:
        name: a folder or a hub name.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model.
        values: content of its config.json, where that is not to be read from `name`.

    Raises:
        ModelError: transformers has no class for it, or can't build it.
    """
    try:
        if values is not None and not trust_remote_code:
            settings = dict(values)
            config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        else:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        raise ModelError(
            f"model_name_or_path={name!r}: transformers can't read what kind of model it is ({one_line(error, 200)}). "
            "Fix: use a model that this transformers knows; for one with code of its own, --trust_remote_code if you "
            "trust it."
        ) from error
    return _shape(_Source(config, None, trust_remote_code))


def shape_of_loaded(model: PreTrainedModel | PeftModel) -> ModelShape:
    """Return the shape of a loaded model by what its config now says: by the formulas, else as its class has it.

    Raises:
        ModelError: the formulas don't know it, and its class can't be built without content.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    values = base.config.to_dict()
    if is_known(values) and not type(base).__module__.startswith(_OWN_CODE):
        return shape_from_config(values)
    return _shape(_Source(base.config, type(base), False))


_OWN_CODE = "transformers_modules"
"""Where transformers puts Python code that comes with a model."""


class _Source:
    """What a model without content is built from; equal where the same comes out."""

    def __init__(self, config: PreTrainedConfig, kind: type[PreTrainedModel] | None, trusts: bool) -> None:
        self.config = copy.deepcopy(config)
        self.config.num_labels = 1
        self.config.use_cache = False
        self.config._attn_implementation = None  # the class's default
        text = self.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = 0  # several rows need one
        self.kind, self.trusts = kind, trusts

    @property
    def key(self) -> tuple[Any, ...]:
        """Tell two sources apart."""
        return (json.dumps(self.config.to_dict(), sort_keys=True, default=str), self.kind, self.trusts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def build(self, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
        """Return the classifier on the meta device, with its scalar head.

        Raises:
            ModelError: transformers has no classifier for it, or can't build it.
        """
        config = copy.deepcopy(self.config)
        config.__dict__.pop("quantization_config", None)  # `set_up` does that
        try:
            with without_zero_init(), torch.device("meta"):
                if self.kind is not None:
                    model = self.kind._from_config(config, dtype=dtype)
                else:
                    model = AutoModelForSequenceClassification.from_config(
                        config, dtype=dtype, trust_remote_code=self.trusts
                    )
        except ModelError:
            raise
        except Exception as error:  # a class may fail at anything in its config
            if NO_CLASS in str(error):
                raise ModelError(no_classifier("the model", config.model_type)) from error
            raise ModelError(
                f"model type {config.model_type!r}: transformers can't build a sequence classifier of it "
                f"({type(error).__name__}: {one_line(error, 200)}). Fix: use a decoder-only model that "
                "AutoModelForSequenceClassification knows."
            ) from error
        install_scalar_head(model)
        built: PreTrainedModel = model
        return built


@cache
def _shape(source: _Source) -> ModelShape:
    model = source.build()
    text = source.config.get_text_config()
    hidden = active_head(model).in_features
    heads = _number(text, "num_attention_heads", "num_heads", default=1)
    return ModelShape(
        model_type=str(text.model_type),
        hidden_size=hidden,
        num_layers=_number(text, "num_hidden_layers", "num_layers", default=1),
        num_heads=heads,
        num_kv_heads=_number(text, "num_key_value_heads", default=heads),
        head_dim=_number(text, "head_dim", "attention_head_dim", default=max(1, hidden // heads)),
        intermediate_size=_number(text, "intermediate_size", default=4 * hidden),
        vocab_size=_number(text, "vocab_size", default=_largest_embedding(model)),
        max_positions=_number(text, "max_position_embeddings", default=0) or None,
        quantization=_quantization(source.config),
        experts=_experts(model, text),
        exact=ModelClass(
            name=type(model).__name__,
            tensors=class_tensors(model),
            micro_steps=FakeMicroSteps(source),
            expert_names=tuple(name for name, p in expert_tensors(model).items() if p.dim() == 3),
            no_router_loss=reason_against_router_loss(model),
        ),
    )


def _number(config: PreTrainedConfig, *names: str, default: int) -> int:
    """Return the first of several numbers that a config has; of a list, which has one per layer, the largest."""
    for name in names:
        value = getattr(config, name, None)
        value = max(value, default=None) if isinstance(value, list) else value
        if isinstance(value, int) and value:
            return value
    return default


def _largest_embedding(model: PreTrainedModel) -> int:
    return max((m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)), default=1)


def _quantization(config: PreTrainedConfig) -> str | None:
    values = getattr(config, "quantization_config", None)
    return values.get("quant_method") if isinstance(values, dict) else None


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "top_k", "moe_topk")


def _experts(model: PreTrainedModel, text: PreTrainedConfig) -> Experts | None:
    """Return how many experts there are and how many a token goes through; its widths are the largest expert's."""
    matrices = [p for p in expert_tensors(model).values() if p.dim() == 3]
    if not matrices:
        return None
    num = max(p.shape[0] for p in matrices)
    return Experts(num, min(num, _number(text, *_CHOSEN, default=num)), max(min(p.shape[1:]) for p in matrices))


# --- Its parameters ---------------------------------------------------------------------------------------------------


def class_tensors(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Return the parameters of a model's backbone by role, those alike together; the head is left out."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    experts, choosers, adapted = set(expert_tensors(model)), set(routers(model)), _adapted(model)
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    found: Counter[Tensor] = Counter()
    for name, parameter in model.named_parameters():
        parent, _, last = name.rpartition(".")
        if set(HEAD_NAMES) & set(name.split(".")):
            continue
        role = _role(name, parameter, modules[parent], name in decayed, name in experts, parent in choosers)
        if name in experts:
            short = f"experts.{last}"
        elif role == "router":
            short = f"router.{last}"
        else:
            short = f"{parent.rpartition('.')[2]}.{last}" if parent else last
        size = tuple(parameter.shape)
        outputs_first = size[::-1] if isinstance(modules[parent], Conv1D) and len(size) == 2 else size
        quantised = type(modules[parent]) in _LINEAR
        found[Tensor(short, outputs_first, role, 1, parent in adapted, quantised, shared[id(parameter)])] += 1
    return tuple(replace(tensor, count=count) for tensor, count in found.items())


def _role(
    name: str, parameter: torch.nn.Parameter, module: torch.nn.Module, decays: bool, is_expert: bool, chooses: bool
) -> Role:
    if not decays:
        return "vector"
    if is_expert and parameter.dim() == 3:
        return "experts"
    if chooses and parameter.dim() == 2:
        return "router"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, _LINEAR) and parameter.dim() == 2:
        return "linear"
    return "other"


def _adapted(model: PreTrainedModel) -> set[str]:
    """Return the names of the modules that LoRA adapts where no targets are named."""
    targets = default_targets(model)
    if not isinstance(targets, str):
        return set(targets)
    return {name for name, module in model.named_modules() if isinstance(module, _LINEAR)}


# --- Its micro-steps --------------------------------------------------------------------------------------------------


class FakeMicroSteps:
    """Micro-steps of a class on fake tensors: small ones are run, and what larger ones take is worked out.

    What a step takes is a + b x tokens + c x tokens x length. Three small steps tell the three apart, as long as the
    gradient of the embedding, which does not grow with the tokens, stays out of them; it is counted by itself.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._operations: Operations | None = None
        self._measured: dict[Options, tuple[_Growth, _Growth]] = {}

    @property
    def _length(self) -> int:
        # Layers that work in chunks of tokens fill the last one up.
        return max(_LENGTH, _number(self._source.config.get_text_config(), "chunk_size", default=0))

    def operations(self) -> Operations:
        """Count the operations of a forward pass.

        Raises:
            ModelError: the class can't be run on fake tensors.
        """
        if self._operations is None:
            sizes = (self._length, 2 * self._length)
            with self._telling_what_fails():
                counts = [count_forward(self._source.build().eval(), partial(_batch, _ROWS, size)) for size in sizes]
            short, long = (count / (_ROWS * size) for count, size in zip(counts, sizes, strict=True))
            # torch counts attention as if all saw all: 4 x width x length operations per token.
            width = max(0.0, long - short) / self._length / 4
            weights = (short - 4 * width * self._length) / 2 - _shape(self._source).hidden_size  # the head's
            self._operations = Operations(round(weights), round(width))
        return self._operations

    def activations(self, row: Row, options: Options) -> ActivationMemory:
        """Say what a micro-step of padded rows needs.

        Raises:
            ModelError: the class can't be run on fake tensors.
        """
        stored, peak = self._growth(options)
        tokens, length = row.tokens, row.longest or row.tokens // max(1, row.responses)
        kept, most = stored.at(tokens, length), peak.at(tokens, length)
        at_end, formula = self._embedding_gradient(options, tokens)
        if at_end > most:
            part = Part(at_end, formula, False)
            return ActivationMemory(kept, at_end, "backward: gradient of embedding", {"gradient of embedding": part})
        parts = {
            "kept for the backward pass": Part(min(kept, most), stored.describe(), True),
            "passing": Part(most - min(kept, most), f"{peak.describe()}, less what is kept", False),
        }
        return ActivationMemory(min(kept, most), most, "the worst moment of the class", parts)

    def _growth(self, options: Options) -> tuple[_Growth, _Growth]:
        """Return how what is stored and the peak grow, for steps run in this way."""
        way = replace(options, attention="varlen", head="score_all", as_tracked=False)
        if way not in self._measured:
            length = self._length
            sizes = [(_ROWS, length), (2 * _ROWS, length), (_ROWS, 2 * length)]
            with self._telling_what_fails():
                steps = [self._run(way, rows, tokens) for rows, tokens in sizes]
            stored = _Growth.through(length, [step.stored_bytes for step in steps])
            self._measured[way] = stored, _Growth.through(length, [step.peak_bytes for step in steps])
        return self._measured[way]

    def _run(self, options: Options, rows: int, length: int) -> Measured:
        logger.debug(f"micro-step of {self._source.config.model_type} on fake tensors: {rows} x {length} tokens")
        model = self._source.build(weight_type(options))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.requires_grad_(False)
        ready: Any = set_up(model, options)
        if options.method == "full":
            ready.enable_input_require_grads()  # as if the embedding were trained
        return run_micro_step(ready, lambda: _batch(rows, length), lambda model, batch: _loss(model, batch, options))

    def _embedding_gradient(self, options: Options, tokens: int) -> tuple[int, str]:
        """Return what is alive when the embedding's gradient is there, and its formula."""
        text = self._source.config.get_text_config()
        width = 2 if options.precision == "bf16" else 4
        if options.method != "full":
            return 0, ""
        weights = width * int(text.vocab_size) * int(text.hidden_size)
        return weights + width * tokens * int(
            text.hidden_size
        ), f"vocab x hidden x {width} B + tokens x hidden x {width} B"

    @contextmanager
    def _telling_what_fails(self) -> Iterator[None]:
        try:
            yield
        except ModelError:
            raise
        except Exception as error:  # a class may do anything with its tensors
            raise ModelError(
                f"model type {self._source.config.model_type!r}: its class can't be run without content "
                f"({type(error).__name__}: {one_line(error, 200)}), so that memory and time can't be predicted. "
                "Fix: start the run without a plan (python, torchrun or deepspeed with rm_scale/train.py) and look at "
                "run/plan_check.json, or take a model of a family in docs/models.md."
            ) from error


@dataclass(frozen=True)
class _Growth:
    """Bytes as they grow with a step: constant + per_token x tokens + per_pair x tokens x length."""

    constant: float
    per_token: float
    per_pair: float

    @classmethod
    def through(cls, length: int, found: Sequence[int]) -> _Growth:
        """Return what goes through three steps: of `_ROWS` x length tokens, twice the rows, twice the length."""
        first, more_rows, longer = found
        per_pair = max(0, longer - more_rows) / (2 * _ROWS * length * length)
        per_token = (more_rows - first) / (_ROWS * length) - per_pair * length
        return cls(first - _ROWS * length * (per_token + per_pair * length), per_token, per_pair)

    def at(self, tokens: int, length: int) -> int:
        """Return the bytes of a step of so many tokens in sequences of this length."""
        return max(0, round(self.constant + tokens * (self.per_token + self.per_pair * length)))

    def describe(self) -> str:
        """Return it as a formula, in bytes."""
        text = f"{self.constant:.4g} B + {self.per_token:.4g} B x tokens"
        return text + (f" + {self.per_pair:.4g} B x tokens x length" if self.per_pair else "")


def _batch(rows: int, length: int) -> Batch:
    return {"input_ids": torch.ones(rows, length, dtype=torch.long)}


def _loss(model: torch.nn.Module, batch: Batch, options: Options) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.precision == "amp"):
        rewards = model(**batch, use_cache=False).logits[:, 0].float()
    return -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).sum()


# --- Against the formulas ---------------------------------------------------------------------------------------------


def differences(formula: ModelShape, exact: ModelShape) -> list[str]:
    """Say where the tensors that the formulas count are not those of the class; none: they are the same."""
    assert exact.exact is not None
    by_formula, by_class = _by_size(backbone_tensors(formula)), _by_size(exact.exact.tensors)
    return [
        f"{role} tensors of {size:,} weights: {by_formula[role, size]} by formula, {by_class[role, size]} in the class"
        for role, size in sorted(by_formula.keys() | by_class.keys())
        if by_formula[role, size] != by_class[role, size]
    ]


def _by_size(tensors: Iterable[Tensor]) -> Counter[tuple[str, int]]:
    sizes: Counter[tuple[str, int]] = Counter()
    for tensor in tensors:
        sizes["4-bit linear" if tensor.is_4bit else tensor.role, tensor.numel] += tensor.count
    return sizes
