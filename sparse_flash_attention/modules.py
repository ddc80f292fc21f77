"""Self-attention layers: the paper's two sparse ones, and the controls that they are compared with.

All share one layout (section 3.3 of the paper's language model): (q, v) = x W_in, keys k = q/‖q‖ ("shared QK"), scores
scaled by 1/√D, heads joined by an output projection. Only `attend` differs, so an arm of a comparison is one class, and
equal weights can be loaded into any of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_buckets, random_keep
from sparse_flash_attention.pairs import attention_density, reformer_density
from sparse_flash_attention.reformer import reformer_attention, window_attention
from sparse_flash_attention.segments import plan

KEY_NORMS = ("head", "all", "none")
HASHINGS = ("lsh", "random")
EPS = 1e-6
"""A row shorter than this has no direction: its key is 0 and it passes no gradient."""


def unit_rows(x: Tensor) -> Tensor:
    """x / ‖x‖₂ along the last dimension, computed in float32 or better; rows below `EPS` give 0 and no gradient."""
    wide = x if x.dtype is torch.float64 else x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * (1 / norm.clamp(min=EPS)).where(norm > EPS, 0)).to(x.dtype)


class SelfAttention(nn.Module):
    """What the layers share: projections, heads, key normalisation. Subclasses define `attend`.

    Args:
        embed_dim: d, a multiple of num_heads.
        num_heads: H; head size D = d / H.
        shared_qk: keys are the normalised queries; the input projection gives (q, v). False gives (q, k, v).
        bias: in both projections.
        key_norm: "head" makes a head's keys unit vectors, "all" normalises over all d channels before the split into
            heads (the official code's dense baseline: its scores are about √H smaller), "none" leaves keys alone. None
            is "head" with shared_qk, else "none".
        scale: factor on the scores; None is 1/√D.
        device: of the weights.
        dtype: of the weights.

    Attributes:
        generator: source of randomness of the layers that draw in `forward`; None is torch's global one. Give it a
            seeded `torch.Generator` to evaluate repeatably (`SparseGPT.seeded` does it for a whole model);
            `torch.compile(fullgraph=True)` traces the global one only.
        record_density: whether `forward` leaves the share of causal pairs that it computed in `density`.
        density: float64 scalar of the last forward with `record_density`, else None.

    Input (B, T, d), output (B, T, d).

    Raises:
        ValueError: num_heads does not divide embed_dim, or an option outside its range.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        shared_qk: bool = True,
        bias: bool = False,
        key_norm: str | None = None,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: must be >= 1 and divide embed_dim={embed_dim}")
        key_norm = ("head" if shared_qk else "none") if key_norm is None else key_norm
        if key_norm not in KEY_NORMS:
            raise ValueError(f"key_norm={key_norm!r}: must be None or one of {', '.join(KEY_NORMS)}")
        self.embed_dim, self.num_heads, self.shared_qk, self.key_norm = embed_dim, num_heads, shared_qk, key_norm
        self.head_dim = embed_dim // num_heads
        self.scale = scale
        self.in_proj = nn.Linear(embed_dim, (2 if shared_qk else 3) * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.generator: torch.Generator | None = None
        self.record_density = False
        self.density: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (batch, length, {self.embed_dim})")
        parts = self.in_proj(x).split(self.embed_dim, dim=-1)  # each (B, T, d)
        q, v = self._heads(parts[0]), self._heads(parts[-1])  # (B, H, T, D)
        k = q if self.shared_qk else self._heads(parts[1])
        if self.key_norm == "head":
            k = unit_rows(k)
        elif self.key_norm == "all":
            k = self._heads(unit_rows(parts[0] if self.shared_qk else parts[1]))
        out = self.attend(q, k, v)  # (B, H, T, D)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of q, k, v (B, H, T, D) -> (B, H, T, D)."""
        raise NotImplementedError

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, H, T, D)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _record(self, density: Tensor | float) -> None:
        value = torch.as_tensor(density, dtype=torch.float64)
        self.density = value.mean()

    def _record_plan(self, q: Tensor, include_self: bool = True, **sparsity: Any) -> None:
        shape = (*q.shape[:3], q.shape[2])
        self._record(attention_density(plan(shape, **sparsity, include_self=include_self, device=q.device)))

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return f"num_heads={self.num_heads}, shared_qk={self.shared_qk}, key_norm={self.key_norm!r}"


class DenseSelfAttention(SelfAttention):
    """Full causal attention: the paper's baseline F-LM.

    Args:
        embed_dim: as in `SelfAttention`, with all its further options.
        num_heads: as in `SelfAttention`.
        backend: "sdpa" (`scaled_dot_product_attention`), or a backend of `qk_sparse_attention` (None lets it pick),
            which is the faster one on a CPU.
        options: of `SelfAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, backend: str | None = "sdpa", **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full causal attention of (B, H, T, D)."""
        if self.record_density:
            self._record(1.0)
        if self.backend != "sdpa":
            return qk_sparse_attention(q, k, v, scale=self.scale, backend=self.backend)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)


