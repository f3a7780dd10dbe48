"""Runs the steps: each in a process of its own with a time limit, within one budget, its record written at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu_proof import record as records
from benchmarks.gpu_proof.context import REPOSITORY, Settings
from benchmarks.gpu_proof.plan import REHEARSAL_PATIENCE, STEPS, Step
from benchmarks.gpu_proof.processes import end_all, plain_environment, start, tail
from benchmarks.gpu_proof.record import FAILURES, FINISHED, StepRecord, read_step, write_step, write_summary
from benchmarks.gpu_proof.step import ASSETS
from rm_scale.files import read_json_object, replacing
from rm_scale.reporting.benchmarks.sealed_lines import RecordError

RESERVE_SECONDS = 4.0
"""Of the budget, for the summary and for taking things away."""

_FACTS_SECONDS = 45.0
"""After the start. Records that are written later without them say what the chosen Python told."""
_SCRATCH_BYTES = 24e9
_CODE = ("rm_scale/**/*.py", "benchmarks/*.py", "benchmarks/gpu_proof/*.py", "ds_configs/*.json", "tests/gpu/*.py")


@dataclass(frozen=True)
class Options:
    """What was asked, and what is known of the machine.

    Attributes:
        minutes: for everything, counted from `started`.
        started: when the command was given, seconds since the epoch.
        only: steps to run; empty: all.
        again: steps to run although they have a record; also "all" and "failed".
        rehearse: at small sizes, with records of their own kind.
        device: cuda, or cpu in a rehearsal.
        results: folder of machines.
        scratch: for models and runs; `None`: in memory where there is room.
        archive: a file that always holds the records so far.
        jobs: steps at a time; more than one in a rehearsal only.
        keep: leave the scratch folder.
        commit: where there is no repository to ask.
        machine: what the chosen Python told: gpus, memory, torch, cuda.
        bitsandbytes: it is there.
        steps: in their order.
    """

    minutes: float
    started: float
    only: tuple[str, ...]
    again: tuple[str, ...]
    rehearse: bool
    device: str
    results: Path
    scratch: Path | None
    archive: Path | None
    jobs: int
    keep: bool
    commit: str | None
    machine: Mapping[str, Any]
    bitsandbytes: bool
    steps: tuple[Step, ...] = STEPS

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Read what `python -m benchmarks.gpu_proof` hands over."""
        values = json.loads(text)
        for name in ("results", "scratch", "archive"):
            values[name] = Path(values[name]) if values[name] is not None else None
        return cls(**{**values, "only": tuple(values["only"]), "again": tuple(values["again"])})

    @property
    def gpus(self) -> list[str]:
        """Return the names of the GPUs; none where they are not used."""
        return [] if self.device == "cpu" else list(self.machine.get("gpus", []))

    @property
    def machine_folder(self) -> Path:
        """Return the folder of this machine's records of all kinds."""
        return self.results / (machine_name(self.gpus[0]) if self.gpus else "processor")

    @property
    def folder(self) -> Path:
        """Return the folder of the proof's records."""
        return self.machine_folder / "gpu_proof"

    @property
    def seconds_left(self) -> float:
        """Return what is left of the budget."""
        return 60 * self.minutes - (time.time() - self.started) - RESERVE_SECONDS

    @property
    def patience(self) -> float:
        """Return what limits are multiplied by."""
        return REHEARSAL_PATIENCE if self.rehearse else 1.0


