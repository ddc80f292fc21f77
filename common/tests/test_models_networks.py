"""Each network computes what its paper says: compared with torch.nn or transformers, or by its invariances."""

import pytest
import torch
from torch import Tensor, nn

from common.data.pairs import PADDING
from common.models import ModelConfig, build
from common.models.attention import PreNormBlock
from common.models.resnet import Block, ResNet
from common.models.stacked_conv import Conv2d
from common.models.translation import Layer, sinusoids

torch.set_num_threads(1)
TOLERANCE = 1000 * torch.finfo(torch.float64).eps


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def copy(target: nn.Module, source: nn.Module, names: tuple[str, ...] = ("weight", "bias")) -> None:
    with torch.no_grad():
        for name in names:
            getattr(target, name).copy_(getattr(source, name))


def grad_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_scales_change_their_own_gradient_and_nothing_else() -> None:
    x, scales = randn(8, 2, 40), [10.0, 1.0, 0.1, 0.01]
    plain = build(ModelConfig(channels=6), [0, 1]).double()
    scaled = build(ModelConfig(channels=6, gradient_scales=scales), [0, 1]).double()
    assert torch.equal(scaled(x), plain(x))
    expected, actual = grad_of(plain, x), grad_of(scaled, x)
    for name, grad in expected.items():
        factor = scales[int(name.split(".")[1])] if ".conv." in name else 1.0
        assert torch.equal(actual[name], grad * factor), name


def test_a_constant_on_the_initial_weights_before_a_norm_keeps_the_function() -> None:
    x = randn(8, 1, 40)
    plain = build(ModelConfig(channels=6), [0]).double()
    doubled = build(ModelConfig(channels=6, init_scale=64.0), [0]).double()
    assert torch.equal(doubled.blocks[2].conv.weight, 64 * plain.blocks[2].conv.weight)
    assert torch.equal(doubled.head.weight, plain.head.weight)
    # BatchNorm's eps of 1e-5 against pre-norm variances of order 0.01
    torch.testing.assert_close(doubled(x), plain(x), rtol=0, atol=0.01)
    assert not torch.equal(doubled(x), plain(x))


def test_a_branch_scaled_to_zero_leaves_the_shallow_network() -> None:
    x = randn(8, 1, 40)
    deep = build(ModelConfig(channels=6, depth=8, block_scales=[0.0, 0.0]), [0]).double()
    shallow = build(ModelConfig(channels=6), [0]).double()
    shallow.load_state_dict({k: v for k, v in deep.state_dict().items() if not k.startswith("residual")})
    assert torch.equal(deep(x), shallow(x))


