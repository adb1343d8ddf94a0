"""A finished run under a protocol: its pictures, their features, the reference's, and the figures between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sdtrain.build import build
from sdtrain.contracts import Batch
from sdtrain.errors import ConfigError, RunError
from sdtrain.interop.look import Copies, Features, Look, Objects, check_copies, check_objects
from sdtrain.interop.pipeline import Pipeline
from sdtrain.interop.ranks import Ranks
from sdtrain.interop.subject import Subject
from sdtrain.metric.distribution import SEED_STRIDE, Seen, network_of
from sdtrain.metric.figures import OF_SETS, PIXELS, check
from sdtrain.metric.geneval import GenEval
from sdtrain.metric.moments import Moments
from sdtrain.metric.multiscale import ms_ssim
from sdtrain.metric.reconstruction import reconstruction
from sdtrain.stage.autoencoder import to_uint8
from sdtrain.stage.comparison import real_pictures

_NO_EXTRACTORS = ("pixels", "training", "objects")  # in `metric`, what no network of features measures


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
    """One protocol on one run. `refer` and `measure` are for every rank to call."""

    subject: Subject
    data: Any
    protocol: dict[str, Any]
    prompts: list[dict[str, Any]] | None  # each with its "prompt", and what a file of GenEval's asks for
    ranks: Ranks
    extractors: dict[str, Any]
    perceptual: nn.Module | None
    geneval: GenEval | None
    draws_split: bool = False  # samples are of its captions, and of all else that the model reads of it
    reference: dict[str, Moments] = field(default_factory=dict)
    reference_told: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls, run: Path, protocol: dict[str, Any], prompts: list[dict[str, Any]] | None, ranks: Ranks
    ) -> Evaluation:
        """Raises ConfigError for what is missing, before anything is drawn."""
        if protocol["source"] not in ("samples", "reconstructions"):
            raise ConfigError(f"source: {protocol['source']!r} is neither samples nor reconstructions")
        networks = load_networks(protocol, prompts, ranks.device)
        subject = Subject.load(run, protocol, ranks.device)
        if subject.reads_more and (prompts is not None or protocol["split"] is None):
            raise ConfigError(
                f"this run's model reads {', '.join(subject.inputs)}: draw samples of a split, not of prompts"
            )
        data = _open_data(subject, protocol["split"])
        draws_split = prompts is None and protocol["split"] is not None
        return cls(subject, data, protocol, prompts, ranks, *networks, draws_split=draws_split)

    def refer(self, stored: Path | None, write_to: Path | None) -> None:
        """The reference's moments: stored ones, or those of the split's pictures, as the run's reader crops them."""
        wanted = [name for name in self.extractors if set(self.protocol["metric"][name]) & set(OF_SETS)]
        if stored is not None:
            for name in wanted:
                identity = network_of(self.extractors[name])
                self.reference[name], digest = Moments.load(stored / f"{name}.safetensors", identity)
                self.reference_told[name] = {"sha256": digest, "num_images": self.reference[name].num_images}
        elif wanted:
            if self.data is None:
                raise ConfigError("split: null has no reference pictures; give --reference DIR")
            self._measure_reference(wanted, write_to)

    def _measure_reference(self, wanted: list[str], write_to: Path | None) -> None:
        split, hashes = self.protocol["split"], {}
        seen = {name: Seen(self.extractors[name], self.protocol["num_kept"], self.ranks.device) for name in wanted}
        num = self.data.splits[split]
        for _, places in self.ranks.batches(num, self.protocol["batch"]):
            pictures = real_pictures(self.data, split, places)
            hashes |= {i: hashlib.sha256(picture.tobytes()).hexdigest() for i, picture in zip(places, pictures)}
            for name in wanted:
                seen[name].add(pictures, places)
        digest = hashlib.sha256("".join(self.ranks.join(hashes)).encode()).hexdigest()
        for name in wanted:
            self.reference[name] = seen[name].reduce()
            self.reference_told[name] = {"split": split, "pictures_sha256": digest, "num_images": num}
            if write_to is not None and self.ranks.rank == 0:
                self.reference[name].save(write_to / f"{name}.safetensors", network_of(self.extractors[name]))

    def measure(self, guidance: float | None) -> dict[str, Any]:
        """Every figure of the protocol at a guidance scale, and how much of its pictures was clamped."""
        counted, pipe = Counting(self.subject.first_stage), None
        looks, sums = self._looks(), {"num_images": 0.0}
        if self.subject.pipe is not None:
            pipe = Pipeline(self.subject.cfg, replace(self.subject.pipe.generation, first_stage=counted))
            if guidance is None:
                guidance = pipe.generation.sampler.guidance.scale  # the run's own, said aloud
        for number, places in self.ranks.batches(self._num_images(), self.protocol["batch"]):
            captions = [] if pipe is None else self._captions(places)
            if pipe is not None:
                pictures = self._draw(pipe, captions, places, guidance, number)
            else:
                pictures = self._rebuild(counted, places, sums)
            sums["num_images"] += len(pictures)
            for look in looks:
                look.add(pictures, places, captions)
        names = self._summed_names()
        num, *totals = self.ranks.sum([sums.get(name, 0.0) for name in ("num_images", *names)])
        found: dict[str, Any] = {name: total / num for name, total in zip(names, totals)}
        for look in looks:
            found |= look.figures()
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
            lines = [one["prompt"] if len(one) == 1 else json.dumps(one, sort_keys=True) for one in self.prompts]
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
            prompts = {"num_prompts": len(self.prompts), "sha256": digest}
        return {
            **self.protocol,
            **self.subject.told,
            "num_images": self._num_images(),
            "prompts": prompts,
            "networks": networks | self._judges(),
            "reference": self.reference_told,
            "memorisation": None if (copies := self._copies()) is None else copies.told(),
            "codec": "none: pictures are measured as the 8 bits that were drawn; references as their files decode",
            "run_sampler": OmegaConf.to_container(self.subject.cfg.sampler, resolve=True),
            "torch": torch.__version__,
        }

    def _looks(self) -> list[Look]:
        """The same on every rank, in the same order."""
        looks: list[Look] = [
            Features(name, extractor, self.reference.get(name), self.protocol, self.ranks)
            for name, extractor in self.extractors.items()
        ]
        if self.geneval is not None:
            looks.append(Objects(self.geneval, self.prompts, self.ranks))
        return looks if (copies := self._copies()) is None else [*looks, copies]

    def _judges(self) -> dict[str, Any]:
        if self.geneval is None:
            return {}
        clip = self.geneval.clip
        return {"detector": self.geneval.detector.identity, "colours": {**clip.identity, "resize": clip.resize}}

    def _copies(self) -> Copies | None:
        return Copies(self.data, self.protocol, self.ranks) if self.protocol["metric"].get("training") else None

    def _num_images(self) -> int:
        """A reconstruction is of a picture that exists; captions come round again."""
        num = self.protocol["num_images"]
        return num if self.protocol["source"] == "samples" else min(num, self.data.splits[self.protocol["split"]])

    def _captions(self, places: Sequence[int]) -> list[str]:
        if self.prompts is None:
            if self.data is None:
                raise ConfigError("split: null has no captions; give --prompts FILE")
            self.prompts = [{"prompt": caption} for caption in self.data.captions(self.protocol["split"])]
        return [self.prompts[i % len(self.prompts)]["prompt"] for i in places]

    def _draw(
        self, pipe: Pipeline, captions: list[str], places: list[int], guidance: float | None, number: int
    ) -> np.ndarray:
        batch: Batch = {"caption": captions}
        if self.draws_split and pipe.inputs.keys() - {"caption"}:
            num = self.data.splits[self.protocol["split"]]
            batch = self.data.load(self.protocol["split"], [i % num for i in places], as_images=True)
        seed = self.protocol["seed"] + number * SEED_STRIDE
        return pipe.draw(batch, seed, guidance, self.protocol["num_steps"], self.protocol["sampler"])

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
        of_pixels = {"reconstruction": ("psnr", "ssim", "l1", "out_of_range")}
        asked = self.protocol["metric"].get("pixels", ())
        return [f"pixels/{name}" for metric in asked for name in of_pixels.get(metric, (metric,))]


