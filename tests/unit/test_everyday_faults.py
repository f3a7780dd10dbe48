"""Everyday faults: each ends in one message with a fix and exit code 2, never in a traceback or without end."""

from __future__ import annotations

import builtins
import errno
import gzip
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_scale import guard
from rm_scale.cli import main as cli
from rm_scale.config_parsing import parse_config
from rm_scale.data import text_files
from rm_scale.distributed import detect_world
from rm_scale.errors import ModelError, UserError
from rm_scale.inference.model_folder import require_reward_model
from rm_scale.inference.scoring.scorer import RewardScorer
from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract
from rm_scale.planning.shape import check_sizes, read_model_config, shape_from_config
from rm_scale.slurm.allocation import read_allocation
from rm_scale.train import main as train

Told = Callable[..., str]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process, whatever started the tests; log files of defects go to the test's own folder."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs `rm-scale WORDS` (or `train.py`), which must end with code 2 and one message; returns what it said."""

    def call(*words: object, program: Callable[[list[str]], int] = cli, has_fix: bool = True) -> str:
        capsys.readouterr()
        code = program([str(word) for word in words])
        said = capsys.readouterr().err
        assert "Traceback" not in said, said
        assert code == 2, said
        messages = said[said.index("rm_scale: ") :]
        assert messages.count("rm_scale: ") == 1 and ("Fix: " in messages or not has_fix), said
        return messages

    return call


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain one-output classifier with its tokenizer and without a contract."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "reward"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForSequenceClassification.from_pretrained(str(tiny_model), num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


def score(model: Path, source: Path, output: Path, *words: str) -> list[object]:
    return ["score", "--no_contract", "--model", model, "--input", source, "--output", output, *words]


# --- What the operating system refuses -------------------------------------------------------------------------------

FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota")]


@pytest.fixture(params=FAULTS, ids=lambda fault: errno.errorcode[fault[0]])
def failing(request: pytest.FixtureRequest) -> tuple[int, str]:
    found: tuple[int, str] = request.param
    return found


