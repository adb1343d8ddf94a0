"""What a split's samples came to: counts by process in shared memory, and the budget of bad ones that ends a run."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sdtrain.data.address import shown
from sdtrain.data.bad_sample import REASONS, BadSample
from sdtrain.data.quarantine import Quarantine
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.data.shard_index import Shard

_MAX_IN_A_ROW = 100
_WINDOW_READS, _NUM_BLOCKS = 10_000, 10
_FLOOR, _LOWEST_FLOOR = 32, 8  # so many bad samples are no rate yet; of a small set, a tenth of it
_MAX_SHARD_FRACTION, _SHARD_FLOOR = 0.2, 5  # a shard with more bad samples than this is named, once
_MAX_RUN_FRACTION, _MANY_READS, _SECONDS_BETWEEN = 0.001, 100_000, 3600.0
_COUNTS = ("read", "empty_captions", "decoded", "read_bytes", "fetched_bytes", "cache_hits", "retries")
_COLUMNS = {name: column for column, name in enumerate((*_COUNTS, *REASONS))}
_NUM_WORST = 3

_log = logging.getLogger(__name__)


class Accounting:
    """Counts of one split. The workers' copies count into the same memory, each into a row of its own.

    What is counted is the places of batches, once a batch is made: `read` = `decoded` + those whose picture was kept in
    memory or stands as a latent. Of `read`, `empty_captions` are told nothing. `replaced` is the sum of its reasons,
    and by index a part of `read`: `read` - `replaced` places show their own sample. In a sequence a bad sample has no
    place; `replaced` are those passed over, beside `read`. A picture that is decoded for no batch, to see whether it is
    good, is in none of these.

    The budget is each process's own: of the last 10,000 samples that it tried at most a fraction may be bad, and not
    more than 100 in a row. A bad sample is tried once, so a small set is not ended by the same few, epoch after epoch.
    What does not end a run is said aloud: a shard of which a fifth is bad, once; and hourly, that of all samples more
    than one in a thousand is.

    Args:
        shards: of the split.
        num_samples: of the split.
        num_workers: DataLoader workers that will count.
        max_bad_fraction: 0.01 is ten times what large web sets lose (LAION-400M: 0.1 %), and what an index missed.
        directory: where the record of bad samples goes; None keeps none.
        rank: of this process.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        num_samples: int,
        num_workers: int = 0,
        max_bad_fraction: float = 0.01,
        directory: Path | None = None,
        rank: int = 0,
    ) -> None:
        self.shards, self.max_bad_fraction = shards, max_bad_fraction
        self.quarantine = Quarantine(directory, rank)
        self._floor = min(_FLOOR, max(_LOWEST_FLOOR, num_samples // 10))
        self._counts = torch.zeros(num_workers + 1, len(_COLUMNS), dtype=torch.int64).share_memory_()
        self._by_shard = torch.zeros(num_workers + 1, len(shards), dtype=torch.int32).share_memory_()
        self._is_bad_shard = torch.zeros(len(shards), dtype=torch.bool).share_memory_()
        self._enter(0)

    def _enter(self, row: int) -> None:
        self._row = row
        self._mine, self._mine_by_shard = self._counts[row].numpy(), self._by_shard[row].numpy()
        self._window: deque[list[int]] = deque([[0, 0]], maxlen=_NUM_BLOCKS)  # [reads, bad] each
        self._reasons: Counter[str] = Counter()
        self._in_shards: Counter[int] = Counter()
        self._in_a_row = 0
        self._num_tried = self._num_refused = 0
        self._tried_in = np.zeros(len(self.shards), np.int32)
        self._say_after = 0.0

    def __getstate__(self) -> dict[str, object]:
        own = ("_mine", "_mine_by_shard", "_tried_in")  # views, which would travel as copies, and what is made anew
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._enter(self._row)

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker."""
        self.quarantine.enter(f"worker{worker}")
        self._enter(worker + 1)

    def add(self, name: str, number: int) -> None:
        """Counts on."""
        self._mine[_COLUMNS[name]] += number

    def replaced(self, reason: str, shard: int) -> None:
        """A place was filled with another sample than its own, or of a sequence one was passed over."""
        self._mine[_COLUMNS[reason]] += 1
        self._mine_by_shard[shard] += 1

    def read(self, captions: Sequence[str], num_decoded: int = 0) -> None:
        """The places of a batch were filled with samples that are told so, of so many the picture decoded for it."""
        self._mine[_COLUMNS["read"]] += len(captions)
        self._mine[_COLUMNS["empty_captions"]] += captions.count("")
        self._mine[_COLUMNS["decoded"]] += num_decoded

    def good(self, shard: int) -> None:
        """A sample that was tried could be used."""
        self._in_a_row = 0
        self._num_tried += 1
        self._tried_in[shard] += 1
        self._window[-1][0] += 1
        if self._window[-1][0] >= _WINDOW_READS // _NUM_BLOCKS:
            self._window.append([0, 0])

    def refuse(self, bad: BadSample, shard: int, key: str, offset: int) -> None:
        """A sample that was tried, for the first time in this process, is bad.

        Raises:
            ConfigError: where the budget is spent.
        """
        self._in_a_row += 1
        self._reasons[bad.reason] += 1
        self._in_shards[shard] += 1
        self.quarantine.add(bad, shown(self.shards[shard].address), key, offset)
        self._window[-1][0] += 1
        self._window[-1][1] += 1
        self._num_tried += 1
        self._num_refused += 1
        self._tried_in[shard] += 1
        self._warn(shard)
        num_read, num_bad = (sum(block[column] for block in self._window) for column in (0, 1))
        if num_bad > self._floor and num_bad > self.max_bad_fraction * num_read:
            raise ConfigError(
                f"data: {num_bad} of the last {num_read} samples could not be used: {self.blame()}. "
                f"Repair the shards, or raise data.reader.max_bad_fraction (now {self.max_bad_fraction})"
            )
        if self._in_a_row > _MAX_IN_A_ROW:
            raise ConfigError(f"data: {self._in_a_row} samples in a row could not be used: {self.blame()}")

    def _warn(self, shard: int) -> None:
        """Says what does not end the run, but is worth a look."""
        num_bad, num_tried = self._in_shards[shard], int(self._tried_in[shard])
        is_named = bool(self._is_bad_shard[shard])
        if not is_named and num_bad >= _SHARD_FLOOR and num_bad > _MAX_SHARD_FRACTION * num_tried:
            self._is_bad_shard[shard] = True
            address = shown(self.shards[shard].address)
            _log.warning("data: %d of %d samples of %s could not be used; repair it", num_bad, num_tried, address)
        share = self._num_refused / self._num_tried
        if self._num_tried >= _MANY_READS and share > _MAX_RUN_FRACTION and time.monotonic() >= self._say_after:
            self._say_after = time.monotonic() + _SECONDS_BETWEEN
            _log.warning(
                "data: %.2f %% of %d samples could not be used: %s", 100 * share, self._num_tried, self.blame()
            )

    def blame(self) -> str:
        """The reasons, the shard with most of them, and where the record is."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
        record = f"; each is in {self.quarantine.path}" if self.quarantine.path else ""
        worst = self.shards[self._in_shards.most_common(1)[0][0]]
        return f"{reasons}; most of them in {shown(worst.address)}{record}"

    def report(self) -> dict[str, int]:
        """All processes' counts together, the replaced ones by reason and for the worst shards; zeros are left out."""
        counts = self._counts.sum(0).tolist()
        by_reason = {reason: counts[_COLUMNS[reason]] for reason in REASONS}
        by_shard = self._by_shard.sum(0).numpy()
        worst = [int(shard) for shard in np.argsort(-by_shard, kind="stable")[:_NUM_WORST] if by_shard[shard]]
        return {
            **{name: counts[_COLUMNS[name]] for name in _COUNTS if counts[_COLUMNS[name]] or name == "read"},
            "replaced": sum(by_reason.values()),
            **({"bad_shards": num} if (num := int(self._is_bad_shard.sum())) else {}),
            **{f"replaced/{reason}": count for reason, count in by_reason.items() if count},
            **{f"replaced_in/{_short(self.shards[shard])}": int(by_shard[shard]) for shard in worst},
        }


def _short(shard: Shard) -> str:
    """Its folder's name and its own: many sources have a 00000.tar."""
    return "/".join(shown(shard.address).split("/")[-2:])
