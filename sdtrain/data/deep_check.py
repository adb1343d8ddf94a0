"""Whole decoding of every picture in a process of its own: what kills the decoder is found before a run meets it."""

from __future__ import annotations

import contextlib
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.decode import decode_image

_SIDE = 64  # the target; JPEGs are read whole for it too, in less time
_TIMEOUT_SECONDS = 60


class DeepCheck:
    """A picture's bytes -> why it cannot be decoded, or "". A decoder that dies or hangs is replaced by a new one."""

    def __init__(self, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._timeout_seconds = timeout_seconds
        self._child: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __call__(self, data: bytes) -> str:
        if self._child is None:
            self._start()
        try:
            self._pipe.send_bytes(data)
            if not self._pipe.poll(self._timeout_seconds):
                self.close()
                return "decoder_hung"
            return self._pipe.recv_bytes().decode()
        except (EOFError, OSError):
            self.close()
            return "decoder_died"

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._pipe.close()
            self._child.kill()
            self._child.join()
            self._child = None

    def __enter__(self) -> DeepCheck:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self._pipe), daemon=True)
        self._child.start()
        theirs.close()


def _serve(pipe: Connection, parents: Connection) -> None:
    parents.close()  # or this would wait for itself when the parent is gone
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(_verdict(pipe.recv_bytes()).encode())


def _verdict(data: bytes) -> str:
    try:
        decode_image(data, _SIDE, _SIDE)
    except BadSample as bad:
        return bad.reason
    return ""
