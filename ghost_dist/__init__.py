"""ghost_dist: training-free recovery of layer-pruned large language models."""

__version__ = "0.1.0"
