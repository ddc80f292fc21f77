"""Every experiment trains at smoke scale and ends in a report with every claim and figure."""

from common.tests import smoke


class TestSmoke(smoke.SmokeTests):
    paper = "clustered_pfl"
