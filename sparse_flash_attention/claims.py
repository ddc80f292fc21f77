"""The paper's claims and ours, in the order of the paper; each stands beside its test in `judging/`."""

from common.claims import Claim
from sparse_flash_attention.judging import exact, models, speed

CLAIMS: list[Claim] = [*exact.CLAIMS, *speed.CLAIMS, *models.CLAIMS]
CLAIMS.sort(key=lambda claim: int(claim.id.removeprefix("C").split(".")[0]))