def fail_to_write(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Let every opening for writing below `folder` fail with this system error."""
    real, real_open = os.open, builtins.open

    def refuses(path: Any, writes: bool) -> bool:
        return writes and isinstance(path, str | Path) and Path(path).absolute().is_relative_to(folder)

    def opened(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if refuses(file, any(letter in mode for letter in "wax+")):
            raise OSError(number, os.strerror(number), str(file))
        return real_open(file, mode, *rest, **named)

    def opened_low(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if refuses(path, bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr("io.open", opened)  # pathlib's
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "open", opened_low)


@pytest.fixture
def full_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[int, str]) -> Iterator[Path]:
    folder = tmp_path / "full"
    folder.mkdir()
    fail_to_write(monkeypatch, folder, failing[0])
    yield folder


def test_a_disk_that_takes_nothing(
    refused: Told,
    full_folder: Path,
    failing: tuple[int, str],
    reward_model: Path,
    tiny_model: Path,
    texts: Path,
    pairs_file: Path,
    tmp_path: Path,
) -> None:
    assert failing[1] in refused(*score(reward_model, texts, full_folder / "scores.jsonl"))
    candidates = tmp_path / "candidates.jsonl"
    candidates.write_text('{"prompt": "a", "completions": ["b", "c"], "s": [1, 2]}\n')
    words = ["rank", "--input", candidates, "--score_column", "s", "--output", full_folder / "ranked.jsonl"]
    assert failing[1] in refused(*words)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_config.yaml").write_text("method: full\n")
    said = refused("report", run, "--output", full_folder / "page.html")
    assert failing[1] in said and "page.html" in said and ".writing" not in said
    said = refused(
        "data", "--model_name_or_path", tiny_model, "--dataset_path", pairs_file, "--dataset_cache_dir", full_folder
    )
    assert "dataset_cache_dir" in said or failing[1] in said


def test_what_libraries_say_of_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors is written in Rust, and names the system's error in its text alone; others wrap it."""

    def rust() -> int:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def wrapped() -> int:
        try:
            raise FULL
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    for program in (rust, wrapped):
        assert guard.run_guarded(program) == 2
        assert "the disk is full. Fix: make room" in capsys.readouterr().err


def test_a_full_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> int:
        with Path("/dev/full").open("w") as stream:
            stream.write("x")
        return 0

    assert guard.run_guarded(write) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_port_that_may_not_be_had_is_no_matter_of_files() -> None:
    def bind() -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    assert guard.run_guarded(bind) == 1


def test_names_of_300_characters(refused: Told, tmp_path: Path, texts: Path, reward_model: Path) -> None:
    long = tmp_path / ("x" * 300)
    said = [
        refused(*score(long, texts, tmp_path / "out.jsonl")),
        refused(*score(reward_model, long, tmp_path / "out.jsonl")),
        refused(*score(reward_model, texts, long.with_suffix(".jsonl"))),
        refused("report", long, "--output", tmp_path / "page.html"),
        refused("export", "--model", long, "--output", tmp_path / "out"),
        refused("plan", "--model", long),
        refused("--config", long, program=train),
        refused("--model_name_or_path", long, "--dataset_path", texts, "--output_dir", tmp_path / "o", program=train),
        refused("--model_name_or_path", "m", "--dataset_path", long, "--output_dir", tmp_path / "o", program=train),
        refused("--model_name_or_path", "m", "--dataset_path", texts, "--output_dir", long, program=train),
    ]
    assert all(len(text) < 2500 for text in said)


# --- Settings --------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuv")
)
KNOWN_LAUGHS = "lora_target_modules: &a0 [x, x]\n" + "".join(
    f"{name}: &a{n} [{', '.join([f'*a{n - 1}'] * 40)}]\n"
    for n, name in enumerate(("dataset_path", "eval_dataset_path", "report_to", "output_dir", "force", "run_name"), 1)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("run_name: caf\u00e9\n".encode("latin-1"), "not written in UTF-8, line 1"),
        ("run_name: x\n".encode("utf-16"), "UTF-16"),
        (b"seed: " + b"9" * 5000, "line 1"),
        (b"dataset_path: " + b"[" * 3000 + b"]" * 3000, "nested more than 50 deep"),
        (b"dataset_path:\n" + b"".join(b" " * n + b"a:\n" for n in range(1, 200)), "nested more than 50 deep"),
        (LAUGHS.encode(), "aliases written out"),
        (KNOWN_LAUGHS.encode(), "aliases written out"),
        (b"dataset_path: &a [*a]", "an alias names what it is a part of"),
        (b"model_name_or_path: m\n\nlora_r: [1\nseed: 1\n", "line 4"),
        (b"model_name_or_path: m\nrun_name: 'a\x01b'\n", "line 2"),
        (b"run_name: 2024-02-31", "line 1"),
        (b"bf16: !!bool x", "line 1"),
        (b"a: " + b"x" * 2_000_000, "larger than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_yaml_file_that_cannot_be_read_is_told_alone(
    refused: Told, tmp_path: Path, content: bytes, expected: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    for said in (refused("--config", file, program=train), refused("data", "--config", file)):
        assert expected in said and "(1 problem)" in said and "model_name_or_path: is required" not in said
        assert len(said) < 1000


@pytest.mark.parametrize("name", ["config", "dataset_path"])
def test_what_never_ends_is_not_read(refused: Told, tmp_path: Path, tiny_model: Path, texts: Path, name: str) -> None:
    pipe, zeros = tmp_path / "pipe.jsonl", tmp_path / "zeros.jsonl"
    os.mkfifo(pipe)
    zeros.symlink_to("/dev/zero")
    for file, kind in ((pipe, "a pipe"), (zeros, "a device")):
        words = ["--model_name_or_path", tiny_model, "--dataset_path", texts, f"--{name}", file]
        assert kind in refused("data", *words, "--dataset_cache_dir", tmp_path / "cache")
        if name == "dataset_path":
            assert kind in refused(*score(tiny_model, file, tmp_path / "out.jsonl"))


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_path", "output_dir", "run_name", "deepspeed"])
def test_empty_and_unwritable_values(refused: Told, tmp_path: Path, texts: Path, name: str) -> None:
    good = {"model_name_or_path": "m", "dataset_path": texts, "output_dir": tmp_path / "out"}
    words = [word for key, value in good.items() if key != name for word in (f"--{key}", value)]
    said = refused(*words, f"--{name}", "", program=train)
    # A list of no paths is no path, which has a rule of its own.
    assert f"{name}='': must not be empty" in said or (name == "dataset_path" and "exactly one must be given" in said)
    said = refused(*words, f"--{name}", "caf\udce9", program=train)
    assert "valid UTF-8" in said and f"{name}: is required" not in said
    assert "not valid UTF-8" in refused("data", *words, f"--{name}", "caf\udce9")


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", 100_000),
        ("hidden_size", -64),
        ("vocab_size", 10**30),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 0),
        ("head_dim", 1e999),
    ],
)
def test_sizes_that_no_model_has(
    refused: Told, tmp_path: Path, reward_model: Path, texts: Path, name: str, value: Any
) -> None:
    config = json.loads((reward_model / "config.json").read_text())
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ModelError, match=rf"config.json: {name}=.*must be from.*Fix: "):
        read_model_config(str(folder))
    assert f"{name}=" in refused(*score(folder, texts, tmp_path / "out.jsonl"))
    assert f"{name}=" in refused("plan", "--model", folder)


