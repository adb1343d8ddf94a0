"""What a run would take, computed without its memory, its data and its pretrained files: its parts on the meta device,
one training step's shapes run through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sdtrain.build import build
from sdtrain.conditioner.text import Text
from sdtrain.conditioner.unloaded import AnyTokens
from sdtrain.config import _compose, load_config, plus
from sdtrain.contracts import Batch
from sdtrain.layer.frozen import everything
from sdtrain.layer.perceptual import Perceptual
from sdtrain.ops.meter import Meter, measure
from sdtrain.ops.random import Draw
from sdtrain.optim.adamw8bit import AdamW8bit
from sdtrain.plan.sharding import held_bytes
from sdtrain.preflight import SOURCES, STAGES
from sdtrain.stage.autoencoder import AutoencoderStage
from sdtrain.stage.base import Stage
from sdtrain.stage.diffusion import DiffusionStage
from sdtrain.stage.generation import for_conditioner
from sdtrain.target import parts

GIB = 2**30
NOWHERE = "plan://"  # an address, which the preflight does not look for
_UNLOADED = {
    "sdtrain.conditioner.clip.CLIP": "sdtrain.conditioner.unloaded.CLIP",
    "sdtrain.conditioner.t5.T5": "sdtrain.conditioner.unloaded.T5",
}
_COUNTS = {False: (1, 8), True: (1, 8, 64)}  # images at once that are run, without and with gradient checkpointing


@dataclass
class Estimate:
    """What a stage takes on each device, and an image of it.

    Args:
        image_size: in pixels.
        num_parameters: by part; negative where it is frozen.
        num_learned: parameters that the optimizer moves.
        forward_flops: an image, by part.
        fixed_bytes: what a device holds whatever the batch, by part, under the strategy that is configured.
        runs: by whether blocks are checkpointed: (images at once, peak bytes of the step beside these, FLOPs), rising.
        is_checkpointed: whether they are as configured.
        whole_bytes: by part, what one device alone would hold.
        latent_bytes: of an image in a cache; 0 where there is nothing to cache.
    """

    image_size: int
    num_parameters: dict[str, int]
    num_learned: int
    forward_flops: dict[str, int]
    fixed_bytes: dict[str, float]
    runs: dict[bool, list[tuple[int, int, int]]]
    is_checkpointed: bool
    whole_bytes: dict[str, float] = field(default_factory=dict)
    latent_bytes: int = 0

    def training_flops(self, checkpointed: bool) -> float:
        """An image: forward and backward of what learns, forward of what does not."""
        images, _, flops = self.runs[checkpointed][-1]
        return flops / images

    @property
    def checkpoint_bytes(self) -> float:
        """One on disk."""
        return sum(self.whole_bytes[what] for what in ("weights", "optimizer", "EMA"))

    def step_bytes(self, images: int, checkpointed: bool) -> float:
        """Of `images` at once, beside what is fixed: along the line through the two runs that are nearest."""
        runs = self.runs[checkpointed]
        low = max((i for i in range(len(runs) - 1) if runs[i][0] <= images), default=0)
        (n, below, _), (m, above, _) = runs[low : low + 2]
        return below + (above - below) * (images - n) / (m - n)

    def total_bytes(self, images: int, checkpointed: bool) -> float:
        """All of it."""
        return sum(self.fixed_bytes.values()) + self.step_bytes(images, checkpointed)


def load(overrides: Sequence[str]) -> DictConfig:
    """The config that arguments mean, checked but for the files that a run starts from: they need not be there."""
    overrides = [plus(override) for override in overrides]
    values = OmegaConf.to_container(_compose(overrides))
    named = [key for key in sorted(SOURCES) if key.partition(".")[2] in values[key.partition(".")[0]]]
    own = [(f"{stage}.data", values[stage]["data"] or {}) for stage in STAGES]
    named += [f"{path}.{key}" for path, node in own for key in node if f"data.{key}" in SOURCES]
    return load_config([*overrides, *(f"{key}='{NOWHERE}'" for key in named)])


def build_stage(cfg: DictConfig, name: str) -> Stage | None:
    """A stage with its parts on the meta device, nothing read; None for an autoencoder that has nothing to learn."""
    values = OmegaConf.to_container(cfg, resolve=True)
    for _, node in parts(values):
        if node.get("pretrained"):
            node["_target_"] = _UNLOADED.get(node["_target_"], node["_target_"])
        if node["_target_"].endswith(".Perceptual"):
            node |= {"weights": None, "heads": None}
    cfg = OmegaConf.create(values)
    section = cfg[name]
    learns = {"optim": build(section.optim), "clip_norm": section.trainer.clip_norm, "metric": {}}
    with torch.device("meta"):
        first_stage = build(cfg.first_stage)
        if name == "autoencoder":
            if not list(first_stage.parameters()):
                return None
            stage = AutoencoderStage(None, first_stage, build(section.objective), **learns)
        else:
            described = {"model": build(cfg.model), "conditioner": build(cfg.conditioner), "first_stage": first_stage}
            described["decoded"] = build(section.decoded) if section.decoded else None
    if name == "diffusion":  # an objective asks the path's numbers, which are nowhere on the meta device
        stage = DiffusionStage(None, **described, objective=build(cfg.objective), sampler=None, **learns)
    for module in everything(stage):
        if isinstance(module, Text):
            module.tokens = AnyTokens(module.max_tokens)
        if isinstance(module, Perceptual):
            module.ready = True
    return stage


def count_parameters(module: nn.Module) -> int:
    """Of all modules inside; negative where none of them learns."""
    found = {id(p): p for inner in everything(module) for p in inner.parameters(recurse=False)}
    total = sum(p.numel() for p in found.values())
    return total if any(p.requires_grad for p in found.values()) else -total


def estimate(cfg: DictConfig, name: str) -> Estimate | None:
    """What a stage takes; None where it has nothing to learn."""
    stage = build_stage(cfg, name)
    if stage is None:
        return None
    section = cfg[name]
    side = (section.data or cfg.data).get("image_size", 64)
    inner = stage.model if name == "diffusion" else stage.first_stage
    blocks = [module for module in inner.modules() if hasattr(module, "gradient_checkpointing")]
    is_checkpointed = any(module.gradient_checkpointing for module in blocks)
    learned = [p for parameters in stage.parts().values() for p in parameters if p.requires_grad]
    for p in learned:
        p.grad = torch.zeros_like(p)  # held before the step, as they are where micro-batches are added up
    runs, forward, dtype = {}, {}, _autocast_type(cfg, name)
    for checkpointed in (True, False) if blocks else (False,):
        for module in blocks:
            module.gradient_checkpointing = checkpointed
        runs[checkpointed] = []
        for images in _COUNTS[checkpointed]:
            parts_flops: dict[str, int] = {}
            meter = measure(partial(loss_of, stage, section, images, side, parts_flops), dtype)
            runs[checkpointed].append((images, meter.peak_bytes, meter.flops))
            forward = {part: flops // images for part, flops in parts_flops.items()}
    num_learned = sum(p.numel() for p in learned)
    whole = _whole_bytes(cfg, name, stage, learned)
    fixed = held_bytes(whole, num_learned, strategy_of(cfg, name), num_devices(cfg, name))
    named = {n: getattr(stage, n, None) for n in ("model", "conditioner", "first_stage", "objective", "decoded")}
    counted = {n: count_parameters(part) for n, part in named.items() if isinstance(part, nn.Module)}
    latent = _latent_bytes(stage, side) if name == "diffusion" else 0
    return Estimate(side, counted, num_learned, forward, fixed, runs, is_checkpointed, whole, latent)


def training_flops(cfg: DictConfig, name: str) -> float:
    """An image's, forward and backward, as `Estimate.training_flops` counts them without checkpointing, in a second."""
    stage, section = build_stage(cfg, name), cfg[name]
    for module in everything(stage):
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    side = (section.data or cfg.data).get("image_size", 64)
    return float(measure(partial(loss_of, stage, section, 1, side, {}), _autocast_type(cfg, name)).flops)


