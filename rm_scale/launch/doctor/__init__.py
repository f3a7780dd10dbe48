"""`rm-scale doctor`: what would break a run, found before the hours start."""

from rm_scale.launch.doctor.command import add_arguments, run

__all__ = ["add_arguments", "run"]
