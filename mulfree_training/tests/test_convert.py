"""Conversion of existing networks: what is swapped, what stays the same object, what is reported, what is refused."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training.attention import PAMAttention
from mulfree_training.convert import convert_to_mulfree
from mulfree_training.modules import Arithmetic, PAMCrossEntropy, PAMLinear
from mulfree_training.optim import PAMAdamW
from mulfree_training.proof import forbid_multiplications


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def error(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).std() / expected.std()).item()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Net(nn.Module):
    """A user's network."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, dropout=dropout)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16))
        self.conv = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.ReLU())
        self.probabilities = nn.Softmax(-1)
        self.head = nn.Linear(16, 10)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(self.hidden(self.norm(x)))
        return self.head(self.probabilities(x))


def ids() -> Tensor:
    return torch.randint(10, (3, 5), generator=torch.Generator().manual_seed(1))


ALL = {
    "attention": "MultiheadAttention -> PAMAttention (products pam, normaliser pam)",
    "attention.out_proj": "NonDynamicallyQuantizableLinear -> PAMLinear",
    "norm": "LayerNorm -> PAMLayerNorm",
    "hidden.0": "Linear -> PAMLinear",
    "hidden.1": "GELU -> PAMGELU",
    "hidden.2": "Dropout -> PAMDropout",
    "hidden.3": "Linear -> PAMLinear",
    "conv.0": "Conv1d -> PAMConv1d",
    "probabilities": "Softmax -> PAMSoftmax",
    "head": "Linear -> PAMLinear",
}


def test_everything_is_converted_and_stays_itself():
    net = Net().eval()
    before = dict(net.named_modules())
    parameters, state = dict(net.named_parameters()), copy.deepcopy(net.state_dict())
    expected = net(ids())
    report = convert_to_mulfree(net, strict=True, derivative="exact", alpha=1.02, backend="reference")
    assert report.converted == ALL and not report.left and not report.warnings
    assert all(after is before[path] and not after.training for path, after in net.named_modules())
    assert all(after is parameters[name] for name, after in net.named_parameters())
    assert net.head.weight is net.embed.weight
    for module in net.modules():
        if isinstance(module, Arithmetic):
            assert module.arithmetic == {"derivative": "exact", "alpha": 1.02, "backend": "reference"}
    assert list(net.state_dict()) == list(state)
    Net().load_state_dict(net.state_dict())
    out = net(ids())
    assert 0 < error(out, expected) < 0.15


def test_converting_twice_changes_nothing_and_a_wider_scope_adds():
    net, whole = Net(), Net()
    whole.load_state_dict(net.state_dict())
    convert_to_mulfree(whole)
    first = convert_to_mulfree(net, "matmul")
    assert net.attention.products == "pam" and net.attention.normaliser == "standard"
    again = convert_to_mulfree(net, "matmul")
    assert not again.converted and again.left == first.left
    for word in ("norm", "softmax", "activation"):
        assert convert_to_mulfree(net, [word]).converted
    assert same_bits(net(ids()), whole(ids()))
    final = convert_to_mulfree(net, strict=True)
    assert not final.converted and not final.left


@pytest.mark.parametrize(
    ("scope", "paths"),
    [
        ("matmul", {"attention", "attention.out_proj", "hidden.0", "hidden.3", "conv.0", "head"}),
        ("softmax", {"attention", "hidden.2", "probabilities"}),
        ("norm", {"norm"}),
        ("activation", {"hidden.1"}),
    ],
)
def test_the_scope_chooses_and_the_rest_is_listed(scope, paths):
    net = Net()
    report = convert_to_mulfree(net, (scope,))
    assert set(report.converted) == paths
    # attention has two halves; an unconverted one does not run its last layer as a module
    halves = {"attention"} if scope in ("matmul", "softmax") else set()
    hidden = {"attention.out_proj"} if scope in ("norm", "activation") else set()
    assert set(report.left) == set(ALL) - paths - hidden | halves
    assert all("outside the scope" in why for why in report.left.values())
    table = str(report).splitlines()
    assert table[-1] == f"{len(paths)} converted, {len(report.left)} left"
    assert any(line.startswith("left") and "outside the scope" in line for line in table)
    with pytest.raises(ValueError, match="strict=True: modules that multiply would be left: .*outside the scope"):
        convert_to_mulfree(Net(), (scope,), strict=True)


