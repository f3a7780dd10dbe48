"""Contract 3: the same text has the same score in training, every command, plain transformers, an export, and GRPO.

Four models (Llama- and Qwen2-like, full and LoRA) are trained for a few fp32 steps on conversations. The Llama's
tokenizer adds a BOS as Llama 3's does and its template writes one; the Qwen2 has neither. The Llama's runs cut long
prompts, the Qwen2's leave long rows out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rm_scale.cli import main
from rm_scale.demo.assets import make_tiny_model
from rm_scale.demo.synthetic_preferences import generate_pairs
from rm_scale.inference.scoring.scorer import RewardScorer
from tests.support.launching import read_lines, run, run_cases
from tests.support.serving import served

pytestmark = [pytest.mark.long, pytest.mark.e2e, pytest.mark.timeout(1800)]

MODELS = ("llama-full", "llama-lora", "qwen2-full", "qwen2-lora")
EXPORTED = ("llama-lora", "qwen2-lora")
MAX_LENGTH = 128
FLAGS = ["--bf16", "false", "--max_steps", "3", "--learning_rate", "5e-3", "--max_length", str(MAX_LENGTH)]
FLAGS += ["--sample_scores", "0", "--disable_tqdm", "--max_rejected_share", "1"]
POLICY = {"llama": "truncate_prompt_left", "qwen2": "drop"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Messages = list[dict[str, str]]
Scores = dict[str, float]

SYSTEM = {"role": "system", "content": "You are a terse pirate."}
TURN = {"role": "user", "content": "Where is the treasure?"}
TALK = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Ahoy."},
    {"role": "user", "content": "And now?"},
]
CASES: dict[str, tuple[Messages, str, str]] = {
    "one_turn": ([TURN], "On the island.", "No."),
    "system": ([SYSTEM, TURN], "Arr, X marks the spot.", "I don't know."),
    "multi_turn": (TALK, "Now we sail.", "Nothing"),
    "system_and_turns": ([SYSTEM, *TALK], "Now we sail.\n\nArr!", "\n."),
    "unicode": (
        [{"role": "user", "content": "Grüße 漢字 नमस्ते"}],
        "e\u0301 é 👩\u200d👩\u200d👧 \u202eabc\u202c مرحبا\u00a0!",
        "\ufeffé\t\r\n",
    ),
    "special_tokens": ([TURN], "It ends.<eos> Or not?", "<|user|>Who said that?"),
}
UNTRAINED = {"empty": ([TURN], "", "x")}
"""`rm_scale.data` refuses a pair with an empty response; a scorer meets them all the same."""


def digits(tokenizer: PreTrainedTokenizerBase, digit: str, num_tokens: int) -> tuple[Messages, str]:
    """A conversation of exactly so many tokens: each digit is one."""
    prompt = [{"role": "user", "content": "Say it: " + "1" * 40}]
    rest = [*prompt, {"role": "assistant", "content": ""}]
    empty = tokenizer(tokenizer.apply_chat_template(rest, tokenize=False), add_special_tokens=False)["input_ids"]
    return prompt, digit * (num_tokens - len(empty))


def cases_of(base: Path) -> dict[str, tuple[Messages, str, str]]:
    """All cases; those about lengths are made for the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    cases = {**CASES, **UNTRAINED}
    for name, length in (("max_length", MAX_LENGTH), ("over_long", MAX_LENGTH + 9)):
        prompt, chosen = digits(tokenizer, "7", length)
        cases[name] = (prompt, chosen, digits(tokenizer, "8", length)[1])
    return cases


def rows_of(base: Path) -> list[dict[str, Any]]:
    """Each response of each case with its prompt."""
    return [
        {"case": f"{name}/{side}", "prompt": prompt, "completion": [{"role": "assistant", "content": text}]}
        for name, (prompt, *texts) in cases_of(base).items()
        for side, text in zip(("chosen", "rejected"), texts, strict=True)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_base(folder: Path, architecture: str) -> Path:
    base = make_tiny_model(folder, architecture, vocab_size=400, hidden_size=32)
    if architecture == "llama":
        tokenizer = AutoTokenizer.from_pretrained(base)
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(base)
    return base


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **said}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases, the data, the four runs, and the texts to score."""
    folder = tmp_path_factory.mktemp("parity")
    train = write(folder / "train.jsonl", [as_messages(row) for row in generate_pairs(60, seed=3, split="train")])
    runs = {}
    for architecture in ("llama", "qwen2"):
        base = make_base(folder / architecture, architecture)
        write(folder / f"{architecture}.jsonl", rows_of(base))
        pairs = [
            as_messages({"prompt": "", "chosen": chosen, "rejected": rejected}) | {"prompt": prompt, "id": name}
            for name, (prompt, chosen, rejected) in cases_of(base).items()
        ]
        evaluated = write(folder / f"{architecture}-pairs.jsonl", pairs)
        flags = ["--model_name_or_path", str(base), "--dataset_path", str(train), "--eval_dataset_path", str(evaluated)]
        flags += [*FLAGS, "--overlong_policy", POLICY[architecture]]
        runs[f"{architecture}-full"] = flags
        runs[f"{architecture}-lora"] = [*flags, "--use_peft"]
    done = run_cases(folder / "runs", runs, ranks=1)
    assert done.code == 0, done.output[-5000:]
    return folder


def texts(work: Path, model: str) -> list[dict[str, Any]]:
    return read_lines(work / f"{model.split('-')[0]}.jsonl")


@pytest.fixture(scope="module")
def trained(work: Path) -> dict[str, Scores]:
    """What the trainer's evaluation found."""
    found = {}
    for model in MODELS:
        lines = read_lines(work / "runs" / model / "run" / "evaluation_scores.jsonl")
        found[model] = {
            f"{line['id']}/{side}": reward
            for line in lines
            for side, reward in zip(("chosen", "rejected"), line["rewards"], strict=True)
        }
    return found


