"""Kernels of a CPU: products with a model's matrices, and attention of decode steps."""
