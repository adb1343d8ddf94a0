"""What a pipeline is told, words, labels, pictures and sizes, as the batch that the model's conditioner reads."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from sdtrain.contracts import Batch, Input
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.decode import decode_image, open_image, upright_size
from sdtrain.data.view import to_float
from sdtrain.errors import ConfigError
from sdtrain.target import parts
from sdtrain.tracker.jsonl import read_rows

_KEEP = (0, 0, 0)  # what a mask's transparent pixels are: not to be painted
_LONGEST = 100  # characters of a caption that is suggested

Told = Mapping[str, Any]  # by key: one value for all pictures, or a list with one for each
Size = tuple[int, int]  # height and width


def read_told(told: Told, inputs: Mapping[str, Input], num: int | None, sizes: Mapping[str, Size]) -> Batch:
    """A batch with all that the conditioner reads, and an empty caption where it reads none.

    Args:
        num: pictures; None: as many as the longest list has.
        sizes: of pictures, by `Input.at`: "image_size" and "latent_size".

    Raises:
        ConfigError: for what is missing, is not read, does not go together, or cannot be read.
    """
    _check(told, inputs)
    lists = {key: value if isinstance(value, list) else [value] for key, value in told.items()}
    num = max([1, *map(len, lists.values())]) if num is None else num
    if num < 1:
        raise ConfigError(f"num={num} must be at least 1")
    for key, values in lists.items():
        if len(values) not in (1, num):
            raise ConfigError(f"{key}: {len(values)} for {num} pictures; give one for all, or one for each")
    batch: Batch = {"caption": [""] * num}
    for key, values in lists.items():
        read = inputs[key]
        found = [_READ[read.kind](key, value, sizes[read.at]) for value in values]
        found = found * (num // len(found))
        batch[key] = torch.cat(found) if isinstance(found[0], Tensor) else found
    return batch


def followed_size(told: Told, inputs: Mapping[str, Input], down_factor: int) -> Size | None:
    """Width and height of what is drawn, where a picture says them: one that is wanted at the latents' size."""
    for key, read in inputs.items():
        if read.kind == "picture" and read.at == "latent_size" and key in told:
            value = told[key][0] if isinstance(told[key], list) and told[key] else told[key]
            width, height = _guarded(key, value, lambda data: upright_size(open_image(data)))
            return width * down_factor, height * down_factor
    return None


def example(conditioner: DictConfig, directory: Path | None = None) -> str:
    """What tools/sample.py may be told for a run with this conditioner, read from its classes; nothing is built.

    Args:
        directory: the run's, whose own captions are the ones that its model knows the words of.
    """
    found: dict[str, Input] = {}
    for _, node in parts(OmegaConf.to_container(conditioner, resolve=True)):
        found |= getattr(get_object(node["_target_"]), "inputs", {})
    said = {"text": shlex.quote(_own_caption(directory)), "label": "--label 0"}
    words = [said.get(read.kind, f"--{key} FILE") for key, read in found.items() if read.is_needed]
    return " ".join(sorted(words, key=lambda word: word.startswith("--"))) or "--num 4"


def _own_caption(directory: Path | None) -> str:
    """The first caption that the run drew a preview of and that a shell takes in a line."""
    metrics = None if directory is None else directory / "metrics.jsonl"
    rows = read_rows(metrics) if metrics is not None and metrics.is_file() else []
    drawn = (row for row in rows if row.get("event") == "image" and row.get("name") == "diffusion/samples")
    captions = (caption for row in drawn for caption in row.get("captions", ()))
    fit = (text for text in captions if text.isprintable() and 0 < len(text) <= _LONGEST and text[0] != "-")
    return next(fit, "a caption")


def _check(told: Told, inputs: Mapping[str, Input]) -> None:
    reads = ", ".join(f"{key}{'' if read.is_needed else ' (if given)'}" for key, read in inputs.items()) or "nothing"
    for key in told:
        if key not in inputs:
            raise ConfigError(f"{key} is given, and this run's model does not read it; it reads {reads}")
    for key, read in inputs.items():
        if read.is_needed and key not in told:
            raise ConfigError(f"{key} is missing: this run's model reads {reads}")


def _text(key: str, value: Any, _size: Size) -> str:  # noqa: ANN401 whatever a user gives
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r} is no text")
    return value


def _label(_key: str, value: Any, _size: Size) -> Any:  # noqa: ANN401 the conditioner knows its classes
    return value


def _picture(key: str, value: Any, size: Size) -> Tensor:  # noqa: ANN401
    """(1, 3, H, W) in [-1, 1], scaled to cover and cut as the reader of the training data does."""
    return to_float(np.stack([_guarded(key, value, lambda data: decode_image(data, *size).pixels)]))


def _mask(key: str, value: Any, size: Size) -> Tensor:  # noqa: ANN401
    """(1, 1, H, W) from 0 to 1, of a picture's brightness: white is painted."""
    pixels = _guarded(key, value, lambda data: decode_image(data, *size, ground=_KEEP).pixels)
    return torch.from_numpy(pixels.astype(np.float32).mean(axis=-1) / 255)[None, None]


def _pair(key: str, value: Any, _size: Size) -> tuple[int, int]:  # noqa: ANN401
    value = (value, value) if isinstance(value, int) else value
    if not (isinstance(value, tuple) and len(value) == 2 and all(isinstance(n, int) and n >= 0 for n in value)):
        raise ConfigError(f"{key}={value!r} is no pair of pixels")
    return value


def _size(key: str, value: Any, size: Size) -> Tensor:  # noqa: ANN401
    """(1, 2) height and width, of width and height."""
    return torch.tensor([_pair(key, value, size)[::-1]])


def _place(key: str, value: Any, size: Size) -> Tensor:  # noqa: ANN401
    """(1, 2) top and left."""
    return torch.tensor([_pair(key, value, size)])


_READ: Mapping[str, Callable[[str, Any, Size], Any]] = {
    "text": _text,
    "label": _label,
    "picture": _picture,
    "mask": _mask,
    "size": _size,
    "place": _place,
}


def _guarded(key: str, value: Any, use: Callable[[bytes], Any]) -> Any:  # noqa: ANN401
    """What is made of a picture: a path, or one of Pillow's."""
    name = "the picture" if isinstance(value, Image.Image) else value
    try:
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.save(file, "PNG", compress_level=1)
            return use(file.getvalue())
        return use(Path(value).expanduser().read_bytes())
    except TypeError as error:
        raise ConfigError(f"{key}={value!r} is neither a path nor a picture of Pillow's") from error
    except BadSample as error:
        raise ConfigError(f"{key}: {name} cannot be used: {error}") from error
    except OSError as error:
        raise ConfigError(f"{key}: {name} cannot be read: {error.strerror or error}") from error
