"""The tracker against motions whose angle, norm and radial part are known."""

import io
import math

import pytest
import torch
from torch import nn

from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.groups import rotational_param_groups
from rotational_optimizers.sgd import RotationalSGD
from rotational_optimizers.tracker import RotationTracker

torch.set_num_threads(1)
F64 = torch.float64


class Turn(torch.optim.Optimizer):
    """Turns row k by `angles[k]` in a fresh random plane and multiplies its norm by `growth`."""

    def __init__(self, params, angles=1e-3, growth=1.0, dim=0):
        super().__init__(params, {"lr": 1.0})
        self.angles, self.growth, self.dim = angles, growth, dim
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    continue
                x = p.movedim(self.dim, 0).flatten(1).double()
                side = torch.randn(x.shape, generator=self.generator, dtype=F64)
                side -= x * ((side * x).sum(1) / x.square().sum(1))[:, None]
                side *= (x.norm(dim=1) / side.norm(dim=1))[:, None]
                angle = torch.as_tensor(self.angles, dtype=F64).expand(len(x))[:, None]
                turned = self.growth * (torch.cos(angle) * x + torch.sin(angle) * side)
                shape = p.movedim(self.dim, 0).shape
                p.copy_(turned.view(shape).movedim(0, self.dim))


def linear(rows=4, columns=50, dtype=F64):
    torch.manual_seed(0)
    return nn.Linear(columns, rows, dtype=dtype)


def track(model, optimizer, steps, **options):
    with RotationTracker(model, optimizer, **options) as tracker:
        for _ in range(steps):
            optimizer.step()
    return tracker


