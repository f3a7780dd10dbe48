"""Packages that the proof needs beside torch: which are missing, and their installation from a folder of wheels.

Nothing here needs a network or imports torch, and torch itself is never touched: the proof takes the machine's own.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
TEST_TOOLS = ("pytest", "pytest-timeout")
OPTIONAL = frozenset({"bitsandbytes"})
"""Without them the steps that need them are skipped, and said to be."""

MACHINE_S_OWN = frozenset({"torch"})
"""Taken as it is, whatever its version; what it needs came with it."""

USUAL = (
    *("certifi", "filelock", "fsspec", "idna", "jinja2", "markupsafe", "numpy", "packaging"),
    *("pandas", "psutil", "pyarrow", "python-dateutil", "pyyaml", "tqdm", "typing-extensions", "tzdata"),
)
"""What an image for NVIDIA GPUs usually has. Not on the list to carry; a wheel of one is taken where there is one."""

PYTHONS = ("3.11", "3.12")
PLATFORMS = tuple(
    f"manylinux{kind}_x86_64"
    for kind in ("_2_34", "_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_12", "2010", "_2_5", "1")
)
"""pip matches these by name, so that older ones must be named too."""


class Wheel(NamedTuple):
    """A wheel to carry along, with the size of its file in bytes for Python 3.11 and for 3.12, as downloaded."""

    name: str
    version: str
    bytes_311: int
    bytes_312: int


WHEELS = (
    Wheel("accelerate", "1.15.0", 394295, 394295),
    Wheel("annotated-doc", "0.0.7", 5286, 5286),
    Wheel("annotated-types", "0.8.0", 13427, 13427),
    Wheel("anyio", "4.16.0", 134521, 134521),
    Wheel("bitsandbytes", "0.50.2", 43139553, 43139553),
    Wheel("click", "8.5.1", 126163, 126163),
    Wheel("datasets", "5.2.0", 608276, 608276),
    Wheel("deepspeed", "0.19.8", 2168854, 2168854),
    Wheel("dill", "0.4.1", 120019, 120019),
    Wheel("einops", "0.8.2", 65638, 65638),
    Wheel("h11", "0.16.0", 37515, 37515),
    Wheel("hf-xet", "1.8.0", 4292483, 4292483),
    Wheel("hjson", "3.1.0", 54018, 54018),
    Wheel("httpcore", "1.0.9", 78784, 78784),
    Wheel("httpcore2", "2.16.2", 85551, 85551),
    Wheel("httpx", "0.28.1", 73517, 73517),
    Wheel("httpx2", "2.16.2", 97893, 97893),
    Wheel("huggingface-hub", "2.4.0", 857021, 857021),
    Wheel("iniconfig", "2.3.1", 7552, 7552),
    Wheel("markdown-it-py", "4.3.0", 96951, 96951),
    Wheel("mdurl", "0.1.2", 9979, 9979),
    Wheel("msgpack", "1.2.4", 480247, 475652),
    Wheel("multiprocess", "0.70.19", 144457, 150281),
    Wheel("ninja", "1.13.2", 183365, 183365),
    Wheel("peft", "0.21.2", 835427, 835427),
    Wheel("pluggy", "1.7.0", 27082, 27082),
    Wheel("py-cpuinfo", "9.0.0", 22335, 22335),
    Wheel("pydantic", "2.14.3", 494071, 494071),
    Wheel("pydantic-core", "2.50.4", 2253434, 2261727),
    Wheel("pygments", "2.21.0", 1250147, 1250147),
    Wheel("pytest", "9.2.0", 411776, 411776),
    Wheel("pytest-timeout", "2.4.0", 14382, 14382),
    Wheel("regex", "2026.11.15", 806289, 809168),
    Wheel("rich", "15.0.0", 310654, 310654),
    Wheel("safetensors", "0.8.0", 516040, 516040),
    Wheel("shellingham", "1.5.4", 9755, 9755),
    Wheel("tokenizers", "0.23.3", 3396193, 3396193),
    Wheel("transformers", "5.23.0", 13336114, 13336114),
    Wheel("trl", "1.16.0", 948205, 948205),
    Wheel("truststore", "0.10.5", 19017, 19017),
    Wheel("typer", "0.29.2", 121041, 121041),
    Wheel("typing-inspection", "0.4.5", 14874, 14874),
    Wheel("xxhash", "4.1.0", 471448, 472238),
)
SOURCE_ONLY = ("deepspeed",)
"""Published as source alone: its wheel is built where it is downloaded, without compiling anything."""

SLIM_BYTES = 3_590_000
"""What bitsandbytes is with the library for one CUDA 13 release alone, as made by `slim_bitsandbytes`."""


# --- What to carry ---------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    """Return a package's name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned_versions(repository: Path = REPOSITORY) -> dict[str, str]:
    """Read versions by package name from constraints.txt."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def requirement_name(text: str) -> str:
    """Return the package's name of a requirement."""
    return canonical(re.split(r"[<>=!~\[; ]", text.strip())[0])


