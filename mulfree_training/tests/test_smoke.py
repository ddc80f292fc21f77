"""Every experiment trains at smoke scale and ends in a report with every claim and figure."""

from common.tests import smoke


class TestSmoke(smoke.SmokeTests):
    paper = "mulfree_training"

    def check(self, rows: list[dict[str, object]]) -> None:
        assert all("could not be tested" not in str(row["reason"]) for row in rows)
