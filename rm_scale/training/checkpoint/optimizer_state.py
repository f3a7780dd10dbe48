"""Trained weights and optimizer state by parameter name, for any number of ranks and any ZeRO stage.

Every rank writes the slices it owns (fp32 master, Adam's moments) as safetensors, each under the parameter's name and
its place in the flattened parameter. A rank that resumes reads the slices that its own partition needs. Nothing is a
pickle, so nothing can run code, and no second copy of the state is ever written for another number of ranks.

DeepSpeed's universal checkpoints would do the same, but in 0.19 they hand all sub-groups of ZeRO-3 one shared Adam step
and the first group's weight decay, and convert through pickles. Optimizers whose state has another shape than the
parameter (8-bit, factored), and state on NVMe, are left to the engine's own files, for the same world only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rm_scale.errors import CheckpointError
from rm_scale.texts import one_line

FOLDER = "optimizer_state"
ENGINE_FILE = "engine.json"
MASTER = "weight"
MAX_FILE_BYTES = 2**30
"""Slices are copied to the host before they are written, so a file bounds the memory that a save takes."""


@dataclass
class Slice:
    """This rank's part of one trained parameter.

    Attributes:
        name: of the parameter in the model.
        start: first element in the flattened parameter.
        total: elements of the whole parameter.
        flat: the engine's flat tensor that the optimizer knows.
        offset, count: where the part lies in `flat`.
        parameter: what the forward pass uses.
    """

    name: str
    start: int
    total: int
    flat: torch.Tensor
    offset: int
    count: int
    parameter: torch.nn.Parameter

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this part of a flat tensor that is laid out like `flat`."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def engine_kind(engine: Any) -> str:
    """Return plain, zero12, zero3, or foreign for engines whose state can't be told apart by parameter."""
    if engine is None:
        return "plain"
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return "foreign" if engine.optimizer.swap_optimizer or engine.optimizer.params_in_nvme_and_cpu else "zero3"
    return "zero12" if isinstance(engine.optimizer, DeepSpeedZeroOptimizer) else "foreign"


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer below accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_portable(model: torch.nn.Module, engine: Any, optimizer: Any) -> bool:
    """Return whether every tensor of the optimizer's state has its weight's shape, so that it can be cut by element."""
    kind = engine_kind(engine)
    if kind == "foreign":
        return False
    state = base_optimizer(optimizer).state
    return all(
        value.numel() in (1, part.flat.numel())
        for part in slices(model, engine)
        for value in state.get(part.flat, {}).values()
        if isinstance(value, torch.Tensor)
    )


def slices(model: torch.nn.Module, engine: Any) -> Iterator[Slice]:
    """Yield this rank's part of every trained parameter."""
    kind = engine_kind(engine)
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = full_name.replace("_orig_mod.", "")  # compiled layers; a resumed run may not compile
        if kind == "plain":
            yield Slice(name, 0, parameter.numel(), parameter, 0, parameter.numel(), parameter)
        elif kind == "zero12":
            part = _zero12_slice(name, parameter, engine.optimizer)
            if part is not None:
                yield part
        else:
            yield _zero3_slice(name, parameter, engine.optimizer)


def _zero12_slice(name: str, parameter: Any, zero: Any) -> Slice | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None  # another rank owns all of it
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return Slice(name, there.start, parameter.numel(), flat, here.start, here.numel, parameter)


def _zero3_slice(name: str, parameter: Any, zero: Any) -> Slice:
    group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
    start = zero._get_param_partition_rank(parameter) * count
    # The last partition is filled up with padding, which belongs to no parameter.
    real = max(0, min(count, parameter.ds_numel - start))
    flat = zero.fp32_partitioned_groups_flat[group]
    return Slice(name, min(start, parameter.ds_numel), parameter.ds_numel, flat, offset, real, parameter)


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_state(folder: Path, model: torch.nn.Module, engine: Any, optimizer: Any, rank: int, size: int) -> list[str]:
    """Write this rank's slices; without DeepSpeed all ranks hold the same and only the first writes.

    Returns:
        Paths of the files written, relative to `folder`.
    """
    if engine is None and rank > 0:
        return []
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    state = base_optimizer(optimizer).state
    written: list[str] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            name = f"{FOLDER}/rank-{rank:05d}-of-{size:05d}-{len(written):04d}.safetensors"
            save_file(pending, str(folder / name))
            written.append(name)
            pending.clear()

    for part in slices(model, engine):
        if part.count:
            pending |= _tensors_of(part, state.get(part.flat, {}))
        if sum(tensor.nbytes for tensor in pending.values()) >= MAX_FILE_BYTES:
            flush()
    flush()
    if rank == 0:
        values = json.dumps(_engine_values(engine, optimizer), indent=1)
        (folder / FOLDER / ENGINE_FILE).write_text(values, encoding="utf-8")
        written.append(f"{FOLDER}/{ENGINE_FILE}")
    return written