@pytest.fixture(scope="module")
def scorers(work: Path) -> dict[str, RewardScorer]:
    return {model: RewardScorer.from_pretrained(work / "runs" / model, device="cpu") for model in MODELS}


@pytest.fixture(scope="module")
def scored(work: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by `rm-scale score`."""
    found = {}
    for model in MODELS:
        output = work / f"{model}-scored.jsonl"
        files = ["--input", str(work / f"{model.split('-')[0]}.jsonl"), "--output", str(output)]
        folder = str(work / "runs" / model)
        assert main(["score", "--model", folder, *files, "--max_rejected_share", "1"]) == 0
        found[model] = read_lines(output)
    return found


@pytest.fixture(scope="module")
def expected(scored: dict[str, list[dict[str, Any]]]) -> dict[str, Scores]:
    """Scores by `rm-scale score`, which the first test holds against the trainer's; none for what it refuses."""
    return {
        model: {row["case"]: row["score"] for row in rows if row["score"] is not None} for model, rows in scored.items()
    }


def agree(found: Scores, expected: Scores) -> None:
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-4)


# --- rm_scale's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_score_gives_what_the_trainer_found(
    model: str, trained: dict[str, Scores], expected: dict[str, Scores]
) -> None:
    cut = model.startswith("llama")
    names = {*CASES, "max_length", *(["over_long"] if cut else [])}
    assert {name.split("/")[0] for name in trained[model]} == names
    assert {name.split("/")[0] for name in expected[model]} == names | {"empty"}
    agree(trained[model], expected[model])
    assert len({round(score, 4) for score in expected[model].values()}) > 8, "the texts must differ in score"


def test_what_is_too_long_is_refused_by_name(work: Path, scored: dict[str, list[dict[str, Any]]]) -> None:
    for model in ("qwen2-full", "qwen2-lora"):
        refused = [row for row in scored[model] if row["score"] is None]
        assert [row["case"] for row in refused] == ["over_long/chosen", "over_long/rejected"]
        assert all(row["error"].startswith("over_long: 137 tokens, max_length is 128") for row in refused)
        left_out = read_lines(work / "runs" / model / "run" / "rejected_rows.jsonl")
        assert {"over_long", "empty"} <= {row["reason"] for row in left_out}


@pytest.mark.parametrize("model", MODELS)
def test_rank(model: str, work: Path, expected: dict[str, Scores]) -> None:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in texts(work, model):
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    groups = [
        {"prompt": rows[0]["prompt"], "completions": [row["completion"] for row in rows], "n": number}
        for number, rows in enumerate(by_prompt.values())
    ]
    output = work / f"{model}-ranked.jsonl"
    files = ["--input", str(write(work / f"{model}-groups.jsonl", groups)), "--output", str(output)]
    assert main(["rank", "--model", str(work / "runs" / model), *files, "--max_rejected_share", "1"]) == 0
    found: Scores = {}
    for line in read_lines(output):
        rows = list(by_prompt.values())[line["n"]]
        scores = [score for score in line["scores"] if score is not None]
        assert scores == sorted(scores, reverse=True)
        for place, score in zip(line["order"], scores, strict=True):
            found[rows[place]["case"]] = score
    assert set(found) == set(expected[model])
    agree(found, expected[model])


@pytest.mark.parametrize("model", MODELS)
def test_serve(model: str, work: Path, scorers: dict[str, RewardScorer], expected: dict[str, Scores]) -> None:
    items = {row.pop("case"): row for row in texts(work, model)}
    known = [name for name in items if name in expected[model]]
    with served(scorers[model]) as (url, _):
        answer = httpx.post(f"{url}/score", json={"items": [items[name] for name in known]}, timeout=600)
        assert answer.status_code == 200, answer.text
        agree(dict(zip(known, answer.json()["scores"], strict=True)), expected[model])
        # As vLLM's clients ask: the whole text. What was cut has no text that says so.
        whole = [name for name in known if not name.startswith("over_long")]
        rendered = [scorers[model].encoder.render(items[name]["prompt"], items[name]["completion"]) for name in whole]
        answer = httpx.post(f"{url}/classify", json={"input": rendered}, timeout=600)
        assert answer.status_code == 200, answer.text
        agree({name: row["probs"][0] for name, row in zip(whole, answer.json()["data"], strict=True)}, expected[model])
        for name in items.keys() - set(known):
            refused = httpx.post(f"{url}/score", json={"items": [items[name]]}, timeout=600)
            assert refused.status_code == 422 and "too long to be scored" in refused.text


