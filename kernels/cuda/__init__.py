"""Attention kernels for NVIDIA GPUs, written in Pallas-Triton, and one for Hopper in Pallas-Mosaic-GPU."""
