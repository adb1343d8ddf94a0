"""One directory, one run: what is written down of a config, and what may differ when the run goes on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdtrain.errors import ConfigError
from sdtrain.preflight import check_output_directory
from sdtrain.tracker.redact import without_secrets

# What changes neither the pictures seen nor the weights' shapes. All that matches nothing here is the run itself.
ALLOWED = re.compile(
    r"(name|output_dir|stages|resume|accelerator|devices|num_nodes|strategy|tracker|cluster)\b.*"
    r"|(autoencoder|diffusion)(\.recognition)?\.(callback|metric|strategy|compile|trainer\.(max_steps|num_accumulate))\b.*"
    r"|.*\b(\w*every_\w+|num_workers|start_method|cache_bytes|cache_dir|cache_shard_bytes|max_bad_fraction"
    r"|gradient_checkpointing)|data\.root"
)
WARNED = re.compile(
    r"precision|(autoencoder|diffusion)(\.recognition)?\.(optim|callback\.ema|precision|trainer\.clip_norm)\b.*"
    r"|data\.sources\.[^.]+\.weight"  # from the next block of the plan on
)


class Difference(NamedTuple):
    """One key with its value before and now."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key} {self.old} -> {self.new}"


class Differences(NamedTuple):
    """The differences between two configs, by what they mean for a run that goes on."""

    refused: list[Difference]
    warned: list[Difference]
    allowed: list[Difference]


def resolve_and_redact(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values to write down, without secrets."""
    return without_secrets(OmegaConf.to_container(cfg, resolve=True))


def config_text(cfg: DictConfig) -> str:
    """The same as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(resolve_and_redact(cfg)))


def write_config(directory: Path, cfg: DictConfig) -> None:
    """DIR/config.yaml, in one piece: another rank may be reading it."""
    part = directory / "config.yaml.tmp"
    part.write_text(config_text(cfg))
    part.replace(directory / "config.yaml")


def config_hash(cfg: DictConfig) -> str:
    """A hash of what makes the run this run: data, parts, seed and global batch."""
    flat = flatten(resolve_and_redact(cfg))
    own = {key: value for key, value in flat.items() if not ALLOWED.fullmatch(key) and not WARNED.fullmatch(key)}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def compare(previous: dict[str, Any], current: dict[str, Any]) -> Differences:
    """What differs between two resolved configs: refused, warned of, allowed."""
    old, new = flatten(previous), flatten(current)
    found = Differences([], [], [])
    for key in sorted(old.keys() | new.keys()):
        difference = Difference(key, old.get(key), new.get(key))
        if difference.old == difference.new:
            continue
        if WARNED.fullmatch(key):
            found.warned.append(difference)
        elif ALLOWED.fullmatch(key):
            found.allowed.append(difference)
        else:
            found.refused.append(difference)
    return found


def check_continuation(directory: Path, cfg: DictConfig) -> list[str]:
    """Warnings about going on in `directory` with this config; ConfigError where it holds another run's.

    A run that ended before a stage began (a wrong path, a missing file) binds nobody: its command can be mended.
    """
    check_output_directory(directory)
    file = directory / "config.yaml"
    if not file.is_file() or not any(child.is_dir() for child in directory.iterdir()):
        return []
    current = resolve_and_redact(cfg)
    found = compare(_read_config(file), current)
    if found.refused:
        kept = directory / "autoencoder"
        hint = f"; to keep its stage 1: stages=[diffusion] first_stage.weights={kept}"
        raise ConfigError(
            f"output_dir={directory} holds a run of another config: {'; '.join(map(str, found.refused[:3]))}"
            f"{f' and {len(found.refused) - 3} more' if len(found.refused) > 3 else ''}"
            "\n  undo the difference, or choose another output_dir"
            f"{hint if (kept / 'manifest.json').is_file() else ''}"
        )
    told = [f"{difference} differs from the run before" for difference in found.warned]
    values = flatten(current)
    for difference in (each for each in found.allowed if each.key.endswith(".trainer.max_steps")):
        key = difference.key.replace("trainer.max_steps", "optim.decay")
        if values.get(key, "constant") != "constant":
            told.append(f"{difference} moves the learning rate, which falls until the last step ({key}={values[key]})")
    return told


def begin_anew(directory: Path, stages: Sequence[str]) -> list[str]:
    """Puts aside what these stages left here; else a run that dies before its first checkpoint would go on from the
    one before it, and a stage that was done once would count as done. Returns a line for each.
    """
    names = [*(["recognition"] if "autoencoder" in stages else []), *stages]
    file, told = directory / "summary.json", []
    if file.exists():
        part = file.with_suffix(".tmp")
        part.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in names}, indent=2))
        part.replace(file)
    for name in names:
        if (directory / name).exists():
            kept = directory / "old" / name
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            (directory / name).rename(kept)
            told.append(f"{name}: begins anew; what was here is in {kept} until the next time")
    return told


def check_submitted(directory: Path, cfg: DictConfig, digest: str) -> None:
    """What a job trains is what was sent, whatever has been edited while it waited.

    Args:
        cfg: what the job composed.
        digest: of what `slurm/submit.py` wrote of the config then.

    Raises:
        ConfigError: naming all keys that differ, but those that may change while a run goes on.
    """
    file = directory / "slurm" / "config.yaml"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise ConfigError(f"{file} is not what this job was sent with; send it again with slurm/submit.py")
    found = compare(_read_config(file), resolve_and_redact(cfg))
    if found.refused or found.warned:
        raise ConfigError(
            f"the config was changed after this job was sent: {'; '.join(map(str, found.refused + found.warned))}"
            "\n  undo the difference, or send the job again with slurm/submit.py"
        )


@cache
def code_version() -> dict[str, str]:
    """What runs: the package's version, a hash of its source and, of a checkout, the commit (-dirty: edited since).

    As it was when the process first asked: what is edited later does not run here.
    """
    package = Path(__file__).parent
    source = hashlib.sha256()
    for file in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".c")):
        source.update(str(file.relative_to(package)).encode() + file.read_bytes())
    found = {"source": source.hexdigest()[:12]}
    with suppress(PackageNotFoundError):
        found["version"] = version("sdtrain")
    if (package.parent / ".git").exists():  # else a repository around it is somebody else's
        ask = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return found


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(
            f"{file} cannot be read: {' '.join(str(error).split())}; choose another output_dir"
        ) from error


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted key; a list is a leaf unless it holds mappings."""
    if isinstance(node, dict) and node:
        pairs = [(f"{path}.{key}" if path else str(key), child) for key, child in node.items()]
    elif isinstance(node, list) and any(isinstance(child, dict) for child in node):
        pairs = [(f"{path}[{index}]", child) for index, child in enumerate(node)]
    else:
        return {path: node}
    return {key: value for below, child in pairs for key, value in flatten(child, below).items()}
