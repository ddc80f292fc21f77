"""Encoders over sequences and images: formulas, rows apart, padding without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import (
    ClassDecoder,
    ConvEncoder,
    GRUEncoder,
    MLPEncoder,
    MultiModN,
    TransformerEncoder,
    load,
    save,
    stack,
)

S, B, T = 5, 6, 7
MAKE = {
    "gru": lambda: GRUEncoder(3, S, 4),
    "lstm": lambda: GRUEncoder(3, S, 4, layers=2, cell="lstm"),
    "rnn": lambda: GRUEncoder(3, S, 4, cell="rnn"),
    "transformer": lambda: TransformerEncoder(3, S, width=8, heads=2),
    "conv": lambda: ConvEncoder(1, S, (4, 8)),
}
SEQUENCES = ("gru", "lstm", "rnn", "transformer")
OPTIONS: dict[type[Any], dict[str, Any]] = {
    GRUEncoder: {"features": 3, "state_size": S, "hidden": 4, "layers": 2, "dropout": 0.25, "cell": "lstm"},
    TransformerEncoder: {"features": 3, "state_size": S, "width": 8, "heads": 2, "layers": 2, "feedforward": 12,
                         "dropout": 0.25, "max_length": 9},
    ConvEncoder: {"channels": 1, "state_size": S, "widths": [4, 8, 8]},
}  # fmt: skip


def data(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(B, 1, 6, 6, generator=rng) if kind == "conv" else torch.randn(B, T, 3, generator=rng)
    return torch.randn(B, S, generator=rng), x


@pytest.fixture(params=MAKE)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_rows_do_not_mix_and_both_inputs_count(kind: str) -> None:
    torch.manual_seed(0)
    encoder, (state, x) = MAKE[kind]().eval(), data(kind)
    whole = encoder(state, x)
    assert whole.shape == (B, S)
    order = torch.randperm(B)
    torch.testing.assert_close(encoder(state[order], x[order]), whole[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder(state[:2], x[:2]), whole[:2], rtol=0, atol=1e-6)
    for changed in (encoder(state + 1, x), encoder(state, x + 1)):
        assert (changed - whole).abs().amin(1).max() > 1e-4
    moved = x.clone()
    moved[0] += 1
    assert torch.equal(encoder(state, moved)[1:], whole[1:]) and not torch.equal(encoder(state, moved)[0], whole[0])


@pytest.mark.parametrize("kind", SEQUENCES, indirect=True)
def test_padding_at_the_end_does_not_matter(kind: str) -> None:
    torch.manual_seed(0)
    encoder, (state, x) = MAKE[kind]().eval(), data(kind)
    short = encoder(state, x[:, :4])
    padded = torch.cat([x[:, :4], torch.full((B, 3, 3), torch.nan)], 1)
    torch.testing.assert_close(encoder(state, padded), short, rtol=0, atol=1e-6)
    mixed = x.clone()
    mixed[2, 4:] = torch.nan
    found = encoder(state, mixed)
    torch.testing.assert_close(found[2], short[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], encoder(state, x)[0], rtol=0, atol=1e-6)
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(SEQUENCES),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    beyond=st.sampled_from([0.0, 7.0, -1e30, float("inf"), float("nan")]),
    column=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_a_ragged_batch_is_its_rows_alone(kind: str, lengths: list[int], beyond: float, column: int, seed: int) -> None:
    torch.manual_seed(seed)
    encoder, n = MAKE[kind]().eval(), len(lengths)
    state, x = torch.randn(n, S), torch.randn(n, 6, 3)
    for row, length in zip(x, lengths, strict=True):
        row[length:] = beyond  # whatever stands behind the first NaN does not count
        row[length, column] = torch.nan
    x.requires_grad_()
    found = encoder(state, x)
    for i, length in enumerate(lengths):
        alone = x[i : i + 1, :length] if length else torch.full((1, 1, 3), torch.nan)
        torch.testing.assert_close(found[i], encoder(state[i : i + 1], alone)[0], rtol=0, atol=1e-5)
    found.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(not x.grad[i, length:].any() for i, length in enumerate(lengths))


def test_a_sequence_without_steps_leaves_the_state_alone_to_speak() -> None:
    torch.manual_seed(0)
    encoder, (state, x) = MAKE["gru"]().eval(), data("gru")
    x[:, 0, 1] = torch.nan
    expected = torch.cat([torch.zeros(B, 4), state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x), expected, rtol=0, atol=1e-6)


def test_gru_is_its_equations() -> None:
    encoder, (state, x) = GRUEncoder(3, S, 4).double(), data("gru")
    state, x = state.double(), x.double()
    g = encoder.recurrent
    h = torch.zeros(B, 4, dtype=torch.float64)
    for t in range(T):
        from_x = (x[:, t] @ g.weight_ih_l0.T + g.bias_ih_l0).chunk(3, 1)
        from_h = (h @ g.weight_hh_l0.T + g.bias_hh_l0).chunk(3, 1)
        r, z = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
        h = (1 - z) * torch.tanh(from_x[2] + r * from_h[2]) + z * h
    expected = torch.cat([h, state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x), expected)


def test_convolutions_are_their_composition() -> None:
    encoder, (state, x) = ConvEncoder(1, S, (4, 8)).double(), data("conv")
    state, h = state.double(), x.double()
    for i, stride in ((0, 1), (3, 2)):
        conv, norm = encoder.body[i], encoder.body[i + 1]
        h = F.conv2d(h, conv.weight, conv.bias, stride=stride, padding=1)
        h = F.relu(F.group_norm(h, 4, norm.weight, norm.bias))
    expected = torch.cat([h.mean((2, 3)), state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x.double()), expected)


def test_the_transformer_is_its_equations() -> None:
    torch.manual_seed(0)
    encoder, (state, x) = TransformerEncoder(3, S, 8, 2, layers=2, feedforward=12).double(), data("transformer")
    assert [layer.linear1.out_features for layer in encoder.body.layers] == [12, 12]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.5)
    state, x = state.double(), x.double()
    tokens = x @ encoder.steps.weight.T + encoder.steps.bias + encoder.positions[:T]
    first = state @ encoder.start.weight.T + encoder.start.bias
    z = torch.cat([first[:, None], tokens], 1)  # (B, 1 + T, 8), the state in front, without a position
    counts = torch.arange(T + 1) < 5  # row 2 ends after 4 steps
    x[2, 4:] = torch.nan

    def norm(h: torch.Tensor, layer: Any) -> torch.Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    for layer in encoder.body.layers:
        attention = layer.self_attn
        q, k, v = (norm(z, layer.norm1) @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
        heads = []
        for a in (slice(0, 4), slice(4, 8)):
            scores = q[..., a] @ k[..., a].mT / 2.0  # sqrt of the head's width, 4
            scores[2] = scores[2].masked_fill(~counts, -torch.inf)
            heads.append(scores.softmax(-1) @ v[..., a])
        z = z + torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
        h = (norm(z, layer.norm2) @ layer.linear1.weight.T + layer.linear1.bias).relu()
        z = z + h @ layer.linear2.weight.T + layer.linear2.bias
    mixed = norm(z, encoder.body.norm)[:, 0]
    expected = torch.cat([mixed, state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x), expected)
    torch.testing.assert_close(encoder.eval()(state, x), expected)


def test_gradients(kind: str) -> None:
    encoder, (state, x) = MAKE[kind]().double(), data(kind)
    state, x = state[:2].double().requires_grad_(), x[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(encoder, (state, x))


@pytest.mark.parametrize("cls", OPTIONS)
def test_config_builds_the_same_encoder(cls: type[Any]) -> None:
    encoder, options = cls(**OPTIONS[cls]), OPTIONS[cls]
    assert encoder.config == options and encoder.state_size == S
    twin = cls(**json.loads(json.dumps(encoder.config)))
    twin.load_state_dict(encoder.state_dict())
    state, x = data("conv" if cls is ConvEncoder else "gru")
    assert torch.equal(twin.eval()(state, x), encoder.eval()(state, x))
    assert TransformerEncoder(3, S, width=12).config["feedforward"] == 24


@pytest.mark.parametrize("cls", [GRUEncoder, TransformerEncoder])
def test_dropout_acts_in_training_alone(cls: type[Any]) -> None:
    encoder, (state, x) = cls(**OPTIONS[cls]), data("gru")
    assert not torch.equal(encoder(state, x), encoder(state, x))
    encoder.eval()
    assert torch.equal(encoder(state, x), encoder(state, x))


def test_dropout_of_everything_hides_the_sequence_but_not_the_state() -> None:
    encoder, (state, x) = GRUEncoder(3, S, 4, dropout=1.0), data("gru")
    assert torch.equal(encoder(state, x), encoder(state, torch.zeros_like(x)))
    assert not torch.equal(encoder(state, x), encoder(state + 1, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_kept(kind: str, dtype: torch.dtype) -> None:
    encoder, (state, x) = MAKE[kind]().to(dtype).eval(), data(kind)
    found = encoder(state.to(dtype), x.to(dtype))
    assert found.dtype == dtype
    exact = encoder.double()(state.to(dtype).double(), x.to(dtype).double())
    # of a dozen roundings in a row, on numbers of size one
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_compiled_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    encoder, (state, x) = MAKE[kind]().eval(), data(kind)
    if kind in SEQUENCES:
        x[2, 4:] = torch.nan
    with torch._dynamo.config.patch(allow_rnn=True):  # torch refuses recurrent layers without it
        found = torch.compile(encoder, fullgraph=True, backend="eager")(state, x)
    torch.testing.assert_close(found, encoder(state, x), rtol=0, atol=1e-6)


def test_a_compiled_chain_is_saved_as_the_chain(tmp_path: Path) -> None:
    model = MultiModN({"x": MAKE["conv"]()}, {"yes": ClassDecoder(S)}, S).eval()
    twin = load(save(torch.compile(model, backend="eager"), tmp_path / "m"))  # type: ignore[arg-type]
    assert torch.equal(twin({"x": data("conv")[1]}).states, model({"x": data("conv")[1]}).states)


def test_stacked_models_are_the_models(kind: str) -> None:
    torch.manual_seed(0)
    models = [MultiModN({"x": MAKE[kind]()}, {"yes": ClassDecoder(S)}, S).eval() for _ in range(2)]
    x = torch.stack([data(kind)[1], data(kind)[1] + 1])
    if kind in SEQUENCES:
        x[1, 2, 4:] = torch.nan
    has = torch.ones(2, B, dtype=torch.bool)
    has[0, 3] = False
    together = stack(models)({"x": x}, {"x": has})
    for i, model in enumerate(models):
        alone = model({"x": x[i]}, {"x": has[i]})
        torch.testing.assert_close(together.states[i], alone.states, rtol=0, atol=1e-6)
    assert torch.equal(together.states[0, 1, 3], together.states[0, 0, 3]), "skipped"


def test_all_of_them_in_one_chain() -> None:
    encoders = {kind: make() for kind, make in MAKE.items()} | {"table": MLPEncoder(2, S)}
    model = MultiModN(encoders, {"yes": ClassDecoder(S)}, S).eval()
    x = {kind: data(kind)[1] for kind in MAKE} | {"table": torch.randn(B, 2)}
    x["conv"][1], x["gru"][2] = torch.nan, torch.nan
    grid = model(x)
    assert grid.states.isfinite().all() and grid.states.shape == (7, B, S)
    assert not grid.present[list(MAKE).index("conv"), 1] and not grid.present[0, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRUEncoder(0, S), "features=0"),
        (lambda: GRUEncoder(3, S, cell="gate"), "cell=gate: must be one of gru, lstm, rnn"),
        (lambda: TransformerEncoder(3, S, width=10, heads=4), "width=10: must be a multiple of heads=4"),
        (lambda: TransformerEncoder(3, S, max_length=0), "max_length=0: must be >= 1"),
        (lambda: TransformerEncoder(3, S, feedforward=0), "feedforward=0: must be >= 1"),
        (lambda: GRUEncoder(3, S, dropout=1.5), "dropout probability .* 1.5"),
        (lambda: ConvEncoder(1, S, (3,)), "multiples of 4"),
        (lambda: ConvEncoder(1, S, ()), "multiples of 4"),
        (lambda: MAKE["gru"]()(torch.zeros(2, S), torch.zeros(2, 3)), r"x.shape=\(2, 3\): must be \(B, T, 3\)"),
        (lambda: MAKE["transformer"]()(torch.zeros(2, S), torch.zeros(2, 4, 2)), r"\(B, T, 3\)"),
        (
            lambda: TransformerEncoder(3, S, 8, 2, max_length=3)(torch.zeros(2, S), torch.zeros(2, 4, 3)),
            "max_length=3",
        ),
        (lambda: MAKE["conv"]()(torch.zeros(2, S), torch.zeros(2, 3, 4, 4)), r"\(B, 1, H, W\)"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(B, S + 1), (B - 1, S), (S,), (1, B, S), (B, S, 1)])
def test_states_of_another_shape_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"state.shape=.*: must be \(B, {S}\), with as many rows as x"):
        MAKE[kind]()(torch.zeros(shape), data(kind)[1])
