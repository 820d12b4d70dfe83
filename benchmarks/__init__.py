"""Measurements of speed and memory. `make bench`, or `python benchmarks/attention.py` and `python benchmarks/train_step.py`."""
