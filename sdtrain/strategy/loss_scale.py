"""Dynamic loss scaling (Micikevicius et al. 2018) for where torch's own GradScaler cannot see all gradients."""

from __future__ import annotations


class LossScale:
    """Halves the scale where a step's gradients overflowed, and doubles it after a time in which none did; the numbers
    are those of `torch.amp.GradScaler`.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale, self.growth_interval = scale, growth_interval
        self._num_good = 0

    def update(self, is_finite: bool) -> None:
        """After the gradients of a step are there. What it says then is the next step's scale."""
        self._num_good = self._num_good + 1 if is_finite else 0
        if not is_finite:
            self.scale *= 0.5
        elif self._num_good == self.growth_interval:
            self.scale, self._num_good = self.scale * 2.0, 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "num_good": self._num_good}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from there."""
        self.scale, self._num_good = float(state["scale"]), int(state["num_good"])
