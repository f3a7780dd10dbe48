"""Steps that show that it is right: the doctor, ZeRO-3, QLoRA, a true 1B and its scores on GPU and processor."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu_proof.context import REPOSITORY, Context, Done, StepError
from benchmarks.gpu_proof.wheels import canonical, project_requirements, requirement_name
from rm_scale.files import read_json_lines, read_json_object


def doctor(context: Context) -> None:
    """Run `rm-scale doctor` and the packed attention tests, at the same time."""
    tests = context.settings.work / "tests.xml"
    cli: list[str | Path] = [
        sys.executable,
        "-m",
        "rm_scale.cli",
        "doctor",
        "--json",
        "--output_dir",
        context.settings.work,
    ]
    pytest = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-k", "packed_attention", "-p", "no:cacheprovider"]
    pytest += ["--timeout", "60", "--junitxml", str(tests)]
    problems: list[str] = []

    def judge(name: str, done: Done) -> None:
        problems.extend(_judge_doctor(context, done) if name == "doctor" else _judge_tests(context, done, tests))

    context.run_together({"doctor": cli, "tests": pytest}, judge)
    said, counts = context.figures["doctor"], context.figures["tests"]
    context.say(
        f"doctor {said.get('counts')}, {len(said.get('versions', []))} versions outside their ranges; attention tests "
        f"{counts.get('passed')} passed, {counts.get('failed')} failed, {counts.get('skipped')} skipped"
    )
    if problems:
        raise StepError("; ".join(problems))


def _judge_doctor(context: Context, done: Done) -> list[str]:
    """Return its failures, those aside that say only that a package is of another version than the one tested."""
    start = done.out.find("{")
    try:
        report = json.loads(done.out[start:])
    except ValueError:
        context.say(doctor={"counts": None})
        return [f"doctor: {done.why()}"]
    failures = [check for check in report["checks"] if check["status"] == "fail"]
    packages = {requirement_name(text) for text in project_requirements(REPOSITORY)}
    versions = [c for c in failures if canonical(c["name"]) in packages and "needed" in c["seen"]]
    context.say(
        doctor={
            "counts": report["counts"],
            "versions": [f"{check['name']} {check['seen']}" for check in versions],
            "checks": [{key: check[key] for key in ("name", "status", "seen")} for check in report["checks"]],
        }
    )
    return [f"doctor: {check['name']}: {check['seen']}" for check in failures if check not in versions]


def _judge_tests(context: Context, done: Done, report: Path) -> list[str]:
    """Require that a test has passed; on a processor it's enough that the tests were found."""
    counts = count_tests(report)
    context.say(tests=counts)
    if not counts:
        return [f"tests/gpu: {done.why()}"]
    if counts["failed"]:
        return [f"tests/gpu: {counts['failed']} failed: {'; '.join(counts['failures'])[:500]}"]
    if not (counts["passed"] or (context.device == "cpu" and counts["skipped"])):
        return [f"tests/gpu: no packed attention test ran ({counts})"]
    return []


def count_tests(report: Path) -> dict[str, Any]:
    """Count the tests of a JUnit file; empty where there is none."""
    if not report.is_file():
        return {}
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "failures": [str(case.get("name")) for case in bad],
    }


# --- Trainings -------------------------------------------------------------------------------------------------------


def trained(context: Context, name: str, done: Done, output: Path) -> dict[str, Any]:
    """Read what a training left, when it ended well.

    Raises:
        StepError: it failed, or a loss is not finite, or its save has not the name of a verified one.
    """
    losses = [line["loss"] for line in read_json_lines(output / "run" / "metrics.jsonl") if "loss" in line]
    if done.code != 0:
        raise StepError(f"{name}: {done.why()}")
    if not losses or not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
        raise StepError(f"{name}: losses are {losses[:5]}")
    if not (output / "scoring_contract.json").is_file():
        raise StepError(f"{name}: ended without a verified save")
    device = read_json_object(output / "run" / "plan.json").get("device")
    if device != context.device:
        raise StepError(f"{name}: ran on {device}, not on {context.device}")
    timing = read_json_object(output / "run" / "timing.json")
    return {
        "losses": losses,
        "seconds": round(done.seconds, 1),
        "load_seconds": timing.get("load_seconds"),
        "peak_memory": timing.get("peak_memory"),
        "file_bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
    }


