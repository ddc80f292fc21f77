"""The paper's networks in ordinary PyTorch: what is multiplication-free about a run is done to them by conversion."""