def wheel_table() -> str:
    """List the wheels to carry and their sizes, for the help."""
    lines = [f"  {wheel.name + '==' + wheel.version:28} {_megabytes(wheel.bytes_312)}" for wheel in sorted_wheels()]
    required = sum(wheel.bytes_312 for wheel in WHEELS if wheel.name not in OPTIONAL)
    optional = sum(wheel.bytes_312 for wheel in WHEELS if wheel.name in OPTIONAL)
    return "\n".join(
        [
            "wheels to carry to a machine without network (MB, Python 3.12; 3.11 differs by less than 0.1 in all):",
            *lines,
            f"  in all {required / 1e6:.1f} MB without bitsandbytes, which is optional: {optional / 1e6:.1f} MB more,",
            f"  or {SLIM_BYTES / 1e6:.1f} MB cut down to one release of CUDA 13 (--slim-bitsandbytes). Without it the",
            "  QLoRA steps are skipped. Only what the machine lacks is installed, into a folder of the proof's own.",
            "  Not carried, since an image for NVIDIA GPUs usually has them: torch (any version from 2.9 on), triton,",
            f"  CUDA's libraries, {', '.join(USUAL)}.",
        ]
    )


def sorted_wheels() -> list[Wheel]:
    """Return the wheels, largest first."""
    return sorted(WHEELS, key=lambda wheel: (-wheel.bytes_312, wheel.name))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:6.2f}"


def download_lines(folder: str = ".wheels") -> str:
    """Write the commands that fill the folder, for each Python, to be run where there is a network."""
    binary = [wheel for wheel in WHEELS if wheel.name not in SOURCE_ONLY]
    sources = " ".join(f"{wheel.name}=={wheel.version}" for wheel in WHEELS if wheel.name in SOURCE_ONLY)
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    lines = ["# On a machine with a network. Choose the Python of the machine with the GPU (python3 --version there)."]
    for version in PYTHONS:
        for title, wanted in (("", [w for w in binary if w.name not in OPTIONAL]), (" (optional: QLoRA)", OPTIONAL)):
            names = " ".join(f"{w.name}=={w.version}" for w in binary if w in wanted or w.name in wanted)
            lines.append(f"# Python {version}{title}")
            lines.append(
                f"python -m pip download --no-deps --only-binary=:all: --implementation cp --python-version {version} "
                f"{platforms} --dest {folder} {names}"
            )
    lines.append("# Published as source only: its wheel is made here, for any Python. Needs setuptools and torch here,")
    lines.append("# as this project's .venv has them.")
    lines.append(
        f"DS_BUILD_OPS=0 .venv/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir {folder} {sources}"
    )
    lines.append(
        "# bitsandbytes without the libraries for other releases of CUDA than the machine's torch was built for:"
    )
    lines.append(f"python3 -m benchmarks.gpu_proof --wheels {folder} --slim-bitsandbytes 13.0")
    return "\n".join(lines)


# --- What is missing -------------------------------------------------------------------------------------------------


def _packaging() -> Any:
    """Return `packaging`, or the copy that pip carries."""
    try:
        from packaging import requirements, utils, version
    except ImportError:
        from pip._vendor.packaging import requirements, utils, version  # type: ignore[no-redef]
    return requirements, version, utils


def project_requirements(repository: Path = REPOSITORY) -> list[str]:
    """Read the package's requirements, without its extras."""
    import tomllib

    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [str(text) for text in project["dependencies"]]


@dataclass(frozen=True)
class Source:
    """Where a package would come from: what is installed, or a wheel.

    Attributes:
        version: its own.
        requires: what its metadata asks for.
        wheel: the file; `None` for what is installed.
    """

    version: str
    requires: tuple[str, ...]
    wheel: Path | None = None


@dataclass(frozen=True)
class Missing:
    """What the check found.

    Attributes:
        install: wheels that replace or add something.
        absent: needed, not installed, no wheel.
        outdated: of another version than the ranges ask for, no wheel: used as it is.
        present: as required.
    """

    install: tuple[Path, ...]
    absent: tuple[str, ...]
    outdated: tuple[str, ...]
    present: tuple[str, ...]


