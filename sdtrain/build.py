"""Config nodes into objects: Hydra's `instantiate` behind our allow-list, checked on what a name resolves to."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from sdtrain.errors import ConfigError
from sdtrain.target import NODE_KEYS, READ_BY_RUN, ROOMS, check_allowed, parts


def build(node: DictConfig, **extra: Any) -> Any:
    """The object a node describes; `extra` are arguments that a config cannot hold (parts, paths, a device)."""
    path = node._get_full_key(None) or "config"
    values = OmegaConf.to_container(node, resolve=True)
    for below, inner in parts(values, path):
        check_resolved(below, inner)
    values = {key: value for key, value in values.items() if f"{path}.{key}" not in READ_BY_RUN}
    try:
        # `extra` never enters OmegaConf, which would copy it: the parts given are the parts used.
        made = instantiate(values, _partial_=True, _convert_="all")
        return functools.partial(made, **extra) if values.get("_partial_") else made(**extra)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError | ValueError | LookupError | ArithmeticError):
            raise ConfigError(f"{path}: {cause}") from error
        raise cause or error from None
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{path}: {error}") from error


def check_resolved(path: str, node: dict[str, Any]) -> None:
    """Refuse a node whose name leads, however it is spelled, to anything but an allowed class or function."""
    check_allowed(node["_target_"], path)
    for key in node:
        if key.startswith("_") and key not in NODE_KEYS:
            raise ConfigError(f"{path}.{key} is not allowed")
    try:
        found = get_object(node["_target_"])
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}._target_: cannot load '{node['_target_']}': {error}") from error
    home, name = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
    is_ours = home.startswith("sdtrain.") and home.split(".")[1] in ROOMS
    if not (inspect.isclass(found) or inspect.isroutine(found)) or not is_ours:
        raise ConfigError(f"{path}._target_ '{node['_target_']}' is {home}.{name}, which is not allowed")
