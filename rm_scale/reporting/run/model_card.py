"""README.md of a trained model: what it is, how it was trained, how good it is, and how to score with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from rm_scale.config import RunConfig
from rm_scale.config_sources import sources_in
from rm_scale.errors import ModelError
from rm_scale.evaluation.evaluation_document import EvaluationDocument
from rm_scale.files import write_whole
from rm_scale.planning.plan import Plan
from rm_scale.reporting.evaluation.evaluation_summary import card_section
from rm_scale.texts import one_line, printable
from rm_scale.training.pair_counts import EvaluationResult

CARD_FILE = "README.md"
# What stands between these is replaced by `rm-scale eval --model_card`; all else in the card is its owner's.
BEGIN = "<!-- rm_scale:evaluation:begin -->"
END = "<!-- rm_scale:evaluation:end -->"


def write_model_card(
    folder: Path,
    config: RunConfig,
    plan: Plan,
    result: EvaluationResult | None,
    warnings: Sequence[tuple[str | None, str]] = (),
    weights_step: int | None = None,
) -> Path:
    """Write the card beside the weights.

    Args:
        folder: the run's output directory.
        config: what was asked.
        plan: what ran.
        result: the final evaluation, `None` when there was nothing to evaluate on.
        warnings: name, if any, and text of what the run warned about.
        weights_step: the step whose weights these are, where they are not the last.
    """
    path = folder / CARD_FILE
    results = f"{BEGIN}\n{_results(result)}\n{END}"
    parts = [_front_matter(config), _description(config, plan, weights_step), *_warnings(warnings), results]
    parts += [_usage(config.output_dir, config)]
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def update_model_card(folder: Path, document: EvaluationDocument) -> Path:
    """Put new results into a card, between its markers; at its end when it has none, and a new card when there is none.

    Raises:
        ModelError: a card that can't be read, or has one marker without the other.
    """
    path = folder / CARD_FILE
    section = f"{BEGIN}\n{card_section(document)}\n{END}"
    try:
        card = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: can't be read ({error}). Fix: mend the card, or leave out --model_card.") from error
    if (card.count(BEGIN), card.count(END)) == (1, 1) and card.index(BEGIN) < card.index(END):
        before, rest = card.split(BEGIN)
        write_whole(path, before + section + rest.split(END)[1])
        return path
    if BEGIN in card or END in card:
        raise ModelError(
            f"{path}: has {card.count(BEGIN)} times {BEGIN} and {card.count(END)} times {END}; one of each is needed, "
            "in this order, to know what may be replaced. Fix: mend or delete these two lines."
        )
    write_whole(path, f"{card.rstrip()}\n\n{section}\n".lstrip())
    return path


def _front_matter(config: RunConfig) -> str:
    lines = ["---", "library_name: peft" if config.use_peft else "library_name: transformers"]
    base = yaml.safe_dump({"base_model": config.model_name_or_path}, allow_unicode=True, width=10_000).strip()
    lines += ["pipeline_tag: text-classification", base]
    lines += ["tags:", "- reward-model", "- reward-trainer", "- trl", "- rm_scale", "---"]
    return "\n".join(lines)


def _description(config: RunConfig, plan: Plan, weights_step: int | None) -> str:
    best = f"; weights of step {weights_step:,}, the best {config.metric_for_best_model}" if weights_step else ""
    data = config.dataset_name or ", ".join(Path(path).name for path in config.dataset_path or [])
    data = data or ", ".join(source.name for source in sources_in(config, "datasets"))
    zero = f"ZeRO-{plan.zero_stage}" if plan.deepspeed_config is not None else "no ZeRO"
    return "\n".join(
        [
            f"# Reward model from {Path(config.model_name_or_path).name}",
            "",
            "One scalar per text, higher is better. Trained from human or synthetic preferences with rm_scale.",
            "",
            "| | |",
            "| --- | --- |",
            f"| base model | {config.model_name_or_path} |",
            f"| method | {plan.method}, {zero}, {plan.world_size} ranks |",
            f"| data | {_cell(data)}: {plan.num_train_groups:,} groups to train on |",
            f"| loss | {config.loss_type} |",
            f"| steps | {plan.total_steps:,} of {plan.global_batch_size} groups, learning rate "
            f"{plan.learning_rate:g}{best} |",
            f"| precision | weights {plan.dtype}, compute {plan.compute_dtype}, head float32 |",
            f"| longest text | {config.max_length} tokens |",
        ]
    )


def _warnings(warnings: Sequence[tuple[str | None, str]]) -> list[str]:
    lines = [f"- {f'`{name}`: ' if name else ''}{printable(one_line(text))}" for name, text in warnings]
    return ["\n".join(["## Warnings of the training run", "", *lines])] if lines else []


def _cell(value: str) -> str:
    """Return a text of the data as it may stand in a table: in one line, and no mark of Markdown or of our own."""
    return printable(one_line(value)).replace("|", "\\|").replace("<", "&lt;")


def _results(result: EvaluationResult | None) -> str:
    if result is None:
        return "## Evaluation\n\nThere was no evaluation data."
    values = result.as_dict()
    lines = [
        "## Evaluation",
        "",
        "| subset | pairs | accuracy | 95 % interval | mean margin |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, part in [("all", values), *values["subsets"].items()]:
        low, high = part["accuracy_ci95"]
        accuracy = "-" if part["accuracy"] is None else f"{part['accuracy']:.4f}"
        margin = "-" if part["mean_margin"] is None else f"{part['mean_margin']:.3f}"
        lines.append(f"| {_cell(name)} | {part['num_pairs']} | {accuracy} | {low:.4f} - {high:.4f} | {margin} |")
    lines += [
        "",
        f"Scores on the evaluation set: mean {result.score_mean:.4f}, standard deviation {result.score_std:.4f}.",
    ]
    return "\n".join(lines)


def _usage(name: str, config: RunConfig) -> str:
    code = [
        "## Use",
        "",
        "```python",
        "from rm_scale import RewardScorer",
        "",
        f'scorer = RewardScorer.from_pretrained("{name}")',
        'scorer.score(["What is 2 + 2?"], [" 4"])',
        "```",
        "",
        "`scoring_contract.json` says how a text becomes a score (template, EOS, maximum length).",
    ]
    if not config.use_peft:
        code += [
            "It is a plain `transformers` sequence classifier; for the raw score use",
            f'`pipeline("text-classification", "{name}", function_to_apply="none")`.',
        ]
    return "\n".join(code)
