"""Exports for vLLM, SGLang and TEI: what each needs is written, and what an engine can't serve rightly is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rm_scale.cli import main
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.errors import ModelError
from rm_scale.inference.export.engine_architectures import (
    SGLANG_CLASSES,
    VLLM_CLASSES,
    VLLM_NOT,
    VLLM_OVERRIDES,
    VLLM_THROUGH_TRANSFORMERS,
)
from rm_scale.inference.export.engine_facts import EngineFacts
from rm_scale.inference.export.for_engines import class_problems, prepare_for_engines
from rm_scale.inference.export.sglang_engine import BIAS_FILE, prepare_sglang
from rm_scale.inference.export.tei_engine import LIMIT_FILE
from rm_scale.inference.export.vllm_chat_template import TEMPLATE_FILE, write_chat_template
from rm_scale.inference.export.vllm_engine import prepare_vllm
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.scoring_contract import ScoringContract
from rm_scale.modeling.tokenizers import read_tokenizer
from rm_scale.output_paths import foreign_files, list_files
from tests.support.families import FAMILIES, tiny_classifier, tiny_config
from tests.support.foreign_models import llama_factory, written
from tests.support.launching import read_json
from tools import engine_architectures

PAIRS = [
    ("What is 2 + 2?", " 4"),
    ("Name a colour. ", "\n  🟥 rouge \n"),
    ("", "No prompt."),
    ("Ends by itself.", " yes<eos>"),
    ("Say nothing.", ""),
]


@pytest.fixture
def folder(full_run: Path, tmp_path: Path) -> Path:
    """What an export holds, of a model that was trained on plain text."""
    target = tmp_path / "model"
    shutil.copytree(full_run, target, ignore=shutil.ignore_patterns("run", "checkpoint-*"))
    list_files(target)
    return target


def change_config(folder: Path, **values: Any) -> None:
    config = {**read_json(folder / "config.json"), **values}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


# --- vLLM -------------------------------------------------------------------------------------------------------------


def ids_in_vllm(tokenizer: PreTrainedTokenizerBase, template: str, query: str, document: str) -> list[int]:
    """As vLLM 0.32's scoring does: two messages by the template of --chat-template, then the special tokens."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tools=None, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=True)["input_ids"]
    return ids


def test_plain_text_in_vllm(folder: Path) -> None:
    (folder / "mine.txt").write_text("not listed")
    (ready,) = prepare_for_engines(folder, ["vllm", "vllm"])
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    template = (folder / TEMPLATE_FILE).read_text()
    for prompt, answer in PAIRS:
        assert ids_in_vllm(scorer.tokenizer, template, prompt, answer) == scorer.encoder.encode_one(prompt, answer)
    assert ready.command("outputs/my model") == (
        "vllm serve 'outputs/my model' --runner pooling --dtype float32 --chat-template "
        "'outputs/my model/vllm_chat_template.jinja' --max-model-len 1024"
    )
    assert ready.request().startswith("curl -s http://localhost:8000/score -H ")
    record = read_json(folder / "rm_scale_export.json")
    assert record["engines"]["vllm"]["rules_of"] == "vLLM 0.32.0" and len(record["engines"]["vllm"]["checked"]) == 4
    assert "FOLDER" in record["engines"]["vllm"]["serve"]
    assert foreign_files(folder) == ["mine.txt"]


CHATML = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TEMPLATES = {
    "line break at both ends": f"\n  {CHATML}\n\n",
    "opens with BOS": "{{ bos_token }}" + CHATML + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "strips, macro and namespace": (
        "{%- macro turn(m) -%}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{%- endmacro -%}\n"
        "{%- set ns = namespace(count=0) -%}{{- bos_token -}}"
        "{%- for m in messages -%}{%- set ns.count = ns.count + 1 -%}{{ turn(m) }}{%- endfor -%}\n{{- '\n' -}}"
    ),
    "a loop of text parts alone": (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is not string %}"
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    ),
}


