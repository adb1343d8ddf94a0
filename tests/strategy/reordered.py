"""`reordered.py SEED ...` is `python -m sdtrain ...` in which the samples of every micro-batch stand in an order drawn
from SEED: else nothing differs.
"""

import sys
from pathlib import Path

import torch

from sdtrain.stage.base import Stage


def reordered(consumed, seed):
    """What `Stage.consumed` is then. A sample keeps its noise, and the sums over a batch add up in another order: a
    drawn one, since sums by vectors and halves are the same to the bit when a batch is turned round.
    """

    def consume(stage, batch):
        num = len(batch["sample_id"])
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        for name, value in batch.items():
            if isinstance(value, list) and len(value) == num:
                batch[name] = [value[i] for i in order]
            elif isinstance(value, torch.Tensor) and value.shape[:1] == (num,):
                batch[name] = value[order]
        return consumed(stage, batch)

    return consume


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from sdtrain.__main__ import cli

    Stage.consumed = reordered(Stage.consumed, int(sys.argv.pop(1)))
    cli()
