"""Write the ready runs of `configs/` for the models of `rm_scale/known_models.py`:  python tools/ready_configs.py

One table says which model is trained how; the needs in each header are the planner's, so that both change together.
Older files in `configs/`, written by hand, stay as they are. A test compares the files with what this writes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY)]

from rm_scale.known_models import KNOWN_MODELS  # noqa: E402
from rm_scale.planning.advise import Choice, Request, recommend  # noqa: E402
from rm_scale.planning.group_lengths import full_rows  # noqa: E402
from rm_scale.planning.hardware import find_device  # noqa: E402
from rm_scale.planning.parameters import active_parameters, count_parameters  # noqa: E402
from rm_scale.planning.scenario import Method  # noqa: E402
from rm_scale.planning.shape import shape_from_config  # noqa: E402
from rm_scale.texts import large_number  # noqa: E402

MAX_LENGTH, GLOBAL_BATCH, LORA_RANK = 2048, 64, 64
DEVICES = {"80 GB": "h100-80g", "40 GB": "a100-40g", "24 GB": "rtx4090"}
MOST_DEVICES = 64
ROUTER_COEFFICIENT = 0.001
"""transformers' default for Qwen3's mixtures of experts."""


@dataclass(frozen=True)
class Ready:
    """One ready run.

    Attributes:
        name: of the file.
        model: hub name.
        method: full, lora or qlora.
        licence: what the header says about getting the model.
        zero: DeepSpeed stage.
    """

    name: str
    model: str
    method: Method
    licence: str
    zero: int

    @property
    def title(self) -> str:
        """The method in words."""
        return {
            "full": f"full fine-tuning on UltraFeedback under ZeRO-{self.zero}",
            "lora": "LoRA on UltraFeedback",
            "qlora": "QLoRA (4-bit NF4, double quantisation) on UltraFeedback",
        }[self.method]


_APACHE = "Apache-2.0"
_MIT = "MIT"
_GATED = "gated; accept its licence on the hub and set HF_TOKEN in the environment"
_LLAMA = f"Llama 3.2 Community License; {_GATED}"
_GEMMA = f"Gemma Terms of Use; {_GATED}"
_MISTRAL = f"Mistral AI Research License, no commercial use; {_GATED}"


def _runs(name: str, model: str, licence: str, **stages: int) -> list[Ready]:
    methods: dict[str, Method] = {"full": "full", "lora": "lora", "qlora": "qlora"}
    return [Ready(f"{name}_{method}", model, methods[method], licence, stage) for method, stage in stages.items()]


READY = [
    *_runs("qwen3_0.6b", "Qwen/Qwen3-0.6B", _APACHE, full=2),
    *_runs("qwen3_1.7b", "Qwen/Qwen3-1.7B", _APACHE, full=2),
    *_runs("qwen3_4b", "Qwen/Qwen3-4B", _APACHE, full=3, lora=2),
    *_runs("qwen3_8b", "Qwen/Qwen3-8B", _APACHE, full=3, lora=2, qlora=2),
    *_runs("qwen3_14b", "Qwen/Qwen3-14B", _APACHE, full=3, lora=2, qlora=2),
    *_runs("qwen3_30b_a3b", "Qwen/Qwen3-30B-A3B", _APACHE, full=3, lora=3),
    *_runs("llama_3.2_3b", "meta-llama/Llama-3.2-3B-Instruct", _LLAMA, full=3, lora=2),
    *_runs("gemma_3_1b", "google/gemma-3-1b-it", _GEMMA, full=2),
    *_runs("gemma_3_4b", "google/gemma-3-4b-it", _GEMMA, full=3, lora=2),
    *_runs("gemma_3_12b", "google/gemma-3-12b-it", _GEMMA, lora=2, qlora=2),
    *_runs("olmo_3_7b", "allenai/Olmo-3-7B-Instruct", _APACHE, full=3, lora=2),
    *_runs("ministral_8b", "mistralai/Ministral-8B-Instruct-2410", _MISTRAL, full=3, lora=2),
    *_runs("phi_4", "microsoft/phi-4", _MIT, lora=2, qlora=2),
]


def choice_on(ready: Ready, device_name: str, count: int) -> Choice:
    """Return the plan of a ready run on so many devices of a kind."""
    device = find_device(device_name, None)
    request = Request(
        name=ready.model,
        shape=shape_from_config(KNOWN_MODELS[ready.model]),
        method=ready.method,
        device=device,
        num_devices=count,
        num_nodes=-(-count // device.devices_per_node),
        max_length=MAX_LENGTH,
        lengths=full_rows(MAX_LENGTH),
        global_batch_size=GLOBAL_BATCH,
        zero_stage=ready.zero,
        offload="none",
        checkpointing=True,
        lora_rank=LORA_RANK,
        nested_quant=ready.method == "qlora",
    )
    return recommend(request)


def fewest(ready: Ready, device_name: str) -> int | None:
    """Return the fewest devices, doubling from one, on which a ready run fits; `None`: none do."""
    count = 1
    while count <= MOST_DEVICES:
        if choice_on(ready, device_name, count).estimate.fits:
            return count
        count *= 2
    return None


def _needs(ready: Ready) -> str:
    counts = {memory: fewest(ready, name) for memory, name in DEVICES.items()}
    found = {count: f"{count} GPU{'s' if count > 1 else ''} of {memory}" for memory, count in counts.items() if count}
    shape = shape_from_config(KNOWN_MODELS[ready.model])
    size = f"{large_number(count_parameters(shape))} parameters"
    if shape.experts is not None:
        size += f", {large_number(active_parameters(shape))} of them at work for a token"
    return f"{' or '.join(found.values())}. {size}."


def _experts_note(ready: Ready) -> str:
    shape = shape_from_config(KNOWN_MODELS[ready.model])
    if shape.experts is None or ready.method == "full":
        return ""
    return (
        "# LoRA adapts attention here. lora_target_parameters: [experts.gate_up_proj, experts.down_proj] would adapt\n"
        "#   the experts too, whose adapters then take more memory and time.\n"
    )


def _learning_rate(ready: Ready) -> str:
    if ready.method == "full":
        filled = "learning_rate, num_train_epochs and per_device_train_batch_size"
        return f"# {filled}: defaults of the model's size, named in the log"
    return "learning_rate: 1.0e-4\nnum_train_epochs: 1"


def _balance(ready: Ready) -> str:
    """Return the setting that keeps trained routers balanced; adapters leave routers frozen."""
    if shape_from_config(KNOWN_MODELS[ready.model]).experts is None or ready.method != "full":
        return ""
    return (
        "# Keeps tokens spread over the experts: full fine-tuning trains routers too, by default without this loss.\n"
        f"router_aux_loss_coef: {ROUTER_COEFFICIENT}\n"
    )


def _model_settings(ready: Ready) -> str:
    lines = [f"model_name_or_path: {ready.model}"]
    if ready.method != "full":
        alpha = 2 * LORA_RANK if ready.method == "lora" else LORA_RANK
        lines += ["use_peft: true", f"lora_r: {LORA_RANK}", f"lora_alpha: {alpha}", "lora_dropout: 0.05"]
    if ready.method == "qlora":
        lines += ["load_in_4bit: true", "bnb_4bit_quant_type: nf4", "use_bnb_nested_quant: true"]
    return "\n".join(lines)


def text_of(ready: Ready) -> str:
    """Return the file of a ready run."""
    path = f"configs/{ready.name}.yaml"
    count = fewest(ready, DEVICES["80 GB"]) or 1
    on_one_node = min(count, 8)
    over_nodes = (
        f"# Over {count // 8} nodes:\n#   rm-scale launch --slurm --nodes {count // 8} --config {path}\n"
        if count > 8
        else ""
    )
    return f"""\
