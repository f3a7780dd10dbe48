"""Heads are known by their tensors: whatever trainer saved them, they are used exactly, or refused by name."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from rm_scale.config_parsing import config_from_dict
from rm_scale.errors import ModelError
from rm_scale.modeling.head import active_head
from rm_scale.modeling.loading import LoadedModel, load_for_training, load_reward_model
from rm_scale.modeling.stored_head import find_stored_head, head_to_start_from
from rm_scale.modeling.token_scores import score_sequences
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.planning.plan import make_plan

META = {"format": "pt"}
SEQUENCES = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]


def head_of(folder: Path, seed: int = 5) -> torch.Tensor:
    """Return a head for the model, which bf16 can't hold."""
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    return torch.randn(1, width, generator=torch.Generator().manual_seed(seed))


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{key.replace("__", "."): value for key, value in tensors.items()}}, file, META)


def llama_factory(folder: Path, head: torch.Tensor) -> None:
    save_file(
        {"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.safetensors", META
    )


def llama_factory_pickled(folder: Path, head: torch.Tensor) -> None:
    torch.save({"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)}, folder / "value_head.bin")


def trl_value_model(folder: Path, head: torch.Tensor) -> None:
    add_tensors(folder, v_head__summary__weight=head, v_head__summary__bias=torch.zeros(1))


def openrlhf(folder: Path, head: torch.Tensor) -> None:
    add_tensors(folder, value_head__weight=head)
    edit_config(folder, architectures=["RewardModel"], normalize_reward=True, mean=0.5, std=2.0)


def openrlhf_score(folder: Path, head: torch.Tensor) -> None:
    """Under transformers' own name, but a config that knows nothing of it: transformers takes it for two outputs."""
    add_tensors(folder, score__weight=head)
    edit_config(folder, architectures=["RewardModel"])


def one_output_called_two(folder: Path, head: torch.Tensor) -> None:
    add_tensors(folder, score__weight=head)
    labels = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    edit_config(folder, architectures=["LlamaForSequenceClassification"], **labels)


def one_output_language_head(folder: Path, head: torch.Tensor) -> None:
    edit_config(folder, tie_word_embeddings=False)
    add_tensors(folder, lm_head__weight=head)


WRITERS = [
    llama_factory,
    llama_factory_pickled,
    trl_value_model,
    openrlhf,
    openrlhf_score,
    one_output_called_two,
    one_output_language_head,
]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def load(folder: Path, **settings: object) -> LoadedModel:
    values = {"model_name_or_path": str(folder), "dataset_path": str(folder / "config.json"), "bf16": False, **settings}
    parsed = config_from_dict(values)
    plan = make_plan(parsed, 1, "cpu", check_output=False)
    return load_for_training(parsed.config, plan, load_tokenizer(str(folder)))


def rewards_of_transformers(folder: Path, tiny_model: Path, head: torch.Tensor) -> list[float]:
    """Return what the language model with this head gives, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32).eval()
    model.score.weight.data = head.clone()
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in SEQUENCES]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("rm_scale"), "propagate", True)
    caplog.set_level(logging.INFO, logger="rm_scale")
    return caplog


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_head_is_loaded_whoever_saved_it(
    write: Callable[[Path, torch.Tensor], None], model: Path, tiny_model: Path, messages: pytest.LogCaptureFixture
) -> None:
    head = head_of(model)
    write(model, head)
    for settings in ({}, {"bf16": True, "dtype": "bfloat16", "use_peft": True}):
        messages.clear()
        loaded = load(model, **settings)
        assert torch.equal(active_head(loaded.model).effective_weight(), head)
        assert loaded.saved_head is not None and torch.equal(loaded.saved_head, head)
        assert "loaded from the checkpoint" in messages.text and "reward head score: new" not in messages.text
    scored = score_sequences(load_reward_model(model, torch.float32), SEQUENCES, 0, 1, "cpu")
    assert scored == pytest.approx(rewards_of_transformers(model, tiny_model, head), abs=1e-5)


def test_a_frozen_copy_of_the_head_beside_adapters_is_the_loaded_one(model: Path) -> None:
    head = head_of(model)
    llama_factory(model, head)
    loaded = load(model, use_peft=True)
    copies = [
        tensor for name, tensor in loaded.model.state_dict().items() if name.endswith("weight") and "score" in name
    ]
    assert len(copies) == 2 and all(torch.equal(copy, head) for copy in copies)


def test_a_constant_is_part_of_scores_and_left_out_of_training(
    model: Path, tiny_model: Path, messages: pytest.LogCaptureFixture
) -> None:
    head = head_of(model)
    side = {"v_head.summary.weight": head, "v_head.summary.bias": torch.tensor([0.75])}
    save_file(side, model / "value_head.safetensors", META)
    scored = score_sequences(load_reward_model(model, torch.float32), SEQUENCES, 0, 1, "cpu")
    assert scored == pytest.approx([0.75 + one for one in rewards_of_transformers(model, tiny_model, head)], abs=1e-5)
    trained = score_sequences(load(model).model, SEQUENCES, 0, 1, "cpu")
    assert [a - b for a, b in zip(scored, trained, strict=True)] == pytest.approx([0.75, 0.75], abs=1e-5)
    assert "its constant (v_head.summary.bias=0.75) is left out" in messages.text


def test_what_is_no_head_of_one_output_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    width = head_of(model).shape[1]

    def case(name: str, change: Callable[[Path], None], message: str) -> None:
        folder = Path(shutil.copytree(model, tmp_path / name))
        change(folder)
        with pytest.raises(ModelError, match=message):
            load(folder)

    many = torch.randn(19, width)
    case("two", lambda f: add_tensors(f, score__weight=torch.randn(2, width)), r"a classifier with 2 outputs \(score")
    case(
        "layers", lambda f: add_tensors(f, v_head__summary__0__weight=many), r"can't be used here \(v_head\.summary\.0"
    )
    case("many", lambda f: add_tensors(f, regression_layer__weight=many), r"can't be used here \(regression_layer\.w")
    case(
        "narrow", lambda f: llama_factory(f, torch.ones(1, width - 1)), r"head is \(1, \d+\), the model's hidden states"
    )

    def two_heads(folder: Path) -> None:
        add_tensors(folder, value_head__weight=head_of(folder))
        llama_factory(folder, head_of(folder))

    case("twice", two_heads, r"holds 2 heads of one output \(value_head\.weight in .*v_head\.summary\.weight in value")
    case(
        "promised",
        lambda f: edit_config(f, architectures=["LlamaForRewardModel"]),
        r"config\.json says LlamaForRewardM",
    )
    strange = {"something": torch.ones(3)}
    case(
        "strange",
        lambda f: save_file(strange, f / "value_head.safetensors", META),
        r"value_head\.safetensors: holds no h",
    )
    case("pickle", lambda f: (f / "value_head.bin").write_bytes(b"x"), r"value_head\.bin: can't be read as tensors")


def test_a_classifier_whose_head_is_missing_is_refused(model: Path) -> None:
    edit_config(model, architectures=["LlamaForSequenceClassification"], num_labels=1)
    with pytest.raises(ModelError, match=r"the weights hold no head .*it would be random"):
        head_to_start_from(str(model))
    with pytest.raises(ModelError, match=r"its weights hold no reward head; it would be random"):
        load_reward_model(model)


def test_a_reward_that_is_the_logit_of_one_of_several_tokens_is_refused(
    model: Path, messages: pytest.LogCaptureFixture
) -> None:
    vocabulary, width = json.loads((model / "config.json").read_text())["vocab_size"], head_of(model).shape[1]
    output = torch.zeros(vocabulary, width)
    output[:2] = 1.0
    named = Path(shutil.copytree(model, model.parent / "Tiny-1B-Reward-HF"))
    add_tensors(model, lm_head__weight=output)
    with pytest.raises(ModelError, match=r"language head lm_head\.weight is zero for nearly all tokens"):
        load(model)
    # Where the tensors don't tell, the name does.
    load(named)
    assert "is called a reward model, but its weights hold no reward head" in messages.text


def test_gates_and_embeddings_of_one_row_are_no_heads(model: Path) -> None:
    one = head_of(model)
    add_tensors(model, model__layers__0__mlp__gate__weight=one, model__type_embeddings__weight=one.clone())
    assert find_stored_head(str(model)) is None


def test_a_sharded_checkpoints_head_is_found(model: Path, tmp_path: Path) -> None:
    set_seed(2)
    whole = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    stored = find_stored_head(str(tmp_path / "shards"))
    assert stored is not None and torch.equal(stored.weight(), whole.score.weight)


WIDTH = 32
NO_PLACE: list[dict[str, torch.Tensor]] = [
    {"fc.weight": torch.ones(4, WIDTH)},
    {"out_proj.weight": torch.ones(2, WIDTH)},
    {"linear.weight": torch.ones(3, WIDTH), "linear.bias": torch.ones(3)},
    {"rm.0.weight": torch.ones(16, WIDTH), "rm.2.weight": torch.ones(1, 16)},
    {"model.rm.0.weight": torch.ones(16, WIDTH), "model.rm.2.weight": torch.ones(1, 16)},
    {"rm.weight": torch.ones(WIDTH)},
    {"rm.weight": torch.ones(WIDTH, 1)},
    {"model.reward_head.weight": torch.ones(5, WIDTH)},
    {"lm_head.weight": torch.ones(5, WIDTH)},
    {"model.layers.2.mlp.up_proj.weight": torch.ones(64, WIDTH)},
    {"score.weight": torch.ones(1, WIDTH), "dense.weight": torch.ones(WIDTH, WIDTH)},
    {"score.weight": torch.ones(1, WIDTH), "pre_proj.weight": torch.ones(WIDTH, WIDTH)},
]


@pytest.mark.parametrize("tensors", NO_PLACE, ids=lambda tensors: " ".join(tensors))
def test_tensors_without_a_place_are_refused_whatever_their_names(
    model: Path, tensors: dict[str, torch.Tensor]
) -> None:
    assert head_of(model).shape == (1, WIDTH)
    add_tensors(model, **tensors)
    first = re.escape(min(set(tensors) - {"score.weight"}))
    with pytest.raises(ModelError, match=rf"can't be used here \({first}.*take them out of the safetensors files"):
        load(model)
    if "score.weight" in tensors:
        with pytest.raises(ModelError, match=rf"can't be used here \({first}"):
            load_reward_model(model)


def test_what_no_reward_needs_is_left_out(model: Path) -> None:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tensors = {
        "lm_head.weight": torch.randn(vocabulary, WIDTH),
        "lm_head.bias": torch.ones(vocabulary),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.attn.bias": torch.ones(1, 1, 8, 8),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.num_tokens_seen": torch.tensor(3),
    }
    add_tensors(model, **tensors)
    assert not load(model).head_was_found


def test_what_transformers_leaves_out_by_design_is_left_out() -> None:
    """Qwen3-Next's checkpoints hold layers that predict a further token, which the causal model names."""
    from rm_scale.modeling.unexpected_tensors import _ignored_by_design

    with torch.device("meta"):
        config = AutoConfig.for_model(
            "qwen3_next", num_hidden_layers=1, hidden_size=16, num_experts=2, vocab_size=50, num_labels=1
        )
        ignored = _ignored_by_design(AutoModelForSequenceClassification.from_config(config))
    assert ignored is not None and ignored.search("mtp.layers.0.mlp.gate.weight") and not ignored.search("fc.weight")


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("reward_head.safetensors", "weight"),
        ("score.safetensors", "score.weight"),
        ("v_head.safetensors", "v_head.summary.weight"),
        ("reward_head.bin", "weight"),
    ],
)
def test_a_head_in_a_file_of_any_name_is_used(model: Path, tiny_model: Path, file: str, key: str) -> None:
    head = head_of(model)
    tensors = {key: head, key.replace("weight", "bias"): torch.zeros(1)}
    if file.endswith(".bin"):
        torch.save(tensors, model / file)
    else:
        save_file(tensors, model / file, META)
    stored = find_stored_head(str(model))
    assert stored is not None and stored.describe() == f"{key} in {file}" and torch.equal(stored.weight(), head)
    scored = score_sequences(load_reward_model(model, torch.float32), SEQUENCES, 0, 1, "cpu")
    assert scored == pytest.approx(rewards_of_transformers(model, tiny_model, head), abs=1e-5)


@pytest.mark.parametrize("file", ["mlp_head.safetensors", "value_head.safetensors", "model-00002-of-00002.safetensors"])
def test_a_file_beside_the_weights_that_is_no_head_alone_is_refused(model: Path, file: str) -> None:
    save_file({"dense.weight": torch.ones(WIDTH, WIDTH), "out.weight": torch.ones(1, WIDTH)}, model / file, META)
    with pytest.raises(ModelError, match=rf"{re.escape(file)}: holds no head of one output alone but \['dense\.weight"):
        load(model)


def test_two_files_with_a_head_are_refused(model: Path) -> None:
    for file in ("score.safetensors", "v_head.safetensors"):
        save_file({"v_head.weight": head_of(model)}, model / file, META)
    with pytest.raises(ModelError, match=r"holds 2 heads of one output \(v_head\.weight in score.*in v_head\.safet"):
        load(model)


def test_copies_of_the_weights_and_states_of_a_training_are_no_heads(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({key: tensor.half() for key, tensor in weights.items()}, model / "model.fp16.safetensors", META)
    save_file({"lm_head.weight": torch.ones(400, WIDTH)}, model / "model-00002-of-00002.safetensors", META)
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 4)}, model / "consolidated.safetensors", META)
    save_file(
        {"layers.0.attention.wq.weight": torch.ones(4, 4)}, model / "consolidated-00001-of-00002.safetensors", META
    )
    torch.save(weights, model / "pytorch_model.bin")
    torch.save({"state": {0: torch.ones(1, WIDTH)}}, model / "optimizer.bin")
    (model / "training_args.bin").write_bytes(b"PK\x03\x04 no tensors")
    (model / "vocabulary.bin").write_bytes(b"words")
    assert find_stored_head(str(model)) is None
    assert not load(model).head_was_found
