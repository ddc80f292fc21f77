"""torch.compile with its default backend, which generates and compiles code of its own around our operators."""

import pytest
import torch
from torch import nn

from common.kernels.native import compiler
from mulfree_training.modules import PAMLayerNorm, PAMLinear, PAMSoftmax
from mulfree_training.tests.bitwise import assert_same, ordinary


@pytest.mark.skipif(compiler("c++") is None, reason="needs a C++ compiler")
def test_layers_under_the_default_backend_give_the_same_bits():
    torch.compiler.reset()
    torch.manual_seed(0)
    net = nn.Sequential(PAMLinear(6, 5), PAMSoftmax(-1), PAMLayerNorm(5))
    grad = ordinary(2, 5, seed=1, octaves=2)  # two rows, for the order of a sum of two is no matter
    results = []
    for run in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        x = ordinary(2, 6, seed=2, octaves=2).requires_grad_()
        out = run(x)
        out.backward(grad)
        results.append([out, x.grad, *(p.grad for p in net.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert_same(compiled, eager)
