"""The paper's claims and ours, in the order of the paper; each stands beside its test in `judging/`."""

from common.claims import Claim
from mulfree_training.judging import arithmetic, training

CLAIMS: list[Claim] = [*training.CLAIMS, *arithmetic.CLAIMS]
CLAIMS.sort(key=lambda claim: int(claim.id.removeprefix("C").split(".")[0]))
