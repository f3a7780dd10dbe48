"""What commands may write over: nothing that we did not write, and nothing that they read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from rm_scale.cli import main
from rm_scale.distributed import World
from rm_scale.errors import ConfigError, DataError
from rm_scale.inference.export.earlier_export import target_problem
from rm_scale.inference.scoring.batch_scoring import ScoringJob, forget_parts, open_parts
from rm_scale.launch import auto_batch
from rm_scale.output_paths import (
    PAGE_MARK,
    RUN_RECORDS,
    file_problem,
    folder_problem,
    foreign_files,
    foreign_in,
    is_our_page,
    list_files,
    remove_part,
    removed_with_a_run,
    run_output_problem,
)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a run leaves behind, without the numbers."""
    folder = tmp_path / "outputs" / "mine"
    (folder / "run").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "scoring_contract.json", "README.md", "run/run_config.yaml"):
        (folder / name).write_text("{}")
    return folder


# --- Files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_exists_needs_the_flag_and_an_input_is_never_written(run_folder: Path, tmp_path: Path) -> None:
    new, taken = tmp_path / "new.jsonl", tmp_path / "taken.jsonl"
    taken.write_text("x")
    link = tmp_path / "link.jsonl"
    link.symlink_to(taken)
    assert file_problem("output=new", new, overwrite=False) is None
    assert "exists. Fix: another name, or --overwrite." in str(file_problem("o", taken, overwrite=False))
    assert file_problem("o", taken, overwrite=True) is None
    assert "is the input" in str(file_problem("o", link, overwrite=True, read=[taken]))
    weights = run_folder / "model.safetensors"
    for path in (weights, run_folder / "run" / "run_config.yaml", run_folder / "run" / ".." / "config.json"):
        assert "is a file of" in str(file_problem("o", path, overwrite=True, read=[run_folder]))
    assert file_problem("o", run_folder / "scores.jsonl", overwrite=False, read=[run_folder]) is None
    assert "is a folder" in str(file_problem("o", tmp_path, overwrite=True))
    assert "its folder does not exist" in str(file_problem("o", tmp_path / "no" / "where", overwrite=True))
    assert "is a device or a pipe" in str(file_problem("o", os.devnull, overwrite=True))


def test_a_page_of_ours_may_be_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><head>{PAGE_MARK}")
    assert is_our_page(page) and file_problem("o", page, overwrite=False, ours=is_our_page) is None
    page.write_text(f"<p>{' ' * 2000}{PAGE_MARK}")
    assert not is_our_page(page), "text that quotes the mark is no page"


