"""`rm-scale slurm pack`: a virtual environment as one file, which each node of a job unpacks to its own disk.

An import looks for thousands of small files. On a shared disk each is a question to one server, and the ranks of all
nodes ask at the same moment; one large file that is read from its beginning to its end costs that server next to
nothing. slurm/common/packed_python.sh is the other half: it unpacks on the node and starts Python there.

The archive holds the environment, the interpreter that it was made with (unless that is the system's own, which every
node has), and rm_scale's own files where they are installed from a checkout. Its first member, MARK, says what is in
it, so that a node knows the key without reading further.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rm_scale.errors import ConfigError, UserError
from rm_scale.files import read_json_object, replacing, sha256_of_file, user_path
from rm_scale.version import PACKAGE

MARK = "rm_scale_packed.txt"
_SHIPPED = ("configs", "ds_configs", "slurm")
_SYSTEM_PREFIXES = ("/", "/usr")
_NOT_IN_BASE = ("__pycache__", "test", "tests", "idlelib", "turtledemo", "ensurepip", "site-packages", "config-*")
_COMPRESSORS = {".zst": ["zstd", "-q", "-3", "-T0"], ".gz": ["gzip", "-1"]}
# Asked of the environment's own Python: where it is, what it was made with, and which libpython it runs on.
_QUESTION = """
import importlib.util, json, sys, sysconfig
maps = [line.split()[-1] for line in open("/proc/self/maps")]
found = importlib.util.find_spec("rm_scale")
print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2], "base_prefix": sys.base_prefix, "prefix": sys.prefix,
    "purelib": sysconfig.get_path("purelib"), "stdlib": sysconfig.get_path("stdlib"),
    "executable": getattr(sys, "_base_executable", sys.executable),
    "libpython": next((name for name in maps if "/libpython" in name), ""),
    "rm_scale": found.origin if found else "",
}))
"""


@dataclass(frozen=True)
class Entry:
    """One name of the archive.

    Attributes:
        name: below the environment's root.
        source: the file or folder to take; `None` when `content` or `link` says it all.
        content: text instead of a file's.
        link: target of a symbolic link.
    """

    name: str
    source: Path | None = None
    content: bytes | None = None
    link: str | None = None

    def member(self) -> tarfile.TarInfo:
        """Return the header: no owner, and the time of the source, by which Python knows its compiled files."""
        info = tarfile.TarInfo(self.name)
        info.mode = 0o755
        if self.source is not None:
            state = self.source.stat() if self.link is None else self.source.lstat()
            info.mode, info.mtime, info.size = stat.S_IMODE(state.st_mode) | 0o200, int(state.st_mtime), state.st_size
        if self.link is not None:
            info.type, info.linkname, info.size = tarfile.SYMTYPE, self.link, 0
        elif self.content is not None:
            info.size = len(self.content)
        elif self.source is not None and self.source.is_dir():
            info.type, info.mode, info.size = tarfile.DIRTYPE, info.mode | 0o700, 0
        return info

    def digest(self) -> str:
        """Return what the entry comes to, for the archive's key."""
        info = self.member()
        if self.link is not None or info.isdir():
            return self.link or ""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        assert self.source is not None
        return sha256_of_file(self.source)


@dataclass(frozen=True)
class Environment:
    """A virtual environment, as its own Python describes it."""

    root: Path
    version: str
    site_packages: Path
    base: Path
    executable: Path
    stdlib: Path
    libpython: Path | None
    rm_scale: Path | None
    sees_base_packages: bool

    @property
    def packs_base(self) -> bool:
        """Whether the interpreter goes into the archive: one outside the system is on a disk that nodes share."""
        return str(self.base) not in _SYSTEM_PREFIXES


@dataclass
class Packed:
    """What was packed."""

    key: str
    num_files: int
    num_bytes: int
    archive_bytes: int = 0
    seconds: float = 0.0
    largest: list[tuple[str, int]] = field(default_factory=list)


# --- What there is ---------------------------------------------------------------------------------------------------


