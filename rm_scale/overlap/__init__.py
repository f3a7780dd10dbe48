"""Texts that are the same or nearly so: normalisation, n-grams, MinHash, and an index to look texts up in."""
