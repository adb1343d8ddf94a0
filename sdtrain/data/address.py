"""Where a shard lies: a local path, http(s) or s3. What is refused, and how an address is shown to people."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urljoin, urlsplit

from sdtrain.errors import ConfigError

_REMOTE = ("http", "https", "s3")
_METADATA_HOSTS = {"metadata", "metadata.google.internal", "instance-data", "fd00:ec2::254", "100.100.100.200"}


def is_remote(address: str) -> bool:
    """Whether it is to be fetched."""
    return scheme_of(address) in _REMOTE


def scheme_of(address: str) -> str:
    """ "" for a path; else what stands before the colon."""
    scheme, separator, _ = address.partition("://")
    if separator:
        return scheme.lower()
    return "pipe" if address.lstrip().lower().startswith("pipe:") else ""


def shown(address: str) -> str:
    """The address without what may be secret: user, password, query, fragment."""
    if not is_remote(address):
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_address(address: str, option: str = "data.shards") -> None:
    """Refuses what would run a command, what is no shard's place, and machines' metadata services.

    Raises:
        ConfigError: naming the address and the reason.
    """
    scheme = scheme_of(address)
    if scheme == "pipe":
        raise ConfigError(f"{option}: '{address[:80]}' would run a command; give the address that it reads from")
    if scheme and scheme not in _REMOTE:
        raise ConfigError(f"{option}: '{shown(address)[:80]}': shards are read from paths, http(s):// and s3:// only")
    try:
        host = urlsplit(address).hostname if scheme else ""
    except ValueError as error:
        raise ConfigError(f"{option}: '{address[:80]}' is not an address ({error})") from None
    if scheme and not host:
        raise ConfigError(f"{option}: '{shown(address)[:80]}' names no host or bucket")
    if scheme == "s3" and (not urlsplit(address).path or address.endswith("/")):
        raise ConfigError(f"{option}: '{address[:80]}' names no object; write s3://BUCKET/FOLDER/*.tar in quotes")
    if scheme in ("http", "https") and is_metadata_service(host):
        raise ConfigError(f"{option}: '{shown(address)[:80]}' is a metadata service or a link-local address; refused")


def follow(here: str, location: str) -> str:
    """Where a redirect leads: to http(s) only, never back from https to http, and to no metadata service.

    Raises:
        ConfigError: where it may not be followed.
    """
    there = urljoin(here, location)
    if scheme_of(there) not in ({"https"} if scheme_of(here) == "https" else {"http", "https"}):
        raise ConfigError(f"data: {shown(here)} redirects to '{shown(there)[:80]}'; only http(s) is followed")
    check_address(there, f"data: {shown(here)} redirects")
    return there


def check_numbers(host: str, numbers: Iterable[str]) -> None:
    """A host's name may not stand for a metadata service either. Raises ConfigError."""
    if any(map(is_metadata_service, numbers)):
        raise ConfigError(f"data: {host} is a metadata service or a link-local address; refused")


def is_metadata_service(host: str) -> bool:
    """Whether a host's name or number is one that hands a machine its credentials, or is link-local as those are."""
    host = host.strip("[]").rstrip(".").lower()
    try:
        number = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host in _METADATA_HOSTS
    number = getattr(number, "ipv4_mapped", None) or number
    return number.is_link_local or str(number) in _METADATA_HOSTS
