"""The checks of `rm-scale doctor`: what would break a run, found before the hours start."""
