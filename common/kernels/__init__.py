"""Build helpers that the papers' kernels share: native loader, device facts, bench harness."""
