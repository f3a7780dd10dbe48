"""The same row, whatever it comes from and whoever reads it, is the same tokens; what training refuses, all refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rm_scale.config import RunConfig
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.preparation import prepare_data
from rm_scale.data.rejected_rows import RejectedRow
from rm_scale.errors import DataError
from rm_scale.evaluation.evaluation_groups import EvaluationGroups
from rm_scale.inference.ranking.candidates import Columns, InputReport, read_groups
from rm_scale.inference.remote_scorer import RemoteScorer
from rm_scale.inference.reward_function import reward_function
from rm_scale.inference.scoring.encode_completions import encode_completions, read_completions
from rm_scale.inference.scoring.row_files import open_rows, scorable
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.inference.server.protocols import RankRequest, ScoreItem
from rm_scale.inference.server.read_items import read_items
from rm_scale.inference.server.request_limits import Refused
from rm_scale.modeling.tokenizers import load_tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}</{{ message.role }}>\n{% endfor %}"
)


def tool(name: str, argument: str) -> dict[str, Any]:
    of_it = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "parameters": of_it}}


def row(name: str, argument: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": {argument: "x"}}}
    return {
        "prompt": [{"role": "user", "content": f"Use {name}."}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "tools": [tool(name, argument)],
    }


# Each tool has an argument of its own: Arrow gives every row the arguments of all, as nulls.
ROWS = [row("weather", "city"), row("clock", "zone"), row("convert", "amount")]


@pytest.fixture(scope="module")
def encoder(tiny_model: Path) -> TextEncoder:
    return TextEncoder(load_tokenizer(str(tiny_model)), EncodingRules(chat_template=TEMPLATE))


def as_json(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value)


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"rows.{kind.split()[0]}"
    if "text" in kind or kind == "csv":
        rows = [{name: as_json(value) for name, value in one.items()} for one in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


class _Scorer(RewardScorer):
    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.device = encoder, "cpu"
        self.seen: list[list[int]] = []

    def try_score_tokens(self, sequences: Any, *_: Any, **__: Any) -> list[float]:
        self.seen += sequences
        return [0.0] * len(sequences)


class _Server(RemoteScorer):
    """Reads what it is sent as the server does."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.scorer = _Scorer(encoder)

    def try_score(self, prompts: Any, completions: Any, tools: Any = None, normalized: bool = False) -> Any:
        items = [
            ScoreItem(prompt=p, completion=c, tools=t).model_dump()
            for p, c, t in zip(prompts, completions, tools, strict=True)
        ]
        self.scorer.seen += _tokens(self.scorer.encoder, read_items(items))
        return [0.0] * len(items)


def _tokens(encoder: TextEncoder, texts: Any) -> list[Any]:
    return encoder.encode_many([t.prompt for t in texts], [t.completion for t in texts], [t.tools for t in texts])


def trained(file: str, encoder: TextEncoder, tmp_path: Path) -> list[list[int]]:
    config = RunConfig(model_name_or_path="none", dataset_path=[file], dataset_cache_dir=str(tmp_path / "cache"))
    return [ids[0] for ids in prepare_data(config, encoder).train["input_ids"]]


def evaluated(file: str, encoder: TextEncoder, tmp_path: Path) -> list[list[int]]:
    settings = {"dataset_cache_dir": str(tmp_path / "cache of eval")}
    data = EvaluationGroups([file], None, settings).for_scorer(_Scorer(encoder))
    return [ids[0] for ids in data.groups["input_ids"]]


def rows_of(file: str) -> list[dict[str, Any]]:
    with open_rows(file) as rows:
        return [{**one, "completion": one["chosen"]} for _, one in rows.read(0, 99)]