def zero3(context: Context) -> None:
    """Train full and LoRA of a tiny model through `deepspeed rm_scale/train.py`, side by side."""
    methods: dict[str, list[str]] = {"full": [], "lora": ["--use_peft"]}
    outputs = {name: context.settings.work / name for name in methods}
    commands = {}
    for name, more in methods.items():
        arguments = context.tiny_settings(outputs[name], context.sizes.tiny_steps, "--deepspeed", "zero3", *more)
        commands[name] = context.launch(arguments, context.settings.num_gpus)
    problems: list[str] = []

    def judge(name: str, done: Done) -> None:
        try:
            context.say(None, **{name: trained(context, name, done, outputs[name])})
        except StepError as error:
            problems.append(str(error))

    context.run_together(commands, judge)
    good = [name for name in methods if name in context.figures]
    said = [f"{name}: {len(context.figures[name]['losses'])} steps, saved and verified" for name in good]
    context.say("; ".join([*said, f"{context.settings.num_gpus} ranks"]))
    if problems:
        raise StepError("; ".join(problems))


def qlora(context: Context) -> None:
    """Train a tiny QLoRA model, score with the command line, and golden texts by the library."""
    output = context.settings.work / "qlora"
    arguments = context.tiny_settings(output, context.sizes.tiny_steps, "--use_peft", "--load_in_4bit")
    done = context.run("train", context.launch(arguments, None))
    context.say("trained and saved; not scored", train=trained(context, "qlora", done, output))
    rows = context.asset("pairs").read_text(encoding="utf-8").splitlines()[:8]
    texts = context.settings.work / "texts.jsonl"
    pairs = [json.loads(row) for row in rows]
    lines = [{"prompt": row["prompt"], "completion": row[side]} for row in pairs for side in ("chosen", "rejected")]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    scored = context.settings.work / "scored.jsonl"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "rm_scale.cli",
        "score",
        "--model",
        output,
        "--input",
        texts,
        "--output",
        scored,
    ]
    done = context.run("score", command)
    scores = [line.get("score") for line in read_json_lines(scored)]
    if done.code != 0 or len(scores) != len(lines) or not all(isinstance(score, float) for score in scores):
        raise StepError(f"rm-scale score: {done.why()}; scores {scores[:4]}")
    golden = golden_scores(output, [context.device])
    context.say(
        f"{len(scores)} texts scored by rm-scale score on {context.device}; golden texts move by "
        f"{golden['moved'][context.device]:.3g} after the reload (allowed {golden['allowed']:.3g})",
        scores=scores,
        golden=golden,
    )
    _require_golden(golden, context.device)


def golden_scores(folder: Path, devices: list[str]) -> dict[str, Any]:
    """Return scores of the contract's golden texts: by the model in training, and by the saved one on each device."""
    from rm_scale.inference.scoring.scorer import RewardScorer
    from rm_scale.modeling.golden_scores import allowed_drift
    from rm_scale.modeling.scoring_contract import ScoringContract
    from rm_scale.modeling.token_scores import as_in_training

    contract = ScoringContract.load(folder)
    before = [golden.score for golden in contract.golden_scores]
    found: dict[str, Any] = {"training": before, "allowed": allowed_drift(contract, contract.compute_dtype)}
    seconds = {}
    for device in devices:
        started = time.monotonic()
        scorer = RewardScorer.from_pretrained(folder, device=device, packed=False)
        with as_in_training(contract, device):
            found[device] = scorer.score_tokens([golden.input_ids for golden in contract.golden_scores], batch_size=1)
        seconds[device] = round(time.monotonic() - started, 1)
        del scorer
    moved = {device: max(abs(a - b) for a, b in zip(before, found[device], strict=True)) for device in devices}
    return {**found, "moved": moved, "load_and_score_seconds": seconds}