def test_half_converted_attention_uses_what_it_says():
    for scope, products, normaliser, kind in (
        ("matmul", "pam", "standard", PAMLinear),
        ("softmax", "standard", "pam", type(nn.MultiheadAttention(2, 1).out_proj)),
    ):
        net = Net()
        convert_to_mulfree(net, scope)
        assert type(net.attention) is PAMAttention and type(net.attention.out_proj) is kind
        assert (net.attention.products, net.attention.normaliser) == (products, normaliser)


def test_skipped_modules_stay_with_all_below_them():
    net = Net()
    report = convert_to_mulfree(net, skip=("hidden*", "attention"))
    assert report.left == {"attention": "skipped", "hidden": "skipped"}
    assert type(net.hidden[0]) is nn.Linear and type(net.attention) is nn.MultiheadAttention
    assert type(net.head) is PAMLinear
    net = Net()
    convert_to_mulfree(net, skip="attention.out_proj")
    assert type(net.attention) is PAMAttention and not isinstance(net.attention.out_proj, PAMLinear)


def test_strict_refuses_before_anything_is_changed():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU())
    with pytest.raises(ValueError, match=r"left: 1: BatchNorm1d, no piecewise.*; 2: SiLU"):
        convert_to_mulfree(net, strict=True)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.GroupNorm(2, 4), "no piecewise affine version"),
        (nn.LSTM(3, 3), "no piecewise affine version"),
        (nn.AvgPool2d(2), "no piecewise affine version"),
        (nn.ConvTranspose2d(2, 2, 2), "no piecewise affine version"),
        (nn.Softmax(None), "without dim"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.EmbeddingBag(3, 3, mode="mean"), "mode='mean'"),
        (nn.CrossEntropyLoss(), "use PAMCrossEntropy"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "a Linear with code of its own"),
    ],
)
def test_what_multiplies_and_cannot_be_converted_is_left(module, why):
    report = convert_to_mulfree(nn.Sequential(module))
    assert why in report.left["0"] and not report.converted


@pytest.mark.parametrize("module", [nn.ReLU(), nn.MaxPool2d(2), nn.Embedding(3, 3), nn.Flatten(), nn.Identity()])
def test_what_does_not_multiply_is_not_mentioned(module):
    report = convert_to_mulfree(nn.Sequential(module), strict=True)
    assert not report.converted and not report.warnings


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.gain


class Swish(nn.Module):
    def forward(self, x):
        return F.silu(x)


class Halved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU())

    def forward(self, x):
        return self.inner(x).mean(-1) / 2


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_modules_of_users_are_left_or_warned_of():
    net = nn.Sequential(Gain(), Swish(), Halved(), Halved(), OwnLinear(3, 3), OwnAttention(4, 2))
    report = convert_to_mulfree(net)
    assert report.left == {
        "0": "Gain, an unknown module with parameters",
        "1": "Swish, its forward calls silu",
        "2": "Halved, its forward calls mean",
        "3": "Halved, its forward calls mean",
        "4": "OwnLinear, a Linear with code of its own",
        "5": "OwnAttention, a MultiheadAttention with code of its own",
    }
    assert report.warnings == ["2: forward of Halved has /"]
    assert type(net[4]) is OwnLinear


def test_a_model_that_is_itself_a_layer_is_converted_in_place():
    layer = nn.Linear(3, 2)
    report = convert_to_mulfree(layer)
    assert type(layer) is PAMLinear and report.converted == {"": "Linear -> PAMLinear"}
    assert "(the model)" in str(report)


