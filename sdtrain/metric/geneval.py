"""GenEval (Ghosh et al. 2023): does a picture show the objects, counts, colours and positions that its prompt asks for?

A detector finds the objects and CLIP names their colours. Thresholds and rules are those of the paper's code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.clip import Clip
from sdtrain.metric.detector import OBJECTS, Detection, Detector

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of an object's score; the second where the prompt counts
MAX_OBJECTS = 16  # of a name
MARGIN = 0.1  # of both objects' sizes, within which neither is beside the other
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GROUND = 153  # grey around an object whose colour is named
RELATIONS = ("left of", "right of", "above", "below")
WANTED = (
    "a JSON object a line with prompt, tag and include, as "
    "https://github.com/djghosh13/geneval/blob/main/prompts/evaluation_metadata.jsonl"
)

Box = tuple[float, float, float, float]


class GenEval:
    """Judges pictures by what was asked for.

    Args:
        detector: finds objects.
        clip: names colours; the paper's is ViT-L/14.
    """

    def __init__(self, detector: Detector, clip: Clip) -> None:
        self.detector, self.clip = detector, clip
        self._classifiers: dict[str, torch.Tensor] = {}

    def __call__(self, picture: np.ndarray, asked: Mapping[str, Any]) -> bool:
        """Whether a uint8 picture (H, W, 3) is all that was asked for."""
        planes = torch.from_numpy(picture).permute(2, 0, 1).to(self.detector.mean.device)  # (3, H, W)
        objects = certain(self.detector(planes), asked["tag"])
        return judge(asked, objects, lambda some, name: [self.colour(picture, one, name) for one in some])

    @torch.no_grad()
    def colour(self, picture: np.ndarray, found: Detection, name: str) -> str:
        """An object's, by CLIP: of its pixels on grey, cropped to it and to the square in the middle."""
        left, top, right, bottom = found.box
        alone = np.where(found.mask[..., None], picture, np.uint8(GROUND))[top:bottom, left:right]
        side = min(alone.shape[:2])
        y, x = ((length - side) // 2 for length in alone.shape[:2])
        square = torch.from_numpy(alone[y : y + side, x : x + side]).permute(2, 0, 1)[None]  # (1, 3, side, side)
        features = self.clip(square.to(self.clip.mean.device))
        return COLOURS[int((features @ self._classifier(name).T).argmax())]

    def _classifier(self, name: str) -> torch.Tensor:
        """(10, F): each colour's direction is the mean of three sentences'."""
        if name not in self._classifiers:
            sentences = ("a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object")
            told = self.clip.texts([sentence.format(colour) for colour in COLOURS for sentence in sentences])
            mean = told.unflatten(0, (len(COLOURS), len(sentences))).mean(dim=1)  # (10, F)
            self._classifiers[name] = mean / mean.norm(dim=1, keepdim=True)
        return self._classifiers[name]


def certain(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The objects that count, by their name, the most certain ones first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda one: -one.score):
        if detection.score > threshold and len(found.setdefault(detection.name, [])) < MAX_OBJECTS:
            found[detection.name].append(detection)
    return found


def judge(
    asked: Mapping[str, Any],
    objects: Mapping[str, Sequence[Detection]],
    colours_of: Callable[[Sequence[Detection], str], Sequence[str]],
) -> bool:
    """Whether every object of `include` is there as often as asked, in its colour and in its place, and none of
    `exclude` as often. Colours and places are looked at in the most certain ones alone, as many as are asked for.
    """
    groups: list[Sequence[Detection] | None] = []
    for wanted in asked["include"]:
        found = objects.get(wanted["class"], ())[: wanted["count"]]
        is_met = len(found) == wanted["count"]
        if is_met and "color" in wanted:
            is_met = all(colour == wanted["color"] for colour in colours_of(found, wanted["class"]))
        if is_met and "position" in wanted:
            relation, number = wanted["position"]
            targets = groups[number]
            is_met = targets is not None and all(
                relation in relations(one.box, target.box) for one in found for target in targets
            )
        groups.append(found if is_met else None)
    has_none_too_many = all(len(objects.get(no["class"], ())) < no["count"] for no in asked.get("exclude", ()))
    return None not in groups and has_none_too_many


def relations(box: Box, other: Box) -> set[str]:
    """Where a box stands from another: by the centres, which must be further apart than a tenth of both sizes."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = box, other
    offset = np.array([left + right - left2 - right2, top + bottom - top2 - bottom2]) / 2
    sizes = np.array([right - left + right2 - left2, bottom - top + bottom2 - top2])
    beyond = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, is_so in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if is_so}


def check_asked(prompts: Sequence[Mapping[str, Any]], known: Collection[str] = OBJECTS) -> None:
    """Raises ConfigError for a line that cannot be judged, naming it."""
    for number, asked in enumerate(prompts, 1):
        try:
            told = [*asked["include"], *asked.get("exclude", ())]
            wrong = "" if isinstance(asked["tag"], str) and told else "it asks for nothing"
            for place, wanted in enumerate(told):
                if wanted["class"] not in known:
                    wrong = f"the detector knows no {wanted['class']!r}"
                elif not isinstance(wanted["count"], int) or wanted["count"] < 1:
                    wrong = f"count: {wanted['count']!r} is no number of objects"
                elif wanted.get("color", COLOURS[0]) not in COLOURS:
                    wrong = f"color: {wanted['color']!r} is none of {', '.join(COLOURS)}"
                elif "position" in wanted:
                    relation, target = wanted["position"]
                    if relation not in RELATIONS or not 0 <= target < place:
                        wrong = f"position: {wanted['position']!r} is no relation to an object before it"
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"--prompts: prompt {number} cannot be judged ({error!r}); it wants {WANTED}") from error
        if wrong:
            raise ConfigError(f"--prompts: prompt {number}: {wrong}")