@pytest.mark.parametrize("value", [-1, True, 0.5, "x", {"a": None}, [1], 10**30])
@pytest.mark.parametrize("name", ["architectures", "id2label", "num_labels", "pad_token_id"])
def test_values_of_config_json_of_another_type(tmp_path: Path, reward_model: Path, name: str, value: Any) -> None:
    fits = f"{name}={value}" in {"pad_token_id=-1", "id2label={'a': None}"}
    config = json.loads((reward_model / "config.json").read_text())
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    if fits:
        require_reward_model(folder)
        return
    with pytest.raises(ModelError, match=rf"config.json: {name}=.*must be .*Fix: "):
        require_reward_model(folder)


def test_a_value_that_transformers_stumbles_over(tmp_path: Path, reward_model: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "x"}))
    with pytest.raises(ModelError, match=r"can't build it from its config\.json \(KeyError: .*Fix: correct the value"):
        RewardScorer.from_pretrained(folder, allow_missing_contract=True)


def test_a_padding_token_beyond_the_embedding(tmp_path: Path, reward_model: Path) -> None:
    config = json.loads((reward_model / "config.json").read_text())
    config["pad_token_id"] = config["vocab_size"]
    with pytest.raises(ModelError, match=r"pad_token_id=(\d+): must be below vocab_size=\1"):
        check_sizes(config)
    check_sizes({**config, "model_type": "gpt2"})  # has no padding row


