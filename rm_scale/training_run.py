"""The steps of `rm_scale/train.py`, each a few lines that call the packages which do the work."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import trl
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils.logging import disable_progress_bar

from rm_scale.batching.collator import PackedCollator, PaddedCollator
from rm_scale.batching.packed.attention import index_names
from rm_scale.batching.packed.layout import IndexName, packed_length
from rm_scale.batching.sampler import Batching, FixedSplit, IntArray, TokenSplit
from rm_scale.batching.stream_steps import StepStream, StreamSplit, StreamSteps
from rm_scale.config import RunConfig
from rm_scale.config_names import EVALUATION_METRICS
from rm_scale.data.data_report import raise_if_too_many, write_data_report
from rm_scale.data.encoding import EncodingRules, TextEncoder
from rm_scale.data.preparation import PreparedData, prepare_data
from rm_scale.data.stream import GroupStream
from rm_scale.distributed import World, agreed_errors, detect_world, gather_from_ranks, giving_back_freed_memory
from rm_scale.errors import ConfigError, DataError, ModelError
from rm_scale.evaluation.final_evaluation import evaluation_table, write_evaluation
from rm_scale.inference.export.merge_adapter import merge_adapter
from rm_scale.inference.scoring.sample_scores import show_sample_scores
from rm_scale.logs import get_logger
from rm_scale.long_work import left_together
from rm_scale.modeling.exact_shape import shape_of_loaded
from rm_scale.modeling.loading import LoadedModel, load_for_training
from rm_scale.modeling.model_shape import shape_of_run
from rm_scale.modeling.scoring_contract import BaseModel, ScoringContract
from rm_scale.modeling.tokenizers import load_tokenizer
from rm_scale.output_lock import writing_alone
from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.group_lengths import GroupLengths, LengthMix
from rm_scale.planning.hardware import device_of_run
from rm_scale.planning.plan import Plan, check_schedule, fit_budget, require_output_dir
from rm_scale.planning.run_estimate import scenario_of_run
from rm_scale.planning.shape import ModelShape
from rm_scale.reporting.run.model_card import write_model_card
from rm_scale.reporting.run.run_directory import (
    forget_later_metrics,
    remove_earlier_run,
    run_folder,
    write_run_records,
)
from rm_scale.texts import one_line
from rm_scale.training.arguments import training_arguments
from rm_scale.training.attempts import Attempt
from rm_scale.training.callbacks import EarlyWarnings, MetricsFile, StepInLogs, outlast_disk_errors
from rm_scale.training.checkpoint.last_save import LastSaveFailed, end_training, end_with_requeue
from rm_scale.training.checkpoint.manifest import read_manifest, require_same_run
from rm_scale.training.checkpoint.publish import remove_leftovers, set_aside_later
from rm_scale.training.checkpoint.reload_check import disk_errors_explained, refuse_unsafe_pickles
from rm_scale.training.checkpoint.resume import choose_resume
from rm_scale.training.checkpoint.run_facts import run_facts
from rm_scale.training.checkpoint.writer import SaveSettings
from rm_scale.training.determinism import use_deterministic_kernels
from rm_scale.training.evaluation_sets import names_of_sets
from rm_scale.training.losses import LossSettings
from rm_scale.training.pair_counts import EvaluationResult
from rm_scale.training.plan_check import PlanCheck, out_of_memory_explained, predicted_memory
from rm_scale.training.progress import Progress
from rm_scale.training.routing import router_coefficient
from rm_scale.training.run_warnings import begin_warnings, evaluation_warnings, read_warnings, warnings_kept
from rm_scale.training.step_timing import load_record
from rm_scale.training.trainer import RewardTrainer

logger = get_logger(__name__)


def load_text_encoder(config: RunConfig) -> tuple[PreTrainedTokenizerBase, TextEncoder]:
    """Return the tokenizer with its padding token, and the encoder that turns texts into tokens with it."""
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
    # All ranks call it at once; those of one cache folder share the work. No collective waits meanwhile: it would time
    # out on large data.
    with agreed_errors(), left_together("reading and encoding the data"), giving_back_freed_memory():
        data = prepare_data(config, encoder)
        raise_if_too_many(data.report, config.max_rejected_share, data.rejected.files())
        _refuse_labels_the_loss_ignores(config, data)
        _refuse_metric_of_no_subset(config, data)
    return data


def _refuse_labels_the_loss_ignores(config: RunConfig, data: PreparedData) -> None:
    """Refuse margins and soft labels under a ranking loss, which would ignore them.

    Raises:
        DataError: the data has some.
    """
    for name in ("soft_label", "margin"):
        if config.loss_type == "plackett_luce" and data.train.data.column(name).null_count < len(data.train):
            raise DataError(
                f"loss_type=plackett_luce: the data has values for {name}, which a ranking loss can't use. "
                "Fix: use loss_type: bradley_terry, or remove the column."
            )


def _refuse_metric_of_no_subset(config: RunConfig, data: PreparedData) -> None:
    """Refuse to choose the best model by a subset or a file that the evaluation data does not have.

    Raises:
        ConfigError: there is none of that name.
    """
    metric = (config.metric_for_best_model or "accuracy").removeprefix("eval_")
    if metric in EVALUATION_METRICS or data.eval is None:
        return
    subsets, sets = _subsets(data), set(_eval_sets(data))
    known = [f"{name}_accuracy" for name in sorted(subsets | sets)] + [f"{name}_loss" for name in sorted(sets)]
    if metric not in known:
        raise ConfigError(
            [
                f"metric_for_best_model={config.metric_for_best_model}: the evaluation data has no such subset and "
                f"no such file; they have {one_line(', '.join(known), 400) or 'none'}. "
                "Fix: accuracy, loss, or one of these."
            ]
        )


def count_steps(plan: Plan, data: PreparedData, config: RunConfig) -> Plan:
    """Return the plan with the number of steps, and log it."""
    num_eval = len(data.eval) if data.eval is not None else 0
    num_train, epoch_groups = len(data.train), None
    if data.stream is not None:
        num_train = config.max_steps * plan.global_batch_size
    elif data.mixture is not None:
        epoch_groups = data.mixture.epoch_size(plan.global_batch_size)
    plan = plan.with_data(num_train, num_eval, config.max_steps, epoch_groups)
    with agreed_errors():
        plan = fit_budget(plan, config, int(_group_tokens(plan, data).max()))
    problems = check_schedule(plan, config)
    if problems:
        raise ConfigError(problems)
    plan = _reduce_once_if_it_fits(config, plan, data)
    for line in plan.summary().splitlines():
        logger.info(line)
    return plan


REDUCE_ONCE_SHARE = 0.85
"""Share of the memory limit that a run with whole gradients may take: the choice must not make it fail."""


def _reduce_once_if_it_fits(config: RunConfig, plan: Plan, data: PreparedData) -> Plan:
    """Under ZeRO-2, reduce gradients once per step where they fit whole: the network is what steps wait for.

    With several micro-steps ZeRO-2 sends all gradients in each of them; the sums are the same. A collective.
    """
    accumulates_in = (plan.deepspeed_config or {}).get("data_types", {}).get("grad_accum_dtype")
    # With a type of their own for sums, DeepSpeed's ZeRO-1 is another optimizer.
    if plan.zero_stage != 2 or plan.offload != "none" or accumulates_in is not None:
        return plan
    if config.gradient_reduction == "each_step":
        return replace(plan, reduces_once=True)
    if config.gradient_reduction == "each_micro_step" or plan.device != "cuda":
        return plan
    with agreed_errors():
        try:
            predicted = _estimate(config, replace(plan, zero_stage=1), data, shape_of_run(config))
        except ModelError as error:  # the same on all ranks
            logger.info(f"whether whole gradients fit can't be predicted ({error})")
            return plan
        limit = REDUCE_ONCE_SHARE * predicted.limit_bytes
        fits = predicted.fits and predicted.peak_memory_bytes <= limit
    if predicted.scenario.num_micro_steps < 2 or not all(gather_from_ranks(fits)):
        return plan
    note = (
        f"ZeRO-2 with whole gradients between micro-steps: they fit ({predicted.peak_memory_bytes / 1e9:.1f} of "
        f"{limit / 1e9:.1f} GB predicted), so each step reduces them once; gradient_reduction: each_micro_step if not"
    )
    return replace(plan, reduces_once=True, notes=(*plan.notes, note))


def _group_tokens(plan: Plan, data: PreparedData) -> IntArray:
    """Return the tokens of each training group in a packed row, `(num_groups,)`."""
    sizes = data.train_sizes
    if plan.packing != "prefix_shared":
        return sizes.num_tokens
    tokens: IntArray = packed_length(sizes.num_tokens, sizes.prompt_length, sizes.num_responses)
    return tokens


def _batching(
    config: RunConfig, plan: Plan, data: PreparedData, pad_token_id: int, arrays: tuple[IndexName, ...]
) -> Batching:
    """Return how this run's groups become micro-batches.

    Args:
        config, plan, data: of the run.
        pad_token_id: fills padded rows.
        arrays: index arrays that the attention of packed rows will need.
    """
    multiple, keep_ties = config.pad_to_multiple_of, config.tie_policy == "half"
    split: FixedSplit | TokenSplit = FixedSplit(plan.per_device_train_batch_size, plan.world_size)
    collate: PaddedCollator | PackedCollator = PaddedCollator(pad_token_id, multiple, keep_ties)
    if plan.max_tokens_per_device is not None:
        split = TokenSplit(_group_tokens(plan, data), plan.max_tokens_per_device, plan.world_size)
        collate = PackedCollator(pad_token_id, plan.packing == "prefix_shared", multiple, keep_ties, arrays)
    return Batching(plan.global_batch_size, split, collate, plan.per_device_eval_batch_size)


def _streamed_steps(
    config: RunConfig, plan: Plan, data: PreparedData, encoder: TextEncoder, world: World
) -> StreamSteps | None:
    """Return this rank's share of the steps of a streamed run; `None` where all groups have been encoded."""
    if data.stream is None:
        return None
    split = StreamSplit(
        plan.per_device_train_batch_size,
        plan.world_size,
        plan.max_tokens_per_device,
        plan.packing == "prefix_shared",
    )
    seed = (config.seed if config.data_seed is None else config.data_seed) if config.shuffle_train else None
    folder = run_folder(config)
    streams = [
        GroupStream(
            part.sources,
            encoder,
            config.shuffle_buffer_size,
            seed,
            split.fits,
            config.max_rejected_share,
            folder / (f"stream-{part.name}.jsonl" if part.name else "stream.jsonl"),
            [part.identity, config.shuffle_buffer_size, seed, split.max_tokens, split.share_prompts],
            writes=world.is_main,
        )
        for part in data.stream.parts
    ]
    rates = data.mixture.rates if data.mixture is not None else (1,)
    assert plan.total_steps is not None
    steps = StepStream(streams, rates, plan.global_batch_size, seed, plan.total_steps)
    return StreamSteps(steps, split, world.rank)