def test_a_report_replaces_reports_alone(full_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(full_run)
    for name in ("model.safetensors", "README.md", "run/metrics.jsonl", "run/run_config.yaml"):
        for words in ([], ["--overwrite"]):
            assert main(["report", str(full_run), "--output", str(full_run / name), *words]) == 2
            assert "which is read here; it is not written over" in capsys.readouterr().err
    assert tree(full_run) == before
    mine = tmp_path / "notes.html"
    mine.write_text("mine")
    assert main(["report", str(full_run), "--output", str(mine)]) == 2 and mine.read_text() == "mine"
    assert main(["report", str(full_run), "--output", str(mine), "--overwrite"]) == 0
    assert main(["report", str(full_run), "--output", str(mine)]) == 0, "our own page, once more"


def test_a_part_of_a_run_stands_for_all_of_it(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(full_run)
    for name in ("model.safetensors", "scoring_contract.json", "run/metrics.jsonl"):
        words = ["report", str(full_run / "run"), "--output", str(full_run / name), "--overwrite"]
        assert main(words) == 2
        assert "which is read here; it is not written over" in capsys.readouterr().err
    assert tree(full_run) == before


def test_what_belongs_to_what_is_read(run_folder: Path, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter, run_folder / "checkpoint-6", run_folder / "merged", tmp_path / "checkpoint-1"):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (tmp_path / "best").symlink_to(run_folder / "checkpoint-6")
    for part in (*(run_folder / name for name in ("run", "checkpoint-6", "merged")), tmp_path / "best"):
        assert "is a file of" in str(
            file_problem("o", run_folder / "scoring_contract.json", overwrite=True, read=[part])
        )
    assert f"is a file of {base}" in str(file_problem("o", base / "config.json", overwrite=True, read=[adapter]))
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "scoring_contract.json").write_text(json.dumps({"base_model": {"name": str(run_folder / "merged")}}))
    assert "is a file of" in str(file_problem("o", run_folder / "config.json", overwrite=True, read=[adapter]))
    (tmp_path / "mine.json").write_text("x")
    assert file_problem("o", tmp_path / "mine.json", overwrite=True, read=[tmp_path / "checkpoint-1"]) is None


def test_predictions_replace_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rm_scale.planning.published.predict import COLUMNS

    cases, output = tmp_path / "cases.csv", tmp_path / "out.csv"
    cases.write_text(",".join(COLUMNS) + "\n" + "a," + ",".join("" for _ in COLUMNS[1:]) + "\n")
    output.write_text("mine\n")
    words = ["plan", "--cases", str(cases), "--output", str(output)]
    assert main(words) == 2 and output.read_text() == "mine\n"
    assert "exists. Fix: another name, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and main(words) == 0
    assert main(["plan", "--cases", str(cases), "--output", str(cases), "--overwrite"]) == 2


def test_rank_keeps_the_model_s_files_and_lists_of_what_was_left_out(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text("{}")
    out = str(tmp_path / "out.jsonl")
    words = ["rank", "--model", str(run_folder), "--input", str(tmp_path / "in.jsonl"), "--output", out]
    before = tree(tmp_path)
    assert main([*words, "--summary", str(run_folder / "config.json"), "--overwrite"]) == 2
    assert "config.json: is a file of" in capsys.readouterr().err
    (run_folder / "checkpoint-6").mkdir()
    part = [*words[:2], str(run_folder / "checkpoint-6"), *words[3:], "--overwrite"]
    assert main([*part, "--summary", str(run_folder / "scoring_contract.json")]) == 2
    assert "scoring_contract.json: is a file of" in capsys.readouterr().err
    template = tmp_path / "template.jinja"
    template.write_text("x")
    assert main([*words, "--chat_template_path", str(template), "--summary", str(template), "--overwrite"]) == 2
    assert "template.jinja: is the input" in capsys.readouterr().err
    (run_folder / "checkpoint-6").rmdir()
    template.unlink()
    assert main([*words, "--curves", out]) == 2
    assert "out.jsonl: two results would be written to it" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "in.jsonl"), "--overwrite"]) == 2
    assert tree(tmp_path) == before
    (tmp_path / "out.jsonl.left_out.jsonl").write_text("mine")
    assert main(words) == 2
    assert "out.jsonl.left_out.jsonl: exists" in capsys.readouterr().err