def load_networks(
    protocol: dict[str, Any], prompts: list[dict[str, Any]] | None, device: str
) -> tuple[dict[str, Any], nn.Module | None, GenEval | None]:
    """The extractors, the perceptual loss and the judge that a protocol's figures ask for.

    Raises:
        ConfigError: for a figure that is none, or not of these pictures, and for a file that is not there.
    """
    nodes = OmegaConf.create({key: protocol.get(key) for key in ("extractors", "perceptual", "detector")})
    metric, extractors, perceptual, geneval = protocol["metric"], {}, None, None
    for name in (name for name in metric if name not in _NO_EXTRACTORS):  # in one order on every rank
        if name not in nodes.extractors:
            raise ConfigError(f"metric.{name}: the protocol has no such extractor")
        extractors[name] = build(nodes.extractors[name]).to(device)
        for asked in metric[name]:
            check(asked, extractors[name], f"metric.{name}")
    unknown = set(metric.get("pixels", ())) - set(PIXELS)
    if unknown or (metric.get("pixels") and protocol["source"] != "reconstructions"):
        raise ConfigError(f"metric.pixels: only {', '.join(PIXELS)}, and only of source: reconstructions")
    if metric.get("training"):
        check_copies(metric["training"], protocol)
    if metric.get("objects"):
        check_objects(metric["objects"], protocol, prompts)
        clip = extractors["clip"] if "clip" in extractors else build(nodes.extractors.clip).to(device)
        geneval = GenEval(build(nodes.detector).to(device), clip)
    if "lpips" in metric.get("pixels", ()):
        if nodes.perceptual is None:
            raise ConfigError("metric.pixels: lpips wants the protocol's `perceptual`")
        perceptual = build(nodes.perceptual).to(device)
    return extractors, perceptual, geneval


def _open_data(subject: Subject, split: str | None) -> Any:  # noqa: ANN401 a data module
    if split is None:
        return None
    cfg = subject.cfg
    own = (cfg.autoencoder if subject.pipe is None else cfg.diffusion).data
    data = build(cfg.data if own is None else own)
    if not hasattr(type(data), "splits"):  # asked of the data itself, it would be read before it is made
        raise ConfigError("split: this run's data has no splits; use a protocol with split: null")
    data.prepare_data()
    data.accompany(subject.inputs)
    if split not in data.splits:
        raise ConfigError(f"split: the run's data has no {split!r}; it has {', '.join(data.splits)}")
    return data
