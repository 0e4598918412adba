"""Figures of what is inside norms: statistics in training, kernels and response maps, mixture weights, curves."""