def test_eval_keeps_a_run_s_own_records(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(run_folder)
    words = ["eval", "--model", str(run_folder), "--dataset_path", str(run_folder / "config.json")]
    assert main([*words, "--output", str(run_folder / "run"), "--overwrite"]) == 2
    assert "holds a run's own records" in capsys.readouterr().err
    assert tree(run_folder) == before


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_what_must_stay_is_not_replaced(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [("the model itself", run_folder)]
    assert "holds the model itself" in str(folder_problem("o", run_folder.parent, kept))
    assert "holds the model itself" in str(folder_problem("o", run_folder / ".." / "..", kept))
    assert "is the model itself" in str(folder_problem("o", run_folder, kept))
    assert folder_problem("o", run_folder / "exported", kept) is None
    (tmp_path / "link").symlink_to(tmp_path / "outputs")
    assert "is a link" in str(folder_problem("o", tmp_path / "link", kept))
    (tmp_path / "other" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other" / "deep")
    assert "holds the current directory" in str(folder_problem("o", tmp_path / "other", []))


def test_only_an_export_with_nothing_added_is_replaced(run_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    kept = [("the model itself", run_folder), ("its base model", "org/name")]
    assert target_problem(target, False, kept) is None
    target.mkdir()
    assert target_problem(target, False, kept) is None, "an empty folder"
    (target / "model.safetensors").write_text("w")
    assert "exists. Fix: --overwrite" in str(target_problem(target, False, kept))
    assert "is no earlier export" in str(target_problem(target, True, kept))
    list_files(target)
    assert foreign_files(target) == [] and target_problem(target, True, kept) is None
    (target / "model.onnx").write_text("o")
    assert target_problem(target, True, kept) is None, "ours, too"
    (target / "notes" / "empty").mkdir(parents=True)
    assert foreign_files(target) == ["model.onnx", "notes/empty"]
    assert "notes/empty in it did not come from us" in str(target_problem(target, True, kept))
    assert "is a file" in str(target_problem(run_folder / "config.json", True, kept))
    assert "is no earlier export" in str(target_problem(run_folder / "run", True, kept))


def test_an_export_never_removes_its_model(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(lora_run, outputs / "mine")
    (outputs / "neighbour").mkdir()
    (outputs / "neighbour" / "model.safetensors").write_text("theirs")
    before = tree(tmp_path)
    model = str(outputs / "mine")
    for command in ("export", "merge"):
        for target, why in (
            (outputs, "holds the model itself"),
            (outputs / "mine", "is the model itself"),
            (outputs / "mine" / "run", "is no earlier export"),
            (outputs / "neighbour", "is no earlier export"),
        ):
            assert main([command, "--model", model, "--output", str(target), "--overwrite"]) == 2
            assert why in capsys.readouterr().err
    assert tree(tmp_path) == before


# --- Folders of parts, trials and caches ---------------------------------------------------------------------------


def test_a_foreign_folder_of_parts_is_left_alone(tmp_path: Path) -> None:
    job = ScoringJob(tmp_path / "out.jsonl", {"input": 1})
    job.parts_folder.mkdir()
    (job.parts_folder / "part-00000000.jsonl").write_text("mine")
    before = tree(tmp_path)
    for call in (lambda: open_parts(job, World()), lambda: forget_parts(job)):
        with pytest.raises(DataError, match=r"holds part-00000000.jsonl, which no scoring job wrote"):
            call()
    assert tree(tmp_path) == before
    (job.parts_folder / "part-00000000.jsonl").unlink()
    open_parts(job, World())
    (job.parts_folder / "part-00000000.jsonl").write_text("{}")
    open_parts(job, World())
    (job.parts_folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds notes.txt, which no scoring job wrote"):
        forget_parts(job)
    (job.parts_folder / "notes.txt").unlink()
    forget_parts(job)
    assert not job.parts_folder.exists()


def test_what_goes_with_an_overwritten_run() -> None:
    for name in (
        "run",
        "checkpoint-12",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "adapter_config.json",
    ):
        assert removed_with_a_run(name), name
    for name in ("checkpoint-notes", "model_backup.safetensors", "adapter_notes.md", "runs", "merged_by_me", "notes"):
        assert not removed_with_a_run(name), name


def test_a_run_does_not_begin_among_foreign_files(run_folder: Path, tmp_path: Path) -> None:
    assert run_output_problem(run_folder, removes=True, merges=True, read=[]) is None
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "data.txt").write_text("x")
    assert run_output_problem(theirs, removes=True, merges=True, read=[]) is None
    (theirs / "README.md").write_text("x")
    assert "holds README.md, which no run of rm_scale wrote" in str(run_output_problem(theirs, False, False, []))


def sealed(folder: Path, step: int) -> Path:
    """A checkpoint as its manifest shows it."""
    folder.mkdir()
    (folder / "model.safetensors").write_text("w")
    files = {"model.safetensors": {"size": 1, "sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps({"step": step, "world_size": 1, "files": files}))
    return folder


def test_some_manifest_is_no_sign_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("model.safetensors", "config.json", "README.md", "checkpoint-5/manifest.json"):
        (tmp_path / name).write_text("theirs")
    assert "which no run of rm_scale wrote" in str(run_output_problem(tmp_path, False, False, []))
    (tmp_path / "checkpoint-5" / "manifest.json").unlink()
    (tmp_path / "checkpoint-5").rmdir()
    sealed(tmp_path / "checkpoint-5", 5)
    assert run_output_problem(tmp_path, False, False, []) is None


def test_the_record_of_a_stream_belongs_to_its_run() -> None:
    for name in ("stream.jsonl", "stream-general_1.jsonl"):
        assert RUN_RECORDS.fullmatch(name)
    assert not RUN_RECORDS.fullmatch("streams.jsonl")


def test_a_run_is_removed_as_far_as_it_is_ours(run_folder: Path) -> None:
    records = [
        *("plan.json", "attempts.jsonl", "lives.jsonl", "report.html", ".timing.json.0123abcd.writing", ".nfs0001"),
        *("hang-attempt1/rank-00001.json", "hang-attempt1/rank-00000.txt", "hang-life2/rank-00000.json"),
    ]
    for name in records:
        (run_folder / "run" / name).parent.mkdir(exist_ok=True)
        (run_folder / "run" / name).write_text("{}")
    for name, step in (("checkpoint-6", 6), ("unverified-checkpoint-7", 7), ("later-checkpoint-8-0123abcd", 8)):
        sealed(run_folder / name, step)
    assert run_output_problem(run_folder, True, True, []) is None
    mine = ("run/notes.md", "run/plots/fig.png", "checkpoint-500/pytorch_model.bin", "checkpoint-6/notes.txt")
    for name in (*mine, "later-checkpoint-8-0123abcd/thesis.txt", "config.json.d/x"):
        path = run_folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        problem = str(run_output_problem(run_folder, True, True, []))
        assert (f"{path} was not written by the earlier run" in problem) is (name != "config.json.d/x"), name
        assert run_output_problem(run_folder, False, True, []) is None, "a run that is resumed removes nothing"
        path.unlink()


def test_what_appears_in_a_run_while_it_is_removed_stays(run_folder: Path) -> None:
    (run_folder / "run" / "plots").mkdir()
    (run_folder / "run" / "plots" / "fig.png").write_text("mine")
    (run_folder / "run" / "empty").mkdir()
    folder = sealed(run_folder / "checkpoint-6", 6)
    (folder / "notes.txt").write_text("mine")
    assert remove_part(run_folder / "run") == ["plots/fig.png"] and remove_part(folder) == ["notes.txt"]
    assert remove_part(run_folder / "config.json") == remove_part(sealed(run_folder / "checkpoint-7", 7)) == []
    names = [path.relative_to(run_folder).as_posix() for path in sorted(run_folder.rglob("*"))]
    kept = ["checkpoint-6", "checkpoint-6/notes.txt", "run", "run/plots", "run/plots/fig.png"]
    assert names == sorted([*kept, "README.md", "model.safetensors", "scoring_contract.json"])


def test_a_real_run_holds_nothing_foreign(full_run: Path, lora_run: Path) -> None:
    for run in (full_run, lora_run):
        assert [foreign_in(path) for path in run.iterdir() if removed_with_a_run(path.name) and foreign_in(path)] == []
        assert run_output_problem(run, True, True, []) is None


def test_trials_go_to_a_folder_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run.auto_batch"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    refused = r"auto_batch: .* exists, and trials would go there"
    with pytest.raises(ConfigError, match=refused):
        auto_batch._begin(folder)
    assert tree(tmp_path) == before
    shutil.rmtree(folder)
    auto_batch._begin(folder)
    (folder / "0").mkdir()
    (folder / "0" / "config.json").write_text("of a killed search")
    auto_batch._begin(folder)
    assert [path.name for path in folder.iterdir()] == [auto_batch.MARK_FILE]
    (folder / "notes").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for taken in (folder, tmp_path / "link"):
        with pytest.raises(ConfigError, match=refused):
            auto_batch._begin(taken)


def test_a_damaged_cache_entry_keeps_what_is_not_ours(tmp_path: Path) -> None:
    from rm_scale.data.cache import _require_own

    folder = tmp_path / "encoded-0"
    for part in ("raw", "locks", "chunk-00000"):
        (folder / part).mkdir(parents=True)
    (folder / "rejected.jsonl").touch()
    _require_own(folder)
    (folder / "notes").write_text("mine")
    with pytest.raises(DataError, match=r"notes in it is not ours; nothing is removed"):
        _require_own(folder)


def test_an_export_where_nothing_can_be_written() -> None:
    said = str(target_problem(Path("/proc/exported"), False, []))
    assert "output=/proc/exported: nothing can be written in /proc (No such file or directory). Fix:" in said
