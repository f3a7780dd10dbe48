"""One measured case of a benchmark: the versioned record, its checksum, and what is derived from its steps.

A record keeps every step's figures; rates and percentiles are computed from them when they are shown, so a report can't
show a number that is in no record. The checksum covers everything but itself: a record edited by hand is found out.
Records of one machine and model stand in one file, a line each: `results/<machine>/<model>.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rm_scale.reporting.benchmarks.sealed_lines import (
    Entry,
    RecordError,
    checksum,
    put_line,
    read_entries,
    validated,
)

SCHEMA = "rm_scale.benchmark/1"
Status = Literal["ok", "out_of_memory", "failed", "killed", "skipped"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Case(_Strict):
    """What was measured. Two records of equal cases are repetitions."""

    system: str = Field(description="rm_scale, or a peer: trl")
    model: str = Field(description="name of the model or of the tier whose shape it has")
    num_parameters: int | None = Field(default=None, description="of the backbone")
    method: Literal["full", "lora", "qlora"]
    packing: str = Field(description="none, padding_free or prefix_shared; a peer's own layout: padding")
    zero_stage: Literal[0, 1, 2, 3]
    offload: bool = Field(default=False, description="optimizer state and weights on the host")
    num_ranks: int
    num_nodes: int = 1
    global_batch_size: int = Field(description="groups per optimizer step, over all ranks")
    micro_batch: str = Field(description="what a micro-step holds: tokens of a packed row, or groups of padded rows")
    max_length: int
    gradient_checkpointing: bool
    compute_dtype: str
    data: str = Field(description="file's name, or the synthetic length mix")
    further: str = Field(default="", description="further settings that the run was given")
    repeat: int = Field(default=1, description="number of the repetition")


class Step(_Strict):
    """One optimizer step. Counts are sums over all ranks."""

    step: int
    seconds: float
    pairs: int
    real_tokens: int
    processed_tokens: int
    effective_tokens: int = Field(description="with the prompt counted once per response")
    useful_flops: float | None = None
    executed_flops: float | None = None
    data_wait_seconds: float | None = None
    communication_seconds: float | None = None
    energy_joules: float | None = None
    loss: float | None = None


class Memory(_Strict):
    """Highest of all ranks; `None` where there is no such kind."""

    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    host_bytes: int | None = None


class Saved(_Strict):
    """The model that a run left behind."""

    files: int = Field(description="of weights")
    bytes: int
    verified: bool = Field(description="it was loaded again and scored the same")


class Prediction(_Strict):
    """What the planner said of this case. Never a measurement."""

    peak_memory_bytes: int
    memory: dict[str, int]
    step_seconds: dict[str, float] | None = None


class Record(_Strict):
    """A case, how it was run, where, and what came of it."""

    schema_name: Literal["rm_scale.benchmark/1"] = Field(default="rm_scale.benchmark/1", alias="schema")
    status: Status
    reason: str = Field(default="", description="why there are no figures, or what is missing")
    case: Case
    warmup_steps: int
    steps: list[Step] = Field(default_factory=list)
    memory: Memory = Memory()
    load_seconds: float | None = None
    load_peak_memory_bytes: int | None = None
    seconds_to_training: float | None = None
    predicted: Prediction | None = None
    peak_flops_per_device: float | None = Field(default=None, description="maker's figure, dense; MFU and HFU need it")
    matmul_flops_per_device: float | None = Field(default=None, description="measured on large products")
    energy_source: str = ""
    energy_scope: str = Field(
        default="", description="whose energy the steps hold: the main rank's (rank), its machine's (node)"
    )
    saved: Saved | None = None
    data_statistics: dict[str, float] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict, description="all settings of the run")
    plan: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict, description="versions, commit, device")
    hardware: dict[str, Any] = Field(default_factory=dict, description="as measured by rm-scale bench hardware")
    protocol: dict[str, Any] = Field(default_factory=dict, description="command, date, load of the machine")
    checksum: str = ""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @property
    def name(self) -> str:
        """Name the case: unlike for unlike cases."""
        return case_name(self.case)

    @property
    def counted(self) -> list[Step]:
        """The steps behind the warm-up."""
        return self.steps[self.warmup_steps :]

    def sealed(self) -> Record:
        """Return the same with its checksum."""
        return self.model_copy(update={"checksum": checksum(self.as_dict())})

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return dict(json.loads(self.model_dump_json(by_alias=True)))


def case_name(case: Case) -> str:
    """Return a name that says what was measured; settings without a word of their own are in its hash."""
    parts = [case.system, case.model, case.method, case.packing, f"zero{case.zero_stage}"]
    parts += ["offload"] if case.offload else []
    parts += [f"{case.num_nodes}n{case.num_ranks}r"]
    fields = case.model_dump(exclude={"num_parameters"} if case.further else {"num_parameters", "further"})
    rest = json.dumps(fields, sort_keys=True)
    parts += [f"r{case.repeat}", hashlib.sha256(rest.encode()).hexdigest()[:8]]
    return "-".join(str(word).replace("/", "_").replace(" ", "_") for word in parts)


def file_of(case: Case, folder: Path) -> Path:
    """Return the file in a machine's folder that holds the records of a case's model."""
    return folder / f"{case.model.replace('/', '_').replace(' ', '_')}.jsonl"


def write_record(record: Record, folder: Path) -> Path:
    """Write a record sealed into a machine's folder, in the place of an older one of the same case; return the file."""
    file = file_of(record.case, folder)
    put_line(file, record.sealed().as_dict(), lambda content: _name_in(content) == record.name)
    return file