# {ready.model.split("/")[1]}, {ready.title}.
#
# Check it first (prints the resolved settings and the plan, loads nothing):
#   deepspeed rm_scale/train.py --config {path} --dry_run
# Start it, on the GPUs of this machine:
#   deepspeed rm_scale/train.py --config {path}
#   torchrun --standalone --nproc_per_node {on_one_node} rm_scale/train.py --config {path}
{over_nodes}#
# Needs (predicted, not measured): {_needs(ready)}
{_experts_note(ready)}# Model: {ready.model} ({ready.licence}).
# Data: trl-lib/ultrafeedback_binarized, about 62,000 pairs to train on and 1,000 to test on, from the Hugging Face hub.
#   Downloaded on first use; on nodes without internet, fetch it beforehand (HF_HOME on a shared disk) and set
#   HF_HUB_OFFLINE=1.

# --- Model
{_model_settings(ready)}

# --- Data
dataset_name: trl-lib/ultrafeedback_binarized
dataset_train_split: train
dataset_test_split: test
max_length: {MAX_LENGTH}

# --- Optimisation
{_learning_rate(ready)}
global_batch_size: {GLOBAL_BATCH}
warmup_ratio: 0.03
center_rewards_coefficient: 0.01
{_balance(ready)}bf16: true
gradient_checkpointing: true
deepspeed: zero{ready.zero}

# --- Logging, evaluation, saving
output_dir: outputs/{ready.name}
report_to: [tensorboard]
logging_steps: 10
eval_strategy: steps
eval_steps: 200
save_strategy: steps
save_steps: 200
save_total_limit: 2
"""


def main() -> None:
    """Write all of them."""
    for ready in READY:
        (REPOSITORY / "configs" / f"{ready.name}.yaml").write_text(text_of(ready), encoding="utf-8")
        print(f"configs/{ready.name}.yaml: {_needs(ready)}")


if __name__ == "__main__":
    main()
