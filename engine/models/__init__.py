"""What a model is, and its forward pass: data and pure functions, one transformer for all families."""