def test_no_key_heads_are_as_many_as_query_heads_where_transformers_says_so() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    for extra in ({"model_type": "blt"}, {"model_type": "own", "auto_map": {}}):
        check_sizes({**sizes, **extra, "num_key_value_heads": 0})
    with pytest.raises(ModelError, match="num_key_value_heads=0: must be from 1"):
        check_sizes({**sizes, "model_type": "mistral", "num_key_value_heads": 0})


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 900 + "1" + "}" * 900])
def test_a_config_that_is_nested_without_end(tmp_path: Path, reward_model: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    (folder / "config.json").write_text(content)
    for read in (require_reward_model, lambda folder: read_model_config(str(folder))):
        with pytest.raises(ModelError, match=r"config.json.*can't be read \(nested more than 100 deep\)"):
            read(folder)


@pytest.mark.parametrize("text", [None, 7, "x"])
def test_configs_of_another_form(text: Any) -> None:
    with pytest.raises(ModelError, match="shape can't be read"):
        shape_from_config({"model_type": "llama", "text_config": text})
    sizes = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    with pytest.raises(ModelError, match="head_dim=x: must be a number"):
        shape_from_config({**sizes, "head_dim": "x"})


def contract_of(folder: Path) -> dict[str, Any]:
    ScoringContract({}, 0, 400, "float32", "float32", BaseModel("base")).save(folder)
    found: dict[str, Any] = json.loads((folder / "scoring_contract.json").read_text())
    return found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"temperature": 2.0}, "temperature: this rm_scale knows no such field"),
        ({"base_model": {"name": "x", "size": 3}}, "is not whole"),
        ({"base_model": None}, "is not whole"),
        ({"golden_scores": [1]}, "is not whole"),
    ],
)
def test_contracts_with_other_fields(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    values = {**contract_of(tmp_path), **change}
    (tmp_path / "scoring_contract.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=expected):
        ScoringContract.load(tmp_path)
    (tmp_path / "scoring_contract.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        ScoringContract.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "broken", "cut"])
def test_a_tokenizer_that_cannot_be_loaded(
    refused: Told, tmp_path: Path, reward_model: Path, texts: Path, damage: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reward_model, folder)
    contract_of(folder)
    files = [path for path in folder.iterdir() if "token" in path.name]
    assert files
    for path in files:
        if damage == "missing":
            path.unlink()
        elif path.name == "tokenizer.json":
            path.write_text("{}" if damage == "broken" else path.read_text()[:500])
    # Where a library's error leaves the cause open, it stands alone: a fix for another cause would mislead.
    said = refused("score", "--model", folder, "--input", texts, "--output", tmp_path / "out.jsonl", has_fix=False)
    assert "tokenizer can't be loaded" in said


# --- Data ------------------------------------------------------------------------------------------------------------


def test_a_lone_surrogate_costs_its_row_alone(
    reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = '{"prompt": "a", "completion": "\\ud83d\\ude00", "note": "x"}\n'
    source.write_text(good * 40 + '{"prompt": "a", "completion": "b", "note": "\\ud800"}\n' + good)
    words = [str(word) for word in score(reward_model, source, output, "--device", "cpu")]
    assert cli(words) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 42 and rows[40]["score"] is None and rows[40]["error"].startswith("bad_unicode")
    assert all(row["score"] is not None and row["completion"] == "\U0001f600" for row in rows if row is not rows[40])


def rows_of(rows: Iterator[text_files.RawRow]) -> list[Any]:
    return [text_files.parse_row(raw, problem) for _, raw, problem in rows]


def reasons(rows: list[Any]) -> list[str]:
    return [getattr(row, "reason", "") for row in rows]


def test_rows_over_the_limit_are_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1000)
    long, short = json.dumps({"a": "x" * 5000}), json.dumps({"a": "y"})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{short}\n{long}\n{short}\n{long}")
    assert reasons(rows_of(text_files.jsonl_rows(path))) == ["", "too_large", "", "too_large"]
    monkeypatch.setattr(text_files, "_READ_CHARACTERS", 64)
    monkeypatch.setattr(text_files, "_MAX_SKIPPED_BYTES", 640)
    with pytest.raises(UserError, match=r"line 2 has more than"):
        rows_of(text_files.jsonl_rows(path))
    as_list = tmp_path / "rows.json"
    as_list.write_text(f"[{short}, {long}]")
    with pytest.raises(UserError, match=r"a row of more than .* Fix: "):
        rows_of(text_files.json_rows(as_list))


def test_wide_and_large_csv_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{n}" for n in range(100_000)) + "\n")
    with pytest.raises(UserError, match=r"names 100,000 columns, more than 10,000. Fix: "):
        rows_of(text_files.csv_rows(path))
    path.write_text(",".join(["same"] * 9_000) + "\n")
    with pytest.raises(UserError, match=r"names same twice"):
        rows_of(text_files.csv_rows(path))
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1000)
    path.write_text("a,b\n1,2\n" + '"' + ("x" * 100 + "\n") * 20 + '",2\n3,4\n')
    with pytest.raises(UserError, match=r"a cell has more than .*quote"):
        rows_of(text_files.csv_rows(path))
    path.write_text(f"a,b\n{'x' * 600},{'y' * 600}\n")
    with pytest.raises(UserError, match=r"line 2 has more than"):
        rows_of(text_files.csv_rows(path))


@pytest.mark.parametrize("content", [b"\n", b"x", b'{"a": 1}\n', b" "])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_gzip_file_made_to_unpack_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, content: bytes
) -> None:
    monkeypatch.setattr(text_files, "_MAX_UNPACKED_BYTES", 100_000)
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1 << 30)
    path = tmp_path / f"rows.{kind}.gz"
    path.write_bytes(gzip.compress(content * (4_000_000 // len(content))))
    rows = {"jsonl": text_files.jsonl_rows, "json": text_files.json_rows, "csv": text_files.csv_rows}[kind]
    with pytest.raises(UserError, match=r"unpacks to more than 200 times its size.*Fix: "):
        for _ in rows(path):
            pass


def test_too_many_responses_are_a_reason(refused: Told, tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    many = {"prompt": "p", "responses": [f"r{n}" for n in range(100_000)], "ranks": list(range(100_000))}
    rows.write_text(json.dumps(many) + "\n")
    words = ["--model_name_or_path", tiny_model, "--dataset_path", rows, "--dataset_cache_dir", tmp_path / "cache"]
    said = refused("data", *words)
    assert "too_many_responses" in said and "--max_rejected_share" not in said, "no share helps where no row is left"


def test_over_long_rows_name_the_settings_that_help(refused: Told, tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "p" * 500, "chosen": "a", "rejected": "b"}
    rows.write_text(
        "".join(json.dumps({**row, "prompt": f"{n} {'p' * length}"}) + "\n" for n, length in ((1, 500), (2, 5)))
    )
    words = ["--model_name_or_path", tiny_model, "--dataset_path", rows, "--dataset_cache_dir", tmp_path / "cache"]
    said = refused("data", *words, "--max_length", "64", "--dataset_num_proc", "1")
    fix = said[said.index("Fix: ") :]
    assert "--max_length" in fix and "--overlong_policy" in fix and "--max_rejected_share 0.5" in fix
    assert "correct these rows" not in fix


def test_a_large_first_row_is_not_the_sample(
    refused: Told, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rm_scale.data.encoding import TextEncoder

    rows = tmp_path / "rows.jsonl"
    large = {"prompt": "p", "chosen": "x" * 500_000, "rejected": "b"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in (large, {**large, "chosen": "a"}, large)))
    encoded: list[int] = []
    encode = TextEncoder.encode

    def counted(encoder: TextEncoder, prompt: str, response: str, *more: Any) -> list[int]:
        encoded.append(len(response))
        return encode(encoder, prompt, response, *more)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    words = ["--model_name_or_path", tiny_model, "--dataset_path", rows, "--dataset_cache_dir", tmp_path / "cache"]
    assert "over_long 2" in refused("data", *words)
    assert encoded and max(encoded) < 1000


@pytest.mark.parametrize("command", ["score", "rank"])
def test_no_share_is_offered_where_no_row_is_left(
    refused: Told, tmp_path: Path, reward_model: Path, command: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": 1, "completion": 1, "completions": 1, "s": 1}\n' * 2)
    words = score(reward_model, source, tmp_path / "out.jsonl")
    if command == "rank":
        words = ["rank", "--score_column", "s", "--input", source, "--output", tmp_path / "out.jsonl"]
    said = refused(*words)
    assert "Fix: mend them." in said


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "SLURM_GPUS_ON_NODE", "SLURM_ARRAY_TASK_ID"])
@pytest.mark.parametrize("value", ["eight", "-1", "\u00b2", "9" * 5000, "1.5"])
def test_garbage_in_slurms_variables(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{name}=.*must be a whole number.*Fix: "):
        read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", name: value})


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]
)
def test_garbage_in_a_ranks_variables(name: str) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2"} if not name.startswith("SLURM") else {}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "x(y"}
    assert detect_world(step).ranks_on_node == 2
    for value in ("eight", "9" * 5000):
        with pytest.raises(UserError, match=rf"{name}=.*must be a whole number. Fix: "):
            detect_world({**step, **place, name: value})


@pytest.mark.parametrize("nodes", ["a b", "$(x)", "\u00e4", "node[1-"])
def test_garbage_in_the_node_list(nodes: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_JOB_NODELIST=.*Fix: "):
        read_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes})


# --- Our own faults --------------------------------------------------------------------------------------------------


def test_a_defect_of_a_command_ends_in_a_message_a_log_and_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(options: Any) -> int:
        raise KeyError("secret\nof ours")

    monkeypatch.setattr("rm_scale.commands.tiers.run", broken)
    assert cli(["tiers"]) == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said and "Fix: " in said and "KeyError" in said
    (log,) = tmp_path.glob("rm-scale-tiers-*.log")
    assert str(log) in said and "Traceback" in log.read_text() and "in broken" in log.read_text()
    assert cli(["--debug", "tiers"]) == 70
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert cli(["tiers"]) == 70
    assert "Traceback" in capsys.readouterr().err, "where no log can be written the traceback is shown"


# --- Other files that people write -----------------------------------------------------------------------------------


def test_small_files_are_read_as_strictly(refused: Told, tmp_path: Path, texts: Path, reward_model: Path) -> None:
    latin, pipe = tmp_path / "latin", tmp_path / "pipe"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    os.mkfifo(pipe)
    run = tmp_path / "run"
    run.mkdir()
    for file, why in ((latin, "not written in UTF-8"), (pipe, "a pipe"), (tmp_path, "Is a directory")):
        given = ["--model_name_or_path", reward_model, "--dataset_path", texts, "--output_dir", tmp_path / "out"]
        no_tokenizer = "the tokenizer there has no chat template"  # a folder may be a tokenizer's
        assert (why if file != tmp_path else no_tokenizer) in refused(
            *given, "--chat_template_path", file, program=train
        )
        assert why in refused(*score(reward_model, texts, tmp_path / "out.jsonl", "--chat_template_path", str(file)))
        assert why in refused("plan", "--tier", "1b", "--hardware", file)
        assert why in refused("launch", *given, "--hostfile", file, "--dry_run")
    (run / "run_config.yaml").write_bytes(latin.read_bytes())
    assert "not written in UTF-8" in refused("report", run)


def test_a_broken_data_file_is_not_the_caches_fault(
    refused: Told, tmp_path: Path, tiny_model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, *part: int) -> Iterator[text_files.RawRow]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("rm_scale.data.row_chunks.jsonl_rows", forbidden)
    words = ["--model_name_or_path", tiny_model, "--dataset_path", texts, "--dataset_cache_dir", tmp_path / "cache"]
    said = refused("data", *words)
    assert "may not read or write it" in said and "dataset_cache_dir" not in said


# --- Paths -----------------------------------------------------------------------------------------------------------


def test_paths_of_unknown_users(refused: Told, tmp_path: Path, texts: Path, reward_model: Path) -> None:
    run = tmp_path / "a_run"
    (run / "run").mkdir(parents=True)
    (run / "run" / "run_config.yaml").write_text("{}")
    ranked = ("rank", "--score_column", "s", "--input", texts, "--output")
    for words in (
        (*ranked, "~nosuch/x.jsonl"),
        score(reward_model, texts, Path("~nosuch/x.jsonl")),
        ("report", run, "--output", "~nosuch/x.html"),
        ("assets", "tiny", "~nosuch/x"),
        ("assets", "random", "~nosuch/x"),
    ):
        assert "~nosuch/x" in (said := refused(*words)) and "the home ~nosuch" in said


def test_a_home_is_found_wherever_a_path_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "s": [1, 2]}) + "\n")
    words = ["rank", "--score_column", "s", "--input=~/in.jsonl", "--output=~/out.jsonl", "--summary=~/s.json"]
    assert cli(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out.jsonl").is_file() and (tmp_path / "s.json").is_file()


def test_outputs_where_the_system_makes_no_file(refused: Told, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "s": [1, 2]}) + "\n")
    ranked = ("rank", "--score_column", "s", "--input", source, "--output")
    said = refused(*ranked, "/proc/x.jsonl")
    assert "/proc/x.jsonl: nothing can be written in /proc (No such file or directory). Fix: another folder" in said
    said = refused(*ranked, source / "x" / "y.jsonl")
    assert f"{source} is a file, not a folder" in said and "mkdir" not in said


