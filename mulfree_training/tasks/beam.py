"""Beam search for translations, all sentences of a batch at once, with fairseq's rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.data.pairs import END, PADDING

Decode = Callable[[Tensor], Tensor]
"""Prefixes (B * beams, T) int64, beams of a sentence side by side -> logits of the next token (B * beams, V)."""


@torch.no_grad()
def beam_search(decode: Decode, longest: Tensor, beams: int) -> list[list[int]]:
    """The translations with the highest mean log-probability a token, the end token included.

    As in fairseq, a sentence is done when as many hypotheses have ended as there are beams, only those among the best
    `beams` continuations of a step can end, and at its greatest length all must. Padding is never chosen. A prefix is
    decoded anew in each step. The softmax is the standard one, whatever the arithmetic of the network.

    Args:
        decode: the network with its sources; prefixes start with the end token.
        longest: (B,) int64, tokens of a translation without the end token, >= 0.
        beams: K, width, >= 1.

    Returns:
        B lists of tokens, without the end; empty where no log-probability is a number.

    Raises:
        ValueError: beams < 1.
    """
    if beams < 1:
        raise ValueError(f"beams={beams}: must be >= 1")
    device, count = longest.device, len(longest)
    tokens = torch.full((count, beams, 1), END, device=device)
    scores = torch.full((count, beams), -math.inf, device=device)
    scores[:, 0] = 0.0  # all beams start alike: one of them goes on
    best = torch.full((count,), -math.inf, device=device)
    chosen = torch.full((count, int(longest.max()) + 1), END, device=device)
    ended = torch.zeros(count, dtype=torch.int64, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    for length in range(chosen.shape[1]):
        lp = decode(tokens.flatten(0, 1)).float().log_softmax(-1).unflatten(0, (count, beams))  # (B, K, V)
        lp = lp.nan_to_num(nan=-math.inf)
        lp[..., PADDING] = -math.inf
        others = torch.arange(lp.shape[-1], device=device) != END
        lp = lp.masked_fill((length >= longest)[:, None, None] & others, -math.inf)
        top, place = (scores[..., None] + lp).flatten(1).topk(2 * beams)  # (B, 2 K), best first
        beam = place.div(lp.shape[-1], rounding_mode="floor")
        token = place - beam * lp.shape[-1]
        ends = token == END
        # of those that end: they must be among the first, and not more than are still wanted
        final = ends[:, :beams] & (ends[:, :beams].cumsum(1) + ended[:, None] <= beams)
        mean = (top[:, :beams] / (length + 1)).masked_fill(~final, -math.inf)
        value, which = mean.max(1)
        better = value > best
        prefix = tokens[torch.arange(count, device=device), beam[:, :beams].gather(1, which[:, None])[:, 0], 1:]
        chosen[better] = END
        chosen[better, :length] = prefix[better]
        best = torch.where(better, value, best)
        ended += final.sum(1)
        done |= (ended >= beams) | (length >= longest)
        if bool(done.all()):
            break
        # the first `beams` that go on, in their order
        going = torch.sort(ends.to(torch.int8), dim=1, stable=True).indices[:, :beams]
        scores = top.gather(1, going).masked_fill(ends.gather(1, going), -math.inf)
        source = beam.gather(1, going)[..., None].expand(-1, -1, length + 1)
        tokens = torch.cat([tokens.gather(1, source), token.gather(1, going)[..., None]], 2)
    return [_until_end(row) for row in chosen.tolist()]


def _until_end(row: list[int]) -> list[int]:
    return row[: row.index(END)]
