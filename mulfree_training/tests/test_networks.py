"""The networks compute what their papers say: against hand-written formulas, and by their invariances."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.pairs import PADDING
from mulfree_training.config import NETWORKS, ModelConfig
from mulfree_training.networks.blocks import Block, DropPath, Scale, causal_mask, initialise
from mulfree_training.networks.build import REGISTRY, build
from mulfree_training.networks.convolutional import VGG13, ConvMixer, PlainConvNet, PreActResNet
from mulfree_training.networks.gpt import GPT
from mulfree_training.networks.translation import Translation, sinusoids
from mulfree_training.networks.vit import ViT

TOLERANCE = 1000 * torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def doubles() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE * (1 + b.abs().max())).all())


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight + layer.bias


def attention(layer: nn.MultiheadAttention, x: Tensor, memory: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Softmax attention by loops over samples and heads; `hidden` (B, T, S) is True where nothing may be seen."""
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = (y @ w.T + b for y, w, b in zip((x, memory, memory), weights, biases, strict=True))
    size, out = layer.head_dim, torch.empty_like(q)
    for i in range(len(x)):
        for j in range(layer.num_heads):
            part = slice(j * size, (j + 1) * size)
            scores = q[i, :, part] @ k[i, :, part].T / math.sqrt(size)
            if hidden is not None:
                scores = scores.masked_fill(hidden[i], -math.inf)
            out[i, :, part] = scores.softmax(-1) @ v[i, :, part]
    return out @ layer.out_proj.weight.T + layer.out_proj.bias


def by_hand(block: Block, x: Tensor, memory: Tensor | None, masks: dict[str, Tensor | None]) -> Tensor:
    def branch(x: Tensor, layer: Any, y: Any) -> Tensor:
        return x + y(norm(x, layer)) if block.pre_norm else norm(x + y(x), layer)

    x = branch(x, block.attention_norm, lambda y: attention(block.attention, y, y, masks["own"]))
    if memory is not None:
        x = branch(x, block.cross_norm, lambda y: attention(block.cross, y, memory, masks["memory"]))
    activate = F.gelu if isinstance(block.activation, nn.GELU) else torch.relu
    w1, w2 = block.hidden, block.out
    return branch(x, block.out_norm, lambda y: activate(y @ w1.weight.T + w1.bias) @ w2.weight.T + w2.bias)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("cross", [False, True])
def test_a_block_is_attention_and_a_hidden_layer_with_norms_before_or_after(
    pre_norm: bool, activation: str, cross: bool
) -> None:
    block = Block(8, 2, 12, activation, pre_norm=pre_norm, cross=cross, eps=1e-3)
    for layer in (block.attention_norm, block.out_norm, *([block.cross_norm] if cross else [])):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    nn.init.normal_(block.attention.in_proj_bias)
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8) if cross else None
    padding, memory_padding = torch.zeros(2, 5).bool(), torch.zeros(2, 4).bool()
    padding[1, 3:] = memory_padding[0, 2:] = True
    own = causal_mask(5, x.device) | padding[:, None]
    masks = {"own": own, "memory": memory_padding[:, None].expand(2, 5, 4)}
    found = block(x, causal_mask(5, x.device), padding, memory, memory_padding if cross else None)
    assert close(found, by_hand(block, x, memory, masks))
    plain = by_hand(block, x, memory, {"own": None, "memory": None})
    assert close(block(x, memory=memory), plain) and not close(found, plain)


def test_the_causal_mask_hides_what_comes_later() -> None:
    assert causal_mask(3, torch.device("cpu")).tolist() == [[False, True, True], [False, False, True], [False] * 3]