def scored(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    return _tokens(encoder, [scorable(one) for one in rows_of(file)])


def scored_as_messages(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    def whole(one: dict[str, Any]) -> dict[str, Any]:
        parts = [json.loads(one[name]) if isinstance(one[name], str) else one[name] for name in ("prompt", "chosen")]
        messages = parts[0] + parts[1]
        return {"messages": as_json(messages) if isinstance(one["prompt"], str) else messages, "tools": one["tools"]}

    return _tokens(encoder, [scorable(whole(one)) for one in rows_of(file)])


def ranked(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    report = InputReport()
    groups = list(read_groups(enumerate(rows_of(file)), Columns(), report))
    assert report.refused == {} and all(group.problems == (None,) for group in groups)
    return encoder.encode_many(
        [g.prompt for g in groups], [g.completions[0] or "" for g in groups], [g.tools for g in groups]
    )


def served(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    names = ("prompt", "completion", "tools")
    items = [ScoreItem(**{name: one[name] for name in names}).model_dump() for one in rows_of(file)]
    return _tokens(encoder, read_items(items))


def served_for_rank(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    bodies = [RankRequest(prompt=o["prompt"], completions=[o["completion"]], tools=o["tools"]) for o in rows_of(file)]
    rows = [{"prompt": one.prompt, "completion": one.completions[0], "tools": one.tools} for one in bodies]
    return _tokens(encoder, read_items(rows))


def rewarded(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    scorer, found = _Scorer(encoder), rows_of(file)
    tools = [one["tools"] for one in found]
    rewards = reward_function(scorer)([o["prompt"] for o in found], [o["completion"] for o in found], tools=tools)
    assert rewards == [0.0] * len(found)
    return scorer.seen


def rewarded_by_server(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    server, found = _Server(encoder), rows_of(file)
    tools = [one["tools"] for one in found]
    reward_function(server)([o["prompt"] for o in found], [o["completion"] for o in found], tools=tools)
    return server.scorer.seen


def scored_in_python(file: str, encoder: TextEncoder, _: Path) -> list[Any]:
    scorer, found = _Scorer(encoder), rows_of(file)
    scorer.score([o["prompt"] for o in found], [o["completion"] for o in found], tools=[o["tools"] for o in found])
    return scorer.seen


ENTRIES = [
    trained,
    evaluated,
    scored,
    scored_as_messages,
    ranked,
    served,
    served_for_rank,
    rewarded,
    rewarded_by_server,
    scored_in_python,
]


@pytest.fixture(scope="module")
def expected(encoder: TextEncoder) -> Iterator[list[list[int]]]:
    """The template, written by hand."""
    found = []
    for one in ROWS:
        text = json.dumps(one["tools"][0]) + f"\n<user>{one['prompt'][0]['content']}</user>\n<assistant>"
        text += json.dumps(one["chosen"][0]["tool_calls"][0]) + "</assistant>\n"
        found.append(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
    yield found


@pytest.mark.parametrize("kind", ["jsonl", "jsonl with text", "parquet", "parquet with text", "csv"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_same_row_is_the_same_tokens(
    entry: Callable[..., list[list[int]]], kind: str, expected: Any, encoder: TextEncoder, tmp_path: Path
) -> None:
    assert entry(write(tmp_path, kind, ROWS), encoder, tmp_path) == expected


@pytest.mark.parametrize("kind", [tuple, lambda tools: np.array([*tools, 0], dtype=object)[:-1]])
def test_tools_may_come_in_any_sequence(kind: Any, expected: Any, encoder: TextEncoder) -> None:
    prompts, said = [one["prompt"] for one in ROWS], [one["chosen"] for one in ROWS]
    scorer, server = _Scorer(encoder), _Server(encoder)
    for tools in (kind([one["tools"] for one in ROWS]), kind([tuple(one["tools"]) for one in ROWS])):
        for ours in (scorer, server):
            reward_function(ours)(prompts, said, tools=tools)
        scorer.score(prompts, said, tools=tools)
    assert scorer.seen == expected * 4 and server.scorer.seen == expected * 2


def test_sharegpt_messages_are_read_everywhere(encoder: TextEncoder) -> None:
    asked, said = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
    plain = encoder.encode([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Ho"}])
    found = scorable({"messages": [asked, said]})
    assert encoder.encode(found.prompt, found.completion) == plain
    assert encode_completions(encoder, read_completions([[asked]], [[said]])) == [plain]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_a_conversation_that_ends_with_the_user_is_refused_everywhere(encoder: TextEncoder, tmp_path: Path) -> None:
    prompt, completion = [USER], [ANSWER, USER]
    reason = "bad_conversation"
    with pytest.raises(RejectedRow, match=reason):
        scorable({"prompt": prompt, "completion": completion})
    with pytest.raises(RejectedRow, match=reason):
        scorable({"messages": [*prompt, *completion]})
    with pytest.raises(Refused, match="ends with user, not assistant") as refused:
        read_items([{"prompt": prompt, "completion": completion}])
    assert (refused.value.status, refused.value.reason) == (422, reason)
    (group,) = read_groups([(0, {"prompt": prompt, "completions": [completion, [ANSWER]]})], Columns(), InputReport())
    assert group.problems == (reason, None)
    scorer = _Scorer(encoder)
    assert reward_function(scorer)([prompt, prompt], [completion, [ANSWER]]) == [None, 0.0]
    with pytest.raises(DataError, match=reason):
        scorer.score([prompt], [completion])
    file = write(tmp_path, "jsonl", [{"prompt": prompt, "chosen": completion, "rejected": [ANSWER, USER, ANSWER]}])
    config = RunConfig(model_name_or_path="none", dataset_path=[file], dataset_cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=reason):
        prepare_data(config, encoder)


def test_what_a_policy_writes_is_a_text_unless_its_prompt_is_a_cell_too(encoder: TextEncoder) -> None:
    written = json.dumps([ANSWER])
    for prompt in ("a ", [USER]):
        (one,) = read_completions([prompt], [written])
        assert not isinstance(one, RejectedRow) and one[1] == written
        assert read_items([{"prompt": prompt, "completion": written}])[0].completion == written
    (cells,) = read_completions([json.dumps([USER])], [written])
    assert cells == ([USER], [ANSWER], None)
    assert scorable({"prompt": "a ", "completion": written}).completion == [ANSWER], "in a file it is a cell"
