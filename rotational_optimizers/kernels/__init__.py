"""Faster forms of the update in `rotational_optimizers.update`: in-place passes in PyTorch, and one fused pass in C."""
