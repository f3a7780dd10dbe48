"""Pages, charts and model cards made from runs, evaluations and benchmark records."""
