"""Encoders over sequences and images: formulas, rows apart, padding without effect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multimodn import ClassDecoder, ConvEncoder, GRUEncoder, MLPEncoder, MultiModN, TransformerEncoder

S, B, T = 5, 6, 7
MAKE = {
    "gru": lambda: GRUEncoder(3, S, 4),
    "lstm": lambda: GRUEncoder(3, S, 4, layers=2, cell="lstm"),
    "rnn": lambda: GRUEncoder(3, S, 4, cell="rnn"),
    "transformer": lambda: TransformerEncoder(3, S, width=8, heads=2),
    "conv": lambda: ConvEncoder(1, S, (4, 8)),
}
SEQUENCES = ("gru", "lstm", "rnn", "transformer")


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


def test_the_transformer_knows_the_order_of_steps() -> None:
    torch.manual_seed(0)
    encoder, (state, x) = MAKE["transformer"]().eval(), data("transformer")
    with torch.no_grad():
        encoder.positions.normal_()
    assert not torch.allclose(encoder(state, x), encoder(state, x.flip(1)), atol=1e-3)


def test_gradients(kind: str) -> None:
    encoder, (state, x) = MAKE[kind]().double(), data(kind)
    state, x = state[:2].double().requires_grad_(), x[:2].double().requires_grad_()
    assert torch.autograd.gradcheck(encoder, (state, x))


def test_config_builds_the_same_encoder(kind: str) -> None:
    encoder = MAKE[kind]()
    twin = type(encoder)(**encoder.config)
    assert twin.config == encoder.config
    assert [p.shape for p in twin.parameters()] == [p.shape for p in encoder.parameters()]


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
        (lambda: ConvEncoder(1, S, (3,)), "multiples of 4"),
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
