"""How often something that may go well next time is tried, and how long to wait between (full jitter)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

_AGAIN = (408, 425, 429)  # and all from 500 on
_RANDOM = random.SystemRandom()  # of no seed: many processes that failed together shall not come back together


def may_pass(status: int) -> bool:
    """Whether what a server answered with may be another answer next time."""
    return status >= 500 or status in _AGAIN


@dataclass(frozen=True)
class Retry:
    """So many tries in all; before each next one a random wait below a limit that doubles from the first."""

    num_tries: int = 5
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 30.0

    def waits(self) -> Iterator[float]:
        """The seconds to wait after each failed try but the last."""
        for number in range(self.num_tries - 1):
            yield _RANDOM.uniform(0, min(self.first_wait_seconds * 2**number, self.max_wait_seconds))
