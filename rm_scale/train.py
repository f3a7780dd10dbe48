"""Train a reward model. `deepspeed`, `torchrun`, `srun` and plain `python` all start this file.

    deepspeed rm_scale/train.py --config configs/demo_cpu.yaml [--any_setting value]

Reads from top to bottom: what was asked, what will run, data, model, training, what is left behind.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before all that takes time to import: a signal must not end a rank without a trace.
    from rm_scale.training.preemption import watch_signals

    watch_signals()

from rm_scale.config import help_text, parse_config
from rm_scale.distributed import detect_world, has_gpu, init_process_group, prepare_environment
from rm_scale.launch.extensions import prepare_extensions
from rm_scale.launch.guard import leave, run_guarded
from rm_scale.logs import setup_logging
from rm_scale.planning.plan import make_plan


def main(argv: list[str] | None = None) -> int:
    """Run one training from settings to a verified model directory.

    Args:
        argv: settings as on the command line; default `sys.argv[1:]`.

    Returns:
        The exit code: 0; 2 after a message for the user; 85 when asked to stop, to be started again.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    parsed = parse_config(argv)
    config = parsed.config

    def run() -> int:
        world = detect_world()
        setup_logging(world.rank, config.debug)
        # What will run; all that is wrong with the settings is said here, before anything is loaded or written.
        prepare_environment(world)
        prepare_extensions(world.local_rank)
        device = "cuda" if has_gpu() else "cpu"
        plan = make_plan(parsed, world.size, device, check_output=world.is_main, defer_output=not config.dry_run)
        if config.dry_run:
            print(f"{config.model_dump_json(indent=2)}\n{plan.to_json()}" if world.is_main else "", end="\n")
            return 0
        owns_group = init_process_group(world, plan.deepspeed_config is not None, config.ddp_timeout)
        # Imported only now: DeepSpeed reads the environment when it is imported.
        from rm_scale.launch import steps

        with steps.one_life(config, world) as life:
            # Data: checked groups of token sequences.
            tokenizer, encoder = steps.load_text_encoder(config)
            data = steps.load_data(config, encoder)
            plan = steps.count_steps(plan, data, config)
            # Model: the training arguments come first, so that ZeRO-3 shards the weights while they are read.
            arguments = steps.build_arguments(config, plan)
            loaded = steps.load_model(config, plan, tokenizer)
            saves = steps.open_run_directory(config, plan, data, world, life)
            # Training, evaluation, and what is left behind.
            trainer = steps.build_trainer(config, plan, arguments, tokenizer, encoder, loaded, data, saves)
            code = steps.train(trainer, life)
            if code == 0:
                result = steps.evaluate(trainer, data)
                steps.save(trainer, config, plan, result, world)
        if owns_group:
            trainer.end()  # finishes the loggers and leaves the process group
        return code

    return run_guarded(run, config.debug)


if __name__ == "__main__":
    leave(main())
