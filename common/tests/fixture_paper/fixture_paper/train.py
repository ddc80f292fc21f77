"""One trial of the fixture paper."""

from common.cli import trial_cli
from fixture_paper.config import TrialConfig

main = trial_cli("fixture_paper", TrialConfig, lambda config: "fixture_paper.quadratic")

if __name__ == "__main__":
    main()