def _tensors_of(part: Slice, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return master and moments of one slice, and its scalars (Adam's step), by key."""
    found = {_key(part.name, MASTER, part.start): part.of(part.flat).to("cpu", copy=True)}
    for kind, value in state.items():
        if isinstance(value, torch.Tensor) and value.numel() == part.flat.numel() and value.dim() > 0:
            found[_key(part.name, kind, part.start)] = part.of(value).to("cpu", copy=True)
        elif isinstance(value, torch.Tensor | int | float):
            found[_key(part.name, kind, "scalar", part.start)] = torch.as_tensor(value, dtype=torch.float64).reshape(1)
    return found


def _key(name: str, kind: str, *place: object) -> str:
    return "|".join([name, kind, *map(str, place)])


def _engine_values(engine: Any, optimizer: Any) -> dict[str, Any]:
    """Return what is no tensor: learning rates now, DeepSpeed's counters, fp16's loss scale."""
    values: dict[str, Any] = {
        "learning_rates": [float(group["lr"]) for group in base_optimizer(optimizer).param_groups]
    }
    if engine is not None:
        values["counters"] = {name: int(getattr(engine, name)) for name in _COUNTERS}
        scaler = vars(engine.optimizer.loss_scaler)
        values["loss_scaler"] = {name: value for name, value in scaler.items() if isinstance(value, int | float)}
    return values


_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


# --- Reading ---------------------------------------------------------------------------------------------------------


class StoredState:
    """The slices of all ranks that wrote a checkpoint, read by parameter name and place.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: a file can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._scalars: dict[str, dict[str, tuple[Any, str]]] = {}
        self._kinds: dict[str, set[str]] = {}
        for path in sorted((folder / FOLDER).glob("*.safetensors")):
            try:
                self._index(safe_open(str(path), framework="pt"))
            except Exception as error:  # safetensors' own error type and OSError alike: the file is no good
                raise CheckpointError(
                    f"{path}: can't be read ({one_line(error, 120)}). Fix: resume from another checkpoint."
                ) from error
        for places in self._places.values():
            places.sort(key=lambda place: place[0])

    def _index(self, file: Any) -> None:
        for key in file.keys():  # noqa: SIM118
            name, kind, *place = key.split("|")
            if place[0] == "scalar":
                self._scalars.setdefault(name, {})[kind] = (file, key)
            else:
                self._kinds.setdefault(name, set()).add(kind)
                (count,) = file.get_slice(key).get_shape()
                self._places.setdefault((name, kind), []).append((int(place[0]), count, file, key))

    def kinds(self, name: str) -> list[str]:
        """Return what is stored per element of a parameter beside its weight, such as Adam's moments."""
        return sorted(self._kinds.get(name, set()) - {MASTER})

    def scalars(self, name: str) -> dict[str, float]:
        """Return what is stored once per parameter, such as Adam's step."""
        found = self._scalars.get(name, {})
        return {kind: float(file.get_tensor(key)) for kind, (file, key) in found.items()}

    def require(self, name: str, kind: str, total: int) -> None:
        """Check that a parameter is stored whole.

        Raises:
            CheckpointError: it is not there, has another size, or a part of it is missing.
        """
        places = self._places.get((name, kind), [])
        stored = places[-1][0] + places[-1][1] if places else 0
        if stored != total:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name} has {stored:,} stored elements, the model's has {total:,}. It is the "
                "checkpoint of another model or of other adapters. Fix: resume with the model and the lora_ settings "
                "it was written with."
            )
        at = 0
        for first, length, _, _ in places:
            if first != at:
                break
            at = first + length
        if at != total:
            raise CheckpointError(
                f"{self.folder}: elements from {at:,} on of {kind} of {name} are missing. Fix: resume from another "
                "checkpoint."
            )

    def read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        """Return elements `[start, start + count)` of the flattened parameter, which must be stored whole."""
        parts, at = [], start
        for first, length, file, key in self._places[name, kind]:
            if first <= at < min(first + length, start + count):
                end = min(first + length, start + count)
                parts.append(file.get_slice(key)[at - first : end - first])
                at = end
        return torch.cat(parts) if parts else torch.empty(0)

    def engine_values(self) -> dict[str, Any]:
        """Return what `write_state` has stored beside tensors."""
        values = json.loads((self.folder / FOLDER / ENGINE_FILE).read_text(encoding="utf-8"))
        assert isinstance(values, dict)
        return values


def holds_portable_state(folder: Path) -> bool:
    """Return whether this checkpoint was written by `write_state`."""
    return (folder / FOLDER / ENGINE_FILE).is_file()


def require_all_parts(folder: Path, model: torch.nn.Module, engine: Any) -> None:
    """Check that a checkpoint holds what this rank needs, before any of it is used and without any collective.

    Raises:
        CheckpointError: it is of another model, or a part is missing.
    """
    stored = StoredState(folder)
    for part in slices(model, engine):
        for kind in (MASTER, *stored.kinds(part.name)):
            stored.require(part.name, kind, part.total)


