"""Packages of the GPU proof: the list of wheels, what a machine lacks, installation without a network, which Python."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import wheels
from benchmarks.gpu_proof.wheels import Source, find_missing, requirement_name


def needed_here() -> set[str]:
    """All packages that the package and the test tools need, by the metadata of what is installed here."""
    found: set[str] = set()
    queue = [*wheels.project_requirements(), *wheels.TEST_TOOLS]
    from packaging.requirements import Requirement

    while queue:
        requirement = Requirement(queue.pop())
        name = wheels.canonical(requirement.name)
        skipped = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if skipped or name in found or name in wheels.MACHINE_S_OWN:
            continue
        found.add(name)
        queue += importlib.metadata.requires(name) or []
    return found


def test_the_list_is_what_the_pinned_versions_need() -> None:
    carried = {wheel.name: wheel.version for wheel in wheels.WHEELS}
    assert set(carried) | set(wheels.USUAL) == needed_here() and not set(carried) & set(wheels.USUAL)
    pins = wheels.pinned_versions()
    outdated = {name: version for name, version in carried.items() if pins[name] != version}
    assert not outdated, "constraints.txt has moved: download the wheels that --list-wheels names and measure them"


def test_the_list_stays_small() -> None:
    sizes = {wheel.name: max(wheel.bytes_311, wheel.bytes_312) for wheel in wheels.WHEELS}
    assert all(sizes.values()) and sum(sizes.values()) - sizes["bitsandbytes"] + wheels.SLIM_BYTES < 64e6 * 0.7
    assert set(wheels.OPTIONAL) == {"bitsandbytes"}


def test_the_help_names_every_wheel_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"{wheel.name}=={wheel.version}" in said for wheel in wheels.WHEELS)
    assert all(name in said for name in command.step_names()) and "CUDA 13" in said


def test_the_lines_that_fill_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list-wheels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for version in ("3.11", "3.12"):
        words = {word for line in lines if f"--python-version {version} " in line for word in line.split()}
        assert {f"{w.name}=={w.version}" for w in wheels.WHEELS if w.name != "deepspeed"} <= words
        assert {"--no-deps", "--only-binary=:all:", "manylinux2014_x86_64"} <= words
    assert any("pip wheel" in line and "deepspeed==" in line for line in lines)
    assert not any("torch" in word for line in lines if not line.startswith("#") for word in line.split())


def test_step_names_are_those_of_the_plan() -> None:
    from benchmarks.gpu_proof.plan import STEPS
    from benchmarks.gpu_proof.step import functions

    assert command.step_names() == [step.name for step in STEPS] == list(functions())
    assert all(0 < step.least < step.seconds for step in STEPS)


# --- What is missing -------------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), **files: bytes) -> Path:
    """A small but true wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = name.replace("-", "_")
    path = folder / f"{plain}-{version}-py3-none-any.whl"
    info = f"{plain}-{version}.dist-info"
    metadata = "".join(f"Requires-Dist: {text}\n" for text in requires)
    content = {f"{plain}.py": f"version = {version!r}\n".encode(), **files}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}".encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    content[f"{info}/RECORD"] = b""
    content[f"{info}/RECORD"] = wheels._record_of(content, f"{info}/RECORD").encode()
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)
    return path


def names(found: wheels.Missing) -> list[str]:
    return [path.name.split("-")[0] for path in found.install]


def look(folder: Path, requirements: list[str], installed: Mapping[str, tuple[str, tuple[str, ...]]]) -> wheels.Missing:
    return find_missing(folder, requirements, {name: Source(*there) for name, there in installed.items()})


def test_what_is_as_required_stays(tmp_path: Path) -> None:
    make_wheel(tmp_path, "trl", "1.16.0")
    found = look(tmp_path, ["trl>=1.16,<1.17"], {"trl": ("1.16.9", ())})
    assert not found.install and found.present == ("trl",)


def test_what_is_missing_or_outdated_comes_from_a_wheel_with_what_it_needs(tmp_path: Path) -> None:
    make_wheel(
        tmp_path, "trl", "1.16.0", ("datasets>=5", "torch>=99", "never; extra == 'all'", "old; python_version < '3'")
    )
    make_wheel(tmp_path, "trl", "1.15.0")
    make_wheel(tmp_path, "datasets", "5.2.0")
    found = look(tmp_path, ["trl>=1.15,<1.17", "peft>=1"], {"datasets": ("4.0", ()), "torch": ("2.9", ())})
    assert [path.name.split("-py3")[0] for path in found.install] == ["datasets-5.2.0", "trl-1.16.0"], "the newest"
    assert found.absent == ("peft>=1",) and not found.outdated, "torch is never looked at"


