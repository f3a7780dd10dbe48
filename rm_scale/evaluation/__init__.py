"""Is the model good: exact pairwise results, written as evaluation.json."""
