"""The rotational update does what the equations of section 4 say, row by row, in any layout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotational_optimizers.update import prepare_rows_, rotational_update_

torch.set_num_threads(1)
EPS = torch.finfo(torch.float64).eps


def rows(k: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def start(weight: torch.Tensor, **layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, u) at the first step, the weight centred."""
    norm = prepare_rows_(weight, **layout)
    return norm, torch.zeros_like(norm)


def one_row(x: list[float], d: list[float], big_n: float, u: float, t: int, eta: float, f: float, centre: bool):
    """Section 4 for one row, in Python floats: (new x, new u)."""
    n = len(x)
    if centre:
        mean = sum(d) / n
        d = [di - mean for di in d]
    radial = sum(di * xi for di, xi in zip(d, x, strict=True)) / big_n**2
    d = [di - radial * xi for di, xi in zip(d, x, strict=True)]
    u = f * u + (1 - f) * sum(di * di for di in d)
    a = math.sqrt(u / (1 - f**t))
    x = [xi - eta * big_n * di / a for di, xi in zip(d, x, strict=True)]
    length = math.sqrt(sum(xi * xi for xi in x))
    return [xi * big_n / length for xi in x], u


def angles(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Angle between rows by the chord, which keeps its digits where the cosine loses them."""
    x, y = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    return 2 * torch.asin((x - y).norm(dim=1) / 2)


@given(
    k=st.integers(1, 4), n=st.integers(3, 12), f=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    eta=st.floats(1e-4, 1.0), centre=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_row_follows_the_equations(k, n, f, eta, centre, seed):
    weight = rows(k, n, seed) + 0.3
    norm, u = start(weight, zero_mean=centre)
    expected = [(row.tolist(), 0.0) for row in weight]
    for t in range(1, 5):
        d = rows(k, n, seed + t) * 10.0 ** (t - 2)
        rotational_update_(weight, d, norm, u, t, rotation=eta, update_norm_decay=f, zero_mean=centre)
        expected = [
            one_row(x, di.tolist(), float(big), u_row, t, eta, f, centre)
            for (x, u_row), di, big in zip(expected, d, norm, strict=True)
        ]
        torch.testing.assert_close(weight, weight.new_tensor([x for x, _ in expected]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(u, u.new_tensor([u_row for _, u_row in expected]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("eta", [1e-6, 1e-3, 0.5, 3.0])
def test_without_averaging_every_row_turns_by_exactly_atan_of_the_rotation(eta):
    weight = rows(20, 30)
    norm, u = start(weight)
    for t in range(1, 6):
        before = weight.clone()
        rotational_update_(weight, rows(20, 30, t), norm, u, t, rotation=eta, update_norm_decay=0.0)
        expected = torch.full((20,), math.atan(eta), dtype=torch.float64)
        torch.testing.assert_close(angles(before, weight), expected, rtol=1e-9, atol=1e-14)


def test_the_average_controls_the_rms_angle_over_a_window_and_not_each_angle():
    weight, eta = rows(30, 40), 1e-3
    norm, u = start(weight)
    turned = []
    for t in range(1, 401):
        before = weight.clone()
        # sizes of the updates vary tenfold
        d = rows(30, 40, t) * (1 + 9 * (t % 2))
        rotational_update_(weight, d, norm, u, t, rotation=eta, update_norm_decay=0.99)
        turned.append(angles(before, weight))
    turned = torch.stack(turned[50:])
    assert turned.square().mean().sqrt().item() == pytest.approx(eta, rel=0.02)
    assert turned.max() > 5 * turned.min()


def test_a_weight_pushed_off_its_mean_and_norm_comes_back_in_one_step():
    weight = rows(10, 50)
    norm, u = start(weight)
    weight.mul_(1.1).add_(0.01)
    rotational_update_(weight, rows(10, 50, 1), norm, u, 1, rotation=0.05)
    torch.testing.assert_close(weight.norm(dim=1), norm, rtol=1e-14, atol=0)
    assert (weight.mean(dim=1).abs() < 1e-15).all()


def test_norms_and_means_stay_for_hundreds_of_steps():
    weight = rows(10, 50, dtype=torch.float32) + 0.5
    norm, u = start(weight)
    for t in range(1, 500):
        rotational_update_(weight, rows(10, 50, t, torch.float32) + 2, norm, u, t, rotation=0.05)
    ulp = torch.finfo(torch.float32).eps
    assert ((weight.double().norm(dim=1) / norm - 1).abs() < 3 * ulp * math.sqrt(50)).all()
    assert (weight.double().mean(dim=1).abs() < 3 * ulp * norm / math.sqrt(50)).all()


def test_a_row_turns_away_from_the_direction():
    weight = rows(5, 8)
    norm, u = start(weight)
    before, d = weight.clone(), rows(5, 8, 1)
    rotational_update_(weight, d, norm, u, 1, rotation=0.1)
    assert (((weight - before) * d).sum(1) < 0).all()


def test_the_radial_and_the_constant_part_of_the_direction_do_not_count():
    d, results = rows(6, 10, 1), []
    for extra in (0.0, 3.0):
        weight = rows(6, 10)
        norm, u = start(weight)
        rotational_update_(weight, d + extra * weight + 2 * extra, norm, u, 1, rotation=0.1)
        results.append(weight)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_neuron", [True, False])
@pytest.mark.parametrize("c", [1e-3, 7.0])
def test_scaled_rows_follow_the_scaled_trajectory(c, per_neuron):
    weights = [rows(4, 9), c * rows(4, 9)]
    states = [start(weight, per_neuron=per_neuron) for weight in weights]
    for t in range(1, 6):
        for weight, (norm, u) in zip(weights, states, strict=True):
            rotational_update_(weight, rows(4, 9, t), norm, u, t, rotation=0.1, per_neuron=per_neuron)
    torch.testing.assert_close(c * weights[0], weights[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("c", [1e-30, 1e-8, 1e12])
def test_the_size_of_the_direction_does_not_matter_however_small(c):
    weights = [rows(4, 9), rows(4, 9)]
    states = [start(weight) for weight in weights]
    for t in range(1, 6):
        for weight, (norm, u), scale in zip(weights, states, (1.0, c), strict=True):
            rotational_update_(weight, scale * rows(4, 9, t), norm, u, t, rotation=0.1)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)


def test_rows_are_independent_of_each_other_and_of_their_order():
    weight, d, order = rows(6, 9), rows(6, 9, 1), torch.tensor([3, 1, 5])
    part = weight[order].clone()
    for w, direction in ((weight, d), (part, d[order])):
        norm, u = start(w)
        rotational_update_(w, direction, norm, u, 1, rotation=0.2)
    assert torch.equal(weight[order], part)


@pytest.mark.parametrize("zero_mean", [True, False])
def test_the_update_commutes_with_rotations_of_the_row_space(zero_mean):
    n = 7
    q = torch.linalg.qr(rows(n, n, 5)).Q
    if zero_mean:
        # an orthogonal map that keeps the vector of ones: rotate its complement only
        basis = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), rows(n, n - 1, 6)], 1)).Q
        block = torch.eye(n, dtype=torch.float64)
        block[1:, 1:] = torch.linalg.qr(rows(n - 1, n - 1, 7)).Q
        q = basis @ block @ basis.T
    weight = rows(4, n)
    if zero_mean:
        weight -= weight.mean(1, keepdim=True)
    turned = weight @ q
    for w, turn in ((weight, torch.eye(n, dtype=torch.float64)), (turned, q)):
        norm, u = start(w, zero_mean=zero_mean)
        for t in (1, 2, 3):
            rotational_update_(w, rows(4, n, t) @ turn, norm, u, t, rotation=0.3, zero_mean=zero_mean)
    torch.testing.assert_close(weight @ q, turned, rtol=1e-10, atol=1e-12)


def test_a_whole_tensor_is_one_long_row():
    whole, flat = rows(4, 6), rows(4, 6).view(1, 24).clone()
    for w, layout in ((whole, {"per_neuron": False}), (flat, {})):
        norm, u = start(w, **layout)
        assert norm.shape == (1,)
        rotational_update_(w, rows(4, 6, 1).view_as(w), norm, u, 1, rotation=0.2, **layout)
    torch.testing.assert_close(whole.view(1, 24), flat, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("neuron_dim", [0, 1, -3])
def test_any_axis_and_any_memory_layout_gives_the_same_rows(layout, neuron_dim):
    full = rows(5, 6 * 3 * 2).view(5, 6, 3, 2)
    d = rows(5, 6 * 3 * 2, 1).view(5, 6, 3, 2)
    weight = full.clone()
    if layout == "channels_last":
        weight = full.to(memory_format=torch.channels_last)
    if layout == "strided":
        weight = full.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    matrix = full.movedim(neuron_dim, 0).flatten(1).clone()
    norm, u = start(weight, neuron_dim=neuron_dim)
    rotational_update_(weight, d, norm, u, 1, rotation=0.2, neuron_dim=neuron_dim)
    norm, u = start(matrix)
    rotational_update_(matrix, d.movedim(neuron_dim, 0).flatten(1), norm, u, 1, rotation=0.2)
    torch.testing.assert_close(weight.movedim(neuron_dim, 0).flatten(1), matrix, rtol=1e-12, atol=1e-14)


def test_speed_multiplies_the_rotation_of_a_row():
    speed = torch.tensor([0.0, 0.5, 1.0, 10.0], dtype=torch.float64)
    weight = rows(4, 9)
    norm, u = start(weight)
    before = weight.clone()
    rotational_update_(weight, rows(4, 9, 1), norm, u, 1, rotation=0.01, update_norm_decay=0.0, speed=speed)
    torch.testing.assert_close(angles(before, weight), torch.atan(0.01 * speed), rtol=1e-9, atol=1e-15)
    assert torch.equal(before[0], weight[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["zero", "constant", "radial", "nan", "inf"])
def test_a_row_without_a_usable_direction_stays_as_it_is(what, dtype):
    weight = rows(3, 40, dtype=dtype)
    norm, u = start(weight)
    before, d = weight.clone(), rows(3, 40, 1, dtype)
    d[1] = {"zero": torch.zeros(40), "constant": torch.full((40,), 0.7), "radial": 0.3 * weight[1]}.get(what, d[1])
    d[1, 3] = {"nan": math.nan, "inf": math.inf}.get(what, d[1, 3])
    rotational_update_(weight, d, norm, u, 1, rotation=0.1)
    assert torch.equal(weight[1], before[1])
    assert not torch.equal(weight[0], before[0])
    assert not torch.equal(weight[2], before[2])
    assert u[1] == 0


def test_a_nan_direction_leaves_the_running_mean_alone():
    weight = rows(2, 9)
    norm, u = start(weight)
    rotational_update_(weight, rows(2, 9, 1), norm, u, 1, rotation=0.1)
    kept = u.clone()
    rotational_update_(weight, torch.full((2, 9), math.nan), norm, u, 2, rotation=0.1)
    assert torch.equal(u, kept)


def test_no_rotation_means_no_change_of_a_bit():
    weight = rows(4, 33, dtype=torch.float32)
    norm, u = start(weight)
    before = weight.clone()
    rotational_update_(weight, rows(4, 33, 1, torch.float32), norm, u, 1, rotation=0.0)
    assert torch.equal(weight, before)


def test_a_row_of_norm_zero_takes_the_plain_step():
    weight, d = rows(3, 8), rows(3, 8, 1)
    weight[1] = 0
    norm, u = start(weight)
    assert norm[1] == 0
    rotational_update_(weight, d, norm, u, 1, rotation=0.1, lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(weight[1], -0.5 * d[1])
    assert u[1] == 0
    before = weight[1].clone()
    rotational_update_(weight, d, norm, u, 2, rotation=0.1, lr=0.5, weight_decay=0.1)
    torch.testing.assert_close(weight[1], before * (1 - 0.5 * 0.1) - 0.5 * d[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 0.2, 5.0])
def test_centring_keeps_the_norm_and_is_done_once(dtype, mean):
    weight = (rows(6, 50) + mean).to(dtype)
    before = weight.double().norm(dim=1)
    norm = prepare_rows_(weight)
    ulp = torch.finfo(dtype).eps
    assert (weight.double().mean(1).abs() <= 4 * ulp * before / math.sqrt(50)).all()
    torch.testing.assert_close(weight.double().norm(dim=1), before, rtol=8 * ulp, atol=0)
    torch.testing.assert_close(norm.double(), before, rtol=8 * ulp, atol=0)
    again = weight.clone()
    prepare_rows_(again)
    assert torch.equal(again, weight)


def test_rows_without_a_direction_are_left_and_marked():
    weight = torch.stack([torch.zeros(5), torch.ones(5), torch.arange(5.0)])
    before = weight.clone()
    norm = prepare_rows_(weight)
    assert norm[:2].tolist() == [0, 0]
    assert norm[2] > 0
    assert torch.equal(weight[:2], before[:2])
    assert prepare_rows_(before.clone(), zero_mean=False)[1].item() == pytest.approx(math.sqrt(5))


def test_low_precision_weights_have_float32_row_statistics():
    weight = rows(3, 20, dtype=torch.bfloat16)
    norm, u = start(weight)
    assert norm.dtype == u.dtype == torch.float32
    rotational_update_(weight, rows(3, 20, 1, torch.bfloat16), norm, u, 1, rotation=0.3)
    assert weight.dtype == torch.bfloat16
    assert ((weight.float().norm(dim=1) / norm - 1).abs() < torch.finfo(torch.bfloat16).eps).all()
