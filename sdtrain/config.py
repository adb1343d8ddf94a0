"""The config's shape (frozen root keys, typed sections) and `load_config`, which composes and checks before torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdtrain import preflight
from sdtrain.errors import ConfigError
from sdtrain.target import nearest, parts, read_signature
from sdtrain.tracker.redact import REDACTED, without_secrets


@dataclass
class TrainerConfig:
    """How long one stage trains, and in what portions."""

    max_steps: int = MISSING  # optimizer steps
    batch_size: int = MISSING  # images an optimizer step, over all ranks and micro-batches
    num_accumulate: int = 1  # micro-batches an optimizer step
    clip_norm: float | None = 1.0


@dataclass
class RecognitionConfig:
    """How the perceptual loss's network is trained, before stage 1, where no pretrained one is given."""

    network: Any = MISSING
    num_words: int = MISSING  # of the captions, to be named
    optim: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callback: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    strategy: Any = None
    precision: str | None = None


@dataclass
class AutoencoderConfig:
    """How stage 1 is trained. `recognition` makes the perceptual loss's network where none is given."""

    objective: Any = MISSING
    optim: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callback: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, Any] = field(default_factory=dict)
    recognition: RecognitionConfig | None = None
    compile: bool = False  # the blocks that the network repeats; on a CPU a U-Net is faster without
    data: Any = None
    strategy: Any = None
    precision: str | None = None


@dataclass
class DiffusionConfig:
    """How stage 2 is trained; its objective stands at the root."""

    optim: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callback: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, Any] = field(default_factory=dict)
    decoded: Any = None
    cache_latents: bool = False
    compile: bool = False  # the blocks that the network repeats; on a CPU a U-Net is faster without
    data: Any = None
    strategy: Any = None
    precision: str | None = None


@dataclass
class JobConfig:
    """What one stage's job asks for in place of the run's."""

    num_nodes: int | None = None
    time_minutes: int | None = None


@dataclass
class ClusterConfig:
    """What a Slurm job asks for and how it starts, read by slurm/submit.py; configs/cluster/slurm.yaml explains."""

    time_minutes: int = MISSING
    max_step_seconds: int = MISSING
    max_save_seconds: int = MISSING
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpu_type: str | None = None
    cpus_per_task: int = MISSING
    memory: str | None = None
    lines: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    python: str | None = None
    master_address: str | None = None
    submitted: str | None = None
    autoencoder: JobConfig = field(default_factory=JobConfig)
    diffusion: JobConfig = field(default_factory=JobConfig)


@dataclass
class RunConfig:
    """The root: the run, the machine, the parts, the two stages, where numbers go. train.yaml gives the values."""

    name: str = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    stages: list[str] = MISSING
    resume: str = MISSING
    accelerator: str = MISSING
    devices: int | str = MISSING
    num_nodes: int | str = MISSING
    precision: str = MISSING
    strategy: Any = MISSING
    data: Any = MISSING
    first_stage: Any = MISSING
    conditioner: Any = MISSING
    model: Any = MISSING
    objective: Any = MISSING
    sampler: Any = MISSING
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    tracker: Any = MISSING
    cluster: ClusterConfig | None = None


ROOT_KEYS = tuple(f.name for f in fields(RunConfig))
ConfigStore.instance().store("schema", RunConfig)


def config_directory() -> Path:
    """`configs/`: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def plus(override: str) -> str:
    """`experiment=x` and `debug=x` as Hydra wants them: they add to the defaults list."""
    return f"+{override}" if override.startswith(("experiment=", "debug=")) else override


def load_config(overrides: Iterable[str] = (), extra_directory: str | None = None) -> DictConfig:
    """`configs/train.yaml` under command-line overrides, checked. Raises ConfigError; imports nothing heavy."""
    overrides = [plus(override) for override in overrides]
    check_overrides(overrides)
    if extra_directory:
        overrides.append(f"hydra.searchpath=['file://{Path(extra_directory).resolve()}']")
    cfg = _compose(overrides)
    preflight.check(cfg)
    return cfg


def check_overrides(overrides: list[str]) -> None:
    """Refuse what Hydra cannot parse, naming the argument, and secrets, which would be written into the run's files."""
    parser = OverridesParser.create()
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            hint = f"""quote the value:  '{key}="{value}"'""" if value else "write key=value, +key=value or ~key"
            raise ConfigError(f"cannot read the argument {text!r}; {hint}") from error
        if not parsed.key_or_group:
            raise ConfigError(f"cannot read the argument {text!r}; write key=value, +key=value or ~key")
        last = parsed.key_or_group.rpartition(".")[2]
        if without_secrets({last: "value"})[last] == REDACTED:
            raise ConfigError(
                f"'{parsed.key_or_group}' looks like a secret, and arguments are written down; give secrets through"
                " the environment (WANDB_API_KEY, HF_TOKEN)"
            )


