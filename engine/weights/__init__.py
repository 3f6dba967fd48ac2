"""Checkpoints: the readers of the file formats, and the loader that puts their tensors on the devices."""