def build_arguments(config: RunConfig, plan: Plan) -> trl.RewardConfig:
    """Return TRL's arguments. The seed is set here, since a new head is random.

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
            [
                f"{asked}: {one_line(error)} Fix: choose a value that is named there, or install what is "
                "missing (report_to=tensorboard: pip install 'rm-scale[tensorboard]')."
            ]
        ) from error
    _use_one_device(arguments)
    use_deterministic_kernels(config.deterministic)
    set_seed(config.seed)
    return arguments


def _use_one_device(arguments: trl.RewardConfig) -> None:
    """Keep a process that sees several GPUs to one of them.

    transformers would wrap the model in `nn.DataParallel`, which cuts batches by rows; ours belong together.
    """
    if arguments.n_gpu > 1:
        logger.warning(
            f"{arguments.n_gpu} GPUs are visible and this is a single process: it uses {arguments.device} alone. To "
            f"use all: deepspeed rm_scale/train.py ... or torchrun --nproc_per_node {arguments.n_gpu} "
            "rm_scale/train.py ..."
        )
        arguments._n_gpu = 1


def load_model(config: RunConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load backbone, scalar head and adapters."""
    if not detect_world().is_main:
        disable_progress_bar()  # transformers would draw one on every rank
    started = time.perf_counter()
    loaded = load_for_training(config, plan, tokenizer)
    return replace(loaded, record=load_record(time.perf_counter() - started))


