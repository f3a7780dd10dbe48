"""Steps that measure: blocking calls and kernels, attention backends, the machine's rates, throughput beside TRL's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_proof.checks import save_seconds
from benchmarks.gpu_proof.context import REPOSITORY, Context, StepError
from rm_scale.files import read_json_object
from rm_scale.texts import one_line

# The throughput benchmark's files are scripts, which import each other by their plain names.
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

HERE = Path(__file__).resolve().parent
_FITS = 0.92
"""Share of a GPU's memory that a prediction may take: fragments and the library's own buffers need the rest."""


# --- Blocking calls and kernels --------------------------------------------------------------------------------------


def syncs(context: Context) -> None:
    """Count what torch's sync debug mode warns of in three steps, then profile three."""
    from benchmarks.gpu_proof.observed_train import OBSERVE

    answer = context.settings.work / "observed.json"
    job = {"warmup": 2, "counted": 3, "profiled": 3, "answer": str(answer), "device": context.device}
    tokens = ["--max_tokens_per_device", str(context.sizes.observed_tokens)]
    batch = ["--global_batch_size", str(context.sizes.true_batch), "--deepspeed", "zero3", *tokens]
    arguments = context.true_settings("1b", context.settings.work / "observed", 9, *batch)
    command = context.launch(arguments, context.settings.num_gpus, HERE / "observed_train.py")
    done = context.run("train", command, **{OBSERVE: json.dumps(job)})
    found = read_json_object(answer)
    if not found:
        raise StepError(f"observed training: {done.why()}")
    calls, profile = found["blocking"], found.get("profile") or {}
    per_micro_step = sum(calls["per_step"]) / max(1, calls["micro_steps"])
    said = (
        f"{median(calls['per_step']):.0f} blocking calls per step ({per_micro_step:.1f} per micro-step), "
        f"{calls['of_rm_scale']} of {sum(calls['per_step'])} from rm_scale"
    )
    tables = {"blocking calls in three steps, by the line that they came from": calls["places"]}
    if profile.get("kernels"):
        share = profile["kernel_seconds"] / profile["seconds"]
        said += (
            f"; kernels busy {share:.0%} of {profile['seconds']:.2f} s, first {profile['kernels'][0]['kernel'][:40]}"
        )
        tables["kernels of three steps"] = profile["kernels"]
    context.say(said, blocking=calls, profile={k: v for k, v in profile.items() if k != "kernels"}, tables=tables)
    if done.code != 0:
        raise StepError(f"observed training: {done.why()}")
    if "error" in profile or not profile:
        raise StepError(f"no profile: {profile.get('error', 'the run ended before it')}")


# --- Attention -------------------------------------------------------------------------------------------------------


def attention(context: Context) -> None:
    """Time backends of packed attention over one row, forward and backward, for short texts and for long ones."""
    import torch

    from rm_scale.batching.packed.backend_choice import choose_backend

    tokens = context.sizes.attention[3]
    chosen = choose_backend("auto", context.device, "bfloat16", has_softcap=False)
    backends = ["sdpa", chosen if chosen != "sdpa" else "matmul"]  # the first is what the other must equal
    rows: list[dict[str, Any]] = []
    problems = []
    for name, layout in layouts(tokens).items():
        reference: list[Any] | None = None
        for backend in backends:
            try:
                row, outputs = _time_backend(context, backend, layout)
            except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
                problems.append(f"{backend} on {name}: {one_line(error, 200)}")
                continue
            row["off"] = None if reference is None else _difference(reference, outputs)
            reference = outputs if reference is None else reference
            rows.append({"texts": name, "backend": backend, **row})
            context.say(tables={f"attention over {tokens} tokens": rows})
    text = "; ".join(f"{row['texts']} {row['backend']} {row['ms']:.1f} ms" for row in rows)
    context.say(f"{text} (forward and backward, {tokens} tokens)")
    wrong = [row for row in rows if row["off"] is not None and not row["off"] < 0.05]
    problems += [f"{row['backend']} on {row['texts']} is off by {row['off']:.3g} of the largest value" for row in wrong]
    if problems:
        raise StepError("; ".join(problems))


