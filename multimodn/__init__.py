"""MultiModN: Multimodal, Multi-Task, Interpretable Modular Networks (Swamy et al., NeurIPS 2023).

`MultiModN` passes a state through one encoder a modality and decodes every task from every state; a missing modality is
skipped. `PFusion` is the parallel baseline. `fit` trains one model or a `stack` of them; `missing="robust"` keeps the
absence of a modality from standing in for the label. `corruption` simulates missingness, `explain` reads contributions.
"""

from multimodn import corruption, explain, metrics
from multimodn.decoders import ClassDecoder, Decoder, MultiLabelDecoder, RegressionDecoder
from multimodn.encoders import ConvEncoder, GRUEncoder, HuggingFaceEncoder, MLPEncoder, RawEncoder, TransformerEncoder
from multimodn.fusion import PFusion
from multimodn.missing import Rule
from multimodn.model import MultiModN
from multimodn.network import Grid
from multimodn.persistence import load, register, save
from multimodn.stacking import stack, unstack
from multimodn.training import Rows, fit

__all__ = [
    "ClassDecoder",
    "ConvEncoder",
    "Decoder",
    "GRUEncoder",
    "Grid",
    "HuggingFaceEncoder",
    "MLPEncoder",
    "MultiLabelDecoder",
    "MultiModN",
    "PFusion",
    "RawEncoder",
    "RegressionDecoder",
    "Rows",
    "Rule",
    "TransformerEncoder",
    "corruption",
    "explain",
    "fit",
    "load",
    "metrics",
    "register",
    "save",
    "stack",
    "unstack",
]
