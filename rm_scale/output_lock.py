"""One run at a time writes to an output directory: a file there names the process that does.

The file is made with O_CREAT | O_EXCL, which network file systems honour. Whoever finds it looks whether its owner
still runs: on the same machine by process id and start time, elsewhere by asking Slurm. What can't be told counts as
running. Standard library only: a Slurm job asks before it starts anything.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rm_scale.errors import UserError, system_fault
from rm_scale.files import read_json_object
from rm_scale.logs import get_logger

logger = get_logger(__name__)

LOCK_FILE = ".rm_scale_lock"
_HALF_WRITTEN_SECONDS = 2.0
_SQUEUE_SECONDS = 30
_GUARD_SECONDS = 2 * _SQUEUE_SECONDS
_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR)
_held: set[Path] = set()
"""Locks of this process."""
_taking = threading.Lock()
"""Of this process's threads one at a time takes a lock: it may be made and not yet be in `_held`."""


@dataclass(frozen=True)
class Owner:
    """The process that writes to an output directory.

    Attributes:
        host: its machine's name.
        pid: process id there.
        started: when the process started, in the kernel's ticks since boot.
        boot: tells one boot of a machine from the next; empty where the system does not say.
        machine: tells machines of one name apart; empty where the system does not say.
        namespace: process ids of another one (a container's) mean nothing here.
        job: Slurm's number, `None` outside; of an array's task that of the task.
        task: what Slurm's commands call an array's task, such as 100_2: that number may be the whole array's.
        attempt: how often Slurm has restarted the job.
        cluster: Slurm's name of its cluster.
        since: when it began to write, for people.
    """

    host: str
    pid: int
    started: int = 0
    boot: str = ""
    machine: str = ""
    namespace: str = ""
    job: int | None = None
    task: str = ""
    attempt: int = 0
    cluster: str = ""
    since: str = ""

    @property
    def job_name(self) -> str:
        """What scancel and --dependency take for this job alone."""
        return self.task or str(self.job)

    def text(self) -> str:
        """Say who it is."""
        job = f", Slurm job {self.job_name}" if self.job is not None else ""
        since = f", since {self.since}" if self.since else ""
        return f"process {self.pid} on {self.host}{job}{since}"


def this_process(environ: Mapping[str, str] | None = None) -> Owner:
    """Return this process as an owner."""
    env = os.environ if environ is None else environ
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        boot=_content("/proc/sys/kernel/random/boot_id"),
        machine=_content("/etc/machine-id"),
        namespace=_namespace(),
        job=_number(env.get("SLURM_JOB_ID")),
        task=_array_task(env),
        attempt=_number(env.get("SLURM_RESTART_COUNT")) or 0,
        cluster=env.get("SLURM_CLUSTER_NAME", ""),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None


