"""Fused kernels in Triton, one file per operation, forward and backward side by side; imported when first chosen, never before."""