def test_a_version_out_of_range_without_a_wheel_is_said_and_used(tmp_path: Path) -> None:
    found = look(tmp_path / "none", ["click>=8.4"], {"click": ("8.1", ())})
    assert found.outdated == ("click>=8.4 (here 8.1)",) and not found.install and not found.absent


def test_what_was_kept_goes_over_when_its_own_range_is_in_the_way(tmp_path: Path) -> None:
    """tokenizers of an image asks for huggingface-hub below 2, and the package for 2.4."""
    make_wheel(tmp_path, "huggingface-hub", "2.4.0")
    make_wheel(tmp_path, "tokenizers", "0.23.3", ("huggingface-hub<3",))
    installed = {"huggingface-hub": ("1.33", ()), "tokenizers": ("0.23.2", ("huggingface-hub<2",))}
    found = look(tmp_path, ["huggingface-hub>=2.4", "tokenizers<0.24"], installed)
    assert names(found) == ["huggingface_hub", "tokenizers"] and not found.outdated


def test_a_pair_that_fits_together_stays_together(tmp_path: Path) -> None:
    """pydantic and its core of other versions than the pinned ones, each made for the other."""
    make_wheel(tmp_path, "pydantic", "2.14.3", ("pydantic-core==2.50.4",))
    make_wheel(tmp_path, "pydantic-core", "2.50.4")
    kept = {"pydantic": ("2.14.4", ("pydantic-core==2.50.5",)), "pydantic-core": ("2.50.5", ())}
    assert not look(tmp_path, ["pydantic>=2.10"], kept).install
    alone = {"pydantic-core": ("2.50.5", ())}
    assert names(look(tmp_path, ["pydantic>=2.10"], alone)) == ["pydantic", "pydantic_core"]


def test_wheels_for_another_python_are_no_help(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "regex", "2026.1")
    wheel.rename(tmp_path / "regex-2026.1-cp27-cp27m-win32.whl")
    assert look(tmp_path, ["regex"], {}).absent == ("regex",)


def test_nothing_is_missing_here(tmp_path: Path) -> None:
    found = find_missing(tmp_path)
    assert (found.install, found.absent, found.outdated) == ((), (), ())
    assert {"transformers", "deepspeed", "pytest", "httpx2"} <= set(found.present) and "torch" not in found.present


def test_names_of_requirements() -> None:
    assert [requirement_name(text) for text in ("a.b>=1", "C_d [x]", "e; y", "f!=2")] == ["a-b", "c-d", "e", "f"]


# --- Installing ------------------------------------------------------------------------------------------------------


def test_wheels_are_installed_without_network_and_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels", "proof-test-package", "3.0", ("torch>=99",))
    found = find_missing(tmp_path / "wheels", ["proof-test-package"], {})
    site = tmp_path / "site"
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/none")
    wheels.install(found, tmp_path / "wheels", site)
    script = "import proof_test_package as p; print(p.version)"
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.stdout.strip() == "3.0", done.stderr
    assert not (site / "torch").exists(), "dependencies were settled before; torch is never touched"
    (site / "proof_test_package.py").write_text("version = 'kept'\n")
    wheels.install(found, tmp_path / "wheels", site)
    assert "kept" in (site / "proof_test_package.py").read_text(), "not a second time"


def test_a_wheel_that_pip_refuses_is_said(tmp_path: Path) -> None:
    broken = tmp_path / "broken-1.0-py3-none-any.whl"
    broken.write_bytes(b"no archive")
    found = wheels.Missing((broken,), (), (), ())
    with pytest.raises(RuntimeError, match="pip could not install the wheels"):
        wheels.install(found, tmp_path, tmp_path / "site")
    assert not (tmp_path / "site" / ".complete").exists()


def test_a_checkout_that_nobody_installed_gets_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    wheels.write_own_metadata(tmp_path)
    monkeypatch.undo()
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "rm-scale" and found.requires == wheels.project_requirements()
    script = "import importlib.metadata as m; print(m.version('rm-scale'), len(m.requires('rm-scale')))"
    told = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"],
        capture_output=True,
        text=True,
    )
    assert told.stdout.split()[1:] == [str(len(wheels.project_requirements()))], told.stderr


