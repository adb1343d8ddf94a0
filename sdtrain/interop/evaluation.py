"""A finished run under a protocol: its pictures, their features, the reference's, and the figures between them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from sdtrain.build import build
from sdtrain.checkpoint.commit import MANIFEST, newest_valid
from sdtrain.errors import ConfigError, RunError
from sdtrain.interop.pipeline import Pipeline
from sdtrain.metric.figures import OF_SETS, PIXELS, check, figures
from sdtrain.metric.moments import FeatureMoments, Moments
from sdtrain.metric.multiscale import ms_ssim
from sdtrain.metric.reconstruction import reconstruction
from sdtrain.stage.autoencoder import to_uint8

_SEED_STRIDE = 1_000_003  # batch c of a protocol is drawn with seed + c * this, by whichever rank


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Joins the process group where there is one to join, and leaves it."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            yield cls()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield cls(dist.get_rank(), world_size)
        finally:
            dist.destroy_process_group()

    @property
    def device(self) -> str:
        """This process's own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks, in float64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def join(self, own: dict[int, str]) -> dict[int, str]:
        """What every rank holds, by number."""
        held: list[Any] = [own]
        if self.world_size > 1:
            held = [None] * self.world_size
            dist.all_gather_object(held, own)
        return {key: value for part in held for key, value in part.items()}

    def batches(self, num: int, size: int) -> Iterator[tuple[int, list[int]]]:
        """This rank's batches of the places 0 to num - 1, with their numbers. None is padded, none comes twice."""
        for number in range(self.rank, -(-num // size), self.world_size):
            yield number, list(range(number * size, min((number + 1) * size, num)))


class Counting:
    """A first stage that counts what leaves its range, before it is clamped for a picture of 8 bits."""

    def __init__(self, first_stage: nn.Module) -> None:
        self.first_stage = first_stage
        self.num_pictures = self.num_clamped_pictures = self.num_values = self.num_clamped_values = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 the first stage's own
        return getattr(self.first_stage, name)

    def decode(self, latent: Tensor) -> Tensor:
        """Pictures, counted. Raises RunError for one that is not finite."""
        image = self.first_stage.decode(latent)
        if not image.isfinite().all():
            raise RunError("a picture that was drawn is not finite: the run's weights or its sampler diverge", 76)
        outside = (image.abs() > 1).flatten(1)
        self.num_pictures += len(image)
        self.num_values += image.numel()
        self.num_clamped_values += int(outside.sum())
        self.num_clamped_pictures += int(outside.any(dim=1).sum())
        return image


@dataclass
class Evaluation:
    """One protocol on one checkpoint. `refer` and `measure` are for every rank to call."""

    pipe: Pipeline
    data: Any
    protocol: dict[str, Any]
    prompts: list[str] | None
    ranks: Ranks
    checkpoint: dict[str, Any]
    extractors: dict[str, Any]
    perceptual: nn.Module | None
    reference: dict[str, Moments] = field(default_factory=dict)
    reference_told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, run: Path, protocol: dict[str, Any], prompts: list[str] | None, ranks: Ranks) -> Evaluation:
        """Raises ConfigError for what is missing, before anything is drawn."""
        nodes = OmegaConf.create({"extractors": protocol["extractors"], "perceptual": protocol.get("perceptual")})
        metric = protocol["metric"]
        extractors = {}
        for name in metric.keys() - {"pixels"}:
            if name not in nodes.extractors:
                raise ConfigError(f"metric.{name}: the protocol has no such extractor")
            extractors[name] = build(nodes.extractors[name]).to(ranks.device)
            for asked in metric[name]:
                check(asked, extractors[name], f"metric.{name}")
        unknown = set(metric.get("pixels", ())) - set(PIXELS)
        if unknown or (metric.get("pixels") and protocol["source"] != "reconstructions"):
            raise ConfigError(f"metric.pixels: only {', '.join(PIXELS)}, and only of source: reconstructions")
        perceptual = None
        if "lpips" in metric.get("pixels", ()):
            if nodes.perceptual is None:
                raise ConfigError("metric.pixels: lpips wants the protocol's `perceptual`")
            perceptual = build(nodes.perceptual).to(ranks.device)
        if protocol["source"] not in ("samples", "reconstructions"):
            raise ConfigError(f"source: {protocol['source']!r} is neither samples nor reconstructions")
        pipe = Pipeline.load(run, protocol["weights"], ranks.device)
        found, _ = newest_valid(run / "diffusion" / "checkpoints")
        meta = json.loads((found / MANIFEST).read_text())
        checkpoint = {"checkpoint": found.name, "step": meta["step"], "files": meta["files"]}
        data = _open_data(pipe, protocol["split"])
        return cls(pipe, data, protocol, prompts, ranks, checkpoint, extractors, perceptual)

    def refer(self, stored: Path | None, write_to: Path | None) -> None:
        """The reference's moments: stored ones, or those of the split's pictures, as the run's reader crops them."""
        wanted = [name for name in self.extractors if set(self.protocol["metric"][name]) & set(OF_SETS)]
        if stored is not None:
            for name in wanted:
                identity = self._network(name)
                self.reference[name], digest = Moments.load(stored / f"{name}.safetensors", identity)
                self.reference_told[name] = {"sha256": digest, "num_images": self.reference[name].num_images}
        elif wanted:
            if self.data is None:
                raise ConfigError("split: null has no reference pictures; give --reference DIR")
            self._measure_reference(wanted, write_to)

    def _measure_reference(self, wanted: list[str], write_to: Path | None) -> None:
        split, hashes = self.protocol["split"], {}
        moments = {name: self._moments(name) for name in wanted}
        num = self.data.splits[split]
        for _, places in self.ranks.batches(num, self.protocol["batch"]):
            pictures = to_uint8(self.data.load(split, places, as_images=True)["image"])
            hashes |= {i: hashlib.sha256(picture.tobytes()).hexdigest() for i, picture in zip(places, pictures)}
            for name in wanted:
                self._see(moments[name], name, pictures, places)
        hashes = self.ranks.join(hashes)
        digest = hashlib.sha256("".join(hashes[i] for i in sorted(hashes)).encode()).hexdigest()
        for name in wanted:
            self.reference[name] = moments[name].reduce()
            self.reference_told[name] = {"split": split, "pictures_sha256": digest, "num_images": num}
            if write_to is not None and self.ranks.rank == 0:
                self.reference[name].save(write_to / f"{name}.safetensors", self._network(name))

    def measure(self, guidance: float | None) -> dict[str, Any]:
        """Every figure of the protocol at a guidance scale, and how much of its pictures was clamped."""
        counted = Counting(self.pipe.generation.first_stage)
        pipe = Pipeline(self.pipe.cfg, replace(self.pipe.generation, first_stage=counted))
        moments = {name: self._moments(name) for name in self.extractors}
        sums: dict[str, float] = {"num_images": 0.0}
        is_drawn = self.protocol["source"] == "samples"
        if is_drawn and guidance is None:
            guidance = pipe.generation.sampler.guidance.scale  # the run's own, said aloud
        for number, places in self.ranks.batches(self._num_images(), self.protocol["batch"]):
            captions = self._captions(places) if is_drawn else []
            pictures = (
                self._draw(pipe, captions, guidance, number) if is_drawn else self._rebuild(counted, places, sums)
            )
            sums["num_images"] += len(pictures)
            for name in self.extractors:
                features = self._see(moments[name], name, pictures, places)
                if "clip_score" in self.protocol["metric"][name]:
                    total = float(self.extractors[name].score(features, captions).double().sum())
                    sums[f"{name}/clip_score"] = sums.get(f"{name}/clip_score", 0.0) + total
        names = self._summed_names()
        num, *totals = self.ranks.sum([sums.get(name, 0.0) for name in ("num_images", *names)])
        found = {name: total / num for name, total in zip(names, totals)}
        for name, extractor in self.extractors.items():
            asked = [metric for metric in self.protocol["metric"][name] if metric != "clip_score"]
            if asked:
                reduced = moments[name].reduce()
                known = figures(asked, extractor, reduced, self.reference.get(name), self.protocol["seed"])
                found |= {f"{name}/{metric}": value for metric, value in known.items()}
        counts = ("num_pictures", "num_clamped_pictures", "num_values", "num_clamped_values")
        clamped = self.ranks.sum([getattr(counted, count) for count in counts])
        return {"guidance": guidance, **found, **{count: int(n) for count, n in zip(counts, clamped)}}

    def told(self) -> dict[str, Any]:
        """All that the figures depend on. A null sampler or num_steps is the run's own, which stands beside."""
        networks = {
            name: {**extractor.identity, "resize": extractor.resize} for name, extractor in self.extractors.items()
        }
        prompts = None
        if self.prompts is not None:
            digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
            prompts = {"num_prompts": len(self.prompts), "sha256": digest}
        return {
            **self.protocol,
            **self.checkpoint,
            "num_images": self._num_images(),
            "prompts": prompts,
            "networks": networks,
            "reference": self.reference_told,
            "codec": "none: pictures are measured as the 8 bits that were drawn; references as their files decode",
            "run_sampler": OmegaConf.to_container(self.pipe.cfg.sampler, resolve=True),
            "precision": self.pipe.cfg.diffusion.precision or self.pipe.cfg.precision,
            "torch": torch.__version__,
        }

    def _num_images(self) -> int:
        """A reconstruction is of a picture that exists; captions come round again."""
        num = self.protocol["num_images"]
        return num if self.protocol["source"] == "samples" else min(num, self.data.splits[self.protocol["split"]])

    def _captions(self, places: Sequence[int]) -> list[str]:
        if self.prompts is None:
            if self.data is None:
                raise ConfigError("split: null has no captions; give --prompts FILE")
            self.prompts = self.data.captions(self.protocol["split"])
        return [self.prompts[i % len(self.prompts)] for i in places]

    def _draw(self, pipe: Pipeline, captions: list[str], guidance: float | None, number: int) -> np.ndarray:
        seed = self.protocol["seed"] + number * _SEED_STRIDE
        drawn = pipe(captions, None, guidance, self.protocol["num_steps"], seed=seed, sampler=self.protocol["sampler"])
        return np.stack([np.asarray(picture) for picture in drawn])

    @torch.no_grad()
    def _rebuild(self, first_stage: Counting, places: list[int], sums: dict[str, float]) -> np.ndarray:
        image = self.data.load(self.protocol["split"], places, as_images=True)["image"].to(self.ranks.device)
        made = first_stage.decode(first_stage.encode(image).mean)
        asked = self.protocol["metric"].get("pixels", ())
        found: dict[str, float] = {}
        real, fake = (image + 1) / 2, (made + 1) / 2
        if "reconstruction" in asked:
            found |= reconstruction(real.clamp(0, 1), fake)
        if "ms_ssim" in asked:
            found["ms_ssim"] = ms_ssim(real, fake)
        if self.perceptual is not None:
            found["lpips"] = float(self.perceptual(made.clamp(-1, 1), image).mean())
        for name, value in found.items():
            sums[f"pixels/{name}"] = sums.get(f"pixels/{name}", 0.0) + value * len(image)
        return to_uint8(made)

    def _summed_names(self) -> list[str]:
        """The same on every rank, also on one that had no batch."""
        asked = self.protocol["metric"]
        names = [f"{name}/clip_score" for name in self.extractors if "clip_score" in asked[name]]
        of_pixels = {"reconstruction": ("psnr", "ssim", "l1", "out_of_range")}
        return names + [f"pixels/{n}" for metric in asked.get("pixels", ()) for n in of_pixels.get(metric, (metric,))]

    def _moments(self, name: str) -> FeatureMoments:
        return FeatureMoments(self.extractors[name].num_features, self.protocol["num_kept"], self.ranks.device)

    def _see(self, moments: FeatureMoments, name: str, pictures: np.ndarray, places: list[int]) -> Tensor:
        planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.ranks.device)  # (B, 3, H, W)
        features = self.extractors[name](planes)
        moments.update(features, torch.tensor(places))
        return features

    def _network(self, name: str) -> str:
        """What stored moments must have been made with."""
        extractor = self.extractors[name]
        return f"{extractor.identity['network']}:{extractor.identity['sha256']}:{extractor.resize}"


def _open_data(pipe: Pipeline, split: str | None) -> Any:  # noqa: ANN401 a data module
    if split is None:
        return None
    cfg = pipe.cfg
    data = build(cfg.data if cfg.diffusion.data is None else cfg.diffusion.data)
    if not hasattr(data, "splits"):
        raise ConfigError("split: this run's data has no splits; use a protocol with split: null")
    data.prepare_data()
    if split not in data.splits:
        raise ConfigError(f"split: the run's data has no {split!r}; it has {', '.join(data.splits)}")
    return data
