"""From files to encoded sets: every row accounted for, splits by prompt, and a cache that can be trusted."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rm_scale.config import RunConfig
from rm_scale.data import cache
from rm_scale.data.data_report import raise_if_too_many, write_data_report
from rm_scale.data.encoded_rows import EncodedBatch
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.formats import RowReader
from rm_scale.data.preparation import PreparedData, prepare_data
from rm_scale.errors import DataError, ModelError

Jsonl = Callable[[Path, Iterable[Any]], str]
MakeConfig = Callable[..., RunConfig]
COLUMNS = {
    "input_ids": datasets.List(datasets.List(datasets.Value("int32"))),
    "prompt_length": datasets.Value("int32"),
    "ranks": datasets.List(datasets.Value("int32")),
    "margin": datasets.Value("float32"),
    "soft_label": datasets.Value("float32"),
    "subset": datasets.Value("string"),
    "id": datasets.Value("string"),
    "row": datasets.Value("int64"),
    "num_tokens": datasets.Value("int32"),
}


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}? ", "chosen": f"good {number}", "rejected": f"bad {number}", **more}


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer)


def rows(dataset: datasets.Dataset | None) -> list[dict[str, Any]]:
    assert dataset is not None
    return list(dataset)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were really encoded, not found in the cache: once for each chunk."""
    names: list[str] = []
    encode = cache.encode_batch

    def counted(rows: Any, reader: RowReader, *rest: Any) -> EncodedBatch:
        names.append(reader.source)
        return encode(rows, reader, *rest)

    monkeypatch.setattr(cache, "encode_batch", counted)
    return names


# --- Rows ----------------------------------------------------------------------------------------------------------


def test_columns_and_values(tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0, margin=1.5, subset="x", id="first"), pair(1)])
    prepared = prepare_data(make_config(path), encoder)
    assert prepared.eval is None and len(prepared.rejected) == 0
    assert dict(prepared.train.features) == COLUMNS
    first, second = rows(prepared.train)
    ids = [encoder.encode("Question 0? ", "good 0"), encoder.encode("Question 0? ", "bad 0")]
    assert first["input_ids"] == ids and first["num_tokens"] == sum(map(len, ids))
    assert ids[0][: first["prompt_length"]] == ids[1][: first["prompt_length"]]
    assert (first["ranks"], first["margin"], first["soft_label"]) == ([0, 1], 1.5, None)
    assert (first["subset"], first["id"], first["row"]) == ("x", "first", 0)
    assert (second["margin"], second["subset"], second["id"], second["row"]) == (None, "", "1", 1)


def test_every_row_is_used_or_counted(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    dirty: list[Any] = [
        pair(0),
        b"{broken",
        pair(2, chosen=None),
        pair(3, chosen=["a"], rejected=7),
        pair(4, rejected="good 4"),
        pair(5, chosen="word " * 400),
        b"",
        pair(7, chosen="\ud800"),
        pair(8, margin="big"),
        pair(9, chosen="x<pad></s><pad>"),
        b"17",
        pair(11),
    ]
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=100, append_eos=False))
    config = make_config(jsonl(tmp_path / "a.jsonl", dirty), max_rejected_share=0.5)
    prepared = prepare_data(config, encoder)
    found = {row["row"]: row["reason"] for row in prepared.rejected}
    assert found == {
        1: "bad_json",
        2: "missing_key",
        3: "wrong_type",
        4: "identical_responses",
        5: "over_long",
        7: "bad_unicode",
        8: "wrong_type",
        9: "ends_with_pad",
        10: "wrong_type",
    }
    assert [row["row"] for row in prepared.train] == [0, 11]
    (report,) = prepared.report.sources
    assert (report.rows_read, report.rows_used, report.rows_rejected) == (11, 2, 9)
    assert report.rejected["wrong_type"].first_rows == (3, 8, 10)
    assert all(row["source"] == report.name and row["detail"] is not None for row in prepared.rejected)
    write_data_report(prepared.report, prepared.rejected, tmp_path / "run")
    assert len((tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()) == 9
    with pytest.raises(DataError, match=r"9 of 11 rows can't be used"):
        raise_if_too_many(prepared.report, config.max_rejected_share)


def test_typed_files_with_columns_named_like_ours(
    tmp_path: Path, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    path = tmp_path / "a.parquet"
    given = [pair(number, margin=1.0, id=number, row=9, reason="x", ranks=[5]) for number in range(3)]
    datasets.Dataset.from_list(given).to_parquet(path)
    prepared = prepare_data(make_config(str(path)), encoder)
    assert [(row["id"], row["row"], row["margin"]) for row in prepared.train] == [("0", 0, 1), ("1", 1, 1), ("2", 2, 1)]
    assert prepared.report.sources[0].ignored_columns == ("row", "reason", "ranks")


def test_messages_mean_the_same_in_jsonl_and_parquet(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "time", "arguments": "{}"}}]}
    given = [
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": [call, {"role": "tool", "content": "12"}, {"role": "assistant", "content": f"noon {number}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "tools": '[{"name": "time"}]',
        }
        for number in range(3)
    ]
    datasets.Dataset.from_list(given).to_parquet(tmp_path / "a.parquet")
    typed = prepare_data(make_config(str(tmp_path / "a.parquet")), encoder)
    lines = prepare_data(make_config(jsonl(tmp_path / "a.jsonl", given)), encoder)
    assert rows(typed.train) == rows(lines.train) and len(typed.train) == 3
    assert "[call time]" in encoder.tokenizer.decode(typed.train[0]["input_ids"][0])


