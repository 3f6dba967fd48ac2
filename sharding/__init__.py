"""Meshes and rules that place parameters and batches on many devices."""
