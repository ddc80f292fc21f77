"""The paper's claims and ours, in the order of its experiments; each stands beside its test in `judging/`."""

from common.claims import Claim
from multimodn.judging import chain, fusion, missing, robust

CLAIMS: list[Claim] = [*fusion.CLAIMS, *chain.CLAIMS, *missing.CLAIMS, *robust.CLAIMS]
CLAIMS.sort(key=lambda claim: int(claim.id.removeprefix("C").split(".")[0]))
