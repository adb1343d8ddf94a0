"""What foreign weights were trained to predict, as the run or the scheduler beside them says, against the config.

Nothing heavy is imported: it is told before a run begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

_PREDICTIONS = {"sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}  # by diffusers' names
_PATHS = {"FlowMatch": "RectifiedFlow", "EDM": "EDM"}  # by how a scheduler's class is called


def other_prediction(cfg: DictConfig) -> list[str]:
    """A warning where `model.weights` were trained to predict something else, or on another path, than `objective=`.

    No error: from one objective to another is how Stable Diffusion 2's v came about. A file alone says nothing of it.
    """
    weights = cfg.model.get("weights")
    theirs = _beside(Path(weights).expanduser()) if weights else {}
    ours = _of_objective(OmegaConf.to_container(cfg.objective, resolve=True))
    other = [f"{key} is {theirs[key]} there, here {ours[key]}" for key in theirs if theirs[key] != ours.get(key)]
    if not other:
        return []
    return [f"model.weights: {weights} was trained with another objective: {', '.join(other)}; choose it by objective="]


def _of_objective(node: Mapping[str, Any]) -> dict[str, Any]:
    path = node.get("path") or {}
    return {"prediction": node.get("prediction"), "path": str(path.get("_target_")).rpartition(".")[2]}


def _beside(place: Path) -> dict[str, Any]:
    """Of a run of ours, or of a diffusers folder or its `unet` or `transformer`; empty where nothing is said."""
    try:
        if (place / "diffusion").is_dir() and (place / "config.yaml").is_file():
            return _of_objective(OmegaConf.to_container(OmegaConf.load(place / "config.yaml").objective))
        for folder in (place, place.parent):
            if (folder / "scheduler" / "scheduler_config.json").is_file():
                return _of_scheduler(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException):
        pass  # what loads the weights says what is wrong with them
    return {}


def _of_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    path = next((ours for name, ours in _PATHS.items() if name in config.get("_class_name", "")), "VariancePreserving")
    if config.get("use_flow_sigmas"):
        path = "RectifiedFlow"
    said = config.get("prediction_type", "epsilon")
    prediction = "velocity" if path == "RectifiedFlow" else _PREDICTIONS.get(said, said)
    return {"prediction": prediction, "path": path}