def facts_of(
    folder: Path, tiny_model: Path, template: str, adds_bos: bool, conversations: bool = True
) -> tuple[EngineFacts, TextEncoder]:
    """An export without weights, whose golden sequences show what it was trained on."""
    tokenizer = read_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    if adds_bos:
        special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=special
        )
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=256))
    user, assistant = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    golden = encoder.encode([user], [assistant]) if conversations else encoder.encode("Why?", " So.")
    contract = ScoringContract(
        encoding=encoder.describe(),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        dtype="float32",
        compute_dtype="float32",
        base_model=None,  # type: ignore[arg-type]  # not read here
    ).with_golden([golden], [0.0])
    return EngineFacts(folder, contract, tokenizer), encoder


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_conversations_in_vllm(tiny_model: Path, tmp_path: Path, name: str, adds_bos: bool) -> None:
    own = TEMPLATES[name]
    facts, encoder = facts_of(tmp_path, tiny_model, own, adds_bos)
    if adds_bos and "bos_token" not in own:
        with pytest.raises(ModelError, match=r"no chat template gives its /score the token ids of training: .*Fix: "):
            write_chat_template(facts)
        assert not (tmp_path / TEMPLATE_FILE).exists()
        return
    assert facts.reads_conversations and write_chat_template(facts) >= 4
    template = (tmp_path / TEMPLATE_FILE).read_text()
    for prompt, answer in PAIRS:
        messages = [{"role": "user", "content": prompt}] if prompt else []
        expected = encoder.encode(messages, [{"role": "assistant", "content": answer}])
        assert ids_in_vllm(facts.tokenizer, template, prompt, answer) == expected
    # Messages of a request to /classify: the model's own template, and never an opening for another answer.
    talk = [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "Yes."}]
    form = encoder._renderer
    if form._facts(own).wants_parts:
        talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    shown = facts.tokenizer.apply_chat_template(
        talk, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert shown == facts.tokenizer.apply_chat_template(talk, chat_template=own, tokenize=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_training_beside_a_chat_template(tiny_model: Path, tmp_path: Path, name: str) -> None:
    facts, encoder = facts_of(tmp_path, tiny_model, TEMPLATES[name], "bos_token" in TEMPLATES[name], False)
    assert not facts.reads_conversations
    write_chat_template(facts)
    template = (tmp_path / TEMPLATE_FILE).read_text()
    for prompt, answer in PAIRS:
        assert ids_in_vllm(facts.tokenizer, template, prompt, answer) == encoder.encode(prompt, answer)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"problem_type": "gone"}, "problem_type=None: vLLM would put the score through a sigmoid. Fix: "),
        ({"id2label": {"0": "a", "1": "b"}}, "a head of one output needs one label"),
        ({"head_dtype": "model"}, "head_dtype='model': it would round the head. Fix: take it out"),
        ({"method": "no_post_processing"}, "method: vLLM would make the head from the language model's"),
        (
            {"architectures": ["MptForSequenceClassification"]},
            "can't run the architecture MptFor.* Fix: .*rm-scale serve",
        ),
        ({"architectures": ["NewForSequenceClassification"]}, "is not known here to run the architecture NewFor"),
        ({"vision_config": {}}, "with its tower for pictures"),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
            "vLLM runs qwen3 with a window in all layers or in none. Fix: .*rm-scale serve",
        ),
    ],
)
def test_what_vllm_would_score_differently(folder: Path, values: dict[str, Any], text: str) -> None:
    change_config(folder, **values)
    with pytest.raises(ModelError, match=f"--engine vllm: .*{text}"):
        prepare_for_engines(folder, ["vllm"])
    assert not (folder / TEMPLATE_FILE).exists() and "engines" not in read_json(folder / "rm_scale_export.json")


def test_a_class_that_vllm_must_be_told(folder: Path) -> None:
    change_config(folder, architectures=["Gemma3TextForSequenceClassification"])
    assert (
        prepare_vllm(EngineFacts.read(folder))
        .command("m")
        .endswith("""--convert classify --hf-overrides '{"architectures": ["Gemma3ForCausalLM"]}'""")
    )