@contextmanager
def one_attempt(config: RunConfig, world: World) -> Iterator[Attempt]:
    """Hold the output directory, decide where this attempt goes on from, and record how it began and why it ended."""
    with ExitStack() as held:
        with agreed_errors():
            if world.is_main:
                held.enter_context(writing_alone(config.output_dir))
                require_output_dir(config)
        resume = choose_resume(config, world, run_folder(config))
        step = read_manifest(resume).step if resume is not None else 0
        attempt = Attempt(run_folder(config), world.is_main, resume, step)
        attempt.number = gather_from_ranks(attempt.number)[0]  # all have read the file before one writes to it
        with warnings_kept(world.is_main), attempt.recorded():
            if config.resume_from_checkpoint is not None:
                attempt.begin()  # a fresh run leaves no trace before its data has been found good
            yield attempt


def open_run_directory(
    config: RunConfig, plan: Plan, data: PreparedData, world: World, attempt: Attempt | None = None
) -> SaveSettings:
    """Write settings, plan and data report to `run/`. Of a fresh run this is the first that reaches the disk.

    Returns:
        What this run's checkpoints will remember, and when one that fails ends it.

    Raises:
        CheckpointError: the checkpoint to resume from belongs to a run that differs in one of them.
    """
    attempt = attempt or Attempt(run_folder(config), is_main=False)
    facts = json.loads(json.dumps(run_facts(config, plan, data)))  # as they are read from a manifest
    with agreed_errors(), disk_errors_explained(run_folder(config)):
        if world.is_main:
            if attempt.resume is not None:
                require_same_run(attempt.resume, facts, config.allow_changed)
            _remove_replaced(config, attempt)
            folder = write_run_records(config, plan)
            write_data_report(data.report, data.rejected, folder)
            begin_warnings(folder)
    attempt.begin()
    return SaveSettings(
        facts=facts,
        zero_stage=plan.zero_stage,
        max_failed_saves=config.max_failed_saves,
        max_nonfinite_steps=config.max_nonfinite_steps,
        stop_margin_seconds=config.stop_margin_seconds,
        ends_with_best=config.load_best_model_at_end,
        attempt=attempt,
    )


