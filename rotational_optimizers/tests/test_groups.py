"""Which tensors rotate, along which axis, and that no parameter is lost or doubled."""

import warnings

import pytest
import torch
from torch import nn

from rotational_optimizers.groups import as_rows, neuron_axes, rotational_param_groups
from rotational_optimizers.layers import GainLinear, WSConv2d


def kinds(model, **options):
    """Parameter name -> (rotational, weight_decay, neuron_dim)."""
    groups = rotational_param_groups(model, 0.1, **options)
    names = {id(p): name for name, p in model.named_parameters()}
    keys = ("rotational", "weight_decay", "neuron_dim")
    return {names[id(p)]: tuple(group[key] for key in keys) for group in groups for p in group["params"]}


PLAIN = (False, 0.0, 0)
KEPT_OUT = (False, 0.1, 0)
ROWS = (True, 0.1, 0)
COLUMNS = (True, 0.1, 1)


class Conv1D(nn.Module):
    """Hugging Face's layer of that name: weight (in, out)."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(4, 3), {"weight": ROWS, "bias": PLAIN}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": ROWS, "bias": PLAIN}),
        (nn.Conv1d(4, 6, 3), {"weight": ROWS, "bias": PLAIN}),
        (nn.Conv3d(4, 6, 3), {"weight": ROWS, "bias": PLAIN}),
        (nn.ConvTranspose1d(4, 6, 3), {"weight": COLUMNS, "bias": PLAIN}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": COLUMNS, "bias": PLAIN}),
        (nn.ConvTranspose3d(4, 6, 3), {"weight": COLUMNS, "bias": PLAIN}),
        (nn.Bilinear(3, 4, 5), {"weight": ROWS, "bias": PLAIN}),
        (Conv1D(6, 4), {"weight": COLUMNS, "bias": PLAIN}),
        (nn.Embedding(7, 4), {"weight": ROWS}),
        (nn.EmbeddingBag(7, 4), {"weight": ROWS}),
        (nn.LSTM(4, 3, bias=False), {"weight_ih_l0": ROWS, "weight_hh_l0": ROWS}),
        (nn.BatchNorm2d(4), {"weight": PLAIN, "bias": PLAIN}),
        (nn.GRUCell(4, 3), {"weight_ih": ROWS, "weight_hh": ROWS, "bias_ih": PLAIN, "bias_hh": PLAIN}),
        (GainLinear(4, 3), {"weight": ROWS, "bias": PLAIN, "gain": PLAIN}),
        (WSConv2d(4, 3, 3, gain=True), {"weight": ROWS, "bias": PLAIN, "gain": PLAIN}),
        (nn.Linear(1, 5), {"weight": PLAIN, "bias": PLAIN}),
        (nn.Linear(2, 5), {"weight": PLAIN, "bias": PLAIN}),
        (nn.Linear(3, 5), {"weight": ROWS, "bias": PLAIN}),
        (nn.Conv1d(3, 3, 1, groups=3), {"weight": PLAIN, "bias": PLAIN}),
        (
            nn.MultiheadAttention(4, 2),
            {"in_proj_weight": ROWS, "in_proj_bias": PLAIN, "out_proj.weight": ROWS, "out_proj.bias": PLAIN},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_say_where_their_neurons_are(module, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(module) == expected


def test_split_attention_weights_rotate_too():
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    rotating = [name for name, kind in kinds(attention).items() if kind == ROWS]
    assert sorted(rotating) == ["k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight"]


def test_real_hugging_face_model_has_columns_for_neurons():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    found = kinds(model)
    assert found["transformer.h.0.attn.c_attn.weight"] == COLUMNS
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == ROWS
    assert kinds(model, include_head=False)["transformer.wte.weight"] == KEPT_OUT  # tied to the output layer
    assert kinds(model, include_head=False)["transformer.wpe.weight"] == ROWS


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.again = self.embedding


def test_tied_weights_appear_once_and_every_parameter_exactly_once():
    model = Tied()
    held = [p for group in rotational_param_groups(model, 0.1) for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters())) == 3


def test_any_name_of_a_tied_weight_excludes_it():
    for options in ({"exclude": ["head"]}, {"include_head": False}, {"include_embeddings": False}):
        assert kinds(Tied(), **options)["embedding.weight"] == KEPT_OUT


def test_exclusion_by_name_prefix_or_pattern_keeps_the_weight_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    assert kinds(model, exclude=["1.weight"])["1.weight"] == KEPT_OUT
    assert kinds(model, exclude="1")["1.weight"] == KEPT_OUT
    by_pattern = kinds(model, exclude=["[12].*"])
    assert (by_pattern["0.weight"], by_pattern["1.weight"], by_pattern["2.weight"]) == (ROWS, KEPT_OUT, KEPT_OUT)
    assert kinds(model, exclude=["1"])["1.bias"] == PLAIN


def test_the_head_is_the_last_linear_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 10), nn.LayerNorm(10))
    found = kinds(model, include_head=False)
    assert (found["0.weight"], found["1.weight"]) == (ROWS, KEPT_OUT)


def test_zero_initialised_and_frozen_tensors_do_not_rotate():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[0].weight)
    model[1].weight.requires_grad_(False)
    found = kinds(model)
    assert found["0.weight"] == PLAIN
    assert "1.weight" not in found
    assert found["2.weight"] == ROWS


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.proj = nn.Linear(4, 4)


def test_matrices_without_a_known_axis_are_reported_and_left_plain():
    with pytest.warns(UserWarning, match=r"position \(1, 5, 4\)"):
        assert kinds(Positions())["position"] == PLAIN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kinds(Positions(), exclude=["position"])["position"] == PLAIN
        assert kinds(Positions(), rotational={"position": 1})["position"] == COLUMNS


def test_grouped_transposed_convolutions_have_no_neuron_axis():
    with pytest.warns(UserWarning, match="weight"):
        assert kinds(nn.ConvTranspose1d(4, 6, 3, groups=2))["weight"] == PLAIN


def test_forced_tensors_win_over_the_rules():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert kinds(model, exclude=["1"], rotational={"1.weight": 1})["1.weight"] == COLUMNS
    assert kinds(model, exclude=["1"], rotational={"1.weight": 0})["1.weight"] == ROWS
    assert kinds(nn.Linear(2, 5), rotational={"weight": 0})["weight"] == ROWS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["haed"]}, "exclude='haed': matches no parameter"),
        ({"rotational": {"haed": 0}}, "rotational='haed': matches no parameter"),
        ({"rotational": {"weight": 2}}, r"rotational\['weight'\]=2: weight of shape \(3, 4\)"),
        ({"rotational": {"weight": -1}}, r"rotational\['weight'\]=-1"),
        ({"rotational": {"0": 0}}, "rotational='0': matches no parameter; allowed: a name such as 'weight'"),
        ({"rotational": {"bias": 0}}, r"bias of shape \(3,\) cannot turn"),
    ],
)
def test_what_matches_nothing_or_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        rotational_param_groups(nn.Linear(4, 3), 0.1, **options)


def test_negative_or_nan_weight_decay_is_refused():
    for decay in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay"):
            rotational_param_groups(nn.Linear(4, 3), decay)


def test_groups_feed_any_torch_optimizer_and_stay_apart_in_it():
    model = nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(rotational_param_groups(model, 0.1), lr=0.1)
    assert [(g["rotational"], g["weight_decay"], g["neuron_dim"]) for g in optimizer.param_groups] == [
        ROWS,
        COLUMNS,
        PLAIN,
    ]


def test_model_is_left_untouched_and_meta_models_are_grouped():
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    rotational_param_groups(model, 0.1)
    assert torch.equal(model.weight, before)
    with torch.device("meta"):
        assert kinds(nn.Linear(4, 3))["weight"] == ROWS


def test_rows_of_a_transposed_layout_are_its_output_neurons():
    layer = nn.ConvTranspose1d(4, 6, 3)
    axis = neuron_axes(layer)["weight"]
    rows = as_rows(layer.weight, axis)
    assert rows.shape == (6, 12)
    assert torch.equal(rows[2], layer.weight[:, 2].flatten())
    assert as_rows(layer.bias).shape == (6, 1)
    matrix = torch.randn(3, 4)
    assert torch.equal(as_rows(matrix), matrix) and torch.equal(as_rows(matrix, 1), matrix.T)