def _require_golden(golden: Mapping[str, Any], device: str) -> None:
    if not golden["moved"][device] <= golden["allowed"]:
        raise StepError(
            f"golden texts score differently after the reload on {device}: by {golden['moved'][device]:.3g}, allowed "
            f"{golden['allowed']:.3g}; training {golden['training']}, reloaded {golden[device]}"
        )


# --- A true 1B -------------------------------------------------------------------------------------------------------


def one_billion(context: Context) -> None:
    """Fine-tune a 1B under ZeRO-3, bf16, packed; then its golden scores on the GPU and on the processor."""
    output = context.settings.work / "one_billion"
    batch = ["--global_batch_size", str(context.sizes.true_batch), "--deepspeed", "zero3"]
    arguments = context.true_settings("1b", output, context.sizes.true_steps, *batch)
    began = time.time()
    done = context.run("train", context.launch(arguments, context.settings.num_gpus))
    found = trained(context, "1b", done, output)
    found |= {"steps": step_figures(output), "plan": read_json_object(output / "run" / "plan_check.json")}
    found["save_and_verify_seconds"] = save_seconds(output, began + done.seconds)
    context.say(_line_of_training(found), train=found)
    other = ["cpu"] if context.device == "cpu" else ["cuda", "cpu"]
    golden = golden_scores(output, other)
    rows = [
        {"golden text": number, "training": before, **{device: golden[device][number] for device in other}}
        for number, before in enumerate(golden["training"])
    ]
    between = max(abs(a - b) for a, b in zip(golden[other[0]], golden["cpu"], strict=True))
    context.say(
        f"{context.verdict}; golden scores: reload moves them by {golden['moved'][other[0]]:.3g} (allowed "
        f"{golden['allowed']:.3g}), GPU and CPU differ by {between:.3g}",
        golden=golden,
        gpu_against_cpu=between,
        tables={"golden scores": rows},
    )
    _require_golden(golden, other[0])


def step_figures(output: Path) -> dict[str, Any]:
    """Return the median step of a run, its first one left out, with its tokens per second."""
    steps = read_json_lines(output / "run" / "steps.jsonl")[1:]
    counts = {line["step"]: line for line in read_json_lines(output / "run" / "metrics.jsonl") if "num_tokens" in line}
    if not steps:
        return {}
    seconds = [step["seconds"] for step in steps]
    tokens = [counts[step["step"]]["num_tokens"]["effective"] for step in steps if step["step"] in counts]
    rates = [count / second for count, second in zip(tokens, seconds, strict=False)]
    return {
        "median_seconds": median(seconds),
        "effective_tokens_per_second": median(rates) if rates else None,
        "data_wait_seconds": median(step["data_wait_seconds"] for step in steps),
    }


def save_seconds(output: Path, ended: float) -> float | None:
    """Return the time from the last step's end to the process's end: the save, its verification, the records."""
    steps = output / "run" / "steps.jsonl"
    return round(ended - steps.stat().st_mtime, 1) if steps.is_file() else None


def _line_of_training(found: Mapping[str, Any]) -> str:
    steps, peaks, plan = found["steps"], found["peak_memory"] or {}, found["plan"]
    peak = (peaks.get("allocated_bytes") or peaks.get("host_bytes") or 0) / 1e9
    predicted = (plan.get("predicted") or {}).get("peak_memory_bytes", 0) / 1e9
    rate = steps.get("effective_tokens_per_second") or 0.0
    return (
        f"{steps.get('median_seconds', 0.0):.3g} s/step, {rate:,.0f} effective tokens/s, peak {peak:.1f} GB (predicted "
        f"{predicted:.1f}), loaded in {found['load_seconds'] or 0:.1f} s, saved and verified in "
        f"{found['save_and_verify_seconds'] or 0:.1f} s"
    )
