"""Networks that several papers train, and `build`, which makes one from its config."""

from common.models.build import build, count_parameters
from common.models.config import ModelConfig

__all__ = ["ModelConfig", "build", "count_parameters"]
