"""Ranges over http and s3: servers that stall, cut, lie, redirect and refuse."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from sdtrain.data.remote import Remote
from sdtrain.data.retry import Retry
from sdtrain.errors import ConfigError

DATA = bytes(range(256)) * 40
LARGE = DATA * 300  # 3 MB
QUICK = Retry(num_tries=3, first_wait_seconds=0.001, max_wait_seconds=0.002)


@pytest.fixture
def url(server, tmp_path):
    (tmp_path / "x.tar").write_bytes(DATA)
    return f"{server.url}/x.tar"


@pytest.fixture
def remote():
    return Remote(QUICK, timeout_seconds=20)


def hasty(how):
    """Silence is over soon where the server will be silent; elsewhere a machine may be slow."""
    return Remote(QUICK, timeout_seconds=1.5 if how in ("stall", "trickle") else 20)


def fetch(remote, url, start=100, end=700, version="v1"):
    return remote.fetch(url, start, end, len(DATA), version)


def test_a_range(remote, url, server):
    assert fetch(remote, url) == DATA[100:700]
    assert server.asked == [("/x.tar", "bytes=100-699")]
    assert remote.num_retries == 0
    assert fetch(remote, url, version="") == DATA[100:700]


def test_size_and_version(remote, url):
    assert remote.stat(url) == (len(DATA), "v1")


@pytest.mark.parametrize("how", ["stall", "hang up", "cut", "trickle", "less", "more", "elsewhere", 503, 500, 429, 408])
def test_what_may_pass_is_tried_again(url, server, how):
    remote = hasty(how)
    server.behaviour = [how, how]
    assert fetch(remote, url) == DATA[100:700]
    assert remote.num_retries == (1 if how == "hang up" else 2)  # aiohttp itself asks once more there


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("stall", "Timeout"),
        ("trickle", "TimeoutError"),
        ("cut", "payload"),
        ("less", "bytes"),
        ("more", "more than was asked for"),
        ("elsewhere", "sent bytes 101 to 701, not 100 to 700"),
        (503, "answers 503"),
    ],
)
def test_what_does_not_pass_is_one_line(url, server, how, said):
    server.behaviour = [how] * 3
    with pytest.raises(ConfigError, match=rf"^data: {url}: .*{said}.*\(bytes 100 to 700, tried 3 times\)$"):
        fetch(hasty(how), f"{url}?X-Amz-Signature=secret")
    assert len(server.asked) == 3


def test_a_server_that_trickles_is_given_up(url, server):
    server.behaviour = ["trickle"]
    started = time.monotonic()
    with pytest.raises(ConfigError, match="TimeoutError"):
        fetch(Remote(Retry(1), timeout_seconds=0.3), url)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (404, "answers 404"),
        (403, "access denied"),
        (401, "access denied"),
        ("no range", "answers no ranges"),
        ("grown", "shard_changed"),
        (412, "shard_changed"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(remote, url, server, how, said):
    server.behaviour = [how]
    with pytest.raises(ConfigError, match=rf"^data: .*{said}"):
        fetch(remote, url)
    assert len(server.asked) == 1


def test_other_version_is_refused(remote, url, server):
    server.etag = '"v2"'
    with pytest.raises(ConfigError, match=r"shard_changed: .*x\.tar .*version v1; now \d+, v2\)"):
        fetch(remote, url)


def test_shorter_object_is_refused(remote, url, tmp_path):
    (tmp_path / "x.tar").write_bytes(DATA[:300])
    with pytest.raises(ConfigError, match=r"shard_changed: .*x\.tar: it has 300 bytes now"):
        fetch(remote, url)


LEAVES = """
import gc, sys, threading
from sdtrain.data.remote import Remote
remote = Remote()
remote.fetch(sys.argv[1], 0, 10, int(sys.argv[2]), "v1")
if sys.argv[3] == "in the loop":  # where a request's last reference may be dropped
    client, done = remote._clients.pop(), threading.Event()
    loop = client.loop
    def drop(held):
        held.clear()
        gc.collect()
        loop.call_soon(done.set)
    held = [client]
    del client
    loop.call_soon_threadsafe(drop, held)
    assert done.wait(1.5)  # it does not wait for itself
