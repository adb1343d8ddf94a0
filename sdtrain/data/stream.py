"""The endless training stream: walks the plan from a step, the same sequence at any number of DataLoader workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sdtrain.contracts import Batch
from sdtrain.data.plan import Plan
from sdtrain.data.reader import Reader
from sdtrain.errors import ConfigError


class Stream(IterableDataset):
    """One rank's micro-batches from a step on. Rank and world are given: a forkserver worker cannot know them.

    Micro-batch j goes to worker j mod W, and DataLoader takes from its workers in turn.
    """

    def __init__(
        self, reader: Reader, plan: Plan, step: int = 0, rank: int = 0, world: int = 1, num_accumulate: int = 1
    ) -> None:
        self.reader, self.plan, self.step = reader, plan, step
        self.rank, self.world, self.num_accumulate = rank, world, num_accumulate
        plan.micro_batches(
            0, rank, world, num_accumulate
        )  # refuses a batch that does not divide, before any worker starts

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        if info is None:
            yield from self._micro_batches(0, 1)
            return
        self.reader.enter_worker(info.id)
        try:
            yield from self._micro_batches(info.id, info.num_workers)
        except ConfigError as error:
            yield error  # raised by Loader, in the main process, without the wrapping of DataLoader's own

    def _micro_batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        step, number = self.step, 0
        while True:
            parts = self.plan.micro_batches(step, self.rank, self.world, self.num_accumulate)
            step += 1
            for place, (ids, epochs) in enumerate(parts):
                if number % num_workers == worker:
                    batch = self.reader.batch(ids, epochs)
                    batch["cursor"] = self.plan.state(step)
                    batch["last_micro_of_step"] = place == len(parts) - 1
                    yield batch
                number += 1


class Loader(DataLoader):
    """A DataLoader over a Stream, which makes the batches itself."""

    def __init__(self, stream: Stream, num_workers: int = 0) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_obey_only_the_parent,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, ConfigError):
                raise batch
            yield batch


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _obey_only_the_parent(_worker: int) -> None:
    """A stop signal goes to every process of a job, but the main process needs its workers until the step boundary.

    So they ignore it, unless it is the parent that ends them.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
