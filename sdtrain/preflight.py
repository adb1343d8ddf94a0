"""The checks between composing a config and importing anything heavy: every mistake ends here, in one line."""

from __future__ import annotations

import dataclasses
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtrain.errors import ConfigError
from sdtrain.target import ROOMS, check_node, nearest, parts, read_signature

STAGES = ("autoencoder", "diffusion")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
RESUMES = ("auto", "must", "never")
# Keys of parts that name what must be there before a run. The perceptual loss says itself which files it wants.
SOURCES = {"data.shards", "data.val_shards", "first_stage.weights", "model.weights"}
LEAST_FREE_BYTES = 64 * 2**20


def check(cfg: DictConfig) -> None:
    """Raise a ConfigError for the first thing wrong with a composed config."""
    check_interpolations(cfg)
    check_fields(cfg)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    check_run(resolved)
    check_slots(OmegaConf.get_type(cfg), resolved)
    for stage in STAGES:
        check_trainer(resolved, stage)
        check_slots(OmegaConf.get_type(cfg, stage), resolved[stage], f"{stage}.")
    for path, node in parts(resolved):
        check_node(path, node)
        check_sources(path, node)
    check_objectives(resolved)
    check_output_directory(Path(resolved["output_dir"]))


def check_interpolations(cfg: DictConfig) -> None:
    """Refuse `${...}` that leads nowhere, a value still missing, and the clock, which each process reads for itself."""
    for path, parent, key in leaves(cfg):
        raw = OmegaConf.to_container(parent, resolve=False)[key]
        if "${now:" in str(raw):
            raise ConfigError(f"{path}: '{raw}' asks the clock, and each process reads its own; write the value itself")
        if OmegaConf.is_missing(parent, key):
            raise ConfigError(f"{path} has no value; set it with {path}=... or choose an experiment that does")
        try:
            _ = parent[key]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: '{raw}': {str(error).splitlines()[0]}") from error


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every (dotted path, parent, key) whose value is written there: a scalar, an interpolation or a missing value."""
    keys = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        below = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
        written = OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)
        child = None if written else node[key]
        if isinstance(child, DictConfig | ListConfig):
            yield from leaves(child, below)
        else:
            yield below, node, key


def check_fields(cfg: DictConfig, path: str = "") -> None:
    """Refuse a key that no dataclass field stands for: `+key=value` and files can add such a key."""
    fields = {field.name for field in dataclasses.fields(OmegaConf.get_type(cfg))}
    for key in cfg:
        below = f"{path}{key}"
        if key not in fields:
            raise ConfigError(f"unknown key '{below}'{nearest(key, fields)}")
        if dataclasses.is_dataclass(OmegaConf.get_type(cfg, key)):
            check_fields(cfg[key], f"{below}.")


def check_run(cfg: dict[str, Any]) -> None:
    """The run's and the machine's own values."""
    stages = cfg["stages"]
    if not stages or stages != [stage for stage in STAGES if stage in stages]:
        unknown = next((stage for stage in stages if stage not in STAGES), "")
        listed = ", ".join(STAGES)
        raise ConfigError(
            f"stages={stages}: name one or both of {listed}, in this order{nearest(unknown, set(STAGES))}"
        )
    for key, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        if cfg[key] not in known:
            raise ConfigError(f"{key}={cfg[key]} is none of {', '.join(known)}{nearest(cfg[key], set(known))}")
    for key in ("devices", "num_nodes"):
        if cfg[key] != "auto" and not (isinstance(cfg[key], int) and cfg[key] >= 1):
            raise ConfigError(f"{key}={cfg[key]} must be a whole number from 1 on, or auto")
    if cfg["resume"] not in RESUMES and not Path(cfg["resume"]).is_dir():
        raise ConfigError(f"resume={cfg['resume']} is none of {', '.join(RESUMES)} and no checkpoint directory")
    if cfg["seed"] < 0:
        raise ConfigError(f"seed={cfg['seed']} must be 0 or more")


def check_trainer(cfg: dict[str, Any], stage: str) -> None:
    """A stage's budget, portions and precision."""
    trainer = cfg[stage]["trainer"]
    for key in ("max_steps", "batch_size", "num_accumulate"):
        if trainer[key] < 1:
            raise ConfigError(f"{stage}.trainer.{key}={trainer[key]} must be at least 1")
    counts = [cfg[key] for key in ("devices", "num_nodes") if isinstance(cfg[key], int)]
    portions = trainer["num_accumulate"]
    for count in counts:
        portions *= count
    if trainer["batch_size"] % portions:
        raise ConfigError(
            f"{stage}.trainer.batch_size={trainer['batch_size']} is the global batch: it must be a multiple of"
            f" {portions} (devices x num_nodes x {stage}.trainer.num_accumulate)"
        )
    precision = cfg[stage]["precision"] or cfg["precision"]
    key = f"{stage}.precision" if cfg[stage]["precision"] else "precision"
    if precision not in PRECISIONS:
        raise ConfigError(f"{key}={precision} is none of {', '.join(PRECISIONS)}{nearest(precision, set(PRECISIONS))}")
    if precision == "16-mixed" and cfg["accelerator"] == "cpu":
        raise ConfigError(f"{key}=16-mixed does not exist on a CPU; write {key}=bf16-mixed or {key}=32-true")