def _compose(overrides: list[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            return compose("train", overrides)
    except MissingConfigException as error:
        raise ConfigError(_explain_missing(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    except ValueError as error:  # Hydra's own word for a group set to null
        nulls = [override for override in overrides if override.endswith("=null")]
        raise ConfigError(f"{' '.join(nulls)}: {error}; name one of the group's options") from error
    except YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from error


def _explain_missing(error: MissingConfigException) -> str:
    """A group option, or a config file named in a defaults list, that is not there."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = [option for option in error.options or [] if "/" not in option]
    return (
        f"{group or 'config'}={name}: there is no {group}/{name}.yaml{nearest(name, options)}"
        f"\n  {group} is one of: {', '.join(options)}"
    )


def _explain(error: Exception, overrides: list[str]) -> str:
    """Hydra's and OmegaConf's composition errors in one line, with the key, the place and the nearest right name."""
    text = f"{error}\n{error.__cause__ or ''}"
    place = re.search(r"In '([^']+)'", text)
    where = f" (in configs/{place[1]}.yaml)" if place else ""
    full_key = re.search(r"full_key: *(\S+)", text)
    override = re.search(r"Error merging override (.*)", text)
    if unknown := re.search(r"Could not override '([^']+)'", text) or (
        re.search(r"Key '[^']+' (?:is )?not in", text) and full_key
    ):
        return _explain_unknown(unknown[1], overrides) + where
    if doubled := re.search(r"An item is already at '([^']+)'", text):
        return f"'{doubled[1]}' is set already; write {doubled[1]}=... without the plus"
    if value := re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text):
        kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}.get(value[2], value[2])
        return f"{full_key[1]} must be {kind}, not {value[1]!r}{where}"
    if replaced := re.search(r"is not a subclass of (\w+)Config|Cannot assign", text):
        section = full_key[1] if full_key else str(replaced[1]).lower()
        return f"{section} is a section, and takes no value itself; set a key in it: {section}.KEY=...{where}"
    if "is not a ListConfig, list or tuple" in text and override:
        key, _, value = override[1].partition("=")
        return f"{key} must be a list; write {key}=[{value}]"
    if ambiguous := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = ambiguous[1].partition("=")
        return f"""{key}: the value has commas; quote it:  '{key}="{value}"'  (a list: {key}=[...]; a sweep: add -m)"""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("In '", "Error merging"))]
    return f"{override[1] if override else ''}{': ' if override else ''}{lines[0]}{where}"


def _explain_unknown(key: str, overrides: list[str]) -> str:
    """The key as given, and the nearest key of the config as it would be without the argument that names it."""
    rest = [o for o in overrides if o.lstrip("+~").partition("=")[0] != key and not _adds_file(o, overrides, key)]
    try:
        cfg = _compose(rest)
    except ConfigError:
        return f"unknown key '{key}'{nearest(key, set(ROOT_KEYS))}"
    known = set(known_keys(cfg))
    if "@" in key and key.partition("@")[2] in known:
        return f"no file puts the group {key} there yet, so it is added with a plus: +{key}=..."
    if OmegaConf.is_dict(OmegaConf.select(cfg, key)):
        return f"'{key}' is a section, and takes no value itself; set a key in it: {key}.KEY=..."
    if key in known:
        return f"'{key}' is not set in the config's files, so it is added with a plus: +{key}=..."
    parent, _, last = key.rpartition(".")
    siblings = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
    if near := nearest(last, siblings):
        return f"unknown key '{key}'{near.replace(chr(39), chr(39) + parent + '.', 1) if parent else near}"
    same = [k for k in known if k.rpartition(".")[2] == last]
    if parent:  # what lies on the way was mistyped
        same.sort(key=lambda k: (-difflib.SequenceMatcher(None, k, key).ratio(), k))
    same = same[:1] if parent else sorted(same, key=lambda k: (k.count("."), k))[:3]
    return f"unknown key '{key}'" + (f"; did you mean {' or '.join(same)}?" if same else nearest(key, known))


def _adds_file(override: str, overrides: list[str], key: str) -> bool:
    """Whether the unknown key can only come from this argument's file: no other argument names it."""
    is_named = any(o.lstrip("+~").partition("=")[0] == key for o in overrides)
    return not is_named and override.startswith(("+experiment=", "+debug="))


def known_keys(cfg: DictConfig) -> Iterator[str]:
    """Every dotted key that a composed config takes, the unset arguments of its parts included."""
    container = OmegaConf.to_container(cfg)

    def walk(node: Any, path: str) -> Iterator[str]:
        for key, child in node.items() if isinstance(node, dict) else ():
            yield f"{path}{key}"
            yield from walk(child, f"{path}{key}.")

    yield from walk(container, "")
    for path, node in parts(container):
        try:
            signature = read_signature(node["_target_"])
        except ConfigError:
            continue
        yield from (f"{path}.{name}" for name in signature.arguments)
