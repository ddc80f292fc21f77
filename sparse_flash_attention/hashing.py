"""Which rows may meet: buckets from locality-sensitive hashing, random buckets, and random keep masks.

Angular LSH (Andoni et al. 2015, as in Reformer and in section 3.2 of the paper): with R ∈ R^(D × nb/2), columns of unit
length,

    bucket(x) = argmax [xR, −xR] ∈ {0 … nb − 1},

so vectors of a small angle meet often, the length of x does not matter, and −x lands nb/2 buckets away. Everything here
is drawn and computed in float32 whatever the model's precision: in bfloat16 a keep probability of .7 becomes .696, and
q and k = q/‖q‖ of one row can fall into different buckets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lsh_projections(
    heads: int,
    dim: int,
    n_buckets: int,
    *,
    rounds: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random directions for `lsh_hash`: normal entries, columns scaled to unit length.

    Args:
        heads: H; every head has directions of its own.
        dim: D, size of what is hashed.
        n_buckets: nb, even.
        rounds: independent hash functions a head.
        generator: source of randomness; None is torch's global one. Numbers are drawn on its device, then moved.
        device: where the result lives; None is the generator's device, or torch's default.

    Returns:
        float32 (H, D, nb/2), or (rounds, H, D, nb/2) for rounds > 1.

    Raises:
        ValueError: n_buckets odd or below 2, or another number below 1.
    """
    _even(n_buckets)
    for name, value in (("heads", heads), ("dim", dim), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    drawn = torch.randn(rounds, heads, dim, n_buckets // 2, dtype=torch.float32, **_source(generator, device))
    drawn = (drawn / torch.linalg.vector_norm(drawn, dim=2, keepdim=True)).to(device)
    return drawn[0] if rounds == 1 else drawn


@torch.no_grad()
def lsh_hash(
    x: Tensor,
    n_buckets: int,
    *,
    rounds: int = 1,
    projections: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bucket of every row: argmax of [xR, −xR], the lowest index among equals. Has no gradient.

    Rounds stay apart, because what combines them is the attention (`reformer_attention` takes all rounds at once; a
    round's ids are meaningless in another round).

    Args:
        x: (B, H, T, D) of any floating dtype; only its directions matter.
        n_buckets: nb, even.
        rounds: hash functions a head.
        projections: what `lsh_projections` returns, to hash several tensors alike; None draws new ones.
        generator: randomness of new projections; None is torch's global one.

    Returns:
        int32 (B, H, T), or (rounds, B, H, T) for rounds > 1, with values in [0, nb).

    Raises:
        TypeError: x is not floating point.
        ValueError: n_buckets odd or below 2, x not of four dimensions, or projections of another shape.
    """
    _even(n_buckets)
    if x.ndim != 4:
        raise ValueError(f"x of shape {tuple(x.shape)}: must be (batch, heads, length, head_dim)")
    if not x.is_floating_point():
        raise TypeError(f"x of dtype {x.dtype}: must be floating point")
    if projections is None:
        projections = lsh_projections(
            x.shape[1], x.shape[3], n_buckets, rounds=rounds, generator=generator, device=x.device
        )
    wanted = (*((rounds,) if rounds > 1 else ()), x.shape[1], x.shape[3], n_buckets // 2)
    if tuple(projections.shape) != wanted:
        raise ValueError(f"projections of shape {tuple(projections.shape)}: must be {wanted}, as lsh_projections gives")
    if rounds > 1:
        projections = projections.unsqueeze(1)  # (rounds, 1, H, D, nb/2)
    with torch.autocast(x.device.type, enabled=False):
        projected = x.float() @ projections.float()  # ([rounds,] B, H, T, nb/2)
    # [xR, −xR] itself is not built: its second half is the first with the sign turned
    high, highest = projected.max(-1)
    low, lowest = projected.min(-1)
    return torch.where(high >= -low, highest, lowest + n_buckets // 2).int()


def random_buckets(
    shape: Sequence[int],
    n_buckets: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform buckets that know nothing of the content: the control for LSH.

    Args:
        shape: of the result, (B, H, T) for the attention.
        n_buckets: nb >= 1.
        generator: source of randomness; None is torch's global one.
        device: where the result lives.

    Returns:
        int32 in [0, nb).

    Raises:
        ValueError: n_buckets below 1.
    """
    if n_buckets < 1:
        raise ValueError(f"n_buckets={n_buckets}: must be >= 1")
    return torch.randint(n_buckets, tuple(shape), dtype=torch.int32, **_source(generator, device)).to(device)


def random_keep(
    shape: Sequence[int],
    keep_prob: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Keep mask whose entries are True with probability `keep_prob`, independently.

    Args:
        shape: of the result, (B, H, T) for the attention.
        keep_prob: in [0, 1]; 0 drops and 1 keeps every row.
        generator: source of randomness; None is torch's global one.
        device: where the result lives.

    Returns:
        bool.

    Raises:
        ValueError: keep_prob outside [0, 1].
    """
    if not 0 <= keep_prob <= 1:
        raise ValueError(f"keep_prob={keep_prob}: must be in [0, 1]")
    return (torch.rand(tuple(shape), dtype=torch.float32, **_source(generator, device)) < keep_prob).to(device)


def _even(n_buckets: int) -> None:
    if n_buckets < 2 or n_buckets % 2:
        raise ValueError(f"n_buckets={n_buckets}: must be even and >= 2")


def _source(generator: torch.Generator | None, device: torch.device | str | None) -> dict:
    """Where to draw: a generator works on its own device only."""
    return {"device": device} if generator is None else {"device": generator.device, "generator": generator}
