"""A class label as a condition, as in class-conditional models (Dhariwal and Nichol 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sdtrain.conditioner.dropout import dropped, require_share
from sdtrain.contracts import Batch, Conditioning, Input
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class Label(nn.Module):
    """A sample's class -> {"class_labels": (B,) int64}, for a denoiser's table with one row more: the null class.

    The batch's `label`, or where there is none what a training sample says.

    Args:
        num_class_embeds: rows of the denoiser's table: the classes and, last, the null class, whose row is learned.
        key: where the .json member says the class; null reads it from the caption.
        names: the classes' names in their order; null where the class is a number.
        dropout: share of the training labels that become the null class (Ho and Salimans 2021, algorithm 1).
        dropout_group: conditions of one group are dropped together, those of different groups independently.
        width, pooled_width: null, as there is no text.

    Raises:
        ConfigError: where names and rows do not match.
    """

    inputs = {"label": Input("label")}

    def __init__(
        self,
        num_class_embeds: int,
        key: str | None = "label",
        names: Sequence[str] | None = None,
        dropout: float = 0.1,
        dropout_group: str = "",
        width: None = None,
        pooled_width: None = None,
    ) -> None:
        super().__init__()
        require_share(dropout=dropout)
        if names is not None and len(names) + 1 != num_class_embeds:
            raise ConfigError(
                f"num_class_embeds={num_class_embeds} must be {len(names) + 1}: {len(names)} names and the null class"
            )
        self.key, self.names, self.dropout, self.dropout_group = key, names, dropout, dropout_group
        self.num_classes, self.width, self.pooled_width = num_class_embeds - 1, width, pooled_width
        self._number = {name: number for number, name in enumerate(names or ())}
        self.register_buffer("null", torch.tensor(self.num_classes), persistent=False)

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """The batch's labels; with a draw, some of them dropped."""
        labels = torch.tensor([self._label(batch, i) for i in range(len(batch["caption"]))]).to(self.null.device)
        if draw is not None and self.dropout > 0:
            labels = torch.where(dropped(draw, self.dropout, self.dropout_group), self.null, labels)
        return {"class_labels": labels}

    def unconditional(self, batch: Batch) -> Conditioning:
        """The null class."""
        return {"class_labels": self.null.expand(len(batch["caption"]))}

    def _label(self, batch: Batch, i: int) -> int:
        """The number of sample i's class.

        Raises:
            ConfigError: naming the sample that has none, or one that there is not.
        """
        place, said = self._said(batch, i)
        number = said
        if isinstance(said, str):
            is_number = said.isdecimal() and (not self.names or "label" in batch)  # of data with names, only a name
            number = self._number.get(said, int(said) if is_number else None)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < self.num_classes:
            return number
        sample = batch["key"][i] if "key" in batch else f"number {i}"
        wanted = "a name of conditioner.names" if self.names else f"a whole number from 0 to {self.num_classes - 1}"
        raise ConfigError(f"sample {sample}: {place} is {said!r}, not {wanted}")

    def _said(self, batch: Batch, i: int) -> tuple[str, Any]:
        """Where sample i's class stands, and what stands there."""
        if "label" in batch:
            return "its label", batch["label"][i]
        if self.key is None:
            return "its caption", batch["caption"][i]
        return f"'{self.key}' in its .json", ((batch.get("attributes") or {i: None})[i] or {}).get(self.key)
