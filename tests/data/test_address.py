"""What is an address, what is refused, what is shown of one."""

import pytest

from sdtrain.data.address import check_address, is_metadata_service, is_remote, scheme_of, shown
from sdtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "scheme"),
    [("/a/b.tar", ""), ("a b#?.tar", ""), ("HTTPS://x/y", "https"), ("s3://b/k", "s3"), (" Pipe:cat x", "pipe")],
)
def test_schemes(address, scheme):
    assert scheme_of(address) == scheme
    assert is_remote(address) == (scheme in ("https", "s3"))


def test_secrets_are_not_shown():
    assert shown("https://me:pass@host:81/a/b.tar?X-Amz-Signature=abc#d") == "https://host:81/a/b.tar"
    assert shown("/data/a?b#c.tar") == "/data/a?b#c.tar"


@pytest.mark.parametrize(
    "address",
    [
        "pipe:curl http://x/y.tar",
        "PIPE:ls",
        "file:///etc/passwd",
        "ftp://host/x.tar",
        "gs://bucket/x.tar",
        "http:///x.tar",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/folder/",
        "http://[::1/x.tar",
        "http://169.254.169.254/latest/meta-data/",
        "http://169.254.1.1/x.tar",
        "http://[fe80::1%25eth0]/x.tar",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]/x",
        "http://metadata.google.internal./x",
        "http://100.100.100.200/x",
    ],
)
def test_refused(address):
    with pytest.raises(ConfigError, match=r"^data.val: '"):
        check_address(address, "data.val")


def test_a_command_is_named_one():
    with pytest.raises(ConfigError, match="would run a command"):
        check_address("pipe:ls")


@pytest.mark.parametrize("address", ["/a.tar", "http://127.0.0.1:9000/a.tar", "https://h/a.tar?x=1", "s3://b/a.tar"])
def test_allowed(address):
    check_address(address)


def test_hosts_that_are_none():
    assert not any(map(is_metadata_service, ("example.org", "10.0.0.1", "127.0.0.1", "::1")))
