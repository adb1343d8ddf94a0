"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization")."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sdtrain.errors import ConfigError
from sdtrain.optim.adamw import AdamW


class AdamW8bit(AdamW):
    """The recipe: as AdamW, by bitsandbytes' optimizer, or torchao's where that one is installed.

    Raises:
        ConfigError: from `make`, where neither is installed.
    """

    # Two moments of a byte each and, a block of 256, their two float32 scales.
    state_bytes: ClassVar[float] = 2 + 2 * 4 / 256

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The library's optimizer of finished groups."""
        try:
            from bitsandbytes.optim import AdamW8bit as Made
        except ImportError:
            try:
                from torchao.optim import AdamW8bit as Made
            except ImportError as error:
                raise ConfigError(
                    "optim=adamw8bit needs bitsandbytes, or torchao: pip install bitsandbytes; or write optim=adamw"
                ) from error
        return Made(groups, betas=self.betas, eps=self.eps)
