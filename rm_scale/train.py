"""Train a reward model: `deepspeed rm_scale/train.py --config FILE.yaml`, or with `torchrun`, `srun` or `python`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before all that takes time to import: neither a signal nor a full disk of the log must end a rank without a trace.
    from rm_scale.training import lasting_streams, preemption

    preemption.watch_signals()
    lasting_streams.outlast_full_disks()

from rm_scale.config_help import help_text
from rm_scale.config_parsing import ParsedConfig, parse_config
from rm_scale.distributed import detect_world, init_process_group, prepare_environment
from rm_scale.guard import Guard, leave, run_guarded
from rm_scale.launch.devices import training_device
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.logs import setup_logging
from rm_scale.modeling.model_shape import shape_of_run
from rm_scale.planning.plan import dry_run_text, make_plan


def main(argv: list[str] | None = None, parsed: ParsedConfig | None = None, guard: Guard = run_guarded) -> int:
    """Run one training from settings to a verified model directory.

    Args:
        argv: settings as on the command line; default `sys.argv[1:]`.
        parsed: settings that have been read already, instead of those of `argv`.
        guard: what is done with errors.

    Returns:
        The exit code: 0; 2 after a message for the user; 85 when asked to stop, to be started again.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    # Without --dry_run there is nothing to print, and --json is refused like any unknown setting.
    as_json = "--json" in argv and any(word.startswith("--dry_run") for word in argv)
    parsed = parsed or parse_config([word for word in argv if not (as_json and word == "--json")])
    config = parsed.config

    def run() -> int:
        world = detect_world()
        setup_logging(world.rank, config.debug)
        # What will run; all that is wrong with the settings is said here, before anything is loaded or written.
        prepare_environment(world, meets=not config.dry_run)
        prepare_extensions(world.local_rank)
        plan = make_plan(parsed, world.size, training_device(), world.is_main, not config.dry_run, shape_of_run)
        if config.dry_run:
            print(dry_run_text(config, plan, as_json) if world.is_main else "")
            return 0
        owns_group = init_process_group(world, plan.deepspeed_config is not None, config.ddp_timeout)
        from rm_scale import training_run  # only now: DeepSpeed reads the environment when it is imported

        with training_run.one_attempt(config, world) as attempt:
            # Data: checked groups of token sequences.
            tokenizer, encoder = training_run.load_text_encoder(config)
            data = training_run.load_data(config, encoder)
            plan = training_run.count_steps(plan, data, config)
            # Model: the training arguments come first, so that ZeRO-3 shards the weights while they are read.
            arguments = training_run.build_arguments(config, plan)
            loaded = training_run.load_model(config, plan, tokenizer)
            saves = training_run.open_run_directory(config, plan, data, world, attempt)
            # Training, evaluation, and what is left behind.
            trainer = training_run.build_trainer(config, plan, arguments, tokenizer, encoder, loaded, data, saves)
            code = training_run.train(trainer, attempt)
            if code == 0:
                code = training_run.save(trainer, config, plan, training_run.evaluate(trainer, data), world, attempt)
        if owns_group:
            trainer.end()  # finishes the loggers and leaves the process group
        return code

    return guard(run, config.debug)


if __name__ == "__main__":
    leave(main())