def test_bitsandbytes_is_cut_down_to_one_release_of_cuda(tmp_path: Path) -> None:
    libraries = {
        f"bitsandbytes/libbitsandbytes_{kind}.so": b"x" * 1000 for kind in ("cuda124", "cuda130", "cpu", "rocm70")
    }
    wheel = make_wheel(tmp_path, "bitsandbytes", "0.50.2", (), **libraries)
    with pytest.raises(FileNotFoundError, match=r"has no libbitsandbytes_cuda129.so \(it has .*cuda124.so"):
        wheels.slim_bitsandbytes(tmp_path, "12.9")
    assert wheels.slim_bitsandbytes(tmp_path, "13.0") == wheel
    with zipfile.ZipFile(wheel) as archive:
        kept = {Path(name).name for name in archive.namelist() if name.endswith(".so")}
    assert kept == {"libbitsandbytes_cuda130.so", "libbitsandbytes_cpu.so"}
    wheels.install(find_missing(tmp_path, ["bitsandbytes"], {}), tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "bitsandbytes" / "libbitsandbytes_cuda130.so").is_file()
    assert wheels.is_there("bitsandbytes", tmp_path / "site") and not wheels.is_there("no-such-thing", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no bitsandbytes wheel"):
        wheels.slim_bitsandbytes(tmp_path / "empty", "13.0")


# --- Which Python ----------------------------------------------------------------------------------------------------


def fake_python(folder: Path, name: str, **told: object) -> str:
    """A program that answers the question about torch."""
    plain = {
        "python": [3, 12, 3],
        "torch": "2.11.0",
        "cuda": "13.0",
        "gpus": ["NVIDIA Test"],
        "memory": [8e10],
        "why": "",
    }
    path = folder / name
    path.write_text(f"#!/bin/sh\necho noise\necho '{json.dumps({**plain, **told})}'\n")
    path.chmod(0o755)
    return str(path)


def test_the_first_python_whose_torch_sees_a_gpu_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    beside = fake_python(tmp_path, "python3")
    own = fake_python(tmp_path / ".venv" / "bin", "python", gpus=[], cuda=None)
    assert command.choose_python(None, needs_gpu=True)[0] == "python3", "the environment was made without a GPU"
    assert command.choose_python(None, needs_gpu=False)[0] == own, "which a rehearsal does not need"
    fake_python(tmp_path / ".venv" / "bin", "python")
    assert command.choose_python(None, needs_gpu=True)[0] == own
    assert command.choose_python(beside, needs_gpu=True)[1]["gpus"] == ["NVIDIA Test"]
    asked = fake_python(tmp_path, "asked", gpus=[])
    with pytest.raises(SystemExit) as ended:
        command.choose_python(asked, needs_gpu=True)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "torch 2.11.0 sees no GPU. Fix: PYTHON=" in said and "python3" not in said


def test_why_a_python_is_no_use() -> None:
    good = {"python": [3, 12, 0], "torch": "2.9", "cuda": "12.8", "gpus": ["x"], "why": ""}
    assert command.unfit(good, needs_gpu=True) is None
    assert command.unfit({**good, "python": [3, 10, 1]}, needs_gpu=True) == "Python 3.10.1, needed 3.11"
    assert (
        command.unfit({**good, "torch": None, "why": "ImportError: x"}, needs_gpu=True) == "no torch (ImportError: x)"
    )
    assert command.unfit({**good, "gpus": [], "cuda": None}, needs_gpu=True) == "torch 2.9 is built without CUDA"
    assert command.unfit({"why": "not there"}, needs_gpu=False) == "not there"
    assert command.probe("/no/such/python") == {"why": "not there"}


def test_this_python_answers() -> None:
    found = command.probe(sys.executable)
    assert found["python"] == list(sys.version_info[:3]) and str(found["torch"]).startswith("2.")


def test_a_machine_that_lacks_a_package_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"installed": [], "absent": ["trl>=1.16"], "outdated": [], "error": "", "bitsandbytes": False}
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    program.chmod(0o755)
    with pytest.raises(SystemExit) as ended:
        command.give_packages(str(program), {}, tmp_path / "wheels")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "lacks trl>=1.16" in said and "--list-wheels" in said
    assert command.packages_line({**answer, "installed": ["a"], "outdated": ["b<2 (here 3)"]}) == (
        "1 packages from wheels; used though of another version: b<2 (here 3); no bitsandbytes: QLoRA steps are skipped"
    )


def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for words, text in ((["--only", "nine"], "'nine': no step"), (["--jobs", "2"], "steps that measure run alone")):
        with pytest.raises(SystemExit):
            command.parse_arguments(words)
        assert text in capsys.readouterr().err
    assert command.parse_arguments(["--only", "doctor,syncs", "--again", "failed"]).only == ["doctor", "syncs"]
