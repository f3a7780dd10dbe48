"""One side of `benchmarks/packing.py`: a process that trains one optimizer step each time it is told to.

It is started with a JSON object as its only argument, reads a line from standard input before each step, and answers
with lines that begin with `MARK`; everything else on standard output is the libraries' own. While it waits it sleeps.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

MARK = "@@bench "
Job = dict[str, Any]


def say(message: dict[str, Any]) -> None:
    """Send a message to the driver."""
    print(MARK + json.dumps(message), flush=True)


def wait_for_go() -> None:
    """Sleep until the driver sends a line; end the process when the driver is gone."""
    if not sys.stdin.readline():
        os._exit(1)


def flags(job: Job) -> list[str]:
    """Return our settings as `rm_scale/train.py` takes them."""
    values: dict[str, Any] = {
        "model_name_or_path": job["model"],
        "dataset_path": job["data"],
        "dataset_format": job["format"],
        "dataset_cache_dir": job["folder"] + "/cache",
        "output_dir": job["folder"] + "/" + job["name"],
        "packing": job["packing"],
        "global_batch_size": job["batch"],
        "max_length": job["max_length"],
        "max_steps": job["steps"],
        "optim": job["optim"],
        "learning_rate": job["learning_rate"],
        "warmup_ratio": 0,
        "bf16": "true",
        "shuffle_train": "false",
        "gradient_checkpointing": "false",
        "logging_steps": 1,
        "sample_scores": 0,
        "disable_tqdm": "true",
    }
    if job["packing"] != "none":
        values["max_tokens_per_device"] = job["max_tokens"]
    if job["lora"]:
        values |= {"use_peft": "true", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0}
    if job["torch_compile"] and not job["deepspeed"]:
        values["torch_compile"] = "true"
    if job["deepspeed"]:
        values["deepspeed"] = job["deepspeed"]
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def build_ours(job: Job, world: Any) -> Any:
    """Build our trainer, through the same steps as `rm_scale/train.py`."""
    from rm_scale.config_parsing import parse_config
    from rm_scale.distributed import init_process_group
    from rm_scale.planning.plan import make_plan

    parsed = parse_config(flags(job))
    plan = make_plan(parsed, world.size, "cpu", check_output=False)
    init_process_group(world, plan.deepspeed_config is not None, parsed.config.ddp_timeout)
    from rm_scale import training_run

    config = parsed.config
    tokenizer, encoder = training_run.load_text_encoder(config)
    data = training_run.load_data(config, encoder)
    plan = training_run.count_steps(plan, data, config)
    arguments = training_run.build_arguments(config, plan)
    loaded = training_run.load_model(config, plan, tokenizer)
    training_run.open_run_directory(config, plan, data, world)
    return training_run.build_trainer(config, plan, arguments, tokenizer, encoder, loaded, data)


def trl_arguments(job: Job, world_size: int) -> Any:
    """Return TRL's arguments with the same batch, optimizer, schedule and precision as ours."""
    import torch
    from trl import RewardConfig

    return RewardConfig(
        output_dir=job["folder"] + "/" + job["name"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch"] // (job["micro_batch"] * world_size),
        learning_rate=job["learning_rate"],
        optim=job["optim"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        bf16=job.get("bf16", True),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        gradient_checkpointing=job.get("checkpointing", False),
        seed=42,
        train_sampling_strategy="sequential",
        max_length=job["max_length"],
        save_strategy="no",
        disable_tqdm=True,
        deepspeed=job["deepspeed"],
        model_init_kwargs={"dtype": job["dtype"], **_four_bits(job)},
    )


def _four_bits(job: Job) -> dict[str, Any]:
    """Return how TRL is told of QLoRA; the head is kept out by hand, or it would be quantised."""
    if not job.get("qlora"):
        return {}
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,  # as this package's default, and TRL's
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
        llm_int8_skip_modules=["score"],
    )
    return {"quantization_config": four_bits}


def build_trl(job: Job, world: Any) -> Any:
    """Build a plain `trl.RewardTrainer` on the same file."""
    if job["deepspeed"]:
        from rm_scale.distributed import init_process_group

        # The group comes before the model, or ZeRO-3 sees a world of one.
        init_process_group(world, True, 1800)
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import RewardTrainer

    arguments = trl_arguments(job, world.size)
    data = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["folder"] + "/cache")
    columns = [name for name in ("prompt", "chosen", "rejected") if name in data.column_names]
    lora = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    return RewardTrainer(
        model=job["model"],
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=data.select_columns(columns),
        peft_config=lora if job["lora"] else None,
    )


