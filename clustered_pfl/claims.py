"""The paper's claims C1-C11 in the order of the paper; each stands beside its test in `judging/`.

A claim judged in several set-ups has a row for each (C1, C1.truth, ...). Figures read off by eye say so.
"""

from clustered_pfl.judging import images, synthetic, theory

CLAIMS = sorted(
    [*synthetic.CLAIMS, *images.CLAIMS, *theory.CLAIMS],
    key=lambda claim: (int(claim.id.split(".")[0].removeprefix("C")), claim.id),
)
