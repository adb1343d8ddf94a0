"""What a sample is made of: which members of a shard are read, how large they may be, which names are refused."""

from __future__ import annotations

from sdtrain.data.caption import MAX_CAPTION_BYTES
from sdtrain.data.decode import MAX_IMAGE_BYTES

IMAGE, CAPTION, JSON = range(3)  # the columns of an index's `offset`, `size` and `crc`
COMPANIONS = {"mask": 3, "source": 4}  # pictures that go with the picture: x.mask.png beside x.png, by their batch key
ABSENT = -1
MAX_JSON_BYTES = 256 * 1024
MAX_BYTES = (MAX_IMAGE_BYTES, MAX_CAPTION_BYTES, MAX_JSON_BYTES, MAX_IMAGE_BYTES, MAX_IMAGE_BYTES)
TOO_LARGE = ("image_too_large", "caption_too_large", "bad_json", "image_too_large", "image_too_large")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
KINDS = {"txt": CAPTION, "json": JSON} | dict.fromkeys(IMAGE_SUFFIXES, IMAGE)
KINDS |= {f"{name}.{suffix}": kind for name, kind in COMPANIONS.items() for suffix in IMAGE_SUFFIXES}
# Other readers run or unpack these; they are never opened here, and reported by name.
FORBIDDEN = {"pyd", "pkl", "pickle", "pth", "pt", "npz", "gz", "bz2", "xz", "zst"}
_MAX_KEY_BYTES = 255


def split_name(name: str) -> tuple[str, str]:
    """A member's key and suffix, as webdataset has them: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem:
        return "", suffix.lower()
    return (f"{folder}/{stem}" if folder or name.startswith("/") else stem), suffix.lower()


def is_forbidden(suffix: str) -> bool:
    """Also `txt.gz` and the like."""
    return suffix.rpartition(".")[2] in FORBIDDEN


def is_safe_key(key: str) -> bool:
    """No way out of a folder, nothing invisible; what was not UTF-8 has backslashes by now."""
    return (
        key.isprintable()
        and "\\" not in key
        and not key.startswith("/")
        and ".." not in key.split("/")
        and len(key.encode(errors="replace")) <= _MAX_KEY_BYTES
    )
