"""What an evaluation is of: a run's pipeline, or its first stage alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import nn

from sdtrain.build import build
from sdtrain.checkpoint.commit import MANIFEST, newest_valid
from sdtrain.contracts import Input
from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest
from sdtrain.interop.pipeline import Pipeline, _load_frozen, _read_config
from sdtrain.interop.weights import load_first_stage


class Subject(NamedTuple):
    """Loaded, and on its device."""

    cfg: DictConfig
    first_stage: nn.Module
    pipe: Pipeline | None  # None: pictures are rebuilt, not drawn
    told: dict[str, Any]  # which weights, in which precision

    @classmethod
    def load(cls, run: Path, protocol: Mapping[str, Any], device: str) -> Subject:
        """Raises ConfigError where the run lacks what the protocol measures."""
        if protocol["source"] == "reconstructions":
            return cls._of_first_stage(run.expanduser(), device)
        pipe = Pipeline.load(run, protocol["weights"], device)
        found, _ = newest_valid(run.expanduser() / "diffusion" / "checkpoints")
        meta = json.loads((found / MANIFEST).read_text())
        precision = pipe.cfg.diffusion.precision or pipe.cfg.precision
        told = {"checkpoint": found.name, "step": meta["step"], "files": meta["files"], "precision": precision}
        return cls(pipe.cfg, pipe.generation.first_stage, pipe, told)

    @classmethod
    def _of_first_stage(cls, run: Path, device: str) -> Subject:
        """The one that stage 2 was trained on; of a run without a stage 2, what stage 1 made."""
        cfg, own, pinned = _read_config(run), run / "autoencoder", run / "diffusion" / "first_stage.json"
        first_stage = build(cfg.first_stage)
        if not list(first_stage.parameters()):
            raise ConfigError(
                "source: reconstructions are of a first stage that learned, and this run's has no weights"
            )
        manifest = Manifest.load(pinned if pinned.is_file() else own / "manifest.json")
        if pinned.is_file():
            first_stage = _load_frozen(run, cfg)
        else:
            load_first_stage(first_stage, str(own), cfg.first_stage)
            manifest.apply(first_stage)
        summary = run / "summary.json"
        stages = json.loads(summary.read_text()) if summary.is_file() else {}
        step = stages.get("autoencoder", {}).get("steps", 0)  # 0: its weights come from elsewhere
        told = {"checkpoint": "first stage", "step": step, "weight_hash": manifest.weight_hash, "precision": "32-true"}
        return cls(cfg, first_stage.to(device).eval().requires_grad_(False), None, told)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What the model is told; nothing where pictures are rebuilt."""
        return {} if self.pipe is None else self.pipe.inputs

    @property
    def reads_more(self) -> bool:
        """Whether captions alone do not say what the model reads."""
        return any(read.is_needed and key != "caption" for key, read in self.inputs.items())
