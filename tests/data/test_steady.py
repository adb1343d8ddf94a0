"""Sources that break and are opened again: files of a disk that fails, commands that fail, servers without ranges."""

import builtins
import errno
import hashlib
import http.server
import io
import threading

import pytest

from sdtrain.data import steady
from sdtrain.data.retry import Retry
from sdtrain.data.steady import Changed, Command, LocalFile, Transfer

QUICK = Retry(3, 0.001, 0.002)
DATA = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(250)) * 4


def drained(source, num_bytes=700):
    parts = []
    while data := source.read(num_bytes):
        parts.append(data)
    source.close()
    return b"".join(parts)


class Flaky(io.BytesIO):
    """Breaks once it was read to here."""

    def __init__(self, file, end):
        super().__init__(file.read())
        self.fileno, self.end, self.file = file.fileno, end, file

    def read1(self, num_bytes):
        if self.tell() >= self.end:
            raise OSError(errno.EIO, "Input/output error")
        return super().read1(min(num_bytes, self.end - self.tell()))

    def close(self):
        self.file.close()
        super().close()


@pytest.fixture
def break_at(monkeypatch):
    """break_at(places): the next openings break there, the others do not."""

    def make(places):
        places = iter(places)

        def opened(*arguments, **options):
            file, place = builtins.open(*arguments, **options), next(places, None)  # noqa: SIM115
            return file if place is None else Flaky(file, place)

        monkeypatch.setattr(steady, "open", opened, raising=False)

    return make


def test_a_file_goes_on_where_it_broke(tmp_path, break_at):
    path = tmp_path / "x"
    path.write_bytes(DATA)
    break_at([0, 0, 1500, 1900])
    source = LocalFile(str(path), QUICK)
    assert drained(source) == DATA
    assert source.num_retries == 4
    break_at([1500, 1500, 1500])
    source = LocalFile(str(path), QUICK)
    with pytest.raises(OSError, match="Input/output"):
        drained(source)
    assert source.num_retries == 2


def test_a_file_that_is_another_when_it_is_opened_again(tmp_path, break_at):
    path = tmp_path / "x"
    path.write_bytes(DATA)
    break_at([1500])
    source = LocalFile(str(path), QUICK)
    source.read(1500)
    path.write_bytes(DATA[::-1] + b"x")
    with pytest.raises(Changed, match="changed while it was read"):
        source.read(100)
    cut = LocalFile(str(path), QUICK)
    cut.read(10)
    path.write_bytes(DATA[:10])
    with pytest.raises(Changed, match="became shorter"):
        drained(cut, 1 << 21)


def test_a_file_that_is_not_there_is_not_awaited(tmp_path):
    source = LocalFile(str(tmp_path / "x"), Retry(5, 100.0, 100.0))
    with pytest.raises(FileNotFoundError):
        source.read(1)


def command(tmp_path, before, after):
    """It writes `before` and fails the first time, then `after`."""
    for name, data in (("before", before), ("after", after)):
        (tmp_path / name).write_bytes(data)
    script = tmp_path / "script"
    script.write_text(f"cd {tmp_path}; if [ -e ran ]; then cat after; else touch ran; cat before; exit 3; fi")
    return f"sh {script}"


def test_a_command_that_fails_is_run_again(tmp_path):
    source = Command(command(tmp_path, DATA[:3333], DATA), QUICK)
    assert drained(source) == DATA
    assert source.num_retries == 1


@pytest.mark.parametrize("after", [DATA[1:], DATA[:100]])
def test_a_command_that_writes_something_else_next_time(tmp_path, after):
    source = Command(command(tmp_path, DATA[:3333], after), QUICK)
    with pytest.raises(OSError, match="other bytes than before|broke off before"):
        drained(source)


class NoRanges(http.server.BaseHTTPRequestHandler):
    """The first answer breaks off in its middle; nobody says a version."""

    def do_GET(self):
        data = self.server.answers.pop(0)
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("is_same", [True, False])
def test_a_server_without_ranges_and_versions(is_same):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoRanges)
    server.answers = [DATA[: len(DATA) // 2], DATA if is_same else b"y" + DATA[1:]]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    source = Transfer(f"http://127.0.0.1:{server.server_port}/x", QUICK, 5.0)
    try:
        if is_same:
            assert drained(source) == DATA
        else:
            with pytest.raises(Changed, match="other bytes than before"):
                drained(source)
    finally:
        source.close()
        server.shutdown()
        server.server_close()
        thread.join()
