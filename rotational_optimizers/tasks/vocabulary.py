"""The byte-pair vocabularies of the translation experiment, learnt from its training text:

    python -m rotational_optimizers.tasks.vocabulary tokenizers/iwslt14 [key=value ...]

One tokenizer a language, in a folder of its name, with as many tokens as `model=transformer_iwslt` has. Keys are a
trial's (`data.path=...`).
"""

from __future__ import annotations

import sys

from common.data.vocabulary import command
from rotational_optimizers.config import TrialConfig


def main(arguments: list[str]) -> int:
    """Learn both vocabularies; returns the exit code."""
    return command("rotational_optimizers", TrialConfig, str(__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
