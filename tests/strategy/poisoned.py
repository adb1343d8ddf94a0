"""`python -m sdtrain` in which one picture of each stage holds no numbers: SDTRAIN_POISON is {stage: sample id}."""

import json
import os
import sys
from pathlib import Path

from sdtrain.stage.base import Stage

POISON = json.loads(os.environ.get("SDTRAIN_POISON", "{}"))


def poisoned(consumed, poison):
    """What `Stage.consumed` is then; the picture is bad on whatever rank and in whatever micro-batch it comes."""

    def consume(stage, batch):
        found = batch["sample_id"] == poison.get(stage.context.stage, -1)
        batch["image" if "image" in batch else "latent"][found] = float("nan")
        return consumed(stage, batch)

    return consume


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from sdtrain.__main__ import cli

    Stage.consumed = poisoned(Stage.consumed, POISON)
    cli()
