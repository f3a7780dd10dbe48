"""The steps of `rm_scale/train.py`, each a few lines over the rooms that do the work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import trl
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_reporting_integration_callbacks

from rm_scale.config import RunConfig
from rm_scale.data.checks import raise_if_too_many, write_data_report
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.preparation import PreparedData, prepare_data
from rm_scale.distributed import World, agreed_errors, detect_world, gather_from_ranks
from rm_scale.errors import CheckpointError, ConfigError, DataError
from rm_scale.evaluation.record import evaluation_table, write_evaluation
from rm_scale.inference.merging import merge_adapter
from rm_scale.inference.scorer import RewardScorer
from rm_scale.logs import get_logger
from rm_scale.modeling.contract import BaseModel, ScoringContract
from rm_scale.modeling.loading import LoadedModel, load_for_training
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.packing.batching import Batching, FixedSplit, IntArray, TokenSplit
from rm_scale.packing.collator import PackedCollator, PaddedCollator
from rm_scale.packing.layout import packed_length
from rm_scale.planning.estimate import estimate
from rm_scale.planning.hardware import device_of_run
from rm_scale.planning.lengths import GroupLengths, LengthMix
from rm_scale.planning.packing import fit_budget
from rm_scale.planning.plan import Plan, require_output_dir
from rm_scale.planning.run_estimate import scenario_of_run
from rm_scale.planning.shape import shape_from_config
from rm_scale.reporting.model_card import write_model_card
from rm_scale.reporting.run_directory import (
    forget_later_metrics,
    remove_earlier_run,
    run_folder,
    write_run_records,
)
from rm_scale.training.arguments import training_arguments
from rm_scale.training.callbacks import EarlyWarnings, MetricsFile, StepInLogs
from rm_scale.training.checkpoints import disk_errors_explained, refuse_unsafe_pickles
from rm_scale.training.lives import Lives, refuse_idle_restart
from rm_scale.training.losses import LossSettings
from rm_scale.training.manifest import check_files, newest_valid, read_manifest, require_same_run
from rm_scale.training.metrics import EvaluationResult
from rm_scale.training.plan_check import PlanCheck, out_of_memory_explained, predicted_memory
from rm_scale.training.preemption import EXIT_REQUEUE
from rm_scale.training.run_facts import run_facts
from rm_scale.training.saving import remove_leftovers, set_aside_later
from rm_scale.training.timing import load_record
from rm_scale.training.trainer import RewardTrainer, SaveSettings

logger = get_logger(__name__)


def load_text_encoder(config: RunConfig) -> tuple[PreTrainedTokenizerBase, TextEncoder]:
    """The tokenizer with its padding token, and the rules by which a text becomes tokens."""
    with agreed_errors():
        tokenizer = load_tokenizer(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            eos_token=config.eos_token,
            pad_token=config.pad_token,
            chat_template_path=config.chat_template_path,
        )
    rules = EncodingRules(
        append_eos=True,
        max_length=config.max_length,
        overlong_policy=config.overlong_policy,
        chat_template=tokenizer.chat_template,
    )
    return tokenizer, TextEncoder(tokenizer, rules)


def load_data(config: RunConfig, encoder: TextEncoder) -> PreparedData:
    """Read, check and encode the preference files, once per machine."""
    # All ranks call it at once: the cache's file lock lets one do the work. No collective waits meanwhile, which would
    # time out on large data.
    with agreed_errors():
        data = prepare_data(config, encoder)
        raise_if_too_many(data.report, config.max_rejected_share)
        _refuse_labels_the_loss_ignores(config, data)
    return data


def _refuse_labels_the_loss_ignores(config: RunConfig, data: PreparedData) -> None:
    """A ranking loss knows ranks only; margins and soft labels would be lost without a word."""
    for name in ("soft_label", "margin"):
        if config.loss_type == "plackett_luce" and data.train.data.column(name).null_count < len(data.train):
            raise DataError(
                f"loss_type=plackett_luce: the data has values for {name}, which a ranking loss can't use. "
                "Fix: use loss_type: bradley_terry, or remove the column."
            )


def count_steps(plan: Plan, data: PreparedData, config: RunConfig) -> Plan:
    """The plan with the number of steps, shown to the user."""
    plan = plan.with_data(len(data.train), len(data.eval) if data.eval is not None else 0, config.max_steps)
    with agreed_errors():
        plan = fit_budget(plan, config, int(_group_tokens(plan, data).max()))
    for line in plan.summary().splitlines():
        logger.info(line)
    return plan


def _group_tokens(plan: Plan, data: PreparedData) -> IntArray:
    """Tokens of each training group in a packed row, `(num_groups,)`."""
    sizes = data.train_sizes
    if plan.packing != "prefix_shared":
        return sizes.num_tokens
    return packed_length(sizes.num_tokens, sizes.prompt_length, sizes.num_responses)


def _batching(config: RunConfig, plan: Plan, data: PreparedData, pad_token_id: int) -> Batching:
    """How this run's groups become micro-batches."""
    multiple, keep_ties = config.pad_to_multiple_of, config.tie_policy == "half"
    split: FixedSplit | TokenSplit = FixedSplit(plan.per_device_train_batch_size, plan.world_size)
    collate: PaddedCollator | PackedCollator = PaddedCollator(pad_token_id, multiple, keep_ties)
    if plan.max_tokens_per_device is not None:
        split = TokenSplit(_group_tokens(plan, data), plan.max_tokens_per_device, plan.world_size)
        collate = PackedCollator(pad_token_id, plan.packing == "prefix_shared", multiple, keep_ties)
    return Batching(plan.global_batch_size, split, collate, plan.per_device_eval_batch_size)