def test_angle_norm_and_parts_of_a_known_motion():
    model, growth, angle = linear(), 0.98, 0.2
    before = model.weight.detach().norm(dim=1)
    tracker = track(model, Turn(model.parameters(), angle, growth), 1)
    torch.testing.assert_close(tracker.rows()["weight"], torch.full((4,), angle, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(tracker.norms()["weight"], growth * before, rtol=1e-12, atol=0)
    line = tracker.summary().loc["weight"]
    assert line["rows"] == 4
    assert line["angle"] == pytest.approx(angle, rel=1e-9)
    assert line["radial"] == pytest.approx(growth * math.cos(angle) - 1, rel=1e-9)
    assert line["tangential"] == pytest.approx(growth * math.sin(angle), rel=1e-9)
    assert line["update"] == pytest.approx(math.sqrt(1 + growth**2 - 2 * growth * math.cos(angle)), rel=1e-9)
    assert line["norm"] == pytest.approx(growth * before.square().mean().sqrt().item(), rel=1e-12)


def test_small_angles_in_float32_keep_three_digits_where_acos_has_none():
    model = linear(columns=400, dtype=torch.float32)
    angle = 1e-4
    before = nn.functional.normalize(model.weight.detach())
    tracker = track(model, Turn(model.parameters(), angle), 1)
    # 400 coordinates rounded to 6e-8 of themselves: 6e-8/1e-4 of the angle
    torch.testing.assert_close(tracker.rows()["weight"], torch.full((4,), angle, dtype=F64), rtol=1e-3, atol=0)
    cosine = (before * nn.functional.normalize(model.weight.detach())).sum(1)
    assert (torch.acos(cosine.clamp(max=1)) / angle - 1).abs().max() > 0.1


def test_pure_decay_is_no_rotation():
    model = linear(dtype=torch.float32)
    tracker = track(model, Turn(model.parameters(), 0.0, growth=0.999), 20)
    # each coordinate and each norm is rounded to 6e-8 of itself
    assert tracker.rows()["weight"].max() < 2e-7
    assert tracker.summary().at["weight", "radial"] == pytest.approx(-1e-3, rel=1e-3)


def test_tensors_of_different_dtypes_are_tracked_together():
    model = nn.Sequential(linear(dtype=torch.float32), linear(dtype=F64), linear(dtype=torch.bfloat16))
    rows = track(model, Turn(model.parameters(), 0.1), 1).rows()
    for name, rtol in (("0.weight", 1e-5), ("1.weight", 1e-9), ("2.weight", 1e-2)):
        torch.testing.assert_close(rows[name], torch.full((4,), 0.1, dtype=F64), rtol=rtol, atol=0)


def test_half_turn_and_bfloat16_weights():
    model = linear(dtype=torch.bfloat16)
    optimizer = Turn(model.parameters(), math.pi)
    # chord 2: asin is steep there, so the angle keeps half the digits
    assert track(model, optimizer, 1).rows()["weight"].sub(math.pi).abs().max() < 1e-2


def test_readings_are_root_mean_squares_over_steps():
    model, optimizer = linear(), None
    optimizer = Turn(model.parameters(), 0.01)
    with RotationTracker(model, optimizer) as tracker:
        for angle in (0.01, 0.03):
            optimizer.angles = angle
            optimizer.step()
    expected = torch.full((4,), math.sqrt(5) * 0.01, dtype=F64)
    torch.testing.assert_close(tracker.rows()["weight"], expected, rtol=1e-9, atol=0)


def angles_seen(options, steps=12):
    """RMS angle (in units of .001) when step k turns by (k+1)/1000."""
    model = linear()
    optimizer = Turn(model.parameters())
    tracker = RotationTracker(model, optimizer, **options)
    for k in range(steps):
        optimizer.angles = (k + 1) / 1000
        optimizer.step()
    return tracker


def rms(*values):
    return math.sqrt(sum(v * v for v in values) / len(values)) / 1000


def test_only_every_kth_step_is_tracked_and_only_the_last_complete_block_is_read():
    first = lambda tracker, **k: tracker.rows(**k)["weight"][0].item()  # noqa: E731
    assert first(angles_seen({"every": 5})) == pytest.approx(rms(1, 6, 11), rel=1e-9)
    assert first(angles_seen({"window": 5})) == pytest.approx(rms(6, 7, 8, 9, 10), rel=1e-9)
    assert first(angles_seen({"window": 3, "every": 2})) == pytest.approx(rms(7, 9, 11), rel=1e-9)
    assert first(angles_seen({"window": 1})) == pytest.approx(rms(12), rel=1e-9)
    assert first(angles_seen({"window": 100})) == pytest.approx(rms(*range(1, 13)), rel=1e-9)
    assert first(angles_seen({"window": {"only": (2, 4)}})) == pytest.approx(rms(3, 4), rel=1e-9)
    with pytest.raises(ValueError, match="window='running': must be one of None"):
        angles_seen({}).rows("running")
    named = angles_seen({"window": {"start": (0, 2), "tail": (6, 12), "never": (50, 60)}})
    assert first(named, window="start") == pytest.approx(rms(1, 2), rel=1e-9)
    assert first(named, window="tail") == pytest.approx(rms(7, 8, 9, 10, 11, 12), rel=1e-9)
    assert math.isnan(first(named, window="never"))
    with pytest.raises(ValueError, match="window=None: must be one of start, tail, never"):
        named.rows()
    with pytest.raises(ValueError, match="window='tial': must be one of start, tail"):
        angles_seen({"window": {"start": (0, 2), "tail": (6, 12)}}).rows("tial")
    with pytest.raises(ValueError, match="window=None: must be one of start, tail"):
        angles_seen({"window": {"start": (0, 2), "tail": (6, 12)}}).rows()


def test_no_copy_of_the_weights_outlives_a_step():
    model = linear()
    optimizer = Turn(model.parameters())
    tracker = RotationTracker(model, optimizer, every=2)
    held = []
    optimizer.register_step_pre_hook(lambda *_: held.append(tracker._before is not None))
    for _ in range(4):
        optimizer.step()
        assert tracker._before is None
    assert held == [True, False, True, False]


def test_reset_forgets_the_past():
    tracker = angles_seen({})
    tracker.reset()
    assert tracker.rows()["weight"].isnan().all()
    assert tracker.step == 12


def test_tensorwise_angle_sees_the_whole_matrix_as_one_vector():
    model = linear()
    optimizer = Turn(model.parameters(), torch.tensor([0.1, 0.0, 0.0, 0.0]))
    before = model.weight.detach().clone()
    tracker = track(model, optimizer, 1, per="tensor")
    cosine = (before * model.weight).sum() / before.norm() / model.weight.norm()
    assert tracker.rows()["weight"].shape == (1,)
    assert tracker.rows()["weight"].item() == pytest.approx(math.acos(cosine.item()), rel=1e-8)


def test_centred_angle_ignores_the_mean_of_rows():
    class Shift(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            self.param_groups[0]["params"][0].add_(1.0)

    for center, turned in ((True, False), (False, True)):
        model = linear()
        tracker = track(model, Shift([model.weight], {}), 1, center=center)
        assert bool(tracker.rows()["weight"].max() > 1e-3) is turned


def test_neurons_on_axis_one_are_followed_as_such():
    torch.manual_seed(0)
    model = nn.ConvTranspose1d(3, 4, 5, dtype=F64)
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    tracker = track(model, Turn([model.weight], angles, dim=1), 1)
    torch.testing.assert_close(tracker.rows()["weight"], angles, rtol=1e-8, atol=0)


def test_imbalance_is_the_deviation_of_log_angles():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 3, dtype=F64), nn.Linear(9, 3, dtype=F64))
    angles = torch.tensor([0.01, 0.02, 0.0], dtype=F64)
    tracker = track(model, Turn(model.parameters(), angles), 1)
    logs = torch.tensor([0.01, 0.02, 0.01, 0.02]).log()
    found = tracker.imbalance()
    assert found["all"] == pytest.approx(logs.std().item(), rel=1e-6)
    assert found["within"] == pytest.approx(logs[:2].std().item(), rel=1e-6)
    assert found["between"] == pytest.approx(0.0, abs=1e-9)
    assert found["still"] == 2


def adamw(model, lr=0.01):
    return torch.optim.AdamW(rotational_param_groups(model, 0.1), lr=lr)


def step(model, optimizer):
    optimizer.zero_grad()
    torch.manual_seed(0)
    model(torch.randn(8, 50, dtype=F64)).square().sum().backward()
    optimizer.step()


def test_prediction_follows_the_schedule_and_survives_loading_a_state():
    model = linear()
    optimizer = adamw(model)
    with RotationTracker(model, optimizer) as tracker:
        step(model, optimizer)
        # loading replaces the groups themselves
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["lr"] = 0.05
        step(model, optimizer)
    each = [equilibrium_rotation("adamw", lr=lr, weight_decay=0.1) for lr in (0.01, 0.05)]
    line = tracker.summary().loc["weight"]
    assert line["predicted"] == pytest.approx(math.sqrt((each[0] ** 2 + each[1] ** 2) / 2), rel=1e-12)
    assert line["ratio"] == pytest.approx(line["angle"] / line["predicted"], rel=1e-12)


@pytest.mark.parametrize(
    ("rotation", "expected"),
    [
        (0.02, 0.02),
        (lambda group: group["lr"] / 5, 0.1),
        ("equilibrium", equilibrium_rotation("nesterov", lr=0.5, weight_decay=0.01, momentum=0.9)),
        ("paper", equilibrium_rotation("sgdm", lr=0.5, weight_decay=0.01, momentum=0.9)),
    ],
    ids=["number", "function", "equilibrium", "paper"],
)
def test_prediction_for_a_rotational_variant_is_what_it_is_set_to(rotation, expected):
    model = linear()
    optimizer = RotationalSGD([model.weight], 0.5, 0.9, weight_decay=0.01, nesterov=True, rotation=rotation)
    model.weight.grad = torch.randn_like(model.weight)
    line = track(model, optimizer, 1).summary().loc["weight"]
    assert line["predicted"] == pytest.approx(expected, rel=1e-12)
    # f = .9 has seen one step only: the angle is that of the prediction
    assert line["angle"] == pytest.approx(math.atan(expected), rel=1e-9)


def test_optimizers_without_a_formula_have_no_prediction():
    model = linear()
    line = track(model, Turn([model.weight], 0.1), 2).summary().loc["weight"]
    assert math.isnan(line["predicted"]) and math.isnan(line["ratio"])


def test_own_prediction_wins():
    model = linear()
    tracker = track(model, adamw(model), 1, predict=lambda group: 10 * group["weight_decay"])
    assert tracker.summary().at["weight", "predicted"] == pytest.approx(1.0)


def test_training_is_the_same_with_and_without_a_tracker():
    finals = []
    for tracked in (False, True):
        model = linear()
        optimizer = adamw(model)
        if tracked:
            RotationTracker(model, optimizer)
        for _ in range(5):
            step(model, optimizer)
        finals.append(model.weight.detach())
    assert torch.equal(*finals)


def test_weights_without_gradient_stand_still():
    model = nn.Sequential(linear(), nn.Linear(4, 3, dtype=F64))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    model[0](torch.randn(2, 50, dtype=F64)).sum().backward()
    tracker = track(model, optimizer, 1)
    assert tracker.rows()["0.weight"].min() > 0 and tracker.rows()["1.weight"].max() == 0


def test_hooks_are_gone_after_the_block_even_after_an_error():
    model = linear()
    optimizer = Turn(model.parameters())
    with pytest.raises(KeyError), RotationTracker(model, optimizer) as tracker:
        optimizer.step()
        raise KeyError
    optimizer.step()
    assert tracker.step == 1


def test_resumed_tracker_reads_as_one_that_never_stopped():
    whole = angles_seen({"window": 5})
    model = linear()
    optimizer = Turn(model.parameters())
    buffer = io.BytesIO()
    for part in (range(7), range(7, 12)):
        with RotationTracker(model, optimizer, window=5) as tracker:
            if part.start:
                buffer.seek(0)
                tracker.load_state_dict(torch.load(buffer, weights_only=True))
            for k in part:
                optimizer.angles = (k + 1) / 1000
                optimizer.step()
            torch.save(tracker.state_dict(), buffer)
    assert torch.equal(tracker.rows()["weight"], whole.rows()["weight"])
    assert tracker.step == whole.step


def test_log_hands_over_flat_metrics():
    class Sink:
        def log(self, metrics, step):
            self.metrics, self.step = metrics, step

    sink, tracker = Sink(), angles_seen({})
    tracker.log(sink)
    assert sink.step == 12
    assert sink.metrics["rotation/angle/weight"] == pytest.approx(rms(*range(1, 13)), rel=1e-9)
    assert {"rotation/ratio/weight", "rotation/norm/weight", "rotation/imbalance/all"} <= set(sink.metrics)
    assert all(isinstance(value, float) for value in sink.metrics.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0: must be >= 1"),
        ({"window": 0}, "window=0: must be >= 1"),
        ({"window": {"tail": (5, 5)}}, r"window\['tail'\]=\(5, 5\)"),
        ({"per": "layer"}, "per='layer': must be 'neuron' or 'tensor'"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    model = linear()
    with pytest.raises(ValueError, match=message):
        RotationTracker(model, Turn(model.parameters()), **options)


def test_optimizer_without_a_weight_of_the_model_is_refused():
    model = linear()
    with pytest.raises(ValueError, match="holds no weight"):
        RotationTracker(model, Turn([model.bias]))