def read_environment(root: Path) -> Environment:
    """Return what a virtual environment says of itself.

    Raises:
        UserError: it is none, or its Python does not start.
    """
    settings = root / "pyvenv.cfg"
    if not settings.is_file():
        raise UserError(
            f"--venv={root}: must be a virtual environment, and has no pyvenv.cfg. Fix: make one with python -m venv "
            "or uv venv, install rm_scale there, and pack that."
        )
    python = root / "bin" / "python"
    try:
        # Isolated: neither the folder at hand nor PYTHONPATH is part of the environment.
        done = subprocess.run([str(python), "-I", "-c", _QUESTION], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"--venv={root}: bin/python can't be run ({error.strerror}); is the interpreter that it was made with "
            f"still there ({python.resolve()})? Fix: make the environment anew."
        ) from error
    if done.returncode != 0:
        raise UserError(
            f"--venv={root}: bin/python fails: {done.stderr.strip()[-400:]} Fix: make the environment anew."
        )
    told: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    system = [line.split("=")[1].strip() for line in settings.read_text().splitlines() if "system-site" in line]
    return Environment(
        root=root,
        version=told["version"],
        site_packages=Path(told["purelib"]),
        base=Path(told["base_prefix"]),
        executable=Path(told["executable"]).resolve(),
        stdlib=Path(told["stdlib"]),
        libpython=Path(told["libpython"]).resolve() if told["libpython"] else None,
        rm_scale=Path(told["rm_scale"]).resolve().parent if told["rm_scale"] else None,
        sees_base_packages=system == ["true"],
    )


def _is_ours(name: str) -> bool:
    return name.lower().replace("-", "_").split(".")[0] in ("rm_scale", "__editable___rm_scale")


def problems_of(environment: Environment) -> list[str]:
    """Return what of an environment lies elsewhere and so would not be moved: editable installs and path files."""
    problems = []
    for record in sorted(environment.site_packages.glob("*.dist-info/direct_url.json")):
        name = record.parent.name.split("-")[0]
        content = read_json_object(record)
        if content.get("dir_info", {}).get("editable") and not _is_ours(name):
            problems.append(
                f"{name} is installed editable from {content.get('url')}: its files are not in the environment. Fix: "
                f"pip install --no-deps {str(content.get('url')).removeprefix('file://')}, then pack."
            )
    for file in sorted(environment.site_packages.glob("*.pth")):
        for line in file.read_text(errors="replace").splitlines():
            # A path file's lines are folders, or statements that begin with "import".
            if not line.strip() or line.startswith(("#", "import ", "import\t")):
                continue
            place = (environment.site_packages / line.strip()).resolve()
            is_ours = (place / "rm_scale" / "__init__.py").is_file()
            if place.exists() and not is_ours and not place.is_relative_to(environment.root.resolve()):
                problems.append(f"{file.name} adds {place}, which is not in the environment. Fix: install it there.")
    return problems


# --- What goes in ----------------------------------------------------------------------------------------------------


def entries_of(environment: Environment, exclude: Sequence[str] = ()) -> list[Entry]:
    """Return everything that goes into the archive but its mark, in the order of names.

    Args:
        environment: what is packed.
        exclude: patterns of names below its root, such as `lib/*/site-packages/onnx*`; what is in them goes too.
    """
    own = _own_package(environment)
    entries = [*_of_environment(environment, own is not None), *_of_base(environment)]
    if own is not None:
        target = environment.site_packages.relative_to(environment.root) / "rm_scale"
        entries += entries_of_package(own, target.as_posix())
    return [entry for entry in sorted(entries, key=lambda entry: entry.name) if not _excluded(entry.name, exclude)]


