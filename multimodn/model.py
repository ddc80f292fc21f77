"""MultiModN: a chain of encoders over named modalities, every task decoded after each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.config import check
from multimodn.batch import Batch, Inputs, Masks
from multimodn.network import Grid, Network


class MultiModN(Network):
    """Sequential modular fusion: s_k = e_k(s_{k-1}, x_k), skipped where x_k is missing; every task reads every state.

    A missing modality is neither padded nor imputed: the state passes unchanged, and the last row of the grid is the
    prediction after the last modality that a sample has.

    Args:
        encoders: modality -> module `forward(state, x) -> state`, in the chain's order; may be empty (a prior model).
        decoders: task -> `multimodn.decoders.Decoder`.
        state_size: S.
        missing: which samples skip an encoder whose modality is missing somewhere in the batch. `sample`: those that
            lack it; predictions do not depend on the batch. `batch`: all samples of the batch, as the official code
            does; training then practically ignores a modality that is often missing (see the paper's README).
        initial_state: (S,) fixed start; None: a trained one, drawn from N(0, 1).

    Raises:
        ValueError: no decoder, or sizes that do not fit, with the modality or task named.
    """

    stackable_parameters = ("initial_state",)

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        decoders: Mapping[str, nn.Module],
        state_size: int,
        *,
        missing: str = "sample",
        initial_state: Tensor | None = None,
    ) -> None:
        super().__init__(missing)
        check("state_size", state_size, state_size >= 1, ">= 1")
        check("decoders", "{}", len(decoders) > 0, "at least one decoder")
        self.state_size = state_size
        if initial_state is not None:
            check("initial_state.shape", tuple(initial_state.shape), initial_state.shape == (state_size,), "(S,)")
            self.register_buffer("initial_state", initial_state.detach().clone())
        else:
            self.initial_state = nn.Parameter(torch.randn(state_size))
        for name, encoder in encoders.items():
            self.add_modality(name, encoder)
        for name, decoder in decoders.items():
            self.add_task(name, decoder)

    def add_modality(self, name: str, encoder: nn.Module) -> None:
        """Append an encoder to the chain; the rows before it stay bitwise as they were.

        Raises:
            ValueError: the name is taken, or the encoder has another state size.
        """
        _check_part("encoders", name, encoder, self.encoders, self.state_size)
        self.encoders[name] = encoder

    def add_task(self, name: str, decoder: nn.Module) -> None:
        """Add a decoder; states and the other tasks stay bitwise as they were.

        Raises:
            ValueError: the name is taken, or the decoder has another state size.
        """
        _check_part("decoders", name, decoder, self.decoders, self.state_size)
        self.decoders[name] = decoder

    def forward(
        self,
        inputs: Inputs,
        masks: Masks | None = None,
        *,
        order: Sequence[str] | Tensor | None = None,
        missing: str | None = None,
    ) -> Grid:
        """Run the chain.

        Args:
            inputs: modality -> (..., B, F) or another shape that its encoder takes; a modality that is left out is
                missing for every sample.
            masks: modality -> (..., B) bool, True where the sample has it, and trusted; a modality without a mask is
                present where it has no NaN.
            order: names in the order of the chain (those left out are skipped), or (..., B, K) int64, one permutation
                of the encoders' numbers a sample; None: the encoders' own order.
            missing: overrides the model's rule for this call.

        Raises:
            KeyError: unknown modality.
            ValueError: an empty batch, sizes that do not fit, or an order that repeats or misses an encoder.
        """
        batch = self.read(inputs, masks, missing)
        unused = self._unused(batch)
        state = self.initial_state.unsqueeze(-2).expand(*batch.shape, self.state_size)  # (..., B, S)
        states, present = [state], []
        nobody = torch.zeros(batch.shape, dtype=torch.bool, device=state.device)
        everybody = ~nobody
        for sources in self._steps(order, batch.shape):
            entering, taken = state, nobody
            for name, chosen in sources:
                if name not in batch.inputs or name in unused:
                    continue
                mask = batch.masks[name]
                here = mask if chosen is None else chosen if mask is None else mask & chosen
                new = self.encoders[name](entering, batch.inputs[name])
                state = new if here is None else torch.where(here.unsqueeze(-1), new, state)
                taken = everybody if here is None else here if taken is nobody else taken | here
            states.append(state)
            present.append(taken)
        stacked = torch.stack(states, -3)  # (..., K+1, B, S)
        lead, size = stacked.shape[:-3], batch.shape[-1]
        steps = torch.stack(present, -2) if present else stacked.new_zeros(0, dtype=torch.bool)
        steps = steps.view(*lead, len(present), size)
        outputs = {name: self._decode(decoder, stacked, steps) for name, decoder in self.decoders.items()}
        return Grid(stacked, outputs, steps)

    def _unused(self, batch: Batch) -> set[str]:
        """Modalities that no sample has: their encoders are not called, and get no gradient.

        In a stack some model may have them, and a compiled graph must not depend on values: there they are computed.
        """
        if self.n_models is not None or torch.compiler.is_compiling():
            return set()
        return {name for name, mask in batch.masks.items() if mask is not None and not bool(mask.any())}

    def _decode(self, decoder: nn.Module, states: Tensor, present: Tensor) -> Tensor:
        """Outputs of all states, (..., K+1, B, S) -> (..., K+1, B, C).

        How a product rounds depends on the place of a row in its batch. Equal states must give equal outputs in
        evaluation, or ties between samples would break at random: there the initial state is decoded once, and a sample
        that skips a step keeps its outputs bitwise.
        """
        if self.training:
            return decoder(states)
        rows = [decoder(self.initial_state.unsqueeze(-2)).expand(*states.shape[:-3], states.shape[-2], -1)]
        if states.shape[-3] > 1:
            for k, row in enumerate(decoder(states[..., 1:, :, :]).unbind(-3)):
                rows.append(torch.where(present[..., k, :].unsqueeze(-1), row, rows[-1]))
        return torch.stack(rows, -3)

    def _steps(self, order: Sequence[str] | Tensor | None, shape: torch.Size) -> list[list[tuple[str, Tensor | None]]]:
        """For every position of the chain the encoders that act there, each on all samples (None) or on some (B,)."""
        if order is None:
            return [[(name, None)] for name in self.encoders]
        if isinstance(order, Tensor):
            numbers = torch.arange(len(self.encoders), device=order.device)
            full = order.shape == (*shape, len(self.encoders)) and bool((order.sort(-1).values == numbers).all())
            allowed = f"{(*shape, len(self.encoders))}, a permutation of 0..{len(self.encoders) - 1} in every row"
            check("order", f"tensor {tuple(order.shape)}", full, allowed)
            return [[(name, order[..., k] == i) for i, name in enumerate(self.encoders)] for k in numbers.tolist()]
        for name in order:
            if name not in self.encoders:
                raise KeyError(f"order={list(order)}: {name!r} is not one of {', '.join(self.encoders)}")
        check("order", list(order), len(set(order)) == len(order), "without repetition")
        return [[(name, None)] for name in order]


def _check_part(kind: str, name: str, part: nn.Module, known: nn.ModuleDict, state_size: int) -> None:
    check(kind, name, name not in known, f"a new name; there are {', '.join(known)}")
    check(kind, repr(name), bool(name) and "." not in name, "a name without dots")
    own = getattr(part, "state_size", state_size)
    check(f"{kind}.{name}.state_size", own, own == state_size, f"the model's state_size={state_size}")
