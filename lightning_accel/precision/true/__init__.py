"""Weights, activations and gradients in bfloat16, and what that takes to train well."""