class WindowSelfAttention(SelfAttention):
    """Causal sliding window; window 1 sees only itself, the control without attention.

    Args:
        embed_dim: as in `SelfAttention`, with all its further options.
        num_heads: as in `SelfAttention`.
        window: keys a query, itself included, >= 1.
        options: of `SelfAttention`.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, window: int = 1, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window={window}: must be >= 1")
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, H, T, D) to the last `window` rows."""
        if self.record_density:
            length = q.shape[2]
            window = min(self.window, length)
            self._record((window * length - window * (window - 1) / 2) / max(length * (length + 1) / 2, 1))
        return window_attention(q, k, v, self.window, scale=self.scale)


class QKSparseSelfAttention(SelfAttention):
    """Causal attention among random subsets of queries and keys: the paper's D-LM.

    Every (sample, head, row) is dropped as a query and, independently, as a key with probability `drop_prob`, anew in
    every forward. A dropped query's output is 0 (the residual stream passes it by).

    Args:
        embed_dim: as in `SelfAttention`, with all its further options.
        num_heads: as in `SelfAttention`.
        drop_prob: probability of being dropped, in [0, 1].
        drop_at_eval: also drop in `eval()`, as the official code does; then evaluation is random.
        backend: of `qk_sparse_attention`.
        options: of `SelfAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        drop_prob: float = 0.3,
        drop_at_eval: bool = False,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"drop_prob={drop_prob}: must be in [0, 1]")
        self.drop_prob, self.drop_at_eval, self.backend = drop_prob, drop_at_eval, backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, H, T, D) among the kept rows."""
        q_keep = k_keep = None
        if self.drop_prob and (self.training or self.drop_at_eval):
            q_keep, k_keep = (random_keep(q.shape[:3], 1 - self.drop_prob, self.generator, q.device) for _ in range(2))
        if self.record_density:
            self._record_plan(q, q_keep=q_keep, k_keep=k_keep)
        return qk_sparse_attention(q, k, v, q_keep, k_keep, scale=self.scale, backend=self.backend)

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return f"{super().extra_repr()}, drop_prob={self.drop_prob}, drop_at_eval={self.drop_at_eval}"