class Settlement:
    """Which packages stay as installed and which come from wheels.

    All begin as installed. A package whose version somebody's range excludes goes over to its wheel; where the range
    is that of a package that was kept, and the wheel is excluded by it too, that one goes over to its wheel as well.
    Nothing ever goes back, so this ends.

    Args:
        root: requirements to begin with.
        installed: by canonical name.
        wheels: by canonical name; the newest that this Python takes.
    """

    def __init__(self, root: Sequence[str], installed: Mapping[str, Source], wheels: Mapping[str, Source]) -> None:
        self.root, self.installed, self.wheels = root, installed, wheels
        self.from_wheel: set[str] = set()
        while self._next_goes_over():
            pass

    def source(self, name: str) -> Source | None:
        """Return where a package comes from; `None` when it is nowhere."""
        if name in self.from_wheel or name not in self.installed:
            return self.wheels.get(name)
        return self.installed[name]

    def ranges(self) -> dict[str, list[tuple[str, Any]]]:
        """Find who asks for which versions of each package that is needed; "" is the proof itself."""
        found: dict[str, list[tuple[str, Any]]] = {}
        queue = [("", text) for text in self.root]
        while queue:
            asker, text = queue.pop()
            requirement = _packaging()[0].Requirement(text)
            extras = ("", *requirement.extras)
            if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in extras):
                continue
            name = canonical(requirement.name)
            if name in MACHINE_S_OWN:
                continue
            is_new = name not in found
            found.setdefault(name, []).append((asker, requirement.specifier))
            source = self.source(name)
            if is_new and source is not None:
                queue += [(name, text) for text in source.requires]
        return found

    def violated(self) -> dict[str, list[tuple[str, Any]]]:
        """Return the ranges that what was chosen does not meet, by package."""
        found = {}
        for name, ranges in self.ranges().items():
            source = self.source(name)
            bad = [item for item in ranges if source is None or not item[1].contains(source.version, prereleases=True)]
            if bad:
                found[name] = bad
        return found

    def _next_goes_over(self) -> bool:
        for name, ranges in sorted(self.violated().items()):
            askers = [asker for asker, _ in ranges if asker]
            for candidate in [name, *askers]:
                kept = candidate in self.installed and candidate not in self.from_wheel
                if kept and candidate in self.wheels and self._would_help(candidate, name, ranges):
                    self.from_wheel.add(candidate)
                    return True
        return False

    def _would_help(self, candidate: str, name: str, ranges: Sequence[tuple[str, Any]]) -> bool:
        """Ask whether a wheel may help: its own if it meets what the proof and other wheels want, an asker's always."""
        if candidate != name:
            return True
        version = self.wheels[name].version
        firm = [range_ for asker, range_ in ranges if not asker or asker in self.from_wheel or asker in self.wheels]
        return bool(firm) and any(range_.contains(version, prereleases=True) for range_ in firm)


def find_missing(
    folder: Path,
    requirements: Iterable[str] | None = None,
    installed: Mapping[str, Source] | None = None,
) -> Missing:
    """Compare what is installed with what the package requires, and choose wheels for what is not as it should be.

    Args:
        folder: of wheels; need not exist.
        requirements: to begin with; default the package's and the test tools.
        installed: by canonical name; default this Python's.
    """
    root = [*project_requirements(), *TEST_TOOLS] if requirements is None else list(requirements)
    settled = Settlement(root, _installed() if installed is None else installed, _wheels_in(folder))
    needed, violated = sorted(settled.ranges()), settled.violated()
    sources = {name: settled.source(name) for name in needed}
    texts = {name: name + ",".join(sorted({str(item[1]) for item in bad})) for name, bad in violated.items()}
    return Missing(
        install=tuple(source.wheel for source in sources.values() if source is not None and source.wheel is not None),
        absent=tuple(texts[name] for name, source in sources.items() if source is None),
        outdated=tuple(
            f"{texts[name]} (here {source.version})"
            for name, source in sources.items()
            if source is not None and name in violated
        ),
        present=tuple(name for name, source in sources.items() if source is not None and source.wheel is None),
    )


def _installed() -> dict[str, Source]:
    """Read what is installed; the first of each name on the path counts, as for an import."""
    found: dict[str, Source] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonical(name), Source(distribution.version, tuple(distribution.requires or ())))
    return found


def _wheels_in(folder: Path) -> dict[str, Source]:
    """Find the newest wheel of each package that this Python can install, by canonical name."""
    found: dict[str, Source] = {}
    supported, parse = _supported_tags(), _packaging()[1].Version
    for path in sorted(folder.glob("*.whl")) if folder.is_dir() else []:
        name, version, _, tags = _packaging()[2].parse_wheel_filename(path.name)
        key = canonical(name)
        if supported & tags and (key not in found or parse(found[key].version) < version):
            found[key] = Source(str(version), _requires(path), path)
    return found