def _excluded(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}/*") for pattern in patterns)


def _own_package(environment: Environment) -> Path | None:
    """Return the folder of rm_scale to add; `None` when it is installed in the environment like any other package."""
    if environment.rm_scale is None:
        return PACKAGE
    return None if environment.rm_scale.is_relative_to(environment.root.resolve()) else environment.rm_scale


def _of_environment(environment: Environment, without_ours: bool) -> Iterator[Entry]:
    root = environment.root
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        if name.startswith("bin/python") or name == MARK:
            continue  # links to the interpreter are made anew
        if without_ours and path.parent == environment.site_packages and _points_to_ours(path):
            continue
        if without_ours and path.name == "direct_url.json" and _is_ours(path.parent.name):
            continue
        entry = _entry(name, path, root)
        if entry is not None:
            yield _movable_script(entry, root) if path.parent == root / "bin" else entry
    target = f"../base/bin/{environment.executable.name}" if environment.packs_base else str(environment.executable)
    yield Entry(f"bin/python{environment.version}", link=target)
    for name in ("python", "python3"):
        yield Entry(f"bin/{name}", link=f"python{environment.version}")


def _points_to_ours(path: Path) -> bool:
    if path.name.startswith("__editable__") and "rm_scale" in path.name:
        return True
    if path.suffix != ".pth":
        return False
    lines = path.read_text(errors="replace").split("\n")
    return any((path.parent / line.strip() / "rm_scale" / "__init__.py").is_file() for line in lines if line.strip())


def _walk(root: Path) -> Iterator[Path]:
    """Yield everything below a folder, folders before what is in them; links are not followed."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in [*folders, *sorted(files)]:
            yield Path(folder, name)


def _entry(name: str, path: Path, root: Path) -> Entry | None:
    """Return a file, a folder or a link; a file that a link outside names is taken in, as are caches of uv.

    Raises:
        UserError: a link leads to a folder outside.
    """
    if not path.is_symlink():
        return Entry(name, path) if path.is_dir() or path.is_file() else None
    if not path.exists():
        return None
    if path.resolve().is_relative_to(root.resolve()):
        target = os.readlink(path)
        return Entry(
            name, path, link=os.path.relpath(path.resolve(), path.parent.resolve()) if target[0] == "/" else target
        )
    if path.is_dir():
        raise UserError(
            f"{path}: is a link to {path.resolve()}, which is not in the environment. Fix: put the folder in its place."
        )
    return Entry(name, path)


def _movable_script(entry: Entry, root: Path) -> Entry:
    """Let a script that names this environment's Python find the one beside it instead, wherever it is unpacked."""
    if entry.source is None or entry.link is not None or not entry.source.is_file():
        return entry
    content = entry.source.read_bytes()
    first, _, rest = content.partition(b"\n")
    if not first.startswith(b"#!" + str(root).encode() + b"/bin/python"):
        return entry
    # sh runs the second line; to Python it is a text.
    begin = b'#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")/python" "$0" "$@"\n\' \'\'\'\n'
    return Entry(entry.name, entry.source, content=begin + rest)


def _of_base(environment: Environment) -> Iterator[Entry]:
    """Yield the interpreter, its library and headers, as `base/`, where it is not the system's own."""
    if not environment.packs_base:
        return
    base, version = environment.base, environment.version
    yield Entry(f"base/bin/{environment.executable.name}", environment.executable)
    if environment.libpython is not None and environment.libpython.is_relative_to(base):
        yield Entry(f"base/libpython/{environment.libpython.name}", environment.libpython)
    for path in sorted((base / "lib").glob("lib*.so*")):  # conda's interpreters have more than libpython there
        if path.is_file() and not path.name.startswith("libpython"):
            yield Entry(f"base/lib/{path.name}", path)
    keep = {"site-packages"} if environment.sees_base_packages else set()
    left_out = [pattern for pattern in _NOT_IN_BASE if pattern not in keep]
    for source, target in (
        (environment.stdlib, f"base/lib/python{version}"),
        (base / "include" / f"python{version}", f"base/include/python{version}"),
    ):
        for path in _walk(source):
            inner = path.relative_to(source)
            if any(fnmatch.fnmatch(inner.parts[0], pattern) for pattern in left_out if pattern != "__pycache__"):
                continue
            entry = _entry(f"{target}/{inner.as_posix()}", path, base)
            if entry is not None:
                yield entry


def entries_of_package(package: Path, target: str) -> Iterator[Entry]:
    """Yield a package's own files as a wheel of it has them: with the ready files of a checkout as `shipped/`."""
    yield Entry(target, package)
    for path in _walk(package):
        if "__pycache__" not in path.parts and (path.is_dir() or path.is_file()):
            yield Entry(f"{target}/{path.relative_to(package).as_posix()}", path)
    if (package / "shipped").is_dir():
        return
    for folder in _SHIPPED:
        for path in _walk(package.parent / folder):
            if path.is_file() and not path.name.endswith(".local.env"):
                yield Entry(f"{target}/shipped/{path.relative_to(package.parent).as_posix()}", path)


def digest_of_sources(entries: Sequence[Entry], package: str) -> str:
    """Return the digest of rm_scale's own files, as `rm_scale_sources` in slurm/common/software.sh computes it."""
    lines = []
    for entry in entries:
        name = entry.name.removeprefix(f"{package}/")
        if entry.name == name or name.startswith("shipped/") or name.endswith(".pyc"):
            continue
        if entry.source is not None and entry.source.is_file():
            lines.append((name, f"{entry.digest()}  ./{name}\n"))
    return hashlib.sha256("".join(line for _, line in sorted(lines)).encode()).hexdigest()


# --- Writing ---------------------------------------------------------------------------------------------------------


def pack(environment: Environment, output: Path, exclude: Sequence[str] = ()) -> Packed:
    """Write the archive, whole or not at all.

    Args:
        environment: what is packed.
        output: FILE.tar, FILE.tar.zst or FILE.tar.gz; its folder exists.
        exclude: see `entries_of`.

    Raises:
        ConfigError: something of the environment lies outside.
        UserError: the name's ending is unknown, or its compressor is missing.
    """
    started = time.monotonic()
    problems = problems_of(environment)
    if problems:
        raise ConfigError(problems, f"{environment.root} can't be packed")
    entries = entries_of(environment, exclude)
    packed, mark = _describe(environment, entries)
    with replacing(output) as aside:
        with _stream(aside, output.suffix) as file, tarfile.open(fileobj=file, mode="w|") as archive:
            _add(archive, Entry(MARK, content=mark.encode()))
            for entry in entries:
                _add(archive, entry)
        packed.archive_bytes = aside.stat().st_size
    packed.seconds = time.monotonic() - started
    return packed


def _describe(environment: Environment, entries: Sequence[Entry]) -> tuple[Packed, str]:
    key, num_files, num_bytes = hashlib.sha256(), 0, 0
    sizes: dict[str, int] = {}
    for entry in entries:
        info = entry.member()
        key.update(f"{entry.name}\0{info.type!r}\0{info.mode}\0{entry.digest()}\n".encode())
        num_files += info.isreg() and not entry.name.endswith(".pyc")
        num_bytes += (info.size + 4095) // 4096 * 4096 + 512
        _, _, inner = entry.name.partition("/site-packages/")
        package = inner.split("/")[0] or entry.name.split("/")[0]
        sizes[package] = sizes.get(package, 0) + info.size
    site = environment.site_packages.relative_to(environment.root).as_posix()
    packed = Packed(key.hexdigest()[:16], num_files, num_bytes)
    packed.largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    lines = {
        "key": packed.key,
        "files": num_files,  # but compiled ones, which Python adds and replaces
        "bytes": num_bytes,
        "python": environment.version,
        "base": "packed" if environment.packs_base else environment.executable,
        "sources": digest_of_sources(entries, f"{site}/rm_scale"),
    }
    return packed, "".join(f"{name}={value}\n" for name, value in lines.items())


def _add(archive: tarfile.TarFile, entry: Entry) -> None:
    info = entry.member()
    if entry.content is not None:
        archive.addfile(info, io.BytesIO(entry.content))
    elif entry.source is not None and info.isreg():
        with entry.source.open("rb") as file:
            archive.addfile(info, file)
    else:
        archive.addfile(info)


@contextlib.contextmanager
def _stream(path: Path, ending: str) -> Iterator[IO[bytes]]:
    """Yield what to write the archive to: the file itself, or a compressor that writes it."""
    with path.open("wb") as file:
        if ending == ".tar":
            yield file
            return
        compressor = subprocess.Popen(_COMPRESSORS[ending], stdin=subprocess.PIPE, stdout=file)
        assert compressor.stdin is not None
        try:
            yield compressor.stdin
        finally:
            with contextlib.suppress(BrokenPipeError):
                compressor.stdin.close()
            code = compressor.wait()
        if code != 0:
            raise UserError(
                f"{_COMPRESSORS[ending][0]} ended with code {code}. Fix: is the disk of {path.parent} full?"
            )


# --- The command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """`rm-scale slurm pack`."""
    output = user_path(options.output).absolute()
    _check_output(output)
    root = user_path(options.venv or sys.prefix).absolute()
    packed = pack(read_environment(root), output, options.exclude)
    print(_report(packed, root, output))
    return 0


def _check_output(output: Path) -> None:
    compressor = _COMPRESSORS.get(output.suffix, [])
    if not output.name.endswith((".tar", *(f".tar{ending}" for ending in _COMPRESSORS))):
        raise UserError(f"--output={output}: must end in .tar, .tar.zst or .tar.gz. Fix: --output {output.name}.tar")
    if compressor and shutil.which(compressor[0]) is None:
        raise UserError(f"--output={output}: there is no {compressor[0]} here. Fix: --output {output.with_suffix('')}")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}. Fix: make it, on the shared disk.")


def _report(packed: Packed, root: Path, output: Path) -> str:
    largest = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in packed.largest)
    lines: list[Any] = [
        f"packed {root}: {packed.num_files:,} files, {packed.num_bytes / 1e9:.2f} GB ({largest})",
        f"wrote {output}: {packed.archive_bytes / 1e9:.2f} GB, key {packed.key}, in {packed.seconds:.0f} s",
        f"use it: RM_SCALE_PACKED_ENV={output} in slurm/site.env, on a disk that all nodes share",
    ]
    return "\n".join(lines)