def read_state(folder: Path, model: torch.nn.Module, engine: Any, optimizer: Any) -> None:
    """Put weights, masters and optimizer state of a checkpoint into this engine. A collective under ZeRO-3.

    `require_all_parts` must have been called before: nothing is checked here.
    """
    stored = StoredState(folder)
    base = base_optimizer(optimizer)
    kind = engine_kind(engine)
    if kind == "zero3":
        engine.optimizer.checkpoint_event_prologue()  # every parameter back to its partition
    with torch.no_grad():
        for part in slices(model, engine):
            _fill(part, stored, base)
        if kind == "zero12":
            _fill_whole_parameters(model, stored)
    if kind == "zero3":
        _refresh_partitions(engine.optimizer)
        engine.optimizer.checkpoint_event_epilogue()
    _repeat_bias_correction(base)
    _set_engine_values(stored.engine_values(), engine, base)


def _fill(part: Slice, stored: StoredState, base: torch.optim.Optimizer) -> None:
    # A part that is padding only still needs its state made, or it would begin at another Adam step.
    place = (part.start, part.count)
    part.of(part.flat).copy_(stored.read(part.name, MASTER, *place))
    kinds = stored.kinds(part.name)
    if not kinds:
        return  # the checkpoint was written before the optimizer's first step
    state = base.state[part.flat]
    for kind in kinds:
        if kind not in state:
            state[kind] = torch.zeros_like(part.flat)
        part.of(state[kind]).copy_(stored.read(part.name, kind, *place))
    for kind, value in stored.scalars(part.name).items():
        state[kind] = _scalar_like(base, part.flat, value)


def _scalar_like(base: torch.optim.Optimizer, flat: torch.Tensor, value: float) -> Any:
    """Return a step count of its own for each flat tensor: a shared one would be counted up once per sub-group."""
    if not type(base).__module__.startswith("torch."):
        return int(value)  # DeepSpeed's CPU Adam counts in Python
    on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    return torch.tensor(value, dtype=torch.float32, device=flat.device if on_device else "cpu")


def _repeat_bias_correction(base: torch.optim.Optimizer) -> None:
    """Let DeepSpeed's CPU Adam multiply up its powers of beta again, as it did in the steps that are resumed from.

    It keeps them in C++ and would take them from `pow` after a jump to a later step, which rounds differently.
    """
    native = getattr(base, "ds_opt_adam", None)
    if native is None:
        return
    steps = max((int(state["step"]) for state in base.state.values() if "step" in state), default=0)
    beta1, beta2 = base.param_groups[0]["betas"]
    nothing = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        native.adam_update(base.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)  # type: ignore[attr-defined]


def _fill_whole_parameters(model: torch.nn.Module, stored: StoredState) -> None:
    """Fill the whole parameters that ZeRO-1 and 2 compute with: a rank owns the master of a part only."""
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = full_name.replace("_orig_mod.", "")
            whole = stored.read(name, MASTER, 0, parameter.numel())
            parameter.data.copy_(whole.view(parameter.shape))


def _refresh_partitions(zero: Any) -> None:
    """Copy the masters into ZeRO-3's partitions in the compute type, as DeepSpeed does after its own load."""
    for group, master in enumerate(zero.fp32_partitioned_groups_flat):
        flat = zero.fp16_partitioned_groups_flat[group]
        flat.data.copy_(master.data)
        partitions = zero.fp16_partitioned_groups[group]
        for partition, fresh in zip(partitions, zero.unflatten(flat, partitions), strict=True):
            partition.data = fresh.data
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)


def _set_engine_values(values: dict[str, Any], engine: Any, base: torch.optim.Optimizer) -> None:
    rates = values["learning_rates"]
    for place, group in enumerate(base.param_groups):
        # Engines may leave out a group without parameters; all groups of a run share one rate.
        group["lr"] = rates[place] if len(rates) == len(base.param_groups) else rates[0]
    if engine is None:
        return
    for name, count in values.get("counters", {}).items():
        setattr(engine, name, count)
    for name, value in values.get("loss_scaler", {}).items():
        with suppress(AttributeError):
            if hasattr(engine.optimizer.loss_scaler, name):
                setattr(engine.optimizer.loss_scaler, name, value)


def restore_schedule(schedule: Any, state: dict[str, Any]) -> None:
    """Set a learning-rate schedule to where it was.

    A schedule that is a function of the step alone needs only the step. Its stored rates have one entry per parameter
    group, and engines differ in whether they keep an empty one; and a learning rate whose change was allowed by name
    would be overwritten by them.
    """
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        schedule.load_state_dict(state)
        return
    schedule.last_epoch, schedule._step_count = state["last_epoch"], state["_step_count"]
    rates = [base * of(schedule.last_epoch) for base, of in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    schedule._last_lr = rates
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
