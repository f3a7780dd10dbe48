"""Evaluation results for people: page, summary, model-card section, best-of-n curves."""
