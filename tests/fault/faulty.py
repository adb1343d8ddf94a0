"""`python -m sdtrain` with a ledger of the samples that each rank took, and with the fault in SDTRAIN_FAULT, if any.

A fault is a JSON object: at `step` of `stage`, `where` in it ("step", "save", "validation"), rank `rank` sends `signal`
to itself, or `to` "all": its process group, as Slurm would, or "worker": its data workers. `where` "nan" makes that
rank's loss of the step no number. The time of it stands in DIR/fault, and it happens once.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.callback.evaluate import Evaluate
from sdtrain.stage.base import Stage

FAULT = json.loads(os.environ.get("SDTRAIN_FAULT", "{}"))


def fault_is_due(module, step, where):
    place = {"stage": module.context.stage, "step": step, "where": where, "rank": module.global_rank}
    is_there = all(FAULT.get(key) == value for key, value in place.items())
    return is_there and not (module.context.run_directory / "fault").exists()


def happen(module):
    (module.context.run_directory / "fault").write_text(str(time.time()))
    number = getattr(signal, FAULT["signal"])
    if FAULT.get("to") == "all":
        os.killpg(os.getpgrp(), number)
    elif FAULT.get("to") == "worker":
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    else:
        os.kill(os.getpid(), number)


def before(owner, name, action):
    """`action` is called with the arguments of owner.name before each call of it."""
    original = getattr(owner, name)

    def patched(self, *args, **kwargs):
        action(self, *args)
        return original(self, *args, **kwargs)

    setattr(owner, name, patched)


def take(module, batch):
    step = module.trainer.global_step + 1
    row = [module.context.stage, step, module.global_rank, batch["sample_id"].tolist()]
    with (module.context.run_directory / f"ledger_rank{module.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    if fault_is_due(module, step, "step"):
        happen(module)
    if fault_is_due(module, step, "nan") and "image" in batch:
        (module.context.run_directory / "fault").touch()
        batch["image"].fill_(float("nan"))


def at(where):
    def act(_, trainer, *args):
        if fault_is_due(trainer.lightning_module, trainer.global_step, where):
            happen(trainer.lightning_module)

    return act


before(Stage, "consumed", take)
before(Checkpoint, "save", at("save"))
before(Evaluate, "act", at("validation"))

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from sdtrain.__main__ import cli

    cli()
