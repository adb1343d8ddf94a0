"""What an evaluation looks at its pictures with. Each adds a rank's batches up, and gives figures over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from sdtrain.errors import ConfigError
from sdtrain.interop.ranks import Ranks
from sdtrain.metric.distribution import Seen
from sdtrain.metric.extractor import Extractor
from sdtrain.metric.figures import figures
from sdtrain.metric.geneval import WANTED, GenEval, check_asked
from sdtrain.metric.memorisation import NUM_TRAINING, PART, memorisation
from sdtrain.metric.moments import Moments
from sdtrain.stage.comparison import real_pictures

_NUM_COMPARED = 512  # samples, and held-out pictures, whose nearest training picture is looked for


class Look(Protocol):
    """Every rank has the same ones in the same order; `figures` is a collective."""

    def add(self, pictures: np.ndarray, places: Sequence[int], captions: Sequence[str]) -> None:
        """uint8 (B, H, W, 3) at their places in the whole."""

    def figures(self) -> dict[str, Any]: ...


class Features:
    """The figures that a network's features give, and the CLIP score."""

    def __init__(
        self,
        name: str,
        extractor: Extractor,
        real: Moments | None,
        protocol: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        self.name, self.extractor, self.real, self.ranks = name, extractor, real, ranks
        self.asked, self.seed = protocol["metric"][name], protocol["seed"]
        self.seen = Seen(extractor, protocol["num_kept"], ranks.device)
        self.num = self.score = 0.0

    def add(self, pictures: np.ndarray, places: Sequence[int], captions: Sequence[str]) -> None:
        """See `Look`."""
        features = self.seen.add(pictures, places)
        self.num += len(pictures)
        if "clip_score" in self.asked:
            self.score += float(self.extractor.score(features, captions).double().sum())

    def figures(self) -> dict[str, Any]:
        """By the network's name in the protocol."""
        found: dict[str, Any] = {}
        if "clip_score" in self.asked:
            num, score = self.ranks.sum([self.num, self.score])
            found["clip_score"] = score / num
        of_sets = [name for name in self.asked if name != "clip_score"]
        if of_sets:
            found |= figures(of_sets, self.extractor, self.seen.reduce(), self.real, self.seed)
        return {f"{self.name}/{metric}": value for metric, value in found.items()}


class Copies:
    """How far samples are from the nearest training picture, beside the held-out pictures of the split."""

    def __init__(self, data: Any, protocol: Mapping[str, Any], ranks: Ranks) -> None:  # noqa: ANN401 a data module
        self.data, self.split, self.batch, self.ranks = data, protocol["split"], protocol["batch"], ranks
        self.num_samples = min(protocol["num_images"], _NUM_COMPARED)
        self.num_held_out = min(data.splits[self.split], _NUM_COMPARED)
        self.num_training = min(data.splits["train"], protocol["num_training"])
        self.samples: dict[int, np.ndarray] = {}

    def add(self, pictures: np.ndarray, places: Sequence[int], captions: Sequence[str]) -> None:  # noqa: ARG002
        """See `Look`."""
        self.samples |= {i: picture for i, picture in zip(places, pictures) if i < self.num_samples}

    def figures(self) -> dict[str, Any]:
        """See `metric.memorisation`."""
        held_out: dict[int, np.ndarray] = {}
        for _, places in self.ranks.batches(self.num_held_out, self.batch):
            held_out |= dict(zip(places, real_pictures(self.data, self.split, places)))
        compared = [np.stack(self.ranks.join(own)) for own in (self.samples, held_out)]
        parts = (real_pictures(self.data, "train", part) for _, part in self.ranks.batches(self.num_training, PART))
        return {f"memorisation/{name}": value for name, value in memorisation(*compared, parts).items()}

    def told(self) -> dict[str, Any]:
        """What its figures are of."""
        names = ("num_samples", "num_held_out", "num_training")
        distance = "RMS over pixels, in values of 255"
        return {
            **{name: getattr(self, name) for name in names},
            "training": self.data.fingerprint,
            "distance": distance,
        }


class Objects:
    """The share of pictures that show what their prompts ask for, by the prompts' tags, as GenEval counts it."""

    def __init__(self, geneval: GenEval, prompts: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
        self.geneval, self.prompts, self.ranks = geneval, prompts, ranks
        self.tags = list(dict.fromkeys(asked["tag"] for asked in prompts))
        self.num, self.num_right = ([0] * len(self.tags) for _ in range(2))

    def add(self, pictures: np.ndarray, places: Sequence[int], captions: Sequence[str]) -> None:  # noqa: ARG002
        """See `Look`."""
        for place, picture in zip(places, pictures):
            asked = self.prompts[place % len(self.prompts)]
            tag = self.tags.index(asked["tag"])
            self.num[tag] += 1
            self.num_right[tag] += self.geneval(picture, asked)

    def figures(self) -> dict[str, Any]:
        """`overall` is the mean of the tags' shares, as in the paper, where each tag has a picture."""
        found = self.ranks.sum([*self.num, *self.num_right])
        num, num_right = found[: len(self.tags)], found[len(self.tags) :]
        shares = {f"geneval/{tag}": m / n for tag, n, m in zip(self.tags, num, num_right) if n}
        return shares | ({"geneval/overall": sum(shares.values()) / len(shares)} if all(num) else {})


def check_copies(asked: Sequence[str], protocol: dict[str, Any]) -> None:
    """Raises ConfigError where samples cannot be compared with training pictures."""
    if list(asked) != ["memorisation"] or protocol["source"] != "samples":
        raise ConfigError("metric.training: only memorisation, and only of source: samples")
    if protocol["split"] in (None, "train"):
        raise ConfigError(
            "metric.training: memorisation wants a held-out split; give --split val, or other figures by --metric"
        )
    if protocol.setdefault("num_training", NUM_TRAINING) < 1:
        raise ConfigError(f"num_training: {protocol['num_training']} must be at least 1")


def check_objects(asked: Sequence[str], protocol: dict[str, Any], prompts: list[dict[str, Any]] | None) -> None:
    """Raises ConfigError where there is nothing to judge, or nothing to judge by."""
    if list(asked) != ["geneval"] or protocol["source"] != "samples":
        raise ConfigError("metric.objects: only geneval, and only of source: samples")
    if protocol.get("detector") is None or "clip" not in protocol["extractors"]:
        raise ConfigError("metric.objects: geneval wants the protocol's `detector`, and `clip` in its `extractors`")
    if prompts is None:
        raise ConfigError(f"metric.objects: geneval wants --prompts FILE.jsonl, {WANTED}; or other figures by --metric")
    check_asked(prompts)
