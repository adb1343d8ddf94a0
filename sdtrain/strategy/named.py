"""Strategies that Lightning has under a name and that need nothing of ours."""

from __future__ import annotations

from sdtrain.errors import ConfigError


def named(name: str) -> str:
    """ "auto" (one device, or DDP over several) or "ddp".

    Raises:
        ConfigError: for any other name.
    """
    if name not in ("auto", "ddp"):
        raise ConfigError(f"strategy.name is auto or ddp, not {name!r}")
    return name