def _remove_replaced(config: RunConfig, attempt: Attempt) -> None:
    """Remove what an earlier run or a killed attempt has left and this one replaces."""
    output_dir, resume = Path(config.output_dir), attempt.resume
    remove_leftovers(output_dir)
    if resume is None and config.resume_from_checkpoint is None:
        remove_earlier_run(config)
        return
    forget_later_metrics(config, attempt.step if resume is not None else -1)
    named = config.resume_from_checkpoint not in {"last", "auto"}
    if resume is not None and named and resume.resolve().parent == output_dir.resolve():
        set_aside_later(output_dir, attempt.step)


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
    settings = LossSettings(
        config.loss_type,
        config.label_smoothing_factor,
        config.center_rewards_coefficient or 0.0,
        router_coefficient(config.router_aux_loss_coef, loaded.model),
    )
    plan_check = _plan_check(config, plan, loaded, data)
    trainer = RewardTrainer(
        model=loaded.model,
        args=arguments,
        tokenizer=tokenizer,
        train_groups=data.train,
        eval_groups=data.eval,
        batching=_batching(config, plan, data, tokenizer.pad_token_id, index_names(loaded.model.config, plan.device)),
        loss_settings=settings,
        contract=_contract(config, plan, loaded, encoder, tokenizer),
        shuffle=config.shuffle_train,
        saved_head=loaded.saved_head,
        saves=saves,
        eval_sets=_eval_sets(data),
        mixture=data.mixture,
        stream=_streamed_steps(config, plan, data, encoder, detect_world()),
        callbacks=[
            StepInLogs(),
            Progress(bar=not config.disable_tqdm),
            EarlyWarnings(),
            MetricsFile(run_folder(config) / "metrics.jsonl"),
            *([plan_check] if plan_check is not None else []),
        ],
    )
    for printer in (ProgressCallback, PrinterCallback):  # `Progress` stands for them
        trainer.remove_callback(printer)
    outlast_disk_errors(trainer.callback_handler.callbacks, get_reporting_integration_callbacks(config.report_to))
    trainer.step_times.load = loaded.record
    if plan_check is not None:
        plan_check.step_times = trainer.step_times
    return trainer


def _eval_sets(data: PreparedData) -> list[str]:
    return names_of_sets(data.eval_origins, _subsets(data))


def _subsets(data: PreparedData) -> set[str]:
    return {name for name in data.eval["subset"] if name} if data.eval is not None else set()


def _plan_check(config: RunConfig, plan: Plan, loaded: LoadedModel, data: PreparedData) -> PlanCheck | None:
    """Return the callback that compares the plan's estimate, for the lengths of this data, with the run.

    `None` where there is no estimate: the formulas don't know this kind of model, and its class can't be asked.
    """
    _, knows_speed = device_of_run(_gpu_name(), config.hardware)
    if plan.reduces_once:
        plan = replace(plan, zero_stage=1)
    try:
        predicted = _estimate(config, plan, data, shape_of_loaded(loaded.model))
    except ModelError as error:
        logger.warning(f"no plan to compare this run with: {error}")
        return None
    return PlanCheck(predicted, run_folder(config) / "plan_check.json", knows_speed)


