"""The endless training stream: walks the plan from a place, the same sequence at any number of DataLoader workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sdtrain.contracts import Batch
from sdtrain.data.plan import START, Cursor, Plan
from sdtrain.data.reader import Reader
from sdtrain.errors import ConfigError

_OF_THE_SCHEDULER = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_MAX_PACKED_BYTES = 16 * 1024


class Batches(IterableDataset, ABC):
    """Micro-batches without end, micro-batch j from worker j mod W."""

    @abstractmethod
    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker."""

    @abstractmethod
    def micro_batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        """One worker's; without workers, the only one's."""

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        if info is None:
            yield from self.micro_batches(0, 1)
            return
        self.enter_worker(info.id)
        try:
            yield from map(_packed, self.micro_batches(info.id, info.num_workers))
        except ConfigError as error:
            yield error  # raised by Loader, in the main process, without the wrapping of DataLoader's own


class Stream(Batches):
    """One rank's micro-batches from a place on. Rank and world are given: a forkserver worker cannot know them.

    Micro-batch j goes to worker j mod W, and DataLoader takes from its workers in turn. Every worker plans for itself.
    """

    def __init__(
        self,
        reader: Reader,
        plan: Plan,
        cursor: Cursor = START,
        rank: int = 0,
        world: int = 1,
        num_accumulate: int = 1,
    ) -> None:
        self.reader, self.plan, self.cursor = reader, plan, cursor
        self.rank, self.world, self.num_accumulate = rank, world, num_accumulate
        plan.check_split(world, num_accumulate)  # before any worker starts

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker."""
        self.reader.enter_worker(worker)

    def micro_batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        """This worker's."""
        number = 0
        for step, after in self.plan.walk(self.cursor):
            parts = self.plan.micro_batches(step, self.rank, self.world, self.num_accumulate)
            first = (after["step"] - 1) * self.plan.global_batch_size
            for part_number, part in enumerate(parts):
                if number % num_workers == worker:
                    batch = self.reader.batch(part.ids, part.epochs, part.size)
                    batch["place"] = torch.from_numpy(first + part.places)
                    batch["cursor"] = after
                    batch["last_micro_of_step"] = part_number == len(parts) - 1
                    yield batch
                number += 1


class Loader(DataLoader):
    """A DataLoader over Batches, which makes the batches itself.

    Args:
        stream: a rank's.
        num_workers: processes that read ahead; any number gives the same batches.
        start_method: how they start: "fork", "forkserver" or "spawn"; None: as the platform does.
    """

    def __init__(self, stream: Batches, num_workers: int = 0, start_method: str | None = None) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_obey_only_the_parent,
            multiprocessing_context=start_method if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers and self._start_method() != "fork":
            with _signals_held():
                resource_tracker.ensure_running()  # which lets SIGTERM through again, so it may not start below
        with _signals_held():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, ConfigError):
                try:
                    raise batch
                finally:
                    del batch  # or the error holds this frame, and its workers, until a collection that cannot end them
            yield _unpacked(batch) if self.num_workers else batch

    def _start_method(self) -> str:
        return (self.multiprocessing_context or multiprocessing).get_start_method()


def check_workers(num_workers: int) -> None:
    """Raises ConfigError for less than none."""
    if num_workers < 0:
        raise ConfigError(f"data.num_workers: {num_workers} is below 0; 0 reads in the process itself")


def check_batch(global_batch_size: int, num_accumulate: int) -> None:
    """Raises ConfigError where no sample would be taken."""
    for name, number in (("batch_size", global_batch_size), ("num_accumulate", num_accumulate)):
        if number < 1:
            raise ConfigError(f"trainer.{name}: {number} is not above 0")


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _packed(batch: Batch) -> dict[str, Any]:
    """As it goes through the queue: each tensor would cost the main process a connection to the worker, 0.3 ms, so
    only large ones travel in shared memory, and small ones as arrays in the message.
    """
    return {
        name: value.numpy() if isinstance(value, Tensor) and value.nbytes <= _MAX_PACKED_BYTES else value
        for name, value in batch.items()
    }


def _unpacked(batch: dict[str, Any]) -> Batch:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started inside are born with the scheduler's signals blocked: workers, before they can refuse them, and
    the fork server, whose end would be theirs. What comes for this process meanwhile is delivered afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_SCHEDULER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_only_the_parent(_worker: int) -> None:
    """A stop signal goes to every process of a job, but the main process needs its workers until the step boundary.

    So they ignore it, unless it is the parent that ends them.
    """
    for number in _OF_THE_SCHEDULER:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process().pid  # the one that asked for this worker; getppid() is the fork server's
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