def test_settings_with_a_home(refused: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--model_name_or_path=~/model", "--dataset_path=~/a.jsonl,b.jsonl", "--output_dir=~/run"]
    config = parse_config(words).config
    assert (config.model_name_or_path, config.output_dir) == (f"{tmp_path}/model", f"{tmp_path}/run")
    assert config.dataset_path == [f"{tmp_path}/a.jsonl", "b.jsonl"]
    said = refused(*words[:2], "--output_dir=~nosuch/run", program=train)
    assert "output_dir='~nosuch/run': no user of this machine has the home ~nosuch. Fix:" in said


@pytest.mark.parametrize(("made", "kind"), [("pipe", "a pipe"), ("device", "a device"), ("large", "larger than")])
def test_small_files_that_never_end(refused: Told, tmp_path: Path, reward_model: Path, made: str, kind: str) -> None:
    file = tmp_path / "file"
    if made == "pipe":
        os.mkfifo(file)
    elif made == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)
    for words in (("plan", "--cases", file), ("serve", "--model", reward_model, "--token_file", file)):
        assert kind in refused(*words)


@pytest.mark.parametrize(
    "name",
    ["config.json", "scoring_contract.json", "chat_template.jinja", "tokenizer.json", "model.safetensors"],
)
def test_pipes_and_devices_in_a_models_folder(
    refused: Told, tmp_path: Path, reward_model: Path, tiny_model: Path, texts: Path, name: str
) -> None:
    for source, make, kind in ((reward_model, os.mkfifo, "a pipe"), (tiny_model, to_zero, "a device")):
        folder = tmp_path / kind.split()[1]
        shutil.copytree(source, folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        assert f"{name} is {kind}" in refused(*score(folder, texts, tmp_path / "out.jsonl"))
        assert f"{name} is {kind}" in refused("plan", "--model", folder)
        assert f"{name} is {kind}" in refused("data", "--model_name_or_path", folder, "--dataset_path", texts)


def test_a_pipe_in_the_base_of_an_adapter(refused: Told, tmp_path: Path, lora_run: Path, texts: Path) -> None:
    adapter, contract = tmp_path / "adapter", json.loads((lora_run / "scoring_contract.json").read_text())
    shutil.copytree(lora_run, adapter)
    shutil.copytree(contract["base_model"]["name"], tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    os.mkfifo(tmp_path / "base" / "config.json")
    contract["base_model"]["name"] = str(tmp_path / "base")
    (adapter / "scoring_contract.json").write_text(json.dumps(contract))
    assert "config.json is a pipe" in refused(*score(adapter, texts, tmp_path / "out.jsonl"))


def to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_a_row_of_very_many_columns(refused: Told, tmp_path: Path, tiny_model: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["--model_name_or_path", tiny_model, "--dataset_path", rows, "--dataset_cache_dir", tmp_path / "cache"]
    rows.write_text(json.dumps({f"c{number}": 1 for number in range(300_000)}) + "\n")
    assert "300,000 columns, more than 10,000" in (said := refused("data", *words)) and len(said) < 2000
    rows.write_text(json.dumps({f"c{number}": 1 for number in range(9_000)}) + "\n")
    assert "c19 and 8,980 more" in (said := refused("data", *words)) and len(said) < 3000