def check_slots(schema: type, values: dict[str, Any], path: str = "") -> None:
    """Every place for a part holds one, of the right room: a node with `_target_`, or nothing where that is allowed."""
    for field in dataclasses.fields(schema):
        value, below = values[field.name], f"{path}{field.name}"
        if field.type == "dict[str, Any]":
            for key, child in value.items():
                check_slot(f"{below}.{key}", field.name, child, is_optional=True)
        elif field.type == "Any":
            check_slot(below, field.name, value, is_optional=field.default is None)


def check_slot(path: str, name: str, value: Any, is_optional: bool) -> None:
    """One place for a part; `name` is its field's, and where that is a room's the part comes from that room."""
    if value is None and is_optional:
        return
    if not isinstance(value, dict) or "_target_" not in value:
        group = path if path == name else f"{name}@{path}"
        raise ConfigError(
            f"{path}: {value!r} stands where a part belongs; write {group}=NAME on the command line"
            f"\n  in a file:  defaults: [override /{group}: NAME], or a node with `_target_`"
        )
    words = str(value["_target_"]).split(".")
    if name in ROOMS and words[0] == "sdtrain" and words[1] != name:
        raise ConfigError(f"{path}._target_ '{value['_target_']}' is no part of sdtrain/{name}/")


def check_objectives(cfg: dict[str, Any]) -> None:
    """Stage 2's objective says what a prediction means (`to_x0`); stage 1's does not."""
    for path, node, is_denoising in (
        ("objective", cfg["objective"], True),
        ("autoencoder.objective", cfg["autoencoder"]["objective"], False),
    ):
        if ("to_x0" in read_signature(node["_target_"]).methods) != is_denoising:
            stage, other = ("diffusion", "autoencoder") if is_denoising else ("autoencoder", "diffusion")
            spelled = "objective=NAME" if is_denoising else "objective@autoencoder.objective=NAME"
            raise ConfigError(
                f"{path}: {node['_target_']} is an objective of the {other} stage; choose one of the {stage} stage's"
                f" with {spelled}"
            )


def check_sources(path: str, node: dict[str, Any]) -> None:
    """What a run starts from is there: shards (a file, a folder or a pattern) and weights. Addresses are not asked."""
    for key in (key for key in node if f"{path}.{key}" in SOURCES):
        named = node[key] if isinstance(node[key], list) else [node[key]]
        for source in (source for source in named if isinstance(source, str) and "://" not in source):
            if not glob.glob(source) and not Path(source).exists():
                raise ConfigError(f"{path}.{key}: there is nothing at {source}")


def check_output_directory(directory: Path) -> None:
    """The directory can be made and written, and its disk has some room."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"output_dir={directory}: {existing} is a file; choose another output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir={directory}: {existing} cannot be written; choose another output_dir")
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < LEAST_FREE_BYTES:
        raise ConfigError(f"output_dir={directory}: only {free_bytes / 2**20:.0f} MiB are free on that disk")
