"""Compilation by region: the block that a network repeats is compiled, not the network."""

from __future__ import annotations

import torch
from torch import nn

from sdtrain.errors import ConfigError


def compile_regions(network: nn.Module) -> int:
    """Compiles every block whose class says `is_region`, in place, and returns how many there are.

    Blocks of one class and shape share their code, so a cold start takes the time of the different ones instead of all
    of them, and what stands between blocks stays Python.

    Raises:
        ConfigError: for a network that has no such block.
    """
    regions = [module for module in network.modules() if getattr(module, "is_region", False)]
    if not regions:
        raise ConfigError(f"compile: {type(network).__name__} has no block to compile; set compile=false")
    # One code a shape; past torch's limit of 8 a block would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(regions))
    for module in regions:
        module.compile(dynamic=False)
    return len(regions)