def layouts(tokens: int) -> dict[str, Any]:
    """Lay out rows full of short texts (a prompt of 150, two responses of 45) and of long ones (half a row)."""
    from rm_scale.batching.packed.layout import GroupSpan, RowLayout

    long, own = tokens // 4, min(45, tokens // 16)
    kinds = {"short": (min(150, tokens // 8), (own, own)), "long": (long, (long // 2, long // 2))}
    found = {}
    for name, (prompt, responses) in kinds.items():
        size = prompt + sum(responses)
        spans = tuple(GroupSpan(start, prompt, responses) for start in range(0, tokens - size + 1, size))
        found[name] = RowLayout(spans, tokens)
    return found


def _time_backend(context: Context, backend: str, layout: Any) -> tuple[dict[str, Any], list[Any]]:
    """Measure a backend's milliseconds and memory; return them with what it gave for one seed."""
    import torch

    from rm_scale.batching.packed.attention import BACKENDS
    from rm_scale.batching.packed.attention_rules import AttentionRules
    from rm_scale.batching.packed.layout import RowLayout

    heads, kv_heads, width, _ = context.sizes.attention
    device = torch.device(context.device)
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> Any:
        return torch.randn(count, layout.width, width, generator=generator).to(device, torch.bfloat16)

    inputs = [noise(count).requires_grad_() for count in (heads, kv_heads, kv_heads)]
    grad = noise(heads)
    grad[:, layout.num_tokens :] = 0
    own = RowLayout(layout.spans, layout.width)  # each backend derives its index arrays anew
    rules = AttentionRules(width**-0.5)
    outputs: list[Any] = []
    run_backend: Callable[..., Any] = BACKENDS[backend]

    def once() -> None:
        out = run_backend(*inputs, own, rules)
        outputs[:] = [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    for _ in range(2):
        once()
    before = _forget_peak()
    milliseconds = [_milliseconds(once) for _ in range(5)]
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    row = {"ms": round(median(milliseconds), 3), "memory MB": None if peak is None else round(peak / 1e6, 1)}
    return row, [output[:, : layout.num_tokens].float().cpu() for output in outputs]


def _forget_peak() -> int:
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _milliseconds(work: Callable[[], None]) -> float:
    import torch

    if not torch.cuda.is_available():
        started = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - started)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _difference(expected: Sequence[Any], given: Sequence[Any]) -> float:
    """Return the largest difference of outputs and gradients, over the largest value of each."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, given, strict=True))


# --- The machine -----------------------------------------------------------------------------------------------------


def hardware(context: Context) -> None:
    """Run `rm-scale bench hardware`; the planner's figures of the steps after this one come from it."""
    import yaml
    from throughput import keep_hardware

    file = context.settings.assets / f"hardware-{context.settings.num_gpus}.yaml"
    arguments = [sys.executable, "-m", "rm_scale.cli", "bench", "hardware", "--nproc", str(context.settings.num_gpus)]
    done = context.run("bench", [*arguments, "--seconds", str(context.sizes.hardware_seconds), "--output", file])
    if done.code != 0:
        raise StepError(f"bench hardware: {done.why()}")
    entry = next(iter(yaml.safe_load(file.read_text(encoding="utf-8"))["devices"].values()))
    (context.settings.results / file.name).unlink(missing_ok=True)  # an older measurement would be kept
    keep_hardware(file, context.settings.results)
    context.say(
        f"{entry['matmul_flops'] / 1e12:.3g} TFLOP/s in large products, {entry['memory_bandwidth'] / 1e9:,.0f} GB/s"
        + (f", links {entry['link_bandwidth'] / 1e9:,.0f} GB/s" if "link_bandwidth" in entry else ""),
        device={key: value for key, value in entry.items() if key != "sources"},
    )


# --- Throughput ------------------------------------------------------------------------------------------------------


def throughput(context: Context) -> None:
    """Measure ours, then TRL at its best micro-batch, on the same pairs; each figure is kept as it is known."""
    tier, method = context.settings.step.split("_")
    job = _case_job(context, tier, method)
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    for measure in (_ours, _peer):
        record, more = measure(context, job)
        if record is None:
            problems.append(str(more["reason"]))
            continue
        rows.append(_row(record, more) | {"record": _keep(context, record)})
        context.say(_line(rows), tables={f"{tier} {method}": rows})
        if record.status != "ok":
            problems.append(f"{record.case.system}: {record.status}: {record.reason}")
    if problems:
        raise StepError("; ".join(problems))


def _keep(context: Context, record: Any) -> str:
    """Write a benchmark record among the machine's, a rehearsal's nowhere but here; return its checksum's beginning."""
    from rm_scale.reporting.benchmarks.sealed_records import write_record

    write_record(record, context.settings.work if context.settings.rehearse else context.settings.results)
    return str(record.sealed().checksum).removeprefix("sha256:")[:8]


def _case_job(context: Context, tier: str, method: str) -> Any:
    """Return our case of this model and method, without gradient checkpointing."""
    from throughput_case import Job

    from rm_scale.planning.parameters import backbone_tensors, total
    from rm_scale.planning.shape import read_model_config, shape_from_config
    from rm_scale.reporting.benchmarks.sealed_records import Case

    model, timed = context.asset(tier), context.sizes.timed[tier]
    case = Case(
        system="rm_scale",
        model=context.sizes.labels[tier],
        num_parameters=total(backbone_tensors(shape_from_config(read_model_config(str(model))))),
        method=method,  # type: ignore[arg-type]
        packing="prefix_shared",
        zero_stage=0,
        num_ranks=1,
        global_batch_size=timed.global_batch_size,
        micro_batch="planned tokens",
        max_length=context.sizes.max_length,
        gradient_checkpointing=False,
        compute_dtype="bfloat16",
        data=context.sizes.mix,
    )
    return Job(
        case=case,
        model=model,
        data=context.asset(f"data-{tier}"),
        data_format="explicit_prompt",
        work=context.settings.work / "runs" / "ours",
        hardware=next(iter(sorted(context.settings.results.glob("hardware-*.yaml"))), None),
        steps=timed.steps,
        warmup=timed.warmup,
        max_tokens=None,
        micro_batch=context.sizes.micro_batches[0],
        time_limit=max(20.0, context.seconds_left - 5),
    )


def with_checkpointing(job: Any, on: bool) -> Any:
    """Return the same case with its layers recomputed, or not."""
    return replace(job, case=job.case.model_copy(update={"gradient_checkpointing": on}))


def _ours(context: Context, job: Any) -> tuple[Any, dict[str, Any]]:
    """Measure ours: without gradient checkpointing where it fits, else with it."""
    from throughput_case import run_case

    fits = predicted_bytes(job, context) <= _FITS * context.settings.memory_bytes or not context.settings.memory_bytes
    record = None
    for checkpointing in [False, True] if fits else [True]:
        one = with_checkpointing(replace(job, time_limit=max(20.0, context.seconds_left - 5)), checkpointing)
        record = run_case(one)
        if record.status != "out_of_memory":
            break
    return record, {"save seconds": save_seconds(one.output, time.time())}


def predicted_bytes(job: Any, context: Context, micro_batch: int | None = None) -> float:
    """Return the planner's peak for a case; with `micro_batch` for padded rows of so many pairs, in TRL's stead."""
    import throughput_case

    from rm_scale.config_parsing import parse_config
    from rm_scale.planning.estimate import estimate
    from rm_scale.planning.hardware import device_of_run
    from rm_scale.planning.plan import make_plan
    from rm_scale.planning.run_estimate import scenario_of_run
    from rm_scale.planning.shape import read_model_config, shape_from_config

    if micro_batch is not None:
        job = replace(job, case=job.case.model_copy(update={"packing": "none"}), micro_batch=micro_batch)
    parsed = parse_config(throughput_case.settings(job))
    plan = make_plan(parsed, 1, context.device, check_output=False)
    device, _ = device_of_run(context.settings.device_name or None, str(job.hardware) if job.hardware else None)
    shape = shape_from_config(read_model_config(str(job.model)))
    scenario = scenario_of_run(parsed.config, plan, shape, device, 1, _lengths(job))
    return float(estimate(scenario).peak_memory_bytes)


def _lengths(job: Any, sample: int = 200) -> Any:
    """Count the tokens of the pairs' prompts and responses."""
    from transformers import AutoTokenizer

    from rm_scale.planning.group_lengths import GroupLengths, LengthMix

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    groups = []
    for line in job.data.read_text(encoding="utf-8").splitlines()[:sample]:
        row = json.loads(line)
        prompt, *responses = (len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "chosen", "rejected"))
        groups.append(GroupLengths(prompt, tuple(responses)))
    return LengthMix(tuple(groups), "the pairs", len(groups))


def candidates(job: Any, context: Context) -> list[tuple[int, bool]]:
    """Choose micro-batches of TRL, and whether layers are recomputed: what fits, as predicted, in the order to try."""
    possible = [m for m in context.sizes.micro_batches if job.case.global_batch_size % m == 0]
    allowed = _FITS * context.settings.memory_bytes
    found: list[tuple[int, bool]] = []
    for checkpointing in (False, True):
        if len(found) < 2:
            one = with_checkpointing(job, checkpointing)
            found += [
                (m, checkpointing) for m in possible if not allowed or predicted_bytes(one, context, m) <= allowed
            ]
    return found or [(1, True)]


def _peer(context: Context, job: Any) -> tuple[Any, dict[str, Any]]:
    """Measure TRL; return its best record, and what all candidates came to."""
    import throughput_case as cases

    from rm_scale.reporting.benchmarks.sealed_records import measures

    work = context.settings.work / "runs" / "trl"
    answer = work / "sweep.json"
    asked = candidates(job, context)
    told = cases.peer_job(replace(job, work=work)) | {"folder": str(work), "cache": str(work / "cache")}
    told |= {"candidates": asked, "answer": str(answer), "seconds": max(10.0, context.seconds_left - 15)}
    told |= {"optim": "adamw_torch_fused" if context.device == "cuda" else "adamw_torch"}
    work.mkdir(parents=True, exist_ok=True)
    done = context.run("trl", [sys.executable, HERE / "peer_sweep.py", json.dumps(told)])
    tried = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else []
    records = []
    for one in tried:
        if one["status"] in {"ok", "out_of_memory"}:
            record = _peer_record(job, work, one, cases)
            found = measures(record)
            one["pairs_per_second"] = found.pairs_per_second if found is not None else None
            records.append((one["pairs_per_second"] or 0.0, record, one))
    context.say(trl_candidates=tried)
    if not records:
        return None, {"reason": f"trl: {done.why()}"}
    _, best, one = max(records, key=lambda item: item[0])
    return best, {
        "save seconds": one.get("save_seconds"),
        "tried": [f"{o['micro_batch']}: {o['status']}" for o in tried],
    }


def _peer_record(job: Any, work: Path, tried: dict[str, Any], cases: Any) -> Any:
    """Make the record of one candidate."""
    name = f"{tried['micro_batch']}{'-checkpointing' if tried['checkpointing'] else ''}"
    update = {
        "system": "trl",
        "packing": "padding",
        "micro_batch": f"{tried['micro_batch']} groups",
        "gradient_checkpointing": tried["checkpointing"],
    }
    one = replace(job, case=job.case.model_copy(update=update), work=work / name, micro_batch=tried["micro_batch"])
    record = cases.record_of(one, cases.Outcome(tried["status"], tried["reason"], tried["seconds"]))
    protocol = {"command": "python benchmarks/gpu_proof/peer_sweep.py", "seconds_in_all": tried["seconds"]}
    return record.model_copy(update={"protocol": protocol})


def _row(record: Any, more: dict[str, Any]) -> dict[str, Any]:
    """Make a line of the table: measured, and beside it what was predicted."""
    from rm_scale.reporting.benchmarks.sealed_records import measures, peak_memory_bytes

    found, said = measures(record), record.predicted
    band = said.step_seconds if said is not None else None
    return {
        "system": record.case.system,
        "micro-batch": record.case.micro_batch,
        "checkpointing": "yes" if record.case.gradient_checkpointing else "no",
        "status": record.status,
        "pairs/s": found.pairs_per_second if found else None,
        "effective tok/s": found.effective_tokens_per_second if found else None,
        "s/step": found.step_seconds_p50 if found else None,
        "predicted s/step": f"{band['low']:.3g} to {band['high']:.3g}" if band else None,
        "peak GB": (peak_memory_bytes(record) or 0) / 1e9 or None,
        "predicted GB": said.peak_memory_bytes / 1e9 if said is not None else None,
        "MFU": found.mfu if found else None,
        "load s": record.load_seconds,
        "save s": more.get("save seconds"),
    }


def _line(rows: Sequence[dict[str, Any]]) -> str:
    """Say the key numbers of what is known so far."""
    parts = []
    for row in rows:
        if row["pairs/s"] is None:
            parts.append(f"{row['system']}: {row['status']}")
            continue
        predicted = f" (predicted {row['predicted GB']:.1f})" if row["predicted GB"] else ""
        parts.append(
            f"{row['system']} {row['pairs/s']:.3g} pairs/s, {row['s/step']:.3g} s/step, "
            f"{row['peak GB'] or 0:.1f} GB{predicted}, saved in {row['save s'] or 0:.1f} s"
        )
    rates = {row["system"]: row["pairs/s"] for row in rows}
    if rates.get("rm_scale") and rates.get("trl"):
        parts.append(f"{rates['rm_scale'] / rates['trl']:.2f} times TRL")
    return "; ".join(parts)