def _supported_tags() -> frozenset[Any]:
    try:
        from packaging import tags
    except ImportError:
        from pip._vendor.packaging import tags  # type: ignore[no-redef]
    return frozenset(tags.sys_tags())


def _requires(wheel: Path) -> tuple[str, ...]:
    """Read what a wheel's metadata asks for."""
    from email.parser import Parser

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
        return tuple(str(text) for text in found)


# --- Installing ------------------------------------------------------------------------------------------------------


def install(found: Missing, folder: Path, site: Path) -> None:
    """Put the wheels into `site`, which is to come first on PYTHONPATH. Dependencies were settled: pip adds none.

    Raises:
        RuntimeError: pip failed.
    """
    stamp = site / ".complete"
    names = sorted(path.name for path in found.install)
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == names:
        return
    site.mkdir(parents=True, exist_ok=True)
    if found.install:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--find-links", str(folder)]
        done = subprocess.run(
            [*command, "--target", str(site), *map(str, found.install)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip could not install the wheels: {done.stderr.strip()[-800:]}")
    write_own_metadata(site)
    stamp.write_text(json.dumps(names), encoding="utf-8")


def write_own_metadata(site: Path, repository: Path = REPOSITORY) -> None:
    """Let `importlib.metadata` know the package, where nothing has installed it: its doctor reads its own ranges."""
    import tomllib

    try:
        importlib.metadata.distribution("rm-scale")
        return
    except importlib.metadata.PackageNotFoundError:
        pass
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (repository / "rm_scale" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([^"]+)"', source)
    version = found.group(1) if found else "0"
    lines = ["Metadata-Version: 2.1", "Name: rm-scale", f"Version: {version}"]
    lines += [f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {text}" for text in project["dependencies"]]
    target = site / f"rm_scale-{version}.dist-info"  # found by this name
    target.mkdir(parents=True, exist_ok=True)
    (target / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def slim_bitsandbytes(folder: Path, cuda: str) -> Path:
    """Rewrite the bitsandbytes wheel in the folder without the libraries for other CUDA releases.

    Args:
        folder: holds the wheel.
        cuda: as `torch.version.cuda` has it, e.g. 13.0.

    Raises:
        FileNotFoundError: there is no such wheel, or it has no library for that release.
    """
    wheel = next(iter(sorted(folder.glob("bitsandbytes-*.whl"))), None)
    if wheel is None:
        raise FileNotFoundError(f"{folder}: holds no bitsandbytes wheel. Fix: --list-wheels says how to download it.")
    keep = f"libbitsandbytes_cuda{''.join(cuda.split('.')[:2])}.so"
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    libraries = {Path(name).name for name in files if Path(name).suffix == ".so"}
    if keep not in libraries:
        known = ", ".join(sorted(name for name in libraries if "_cuda" in name))
        raise FileNotFoundError(f"{wheel.name}: has no {keep} (it has {known}). Fix: a CUDA release of these.")
    for name in [name for name in files if Path(name).name in libraries - {keep, "libbitsandbytes_cpu.so"}]:
        del files[name]
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    files[record] = _record_of(files, record).encode()
    aside = wheel.with_suffix(".slim")  # not rm_scale.files.replacing: this runs where nothing is installed yet
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    aside.replace(wheel)
    return wheel


def _record_of(files: Mapping[str, bytes], record: str) -> str:
    """Make a wheel's list of its files with their hashes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, content in files.items():
        if name != record:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            writer.writerow([name, f"sha256={digest}", len(content)])
    writer.writerow([record, "", ""])
    return text.getvalue()


def is_there(name: str, site: Path) -> bool:
    """Look whether a package is installed, in this Python or in `site`."""
    paths = [str(site), *sys.path]
    return any(canonical(found) == name for found in _names(importlib.metadata.distributions(path=paths)))


def _names(distributions: Iterable[importlib.metadata.Distribution]) -> Iterator[str]:
    for distribution in distributions:
        if distribution.metadata["Name"]:
            yield distribution.metadata["Name"]


def main(arguments: Sequence[str]) -> int:
    """Check and install; answer with one line of JSON. The command line is `python wheels.py FOLDER SITE`."""
    folder, site = (Path(text) for text in arguments)
    found = find_missing(folder)
    absent = [text for text in found.absent if requirement_name(text) not in OPTIONAL]
    answer: dict[str, Any] = {
        "installed": [path.name for path in found.install],
        "absent": absent,
        "outdated": list(found.outdated),
        "error": "",
    }
    if not absent:
        try:
            install(found, folder, site)
        except (RuntimeError, OSError) as error:
            answer["error"] = str(error)
    answer["bitsandbytes"] = is_there("bitsandbytes", site)
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
