"""Mask2Former (Cheng et al. 2022) from a local folder: which objects a picture shows, and where."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sdtrain.errors import ConfigError
from sdtrain.metric.extractor import sha256_of

WANTED = (
    "a folder of config.json and model.safetensors of Mask2Former for instances of COCO, such as "
    "https://huggingface.co/facebook/mask2former-swin-small-coco-instance (275 MB), the detector of GenEval's paper"
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NUM_KEPT = 100  # most certain objects of a picture
LEAST_SCORE = 0.05  # less certain ones are none, and their masks are not drawn
# COCO's 80 things in their order, by the names that GenEval's prompts call them.
OBJECTS = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)


class Detection(NamedTuple):
    """An object in a picture."""

    name: str
    score: float
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are outside
    mask: np.ndarray  # (H, W) bool


class Detector(nn.Module):
    """The objects of pictures, as Mask2Former finds instances.

    Args:
        weights: a folder as transformers saves it. Nothing is downloaded and no code in it is run.
        side: the shorter side of a picture as the network sees it, in pixels.

    Raises:
        ConfigError: naming what is missing or does not fit.
    """

    def __init__(self, weights: str, side: int = 800) -> None:
        super().__init__()
        folder, self.side = Path(weights), side
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ConfigError(f"detector.weights: no file {folder / name}; it wants {WANTED}")
        try:
            self.network, told = _network_class().from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"detector.weights: {folder} cannot be read: {str(error).splitlines()[0]}") from error
        if told["missing_keys"] or self.network.config.num_labels != len(OBJECTS):
            lacks = ", ".join(sorted(told["missing_keys"])[:1]) or f"{self.network.config.num_labels} classes"
            raise ConfigError(f"detector.weights: {folder} does not fit ({lacks}); it wants {WANTED}")
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.identity = {"network": "mask2former", "sha256": sha256_of(folder / "model.safetensors"), "side": side}

    @torch.no_grad()
    def forward(self, picture: Tensor) -> list[Detection]:
        """The objects of a picture (3, H, W), uint8, the most certain ones first."""
        height, width = picture.shape[1:]
        scale = self.side / min(height, width)
        x = interpolate(
            picture[None].float(), (round(height * scale), round(width * scale)), mode="bilinear", antialias=True
        )
        classes, masks = self.network((x / 255 - self.mean) / self.std)
        return _instances(classes[0], masks[0], (height, width))


def _instances(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> list[Detection]:
    """From logits (Q, 81) and (Q, h, w): a query may be an instance of several classes, its certainty is that of the
    class times that of its pixels.
    """
    scores, places = classes.softmax(dim=1)[:, :-1].flatten().topk(min(NUM_KEPT, classes[:, :-1].numel()))
    places = places[scores > LEAST_SCORE]
    if not len(places):
        return []
    queries = places // (classes.shape[1] - 1)
    drawn = interpolate(masks[queries.unique()][None], size, mode="bilinear")[0]  # (q, H, W)
    of_query = dict(zip(queries.unique().tolist(), drawn))
    found = []
    for place, query, score in zip(places.tolist(), queries.tolist(), scores.tolist()):
        mask = of_query[query] > 0
        rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
        if not rows:
            continue
        certainty = float(of_query[query].sigmoid()[mask].mean())
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        found.append(Detection(OBJECTS[place % len(OBJECTS)], score * certainty, box, mask.cpu().numpy()))
    return sorted(found, key=lambda detection: -detection.score)


@cache
def _network_class() -> Any:  # noqa: ANN401 a class of transformers, which is imported late
    """Transformers' Mask2FormerForUniversalSegmentation without its loss, which wants scipy."""
    from transformers import Mask2FormerModel, Mask2FormerPreTrainedModel

    class Mask2Former(Mask2FormerPreTrainedModel):
        _keys_to_ignore_on_load_unexpected = (r"^criterion\.",)

        def __init__(self, config: Any) -> None:  # noqa: ANN401
            super().__init__(config)
            self.model = Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            out = self.model(pixel_values=pixels, output_hidden_states=True)
            last = out.transformer_decoder_intermediate_states[-1].transpose(0, 1)  # (B, Q, D)
            return self.class_predictor(last), out.masks_queries_logits[-1]

    return Mask2Former