def build_arguments(config: RunConfig, plan: Plan) -> trl.RewardConfig:
    """TRL's arguments; the seed is set here, since a new head is random.

    Raises:
        ConfigError: a value that only transformers can judge (schedule, optimizer, logger, DeepSpeed file) is wrong.
    """
    try:
        arguments = training_arguments(config, plan)
        # Made once to see whether each logger is known and installed; the trainer makes its own.
        for logger_class in get_reporting_integration_callbacks(config.report_to):
            logger_class()
    except (ValueError, ImportError, RuntimeError) as error:
        asked = ", ".join(f"{name}={getattr(config, name)}" for name in ("lr_scheduler_type", "optim", "report_to"))
        raise ConfigError(
            [f"{asked}: {' '.join(str(error).split())} Fix: choose a value that is named there."]
        ) from error
    set_seed(config.seed)
    return arguments


def load_model(config: RunConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Backbone, scalar head and adapters."""
    started = time.perf_counter()
    loaded = load_for_training(config, plan, tokenizer)
    return replace(loaded, record=load_record(time.perf_counter() - started))


def choose_resume(config: RunConfig, world: World) -> Path | None:
    """The whole checkpoint that this life goes on from, `None` for a fresh start. A collective.

    Raises:
        CheckpointError: on every rank, when what was asked for is not there or is damaged.
        TrainingError: three lives in a row made no progress.
    """
    asked, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if asked is None:
        return None
    if asked in {"last", "auto"}:
        folder = newest_valid(output_dir, world.rank, world.size)
        if folder is None and asked == "last":
            raise CheckpointError(
                f"resume_from_checkpoint=last: {output_dir} holds no whole checkpoint. Fix: leave the setting out to "
                "start, or --resume_from_checkpoint auto."
            )
    else:
        folder = Path(asked)
        check_files(folder, world.rank, world.size)
    with agreed_errors():
        if world.is_main and asked == "auto" and "idle_restarts" not in config.force:
            refuse_idle_restart(run_folder(config), read_manifest(folder).step if folder is not None else 0)
    logger.info(f"resuming from {folder}" if folder is not None else "no checkpoint yet: starting from the beginning")
    return folder


@contextmanager
def one_life(config: RunConfig, world: World) -> Iterator[Lives]:
    """Decide from where this life goes on, and keep `run/lives.jsonl`: how it began and why it ended."""
    with agreed_errors():
        if world.is_main:
            require_output_dir(config)
    resume = choose_resume(config, world)
    life = Lives(run_folder(config), world.is_main, resume, read_manifest(resume).step if resume is not None else 0)
    life.life = gather_from_ranks(life.life)[0]  # all have read the file before one writes to it
    with life.lived():
        if config.resume_from_checkpoint is not None:
            life.begin()  # a fresh run leaves no trace before its data has been found good
        yield life


def open_run_directory(
    config: RunConfig, plan: Plan, data: PreparedData, world: World, life: Lives | None = None
) -> SaveSettings:
    """Write what was asked, planned and read. The first thing of a fresh run that reaches the disk.

    Returns:
        What this run's checkpoints will remember, and when one that fails ends it.

    Raises:
        CheckpointError: the checkpoint to resume from belongs to a run that differs in one of them.
    """
    life = life or Lives(run_folder(config), is_main=False)
    facts = json.loads(json.dumps(run_facts(config, plan, data)))  # as a manifest gives them back
    with agreed_errors(), disk_errors_explained(run_folder(config)):
        if world.is_main:
            if life.resume is not None:
                require_same_run(life.resume, facts, config.allow_changed)
            _make_room(config, life)
            folder = write_run_records(config, plan)
            write_data_report(data.report, data.rejected, folder)
    life.begin()
    return SaveSettings(
        facts=facts,
        zero_stage=plan.zero_stage,
        max_failed_saves=config.max_failed_saves,
        max_nonfinite_steps=config.max_nonfinite_steps,
        stop_margin_seconds=config.stop_margin_seconds,
        lives=life,
    )


def _make_room(config: RunConfig, life: Lives) -> None:
    """Take away what an earlier run or a killed life left, as far as this one replaces it."""
    output_dir, resume = Path(config.output_dir), life.resume
    remove_leftovers(output_dir)
    if resume is None and config.resume_from_checkpoint is None:
        remove_earlier_run(config)
        return
    forget_later_metrics(config, life.step if resume is not None else -1)
    named = config.resume_from_checkpoint not in {"last", "auto"}
    if resume is not None and named and resume.resolve().parent == output_dir.resolve():
        set_aside_later(output_dir, life.step)


def build_trainer(
    config: RunConfig,
    plan: Plan,
    arguments: trl.RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    encoder: TextEncoder,
    loaded: LoadedModel,
    data: PreparedData,
    saves: SaveSettings | None = None,
) -> RewardTrainer:
    """Put model, data, loss and scoring contract together."""
    settings = LossSettings(config.loss_type, config.label_smoothing_factor, config.center_rewards_coefficient or 0.0)
    trainer = RewardTrainer(
        model=loaded.model,
        args=arguments,
        tokenizer=tokenizer,
        train_groups=data.train,
        eval_groups=data.eval,
        batching=_batching(config, plan, data, tokenizer.pad_token_id),
        loss_settings=settings,
        contract=_contract(config, plan, loaded, encoder, tokenizer),
        shuffle=config.shuffle_train,
        saved_head=loaded.saved_head,
        saves=saves,
        callbacks=[
            StepInLogs(),
            EarlyWarnings(),
            MetricsFile(run_folder(config) / "metrics.jsonl"),
            _plan_check(config, plan, loaded, data),
        ],
    )
    trainer.step_times.load = loaded.record
    return trainer


def _plan_check(config: RunConfig, plan: Plan, loaded: LoadedModel, data: PreparedData) -> PlanCheck:
    """What the planner says of this run on this machine, with the lengths of its own data."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    device, knows_speed = device_of_run(name, config.hardware)
    shape = shape_from_config(loaded.model.config.to_dict())
    world = detect_world()
    nodes = max(1, world.size // world.ranks_on_node)
    scenario = scenario_of_run(config, plan, shape, device, nodes, _length_mix(data))
    return PlanCheck(estimate(scenario), run_folder(config) / "plan_check.json", knows_speed)


def _length_mix(data: PreparedData, sample: int = 2000) -> LengthMix:
    sizes = data.train_sizes
    count = len(sizes.num_tokens)
    groups = []
    for place in range(0, count, max(1, count // sample)):
        responses, prompt = int(sizes.num_responses[place]), int(sizes.prompt_length[place])
        each = max(1, round(int(sizes.num_tokens[place]) / responses - prompt))
        groups.append(GroupLengths(prompt, (each,) * responses))
    return LengthMix(tuple(groups), "the run's training groups", count)


def _contract(
    config: RunConfig, plan: Plan, loaded: LoadedModel, encoder: TextEncoder, tokenizer: PreTrainedTokenizerBase
) -> ScoringContract:
    quantization = None
    if config.load_in_4bit:
        quantization = loaded.model.config.quantization_config.to_dict()
        quantization = {k: v for k, v in quantization.items() if not k.startswith("_") and k != "quant_method"}
    name = config.model_name_or_path
    return ScoringContract(
        encoding=encoder.describe(),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=loaded.model.config.get_text_config().vocab_size,
        dtype=plan.dtype,
        compute_dtype=plan.compute_dtype,
        base_model=BaseModel(
            name=str(Path(name).resolve()) if Path(name).is_dir() else name,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            quantization=quantization,
        ),
    )


def train(trainer: RewardTrainer, life: Lives) -> int:
    """Train, from the start or from a checkpoint; gives the exit code: 85 when it was asked to stop before its end."""
    resume = life.resume
    if resume is not None:
        with agreed_errors():
            if trainer.args.should_save:
                refuse_unsafe_pickles(resume)
    # What was asked while libraries, data and model were read: there is nothing new to save.
    if not trainer.stopping.agree():
        with out_of_memory_explained(predicted_memory(trainer)):
            trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    if not trainer.stopping.reason:
        return 0
    trainer.stopping.remove_stop_file()
    life.outcome = f"stopped: {trainer.stopping.reason.text}"
    logger.warning(f"stopped at step {trainer.state.global_step}; go on with --resume_from_checkpoint auto")
    return EXIT_REQUEUE


def evaluate(trainer: RewardTrainer, data: PreparedData) -> EvaluationResult | None:
    """The final, exact evaluation."""
    if data.eval is None:
        return None
    result = trainer.final_evaluation()
    for line in evaluation_table(result).splitlines():
        logger.info(line)
    return result


def save(trainer: RewardTrainer, config: RunConfig, plan: Plan, result: EvaluationResult | None, world: World) -> None:
    """Write the model directory, verified, with its records; then merge and show sample scores."""
    trainer.watchdog.stop()  # rank 0 loads, merges and scores alone from here on
    if result is not None:
        trainer.contract = replace(
            trainer.contract,
            score_mean=result.score_mean,
            score_std=result.score_std,
            num_scored=result.num_scored,
        )
    trainer.save_model(config.output_dir)
    with agreed_errors(), disk_errors_explained(config.output_dir):
        if world.is_main:
            _leave_behind(config, plan, result)
            _show_samples(trainer, config)


def _leave_behind(config: RunConfig, plan: Plan, result: EvaluationResult | None) -> None:
    folder = Path(config.output_dir)
    if result is not None:
        write_evaluation(result, run_folder(config))
    write_model_card(folder, config, plan, result)
    if config.merge_adapter:
        merge_adapter(folder, folder / "merged", config.trust_remote_code)
    logger.info(f"model: {folder}")
    logger.info(f"how it scores: {folder / 'scoring_contract.json'}; model card: {folder / 'README.md'}")
    logger.info(f"records: {run_folder(config)} (metrics.jsonl, evaluation.json, data_report.json, plan.json, ...)")


def _show_samples(trainer: RewardTrainer, config: RunConfig) -> None:
    """Scores of a few texts by the model as it lies on disk."""
    groups = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    count = min(config.sample_scores, len(groups))
    if count == 0:
        return
    scorer = RewardScorer.from_pretrained(config.output_dir, device="cpu", trust_remote_code=config.trust_remote_code)
    rows = groups.select(torch.linspace(0, len(groups) - 1, count).long().tolist())
    logger.info(f"scores of {count} groups by the saved model:")
    for row in rows:
        scores = scorer.score_tokens(row["input_ids"])
        for rank, score, ids in sorted(zip(row["ranks"], scores, row["input_ids"], strict=True)):
            text = " ".join(scorer.tokenizer.decode(ids, skip_special_tokens=True).split())
            logger.info(f"  rank {rank}  {score:8.3f}  {text if len(text) <= 100 else '...' + text[-97:]}")
