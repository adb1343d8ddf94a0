"""What an experiment wants to find before it begins: a right config, shards, files of weights. Read by doctor.py."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.preflight import SOURCES, check_handover
from sdtrain.target import parts

NOWHERE = "s3://looked-at/by-doctor"  # stands for the files that have a line of their own here


@dataclass(frozen=True)
class Line:
    """What was looked at, how it is, and what to do about it where `status` is "fail"."""

    name: str
    status: str  # pass | note | fail
    said: str
    advice: str = ""


def config(values: dict[str, Any], overrides: Sequence[str]) -> Iterator[Line]:
    """What python -m sdtrain would check, but for the files that have lines of their own."""
    named = [key for key in sorted(SOURCES) if key.partition(".")[2] in values[key.partition(".")[0]]]
    load_config([*overrides, *(f"{key}='{NOWHERE}'" for key in named)])
    yield Line("config", "pass", f"name={values['name']} stages=[{','.join(values['stages'])}]")


def shards(data: dict[str, Any]) -> Iterator[Line]:
    """The first bytes of the first shard of each source, or the index folder."""
    named = {f"data.{key}": data[key] for key in ("shards", "val") if isinstance(data.get(key), str | list)}
    named |= {f"data.sources.{name}.shards": one["shards"] for name, one in as_mapping(data.get("sources")).items()}
    if not named:
        yield Line("shards", "pass", "made by the run itself")
    for option, given in named.items():
        yield shard(option, given)


def as_mapping(value: Any) -> dict[str, Any]:
    """The value, or nothing where it is none or still missing."""
    return value if isinstance(value, dict) else {}


def shard(option: str, given: str | list[str]) -> Line:
    """One source's."""
    from sdtrain.data.address import is_remote, shown
    from sdtrain.data.download import find_version
    from sdtrain.data.index import find_shards
    from sdtrain.data.manifest import is_index_folder, open_folder

    if given == "???":
        return Line(option, "fail", "has no value", f"{option}='SHARDS/*.tar'; tools/make_shards.py makes shards")
    try:
        first, *others = find_shards(given, option)
        if not is_remote(first) and is_index_folder(first):
            about = open_folder(Path(first))
            return Line(option, "pass", f"an index of {len(about.records)} shards that are as they were: {first}")
        num_bytes = find_version(first)[0]
        if not is_remote(first):
            with open(first, "rb") as file:
                file.read(512)
    except (ConfigError, OSError) as error:
        return Line(
            option, "fail", str(error).splitlines()[0], "" if isinstance(error, ConfigError) else f"set {option}"
        )
    return Line(option, "pass", f"{len(others) + 1} shards; the first has {num_bytes} bytes: {shown(first)}")


def weights(values: dict[str, Any]) -> Iterator[Line]:
    """The files of weights that the run's stages read before they begin, and where they go."""
    check_handover(values)
    found = False
    for path, node in parts(values):
        if path.partition(".")[0] in ("autoencoder", "diffusion") and path.partition(".")[0] not in values["stages"]:
            continue
        is_of_stage_two = path.partition(".")[0] in ("conditioner", "model")
        if is_of_stage_two and "diffusion" not in values["stages"]:
            continue
        for key in (key for key in ("weights", "heads", "pretrained") if isinstance(node.get(key), str)):
            found = True
            yield pretrained(path, node) if key == "pretrained" else file_of_weights(f"{path}.{key}", node[key], values)
    if not found:
        yield Line("weights", "pass", "none are wanted: all is trained from nothing")


def pretrained(path: str, node: dict[str, Any]) -> Line:
    """A folder of transformers', or its name in the Hugging Face cache."""
    from sdtrain.conditioner.pretrained import find_folder

    try:
        place = find_folder(node["pretrained"], "text encoder")
    except ConfigError as error:
        owner = "/".join(node["pretrained"].split("/")[:2])
        advice = f"on a machine with a network: hf download {owner}; or set {path}.pretrained=FOLDER"
        return Line(f"{path}.pretrained", "fail", str(error), advice)
    return Line(f"{path}.pretrained", "pass", str(place))


def file_of_weights(key: str, name: str, values: dict[str, Any]) -> Line:
    """A file, or a run's folder. Names such as vgg16-397923af.pth hold the first of the file's sha256."""
    places = (Path(name).expanduser(), Path(values["output_dir"], name).expanduser())
    place = next((place for place in places if place.exists()), None)
    if place is None:
        if name.startswith(str(values["output_dir"])):
            return Line(key, "note", f"{name} is made by the run itself")
        return Line(key, "fail", f"there is nothing at {name}", wanted(key, name))
    digits = re.search(r"-([0-9a-f]{8})\.", place.name)
    if digits and place.is_file():
        with place.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(digits[1]):
            return Line(key, "fail", f"{place} is damaged: its sha256 begins with {found[:8]}", wanted(key, name))
    return Line(key, "pass", str(place))


def wanted(key: str, name: str) -> str:
    """Where a file comes from, as a command."""
    if key.endswith("perceptual.weights"):
        return f"curl -L --create-dirs -o {name} https://download.pytorch.org/models/vgg16-397923af.pth (528 MB)"
    if key.endswith("perceptual.heads"):
        folder = Path(find_spec("torchmetrics").origin).parent / "functional" / "image" / "lpips_models"
        return f"cp {folder / 'vgg.pth'} {name}"
    if "inception" in name:
        from sdtrain.metric.inception import WANTED

        address, size = re.search(r"\((\S+), (.*)\)", WANTED).groups()
        return f"curl -L --create-dirs -o {name} {address} ({size})"
    return f"set {key} to a run of ours, a diffusers folder or a .safetensors file"
