"""What a step has at hand: its settings, the answer that it keeps on disk as it works, the commands it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.plan import Sizes, sizes
from benchmarks.gpu_proof.processes import plain_environment
from rm_scale.files import free_port, write_whole
from rm_scale.launch.ranks import device_flags

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "rm_scale" / "train.py"
ASSET_SECONDS = 240.0


class StepError(Exception):
    """The step shows that something is wrong; the text says what."""


@dataclass(frozen=True)
class Settings:
    """What the driver tells a step.

    Attributes:
        step: its name.
        rehearse: at small sizes; what is measured then is worth nothing.
        device: cuda, or cpu in a rehearsal.
        num_gpus: that it may use; ranks of a rehearsal.
        assets: folder of models and data, made beside the first steps.
        work: a folder of the step's own.
        results: the machine's folder of records.
        seconds: that the driver gives it.
        memory_bytes: of a GPU; 0 when unknown.
        device_name: of the first GPU; empty on a processor.
    """

    step: str
    rehearse: bool
    device: str
    num_gpus: int
    assets: Path
    work: Path
    results: Path
    seconds: float
    memory_bytes: int = 0
    device_name: str = ""

    def save(self, path: Path) -> None:
        """Write them for the step's process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: _plain(value) for name, value in asdict(self).items()}), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read what `save` has written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, **{name: Path(values[name]) for name in ("assets", "work", "results")}})


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    log: str
    seconds: float

    @property
    def text(self) -> str:
        """Return all that it printed."""
        return f"{self.out}\n{self.log}"

    def why(self, num_characters: int = 500) -> str:
        """Return its last lines, those that name an error first."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        telling = [line for line in lines if "rror:" in line or "Error" in line or "Fix:" in line]
        return f"exit code {self.code}: " + " | ".join([*telling[-2:], *lines[-2:]])[-num_characters:]


@dataclass
class Context:
    """A step at work.

    Attributes:
        settings: see there.
        figures: what it has found so far.
    """

    settings: Settings
    figures: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def sizes(self) -> Sizes:
        """Return how large things are."""
        return sizes(self.settings.rehearse)

    @property
    def device(self) -> str:
        """Return where models and kernels run."""
        return self.settings.device

    @property
    def seconds_left(self) -> float:
        """Return the time until the driver ends this step."""
        return self.settings.seconds - (time.monotonic() - self.started)

    def say(self, verdict: str | None = None, **figures: Any) -> None:
        """Keep what is known now: whatever happens later, it is on disk."""
        self.figures |= figures
        self.verdict = self.verdict if verdict is None else verdict
        self.answer()

    def answer(self, status: str = "unfinished", reason: str = "") -> None:
        """Write the answer that the driver makes the record of."""
        content = {"status": status, "reason": reason, "verdict": self.verdict, "figures": self.figures}
        write_whole(self.settings.work / "answer.json", json.dumps(content, default=str))

    # --- Commands ----------------------------------------------------------------------------------------------------

    def run(self, name: str, arguments: Sequence[str | Path], **extra: str) -> Done:
        """Run a command to its end."""
        return self.run_together({name: arguments}, None, **extra)[name]

    def run_together(
        self,
        commands: Mapping[str, Sequence[str | Path]],
        then: Callable[[str, Done], None] | None = None,
        **extra: str,
    ) -> dict[str, Done]:
        """Run commands at the same time, where nothing is timed; return how each ended.

        Args:
            commands: by name; their output is kept in files of that name.
            then: told of each as it ends, so that its figures are on disk while others still run.
            extra: further variables of their environment.
        """
        begun = {name: self.start(name, arguments, **extra) for name, arguments in commands.items()}
        started = time.monotonic()
        ended: dict[str, Done] = {}
        while len(ended) < len(begun):
            for name, process in begun.items():
                if name not in ended and process.poll() is not None:
                    ended[name] = self.done(name, process.returncode, time.monotonic() - started)
                    if then is not None:
                        then(name, ended[name])
            time.sleep(0.05)
        return ended

    def start(self, name: str, arguments: Sequence[str | Path], **extra: str) -> subprocess.Popen[bytes]:
        """Start a command; its output goes to files."""
        self.settings.work.mkdir(parents=True, exist_ok=True)
        with self._file(name, "out").open("wb") as out, self._file(name, "log").open("wb") as log:
            return subprocess.Popen(
                [str(word) for word in arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                cwd=REPOSITORY,
                env={**plain_environment(), **extra},
            )

    def done(self, name: str, code: int, seconds: float) -> Done:
        """Read what a command that was started has printed."""
        out, log = (self._file(name, kind).read_text(encoding="utf-8", errors="replace") for kind in ("out", "log"))
        return Done(code, out, log, seconds)

    def _file(self, name: str, kind: str) -> Path:
        return self.settings.work / f"{name}.{kind}"

    # --- Trainings ---------------------------------------------------------------------------------------------------

    def asset(self, name: str) -> Path:
        """Return a model or a file of pairs, once it has been made.

        Raises:
            StepError: making it failed, or took too long.
        """
        ready, failed = self.settings.assets / f"ready-{name}", self.settings.assets / "failed"
        deadline = time.monotonic() + ASSET_SECONDS * (6 if self.settings.rehearse else 1)
        while not ready.exists():
            if failed.exists():
                raise StepError(f"{name} could not be made: {failed.read_text(encoding='utf-8')[-400:]}")
            if time.monotonic() > deadline:
                raise StepError(f"{name} was not made in time")
            time.sleep(0.1)
        return Path(ready.read_text(encoding="utf-8"))

    def launch(self, arguments: Sequence[str | Path], ranks: int | None, script: Path = TRAIN) -> list[str]:
        """Return the command line that starts a training.

        Args:
            arguments: settings.
            ranks: under the `deepspeed` launcher; `None`: by plain `python`.
            script: what is started.
        """
        plain = [str(word) for word in arguments]
        if ranks is None:
            return [sys.executable, str(script), *plain]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
        return [*launcher, *device_flags(ranks, self.device == "cuda"), str(script), *plain]

    def tiny_settings(self, output: Path, steps: int, *more: str) -> list[str]:
        """Return settings of a tiny model's training, which shows correctness."""
        arguments = ["--model_name_or_path", str(self.asset("tiny")), "--dataset_path", str(self.asset("pairs"))]
        arguments += ["--output_dir", str(output), "--max_steps", str(steps), "--learning_rate", "1e-3"]
        arguments += ["--logging_steps", "1", "--disable_tqdm", "true", "--sample_scores", "0"]
        return [*arguments, "--dataset_cache_dir", str(self.settings.work / f"cache-{output.name}"), *more]

    def true_settings(self, model: str, output: Path, steps: int, *more: str) -> list[str]:
        """Return settings of a training of a model of true shape."""
        arguments = ["--model_name_or_path", str(self.asset(model)), "--dataset_path", str(self.asset(f"data-{model}"))]
        arguments += ["--dataset_format", "explicit_prompt", "--max_length", str(self.sizes.max_length)]
        arguments += ["--output_dir", str(output), "--max_steps", str(steps), "--learning_rate", "1e-6"]
        arguments += [
            "--bf16",
            "true",
            "--packing",
            "prefix_shared",
            "--save_strategy",
            "no",
            "--max_rejected_share",
            "1",
        ]
        arguments += ["--logging_steps", "1", "--disable_tqdm", "true", "--sample_scores", "0"]
        return [*arguments, "--dataset_cache_dir", str(self.settings.work / "cache"), *more]