def reference_layer(ours: PreNormBlock, bias: bool) -> nn.TransformerEncoderLayer:
    d = ours.qkv.in_features
    layer = nn.TransformerEncoderLayer(
        d, ours.n_head, 4 * d, 0.0, "gelu", ours.mlp_norm.eps, batch_first=True, norm_first=True, bias=bias
    ).double()
    names = ("weight", "bias") if bias else ("weight",)
    pairs = [
        (layer.self_attn.out_proj, ours.attention_out), (layer.linear1, ours.mlp_in), (layer.linear2, ours.mlp_out),
        (layer.norm1, ours.attention_norm), (layer.norm2, ours.mlp_norm),
    ]  # fmt: skip
    for target, source in pairs:
        copy(target, source, names)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(ours.qkv.weight)
        if bias:
            layer.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_transformer_block_is_torchs_pre_norm_encoder_layer(causal: bool, bias: bool) -> None:
    block = PreNormBlock(1, 12, 3, causal=causal, bias=bias).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = randn(1, 2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
    expected = reference_layer(block, bias)(x[0], src_mask=mask, is_causal=causal)
    actual = block(x)[0]
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_gpt_projections_into_the_residual_stream_start_smaller() -> None:
    block = build(ModelConfig(name="gpt", d_model=64, n_layer=8), [0]).blocks[0]
    # std of 4,096 to 16,384 normal draws: relative standard error below 1.2 %
    assert block.mlp_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention_out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.mlp_in.bias.any()


def test_gpt_sees_no_future_and_every_past_token() -> None:
    model = build(ModelConfig(name="gpt", vocab=11, d_model=8, n_head=2, context=6), [0, 1]).double()
    ids = torch.randint(11, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, :, 3] = (ids[:, :, 3] + 1) % 11
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert (before[:, :, 3:] != after[:, :, 3:]).any(-1).all()


def test_gpt_head_shares_the_embedding_only_when_tied() -> None:
    config = {"name": "gpt", "vocab": 11, "d_model": 8, "n_head": 2}
    tied, untied = build(ModelConfig(**config), [0]), build(ModelConfig(**config, tied=False), [0])
    assert tied.head.weight is tied.token.weight
    assert untied.head.weight is not untied.token.weight


def test_gpt_refuses_inputs_longer_than_its_context() -> None:
    with pytest.raises(ValueError, match="context=6"):
        build(ModelConfig(name="gpt", context=6), [0])(torch.zeros(1, 1, 7, dtype=torch.long))


def reference_attention(target: nn.MultiheadAttention, ours: nn.Module) -> None:
    with torch.no_grad():
        target.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        target.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    copy(target.out_proj, ours.out)


@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_translation_layers_are_torchs_post_norm_layers(decoder: bool) -> None:
    ours = Layer(1, 12, 20, 3, gains=False, dropout=0.0, decoder=decoder).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    theirs = kind(12, 3, 20, 0.0, batch_first=True).double()
    reference_attention(theirs.self_attn, ours.self_attention)
    norms = [(theirs.norm1, ours.self_norm), (theirs.norm3 if decoder else theirs.norm2, ours.out_norm)]
    if decoder:
        reference_attention(theirs.multihead_attn, ours.cross_attention)
        norms.append((theirs.norm2, ours.cross_norm))
    for target, source in [*norms, (theirs.linear1, ours.hidden), (theirs.linear2, ours.out)]:
        copy(target, source)
    x, memory = randn(1, 2, 5, 12), randn(1, 2, 4, 12) + 1
    hidden = torch.tensor([[False, False, True, True], [False, False, False, True]])
    if decoder:
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        expected = theirs(x[0], memory[0], tgt_mask=causal, memory_key_padding_mask=hidden)
        actual = ours(x, memory, ~hidden[:, None, None])[0]
    else:
        expected = theirs(memory[0], src_key_padding_mask=hidden)
        actual = ours(memory, mask=~hidden[:, None, None])[0]
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_translation_ignores_padding_and_sees_no_future() -> None:
    config = ModelConfig(name="translation", source_vocab=9, vocab=13, d_model=8, d_hidden=12, n_head=2)
    model = build(config, [0]).double()
    g = torch.Generator().manual_seed(0)
    source, target = torch.randint(2, 9, (1, 3, 4), generator=g), torch.randint(2, 13, (1, 3, 5), generator=g)
    logits = model(source, target)
    padded = model(torch.cat([source, torch.full((1, 3, 2), PADDING)], dim=2), target)
    assert (padded - logits).abs().max() < TOLERANCE
    target[..., 3] = 2 + (target[..., 3] - 1) % 11
    assert torch.equal(model(source, target)[:, :, :3], logits[:, :, :3])


def test_translation_embeds_tokens_scaled_by_sqrt_d_and_adds_positions() -> None:
    model = build(ModelConfig(name="translation", source_vocab=9, vocab=13, d_model=16, n_head=2), [0])
    ids = torch.tensor([[[2, 5, 3]]])
    expected = 4 * model.source.weight[ids] + sinusoids(3, 16)
    torch.testing.assert_close(model._embed(model.source, ids), expected)


def test_translation_projections_start_with_xavier_bounds() -> None:
    layer = Layer(1, 64, 64, 4, gains=False, dropout=0.0, decoder=False).self_attention
    bound = (6 / 128) ** 0.5
    # the largest of 4,096 uniform draws lies within 1 % of the bound
    assert layer.out.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert layer.query.weight.abs().max().item() == pytest.approx(bound / 2**0.5, rel=0.01)


def test_sinusoids_are_sine_and_cosine_of_geometric_frequencies() -> None:
    table = sinusoids(50, 8)
    frequency = torch.tensor([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    expected = torch.cat([torch.sin(17 * frequency), torch.cos(17 * frequency)])
    torch.testing.assert_close(table[17], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_is_the_one_of_transformers(block: str) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    expansion = 4 if block == "bottleneck" else 1
    theirs = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8 * expansion, 16 * expansion],
            depths=[1, 2],
            layer_type=block,
            num_labels=3,
        )
    ).double()
    ours = ResNet([0], 3, 3, channels=8, stages=[1, 2], block=block, stem="imagenet").double()
    embedder = theirs.resnet.embedder.embedder
    pairs = [(embedder.convolution, ours.stem[0]), (embedder.normalization, ours.stem[1])]
    layers = [layer for stage in theirs.resnet.encoder.stages for layer in stage.layers]
    for layer, own in zip(layers, ours.blocks, strict=True):
        steps = [(part.convolution, part.normalization) for part in layer.layer]
        own_steps = list(zip(own.convs, own.norms, strict=True))
        if own.shortcut is not None:
            steps.append((layer.shortcut.convolution, layer.shortcut.normalization))
            own_steps.append(tuple(own.shortcut))
        assert len(steps) == len(own_steps)
        for step, own_step in zip(steps, own_steps, strict=True):
            pairs += list(zip(step, own_step, strict=True))
    pairs.append((theirs.classifier[1], ours.head))
    for target, source in pairs:
        copy(target, source, ("weight",) if target.bias is None else ("weight", "bias"))
    x = randn(2, 3, 64, 64)
    expected = theirs.train()(x).logits
    assert (ours(x)[0] - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_a_pre_activation_block_whose_last_convolution_is_zero_is_the_identity() -> None:
    def new_conv(*shape: int) -> Conv2d:
        return Conv2d(1, *shape, bias=False)

    x = torch.randn(2, 4, 6, 6)
    for kind in ("basic", "bottleneck"):
        pre = Block(new_conv, nn.BatchNorm2d, kind, 4, 4, 1, pre_activation=True)
        post = Block(new_conv, nn.BatchNorm2d, kind, 4, 4, 1, pre_activation=False)
        for block in (pre, post):
            nn.init.zeros_(block.convs[-1].weight)
        assert torch.equal(pre(x), x)
        assert torch.equal(post(x), x.relu())


def test_a_pre_activation_shortcut_starts_from_the_activated_input() -> None:
    block = Block(lambda *shape: Conv2d(1, *shape, bias=False), nn.BatchNorm2d, "basic", 4, 6, 2, pre_activation=True)
    x = torch.randn(3, 4, 6, 6)
    active = block.norms[0](x).relu()
    expected = block.convs[1](block.norms[1](block.convs[0](active)).relu()) + block.shortcut(active)
    assert torch.equal(block(x), expected)
    assert expected.shape == (3, 6, 3, 3)


def test_he_initialisation_has_the_std_of_fan_out() -> None:
    stem = build(ModelConfig(name="resnet", in_channels=3, channels=64, stages=[1]), [0]).stem[0]
    # 1,728 normal draws: relative standard error 1.7 %
    assert stem.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.08)


def test_vgg_is_convolutions_pooling_and_two_dense_layers() -> None:
    ours = build(ModelConfig(name="vgg", in_channels=3, channels=4, stages=[1, 2], norm="bn"), [0]).double()
    layers: list[nn.Module] = []
    for c_in, c_out, pool in ((3, 4, True), (4, 8, False), (8, 8, True)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    dense = [nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    plain = nn.Sequential(*layers, *dense, nn.Linear(8, 10)).double()
    assert_same_function(ours, plain, randn(2, 3, 8, 8))


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
def test_mlp_is_linear_norm_relu(norm: str) -> None:
    ours = build(ModelConfig(name="mlp", in_channels=7, channels=6, depth=2, norm=norm), [0]).double()
    new_norm = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm, "none": nn.Identity}[norm]
    first, second = nn.Linear(7, 6, bias=norm == "none"), nn.Linear(6, 6, bias=norm == "none")
    norms = [new_norm(6), new_norm(6)]
    plain = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Linear(6, 10)).double()
    assert_same_function(ours, plain, randn(5, 7), nn.ModuleList([first, second, *norms, plain[-1]]))


def assert_same_function(ours: nn.Module, plain: nn.Module, x: Tensor, order: nn.Module | None = None) -> None:
    """With parameters copied in order, one model's logits equal those of the torch.nn network."""
    with torch.no_grad():
        for target, source in zip((order or plain).parameters(), ours.parameters(), strict=True):
            target.copy_(source)
    expected = plain(x)
    assert (ours(x)[0] - expected).abs().max() < TOLERANCE * max(1.0, expected.abs().max().item())


def test_vit_reads_every_patch_through_its_class_token() -> None:
    config = ModelConfig(name="vit", in_channels=1, image_size=8, patch_size=4, d_model=8, n_head=2)
    model, x = build(config, [0]).double(), randn(2, 1, 8, 8)
    for row in (0, 7):
        changed = x.clone()
        changed[:, :, row, row] += 1
        assert (model(changed) != model(x)).any(-1).all()
    assert (model(x.flip(3)) - model(x)).abs().max() > 1e-6
    for block in model.blocks:
        for branch in (block.attention_out, block.mlp_out):
            nn.init.zeros_(branch.weight)
    token = model.class_token.weight[0] + model.position.weight[0]
    expected = model.head(model.norm(token[None, None]))[0, 0]
    assert (model(x)[0] - expected).abs().max() < TOLERANCE


def test_standardized_convolutions_start_at_their_scaled_initial_weights() -> None:
    conv = build(ModelConfig(channels=6, weight_standardization=True, init_scale=0.1), [0]).double().blocks[1].conv
    centred = conv.weight - conv.weight.mean((1, 2), keepdim=True)
    # recorded in float32
    torch.testing.assert_close(conv.effective_weight(), centred, rtol=1e-5, atol=0)


def test_drop_path_skips_whole_samples_and_keeps_the_mean() -> None:
    block = PreNormBlock(2, 4, 2, drop_path=0.25)
    torch.manual_seed(0)
    kept = block._drop(torch.ones(2, 1000, 3, 4))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (kept == kept[:, :, :1, :1]).all()
    # mean of 2,000 Bernoulli draws over 0.75: standard error 0.013
    assert kept.mean().item() == pytest.approx(1, abs=0.06)
    assert (block.eval()._drop(torch.ones(2, 8, 3, 4)) == 1).all()


@pytest.mark.parametrize("name", ["gpt", "vit", "translation"])
def test_dropout_acts_in_training_only(name: str) -> None:
    shape = {"d_model": 8, "n_head": 2}
    image = {"in_channels": 1, "image_size": 8, "patch_size": 4} if name == "vit" else {}
    model = build(ModelConfig(name=name, **shape, **image, dropout=0.5), [0])
    x = [torch.randn(2, 1, 8, 8)] if name == "vit" else [torch.full((1, 2, 4), 5)] * (2 if name == "translation" else 1)
    assert not torch.equal(model(*x), model(*x))
    model.eval()
    assert torch.equal(model(*x), model(*x))
