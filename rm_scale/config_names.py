"""The names of schedules, optimizers, attention kernels and loggers that transformers 5 knows.

They stand here so that a wrong name is found before any library is loaded; a test compares them with transformers.
"""

from __future__ import annotations

# fmt: off
SCHEDULES: tuple[str, ...] = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)
# Need arguments that are no settings here (optim_target_modules).
OPTIMIZERS_WITH_ARGUMENTS = ("galore_", "apollo_")  # how their names begin
# Parts of the names of those whose state is not one number for each weight: blocks, factors, none at all.
OPTIMIZERS_WITH_FORMS_OF_THEIR_OWN = ("8bit", "4bit", "adafactor", "lomo")
# Follow the loss of the evaluations, not the number of steps.
SCHEDULES_BY_LOSS: tuple[str, ...] = ("reduce_lr_on_plateau", "greedy")
# What an evaluation while training measures, and with "_accuracy" behind it each subset's name.
EVALUATION_METRICS: tuple[str, ...] = (
    "accuracy", "loss", "mean_margin", "num_pairs", "num_ties", "accuracy_ci95_low", "accuracy_ci95_high", "score_std",
)
ATTENTIONS: tuple[str, ...] = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention", "paged|eager",
)
OPTIMIZERS: tuple[str, ...] = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit",
    "adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo",
    "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw",
    "apollo_adamw_layerwise", "stable_adamw",
)
LOGGERS: tuple[str, ...] = (
    "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune",
    "swanlab", "tensorboard", "trackio", "wandb", "all", "none",
)
# fmt: on