# --- Others ----------------------------------------------------------------------------------------------------------

PIPELINE = """
import json, sys, torch
from transformers import pipeline
answers = {}
for name, (folder, texts) in json.load(open(sys.argv[1])).items():
    extra = {"model_kwargs": {"num_labels": 1}} if name.endswith("lora") else {}
    rewarder = pipeline("text-classification", model=folder, function_to_apply="none", dtype=torch.float32, **extra)
    answers[name] = [rewarder(text)[0]["score"] for text in texts]
    answers[name + " batched"] = [found["score"] for found in rewarder(texts, batch_size=len(texts))]
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def exports(work: Path) -> dict[str, Path]:
    """The adapters, merged by `rm-scale export`."""
    folders = {model: work / f"{model}-merged" for model in EXPORTED}
    for model, folder in folders.items():
        assert main(["export", "--model", str(work / "runs" / model), "--output", str(folder)]) == 0
    return folders


@pytest.fixture(scope="module")
def uncut(work: Path, scorers: dict[str, RewardScorer]) -> dict[str, Scores]:
    """Scores of all cases at their whole length, for engines that know no policy."""
    found = {}
    for model, scorer in scorers.items():
        rows = texts(work, model)
        ids = [scorer.encoder.encode(row["prompt"], row["completion"]) for row in rows]
        found[model] = dict(zip([row["case"] for row in rows], scorer.score_tokens(ids), strict=True))
    return found


def test_engines_that_know_no_policy_score_long_texts_whole(
    uncut: dict[str, Scores], expected: dict[str, Scores]
) -> None:
    """So they agree on everything but what is too long, which these tests compare with `uncut`."""
    for model in MODELS:
        short = {name: score for name, score in uncut[model].items() if not name.startswith("over_long")}
        agree(short, expected[model])
    for model in ("llama-full", "llama-lora"):
        name = "over_long/chosen"
        assert abs(uncut[model][name] - expected[model][name]) > 1e-3, "a cut prompt has another score"


@pytest.fixture(scope="module")
def piped(work: Path, scorers: dict[str, RewardScorer], exports: dict[str, Path]) -> dict[str, list[float]]:
    """Scores by plain pipelines in one fresh process, of runs and exports."""
    folders = {model: work / "runs" / model for model in MODELS}
    folders |= {f"{model} merged": folder for model, folder in exports.items()}
    jobs = {}
    for name, folder in folders.items():
        model = name.split()[0]
        render = scorers[model].encoder.render
        jobs[name] = (str(folder), [render(row["prompt"], row["completion"]) for row in texts(work, model)])
    (work / "jobs.json").write_text(json.dumps(jobs))
    (work / "pipe.py").write_text(PIPELINE)
    words = [str(work / name) for name in ("pipe.py", "jobs.json", "piped.json")]
    done = run([sys.executable, *words], cwd=work)
    assert done.code == 0, done.output[-3000:]
    found: dict[str, list[float]] = json.loads((work / "piped.json").read_text())
    return found


@pytest.mark.parametrize("name", [*MODELS, *(f"{model} merged" for model in EXPORTED)])
def test_plain_pipeline(name: str, piped: dict[str, list[float]], uncut: dict[str, Scores]) -> None:
    whole = uncut[name.split()[0]]
    assert piped[name] == pytest.approx(list(whole.values()), abs=1e-4)
    assert piped[f"{name} batched"] == pytest.approx(list(whole.values()), abs=1e-4)


@pytest.mark.parametrize("model", EXPORTED)
def test_export_under_the_contract(
    model: str, work: Path, exports: dict[str, Path], expected: dict[str, Scores]
) -> None:
    scorer = RewardScorer.from_pretrained(exports[model], device="cpu")
    rows = [row for row in texts(work, model) if row["case"] in expected[model]]
    found = scorer.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    agree(dict(zip([row["case"] for row in rows], found, strict=True)), expected[model])


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_grpo_by_path(architecture: str, work: Path, exports: dict[str, Path], uncut: dict[str, Scores]) -> None:
    """TRL loads the folders and computes their rewards; only the texts are ours."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    models = [model for model in MODELS if model.startswith(architecture)]
    names = [*models, f"{architecture}-lora"]
    paths = [*(work / "runs" / model for model in models), exports[f"{architecture}-lora"]]
    rows = texts(work, models[0])
    arguments = GRPOConfig(output_dir=str(work / "grpo"), use_cpu=True, bf16=False, report_to=[], max_steps=1)
    trainer = GRPOTrainer(
        model=str(work / architecture),
        reward_funcs=[str(path) for path in paths],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [TURN]}] * 8),
    )
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    rewards = trainer._calculate_rewards([{"prompt": prompt} for prompt in prompts], prompts, completions, None)
    for column, model in enumerate(names):
        found = dict(zip([row["case"] for row in rows], rewards[:, column].tolist(), strict=True))
        agree(found, uncut[model])