@pytest.mark.parametrize("pre_norm", [True, False])
def test_drop_path_skips_branches_of_whole_samples_and_scales_the_others(pre_norm: bool) -> None:
    layer, x = DropPath(0.25), torch.randn(2000, 3, 4)
    out = layer(x)
    kept = (out != 0).flatten(1).any(1)
    assert torch.equal(out[~kept], torch.zeros_like(out[~kept])) and close(out[kept], x[kept] / 0.75)
    assert abs(float(kept.double().mean()) - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert layer.eval()(x) is x and DropPath(0.0)(x) is x
    block = Block(4, 1, 4, pre_norm=pre_norm, drop_path=0.999)
    skipped = block(x[:5])
    once = x[:5] if pre_norm else block.out_norm(block.attention_norm(x[:5]))
    assert close(skipped, once)  # a thousandth of a chance to be kept, ten times


def test_dropout_is_on_every_branch_and_off_in_evaluation() -> None:
    block, x = Block(8, 2, 8, dropout=0.5), torch.randn(2, 3, 8)
    assert not torch.equal(block(x), block(x)) and torch.equal(block.eval()(x), block(x))


def test_scale_multiplies_by_a_constant_with_a_product_that_can_be_replaced() -> None:
    scale, x = Scale(3.0), torch.randn(4)
    assert torch.equal(scale(x), 3 * x)
    scale.product = lambda x, factor: x + factor
    assert torch.equal(scale(x), x + 3)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: ViT(3, 7, 12, 4, 8, 2, 2, 8), (2, 3, 12, 12)),
        (lambda: PlainConvNet(3, 7, (4, 0, 6)), (2, 3, 9, 8)),
        (lambda: PlainConvNet(3, 7, VGG13[:6]), (2, 3, 8, 8)),
        (lambda: PreActResNet(3, 7, 8, 4), (2, 3, 12, 12)),
        (lambda: PreActResNet(3, 7, 11, 8, 4), (2, 3, 12, 12)),
        (lambda: ConvMixer(3, 7, 8, 2, 3, 2), (2, 3, 8, 8)),
    ],
)
def test_images_become_class_scores(model: Any, shape: tuple[int, ...]) -> None:
    network = model()
    assert network(torch.randn(shape)).shape == (2, 7)
    network(torch.randn(shape)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_vit_reads_its_class_token_after_the_last_norm() -> None:
    model = ViT(1, 3, 4, 2, 8, 1, 2, 12)
    images = torch.randn(2, 1, 4, 4)
    patches = torch.stack([images[:, 0, i : i + 2, j : j + 2].flatten(1) for i in (0, 2) for j in (0, 2)], 1)
    x = patches @ model.patches.weight.flatten(1).T + model.patches.bias
    x = torch.cat([model.class_token.expand(2, 1, 8), x], 1) + model.position
    x = by_hand(model.blocks[0], x, None, {"own": None})
    expected = norm(x, model.norm)[:, 0] @ model.head.weight.T + model.head.bias
    assert close(model(images), expected)


def test_drop_path_rises_linearly_to_its_last_block() -> None:
    rates = [block.drop_path.p for block in ViT(n_layer=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [block.drop_path.p for block in ViT(n_layer=1, drop_path=0.2).blocks] == [0]


def test_a_gpt_sees_no_later_token_and_its_position() -> None:
    model = GPT(11, 6, 8, 2, 2, 8)
    ids = torch.randint(11, (2, 6))
    before, changed = model(ids), ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11
    after = model(changed)
    assert before.shape == (2, 6, 11) and torch.equal(before[:, :3], after[:, :3])
    assert not close(before[:, 3:], after[:, 3:]) and close(model(ids[:, :4]), before[:, :4])
    same = model(torch.full((1, 6), 5))[0]
    assert not close(same[0], same[1])  # positions tell equal tokens apart
    assert model.head.weight is model.token.weight
    with pytest.raises(ValueError, match="ids of length 7: must be <= context=6"):
        model(torch.zeros(1, 7).long())


def test_padding_changes_no_translation_and_the_decoder_sees_no_later_token() -> None:
    model = Translation(9, 13, 8, 2, 2, 8)
    source, target = torch.randint(2, 9, (3, 4)), torch.randint(2, 13, (3, 5))
    logits = model(source, target)
    assert logits.shape == (3, 5, 13)
    padded = model(torch.cat([source, torch.full((3, 2), PADDING)], 1), target)
    assert close(padded, logits)
    longer = model(source, torch.cat([target, torch.full((3, 2), PADDING)], 1))
    assert close(longer[:, :5], logits)
    target[:, 3] = 2 + (target[:, 3] - 1) % 11
    other = model(source, target)
    assert close(other[:, :3], logits[:, :3]) and not close(other[:, 3:], logits[:, 3:])
    assert not close(model(source.flip(1), target), other)


def test_a_translation_is_an_encoder_and_a_decoder_of_post_norm_layers() -> None:
    model = Translation(9, 13, 8, 1, 2, 12).eval()
    source, target = torch.tensor([[4, 5, 2, PADDING], [6, 7, 8, 2]]), torch.randint(2, 13, (2, 3))
    positions = sinusoids(4, 8, source.device).double()

    def embed(table: nn.Embedding, ids: Tensor) -> Tensor:
        return math.sqrt(8) * table.weight[ids] + positions[: ids.shape[1]]

    padding = source == PADDING
    own = padding[:, None].expand(2, 4, 4)
    memory = by_hand(model.encoder[0], embed(model.source, source), None, {"own": own})
    masks = {"own": causal_mask(3, source.device).expand(2, 3, 3), "memory": padding[:, None].expand(2, 3, 4)}
    x = by_hand(model.decoder[0], embed(model.target, target), memory, masks)
    assert close(model(source, target), x @ model.target.weight.T)
    assert not model.encoder[0].pre_norm and model.head.weight is model.target.weight


def test_positions_are_sines_and_cosines_of_falling_frequencies() -> None:
    table = sinusoids(50, 8, torch.device("cpu")).double()
    assert table[0].tolist() == [0] * 4 + [1] * 4
    frequencies = torch.tensor([1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3), 1e-4])
    angles = torch.arange(50.0)[:, None] * frequencies
    assert (table - torch.cat([angles.sin(), angles.cos()], 1)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="model.d_model=7: must be even"):
        Translation(d_model=7, n_head=1)


def test_initial_weights_have_their_sizes() -> None:
    block = Block(64, 4, 128)
    initialise(block, 0.1)
    for weight in (block.hidden.weight, block.out.weight, block.attention.in_proj_weight):
        assert weight.abs().max() <= 0.2  # cut at two standard deviations, which leaves 0.88 of one
        assert abs(float(weight.detach().std()) - 0.088) < 0.003 and abs(float(weight.detach().mean())) < 0.005
    assert not block.hidden.bias.any() and not block.attention.in_proj_bias.any()
    vit = ViT(std=0.1, d_model=64)
    assert 0.07 < vit.position.std() < 0.1 and 0.07 < GPT(std=0.1).token.weight.std() < 0.1
    model = Translation(500, 500, 64, 1, 4, 128)
    assert abs(float(model.target.weight[2:].detach().std()) - 1 / 8) < 0.005 and not model.source.weight[PADDING].any()
    for weight in model.encoder[0].attention.in_proj_weight.chunk(3):
        bound = math.sqrt(6 / 128) / math.sqrt(2)
        assert 0.95 * bound < weight.abs().max() <= bound
    net = PlainConvNet(1, 10, (64, 64))
    assert abs(float(net.features[2].weight.detach().std()) - math.sqrt(2 / (64 * 9))) < 0.003


def test_a_residual_network_has_its_layers_and_strides() -> None:
    plain, grouped = PreActResNet(3, 10, 20, 16), PreActResNet(3, 10, 20, 8, 4)
    count = lambda net: sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in net.modules())  # noqa: E731
    assert count(plain) == 19 and count(grouped) == 7
    assert [m.groups for m in grouped.modules() if isinstance(m, nn.Conv2d) and m.groups > 1] == [4] * 6
    sizes = [tuple(plain.blocks[:i](plain.stem(torch.randn(1, 3, 16, 16))).shape[1:]) for i in (3, 6, 9)]
    assert sizes == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
    assert grouped.head.in_features == 8 * 4 * 4
    with pytest.raises(ValueError, match=r"model.depth=21: must be 6 n \+ 2 for model.groups=1"):
        PreActResNet(depth=21)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_draws_the_weights_and_torchs_generator_stays(name: str) -> None:
    config = ModelConfig(name=name)
    state = torch.get_rng_state()
    first, again, other = build(config, 3), build(config, 3), build(config, 4)
    assert torch.equal(torch.get_rng_state(), state) and type(first) is REGISTRY[name]
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs) and any(not torch.equal(a, c) for a, _, c in pairs)


def test_keys_that_a_network_does_not_read_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.vocab=5: vit does not read it; it reads in_channels, classes"):
        build(ModelConfig(vocab=5), 0)
    with pytest.raises(ValueError, match=r"model.layout=\[4\]: gpt does not read it; it reads vocab, context"):
        build(ModelConfig(name="gpt", layout=[4]), 0)
    count = sum(p.numel() for p in build(ModelConfig(), 0).parameters())
    with pytest.raises(ValueError, match=f"model.expected_parameters=7: the network has {count} parameters"):
        build(ModelConfig(expected_parameters=7), 0)
    build(ModelConfig(expected_parameters=count), 0)


def test_every_key_of_the_config_is_read_by_some_network() -> None:
    import inspect

    read = {key for network in REGISTRY.values() for key in inspect.signature(network).parameters}
    assert read == {field.name for field in dataclasses.fields(ModelConfig)} - {"name", "expected_parameters"}
