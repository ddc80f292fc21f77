"""Adam for a stack of models of which each may skip an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multimodn.network import Network
from multimodn.stacking import OneByOne


class StackedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) over a stack of N models that leaves alone the encoders a model skipped.

    In plain PyTorch an encoder that is not called has no gradient (None), and Adam leaves its weights, moments and step
    count as they are. A stack computes all models at once, so an encoder that one model skipped gets a zero gradient
    instead, and Adam's momentum would go on moving it. Here every model's share of a parameter has its own step count.

    Args:
        model: a stack of MultiModN or PFusion.
        lr, betas, eps: as in `torch.optim.Adam`.
    """

    def __init__(
        self, model: Network, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.n_models = model.n_models or 1
        self.encoders = dict(model.encoders.items())
        groups: list[dict[str, Any]] = []
        for name, encoder in self.encoders.items():
            # encoders that run one by one have parameters of one model each
            parts = list(encoder.parts) if isinstance(encoder, OneByOne) else [encoder]
            for i, part in enumerate(parts):
                only = i if isinstance(encoder, OneByOne) else None
                groups.append({"params": list(part.parameters()), "encoder": name, "only": only})
        rest = [p for name, p in model.named_parameters() if not name.startswith("encoders.")]
        groups.append({"params": rest, "encoder": "", "only": None})
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": betas, "eps": eps})
        self.active: dict[str, Tensor] = {}

    def skip(self, present: Tensor, order: Sequence[str]) -> None:
        """Say which encoders the next step leaves alone.

        Args:
            present: (N, K, B) bool, the steps that were taken; a model without any took none.
            order: names of the K encoders. P-Fusion's grid has K = 0: none of its encoders is left alone.
        """
        self.active = {name: present[:, k].any(-1) for k, name in enumerate(order) if k < present.shape[1]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update what took part."""
        for group in self.param_groups:
            shares = 1 if group["only"] is not None else self.n_models
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["step"] = torch.zeros(shares, 1, dtype=torch.float64, device=p.device)
                    self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            on = self._active(group, params[0])
            for p in params:
                self.state[p]["step"].add_(on)
            count = self.state[params[0]]["step"].clamp_min(1)  # of all parameters of an encoder
            b1, b2 = group["betas"]
            first, second = ((1 - b**count).to(on.dtype) for b in (b1, b2))
            own, grads, m, v = (
                [x.view(shares, -1) for x in tensors]
                for tensors in (
                    params,
                    [p.grad for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                )
            )
            repeat = len(params)
            torch._foreach_lerp_(m, grads, [(1 - b1) * on] * repeat)
            torch._foreach_lerp_(v, torch._foreach_mul(grads, grads), [(1 - b2) * on] * repeat)
            scale = torch._foreach_div(v, [second] * repeat)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_addcdiv_(own, torch._foreach_mul(m, [on / first] * repeat), scale, value=-group["lr"])

    def _active(self, group: dict[str, Any], like: Tensor) -> Tensor:
        """1 for the models that update the group, else 0, (shares, 1)."""
        active = self.active.get(group["encoder"])
        if active is None:
            return torch.ones(
                1 if group["only"] is not None else self.n_models, 1, dtype=like.dtype, device=like.device
            )
        return (active if group["only"] is None else active[group["only"]]).to(like.dtype).view(-1, 1)
