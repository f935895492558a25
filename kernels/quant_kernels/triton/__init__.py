"""Triton kernels of every op, for sm_80 and newer."""
