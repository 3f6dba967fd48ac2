"""Attention kernels for NVIDIA GPUs, written in Pallas-Triton."""
