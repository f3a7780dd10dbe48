"""Helpers that start real processes for the distributed and end-to-end tests."""
