"""`python -m sdtrain` in which the samples of every micro-batch stand in the opposite order: else nothing differs."""

import sys
from pathlib import Path

import torch

from sdtrain.stage.base import Stage


def reordered(consumed):
    """What `Stage.consumed` is then. A sample keeps its noise, and the sums over a batch add up the other way."""

    def consume(stage, batch):
        num = len(batch["sample_id"])
        for name, value in batch.items():
            if isinstance(value, list) and len(value) == num:
                batch[name] = value[::-1]
            elif isinstance(value, torch.Tensor) and value.shape[:1] == (num,):
                batch[name] = value.flip(0)
        return consumed(stage, batch)

    return consume


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from sdtrain.__main__ import cli

    Stage.consumed = reordered(Stage.consumed)
    cli()
