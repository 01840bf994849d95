"""Step kernels."""