def count_tokens(batches: list[dict[str, Any]]) -> tuple[int, int]:
    """Count the tokens that the model computes in a step on this rank, and those that are not padding."""
    computed = real = 0
    for batch in batches:
        for part in batch.get("micro_batches", [batch]):
            computed += part["tokens"].processed if "tokens" in part else part["input_ids"].numel()
            real += part["tokens"].real if "tokens" in part else int(part["attention_mask"].sum())
    return computed, real


def record_tokens(trainer: Any) -> list[tuple[int, int]]:
    """Count the tokens of each step as its batches are taken; return the list that will hold the counts."""
    counts: list[tuple[int, int]] = []
    take = trainer.get_batch_samples

    def take_and_count(*arguments: Any, **named: Any) -> Any:
        taken = take(*arguments, **named)
        if taken[0]:
            counts.append(count_tokens(taken[0]))
        return taken

    trainer.get_batch_samples = take_and_count
    return counts


def clock(trainer: Any, is_main: bool) -> Any:
    """Return a callback that holds the trainer between steps, and times a step from the driver's message to its end.

    Loading the step's data lies inside. The loss of a step is logged after its end, so losses come with the last
    message.
    """
    from transformers import TrainerCallback

    from rm_scale.distributed import barrier, gather_from_ranks

    counts = record_tokens(trainer)
    losses: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def hold(self) -> None:
            if is_main:
                wait_for_go()
            barrier()
            self.started = time.perf_counter()

        def on_train_begin(self, *unused: Any, **also_unused: Any) -> None:
            if is_main:
                say({"event": "ready"})
            self.hold()

        def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            barrier()
            if is_main:
                say({"event": "step", "seconds": time.perf_counter() - self.started})
            if state.global_step < state.max_steps:
                self.hold()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

        def on_train_end(self, *unused: Any, **also_unused: Any) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            ranks = gather_from_ranks((counts, peak))
            if is_main:
                steps = zip(*(tokens for tokens, _ in ranks), strict=True)
                total = [[sum(kind) for kind in zip(*step, strict=True)] for step in steps]
                say({"event": "done", "losses": losses, "tokens": total, "peak_bytes": [peak for _, peak in ranks]})

    return Clock()


def linear_shapes(model: str) -> dict[tuple[int, int], int]:
    """Return (inputs, outputs) and the count of a Llama-like model's linear layers; no embedding, no head."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    shapes: dict[tuple[int, int], int] = {}
    layer = [(hidden, heads * head), (hidden, keys), (hidden, keys), (heads * head, hidden)]
    for shape in [*layer, (hidden, inner), (hidden, inner), (inner, hidden)]:
        shapes[shape] = shapes.get(shape, 0) + config["num_hidden_layers"]
    return shapes


def shape_seconds(inputs: int, outputs: int, tokens: int, repeats: int, backward_weight: bool) -> float:
    """Time a linear layer's matrix products in bf16, the shortest of several: forward, input and weight gradient."""
    import torch

    x, grad = (torch.randn(tokens, size).bfloat16() for size in (inputs, outputs))
    weight = torch.randn(outputs, inputs).bfloat16()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        grad @ weight
        if backward_weight:
            grad.t() @ x
        best = min(best, time.perf_counter() - start)
    return best


def run_products(job: Job) -> None:
    """Answer each go with the rate of the matrix products alone, over the model's layers."""
    shapes = linear_shapes(job["model"])
    factor = 4 if job["lora"] else 6
    work = sum(factor * job["product_tokens"] * a * b * count for (a, b), count in shapes.items())
    say({"event": "ready"})
    for _ in range(job["steps"]):
        wait_for_go()
        seconds = sum(
            shape_seconds(a, b, job["product_tokens"], 4, not job["lora"]) * count for (a, b), count in shapes.items()
        )
        say({"event": "step", "seconds": seconds, "rate": work / seconds})
    say({"event": "done"})


def main() -> None:
    """Do the job given on the command line."""
    job = json.loads(next(word for word in sys.argv[1:] if word.startswith("{")))
    if job["side"] == "products":
        return run_products(job)
    from rm_scale.distributed import detect_world, prepare_environment
    from rm_scale.launch.extensions import prepare_extensions

    world = detect_world()
    if job["side"] == "ours" or job["deepspeed"]:
        prepare_environment(world)
        prepare_extensions(world.local_rank)
    trainer = (build_ours if job["side"] == "ours" else build_trl)(job, world)
    trainer.add_callback(clock(trainer, world.is_main))
    trainer.train()
    from rm_scale.distributed import barrier

    barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