def _name_in(content: dict[str, Any]) -> str | None:
    """Return the name of the case in a line, whatever else is wrong with it."""
    try:
        return case_name(Case.model_validate(content.get("case")))
    except ValidationError:
        return None


def read_record(path: Path) -> Record:
    """Read a file of one record.

    Raises:
        RecordError: another schema version, edited by hand, no record, or more than one.
    """
    entries = read_entries(path)
    if len(entries) != 1:
        raise RecordError(f"{path}: {len(entries)} records, and one was expected. Fix: read_records reads all of them.")
    return _record_in(entries[0])


def _record_in(entry: Entry) -> Record:
    content = entry.parsed("the case")
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{entry.place}: schema {schema!r}, and this version reads {SCHEMA!r}. Fix: run the case again, or read it "
            "with the version of rm_scale that wrote it."
        )
    return validated(content, Record, entry.place, "the case")


def find_record(case: Case, folder: Path) -> Record | None:
    """Return the sound record of a case in a machine's folder; `None` where there is none."""
    file = file_of(case, folder)
    records = read_records([file]).records if file.is_file() else ()
    return next((record for record in reversed(records) if record.name == case_name(case)), None)


@dataclass(frozen=True)
class RecordSet:
    """Records of a folder, and the files that could not be used, each with its reason."""

    records: tuple[Record, ...]
    refused: tuple[tuple[str, str], ...] = ()


def read_records(paths: Iterable[Path]) -> RecordSet:
    """Read all records of files and folders (searched through). Nothing is left out silently.

    A file is `.jsonl` with a record per line, or `.json` with one. In folders, files that hold no benchmark record at
    all (other benchmarks write there too) are passed over.

    Raises:
        RecordError: a path is neither a file nor a folder.
    """
    records: list[Record] = []
    refused: list[tuple[str, str]] = []
    for path in paths:
        if not path.exists():
            raise RecordError(f"{path}: no such file or folder. Fix: give a folder of records.")
        for file in [path] if path.is_file() else _files_below(path):
            entries = read_entries(file)
            if path.is_dir() and _is_something_else(entries):
                continue
            for entry in entries:
                try:
                    records.append(_record_in(entry))
                except RecordError as error:
                    refused.append((entry.name, str(error).removeprefix(f"{entry.place}: ")))
    return RecordSet(tuple(records), tuple(refused))