def machine_name(device: str) -> str:
    """Return a folder's name for a device: its kind, and nothing else of the machine."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def code_digest(repository: Path = REPOSITORY) -> str:
    """Digest everything that a step runs: records of other code don't count, whatever the commit is called."""
    digest = hashlib.sha256()
    for file in sorted({path for pattern in _CODE for path in repository.glob(pattern)}):
        digest.update(f"{file.relative_to(repository)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass
class Running:
    """A step at work."""

    step: Step
    process: subprocess.Popen[bytes]
    mark: str
    work: Path
    limit: float
    began: float = field(default_factory=time.monotonic)
    answered: float = 0.0

    @property
    def seconds(self) -> float:
        """Return its time so far."""
        return time.monotonic() - self.began


class Proof:
    """All steps, once.

    Args:
        options: see there.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.code = code_digest()
        self.mark = uuid.uuid4().hex[:12]
        self.scratch = self._make_scratch()
        self.assets = self.scratch / "assets"
        self.running: list[Running] = []
        self._assets_process: subprocess.Popen[bytes] | None = None
        self._assets_began = 0.0

    # --- All of it -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run what is to be run, print the table; return 0, or 1 when a step failed or none succeeded."""
        waiting = [step for step in self.options.steps if not self.options.only or step.name in self.options.only]
        chosen = {step.name for step in waiting}
        before = {kind: signal.signal(kind, _leave) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.options.jobs:
                    self._begin(waiting.pop(0))
                self._look()
                time.sleep(0.05)
        finally:
            self._end_everything()
            for kind, handler in before.items():
                signal.signal(kind, handler)
        print("\n" + write_summary(self.options.folder, self.options.rehearse, self.code), flush=True)
        self._archive()
        return self._exit_code(chosen)

    def _exit_code(self, chosen: set[str]) -> int:
        found, refused = records.read_steps(self.options.folder, self.options.rehearse)
        statuses = [record.status for record in found if record.name in chosen and record.code == self.code]
        print(f"records: {self.options.folder}", flush=True)
        return int(bool(refused) or "ok" not in statuses or any(status in FAILURES for status in statuses))

    def _make_scratch(self) -> Path:
        base = self.options.scratch
        if base is None:
            memory = Path("/dev/shm")
            has_room = memory.is_dir() and shutil.disk_usage(memory).free > _SCRATCH_BYTES
            base = memory if has_room and not self.options.rehearse else REPOSITORY / "outputs" / "gpu_proof"
        base.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="rm_scale_gpu_proof_", dir=base))

    def _end_everything(self) -> None:
        for one in self.running:
            end_all(one.mark)
            self._write(one.step, "unfinished", "the proof was ended while this step ran", one)
        self.running.clear()
        end_all(self.mark)
        if self._assets_process is not None:
            self._assets_process.wait()
        if not self.options.keep:
            shutil.rmtree(self.scratch, ignore_errors=True)

    # --- One step --------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        """Start a step, or say why it isn't."""
        earlier = self._earlier(step)
        if earlier is not None:
            self._print(step, f"{earlier.status} (have it)", earlier.verdict or earlier.reason, earlier.seconds)
            return
        reason = self._obstacle(step)
        if reason is not None:
            self._skip(step, reason)
            return
        self._start_assets()
        limit = min(step.seconds * self.options.patience, self.options.seconds_left)
        work = self.scratch / step.name
        settings = Settings(
            step=step.name,
            rehearse=self.options.rehearse,
            device=self.options.device,
            num_gpus=self._num_gpus(step),
            assets=self.assets,
            work=work,
            results=self.options.machine_folder,
            seconds=limit,
            memory_bytes=min(self.options.machine.get("memory", [0]), default=0) if self.options.gpus else 0,
            device_name=self.options.gpus[0] if self.options.gpus else "",
        )
        self.running.append(self._start(step, settings, limit))

    def _skip(self, step: Step, reason: str) -> None:
        """Say that a step is not run; figures that other code left for it stay."""
        try:
            kept = read_step(step.name, self.options.folder, self.options.rehearse).status in FINISHED
        except RecordError:
            kept = False
        if kept:
            self._print(step, "skipped", f"{reason}; its earlier record stays", 0.0)
        else:
            self._write(step, "skipped", reason, None)

    def _start(self, step: Step, settings: Settings, limit: float) -> Running:
        file, mark = settings.work / "settings.json", f"{self.mark}/{step.name}"
        settings.save(file)
        process = start(self.command(file), settings.work / "step.log", mark, self._environment(step), REPOSITORY)
        return Running(step, process, mark, settings.work, limit)

    def command(self, settings: Path) -> list[str]:
        """Return what starts a step's process."""
        return [sys.executable, "-m", "benchmarks.gpu_proof.step", str(settings)]

    def _num_gpus(self, step: Step) -> int:
        if not self.options.gpus:
            return 2 if "gpus" in step.needs else 1
        return len(self.options.gpus) if step.all_gpus else 1

    def _environment(self, step: Step) -> dict[str, str]:
        env = plain_environment()
        path = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(REPOSITORY)]))
        env |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"HF_HOME": str(self.scratch / "hub")}
        if self.options.device == "cpu":
            return {**env, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if not step.all_gpus and len(self.options.gpus) > 1:
            env["CUDA_VISIBLE_DEVICES"] = (env.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        return env

    def _start_assets(self) -> None:
        """Models and data are made beside the first steps, which time nothing."""
        if self._assets_process is not None:
            return
        settings = Settings(
            ASSETS, self.options.rehearse, self.options.device, 1, self.assets, self.scratch / ASSETS, self.scratch, 0.0
        )
        file = settings.work / "settings.json"
        settings.save(file)
        log, env = settings.work / "step.log", self._environment(self.options.steps[0])
        self._assets_process = start(self.command(file), log, f"{self.mark}/{ASSETS}", env, REPOSITORY)
        self._assets_began = time.monotonic()

    def _earlier(self, step: Step) -> StepRecord | None:
        """Return the record of an earlier call, if it is sound and of this code."""
        try:
            found = read_step(step.name, self.options.folder, self.options.rehearse)
        except RecordError:
            return None
        again = {"all", step.name} | ({"failed"} if found.status in FAILURES else set())
        if found.status not in FINISHED or found.code != self.code or again & set(self.options.again):
            return None
        return found

    def _number(self, step: Step) -> int:
        return self.options.steps.index(step) + 1

    def _obstacle(self, step: Step) -> str | None:
        """Return why a step can't be run, if it can't."""
        if "bitsandbytes" in step.needs and not self.options.bitsandbytes:
            return "bitsandbytes is not installed and no wheel of it was carried along"
        if "gpus" in step.needs and len(self.options.gpus) == 1:
            return "needs two GPUs or more"
        left = self.options.seconds_left
        if left < step.least:
            return (
                f"{max(0.0, left):.0f} s left of {self.options.minutes:g} minutes, it needs {step.least:.0f} at least"
            )
        return None

    def _look(self) -> None:
        """Take what has ended, end what is over its limit, keep what has been said meanwhile."""
        for one in list(self.running):
            code = one.process.poll()
            if code is None and one.seconds <= one.limit:
                self._keep_answer(one)
                continue
            num_killed = end_all(one.mark)
            one.process.wait()
            self.running.remove(one)
            if code is None:
                cut = one.limit < one.step.seconds * self.options.patience
                why = f"the {self.options.minutes:g} minutes were over" if cut else f"not done after {one.limit:.0f} s"
                status = "unfinished" if cut else "killed"
                self._write(one.step, status, f"{why} ({num_killed} processes ended)", one)
                continue
            answer = read_json_object(one.work / "answer.json")
            status, reason = answer.get("status", "unfinished"), answer.get("reason", "")
            if status == "unfinished" or (code != 0 and status == "ok"):
                status, reason = "failed", f"its process ended with code {code}: {tail(one.work / 'step.log')}"
            self._write(one.step, status, reason, one)

    def _keep_answer(self, one: Running) -> None:
        """Put what a step knows so far on record: the machine may be lost before it ends."""
        file = one.work / "answer.json"
        changed = file.stat().st_mtime if file.is_file() else 0.0
        if changed > one.answered and read_json_object(file).get("figures"):
            one.answered = changed
            self._write(one.step, "unfinished", "the proof was lost while this step ran", one, quietly=True)

    # --- Records ---------------------------------------------------------------------------------------------------

    def _write(self, step: Step, status: str, reason: str, one: Running | None, quietly: bool = False) -> None:
        answer = read_json_object(one.work / "answer.json") if one is not None else {}
        facts = self._facts_of_machine()
        content = {
            "schema": records.REHEARSAL if self.options.rehearse else records.SCHEMA,
            "name": step.name,
            "number": self._number(step),
            "title": step.title,
            "status": status,
            "reason": reason,
            "verdict": answer.get("verdict", ""),
            "seconds": round(one.seconds, 1) if one is not None else 0.0,
            "limit_seconds": round(one.limit, 1) if one is not None else 0.0,
            "figures": answer.get("figures", {}),
            "code": self.code,
            "commit": facts.get("commit") or self.options.commit,
            "environment": facts or {"packages": {"torch": self.options.machine.get("torch")}},
            "protocol": {
                "command": "python -m benchmarks.gpu_proof",
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "load_average": [round(value, 2) for value in os.getloadavg()],
                "num_gpus": len(self.options.gpus),
            },
        }
        made = StepRecord.model_validate(records.without_places(content, self._places(one)))
        write_step(made, self.options.folder)
        if quietly:
            return
        if one is not None and status in FAILURES:
            self._keep_logs(one)
        write_summary(self.options.folder, self.options.rehearse, self.code)
        self._archive()
        self._print(step, status, "; ".join(filter(None, [made.reason, made.verdict])), made.seconds)
        if one is not None and not self.options.keep:
            shutil.rmtree(one.work, ignore_errors=True)

    def _facts_of_machine(self) -> dict[str, Any]:
        """Return versions, commit and hardware, which the process that makes the models writes first."""
        file = self.assets / "facts.json"
        while (
            self._assets_process is not None
            and self._assets_process.poll() is None
            and not (self.assets / "ready-facts").exists()
            and time.monotonic() - self._assets_began < _FACTS_SECONDS
        ):
            time.sleep(0.1)
        return read_json_object(file)

    def _places(self, one: Running | None) -> dict[str, str]:
        work = {str(one.work): "WORK"} if one is not None else {}
        places = {
            **work,
            str(self.scratch): "SCRATCH",
            f"{REPOSITORY}/": "",
            str(REPOSITORY): ".",
            sys.executable: "python",
        }
        return {**places, str(Path.home()): "~"} if str(Path.home()) != "/" else places

    def _keep_logs(self, one: Running) -> None:
        """Keep the ends of a failed step's logs beside the records: they name folders of the machine."""
        parts = []
        for file in sorted([*one.work.glob("*.log"), *one.work.glob("*.out"), *one.work.glob("runs/*/log.txt")]):
            parts.append(
                f"=== {file.relative_to(one.work)}\n{file.read_text(encoding='utf-8', errors='replace')[-20_000:]}"
            )
        target = self.options.folder / "logs" / f"{one.step.name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(parts), encoding="utf-8")

    def _archive(self) -> None:
        """Keep one file with all of it up to date, for places from which only few files come back."""
        if self.options.archive is None:
            return
        self.options.archive.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.options.archive) as aside, tarfile.open(aside, "w:gz") as archive:
            archive.add(self.options.machine_folder, self.options.machine_folder.name)

    def _print(self, step: Step, status: str, text: str, seconds: float) -> None:
        elapsed = time.time() - self.options.started
        print(
            f"[{elapsed:4.0f} s] {self._number(step):2} {step.name:12} {status:10} {seconds:4.0f} s  {text}", flush=True
        )


def _leave(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(text: str) -> int:
    """Run the proof."""
    return Proof(Options.from_json(text)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
