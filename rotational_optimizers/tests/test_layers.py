"""Gains and Weight Standardization: the formulas, conversion in place, and what must not change by it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rotational_optimizers.layers import (
    GainLinear,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    center_rows_,
    convert_gains,
    convert_weight_standardization,
)

torch.set_num_threads(1)
F64 = torch.float64
ROUNDING = 1e-12


def randomised(module):
    """Every parameter away from its initial value, so that no gain of one or bias of zero can hide."""
    torch.manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn_like(p) + 0.5
    return module


def test_gain_scales_the_rows_and_not_the_bias():
    layer = randomised(GainLinear(5, 3, dtype=F64))
    x = torch.randn(2, 4, 5, dtype=F64)
    expected = (x @ layer.weight.T) * layer.gain + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=ROUNDING, atol=ROUNDING)


def test_new_gain_linear_is_linear():
    torch.manual_seed(3)
    plain = nn.Linear(5, 3)
    torch.manual_seed(3)
    gained = GainLinear(5, 3)
    x = torch.randn(4, 5)
    assert torch.equal(plain(x), gained(x))


WS_LAYERS = {
    "linear": (lambda **k: WSLinear(6, 4, dtype=F64, **k), (3, 6), F.linear),
    "conv1d": (lambda **k: WSConv1d(2, 4, 3, dtype=F64, **k), (3, 2, 7), F.conv1d),
    "conv2d": (lambda **k: WSConv2d(2, 4, 3, dtype=F64, **k), (3, 2, 7, 5), F.conv2d),
    "conv3d": (lambda **k: WSConv3d(2, 4, 2, dtype=F64, **k), (3, 2, 4, 3, 3), F.conv3d),
}


def standardized(weight, target, gain):
    rows = weight.flatten(1)
    centred = rows - rows.sum(1, keepdim=True) / rows.shape[1]
    std = (centred.square().sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt() + 1e-5
    return (centred * target / std * gain[:, None]).view_as(weight)


@pytest.mark.parametrize("mode", ["keep_init", "fan_in"])
@pytest.mark.parametrize("name", WS_LAYERS)
def test_standardized_layer_is_its_equation(name, mode):
    build, shape, function = WS_LAYERS[name]
    layer, x = randomised(build(mode=mode, gain=True)), torch.randn(shape, dtype=F64)
    first = layer(x)
    rows = layer.weight.detach().flatten(1)
    initial = rows.std(1, keepdim=True) + 1e-5
    randomised(layer)
    layer.weight.data.mul_(3).add_(1)
    target = initial if mode == "keep_init" else rows.shape[1] ** -0.5
    weight = standardized(layer.weight, target, layer.gain)
    torch.testing.assert_close(layer(x), function(x, weight, layer.bias), rtol=1e-10, atol=1e-10)
    # scaling and shifting a row changes only the 1e-5 beside its std
    torch.testing.assert_close(layer(x), first, rtol=1e-3, atol=1e-4)


def test_rows_of_fan_in_mode_have_variance_one_over_n():
    rows = WSLinear(50, 4, mode="fan_in", dtype=F64).standardized_weight()
    torch.testing.assert_close(rows.std(1), torch.full((4,), 50**-0.5, dtype=F64), rtol=1e-3, atol=0)
    assert rows.mean(1).abs().max() < 1e-15


def test_every_neuron_is_scale_invariant_so_its_gradient_is_orthogonal():
    layer = WSLinear(20, 4, dtype=F64, gain=True)
    layer.weight.data.mul_(100)  # the 1e-5 beside the std is all that breaks the invariance
    layer(torch.randn(8, 20, dtype=F64)).square().sum().backward()
    grad, weight = layer.weight.grad, layer.weight.detach()
    cosine = (grad * weight).sum(1) / grad.norm(dim=1) / weight.norm(dim=1)
    assert cosine.abs().max() < 1e-6
    assert (grad.sum(1).abs() / grad.norm(dim=1)).max() < 1e-13


def test_weight_standardization_gradcheck():
    layer = WSLinear(4, 3, dtype=F64, gain=True)
    x = torch.randn(2, 4, dtype=F64)
    layer(x)

    def output(weight, gain):
        return torch.func.functional_call(layer, {"weight": weight, "gain": gain}, (x,))

    assert torch.autograd.gradcheck(output, (layer.weight, layer.gain))


def test_initial_std_survives_saving_copying_and_later_training():
    layer, x = WSConv1d(2, 4, 3), torch.randn(3, 2, 7)
    fresh = copy.deepcopy(layer)
    before = layer(x)
    layer.weight.data.mul_(5)
    other = WSConv1d(2, 4, 3)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
        torch.testing.assert_close(twin(x), before, rtol=1e-3, atol=1e-4)
    assert fresh._unseen and not other._unseen
    # a state saved before the first forward leaves the std to be seen
    layer.load_state_dict(WSConv1d(2, 4, 3).state_dict())
    assert torch.isfinite(layer(x)).all()


def test_standardized_layer_compiles_in_one_graph():
    layer, x = WSLinear(6, 4, gain=True), torch.randn(3, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), copy.deepcopy(layer)(x))


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 6), nn.Linear(6, 3))


def test_convert_gains_keeps_the_function_and_the_very_parameters():
    model, x = network(), torch.randn(5, 2, 7)
    before, weight = model(x), model[3].weight
    seen = []
    model[3].register_forward_hook(lambda *_: seen.append(1))
    assert convert_gains(model) is model
    assert torch.equal(model(x), before)
    assert model[3].weight is weight and seen == [1]
    assert [type(m).__name__ for m in model] == ["Conv1d", "ReLU", "Flatten", "GainLinear", "GainLinear"]
    model[4].gain.data.mul_(2)
    torch.testing.assert_close(model(x) - model[4].bias, 2 * (before - model[4].bias))


def test_convert_gains_twice_or_on_a_shared_layer_is_once():
    shared = nn.Linear(3, 3)
    model = convert_gains(nn.Sequential(shared, shared))
    gain = model[0].gain
    convert_gains(model)
    assert model[0] is model[1] and model[1].gain is gain
    assert len(list(model.parameters())) == 3


def test_converted_root_module_is_the_same_object():
    layer = nn.Linear(3, 2)
    assert convert_gains(layer) is layer and isinstance(layer, GainLinear)


@pytest.mark.parametrize("convert", [convert_gains, convert_weight_standardization])
def test_exclusion_covers_what_lies_below_and_typos_are_named(convert):
    model = convert(nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)), exclude=["0"])
    assert type(model[0][0]) is nn.Linear and type(model[1]) is not nn.Linear
    with pytest.raises(ValueError, match="exclude='haed': names no module"):
        convert(nn.Linear(3, 3), exclude=["haed"])


@pytest.mark.parametrize("gain", [False, True])
def test_convert_weight_standardization_standardizes_every_layer(gain):
    model, x = network(), torch.randn(5, 2, 7)
    for layer in (model[0], model[3], model[4]):
        center_rows_(layer.weight.data)
    before = model(x)
    convert_weight_standardization(model, gain=gain)
    # rows that are already centred keep their std, up to the two roundings of s_0/s
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    for layer in (model[0], model[3], model[4]):
        layer.weight.data.mul_(7).add_(0.5)
    torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-3)
    assert sum("gain" in name for name, _ in model.named_parameters()) == (3 if gain else 0)


def test_layers_of_fan_in_one_are_left_alone_or_refused():
    model = convert_weight_standardization(nn.Sequential(nn.Linear(1, 4), nn.Conv1d(4, 4, 1, groups=4)))
    assert [type(m) for m in model] == [nn.Linear, nn.Conv1d]
    with pytest.raises(ValueError, match="fan-in 1"):
        WSLinear(1, 4)
    with pytest.raises(ValueError, match="mode='init': must be one of keep_init, fan_in"):
        WSLinear(3, 4, mode="init")
    with pytest.raises(ValueError, match="mode='init'"):
        convert_weight_standardization(nn.ReLU(), mode="init")


@pytest.mark.parametrize("convert", [convert_gains, convert_weight_standardization])
def test_transformer_encoders_use_converted_layers_in_evaluation_too(convert):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = convert(nn.TransformerEncoder(layer, 2))
    with torch.no_grad():
        model(torch.randn(1, 3, 8))
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        trained, evaluated = model.train()(x), model.eval()(x)
    torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize(("shape", "neuron_dim"), [((4, 6), 0), ((4, 3, 2), 0), ((6, 4, 3), 1)])
def test_centred_rows_have_no_mean_and_their_old_norm(shape, neuron_dim):
    torch.manual_seed(0)
    p = torch.randn(shape, dtype=F64) + 2
    rows = lambda: p.movedim(neuron_dim, 0).flatten(1)  # noqa: E731
    before = rows().clone()
    center_rows_(p, neuron_dim)
    torch.testing.assert_close(rows().norm(dim=1), before.norm(dim=1), rtol=ROUNDING, atol=0)
    assert rows().mean(1).abs().max() < 1e-15
    centred = before - before.mean(1, keepdim=True)
    torch.testing.assert_close(F.cosine_similarity(rows(), centred), torch.ones(4, dtype=F64), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [1, 10])
def test_centring_twice_is_centring_once_bit_for_bit(dtype, mean):
    torch.manual_seed(0)
    p = center_rows_((torch.randn(200, 30) + mean).to(dtype))
    assert torch.equal(center_rows_(p.clone()), p)


def test_a_mean_far_below_the_norm_but_above_rounding_is_removed():
    p = center_rows_(torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0), dtype=F64))
    p += 100 * torch.finfo(F64).eps
    assert center_rows_(p).mean(1).abs().max() < 4 * torch.finfo(F64).eps


def test_constant_rows_cannot_be_centred():
    p = torch.randn(4, 3)
    p[2] = 0.1
    p[2, 0] = torch.nextafter(p[2, 0], torch.tensor(1.0))  # constant but for rounding
    with pytest.raises(ValueError, match=r"head.weight: rows \[2\] are constant"):
        center_rows_(p, name="head.weight")
    with pytest.raises(ValueError, match=r"param: rows \[0, 1, 2, 3, 4, 5, 6, 7\] are constant"):
        center_rows_(torch.ones(9, 1))
