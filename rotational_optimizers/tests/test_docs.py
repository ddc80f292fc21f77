"""What the READMEs say works, the house's own among them: Python blocks run, commands run (at smoke scale)."""

from common.tests import docs

ROOT_README = docs.ROOT / "README.md"


class TestReadme(docs.ReadmeTests):
    paper = "rotational_optimizers"


def test_python_blocks_of_the_root_run() -> None:
    docs.run_python(ROOT_README)


def test_links_and_make_targets_of_the_root() -> None:
    docs.check_links([ROOT_README, docs.ROOT / "CONTRIBUTING.md"])
    docs.check_make_targets([ROOT_README])