def test_ranked_and_soft_labels_and_several_sources(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    ranked = jsonl(tmp_path / "r.jsonl", [{"prompt": "p ", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}])
    soft = jsonl(tmp_path / "s.jsonl", [{"prompt": "q ", "response_0": "a", "response_1": "b", "soft_label": 0.25}])
    prepared = prepare_data(make_config(ranked, soft), encoder)
    first, second = rows(prepared.train)
    assert (first["ranks"], len(first["input_ids"]), first["soft_label"]) == ([1, 0, 0], 3, None)
    assert (second["ranks"], second["soft_label"]) == ([1, 0], 0.25)
    assert [report.format for report in prepared.report.sources] == ["ranked", "soft_label"]


def test_nothing_usable(tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder) -> None:
    config = make_config(jsonl(tmp_path / "a.jsonl", [pair(0, chosen=""), pair(1, chosen="")]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"no usable row is left. 2 of 2 rows(.|\n)*empty 2 \(rows 0, 1; from 0\)"):
            prepare_data(config, encoder)


def test_a_source_without_usable_rows_beside_a_good_one(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    bad, good = jsonl(tmp_path / "bad.jsonl", [pair(0, chosen="")]), jsonl(tmp_path / "good.jsonl", [pair(1)])
    prepared = prepare_data(make_config(bad, good), encoder)
    assert len(prepared.train) == 1 and prepared.report.rows_rejected == 1


def test_errors_of_sources_and_formats_pass_through(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    with pytest.raises(DataError, match=r"none is given. Fix: --dataset_path FILE"):
        prepare_data(make_config(), encoder)
    with pytest.raises(DataError, match=r"a.jsonl: none of the first 1 rows is a readable object"):
        prepare_data(make_config(jsonl(tmp_path / "a.jsonl", [b"<"])), encoder)
    with pytest.raises(DataError, match=r"no known format fits the columns question"):
        prepare_data(make_config(jsonl(tmp_path / "b.jsonl", [{"question": 1}])), encoder)
    with pytest.raises(DataError, match=r"dataset_format=ranked: .*missing: responses or completions, ranks or scores"):
        prepare_data(make_config(jsonl(tmp_path / "c.jsonl", [pair(0)]), dataset_format="ranked"), encoder)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_error_policy_stops_from_worker_processes_too(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, num_proc: int | None
) -> None:
    encoder = TextEncoder(tokenizer, EncodingRules(max_length=30, overlong_policy="error"))
    path = jsonl(tmp_path / "a.jsonl", [pair(0), pair(1, chosen="word " * 40), pair(2)])
    with pytest.raises(DataError, match=r"a.jsonl, row 1: .*max_length is 30"):
        prepare_data(make_config(path, dataset_num_proc=num_proc), encoder)
    assert not list((tmp_path / "cache").glob("encoded-*/meta.json")), "nothing half done may count"


def test_conversations_need_a_template(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    talk = {"prompt": "Hi", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    config = make_config(jsonl(tmp_path / "a.jsonl", [talk, talk]))
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template"):
        prepare_data(config, TextEncoder(tokenizer))


def test_templates_that_make_scores_differ_are_named(
    tmp_path: Path,
    jsonl: Jsonl,
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    bos_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    talk = {"prompt": "Hi", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    config = make_config(jsonl(tmp_path / "a.jsonl", [talk]))
    dated = "{{ strftime_now('%d') }}" + str(tokenizer.chat_template)
    prepare_data(config, TextEncoder(bos_tokenizer, EncodingRules(chat_template=dated)))
    assert "writes today's date" in caplog.text and "plain pipeline would score another sequence" in caplog.text
    caplog.clear()
    broken = EncodingRules(chat_template="{{ raise_exception('never') }}")
    with pytest.raises(DataError, match=r"template_error 1"):
        prepare_data(config, TextEncoder(bos_tokenizer, broken))


def test_verdict_is_logged(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_data(make_config(jsonl(tmp_path / "a.jsonl", [pair(0, score_chosen=1)])), encoder)
    words = "read as explicit_prompt, since prompt, chosen and rejected are text; columns not read: score_chosen"
    assert words in caplog.text


# --- Evaluation data -----------------------------------------------------------------------------------------------


def split_ids(prepared: PreparedData) -> tuple[list[str], list[str]]:
    return [row["id"] for row in rows(prepared.train)], [row["id"] for row in rows(prepared.eval)]


def test_split_keeps_prompts_together(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    given = [pair(number // 2, chosen=f"answer {number}") for number in range(40)]
    path = jsonl(tmp_path / "a.jsonl", given)
    prepared = prepare_data(make_config(path, eval_split_size=10), encoder)
    train, evaluation = split_ids(prepared)
    assert len(evaluation) == 10 and sorted(train + evaluation, key=int) == [str(n) for n in range(40)]
    assert not {int(n) // 2 for n in train} & {int(n) // 2 for n in evaluation}
    assert train == sorted(train, key=int) and evaluation == sorted(evaluation, key=int)
    assert (prepared.report.held_out, prepared.report.shared_prompts) == (10, 0)
    share = prepare_data(make_config(path, eval_split_size=0.25), encoder)
    assert split_ids(share) == (train, evaluation)
    assert split_ids(prepare_data(make_config(path, eval_split_size=10, dataset_num_proc=2), encoder))[1] == evaluation


def test_split_depends_on_the_data_seed(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(number) for number in range(50)])

    def held_out(**values: Any) -> list[str]:
        return split_ids(prepare_data(make_config(path, eval_split_size=10, **values), encoder))[1]

    assert held_out(seed=1) == held_out(seed=2, data_seed=1) != held_out(seed=2)


def test_split_of_groups_without_prompts(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    given = [{"chosen": f"{number} a", "rejected": f"x{number} b"} for number in range(10)]
    prepared = prepare_data(make_config(jsonl(tmp_path / "a.jsonl", given), eval_split_size=3), encoder)
    assert len(rows(prepared.eval)) == 3


@pytest.mark.parametrize(("size", "words"), [(10, "holds out 10 of 10"), (0.01, "holds out 0 of 10"), (99, "99 of 10")])
def test_impossible_splits(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, size: float, words: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(number) for number in range(10)])
    with pytest.raises(DataError, match=words + r".* usable groups; at least one .*Fix: choose another size"):
        prepare_data(make_config(path, eval_split_size=size), encoder)


def test_splits_that_prompts_make_inexact(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(n // 4, chosen=f"answer {n}") for n in range(16)])
    assert len(rows(prepare_data(make_config(path, eval_split_size=6), encoder).eval)) == 4
    assert "4 groups held out, as groups of one prompt stay together" in caplog.text
    with pytest.raises(DataError, match=r"every prompt has more than 3 groups.*Fix: choose a larger size"):
        prepare_data(make_config(path, eval_split_size=3), encoder)


def test_own_evaluation_files_limits_and_shared_prompts(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    train = jsonl(tmp_path / "train.jsonl", [pair(number) for number in range(6)])
    evaluation = jsonl(tmp_path / "eval.jsonl", [pair(number) for number in (1, 8, 2, 9)])
    config = make_config(train, eval_dataset_path=[evaluation], max_train_samples=4, max_eval_samples=2)
    prepared = prepare_data(config, encoder)
    assert split_ids(prepared) == (["0", "1", "2", "3"], ["0", "1"])
    report = prepared.report
    assert [(part.split, part.rows_read) for part in report.sources] == [("train", 6), ("eval", 4)]
    assert (report.left_out_by_limit, report.shared_prompts, report.held_out) == (4, 1, 0)
    assert report.eval is not None and (report.train.num_groups, report.eval.num_groups) == (4, 2)
    assert (report.shared_groups, report.nearly_shared_prompts) == (1, 0)


def test_prompts_shared_in_other_writing(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    train = jsonl(tmp_path / "train.jsonl", [pair(number) for number in range(4)])
    loud = [{**pair(number), "prompt": f"  {pair(number)['prompt'].upper()}!"} for number in (1, 2, 8)]
    evaluation = jsonl(tmp_path / "eval.jsonl", [*loud, {**pair(3), "chosen": "another answer"}])
    report = prepare_data(make_config(train, eval_dataset_path=[evaluation]), encoder).report
    assert (report.shared_prompts, report.shared_groups, report.nearly_shared_prompts) == (1, 0, 2)
    assert "1 prompts occur both in training and in evaluation data; 2 evaluation groups have a training" in caplog.text
    assert "Fix: rm-scale data --against EVALUATION_FILE" in caplog.text


def test_hub_splits(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "repo").mkdir()
    for name, count in (("train", 3), ("test", 2)):
        jsonl(tmp_path / "repo" / f"{name}.jsonl", [pair(number) for number in range(count)])
    prepared = prepare_data(make_config(dataset_name=str(tmp_path / "repo"), dataset_test_split="test"), encoder)
    assert (len(prepared.train), len(rows(prepared.eval))) == (3, 2)
    assert [found["name"] for found in prepared.report.to_dict()["hub"]] == [
        f"{tmp_path / 'repo'}[train]",
        f"{tmp_path / 'repo'}[test]",
    ]


def test_a_hub_revision_is_passed_on(make_config: MakeConfig, encoder: TextEncoder) -> None:
    with pytest.raises(DataError, match=r"^dataset_name=owner/none \(split=train, revision=v1\): can't be loaded"):
        prepare_data(make_config(dataset_name="owner/none", dataset_revision="v1"), encoder)


# --- The cache -----------------------------------------------------------------------------------------------------


def test_second_call_reads_the_cache_and_gives_the_same(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, loads: list[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0), pair(1, chosen=""), pair(2)])
    first, second = (prepare_data(make_config(path), encoder) for _ in range(2))
    assert loads == [path]
    assert rows(first.train) == rows(second.train) and first.report == second.report
    assert list(first.rejected) == list(second.rejected) == list(second.rejected) != []
    assert len(second.rejected) == 1


@pytest.mark.parametrize(
    ("changes", "rules"),
    [
        ({"dataset_format": "explicit_prompt"}, {}),
        ({"subset_column": "kind"}, {}),
        ({}, {"max_length": 99}),
        ({}, {"overlong_policy": "truncate_prompt_left"}),
        ({}, {"append_eos": False}),
        ({}, {"add_special_tokens": False}),
        ({}, {"chat_template": "{{ messages }}"}),
    ],
)
def test_each_setting_that_matters_misses_the_cache(
    tmp_path: Path,
    jsonl: Jsonl,
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    loads: list[str],
    changes: dict[str, Any],
    rules: dict[str, Any],
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0)])
    prepare_data(make_config(path), TextEncoder(tokenizer))
    prepare_data(make_config(path, **changes), TextEncoder(tokenizer, EncodingRules(**rules)))
    assert len(loads) == 2


def test_each_setting_that_does_not_matter_hits_the_cache(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, loads: list[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(number) for number in range(4)])
    for values in ({}, {"seed": 7}, {"dataset_num_proc": 2}, {"eval_split_size": 1}, {"max_train_samples": 2}):
        prepare_data(make_config(path, **values), encoder)
    assert len(loads) == 1


def test_a_changed_file_tokenizer_or_code_misses_the_cache(
    tmp_path: Path,
    jsonl: Jsonl,
    make_config: MakeConfig,
    tokenizer: PreTrainedTokenizerFast,
    bos_tokenizer: PreTrainedTokenizerFast,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0)])
    prepare_data(make_config(path), TextEncoder(tokenizer))
    prepare_data(make_config(path), TextEncoder(bos_tokenizer))
    tokenizer.pad_token = "<|im_end|>"
    prepare_data(make_config(path), TextEncoder(tokenizer))
    assert len(loads) == 3
    os.utime(path, ns=(1, 1))
    prepare_data(make_config(path), TextEncoder(tokenizer))
    assert len(loads) == 4
    jsonl(Path(path), [pair(0), pair(1)])
    os.utime(path, ns=(1, 1))
    assert len(prepare_data(make_config(path), TextEncoder(tokenizer)).train) == 2
    os.rename(path, tmp_path / "b.jsonl")
    prepare_data(make_config(str(tmp_path / "b.jsonl")), TextEncoder(tokenizer))
    monkeypatch.setattr(cache, "CODE_VERSION", -1)
    prepare_data(make_config(str(tmp_path / "b.jsonl")), TextEncoder(tokenizer))
    assert len(loads) == 7


def test_processes_do_not_change_the_result(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    given = [pair(number, chosen="" if number % 7 == 0 else f"good {number}") for number in range(600)]
    path = jsonl(tmp_path / "a.jsonl.gz", given)
    one, two = (
        prepare_data(make_config(path, dataset_cache_dir=str(tmp_path / str(n)), dataset_num_proc=n), encoder)
        for n in (1, 2)
    )
    assert rows(one.train) == rows(two.train) and one.report == two.report
    assert [row["row"] for row in one.rejected] == list(range(0, 600, 7))


def test_an_interrupted_build_is_never_used(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0), pair(1)])

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache, "_write_meta", failing)
        prepare_data(make_config(path), encoder)
    assert not list((tmp_path / "cache").glob("encoded-*/meta.json"))
    assert len(prepare_data(make_config(path), encoder).train) == 2


def test_processes_that_start_together_build_once(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, loads: list[str]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(number) for number in range(50)])
    results: list[PreparedData] = []
    threads = [threading.Thread(target=lambda: results.append(prepare_data(make_config(path), encoder))) for _ in "123"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and len(loads) == 1


def test_unwritable_cache(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = jsonl(tmp_path / "a.jsonl", [pair(0)])
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"dataset_cache_dir=.*can't be written .*Fix: --dataset_cache_dir DIR"):
        prepare_data(make_config(path), encoder)


@pytest.mark.parametrize("below", ["", "cache", "one/two/three"])
def test_a_cache_where_a_file_is(
    below: str, tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [pair(0)])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match=r"dataset_cache_dir=.*can't be written .*Fix: --dataset_cache_dir DIR"):
        prepare_data(make_config(path, dataset_cache_dir=str(file / below)), encoder)


def test_waiting_for_another_process_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    attempts: list[float] = []

    def acquire(self: Any, timeout: float) -> str:
        attempts.append(timeout)
        if len(attempts) == 1:
            raise filelock.Timeout("lock")
        return "acquired"

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    assert cache._lock(tmp_path / "lock", "a.jsonl") == "acquired"
    assert "a.jsonl: waiting for another process that is encoding it" in caplog.text


def test_other_system_errors_are_not_blamed_on_the_cache(
    tmp_path: Path, jsonl: Jsonl, make_config: MakeConfig, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache, "encode_batch", fail)
    with pytest.raises(OSError, match=r"Input/output error"):
        prepare_data(make_config(jsonl(tmp_path / "a.jsonl", [pair(0)])), encoder)


@pytest.mark.skipif("RM_SCALE_HH_DATA" not in os.environ, reason="RM_SCALE_HH_DATA does not name the HH file")
def test_real_hh_data(make_config: MakeConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = make_config(os.environ["RM_SCALE_HH_DATA"], eval_split_size=100, dataset_num_proc=2)
    prepared = prepare_data(config, TextEncoder(tokenizer, EncodingRules(max_length=4096)))
    assert prepared.report.sources[0].format == "hh_text"
    assert prepared.report.rows_read == len(prepared.train) + len(rows(prepared.eval)) + len(prepared.rejected)
    assert set(Counter(row["reason"] for row in prepared.rejected)) <= {"empty", "identical_responses", "over_long"}
    raise_if_too_many(prepared.report, config.max_rejected_share)
    json.dumps(prepared.report.to_dict())
