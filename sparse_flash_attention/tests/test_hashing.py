"""LSH, random buckets and keep masks: the formula, its invariants, and the laws of what is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sparse_flash_attention.hashing import lsh_hash, lsh_projections, random_buckets, random_keep

torch.set_num_threads(1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize("rounds", [1, 3])
def test_projections_are_unit_columns_drawn_for_each_head_and_round(rounds):
    drawn = lsh_projections(3, 16, 8, rounds=rounds, generator=generator())
    assert drawn.shape == ((3, 16, 4) if rounds == 1 else (3, 3, 16, 4)) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.square().sum(-2), torch.ones((*drawn.shape[:-2], 4)))
    columns = drawn.movedim(-2, -1).reshape(-1, 16)
    assert len(columns.unique(dim=0)) == len(columns)


def test_projection_directions_are_uniform_on_the_sphere():
    drawn = lsh_projections(1, 3, 20_000, generator=generator())
    # on the sphere in three dimensions each coordinate is uniform in [-1, 1] (Archimedes)
    for axis in range(3):
        assert stats.kstest(drawn[0, axis].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bucket_is_the_argmax_of_both_signs(dtype, rounds):
    x = rows(2, 3, 50, 8).to(dtype)
    projections = lsh_projections(3, 8, 6, rounds=rounds, generator=generator(1))
    found = lsh_hash(x, 6, rounds=rounds, projections=projections)
    each = projections.view(rounds, 3, 8, 3)
    projected = torch.einsum("bhtd,rhdn->rbhtn", x.float(), each)
    expected = torch.cat([projected, -projected], -1).argmax(-1)
    assert found.dtype == torch.int32
    assert torch.equal(found, (expected if rounds > 1 else expected[0]).int())
    if rounds > 1:
        assert not torch.equal(found[0], found[1])


def test_ties_take_the_lowest_index():
    projections = torch.eye(3)[None]  # projected = x
    x = torch.tensor([[0.0, 0, 0], [2, 2, 1], [-2, 2, 1], [-2, -2, 1], [1, -2, 2], [0, -1, -1]]).view(1, 1, 6, 3)
    # [x, −x]: a positive entry stands before a negative one of the same size
    assert lsh_hash(x, 6, projections=projections).flatten().tolist() == [0, 0, 1, 3, 2, 4]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 16, 64]), st.floats(1e-3, 1e3))
def test_scale_is_ignored_and_negation_goes_to_the_opposite_bucket(seed, n_buckets, scale):
    x = rows(1, 2, 20, 8, seed=seed)
    projections = lsh_projections(2, 8, n_buckets, generator=generator(seed + 1))
    buckets = lsh_hash(x, n_buckets, projections=projections)
    assert buckets.min() >= 0 and buckets.max() < n_buckets
    projected = (x.double() @ projections.double()).abs().topk(min(2, n_buckets // 2)).values
    # rounding may move a row whose two best directions are equal to the last digits
    clear = projected[..., 0] - projected[..., -1] > 1e-5 if n_buckets > 2 else projected[..., 0] > 1e-5
    scaled = lsh_hash(x * scale, n_buckets, projections=projections)
    assert torch.equal(scaled[clear], buckets[clear])
    assert torch.equal(lsh_hash(x * 4, n_buckets, projections=projections), buckets)
    opposite = lsh_hash(-x, n_buckets, projections=projections)
    assert torch.equal(opposite[clear], ((buckets + n_buckets // 2) % n_buckets)[clear])


def test_collisions_grow_with_the_cosine():
    heads, dim = 400, 16
    share = []
    for cosine in (-1, -0.5, 0, 0.5, 0.8, 0.95, 1):
        pair = torch.zeros(1, heads, 2, dim)
        pair[..., 0, 0], pair[..., 1, 0], pair[..., 1, 1] = 1, cosine, (1 - cosine**2) ** 0.5
        buckets = lsh_hash(pair, 8, generator=generator(3))
        share.append((buckets[..., 0] == buckets[..., 1]).float().mean().item())
    assert share[0] == 0 and share[-1] == 1
    assert share == sorted(share) and share[3] > share[2] + 0.05 and share[4] > share[3] + 0.05
    assert abs(share[2] - 1 / 8) < 4 * (1 / 8 * 7 / 8 / heads) ** 0.5  # orthogonal rows meet at random


def test_isotropic_rows_fill_the_buckets_evenly():
    # one row a head, so that rows are independent (rows of one head share its directions)
    buckets = lsh_hash(rows(1, 4000, 1, 8), 16, generator=generator(2)).flatten()
    assert stats.chisquare(buckets.bincount(minlength=16).numpy()).pvalue > 1e-3


def test_hash_is_computed_in_float32_under_autocast_and_has_no_gradient():
    x = rows(1, 2, 500, 32).requires_grad_()
    projections = lsh_projections(2, 32, 32, generator=generator())
    plain = lsh_hash(x, 32, projections=projections)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lsh_hash(x, 32, projections=projections), plain)
    coarse = (x.detach().bfloat16() @ projections.bfloat16()).float()
    assert not torch.equal(torch.cat([coarse, -coarse], -1).argmax(-1).int(), plain)  # what float32 saves us from
    assert not plain.requires_grad


def test_every_head_has_its_own_directions():
    x = rows(1, 1, 100, 8).expand(1, 2, 100, 8)
    first, second = lsh_hash(x, 8, generator=generator())[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", [
    lambda g: lsh_hash(rows(1, 2, 30, 4), 4, generator=g),
    lambda g: lsh_projections(2, 3, 4, generator=g),
    lambda g: random_buckets((2, 30), 5, g),
    lambda g: random_keep((2, 30), 0.5, g),
])  # fmt: skip
def test_randomness_comes_from_the_generator_or_else_from_torch(draw):
    assert torch.equal(draw(generator(1)), draw(generator(1))) and not torch.equal(
        draw(generator(1)), draw(generator(2))
    )
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert torch.equal(first, draw(None)) and not torch.equal(first, draw(None))
    torch.manual_seed(0)
    draw(generator(1))
    assert torch.equal(first, draw(None))  # a generator leaves the global state alone


@pytest.mark.parametrize("keep_prob", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_keep_probability_is_exact(keep_prob):
    kept = random_keep((1_000_000,), keep_prob, generator())
    assert kept.dtype == torch.bool
    # in bfloat16 numbers have steps of 1/256, and .001 would be .0039
    assert abs(kept.double().mean().item() - keep_prob) <= 4 * (keep_prob * (1 - keep_prob) / 1e6) ** 0.5


def test_keep_is_float32_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        kept = random_keep((1_000_000,), 0.7, generator())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(kept, random_keep((1_000_000,), 0.7, generator()))


def test_random_buckets_are_uniform():
    buckets = random_buckets((2, 3, 4000), 6, generator())
    assert buckets.dtype == torch.int32 and buckets.shape == (2, 3, 4000)
    assert stats.chisquare(buckets.flatten().bincount(minlength=6).numpy()).pvalue > 1e-3


def test_compiles_without_a_break():
    projections = lsh_projections(2, 8, 8, generator=generator())
    hashed = torch.compile(lambda x: lsh_hash(x, 8, projections=projections), fullgraph=True, backend="aot_eager")
    x = rows(1, 2, 30, 8)
    assert torch.equal(hashed(x), lsh_hash(x, 8, projections=projections))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: lsh_hash(rows(1, 1, 2, 4), 7), ValueError, "n_buckets=7: must be even and >= 2"),
    (lambda: lsh_hash(rows(1, 1, 2, 4), 0), ValueError, "n_buckets=0: must be even and >= 2"),
    (lambda: lsh_projections(2, 4, 3), ValueError, "n_buckets=3: must be even and >= 2"),
    (lambda: lsh_projections(0, 4, 2), ValueError, "heads=0: must be >= 1"),
    (lambda: lsh_projections(1, 4, 2, rounds=0), ValueError, "rounds=0: must be >= 1"),
    (lambda: lsh_hash(rows(1, 2, 4), 2), ValueError, r"x of shape \(1, 2, 4\): must be"),
    (lambda: lsh_hash(torch.ones(1, 1, 2, 4, dtype=torch.int64), 2), TypeError, "must be floating point"),
    (lambda: lsh_hash(rows(1, 1, 2, 4), 4, projections=torch.ones(1, 4, 4)), ValueError, r"must be \(1, 4, 2\)"),
    (lambda: random_buckets((2,), 0), ValueError, "n_buckets=0: must be >= 1"),
    (lambda: random_keep((2,), 1.5), ValueError, r"keep_prob=1.5: must be in \[0, 1\]"),
    (lambda: random_keep((2,), float("nan")), ValueError, "keep_prob=nan"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
