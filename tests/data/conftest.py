"""Real pictures and real shards for the tests of the data room."""

import io
import json
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.shard_writer import write_shards


def png(value, side=16):
    """A picture whose pixels say which it is."""
    pixels = np.full((side, side, 3), value % 251, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number, **fields):
    """Sample `number`, with some of its members changed; None takes one away."""
    members = {
        "__key__": f"{number:06d}",
        "png": png(number),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
        **fields,
    }
    return {name: value for name, value in members.items() if value is not None}


@pytest.fixture
def make_sample():
    return sample


@pytest.fixture
def make_shards(tmp_path):
    """make_shards(samples or a count, per_shard) -> the shards, in tmp_path/shards."""

    def make(samples, per_shard=1000, name="x"):
        if isinstance(samples, int):
            samples = [sample(number) for number in range(samples)]
        return write_shards(samples, tmp_path / "shards" / f"{name}-%06d.tar", per_shard)

    return make


@pytest.fixture
def write_tar(tmp_path):
    """write_tar([(name or TarInfo, bytes), ...], name, format) -> a tar in tmp_path, its members in this order."""

    def write(members, name="a.tar", format=tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / name, "w", format=format) as tar:
            for info, data in members:
                info = info if isinstance(info, tarfile.TarInfo) else tarfile.TarInfo(info)
                info.size = len(data) if info.isreg() else 0
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / name

    return write


@pytest.fixture
def members(make_sample):
    """members(number) -> the (name, bytes) pairs of a sample, for write_tar."""

    def split(number, **fields):
        fields = make_sample(number, **fields)
        key = fields.pop("__key__")
        return [(f"{key}.{suffix}", data) for suffix, data in fields.items()]

    return split


class RangeServer(ThreadingHTTPServer):
    """Serves a folder by ranges on 127.0.0.1, and misbehaves as `behaviour` says: one entry a request, then well."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.behaviour, self.asked, self.etag = folder, [], [], '"v1"'
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that gives up is what the tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range", "")
        server.asked.append((self.path, asked))
        how = server.behaviour.pop(0) if server.behaviour else "well"
        if how == "stall":
            server.released.wait(30)
            return self._close()
        if how == "hang up":
            return self._close()
        if isinstance(how, int):
            return self._answer(how, b"", {})
        if how.startswith("to "):
            return self._answer(302, b"", {"Location": how[3:]})
        file = server.folder / self.path.split("?")[0].lstrip("/")
        if not file.is_file():
            return self._answer(404, b"", {})
        data = file.read_bytes()
        start, end = (int(word) for word in asked.removeprefix("bytes=").split("-"))
        part = data[start : end + 1]
        return self._part(how, data, part, start, end)

    def _part(self, how, data, part, start, end):
        headers = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "ETag": self.server.etag}
        if how == "garbage":
            part = bytes(len(part))
        if how == "no range":
            return self._answer(200, data, {"ETag": self.server.etag})
        if how == "elsewhere":
            headers["Content-Range"] = f"bytes {start + 1}-{end + 1}/{len(data)}"
        if how == "less":
            part = part[:-1]
        if how == "more":
            part += b"x" * 1000
        if how == "grown":
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data) + 512}"
        if how in ("cut", "trickle"):
            headers["Content-Length"] = str(len(part))
            self._answer(206, part[: len(part) // 2], headers)
            while how == "trickle" and not self.server.released.wait(0.05):
                self.wfile.write(b"x")
            return self._close()
        return self._answer(206, part, headers)

    def _answer(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _close(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """An http server of what is in tmp_path."""
    running = RangeServer(tmp_path)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()
    thread.join()
