"""The trainer, its losses, meters and checkpoints."""
