"""An estimate in words: what `tools/plan.py` prints, and what to lower where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sdtrain.optim.adamw8bit import AdamW8bit
from sdtrain.plan.estimate import GIB, Estimate, estimate, images_at_once, num_devices, strategy_of
from sdtrain.plan.sharding import STRATEGIES, held_bytes

ACHIEVED = 0.4  # of a device's peak, as good training code does
USABLE = 0.92  # of a device's memory: CUDA, its libraries and fragmentation take the rest
_MOST_IMAGES = 4096  # at once
_PARTS = ("frozen weights", "weights", "master weights", "gradients", "optimizer", "EMA", "buckets")


@dataclass(frozen=True)
class Card:
    """A device to train on: its memory, and the peak of its dense bf16 products."""

    name: str
    memory_gb: int
    peak_tflops: float

    def most_images(self, found: Estimate, checkpointed: bool) -> int:
        """How many fit at once; 0 for none."""
        low, high = 0, _MOST_IMAGES + 1
        while high - low > 1:
            middle = (low + high) // 2
            fits = found.total_bytes(middle, checkpointed) <= self.memory_gb * GIB * USABLE
            low, high = (middle, high) if fits else (low, middle)
        return low

    def images_a_second(self, found: Estimate, checkpointed: bool, achieved: float = ACHIEVED) -> float:
        """Of one device."""
        return achieved * self.peak_tflops * 1e12 / found.training_flops(checkpointed)

    def hours(self, cfg: DictConfig, name: str, found: Estimate, achieved: float = ACHIEVED) -> float:
        """A whole stage, on as many devices as are configured."""
        images = cfg[name].trainer.max_steps * cfg[name].trainer.batch_size
        rate = self.images_a_second(found, found.is_checkpointed, achieved) * num_devices(cfg, name)
        return images / rate / 3600


# By their makers' word, but for the H200's products, which were measured; an H100's are taken to be the same.
CARDS = (
    Card("RTX 4070", 12, 58),
    Card("RTX 4090", 24, 165),
    Card("A100", 40, 312),
    Card("H100", 80, 790),
    Card("H200", 141, 790),
)


def describe(cfg: DictConfig, achieved: float = ACHIEVED) -> Iterator[str | Table]:
    """What a plan prints: lines, and a table of each stage."""
    for name in cfg.stages:
        found = estimate(cfg, name)
        if found is None:
            yield f"{cfg.name}, stage {name}: this first stage has nothing to train"
        else:
            yield from _describe_stage(cfg, name, found)
            yield memory_table(cfg, name, found)
            yield from _describe_time(cfg, name, found, achieved)


def _describe_stage(cfg: DictConfig, name: str, found: Estimate) -> Iterator[str]:
    checkpointed = found.is_checkpointed
    yield f"{cfg.name}, stage {name}, {found.image_size} px, {cfg[name].precision or cfg.precision}"
    yield "  parameters    " + ", ".join(
        f"{part} {abs(count) / 1e6:.1f} M{' (frozen)' if count < 0 else ''}"
        for part, count in found.num_parameters.items()
        if count
    )
    forward = ", ".join(f"{part} {flops / 1e12:.4g}" for part, flops in found.forward_flops.items())
    yield f"  an image      {forward} TFLOP forward; {found.training_flops(checkpointed) / 1e12:.4g} to train on it"
    disk = f"{_gib(found.checkpoint_bytes)} a checkpoint"
    if found.latent_bytes:
        disk += f", {_gib(1e6 * found.latent_bytes)} a million cached latents"
    yield f"  on disk       {disk}"


def memory_table(cfg: DictConfig, name: str, found: Estimate) -> Table:
    """What each device holds, in GiB, under each strategy that the stage can have, with micro-batches of some sizes."""
    devices, at_once, configured = num_devices(cfg, name), images_at_once(cfg, name), strategy_of(cfg, name)
    sizes = sorted({1, *(at_once // n for n in (8, 4, 2, 1) if at_once >= n)})
    table = Table(title=f"GiB on each of {devices} devices, * as configured", title_justify="left", box=SIMPLE_HEAD)
    heads = [part.removesuffix(" weights") for part in _PARTS] + [f"at {size}" for size in sizes]
    table.add_column("strategy", no_wrap=True)
    for head in (*heads, "fits"):
        table.add_column(head, justify="right", no_wrap=True)
    is_sharded = cfg[name].optim._target_ == "sdtrain.optim.adamw.AdamW"
    for strategy in STRATEGIES if is_sharded else STRATEGIES[:1]:
        if strategy == "deepspeed_zero3" and name == "autoencoder":
            continue
        held = held_bytes(found.whole_bytes, found.num_learned, strategy, devices)
        totals = [sum(held.values()) + found.step_bytes(size, found.is_checkpointed) for size in sizes]
        fits = [str(card.memory_gb) for card in CARDS if totals[-1] <= card.memory_gb * GIB * USABLE]
        parts = [f"{held[part] / GIB:.3g}" if held.get(part) else "-" for part in _PARTS]
        mark = "* " if strategy == configured else "  "
        shown = [f"{total / GIB:.3g}" for total in totals]
        table.add_row(mark + strategy, *parts, *shown, f"{fits[0]} GB" if fits else "none")
    return table


def _describe_time(cfg: DictConfig, name: str, found: Estimate, achieved: float) -> Iterator[str]:
    trainer, devices = cfg[name].trainer, num_devices(cfg, name)
    yield "  card             images at once   checkpointed   images/s   checkpointed      hours   GPU-hours"
    for card in CARDS:
        most = [card.most_images(found, flag) if flag in found.runs else 0 for flag in (False, True)]
        rate = [f"{card.images_a_second(found, flag, achieved):.4g}" if n else "-" for flag, n in enumerate(most)]
        hours = card.hours(cfg, name, found, achieved)
        yield (
            f"  {f'{card.memory_gb} GB {card.name}':<15}{most[0] or '-':>14}   {most[1] or '-':>12}   {rate[0]:>8}   "
            f"{rate[1]:>12}   {hours:>8.3g}   {hours * devices:>9.4g}"
        )
    yield (
        f"  hours are of {trainer.max_steps} steps of {trainer.batch_size} images on {devices} of a card, at"
        f" {achieved:.0%} of its peak ({CARDS[-1].name}: {CARDS[-1].peak_tflops} TFLOP/s): computed, not measured"
    )


def advise(cfg: DictConfig, name: str) -> str:
    """What to lower where a stage ran out of memory, and by how much each helps: about, as it is computed for CUDA."""
    found, trainer, at_once = estimate(cfg, name), cfg[name].trainer, images_at_once(cfg, name)
    used, ways = found.step_bytes(at_once, found.is_checkpointed), []
    if at_once > 1:
        factor = next(n for n in range(2, at_once + 1) if at_once % n == 0)  # so that the batch stays a multiple
        saved = _gib(used - found.step_bytes(at_once // factor, found.is_checkpointed))
        accumulate = f"{name}.trainer.num_accumulate={trainer.num_accumulate * factor}"
        ways.append(f"{accumulate} saves {saved} of activations and keeps the batch")
        ways.append(f"{name}.trainer.batch_size={trainer.batch_size // factor} saves as much")
    if True in found.runs and not found.is_checkpointed:
        part = "model" if name == "diffusion" else "first_stage"
        plus = "" if "gradient_checkpointing" in cfg[part] else "+"
        saved = _gib(used - found.step_bytes(at_once, True))
        ways.append(f"{plus}{part}.gradient_checkpointing=true saves {saved}")
    in_8_bits = found.num_learned * AdamW8bit.state_bytes
    saved_bytes, total = found.fixed_bytes["optimizer"] - in_8_bits, found.total_bytes(at_once, found.is_checkpointed)
    if saved_bytes > 0.05 * total:
        ways.append(f"optim@{name}.optim=adamw8bit saves {_gib(saved_bytes)} of the optimizer's")
    return (
        f"about {_gib(total)} are needed, {_gib(used)} of them for {at_once} images at once"
        f" (batch_size={trainer.batch_size}); lower it: {'; '.join(ways) or 'a smaller data.image_size'}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g} GiB"
