"""The model card: what was trained on what, how large it is, how good, and what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sdtrain.tracker.headline import GROUPS, branch, is_number, key_values, number, percent
from sdtrain.tracker.run_files import RunFiles, read_json

PARTS = ("first_stage", "conditioner", "model", "objective", "sampler", "data")
LICENCE = (
    "sdtrain is Apache-2.0. The weights' terms follow from the training data and from any weights that were loaded, "
    "which sdtrain does not know: state them before you pass the weights on."
)
INTENDED_USE = (
    "Research on the data named here, and drawing what that data shows. Nothing here was tested for bias, safety or "
    "facts; the pictures carry what the data carries."
)


def model_card(files: RunFiles) -> str:
    """A table; nothing where the run has no summary yet."""
    if not files.summary:
        return ""
    try:
        config = yaml.safe_load(files.config)
    except yaml.YAMLError:
        config = {}
    facts = {"name": files.name}
    facts |= {part.replace("_", " "): _class(config, part) for part in PARTS if _class(config, part)}
    for stage in files.stages:
        facts |= _trained(files, stage)
    facts |= _figures(files.summary, config)
    return key_values("", {**facts, "licence": LICENCE, "intended use": INTENDED_USE})


def _trained(files: RunFiles, stage: str) -> dict[str, Any]:
    told = branch(files.summary, stage)
    counts = [f"{told[key]:,} {key}" for key in ("parameters", "steps", "images") if is_number(told.get(key))]
    facts = {stage: ", ".join(counts)} if counts else {}
    if isinstance(told.get("weight_hash"), str):
        facts[f"{stage} weights"] = told["weight_hash"]
    checkpoints = sorted((files.directory / stage / "checkpoints").glob("step_*/COMPLETE.json"))
    complete = read_json(checkpoints[-1]) if checkpoints else {}
    if complete.get("data_fingerprint"):
        facts[f"{stage} data fingerprint"] = complete["data_fingerprint"]
    return facts


def _figures(summary: Mapping[str, Any], config: Any) -> dict[str, str]:  # noqa: ANN401 what YAML holds
    """With the number of pictures that each was measured on, where the config says it."""
    facts = {}
    pictures = number(config, "data", "num_val")
    on = f" on {pictures:,} held-out pictures" if pictures else " on held-out pictures"
    if (psnr := number(summary, "autoencoder", "psnr")) is not None:
        facts["reconstruction PSNR"] = f"{psnr:.2f} dB{on}"
    captions = number(config, "diffusion", "metric", "caption_match", "num_captions")
    each = f", {captions:,} captions" if captions else ""
    for group, label in GROUPS.items():
        if (share := number(summary, "diffusion", "caption_match", group, "all")) is not None:
            facts[f"caption match, {label.lower()}"] = percent(share) + each
    return facts


def _class(config: Any, part: str) -> str:  # noqa: ANN401 what YAML holds
    return str(branch(config, part).get("_target_", "")).removeprefix("sdtrain.")