def test_shared_modules_hooks_dtype_and_optimizers_go_on():
    shared = nn.Linear(4, 4, dtype=torch.bfloat16)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    report = convert_to_mulfree(net)
    assert list(report.converted) == ["0"] and net[0] is net[2] is shared
    before = shared.weight.detach().clone()
    net(torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
    assert len(calls) == 2 and shared.weight.dtype is torch.bfloat16
    optimizer.step()
    assert not torch.equal(shared.weight, before)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("scope", [("norm",), ("matmul", "softmax", "norm", "activation")])
def test_fused_inference_of_pytorchs_encoder_does_not_go_round_converted_modules(activation, scope):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation=activation, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(3, 6, 16), torch.arange(6)[None] >= torch.tensor([[6], [4], [2]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        expected = net(x, src_key_padding_mask=padding)[~padding]
    report = convert_to_mulfree(net, scope)
    assert ("layers.0.activation" in report.converted) == (activation == "gelu" and "activation" in scope)
    with torch.no_grad():
        out = net(x, src_key_padding_mask=padding)[~padding]
        plain = net(x)
    assert 0 < error(out, expected) < 0.15
    # with gradients PyTorch never takes the fused path; ordinary attention has another one, which may round otherwise
    torch.testing.assert_close(out, net(x, src_key_padding_mask=padding).detach()[~padding], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, net(x).detach(), rtol=1e-4, atol=1e-5)
    if len(scope) == 4:
        assert same_bits(plain, net(x).detach())
        with forbid_multiplications(), torch.no_grad():
            net(x, src_key_padding_mask=padding)


def test_pytorchs_transformer_is_converted_whole():
    net = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    mask = net.generate_square_subsequent_mask(5)
    expected = net(source, target, tgt_mask=mask)
    convert_to_mulfree(net, strict=True)
    out = net(source, target, tgt_mask=mask)
    assert 0 < error(out, expected) < 0.15
    changed = target.clone()
    changed[:, 3:] = 1.0
    assert same_bits(out[:, :3], net(source, changed, tgt_mask=mask)[:, :3])


def test_an_activation_function_outside_the_scope_is_listed():
    layer = nn.TransformerDecoderLayer(8, 2, 8, activation=F.silu)
    assert convert_to_mulfree(layer).left == {"activation": "function silu"}
    layer = nn.TransformerEncoderLayer(8, 2, 8, activation="gelu")
    assert convert_to_mulfree(layer, "matmul").left["activation"] == "function gelu, outside the scope"


def test_a_whole_step_of_a_converted_network_multiplies_nothing_and_learns():
    net = Net(dropout=0.25)
    convert_to_mulfree(net, strict=True)
    loss, optimizer = PAMCrossEntropy(label_smoothing=0.1), PAMAdamW(net.parameters(), 0.02, scalars="pam")
    target, losses = ids().flip(1), []
    for _ in range(20):
        with forbid_multiplications():
            value = loss(net(ids()).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        ({"scope": ()}, ValueError, r"scope=\(\): must be some of matmul, softmax, norm, activation"),
        ({"scope": ("matmul", "loss")}, ValueError, r"scope=\('matmul', 'loss'\): must be some of"),
        ({"skip": "haed"}, ValueError, "skip='haed': must fit the path of a module"),
        ({"derivative": "true"}, ValueError, "derivative='true': must be one of approx, exact"),
        ({"alpha": 3.0}, ValueError, "alpha=3.0: must be in"),
        ({"backend": "gpu"}, ValueError, "backend='gpu': must be one of"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_changed(call, kind, message):
    net = Net()
    with pytest.raises(kind, match=message):
        convert_to_mulfree(net, **call)
    assert not any(isinstance(m, Arithmetic) for m in net.modules())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model of type str: must be a torch.nn.Module"):
        convert_to_mulfree("gpt2")