# --- SGLang -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_bias_of_sglangs_heads(folder: Path, tmp_path: Path, kind: str) -> None:
    """The zero is read by SGLang, which takes every safetensors file, and changes nothing in transformers."""
    contract = ScoringContract.load(folder)
    qwen = tmp_path / kind
    plain = tiny_classifier(kind, vocab_size=contract.vocab_size, num_labels=1, use_sliding_window=False)
    plain.config.pad_token_id = contract.pad_token_id
    plain.save_pretrained(qwen)
    read_tokenizer(str(folder)).save_pretrained(qwen)
    contract.save(qwen)
    ready = prepare_sglang(EngineFacts.read(qwen))
    assert ready.files == (BIAS_FILE,) and ready.path == "/classify" and ready.answer == "embedding[0]"
    assert ready.body["text"].endswith("<eos>")
    again, loaded = AutoModelForSequenceClassification.from_pretrained(qwen, output_loading_info=True)
    assert not loaded["unexpected_keys"] and not loaded["missing_keys"]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, plain.eval()(ids).logits)
    scorer = RewardScorer.from_pretrained(qwen, device="cpu", check_scores=False)
    assert scorer.score_tokens([[5, 6, 7]]) == pytest.approx([float(plain(ids).logits)], abs=1e-5)
    plain.save_pretrained(qwen, max_shard_size="20KB")
    (qwen / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"in several files, .* Fix: --max_shard_size 1000GB"):
        prepare_sglang(EngineFacts.read(qwen))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"architectures": ["MistralForSequenceClassification"]},
            "no classifier for Mistral.*normalised hidden vector",
        ),
        ({"mlp_bias": True}, "mlp_bias=true: SGLang's class leaves these biases out"),
        ({"sliding_window": 64, "use_sliding_window": True}, "sliding_window=64: SGLang's class attends to everything"),
        ({"id2label": {}}, "a head of one output needs one label"),
    ],
)
def test_what_sglang_would_score_differently(folder: Path, values: dict[str, Any], text: str) -> None:
    assert prepare_sglang(EngineFacts.read(folder)).files == ()
    change_config(folder, **values)
    with pytest.raises(ModelError, match=f"--engine sglang: .*{text}.* Fix: "):
        prepare_sglang(EngineFacts.read(folder))


def test_no_class_is_said_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert class_problems(folder, ["vllm", "sglang", "tei"]) == []
    change_config(folder, architectures=["MptForSequenceClassification"])
    said = class_problems(folder, ["vllm", "sglang", "tei"])
    assert [text.split(" 0.")[0] for text in said] == ["--engine: vLLM", "--engine: SGLang"]
    assert class_problems(folder / "nowhere", ["vllm"]) == []


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "RewardModel", "LlamaRewardModel"])
def test_what_an_export_makes_a_classifier_of_is_not_judged(folder: Path, architecture: str) -> None:
    change_config(folder, architectures=[architecture])
    assert class_problems(folder, ["vllm", "sglang"]) == []


def test_an_export_of_llama_factorys_form_for_vllm(tiny_model: Path, tmp_path: Path) -> None:
    foreign = written(llama_factory, tiny_model, tmp_path / "model")
    words = ["export", "--model", str(foreign.folder), "--output", str(tmp_path / "plain"), "--no_contract"]
    assert main([*words, "--engine", "vllm", "--dtype", "float32"]) == 0
    record = read_json(tmp_path / "plain" / "rm_scale_export.json")
    assert list(record["engines"]) == ["vllm"] and TEMPLATE_FILE in record["files"]


# --- several engines --------------------------------------------------------------------------------------------------


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("had", [{}, {TEMPLATE_FILE: "of before", "model.onnx": "graph", "model.onnx.data": "weights"}])
def test_a_refused_export_is_what_it_was(folder: Path, had: dict[str, str]) -> None:
    """vLLM's template and TEI's config.json are written before the refusal."""
    change_config(folder, mlp_bias=True, eos_token_id=[1, 3])
    for name, text in had.items():
        (folder / name).write_text(text)
    before = bytes_of(folder)
    with pytest.raises(ModelError, match="--engine sglang: mlp_bias"):
        prepare_for_engines(folder, ["vllm", "sglang"])
    assert bytes_of(folder) == before
    break_tokenizer(folder)
    before = bytes_of(folder)
    with pytest.raises(ModelError, match=r"--engine tei: .*padding_side"):
        prepare_for_engines(folder, ["vllm", "tei"])
    assert bytes_of(folder) == before


