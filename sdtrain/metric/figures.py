"""The figures that two sets of features give, by name, and which of them mean something for which network."""

from __future__ import annotations

from collections.abc import Sequence

from sdtrain.errors import ConfigError
from sdtrain.metric.distance import cmmd, fid, inception_score, kid, precision_recall
from sdtrain.metric.extractor import Extractor
from sdtrain.metric.moments import Moments

OF_SETS = ("fid", "fd", "kid", "cmmd", "precision_recall")  # these want a reference
NAMES = (*OF_SETS, "inception_score", "clip_score")
PIXELS = ("reconstruction", "ms_ssim", "lpips")  # of pictures beside their reconstructions
SUBSET_SIZE = 1000  # of the KID


def check(name: str, extractor: Extractor, where: str) -> None:
    """Refuses a figure under a name that the network does not earn.

    Raises:
        ConfigError: naming the metric and its place.
    """
    network = extractor.identity["network"]
    if name not in NAMES:
        raise ConfigError(f"{where}: there is no metric {name!r}; there are {', '.join(NAMES)}")
    if name == "fid" and network != "inception_v3_2015":
        raise ConfigError(f"{where}: fid is of Inception's features; of {network}'s, ask for fd")
    if name in ("cmmd", "clip_score") and network != "clip":
        raise ConfigError(f"{where}: {name} is of CLIP's features, not of {network}'s")
    if name == "inception_score" and not hasattr(extractor, "logits"):
        raise ConfigError(f"{where}: {network} has no classes for inception_score")


def figures(
    names: Sequence[str], extractor: Extractor, fake: Moments, real: Moments | None, seed: int
) -> dict[str, float]:
    """Every figure of `names` but clip_score, which is a mean over captions."""
    found: dict[str, float] = {}
    for name in names:
        if name in ("fid", "fd"):
            found[name] = fid(real, fake)
        elif name == "kid":
            size = min(SUBSET_SIZE, len(real.kept), len(fake.kept))
            found["kid"], found["kid_std"] = kid(real.kept, fake.kept, subset_size=size, seed=seed)
            found["kid_subset_size"] = size
        elif name == "cmmd":
            found["cmmd"] = cmmd(real.kept, fake.kept)
        elif name == "precision_recall":
            found["precision"], found["recall"] = precision_recall(real.kept, fake.kept)
        elif name == "inception_score":
            logits = extractor.logits(fake.kept)
            found["inception_score"], found["inception_score_std"] = inception_score(logits, min(10, len(logits)))
    return found
