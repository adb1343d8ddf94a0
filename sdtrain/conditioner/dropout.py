"""Which samples' conditions are dropped in training, for classifier-free guidance (Ho and Salimans 2021)."""

from __future__ import annotations

from torch import Tensor

from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


def require_share(**shares: float) -> None:
    """Refuses what is no share, by its name.

    Raises:
        ConfigError: for a value below 0 or above 1.
    """
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"conditioner: {name}={share} must be a share, 0 to 1")


def dropped(draw: Draw, share: float, group: str = "") -> Tensor:
    """(B,) bool. One group, one draw: parts of the same group and share drop the same samples."""
    return draw.uniform(f"condition_dropout/{group}" if group else "condition_dropout") < share
