"""Many shards indexed at once, a process a shard: one that dies takes no other with it, and finished ones are kept."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from sdtrain.data.address import shown
from sdtrain.data.deep_check import DeepCheck
from sdtrain.data.shard_index import index_shard


def index_all(
    addresses: Sequence[str],
    folder: Path | None,
    num_workers: int,
    is_deep: bool = False,
    on_done: Callable[[str, str], None] = lambda *_: None,
) -> dict[str, str]:
    """Index what has no index yet. Returns what could not be indexed, and why.

    Args:
        addresses: the shards.
        folder: for the indexes of shards that cannot have theirs beside them.
        num_workers: shards at the same time.
        is_deep: decode every picture whole.
        on_done: told each shard's address when it is done, and its failure or "".
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sdtrain.data.indexing"])
    failures = {}
    pool = ThreadPoolExecutor(num_workers)
    try:
        one = partial(_in_a_process, context, folder=folder, is_deep=is_deep)
        futures = {pool.submit(one, address): address for address in addresses}
        for future in as_completed(futures):
            if failure := future.result():
                failures[futures[future]] = failure
            on_done(futures[future], failure)
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def _in_a_process(
    context: multiprocessing.context.ForkServerContext, address: str, folder: Path | None, is_deep: bool
) -> str:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_index, args=(sender, address, folder, is_deep))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        deeper = "" if is_deep else "; where a picture in it kills its decoder, --deep finds it and leaves it out"
        return f"{shown(address)}: the process that indexed it died ({process.exitcode}){deeper}"
    finally:
        process.join()
        receiver.close()


def _index(sender: Connection, address: str, folder: Path | None, is_deep: bool) -> None:
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    try:
        if is_deep:
            with DeepCheck() as check:
                index_shard(address, folder, check)
        else:
            index_shard(address, folder)
        sender.send("")
    except (OSError, ValueError) as error:  # ConfigError is one
        said = str(error)
        sender.send(said if shown(address) in said else f"{shown(address)}: {said}")


def _die_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
