"""An estimate in words: what a dry run prints, and what to lower where memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig

from sdtrain.dry_run.estimate import GIB, Estimate, estimate, images_at_once, num_devices
from sdtrain.optim.adamw8bit import AdamW8bit

ACHIEVED = 0.4  # of a device's peak, as good training code does
USABLE = 0.92  # of a device's memory: CUDA, its libraries and fragmentation take the rest
_MOST_IMAGES = 4096  # at once


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

    def images_a_second(self, found: Estimate, checkpointed: bool) -> float:
        """Of one device."""
        return ACHIEVED * self.peak_tflops * 1e12 / found.training_flops(checkpointed)

    def hours(self, cfg: DictConfig, name: str, found: Estimate) -> float:
        """A whole stage, on as many devices as are configured."""
        images = cfg[name].trainer.max_steps * cfg[name].trainer.batch_size
        return images / (self.images_a_second(found, found.is_checkpointed) * num_devices(cfg)) / 3600


# By their makers' word, but for the H200's products, which were measured; an H100's are taken to be the same.
CARDS = (
    Card("RTX 4070", 12, 58),
    Card("RTX 4090", 24, 165),
    Card("A100", 40, 312),
    Card("H100", 80, 790),
    Card("H200", 141, 790),
)


def describe(cfg: DictConfig) -> Iterator[str]:
    """The lines of a dry run."""
    for name in cfg.stages:
        found = estimate(cfg, name)
        if found is None:
            yield f"{cfg.name}, stage {name}: this first stage has nothing to train"
        else:
            yield from _describe_stage(cfg, name, found)


def _describe_stage(cfg: DictConfig, name: str, found: Estimate) -> Iterator[str]:
    trainer, devices, at_once = cfg[name].trainer, num_devices(cfg), images_at_once(cfg, name)
    checkpointed = found.is_checkpointed
    yield f"{cfg.name}, stage {name}, {found.image_size} px, {cfg[name].precision or cfg.precision}"
    yield "  parameters    " + ", ".join(
        f"{part} {abs(count) / 1e6:.1f} M{' (frozen)' if count < 0 else ''}"
        for part, count in found.num_parameters.items()
        if count
    )
    forward = ", ".join(f"{part} {flops / 1e12:.4g}" for part, flops in found.forward_flops.items())
    yield f"  an image      {forward} TFLOP forward; {found.training_flops(checkpointed) / 1e12:.4g} to train on it"
    fixed = ", ".join(f"{what} {_gib(size)}" for what, size in found.fixed_bytes.items() if size)
    step, total = found.step_bytes(at_once, checkpointed), found.total_bytes(at_once, checkpointed)
    fits = [f"{card.memory_gb}" for card in CARDS if total <= card.memory_gb * GIB * USABLE]
    yield f"  a device      {fixed}, activations of {at_once} images at once {_gib(step)}"
    yield f"                {_gib(total)} in all: " + (f"fits {', '.join(fits)} GB" if fits else "fits no card below")
    if devices > 1:
        sharded = _gib(total - (1 - 1 / devices) * found.sharded_bytes)
        yield f"                sharded over {devices} devices, as ZeRO-3 does, it would be {sharded}"
    yield "  card             images at once   checkpointed   images/s   checkpointed"
    for card in CARDS:
        most = [card.most_images(found, flag) if flag in found.runs else 0 for flag in (False, True)]
        rate = [f"{card.images_a_second(found, flag):.4g}" if n else "-" for flag, n in enumerate(most)]
        columns = f"{most[0] or '-':>14}   {most[1] or '-':>12}   {rate[0]:>8}   {rate[1]:>12}"
        yield f"  {f'{card.memory_gb} GB {card.name}':<15}{columns}"
    card = CARDS[-1]
    yield (
        f"  as configured {trainer.max_steps} steps of {trainer.batch_size} images:"
        f" {card.hours(cfg, name, found):.3g} hours on {devices} x {card.name}, at {ACHIEVED:.0%} of"
        f" {card.peak_tflops} TFLOP/s: computed, not measured"
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
