"""A grid of pictures before the first step, then regularly: what the numbers look like."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.callback.grid import draw_grid
from sdtrain.callback.log import off_the_clock


class Samples(EverySteps):
    """At step 0, every `every_steps` optimizer steps and at the last one: DIR/<stage>/samples/step_%08d.png.

    Every rank makes the preview (sharded weights need them all); the first one draws it.
    """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:
            self.act(trainer, pl_module)

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with off_the_clock(trainer, "samples"):
            with pl_module.averaged_weights():
                preview = pl_module.preview()
            if preview is None or not trainer.is_global_zero:
                return
            context = pl_module.context
            path = context.directory / "samples" / f"step_{trainer.global_step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_grid(preview).save(path)
            captions = [caption[:200] for caption in preview.captions]
            name = f"{context.stage}/samples"
            context.tracker.image(name, path, trainer.global_step, captions, preview.images)
