"""The ten papers of this house: folder -> title and where it was published."""

from __future__ import annotations

PAPERS: dict[str, tuple[str, str]] = {
    "rotational_optimizers": (
        "Rotational Equilibrium: How Weight Decay Balances Learning Across Neural Networks",
        "ICML 2024",
    ),
    "ghost_noise": ("Ghost Noise for Regularizing Deep Neural Networks", "AAAI 2024"),
    "mulfree_training": (
        "Multiplication-Free Transformer Training via Piecewise Affine Operations",
        "NeurIPS 2023",
    ),
    "landmark_attention": (
        "Landmark Attention: Random-Access Infinite Context Length for Transformers",
        "NeurIPS 2023",
    ),
    "sparse_flash_attention": (
        "Fast Attention Over Long Sequences With Dynamic Sparse Flash Attention",
        "NeurIPS 2023",
    ),
    "shuffled_sgd": ("On Convergence of Incremental Gradient for Non-Convex Smooth Functions", "ICML 2024"),
    "clustered_pfl": ("Provably Personalized and Robust Federated Learning", "TMLR 2023"),
    "fl_layerwise_barriers": ("Layer-wise Linear Mode Connectivity", "ICLR 2024"),
    "trust_distillation": ("Collaborative Learning via Prediction Consensus", "NeurIPS 2023"),
    "multimodn": ("MultiModN: Multimodal, Multi-Task, Interpretable Modular Networks", "NeurIPS 2023"),
}