def _estimate(config: RunConfig, plan: Plan, data: PreparedData, shape: ModelShape) -> Estimate:
    """Return the planner's figures for a plan on the device at hand, with as much memory as it really has."""
    device, _ = device_of_run(_gpu_name(), config.hardware)
    if plan.device == "cuda":
        device = replace(device, memory_bytes=float(torch.cuda.get_device_properties().total_memory))
    world = detect_world()
    nodes = max(1, world.size // world.ranks_on_node)
    return estimate(scenario_of_run(config, plan, shape, device, nodes, _length_mix(data)))


def _gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


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


def train(trainer: RewardTrainer, attempt: Attempt) -> int:
    """Train from the start or from a checkpoint; return the exit code: 0, or 85 when it is to be started again."""
    try:
        return _train(trainer, attempt)
    finally:
        if trainer.stream is not None:
            trainer.stream.stream.close()
            for line in trainer.stream.stream.summary():
                logger.info(line)


def _train(trainer: RewardTrainer, attempt: Attempt) -> int:
    resume = attempt.resume
    if resume is not None:
        with agreed_errors():
            if trainer.args.should_save:
                refuse_unsafe_pickles(resume)
    # Asked to stop while libraries, data and model were loaded? Then there is nothing new to save.
    failed: LastSaveFailed | None = None
    if not trainer.stopping.agree():
        try:
            with out_of_memory_explained(predicted_memory(trainer)):
                trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
        except LastSaveFailed as error:
            failed = error
    trainer.write_waiting_records(is_end=bool(trainer.stopping.reason))
    code = end_training(trainer, attempt, failed)
    if code == 0 and trainer.checkpoints.settings.ends_with_best:
        trainer.end_with_best()
    return code


def evaluate(trainer: RewardTrainer, data: PreparedData) -> EvaluationResult | None:
    """Run and log the final, exact evaluation; return `None` when there is no evaluation data."""
    if data.eval is None:
        return None
    result = trainer.final_evaluation()
    for line in evaluation_table(result).splitlines():
        logger.info(line)
    for warning in evaluation_warnings(result):
        logger.warning(warning)
    return result


def save(
    trainer: RewardTrainer,
    config: RunConfig,
    plan: Plan,
    result: EvaluationResult | None,
    world: World,
    attempt: Attempt,
) -> int:
    """Write the model directory, verified, with its records; then merge and show sample scores.

    Returns:
        The exit code: 0, or 85 when the disk refuses the model and the run can go on from an earlier checkpoint.
    """
    trainer.watchdog.stop()  # rank 0 loads, merges and scores alone from here on
    if result is not None:
        trainer.contract = replace(
            trainer.contract,
            score_mean=result.score_mean,
            score_std=result.score_std,
            num_scored=result.num_scored,
        )

    def write() -> None:
        trainer.save_model(config.output_dir)
        with agreed_errors(), disk_errors_explained(config.output_dir):
            if world.is_main:
                _write_results(config, plan, result, trainer.weights_step)

    try:
        trainer.checkpoints.save_last(write, f"the trained model ({config.output_dir})")
    except LastSaveFailed as failed:
        return end_with_requeue(failed, attempt)
    finally:
        trainer.write_waiting_records(is_end=True)
    with agreed_errors():
        if world.is_main:
            groups = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
            show_sample_scores(config.output_dir, groups, config.sample_scores, config.trust_remote_code)
    return 0


def _write_results(config: RunConfig, plan: Plan, result: EvaluationResult | None, weights_step: int | None) -> None:
    folder = Path(config.output_dir)
    if result is not None:
        write_evaluation(result, run_folder(config))
    write_model_card(folder, config, plan, result, read_warnings(run_folder(config)), weights_step)
    if config.merge_adapter:
        merge_adapter(folder, folder / "merged", config.trust_remote_code)
    logger.info(f"model: {folder}")
    logger.info(f"curves, throughput, evaluation as one page: rm-scale report {shlex.quote(str(folder))}")
    logger.info(f"how it scores: {folder / 'scoring_contract.json'}; model card: {folder / 'README.md'}")
    logger.info(f"records: {run_folder(config)} (metrics.jsonl, evaluation.json, data_report.json, plan.json, ...)")