def _autocast_type(cfg: DictConfig, name: str) -> torch.dtype | None:
    precision = (cfg[name].precision or cfg.precision).partition("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)


def _latent_bytes(stage: DiffusionStage, side: int) -> int:
    """Mean and standard deviation in 16 bits, as the cache keeps them."""
    first_stage = stage.first_stage
    is_learned = any(True for _ in first_stage.parameters())
    return 2 * 2 * first_stage.latent_channels * (side // first_stage.down_factor) ** 2 if is_learned else 0


def _whole_bytes(cfg: DictConfig, name: str, stage: Stage, learned: Sequence[nn.Parameter]) -> dict[str, float]:
    held = {id(t): t for module in everything(stage) for t in (*module.parameters(False), *module.buffers(False))}
    learned_bytes = sum(p.nbytes for p in learned)
    return {
        "frozen weights": sum(t.nbytes for t in held.values()) - learned_bytes,
        "weights": learned_bytes,
        "gradients": learned_bytes,
        "optimizer": optimizer_bytes(stage),
        "EMA": num_averages(cfg, name) * sum(p.nbytes for _, p in stage.averaged_parameters()),
    }


def batch_of(images: int, side: int) -> Batch:
    """What is said of pictures of no content, whatever a conditioner reads; `source` stands for the pictures too."""
    ids = torch.arange(images)
    batch: Batch = {"sample_id": ids, "epoch": torch.zeros_like(ids), "caption": [""] * images, "key": [""] * images}
    return batch | {"label": [0] * images, "source": torch.empty(images, 3, side, side)}


def loss_of(stage: Stage, section: DictConfig, images: int, side: int, forward: dict[str, int], meter: Meter) -> Tensor:
    """One micro-batch's loss, with what its parts' forward passes take."""
    batch = batch_of(images, side)
    image, draw = batch["source"], Draw(0, batch["sample_id"], batch["epoch"])
    if isinstance(stage, AutoencoderStage):
        objective = stage.objective
        out = objective.loss(stage.first_stage, image, draw, getattr(objective, "adversarial_start", 0))
        forward["all losses"] = meter.flops
        return out["loss"]
    if section.cache_latents:
        first_stage, latent_side = stage.first_stage, side // stage.first_stage.down_factor
        shape = (images, 2, first_stage.latent_channels, latent_side, latent_side)
        batch["latent"] = torch.empty(shape, dtype=torch.float16)
    else:
        batch["image"] = image
    x0 = stage.latents(batch, draw)
    forward["first_stage"] = meter.flops
    told = stage.conditioner(for_conditioner(batch, stage.first_stage, tuple(x0.shape[2:])))
    forward["conditioner"] = meter.flops - sum(forward.values())
    out = stage.objective.loss(stage.model, x0, told, draw)
    forward["model"] = meter.flops - sum(forward.values())
    loss = out["loss"].mean()
    if stage.decoded is not None:
        predicted = stage.objective.to_x0(out["output"], out["x_t"], out["t"])
        loss = loss + stage.decoded(stage.first_stage, predicted, x0, stage.objective.path(out["t"]))
        forward["decoded"] = meter.flops - sum(forward.values())
    return loss


def optimizer_bytes(stage: Stage) -> float:
    """What the optimizer keeps of each parameter: found by a step of it on a small matrix and a small vector."""
    learned = {name: [p for p in some if p.requires_grad] for name, some in stage.parts().items()}
    if isinstance(stage.optim, AdamW8bit):  # its library need not be here
        return sum(p.numel() * stage.optim.state_bytes for some in learned.values() for p in some)
    matrix, vector = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(64))
    made, _ = stage.optim.build({name: [matrix, vector] if i == 0 else [] for i, name in enumerate(learned)}, 1)
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    made.step()
    per_value = [
        sum(value.nbytes for value in made.state[p].values() if isinstance(value, Tensor) and value.ndim) / p.nbytes
        for p in (vector, matrix)
    ]
    return sum(p.nbytes * per_value[p.ndim >= 2] for some in learned.values() for p in some)


def num_averages(cfg: DictConfig, name: str) -> int:
    """How many moving averages are kept."""
    ema = cfg[name].callback.get("ema")
    return 0 if ema is None else max(len(ema.get("lengths") or []), 1)


def strategy_of(cfg: DictConfig, name: str) -> str:
    """The one that is configured, as `held_bytes` names it; what says auto is DDP, on one device of one."""
    node = cfg[name].strategy or cfg.strategy
    if "zero_stage" not in node:
        return "ddp"
    return f"deepspeed_zero{node.zero_stage}{'_offload' if node.get('offload') else ''}"


def num_devices(cfg: DictConfig, name: str) -> int:
    """Over all nodes; what says auto counts as one."""
    num_nodes = (cfg.cluster and cfg.cluster[name].num_nodes) or cfg.num_nodes
    return (cfg.devices if isinstance(cfg.devices, int) else 1) * (num_nodes if isinstance(num_nodes, int) else 1)


def images_at_once(cfg: DictConfig, name: str) -> int:
    """On each device: the micro-batch."""
    trainer = cfg[name].trainer
    return max(trainer.batch_size // (trainer.num_accumulate * num_devices(cfg, name)), 1)