def _array_task(environ: Mapping[str, str]) -> str:
    array, task = (_number(environ.get(f"SLURM_ARRAY_{name}_ID")) for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array is not None and task is not None else ""


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Return when a process of this machine started, in ticks since boot; `None` when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # Field 3 is the state, field 22 the start. A zombie has ended: only its parent has not looked yet.
    return int(fields[19]) if fields[0] not in {b"Z", b"X"} else None


# --- Does the owner still run? ---------------------------------------------------------------------------------------


def may_run(owner: Owner, me: Owner) -> bool:
    """Return whether an owner runs, as far as this process can tell; True when it can't."""
    if owner.job is not None and (owner.job, owner.cluster) == (me.job, me.cluster) and owner.attempt < me.attempt:
        return False  # Slurm ends an attempt before it starts the next, and a lost node finds that it was replaced
    if owner.host == me.host and owner.boot == me.boot and owner.namespace == me.namespace:
        return _start_of(owner.pid) == owner.started
    if owner.host == me.host and owner.machine and owner.machine == me.machine and owner.boot != me.boot:
        return False  # the machine has been started anew since
    if owner.job is None or owner.cluster != me.cluster or owner.job == me.job:
        return True
    return _job_may_run(owner)


def _job_may_run(owner: Owner) -> bool:
    if not can_ask_slurm():
        return not has_ended(owner, os.environ)
    job = str(owner.job)
    # %A: the number of an array's task. Asked for that which started last, squeue answers for the whole array.
    command = ["squeue", "--noheader", "--jobs", job, "--states", "RUNNING,COMPLETING,SUSPENDED", "--format", "%A"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return True
    if answer.returncode:
        return "Invalid job id" not in answer.stderr  # Slurm has forgotten jobs that ended long ago
    return job in answer.stdout.split()


def can_ask_slurm() -> bool:
    """Return whether Slurm's commands are here: inside a container they are not."""
    return shutil.which("squeue") is not None


def attempt_of(owner: Owner) -> str:
    """Return the attempt of a job that an owner belongs to, in the form of `RM_SCALE_JOB_ASKED`."""
    return f"{owner.job} {owner.attempt}"


def has_ended(owner: Owner, environ: Mapping[str, str]) -> bool:
    """Return whether Slurm, asked outside the container by the job's script, said that an owner's job does not run.

    Of an attempt that says that it has ended; a later attempt of the same job may have begun since.
    """
    return environ.get("RM_SCALE_JOB_ASKED") == attempt_of(owner) and environ.get("RM_SCALE_JOB_ENDED") == "1"


def running_owner(output_dir: str | Path, me: Owner | None = None) -> Owner | None:
    """Return the owner of an output directory if it may run and is not this process; `None` when there is none."""
    me = me or this_process()
    owner = _read(Path(output_dir) / LOCK_FILE)
    return owner if owner is not None and not _is_same(owner, me) and may_run(owner, me) else None


def _is_same(owner: Owner, me: Owner) -> bool:
    keys = ("host", "boot", "namespace", "pid", "started")
    return all(getattr(owner, key) == getattr(me, key) for key in keys)


def _read(path: Path) -> Owner | None:
    """Return who a lock names; `None` when there is no lock.

    What can't be read names nobody, and so nobody who could be seen to have ended.
    """
    until = time.monotonic() + _HALF_WRITTEN_SECONDS
    while path.exists():
        found = read_json_object(path)
        with suppress(TypeError):
            return Owner(**{name: found[name] for name in Owner.__dataclass_fields__ if name in found})
        if time.monotonic() > until:  # its owner writes it right after it has made it
            return Owner(host="an unknown machine", pid=0)
        time.sleep(0.05)
    return None


def refuse(output_dir: str | Path, owner: Owner, setting: str = "output_dir") -> UserError:
    """Return the error that says who writes to a directory, and what to do; `setting` is what names the directory."""
    if owner.job is not None:
        who = f"job {owner.job_name} is running and writes there ({owner.text()})"
        stop = f"scancel {owner.job_name}, or --dependency=afterany:{owner.job_name}"
    elif owner.pid:
        who, stop = f"another run writes there ({owner.text()})", f"kill {owner.pid} on {owner.host}"
    else:
        who, stop = f"another run may write there, its {LOCK_FILE} can't be read", "wait for it"
    return UserError(
        f"{setting}={output_dir}: {who}. Fix: another --{setting}, or {stop}. If you know that it has ended: "
        f"rm {Path(output_dir) / LOCK_FILE}"
    )


# --- Taking and giving back ------------------------------------------------------------------------------------------


@contextmanager
def writing_alone(output_dir: str | Path, setting: str = "output_dir") -> Iterator[None]:
    """Hold the lock of an output directory while the block runs; the directory is made where it is missing.

    Whatever ends the block gives it back, and removes the folders that were made for it where they are still empty.
    The lock of an owner that has ended, killed say, is taken over.

    Args:
        output_dir: the directory.
        setting: what names it, in errors.

    Raises:
        UserError: another run writes there, or the directory can't be written.
    """
    folder = Path(output_dir).expanduser().resolve()  # the working directory may change meanwhile
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _taking:
            content = _take(path, setting)
            _held.add(path)
    except OSError as error:
        _remove_empty(made)
        why = system_fault(error) or f"{error.strerror or error}. Fix: choose a folder you may write to."
        raise UserError(f"{setting}={output_dir}: can't be written: {why}") from error
    except UserError:
        _remove_empty(made)
        raise
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError):
            if path.read_bytes() == content:  # not one that somebody has put there since
                path.unlink()
        _remove_empty(made)


def _take(path: Path, setting: str) -> bytes:
    """Make the lock, in place of one whose owner has ended; return its content.

    Raises:
        UserError: its owner may run.
        OSError: it can't be written.
    """
    me = this_process()
    content = json.dumps(asdict(me)).encode() + b"\n"
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            with _looking_alone(path):
                _remove_stale(path, me, setting)
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return content


@contextmanager
def _looking_alone(path: Path) -> Iterator[None]:
    """Let one process at a time look at a lock that is there and remove it, so that it never removes a newer one.

    The system itself gives such a hold back when its process ends, however that happens. Where a file system has none,
    or another process keeps it for long, the block runs all the same: `_remove_stale` then notices what it has moved.
    """
    guard = path.with_name(f"{LOCK_FILE}.guard")
    handle = _hold(guard)
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                guard.unlink(missing_ok=True)  # while it is held: whoever waits sees that it is gone, and makes another
            os.close(handle)


def _hold(guard: Path) -> int | None:
    """Return a handle that holds a file alone; `None` where that can't be had."""
    until = time.monotonic() + _GUARD_SECONDS
    while True:
        try:
            handle = os.open(guard, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), guard.stat()):
                return handle
        except FileNotFoundError:  # its owner has removed it in between
            pass
        except OSError as error:
            is_held = error.errno in _HELD_BY_ANOTHER
            if not is_held or time.monotonic() > until:
                os.close(handle)
                if not is_held:  # nobody can hold it here, so nobody does
                    guard.unlink(missing_ok=True)
                return None
            time.sleep(0.05)
        os.close(handle)


def _remove_stale(path: Path, me: Owner, setting: str) -> None:
    """Remove a lock whose owner has ended.

    Raises:
        UserError: it may run.
    """
    try:
        seen = path.read_bytes()  # before its owner is looked for: a newer lock may come in between
        owner = me if path in _held else running_owner(path.parent, me)
        if owner is not None:
            raise refuse(path.parent, owner, setting)
        aside = path.with_name(f"{LOCK_FILE}.{os.urandom(4).hex()}.ended")
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return
    if aside.read_bytes() != seen:
        # Another process had removed the old lock and made its own in between: it is put back.
        with suppress(FileExistsError):
            os.link(aside, path)
    else:
        logger.warning(f"{path.parent}: taken over from a run that has ended without giving it back")
    aside.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
