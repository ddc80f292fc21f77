"""Multiplication-free transformer training via piecewise affine operations (Kosson, Jaggi, 2023).

`pam_mul` and its relatives add the bit patterns of floats instead of multiplying their values; `pam_matmul` and the
`PAM…` modules and optimizers are made of them, `convert_to_mulfree` brings them into an existing network, and
`forbid_multiplications` proves that a training step contains no multiplication.
"""

from mulfree_training.attention import PAMAttention, pam_attention
from mulfree_training.convert import convert_to_mulfree
from mulfree_training.functional import (
    pam_cross_entropy,
    pam_dropout,
    pam_layer_norm,
    pam_log_softmax,
    pam_softmax,
)
from mulfree_training.modules import (
    PAMGELU,
    PAMConv1d,
    PAMConv2d,
    PAMCrossEntropy,
    PAMDropout,
    PAMLayerNorm,
    PAMLinear,
    PAMLogSoftmax,
    PAMSoftmax,
)
from mulfree_training.operations import operation_count
from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul
from mulfree_training.proof import MultiplicationError, count_multiplications, forbid_multiplications

__all__ = [
    "PAMGELU",
    "PAMSGD",
    "MultiplicationError",
    "PAMAdamW",
    "PAMAttention",
    "PAMConv1d",
    "PAMConv2d",
    "PAMCrossEntropy",
    "PAMDropout",
    "PAMLayerNorm",
    "PAMLinear",
    "PAMLogSoftmax",
    "PAMSoftmax",
    "convert_to_mulfree",
    "count_multiplications",
    "forbid_multiplications",
    "operation_count",
    "pam_attention",
    "pam_conv2d",
    "pam_cross_entropy",
    "pam_div",
    "pam_dropout",
    "pam_exp",
    "pam_exp2",
    "pam_layer_norm",
    "pam_linear",
    "pam_log",
    "pam_log2",
    "pam_log_softmax",
    "pam_matmul",
    "pam_mul",
    "pam_pow",
    "pam_softmax",
    "pam_sqrt",
]
