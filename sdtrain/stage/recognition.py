"""Before stage 1, where no pretrained network is to be had: a small VGG learns to name what captions say of their
pictures.

A perceptual loss compares the features of a recognition network (Zhang et al. 2018). This one predicts which words
stand in a
picture's caption, so it needs nothing but the training shards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import Batch, Context, Preview
from sdtrain.stage.base import Stage

_WORD = re.compile(r"\w+")


def vocabulary(captions: Sequence[str], size: int) -> list[str]:
    """The most telling words: those in the most captions, but not in more than half of them, and in at least two."""
    counts = Counter(word for text in captions for word in set(_WORD.findall(text.lower())))
    telling = [word for word, n in counts.items() if 2 <= n <= max(len(captions) / 2, 2)]
    # A set's order changes from process to process, so words of equal counts go by the alphabet.
    return sorted(telling, key=lambda word: (-counts[word], word))[:size]


class RecognitionStage(Stage):
    """Trains a VGG's features with a linear head on pooled features, by cross-entropy a word.

    Args:
        network: the VGG.
        words: what it names.
    """

    def __init__(
        self,
        context: Context,
        network: nn.Module,
        words: Sequence[str],
        optim: Any,  # noqa: ANN401 a part
        clip_norm: float | None,
    ) -> None:
        super().__init__(context, optim, clip_norm)
        self.network = network
        self.words = {word: i for i, word in enumerate(words)}
        # Features at four places of a 2x2 grid, so that words of position can be named at all.
        self.head = nn.Linear(sum(network.num_features) * 4, max(len(words), 1))

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """Network and head learn alike."""
        return {"recognition": list(self.parameters())}

    def logits(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, words)."""
        pooled = [F.adaptive_max_pool2d(f.float(), 2).flatten(1) for f in self.network(image)]
        return self.head(torch.cat(pooled, dim=1))

    def targets(self, captions: Sequence[str]) -> Tensor:
        """(B, words) of 0 and 1."""
        found = torch.zeros(len(captions), self.head.out_features)
        for row, text in enumerate(captions):
            for word in _WORD.findall(text.lower()):
                if word in self.words:
                    found[row, self.words[word]] = 1.0
        return found.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002 Lightning's signature
        """One micro-batch of pictures and captions."""
        self.consumed(batch)
        loss = F.binary_cross_entropy_with_logits(self.logits(batch["image"]), self.targets(batch["caption"]))
        self.note(loss=loss)
        return {"loss": loss}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Average precision is not needed: the share of held-out (picture, word) pairs that are told right, where the
        word stands.
        """
        data = self.trainer.datamodule
        batch = data.load("val", range(min(256, data.splits["val"])))
        with self.precision():
            right = (self.logits(batch["image"].to(self.device)) > 0) == (self.targets(batch["caption"]) > 0)
        stands = self.targets(batch["caption"]) > 0
        return {"val/word_recall": float(right[stands].float().mean()) if bool(stands.any()) else 0.0}

    def preview(self) -> Preview | None:
        """Nothing to look at."""
        return None

    def finish(self) -> dict[str, Any]:
        """How well words are named."""
        return {name.removeprefix("val/"): value for name, value in self.evaluate().items()}
