"""Native Sparse Attention in Triton: one file per step, `attention.py` calls them in order."""
