"""The checks between composing a config and importing anything heavy: every mistake ends here, in one line."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdtrain.agreement import STAGES, check_agreement
from sdtrain.errors import ConfigError
from sdtrain.target import ROOMS, check_allowed, check_node, nearest, parts

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
RESUMES = ("auto", "must", "never")
# Keys of parts that name what must be there before a run. The perceptual loss says itself which files it wants.
SOURCES = {"data.shards", "data.val", "first_stage.weights", "model.weights"}
LEAST_FREE_BYTES = 64 * 2**20
MOST_SEED = 2**32 - 1  # numpy takes no larger one
SHARDING, SHARDED = "sdtrain.strategy.deepspeed.DeepSpeed", "sdtrain.optim.adamw.AdamW"


def check(cfg: DictConfig) -> None:
    """Raise a ConfigError for the first thing wrong with a composed config."""
    check_interpolations(cfg)
    check_fields(cfg)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    check_finite(resolved)
    check_run(resolved)
    check_slots(OmegaConf.get_type(cfg), resolved)
    for path in (*STAGES, "autoencoder.recognition"):
        section = OmegaConf.select(cfg, path)
        if section is not None:
            check_trainer(resolved, path, OmegaConf.to_container(section, resolve=True))
            check_sharding(resolved, path, OmegaConf.to_container(section, resolve=True))
    check_agreement(resolved)
    for path, node in parts(resolved):
        check_node(path, node)
        if path.partition(".")[0] not in STAGES or path.partition(".")[0] in resolved["stages"]:
            check_sources(path, node, Path(resolved["output_dir"]))
    check_output_directory(Path(resolved["output_dir"]))
    check_handover(resolved)


def check_interpolations(cfg: DictConfig) -> None:
    """Refuse `${...}` that leads nowhere, a value still missing, and the clock, which each process reads for itself."""
    for path, raw in leaves(OmegaConf.to_container(cfg, resolve=False)):
        if raw == "???":
            raise ConfigError(f"{path} has no value; set it with {path}=... or choose an experiment that does")
        if "${now:" in str(raw):
            raise ConfigError(f"{path}: '{raw}' asks the clock, and each process reads its own; write the value itself")
        try:
            _ = OmegaConf.select(cfg, path) if "${" in str(raw) else None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{path}: '{raw}': {str(error).splitlines()[0]}") from error


def check_finite(cfg: dict[str, Any]) -> None:
    """Refuse nan and infinity, which every comparison lets through."""
    for path, value in leaves(cfg):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value} is no number to train with")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its dotted path."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from leaves(child, f"{path}[{index}]")
    else:
        yield path, value


def check_fields(cfg: DictConfig, path: str = "") -> None:
    """Refuse a key that no dataclass field stands for: `+key=value` and files can add such a key."""
    fields = {field.name for field in dataclasses.fields(OmegaConf.get_type(cfg))}
    for key in cfg:
        below = f"{path}{key}"
        if key not in fields:
            raise ConfigError(f"unknown key '{below}'{nearest(key, fields)}")
        if dataclasses.is_dataclass(OmegaConf.get_type(cfg, key)) and cfg[key] is not None:
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
    for key, known in (("accelerator", ACCELERATORS), ("precision", PRECISIONS), ("resume", RESUMES)):
        if cfg[key] not in known:
            raise ConfigError(f"{key}={cfg[key]} is none of {', '.join(known)}{nearest(cfg[key], set(known))}")
    for key in ("devices", "num_nodes"):
        if cfg[key] != "auto" and not (isinstance(cfg[key], int) and cfg[key] >= 1):
            raise ConfigError(f"{key}={cfg[key]} must be a whole number from 1 on, or auto")
    for key in ("name", "output_dir"):
        if not cfg[key].strip():
            raise ConfigError(f"{key} is empty; write {key}=...")
    if not 0 <= cfg["seed"] <= MOST_SEED:
        raise ConfigError(f"seed={cfg['seed']} must be 0 or more, and at most {MOST_SEED}")


def check_trainer(cfg: dict[str, Any], stage: str, section: dict[str, Any]) -> None:
    """A stage's budget, portions and precision."""
    trainer = section["trainer"]
    for key in ("max_steps", "batch_size", "num_accumulate"):
        if trainer[key] < 1:
            raise ConfigError(f"{stage}.trainer.{key}={trainer[key]} must be at least 1")
    if trainer["clip_norm"] is not None and trainer["clip_norm"] <= 0:
        raise ConfigError(f"{stage}.trainer.clip_norm={trainer['clip_norm']} must be above 0; null clips nothing")
    job = (cfg["cluster"] or {}).get(stage.partition(".")[0]) or {}
    counts = [count for count in (cfg["devices"], job.get("num_nodes") or cfg["num_nodes"]) if isinstance(count, int)]
    portions = trainer["num_accumulate"]
    for count in counts:
        portions *= count
    size = trainer["batch_size"]
    if size % portions:
        others = portions // cfg["devices"] if isinstance(cfg["devices"], int) else portions
        legal = ", ".join(str(n) for n in range(1, size // others + 1) if size % (n * others) == 0)
        raise ConfigError(
            f"{stage}.trainer.batch_size={size} is the global batch: it must be a multiple of"
            f" {portions} (devices x num_nodes x {stage}.trainer.num_accumulate)"
            + (f"; with this batch devices may be {legal}" if legal else "")
        )
    precision = section["precision"] or cfg["precision"]
    key = f"{stage}.precision" if section["precision"] else "precision"
    if precision not in PRECISIONS:
        raise ConfigError(f"{key}={precision} is none of {', '.join(PRECISIONS)}{nearest(precision, set(PRECISIONS))}")
    if precision == "16-mixed" and cfg["accelerator"] == "cpu":
        raise ConfigError(f"{key}=16-mixed does not exist on a CPU; write {key}=bf16-mixed or {key}=32-true")


def check_sharding(cfg: dict[str, Any], stage: str, section: dict[str, Any]) -> None:
    """What DeepSpeed cannot cut into pieces is refused before a stage is trained."""
    strategy = section["strategy"] or cfg["strategy"]
    if strategy["_target_"] != SHARDING or stage.partition(".")[0] not in cfg["stages"]:
        return
    key = stage.partition(".")[0] if section["strategy"] else ""
    spelled = f"strategy@{key}.strategy" if key else "strategy"
    if strategy["zero_stage"] == 3 and stage != "diffusion":
        raise ConfigError(
            f"{spelled}: ZeRO-3 is for stage 2 alone, since stage 1's adversary is used with its weights detached;"
            " write strategy=deepspeed_zero2 +strategy@diffusion.strategy=deepspeed_zero3"
        )
    if section["optim"]["_target_"] != SHARDED:
        name = section["optim"]["_target_"].rpartition(".")[2]
        raise ConfigError(
            f"{stage}.optim: DeepSpeed cuts weights into pieces, and {name} needs them whole;"
            f" write optim@{stage}.optim=adamw, or strategy=ddp"
        )


def check_slots(schema: type, values: dict[str, Any], path: str = "") -> None:
    """Every place for a part holds one, of the right room: a node with `_target_`, or nothing where that is allowed."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        value, below, hint = values[field.name], f"{path}{field.name}", hints[field.name]
        section = next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        if section and value is not None:
            check_slots(section, value, f"{below}.")
        elif hint == dict[str, Any]:
            for key, child in value.items():
                check_slot(f"{below}.{key}", field.name, child, is_optional=True, is_listed=True)
        elif hint is Any:
            check_slot(below, field.name, value, is_optional=field.default is None)


def check_slot(path: str, name: str, value: Any, is_optional: bool, is_listed: bool = False) -> None:
    """One place for a part; `name` is its field's, and where that is a room's the part comes from that room."""
    if not value and is_optional:
        return
    if not isinstance(value, dict) or "_target_" not in value:
        room = {"decoded": "objective"}.get(name, name)
        group = path if path == room else f"{'+' if is_optional else ''}{room}@{path}"
        override = "" if is_optional else "override "
        spelled = f"write {group}=NAME" if room in ROOMS and not is_listed else "write a node with `_target_`"
        raise ConfigError(
            f"{path}: {value!r} stands where a part belongs; {spelled}"
            + (f"\n  in a file:  defaults: [{override}/{group.lstrip('+')}: NAME]" if "=" in spelled else "")
        )
    check_allowed(value["_target_"], path)
    if name in ROOMS and value["_target_"].split(".")[1] != name:
        raise ConfigError(f"{path}._target_ '{value['_target_']}' is no part of sdtrain/{name}/")


def check_sources(path: str, node: dict[str, Any], directory: Path) -> None:
    """What a run starts from is there: shards (a file, a folder or a pattern) and weights. Addresses are not asked."""
    room = "data" if path.endswith(".data") else path  # a stage may have data of its own
    for key in (key for key in node if f"{room}.{key}" in SOURCES):
        named = node[key] if isinstance(node[key], list) else [node[key]]
        for source in (source for source in named if isinstance(source, str) and "://" not in source):
            place = Path(source).expanduser()
            if not glob.glob(str(place)) and not place.exists() and not (directory / place).exists():
                raise ConfigError(f"{path}.{key}: there is nothing at {source}")


def check_handover(cfg: dict[str, Any]) -> None:
    """Stage 2 alone needs a trained first stage, this directory's or another's, unless its own has no weights."""
    own = Path(cfg["output_dir"], "autoencoder", "manifest.json")
    is_untrained = "weights" in cfg["first_stage"] and not cfg["first_stage"]["weights"]
    if cfg["stages"] == ["diffusion"] and is_untrained and not own.is_file():
        raise ConfigError(
            f"stages=[diffusion] needs a first stage, and {own.parent} holds none;"
            " set first_stage.weights=RUN/autoencoder or add the stage autoencoder"
        )


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
