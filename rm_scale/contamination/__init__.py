"""Which rows of the training data are, or nearly are, rows of benchmarks and evaluation files."""
