"""The encoder around a transformer: rows apart, padding without effect, frozen backbones, a config that builds it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from multimodn import ClassDecoder, HuggingFaceEncoder, MLPEncoder, MultiModN, stack, unstack

S, B, T, VOCABULARY = 5, 6, 7, 20
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}


def backbone(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    from transformers import AutoModel, BertConfig, ViTConfig

    torch.manual_seed(seed)
    if kind == "tokens":
        settings: Any = BertConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 16} | SIZES | options)
    else:
        settings = ViTConfig(image_size=8, patch_size=4, num_channels=2, **SIZES | options)
    return AutoModel.from_config(settings)


def make(kind: str = "tokens", seed: int = 0, **options: Any) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(backbone(kind, seed), S, kind=kind, **options)


def data(kind: str = "tokens") -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    state = torch.randn(B, S, generator=rng)
    if kind == "tokens":
        return state, torch.randint(1, VOCABULARY, (B, T), generator=rng)
    return state, torch.randn(B, 2, 8, 8, generator=rng)


@pytest.fixture(params=["tokens", "pixels"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["first", "mean"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_is_linear_on_the_pooled_hidden_layer_and_the_state(kind: str, pool: str) -> None:
    encoder, (state, x) = make(kind, pool=pool).eval(), data(kind)
    hidden = encoder.backbone(**{"input_ids" if kind == "tokens" else "pixel_values": x}).last_hidden_state
    pooled = hidden[:, 0] if pool == "first" else hidden.mean(1)
    expected = torch.cat([pooled, state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x), expected, rtol=0, atol=1e-6)


def test_rows_do_not_mix_and_both_inputs_count(kind: str, pool: str) -> None:
    encoder, (state, x) = make(kind, pool=pool).eval(), data(kind)
    whole = encoder(state, x)
    assert whole.shape == (B, S)
    order = torch.randperm(B)
    torch.testing.assert_close(encoder(state[order], x[order]), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(state[:2], x[:2]), whole[:2], rtol=0, atol=1e-5)
    assert ((encoder(state + 1, x) - whole).abs().amax(1) > 1e-3).all()
    moved = x.clone()
    moved[0] = x[1]
    found = encoder(state, moved)
    torch.testing.assert_close(found[1:], whole[1:], rtol=0, atol=1e-5)
    assert (found[0] - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_does_not_matter(pool: str, padding: int) -> None:
    encoder, (state, x) = make(pool=pool, padding=padding).eval(), data()
    x[x == padding] = 1
    short = encoder(state, x[:, :4])
    padded = torch.cat([x[:, :4], torch.full((B, 3), padding)], 1)
    torch.testing.assert_close(encoder(state, padded), short, rtol=0, atol=1e-5)
    with_nan = torch.cat([x[:, :4].float(), torch.full((B, 3), torch.nan)], 1)
    assert torch.equal(encoder(state, with_nan), encoder(state, padded))
    mixed = x.clone()
    mixed[2, 4:] = padding
    found = encoder(state, mixed)
    torch.testing.assert_close(found[2], short[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], encoder(state, x)[0], rtol=0, atol=1e-5)
    assert (encoder(state, x)[2] - short[2]).abs().max() > 1e-3


def test_ids_may_be_floats_and_a_text_may_be_empty(pool: str) -> None:
    encoder, (state, x) = make(pool=pool).eval(), data()
    assert torch.equal(encoder(state, x.float()), encoder(state, x))
    x[1] = 0
    found = encoder(state, x)
    assert found.isfinite().all()
    found[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_a_frozen_backbone_stays_as_it_is(kind: str) -> None:
    encoder, (state, x) = make(kind, freeze=True), data(kind)
    before = copy.deepcopy(encoder.backbone.state_dict())
    assert encoder.train() is encoder and encoder.training and encoder.last.training
    assert not any(part.training for part in encoder.backbone.modules())
    assert torch.equal(encoder(state, x), encoder(state, x)), "no dropout"
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    encoder(state, x).square().sum().backward()
    assert all(p.grad is None for p in encoder.backbone.parameters())
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    # inside a model, through prediction and training
    model = MultiModN({"x": encoder}, {"yes": ClassDecoder(S)}, S).train()
    model.predict({"x": x})
    assert model.training and encoder.training and not any(part.training for part in encoder.backbone.modules())


def test_a_backbone_that_is_not_frozen_learns_and_has_dropout() -> None:
    encoder, (state, x) = make().train(), data()
    assert all(part.training for part in encoder.modules())
    assert not torch.equal(encoder(state, x), encoder(state, x))
    encoder(state, x).sum().backward()
    assert encoder.backbone.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"freeze": True, "pool": "mean", "padding": 3}])
def test_config_builds_the_same_encoder(kind: str, options: dict[str, Any]) -> None:
    encoder, (state, x) = make(kind, **options), data(kind)
    config = json.loads(json.dumps(encoder.config))
    assert config == encoder.config
    assert config["backbone"]["model_type"] == {"tokens": "bert", "pixels": "vit"}[kind]
    assert config["kind"] == kind and config["state_size"] == S and config["freeze"] is bool(options)
    given = copy.deepcopy(config)
    twin = HuggingFaceEncoder.from_config(config)
    assert config == given, "the argument is left alone"
    assert twin.config == encoder.config
    twin.load_state_dict(encoder.state_dict())
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in encoder.parameters()]
    assert torch.equal(twin.eval()(state, x), encoder.eval()(state, x))


def test_config_knows_the_attention_and_a_pooler_that_was_left_out() -> None:
    from transformers import AutoModel, BertConfig

    plain = AutoModel.from_config(
        BertConfig(vocab_size=VOCABULARY, **SIZES), add_pooling_layer=False, attn_implementation="eager"
    )
    twin = HuggingFaceEncoder.from_config(HuggingFaceEncoder(plain, S).config)
    assert [n for n, _ in twin.backbone.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert twin.backbone.config._attn_implementation == "eager"


def test_code_from_elsewhere_is_never_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    config, build, asked = make().config, AutoModel.from_config, []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options.get("trust_remote_code"))
        return build(*args, **options)

    monkeypatch.setattr(AutoModel, "from_config", spy)
    HuggingFaceEncoder.from_config(config)
    assert asked == [False]


def test_config_names_no_place_to_load_from() -> None:
    encoder = make()
    encoder.backbone.config._name_or_path = "/somewhere"
    encoder.backbone.config.auto_map = {"AutoModel": "other/code--model.Model"}
    config = encoder.config
    assert "somewhere" not in json.dumps(config) and "auto_map" not in json.dumps(config)
    unsafe = {"auto_map": {"AutoModel": "other/code--model.Model"}, "_attn_implementation_internal": "other/kernel"}
    config["backbone"] |= unsafe
    twin = HuggingFaceEncoder.from_config(config)
    assert type(twin.backbone) is type(encoder.backbone) and not hasattr(twin.backbone.config, "auto_map")
    assert twin.backbone.config._attn_implementation == encoder.backbone.config._attn_implementation


def test_convolutional_backbones() -> None:
    from transformers import AutoModel, ResNetConfig

    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_channels": 2}
    plain, (state, x) = AutoModel.from_config(ResNetConfig(**sizes)), data("pixels")
    encoder = HuggingFaceEncoder(plain, S, kind="pixels", pool="mean", freeze=True)
    expected = plain(pixel_values=x).last_hidden_state.mean((2, 3))
    expected = torch.cat([expected, state], 1) @ encoder.last.weight.T + encoder.last.bias
    torch.testing.assert_close(encoder(state, x), expected, rtol=0, atol=1e-6)
    encoder.pool = "first"
    with pytest.raises(ValueError, match="pool=first: must be mean"):
        encoder(state, x)


def test_a_backbone_of_half_the_precision() -> None:
    for kind in ("tokens", "pixels"):
        encoder, (state, x) = HuggingFaceEncoder(backbone(kind).bfloat16(), S, kind=kind).eval(), data(kind)
        found = encoder(state, x)
        assert found.dtype == torch.float32 and found.isfinite().all()


def test_in_a_chain_with_missing_texts_and_in_a_stack() -> None:
    def model(seed: int) -> MultiModN:
        encoders = {"text": make(seed=seed), "image": make("pixels", seed), "table": MLPEncoder(2, S)}
        return MultiModN(encoders, {"yes": ClassDecoder(S)}, S)

    models = [model(0).eval(), model(1).eval()]
    x = {"text": data()[1].float(), "image": data("pixels")[1], "table": torch.randn(B, 2)}
    x["text"][1], x["image"][2] = torch.nan, torch.nan
    grid = models[0](x)
    assert grid.present[:2].tolist() == [[b != 1 for b in range(B)], [b != 2 for b in range(B)]]
    assert torch.equal(grid.states[1, 1], grid.states[0, 1])
    models[0].loss(grid, {"yes": torch.zeros(B, dtype=torch.long)}).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in models[0].parameters())
    stacked = stack(models)
    together = stacked({name: value.expand(2, *value.shape) for name, value in x.items()})
    torch.testing.assert_close(together.states[0], grid.states, rtol=0, atol=1e-5)
    assert unstack(stacked)[1].encoders["text"].config == models[1].encoders["text"].config


def test_transformers_is_imported_only_when_a_config_is_asked() -> None:
    code = "import sys, multimodn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def pair() -> nn.Module:
    from transformers import AutoModel, BartConfig

    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return AutoModel.from_config(BartConfig(vocab_size=VOCABULARY, **sizes, **heads))


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **SIZES))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: HuggingFaceEncoder(backbone("tokens"), 0), "state_size=0: must be"),
        (lambda: HuggingFaceEncoder(backbone("tokens"), S, kind="text"), "kind=text: must be one of tokens, pixels"),
        (lambda: make(pool="last"), "pool=last: must be one of first, mean"),
        (lambda: HuggingFaceEncoder(nn.Linear(2, 2), S), "backbone=Linear: must be a model of transformers"),
        (lambda: HuggingFaceEncoder(pair(), S), "backbone=BartModel: must be an encoder alone"),
        (lambda: HuggingFaceEncoder(classifier(), S).config, "backbone=BertForSequenceClassification: must be BertM"),
        (lambda: make()(torch.zeros(2, S), torch.zeros(2, 3, 4)), r"x.shape=\(2, 3, 4\): must be \(B, T\)"),
        (lambda: make()(torch.zeros(2, S), torch.zeros(2, 0)), "T >= 1"),
        (lambda: make("pixels")(torch.zeros(2, S), torch.zeros(2, 3)), r"must be \(B, C, H, W\)"),
        (lambda: make()(torch.zeros(2, S + 1), torch.ones(2, 3)), r"state.shape=\(2, 6\): must be \(B, 5\)"),
        (lambda: HuggingFaceEncoder.from_config({"state_size": S}), "backbone=None: must be the config"),
        (lambda: HuggingFaceEncoder.from_config(make().config | {"attention": "a/b"}), "one of eager, sdpa"),
        (lambda: HuggingFaceEncoder.from_config({"backbone": {"model_type": "none"}, "state_size": S}), "none"),
    ],
)
def test_what_is_refused(make_it: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


def test_ids_that_floats_would_confuse_are_refused() -> None:
    big = HuggingFaceEncoder(backbone("tokens", vocab_size=300), S)
    with pytest.raises(ValueError, match="x.dtype=torch.bfloat16: must be .* to tell 300 tokens apart"):
        big(torch.zeros(2, S), torch.ones(2, 3, dtype=torch.bfloat16))
    assert big(torch.zeros(2, S), torch.ones(2, 3, dtype=torch.float16)).shape == (2, S)
