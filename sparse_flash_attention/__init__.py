"""Fast attention over long sequences with dynamic sparse flash attention (Pagliardini, Paliotta, Jaggi, Fleuret, 2023).

`qk_sparse_attention` drops any queries and keys, `hash_sparse_attention` attends inside buckets; both are exact,
differentiable, and take the arguments of `scaled_dot_product_attention`. `QKSparseSelfAttention`,
`HashSparseSelfAttention` and `SparseGPT` use them; `convert_attention` brings them into an existing model.
"""

from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.convert import convert_attention, register_transformers
from sparse_flash_attention.gpt import GPTConfig, SparseGPT
from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_buckets, random_keep
from sparse_flash_attention.modules import (
    DenseSelfAttention,
    HashSparseSelfAttention,
    QKSparseSelfAttention,
    ReformerSelfAttention,
    WindowSelfAttention,
)
from sparse_flash_attention.naive import naive_qk_sparse_attention
from sparse_flash_attention.pairs import attention_density, coverage, reformer_chunk_mask, reformer_coverage
from sparse_flash_attention.reformer import reformer_attention

__all__ = [
    "DenseSelfAttention",
    "GPTConfig",
    "HashSparseSelfAttention",
    "QKSparseSelfAttention",
    "ReformerSelfAttention",
    "SparseGPT",
    "WindowSelfAttention",
    "attention_density",
    "convert_attention",
    "coverage",
    "hash_sparse_attention",
    "lsh_hash",
    "lsh_projections",
    "naive_qk_sparse_attention",
    "qk_sparse_attention",
    "random_buckets",
    "random_keep",
    "reformer_attention",
    "reformer_chunk_mask",
    "reformer_coverage",
    "register_transformers",
]
