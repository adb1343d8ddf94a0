"""Remote shards indexed: read once from front to back, in ranges, with the same index as the files have."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sdtrain.data import download
from sdtrain.data.index import build_index, find_shards
from sdtrain.data.manifest import write_folder
from sdtrain.data.shard_index import index_shard
from sdtrain.data.verify import verify_folder
from sdtrain.errors import ConfigError


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path with ranges and etags; `.ranges` is what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = tmp_path / self.path.lstrip("/").partition("?")[0]
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            self.server.ranges.append((self.path, start, end))
            end = min(end, len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.send_header("Content-Length", str(end - start + 1))
            self.end_headers()
            self.wfile.write(data[start : end + 1])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_the_same_index_as_of_the_files(server, url, make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_RANGE_BYTES", 3000)
    shards = make_shards(20, per_shard=10)
    addresses = [f"{url}/shards/{shard.name}?token=secret" for shard in shards]
    folder = tmp_path / "index"
    (folder / "parts").mkdir(parents=True)
    write_folder(folder, addresses, lambda address: index_shard(address, folder / "parts"))
    beside, index = build_index(shards), build_index([folder])
    assert index.fingerprint == beside.fingerprint
    assert index.offset.tolist() == beside.offset.tolist()
    assert [shard.address for shard in index.shards] == addresses
    assert [shard.version for shard in index.shards] == [hashlib.md5(s.read_bytes()).hexdigest() for s in shards]
    assert index.name(0) == "x-000000/000000"
    starts = [start for path, start, end in server.ranges if "x-000000" in path and end - start > 1]
    assert starts == list(range(0, shards[0].stat().st_size, 3000))  # each byte once: the part is kept
    assert verify_folder(folder, 1) == []
    shards[1].write_bytes(shards[1].read_bytes() + bytes(512))
    (fault,) = verify_folder(folder, 1)
    assert "were indexed" in fault
    assert "secret" not in fault


def test_a_shard_that_changes_meanwhile(server, url, make_shards, monkeypatch):
    monkeypatch.setattr(download, "_RANGE_BYTES", 1000)
    shard, reads = make_shards(10)[0], []
    real = download.Download.read

    def read(self, num_bytes=-1):
        reads.append(1)
        if len(reads) == 3:
            Path(shard).write_bytes(Path(shard).read_bytes() + bytes(512))
        return real(self, num_bytes)

    monkeypatch.setattr(download.Download, "read", read)
    with pytest.raises((ConfigError, OSError), match="changed"):
        index_shard(f"{url}/shards/{shard.name}")


def test_what_is_not_there(url):
    with pytest.raises(ConfigError, match="404"):
        index_shard(f"{url}/x.tar")


@pytest.mark.slow
def test_a_pattern_in_s3(make_shards, monkeypatch, tmp_path):
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        shards = make_shards(20, per_shard=10)
        for shard in shards:
            client.put_object(Bucket="bucket", Key=f"set/{shard.name}", Body=shard.read_bytes())
        client.put_object(Bucket="bucket", Key="set/README", Body=b"x")
        addresses = find_shards("s3://bucket/set/*.tar")
        assert addresses == [f"s3://bucket/set/{shard.name}" for shard in shards]
        assert index_shard(addresses[1]).digest == index_shard(str(shards[1])).digest
    finally:
        server.stop()
