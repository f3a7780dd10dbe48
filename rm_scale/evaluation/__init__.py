"""Evaluate reward models: accuracy, calibration, length bias, comparisons, public benchmarks, requirements."""
