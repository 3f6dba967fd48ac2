"""Attention and product kernels behind one interface, with plain XLA versions that run anywhere."""
