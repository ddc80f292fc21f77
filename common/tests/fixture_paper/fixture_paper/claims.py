"""The fixture's one claim."""

from __future__ import annotations

from common.claims import Claim, swap_arms
from common.pairing import paired
from common.records import Records
from common.statistics import Outcome, ratio_greater


def faster(records: Records) -> Outcome:
    """Final loss of plain descent over that of the heavy ball."""
    return ratio_greater(*paired(records["compare"], "gd", "heavy_ball", "final_loss", mode="min"))


CLAIMS = [
    Claim(
        id="C1",
        statement="Tuned momentum ends at a lower loss than tuned plain descent.",
        source="Theorem 1",
        paper_value="not established",
        experiments=("compare",),
        parts={"lower loss": faster},
        control=swap_arms("compare", "gd", "heavy_ball"),
    )
]
