"""Checkpoints: written, verified, sealed with a manifest, published, resumed."""