# --- TEI --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_tei_gets_raw_scores_of_padded_batches(folder: Path) -> None:
    """Batches as TEI's ONNX backend makes them: padded on the right with pad_token_id, `logits` read by rows."""
    import onnxruntime

    change_config(folder, eos_token_id=[1, 3])
    (ready,) = prepare_for_engines(folder, ["tei"])
    config = read_json(folder / "config.json")
    scorer = RewardScorer.from_pretrained(folder, device="cpu")
    assert config["eos_token_id"] == scorer.tokenizer.eos_token_id
    assert read_json(folder / LIMIT_FILE)["max_seq_length"] == 1024
    assert set(ready.files) <= set(read_json(folder / "rm_scale_export.json")["files"])
    ids = [scorer.encoder.encode_one(prompt, answer) for prompt, answer in PAIRS]
    longest = max(map(len, ids))
    batch = [one + [config["pad_token_id"]] * (longest - len(one)) for one in ids]
    mask = [[1] * len(one) + [0] * (longest - len(one)) for one in ids]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    given = {"input_ids": torch.tensor(batch).numpy(), "attention_mask": torch.tensor(mask).numpy()}
    outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, given), strict=True))
    rows = [row.tolist() for row in outputs["logits"]]
    expected = scorer.score([prompt for prompt, _ in PAIRS], [answer for _, answer in PAIRS])
    assert [score for (score,) in rows] == pytest.approx(expected, abs=1e-4)
    assert "--dtype float32 --auto-truncate false" in ready.command() and ready.body["raw_scores"] is True


def break_tokenizer(folder: Path) -> None:
    config = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (break_tokenizer, "padding_side='left', on which TEI would pad"),
        (
            lambda folder: change_config(folder, max_position_embeddings="gone"),
            "max_position_embeddings=None, TEI needs",
        ),
        (lambda folder: change_config(folder, label2id={"reward": "0"}), "label2id=.*TEI needs an object of numbers"),
        (
            lambda folder: change_config(folder, n_embd=32),
            "names hidden_size and n_embd, which TEI takes for one field",
        ),
        (lambda folder: change_config(folder, architectures=["LlamaModel"]), "needs one that ends with Classification"),
    ],
)
def test_what_tei_could_not_start_with(folder: Path, spoil: Callable[[Path], None], text: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=f"--engine tei: .*{text}"):
        prepare_for_engines(folder, ["tei"])
    assert not (folder / "model.onnx").exists() and not (folder / LIMIT_FILE).exists()


# --- The table --------------------------------------------------------------------------------------------------------


def test_every_family_stands_in_the_table_once() -> None:
    tables = (VLLM_CLASSES, VLLM_OVERRIDES, VLLM_THROUGH_TRANSFORMERS, VLLM_NOT)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names)) and set(SGLANG_CLASSES) <= set(names)
    for kind in FAMILIES:
        config = tiny_config(kind)
        name = AutoModelForSequenceClassification._model_mapping[type(config)].__name__
        assert name in names, f"{name}: run python tools/engine_architectures.py"


def test_the_table_follows_each_registrys_rules(tmp_path: Path) -> None:
    registry = {"AForCausalLM": "a", "BForCausalLM": "transformers", "CModel": "c", "DForCausalLM": "d"}
    suffixes = ["ForCausalLM", "ForSequenceClassification", "Model"]
    for name, causal, way in (
        ("AForSequenceClassification", "AForCausalLM", ("class", "AForCausalLM")),
        ("BForSequenceClassification", "BForCausalLM", ("transformers", "BForCausalLM")),
        ("CForSequenceClassification", "DForCausalLM", ("override", "DForCausalLM")),
        ("LlamaForSequenceClassification", "LlamaForCausalLM", ("transformers", "LlamaForSequenceClassification")),
        ("MptForSequenceClassification", "MptForCausalLM", ("none", "")),
    ):
        assert engine_architectures.vllm_way(name, causal, registry, suffixes) == way
    models = tmp_path / "srt" / "models"
    models.mkdir(parents=True)
    for name, words in (("With", ""), ("Without", ", bias=False")):
        lines = [f"class {name}:", " def __init__(self):", f"  self.score = nn.Linear(3, 1{words})"]
        (models / f"{name}.py").write_text("\n".join([*lines, f"EntryClass = [{name}]"]))
    found = engine_architectures.sglang_classes(tmp_path)
    assert {name: engine_architectures.sglang_has_bias(node) for name, node in found.items()} == {
        "With": True,
        "Without": False,
    }
