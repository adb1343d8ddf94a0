"""Which samples' conditions are dropped in training, for classifier-free guidance (Ho and Salimans 2021)."""

from __future__ import annotations

from torch import Tensor

from sdtrain.ops.random import Draw


def dropped(draw: Draw, share: float, group: str = "") -> Tensor:
    """(B,) bool. One group, one draw: parts of the same group and share drop the same samples."""
    return draw.uniform(f"condition_dropout/{group}" if group else "condition_dropout") < share