"""


@pytest.mark.parametrize("how", ["at exit", "in the loop"])
def test_it_ends_without_a_word(url, how):
    command = [
        sys.executable,
        "-W",
        "always",
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        LEAVES,
        url,
        str(len(DATA)),
        how,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_redirect_is_followed_within_http(remote, url, server):
    server.behaviour = ["to /x.tar?token=1", f"to {url}"]
    assert fetch(remote, url) == DATA[100:700]


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("file:///etc/passwd", "only http"),
        ("ftp://127.0.0.1/x", "only http"),
        ("http://169.254.169.254/latest/meta-data", "metadata service"),
        ("", "only http|redirects"),
    ],
)
def test_redirect_elsewhere_is_refused(remote, url, server, to, said):
    server.behaviour = [f"to {to}"] * 9
    with pytest.raises(ConfigError, match=said):
        fetch(remote, url)


def test_name_of_a_metadata_service_is_refused(remote, monkeypatch):
    def resolve(host, port, *arguments, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    with pytest.raises(ConfigError, match=r"innocent\.example is a metadata service"):
        fetch(remote, "http://innocent.example/x.tar")


def test_nobody_there(remote):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConfigError, match="tried 3 times"):
        fetch(remote, f"http://127.0.0.1:{port}/x.tar")


def test_many_threads_share_one_client(remote, url, server):
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: fetch(remote, url, n, n + 9)})) for n in range(20)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {n: DATA[n : n + 9] for n in range(20)}


def test_after_a_fork_a_process_has_its_own(remote, url):
    assert fetch(remote, url) == DATA[100:700]
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if fetch(remote, url, 5, 50) == DATA[5:50] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert fetch(remote, url, 7, 9) == DATA[7:9]


def test_without_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"pip install 'sdtrain\[remote\]'"):
        Remote().stat("http://127.0.0.1/x.tar")


@pytest.fixture(scope="module")
def s3():
    """An S3 of moto's with a bucket, whose users may do what their policies say."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    url = f"http://127.0.0.1:{running.get_host_and_port()[1]}"
    options = {"endpoint_url": url, "region_name": "us-east-1"}
    no_one = {**options, "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    boto3.client("s3", **no_one).create_bucket(Bucket="bucket")
    boto3.client("s3", **no_one).put_object(Bucket="bucket", Key="a/x.tar", Body=DATA)
    boto3.client("s3", **no_one).put_object(Bucket="bucket", Key="a/large.tar", Body=LARGE)
    iam = boto3.client("iam", **no_one)
    iam.create_user(UserName="reader")
    policy = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}'
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    check_rights(url, from_action=0)
    yield url, key["AccessKeyId"], key["SecretAccessKey"]
    check_rights(url, from_action="inf")
    running.stop()


def check_rights(url, from_action):
    headers = {"Content-Type": "text/plain"}
    data = str(from_action).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset-auth", data, headers, method="POST"))


@pytest.fixture
def environment(s3, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3[0])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3[1])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3[2])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    return monkeypatch


ADDRESS = "s3://bucket/a/x.tar"


def test_s3_with_credentials_of_the_environment(environment):
    remote = Remote(QUICK, timeout_seconds=20)
    num_bytes, version = remote.stat(ADDRESS)
    assert num_bytes == len(DATA)
    assert len(version) == 32
    assert fetch(remote, ADDRESS, version=version) == DATA[100:700]
    with pytest.raises(ConfigError, match="shard_changed"):
        fetch(remote, ADDRESS, version="other")


def test_s3_gives_a_range_larger_than_what_arrives_at_once(environment):
    remote, address = Remote(QUICK, timeout_seconds=20), "s3://bucket/a/large.tar"
    answer = remote.fetch(address, 1, len(LARGE) - 1, len(LARGE), remote.stat(address)[1])
    assert answer == LARGE[1:-1]
    assert isinstance(answer, bytes)
    assert remote.num_retries == 0


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_s3_with_wrong_credentials_is_one_line(environment, wrong):
    environment.setenv(wrong, "AKIAWRONGWRONGWRONG")
    with pytest.raises(ConfigError, match=r"^data: s3://bucket/a/x\.tar: access denied; .*AWS_ACCESS_KEY_ID.*\(403 "):
        fetch(Remote(QUICK, timeout_seconds=20), ADDRESS)


def test_s3_without_credentials_asks_as_anybody(environment):
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"access denied; .*\(403 "):
        fetch(Remote(QUICK, timeout_seconds=20), ADDRESS)


def test_s3_object_that_is_not_there(environment):
    with pytest.raises(ConfigError, match="answers 404"):
        fetch(Remote(QUICK, timeout_seconds=20), "s3://bucket/none.tar")


def test_s3_that_stalls(environment, server):
    environment.setenv("AWS_ENDPOINT_URL", server.url)
    server.behaviour = ["stall"] * 3
    with pytest.raises(ConfigError, match=r"s3://bucket/a/x\.tar: .*tried 3 times"):
        fetch(Remote(QUICK, timeout_seconds=0.3), ADDRESS)
