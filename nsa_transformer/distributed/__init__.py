"""Ranks, the parallel plan, and checkpoints."""
