"""What the README says works: its Python blocks run, its commands run (at smoke scale)."""

from common.tests import docs


class TestReadme(docs.ReadmeTests):
    paper = "mulfree_training"