def _files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in {".json", ".jsonl"} and file.is_file())


def _is_something_else(entries: Sequence[Entry]) -> bool:
    """Return whether all that can be read in a file, and there is something, is of another kind."""
    readable = [entry.content for entry in entries if not entry.problem]
    return (bool(readable) or not entries) and not any(map(_claims_to_be_a_record, readable))


def _claims_to_be_a_record(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    return str(content.get("schema", "")).startswith("rm_scale.benchmark/") or {"case", "steps"} <= set(content)


# --- What is derived -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Figures of a case over its counted steps. `None` where one is undefined or was not measured.

    Attributes:
        pairs_per_second: per device, as are all rates.
        real_tokens_per_second: tokens that are not padding.
        processed_tokens_per_second: with padding.
        effective_tokens_per_second: as if no prompt were shared: what the work is worth.
        step_seconds_p50, step_seconds_p95: of a step.
        mfu: useful FLOPs (unshared, real tokens; a frozen weight counted twice, a trained one three times; attention
            causal; no embedding, no head) over the maker's peak.
        hfu: executed FLOPs (padding, recomputation and adapters in, a shared prompt once) over the same.
        useful_share, executed_share: the same over the rate that was measured on large products.
        data_wait_share, communication_share: of the steps' time on the main rank.
        joules_per_pair: of what the record's energy source counts, others taken to draw as much as the main rank's.
    """

    pairs_per_second: float
    real_tokens_per_second: float
    processed_tokens_per_second: float
    effective_tokens_per_second: float
    step_seconds_p50: float
    step_seconds_p95: float
    mfu: float | None
    hfu: float | None
    useful_share: float | None
    executed_share: float | None
    data_wait_share: float | None
    communication_share: float | None
    joules_per_pair: float | None


def measures(record: Record) -> Measures | None:
    """Return the figures of a record; `None` for one without counted steps.

    Each rate is the median of the steps' own rates, so that one disturbed step does not decide; shares are of sums.
    """
    steps = record.counted
    if record.status != "ok" or not steps:
        return None
    devices = record.case.num_ranks
    counting = devices if record.energy_scope == "rank" else record.case.num_nodes
    seconds = [step.seconds for step in steps]

    def rate(name: str) -> float | None:
        values = [getattr(step, name) for step in steps]
        if any(value is None for value in values):
            return None
        return float(median(value / step.seconds for value, step in zip(values, steps, strict=True)) / devices)

    def share(name: str) -> float | None:
        values = [getattr(step, name) for step in steps]
        return None if any(value is None for value in values) else sum(values) / sum(seconds)

    def over(value: float | None, peak: float | None) -> float | None:
        return value / peak if value is not None and peak else None

    useful, executed, joules = rate("useful_flops"), rate("executed_flops"), share("energy_joules")
    pairs = rate("pairs") or 0.0
    return Measures(
        pairs_per_second=pairs,
        real_tokens_per_second=rate("real_tokens") or 0.0,
        processed_tokens_per_second=rate("processed_tokens") or 0.0,
        effective_tokens_per_second=rate("effective_tokens") or 0.0,
        step_seconds_p50=median(seconds),
        step_seconds_p95=percentile(seconds, 0.95),
        mfu=over(useful, record.peak_flops_per_device),
        hfu=over(executed, record.peak_flops_per_device),
        useful_share=over(useful, record.matmul_flops_per_device),
        executed_share=over(executed, record.matmul_flops_per_device),
        data_wait_share=share("data_wait_seconds"),
        communication_share=share("communication_seconds"),
        joules_per_pair=None
        if joules is None
        else joules * sum(seconds) * counting / max(1, sum(step.pairs for step in steps)),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def peak_memory_bytes(record: Record) -> int | None:
    """Return what counts as a device's memory: allocated on a GPU, resident on a processor."""
    return record.memory.allocated_bytes or record.memory.host_bytes