class _Hashed(SelfAttention):
    """Buckets for the layers that hash: drawn anew in every forward, or from directions kept in a buffer."""

    projections: Tensor | None

    def __init__(
        self, embed_dim: int, num_heads: int, *, n_buckets: int, hashing: str, rounds: int, redraw: bool, **options: Any
    ) -> None:
        super().__init__(embed_dim, num_heads, **options)
        if hashing not in HASHINGS:
            raise ValueError(f"hashing={hashing!r}: must be one of {', '.join(HASHINGS)}")
        if n_buckets < 2 or n_buckets % 2:
            raise ValueError(f"n_buckets={n_buckets}: must be even and >= 2")
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: must be >= 1")
        if not redraw and hashing == "random":
            raise ValueError("redraw=False with hashing='random': random buckets have no projections to keep")
        self.n_buckets, self.hashing, self.rounds, self.redraw = n_buckets, hashing, rounds, redraw
        self.register_buffer("projections", None)
        if not redraw:
            self.reset_projections()

    @torch.no_grad()
    def reset_projections(self, generator: torch.Generator | None = None) -> None:
        """Draw the kept directions again (redraw=False); the buffer is part of the state dict."""
        if not self.redraw:
            device = self.in_proj.weight.device
            # nothing can be drawn on the meta device, least of all from a generator that lives elsewhere
            source = None if device.type == "meta" else generator
            self.projections = lsh_projections(
                self.num_heads, self.head_dim, self.n_buckets, rounds=self.rounds, generator=source, device=device
            )

    def _buckets(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids of queries and of keys, None where they share: ([rounds,] B, H, T)."""
        if self.hashing == "random":
            shape = (*((self.rounds,) if self.rounds > 1 else ()), *q.shape[:3])
            return random_buckets(shape, self.n_buckets, self.generator, q.device), None
        projections = self.projections
        if projections is None:
            projections = lsh_projections(
                self.num_heads, self.head_dim, self.n_buckets, rounds=self.rounds, generator=self.generator,
                device=q.device,
            )  # fmt: skip
        q_hash = lsh_hash(q, self.n_buckets, rounds=self.rounds, projections=projections)
        if self.shared_qk:  # k only differs in length: in low precision its rows could fall elsewhere
            return q_hash, None
        return q_hash, lsh_hash(k, self.n_buckets, rounds=self.rounds, projections=projections)

    def extra_repr(self) -> str:
        """Options, for `print(model)`."""
        return f"{super().extra_repr()}, n_buckets={self.n_buckets}, hashing={self.hashing!r}, redraw={self.redraw}"


class HashSparseSelfAttention(_Hashed):
    """Exact causal attention inside LSH buckets: the paper's H-LM.

    Args:
        embed_dim: as in `SelfAttention`, with all its further options.
        num_heads: as in `SelfAttention`.
        n_buckets: nb, even.
        hashing: "lsh", or "random" for buckets that know nothing of the content (the control; queries and keys of one
            row share a bucket).
        include_self: False hides a row from itself, as the official language model does: the first row of a bucket then
            outputs 0.
        redraw: new LSH directions in every forward, evaluation included, as in the official code; False keeps those of
            the construction in a buffer.
        backend: of `hash_sparse_attention`.
        options: of `SelfAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        n_buckets: int = 16,
        hashing: str = "lsh",
        include_self: bool = True,
        redraw: bool = True,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, n_buckets=n_buckets, hashing=hashing, rounds=1, redraw=redraw, **options)
        self.include_self, self.backend = include_self, backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, H, T, D) inside buckets."""
        q_hash, k_hash = self._buckets(q, k)
        if self.record_density:
            hashes = {"q_hash": q_hash, "k_hash": q_hash if k_hash is None else k_hash}
            self._record_plan(q, self.include_self, **hashes)
        return hash_sparse_attention(
            q, k, v, q_hash, k_hash, include_self=self.include_self, scale=self.scale, backend=self.backend
        )


class ReformerSelfAttention(_Hashed):
    """Reformer's chunked LSH attention (Kitaev et al. 2020), the paper's rival: loses pairs of long buckets.

    Args:
        embed_dim: as in `SelfAttention`, with all its further options but shared_qk, which is always on.
        num_heads: as in `SelfAttention`.
        n_buckets: nb, even.
        chunk: rows a chunk.
        rounds: hash rounds, joined as in `reformer_attention`.
        include_self: False hides a row from itself.
        redraw: new directions in every forward, as in `HashSparseSelfAttention`.
        hashing: "lsh" or "random".
        options: of `SelfAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        n_buckets: int = 16,
        chunk: int = 64,
        rounds: int = 1,
        include_self: bool = True,
        redraw: bool = True,
        hashing: str = "lsh",
        **options: Any,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, n_buckets=n_buckets, hashing=hashing, rounds=rounds, redraw=redraw, **options
        )
        if not self.shared_qk:
            raise ValueError("shared_qk=False: must be True, Reformer sorts queries and keys together")
        if chunk < 1:
            raise ValueError(f"chunk={chunk}: must be >= 1")
        self.chunk, self.include_self = chunk, include_self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of (B, H, T, D) inside buckets, as far as chunks reach."""
        hashes, _ = self._buckets(q, k)
        if self.record_density:  # with several rounds the sum over rounds: the work done
            density = reformer_density(hashes, self.chunk, include_self=self.include_self)
            self._record(density.mean() * self.rounds)
        return reformer_attention(q, k, v, hashes, chunk=self.chunk, include_self=self.include_self, scale=self.scale)


ATTENTIONS: dict[str, type[SelfAttention]] = {
    "dense": DenseSelfAttention,
    "hash": HashSparseSelfAttention,
    "drop": QKSparseSelfAttention,
    "reformer": ReformerSelfAttention,
    "window": WindowSelfAttention,
}
"""Names of the arms; "random" is "hash" with hashing="random"."""


def self_attention(kind: str, embed_dim: int, num_heads: int, **options: Any) -> SelfAttention:
    """Layer of a kind: a key of `ATTENTIONS`, or "random" (hash-sparse with random buckets).

    Raises:
        ValueError: unknown kind, or an option or value that the layer does not take.
    """
    if kind == "random":
        kind, options = "hash", {"hashing": "random", **options}
    if kind not in ATTENTIONS:
        raise ValueError(f"attention={kind!r}: must be one of {', '.join([*ATTENTIONS, 'random'])}")
    allowed = accepted(ATTENTIONS[kind])
    for name in options:
        if name not in allowed:
            raise ValueError(f"{name}={options[name]!r}: attention={kind!r} takes only {', '.join(sorted(allowed))}")
    return ATTENTIONS[kind](embed_dim, num_heads, **options)


def accepted(layer: type[SelfAttention]) -> set[str]:
    """Names of the keyword options that a layer takes."""
    shared = set(SelfAttention.__init__.__kwdefaults__ or {})
    return shared | set(layer.__init__.__kwdefaults__ or {})  # type: ignore[misc]
