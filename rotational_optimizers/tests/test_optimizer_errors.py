"""Bad input is refused with the name, the value and the allowed range; what cannot rotate is named."""

import warnings

import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.sgd import RotationalSGD

torch.set_num_threads(1)
CLASSES = [RotationalAdamW, RotationalSGD, RotationalLion]


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape or (4, 6), generator=torch.Generator().manual_seed(0)))


RANGES = [
    (CLASSES, {"lr": -1.0}, r"lr=-1\.0: must be >= 0"),
    (CLASSES, {"lr": float("nan")}, r"lr=nan: must be >= 0"),
    (CLASSES, {"weight_decay": -0.1}, r"weight_decay=-0\.1: must be >= 0"),
    (CLASSES, {"update_norm_decay": 1.0}, r"update_norm_decay=1\.0: must be in \[0, 1\)"),
    (CLASSES, {"update_norm_decay": -0.5}, r"update_norm_decay=-0\.5: must be in \[0, 1\)"),
    (CLASSES, {"rotation": "fast"}, r"rotation='fast': must be one of \('equilibrium', 'exact', 'paper'\)"),
    (CLASSES, {"rotation": -0.1}, r"rotation=-0\.1: must be finite and >= 0"),
    (CLASSES, {"rotation": float("inf")}, r"rotation=inf: must be finite"),
    (CLASSES, {"rotational": "yes"}, r"rotational='yes': must be True, False or None"),
    (CLASSES, {"rotational": True, "weight_decay": 0.0}, r"weight_decay=0 with rotational=True"),
    (CLASSES, {"neuron_dim": 2}, r"neuron_dim=2: must be in \[-2, 2\) for parameter 0 of group 0 of shape \(4, 6\)"),
    ([RotationalAdamW, RotationalLion], {"betas": (1.0, 0.9)}, r"betas=\(1\.0, 0\.9\): must be two numbers in"),
    ([RotationalAdamW, RotationalLion], {"betas": (0.9, -0.1)}, r"betas=\(0\.9, -0\.1\)"),
    ([RotationalAdamW, RotationalLion], {"betas": (0.9,)}, r"betas=\(0\.9,\)"),
    ([RotationalAdamW], {"eps": -1e-8}, r"eps=-1e-08: must be >= 0"),
    ([RotationalAdamW], {"second_moment_l2": -1.0}, r"second_moment_l2=-1\.0: must be >= 0"),
    ([RotationalSGD], {"momentum": 1.0}, r"momentum=1\.0: must be in \[0, 1\)"),
    ([RotationalSGD], {"momentum": 0.9, "dampening": 1.5}, r"dampening=1\.5: must be in \[0, 1\)"),
    ([RotationalSGD], {"nesterov": True}, r"nesterov=True with momentum=0\.0, dampening=0\.0: must have momentum > 0"),
    ([RotationalSGD], {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1: must have momentum > 0"),
]


@pytest.mark.parametrize(
    ("cls", "keys", "message"), [(cls, keys, message) for classes, keys, message in RANGES for cls in classes]
)
def test_values_out_of_range(cls, keys, message):
    with pytest.raises(ValueError, match=message):
        cls([weight()], **{"weight_decay": 0.1} | keys)
    # the same from a group added later, which then is not kept
    optimizer = cls([weight()], weight_decay=0.1)
    with pytest.raises(ValueError, match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": [weight()], **keys})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_wrong_types(cls):
    with pytest.raises(TypeError, match="lr='fast'"):
        cls([weight()], lr="fast", weight_decay=0.1)
    with pytest.raises(TypeError, match="neuron_speed=2"):
        cls([weight()], weight_decay=0.1, neuron_speed=2)
    with pytest.raises(RuntimeError, match="foreach=True and fused=True"):
        cls([weight()], foreach=True, fused=True)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_tensors_without_rows_cannot_be_asked_to_rotate(shape):
    param = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 with rotational=True: .* at least two dimensions"):
        RotationalAdamW([weight(), param], rotational=True)


def test_zero_dimensional_parameters_follow_the_base():
    scale, twin = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(2.0))
    ours, torchs = RotationalAdamW([scale], weight_decay=0.1), torch.optim.AdamW([twin], weight_decay=0.1)
    for optimizer, param in ((ours, scale), (torchs, twin)):
        param.grad = torch.tensor(0.5)
        optimizer.step()
    assert torch.equal(scale, twin)


def test_complex_parameters_cannot_rotate_and_else_follow_the_base():
    values = torch.randn(3, 4, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"torch\.complex64 has no rows to rotate; must be floating point"):
        RotationalSGD([nn.Parameter(values.clone())], weight_decay=0.1, rotational=True)
    a, b = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    for optimizer, param in (
        (RotationalSGD([a], 0.1, weight_decay=0.1), a), (torch.optim.SGD([b], 0.1, weight_decay=0.1), b),
    ):  # fmt: skip
        param.grad = values * 1j
        optimizer.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("cls", CLASSES)
def test_sparse_gradients_are_refused_by_name(cls):
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = cls(table.named_parameters(), weight_decay=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 'weight' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(table.weight, before)


STUCK = {
    "fan-in 1": lambda: weight(5, 1),
    "fan-in 2, centred": lambda: weight(5, 2),
    "all zero": lambda: nn.Parameter(torch.zeros(4, 6)),
    "constant": lambda: nn.Parameter(torch.ones(4, 6)),
}


@pytest.mark.parametrize("what", STUCK)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_tensor_that_cannot_rotate_is_named_and_follows_the_base(cls, what):
    param, twin = STUCK[what](), STUCK[what]()
    with pytest.raises(ValueError, match="parameter 'stuck' of shape .*: no row can rotate"):
        cls([("stuck", STUCK[what]())], weight_decay=0.1, rotational=True)
    with pytest.warns(UserWarning, match="parameter 'stuck' of shape .*: no row can rotate"):
        optimizer = cls([("stuck", param)], lr=0.1, weight_decay=0.1)
    base = cls([twin], lr=0.1, weight_decay=0.1, rotational=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(3):
            param.grad = twin.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
            base.step()
    assert torch.equal(param, twin)
    assert torch.isfinite(param).all()


def test_zero_rows_among_others_are_named_and_take_the_plain_step():
    table = nn.Embedding(6, 8, padding_idx=2)
    for rotational in (None, True):
        with pytest.warns(UserWarning, match=r"parameter 'weight' .*: 1 of 6 rows, \[2\], cannot rotate"):
            optimizer = RotationalAdamW(table.named_parameters(), weight_decay=0.1, rotational=rotational)
    table(torch.tensor([1, 2, 3])).square().sum().backward()
    optimizer.step()
    assert (table.weight[2] == 0).all()
    assert torch.isfinite(table.weight).all()


def test_a_tensor_that_is_zero_at_construction_and_loaded_later_rotates():
    param = nn.Parameter(torch.zeros(3, 5))
    with pytest.warns(UserWarning, match="no row can rotate"):
        optimizer = RotationalSGD([param], 0.1, weight_decay=0.1)
    with torch.no_grad():
        param.copy_(weight(3, 5))
    norm = param.detach().norm(dim=1)
    param.grad = torch.ones(3, 5).cumsum(1)
    optimizer.step()
    torch.testing.assert_close(param.detach().norm(dim=1), norm)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_that_does_not_match_is_refused_and_changes_nothing(cls):
    param = weight()
    optimizer = cls([param], weight_decay=0.1)
    param.grad = torch.ones(4, 6).cumsum(1)
    optimizer.step()
    kept = {key: value.clone() for key, value in optimizer.state[param].items()}
    saved = optimizer.state_dict()
    for key, shape in (("norm", r"\(4,\)"), ("update_norm_sq", r"\(4,\)")):
        broken = {"state": {0: {**saved["state"][0], key: torch.ones(3)}}, "param_groups": saved["param_groups"]}
        with pytest.raises(ValueError, match=rf"{key} of parameter 0 of group 0 has shape \(3,\), must be {shape}"):
            optimizer.load_state_dict(broken)
    two = cls([weight(), weight(5, 5)], weight_decay=0.1)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        two.load_state_dict(saved)
    other = cls([weight(6, 4)], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"has shape"):
        other.load_state_dict(saved)
    assert other.state == {}
    assert all(torch.equal(value, optimizer.state[param][key]) for key, value in kept.items())


def test_speeds_of_the_wrong_number_of_rows_are_refused():
    param = weight()
    optimizer = RotationalSGD([param], 0.1, weight_decay=0.1, neuron_speed=lambda p: torch.ones(3))
    param.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"neuron_speed of parameter 0 of group 0: shape \(3,\), must be \(4,\)"):
        optimizer.step()


@pytest.mark.parametrize("angle", [-0.1, float("nan")])
def test_a_function_that_gives_an_impossible_rotation_is_refused(angle):
    param = weight()
    optimizer = RotationalSGD([param], 0.1, weight_decay=0.1, rotation=lambda group: angle)
    param.grad = torch.ones(4, 6).cumsum(1)
    with pytest.raises(ValueError, match=r"rotation\(group\)=.*: must be finite and >= 0"):
        optimizer.step()


def test_no_parameters_at_all():
    with pytest.raises(ValueError, match="empty parameter list"):
        RotationalAdamW([])
