"""LPIPS (Zhang et al. 2018): distance between the features of a recognition network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.layer.vgg import VGG, VGG16

_WHERE = (
    "torchvision's VGG16 file vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth, 528 MB) "
    "and the linear heads that torchmetrics ships (torchmetrics/functional/image/lpips_models/vgg.pth)"
)


def _read(path: str, key: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no file {path}; LPIPS wants {_WHERE}")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as weights: {str(error).partition(chr(10))[0]}") from error


class Perceptual(nn.Module):
    """Mean over positions of the squared distance of unit-normalised features, weighted per channel, summed over
    blocks (equation 1).

    It is frozen: gradients pass through it to the picture, never into it.

    Args:
        widths: of the VGG; VGG16 by default.
        weights: a file with its convolutions; null where a recognition network is trained first and loaded by `load`.
        heads: a file with the learned linear heads; null weighs all channels of a block alike.

    Raises:
        ConfigError: naming a file that is not there, or that does not fit.
    """

    def __init__(
        self, widths: Sequence[Sequence[int]] = VGG16, weights: str | None = None, heads: str | None = None
    ) -> None:
        super().__init__()
        self.vgg = VGG(widths)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.heads = nn.ParameterList([torch.full((1, n, 1, 1), 1.0 / n) for n in self.vgg.num_features])
        self.ready = False
        if weights is not None:
            self.load(weights)
        if heads is not None:
            state = _read(heads, "perceptual.heads")
            found = [state[name] for name in sorted(state) if name.endswith(".weight")]
            if [head.shape for head in found] != [head.shape for head in self.heads]:
                raise ConfigError(f"perceptual.heads: {heads} does not fit: its heads are {[len(h[0]) for h in found]}")
            self.heads = nn.ParameterList(found)
        self.requires_grad_(False)
        self.eval()

    def load(self, weights: str) -> None:
        """Reads the VGG's convolutions from a .safetensors or torch file; other members (classifiers) are left
        alone.
        """
        state = {k: v for k, v in _read(weights, "perceptual.weights").items() if k.startswith("features.")}
        try:
            self.vgg.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(
                f"perceptual.weights: {weights} does not fit: {str(error).splitlines()[1].strip()}"
            ) from error
        self.ready = True

    def features(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> unit-normalised features of each block."""
        taps = self.vgg((image - self.shift) / self.scale)
        return [f.float() * torch.rsqrt(f.float().square().sum(dim=1, keepdim=True) + 1e-10) for f in taps]

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> distance (B,)."""
        if not self.ready:
            raise RuntimeError("the perceptual loss has no weights yet; load() gives them")
        with torch.no_grad():
            expected = self.features(reference)
        total = torch.zeros(image.shape[0], device=image.device)
        for ours, theirs, head in zip(self.features(image), expected, self.heads):
            total = total + ((ours - theirs).square() * head).sum(dim=1).mean(dim=(1, 2))
        return total
