"""What the rooms promise each other: batches, conditioning, and the Protocols of the parts that YAML puts together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from sdtrain.ops.random import Draw


class Batch(TypedDict, total=False):
    """One micro-batch of B samples, as the data module yields it.

    A task may add keys of its own (a mask, a low-resolution picture, a class label); its conditioner reads them.
    """

    image: Tensor  # (B, 3, H, W) float32 in [-1, 1]; absent where `latent` stands
    latent: Tensor  # (B, 2, C, h, w) float16: posterior mean and standard deviation, unscaled
    caption: list[str]  # "" is the unconditional caption
    negative: list[str]  # in drawing: what a text's null condition says instead of nothing
    # Of each frozen text encoder whose output is stored, under its NAME (`stage/latents.py`):
    # text_states/NAME: (B, L, D) float16, what it made of the captions
    # text_mask/NAME: (B, L) bool, which of them are no padding
    # text_pooled/NAME: (B, D) float16, where it has one
    key: list[str]  # "shard/key", for people
    attributes: list[dict[str, Any] | None]  # the sample's .json member
    sample_id: Tensor  # (B,) int64, the sample's stable number in the index
    epoch: Tensor  # (B,) int64, how often the sample's source was gone through before
    place: Tensor  # (B,) int64, where in the run's order of all samples it stands; in training only
    original_size: Tensor  # (B, 2) int64, height and width of the file's picture, upright; with `image` only
    crop_top_left: Tensor  # (B, 2) int64, where the crop stands in the picture when scaled to cover its target
    target_size: Tensor  # (B, 2) int64, height and width of `image`
    cursor: dict[str, Any]  # the plan's state once the optimizer step that this micro-batch belongs to is done
    last_micro_of_step: bool
    # What a stage adds for its conditioner, see `stage/generation.py`:
    image_size: tuple[int, int]  # height and width, in pixels
    latent_size: tuple[int, int]  # the same of the latents
    encode: Callable[[Tensor], Tensor]  # pictures (B, 3, H, W) -> whitened latents (B, C, h, w), without a gradient


class Conditioning(TypedDict, total=False):
    """What the denoiser is told beside x_t and t. Every key is optional; a denoiser refuses keys it has no seat for."""

    context: Tensor  # (B, L, D) for cross-attention
    context_mask: Tensor  # (B, L) bool, True = attend
    pooled: Tensor  # (B, D) added to the timestep embedding
    class_labels: Tensor  # (B,) int64 or (B, D)
    sizes: Tensor  # (B, 6) original height and width, crop top and left, target height and width, in pixels (SDXL)
    concat: Tensor  # (B, C, h, w) joined to x_t along the channels: mask, masked picture, low-resolution picture


class PathPoint(NamedTuple):
    """alpha, sigma and their time derivatives at t: x_t = alpha x0 + sigma noise. Each broadcasts against x_t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, before any whitening."""

    mean: Tensor  # (B, C, h, w)
    std: Tensor  # (B, C, h, w)


class NoisePath(Protocol):
    """A noise path on t in [0, 1], data at 0 and noise at 1."""

    def __call__(self, t: Tensor) -> PathPoint: ...
    def network_time(self, t: Tensor) -> Tensor: ...
    def input_scale(self, t: Tensor) -> Tensor: ...  # what x_t is multiplied by before the network sees it
    def time_of(self, ratio: Tensor) -> Tensor: ...  # the t at which sigma / alpha is this


class Denoiser(Protocol):
    """A raw network: x_t (B, C, h, w), time as the network counts it (B,), conditioning -> prediction (B, C', h, w)."""

    def __call__(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor: ...


class Objective(Protocol):
    """Stage 2's objective: what is minimised, and what the network's output means; samplers read `to_x0` from it."""

    path: NoisePath

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, draw: Draw) -> dict[str, Tensor]: ...
    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor: ...


class FirstStage(Protocol):
    """Pixels <-> latents. `whiten` and `unwhiten` use the measured statistics, which are values, not buffers."""

    latent_channels: int
    down_factor: int

    def encode(self, image: Tensor) -> Posterior: ...
    def decode(self, latent: Tensor) -> Tensor: ...
    def whiten(self, latent: Tensor) -> Tensor: ...
    def unwhiten(self, latent: Tensor) -> Tensor: ...


class Input(NamedTuple):
    """Something of a batch that a conditioner reads, and that whoever draws pictures therefore says."""

    kind: Literal["text", "label", "picture", "mask", "size", "place"]
    at: Literal["image_size", "latent_size"] = "image_size"  # of a picture: what size it is wanted at
    is_needed: bool = True


class Conditioner(Protocol):
    """Batch -> Conditioning. It owns its dropout (a draw is given in training only) and its null condition."""

    inputs: Mapping[str, Input]  # by their keys in the batch

    def __call__(self, batch: Batch, draw: Draw | None = None) -> Conditioning: ...
    def unconditional(self, batch: Batch) -> Conditioning: ...


class Sampler(Protocol):
    """Integrates from noise to data with `denoise(x_t, t) -> x0`; t is a float in [0, 1]."""

    def __call__(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, path: NoisePath, draw: Draw | None = None
    ) -> Tensor: ...


class Tracker(Protocol):
    """Where numbers and pictures go. Only rank 0 holds one that writes."""

    def log(self, row: Mapping[str, Any]) -> None: ...
    # `path` is of the grid; `pictures` are its uint8 (H, W, 3), one a caption
    def image(
        self, name: str, path: Path, step: int, captions: Sequence[str] = (), pictures: Sequence[Any] = ()
    ) -> None: ...
    def finish(self, summary: Mapping[str, Any]) -> None: ...


class Preview(NamedTuple):
    """Pictures to look at: uint8 (N, H, W, 3) on the CPU, a caption each (or none), and how many stand in a row."""

    images: Any  # numpy uint8 (N, H, W, 3)
    captions: list[str]
    columns: int


@dataclass
class Context:
    """Where a stage runs. `run.py` makes it; a stage carries it as `.context`; callbacks read it from there."""

    stage: str  # "autoencoder" | "diffusion" | "recognition"
    run_directory: Path  # DIR
    directory: Path  # DIR/<stage>
    tracker: Tracker
    seed: int
    global_batch_size: int
    max_steps: int
    stage_index: int = 1  # 1-based, for "stage 1 of 2"
    num_stages: int = 1
    config_hash: str = ""
    data_fingerprint: str = ""
