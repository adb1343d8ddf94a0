"""A record of every sample that was refused, for people: a line in a file, and now and then one on the screen."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

from sdtrain.data.bad_sample import BadSample

_MAX_FILE_BYTES = 16 << 20
_NUM_FIRST, _EVERY = 5, 1000  # of each reason, in each process, are said aloud

_log = logging.getLogger(__name__)


class Quarantine:
    """One process's file. It holds no captions, and addresses without what may be secret.

    Args:
        directory: where the files of all ranks and workers lie; None keeps none.
        rank: of this process and its workers.
    """

    def __init__(self, directory: Path | None = None, rank: int = 0) -> None:
        self.directory, self.rank = directory, rank
        self.enter("main")

    def enter(self, process: str) -> None:
        """From here on this is the copy of another process of the rank."""
        self._said: Counter[str] = Counter()
        self.path = None if self.directory is None else Path(self.directory) / f"rank{self.rank}-{process}.jsonl"

    def add(self, bad: BadSample, shard: str, key: str, offset: int) -> None:
        """Writes a refusal down. A disk that does not take it ends the record, not the run."""
        self._said[bad.reason] += 1
        number = self._said[bad.reason]
        kind = type(bad.__cause__ or bad).__name__
        if number <= _NUM_FIRST or number % _EVERY == 0:
            _log.warning("data: %s: %s in %s (%s, number %d of this reason)", bad.reason, key, shard, kind, number)
        self.write(bad.reason, shard, key, offset, kind)

    def write(self, reason: str, shard: str, key: str, offset: int, kind: str) -> None:
        """The same without a word on the screen; a whole shard has no key."""
        if self.path is None:
            return
        row = {"reason": reason, "shard": shard, "key": key, "offset": offset, "exception": kind}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                if file.tell() < _MAX_FILE_BYTES:
                    file.write(json.dumps(row) + "\n")
        except OSError as error:
            _log.warning("data: %s cannot be written (%s); no record is kept of bad samples", self.path, error.strerror)
            self.path = None
