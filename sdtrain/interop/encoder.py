"""A finished first stage from its folder alone, for tools that encode: a run's, or diffusers'."""

from __future__ import annotations

from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.manifest import Manifest
from sdtrain.first_stage.vq import VQModel
from sdtrain.interop.folder import read_config
from sdtrain.interop.weights import find, load_first_stage


def load_encoder(place: str, option: str) -> tuple[nn.Module, int | None]:
    """The autoencoder, frozen, and the size of the pictures it was trained on, if told.

    Args:
        place: a run's directory or its stage's, or a diffusers folder with an autoencoder.
        option: what the place was given as.

    Raises:
        ConfigError: where there is none.
    """
    file = find(place, option, ("autoencoder/vae", "vae", "vqvae"))
    try:
        config = read_config(file.parent / "config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {file.parent / 'config.json'} cannot be read: {error}") from error
    kinds, name = {kind.diffusers_class: kind for kind in (AutoencoderKL, VQModel)}, config.get("_class_name")
    if name not in kinds:
        raise ConfigError(f"{option}: {file.parent} is of a {name}, not of {' or '.join(kinds)}")
    # A scale that is null is the manifest's to say; what is encoded here is not scaled.
    network = kinds[name].from_diffusers({k: v for k, v in config.items() if (k, v) != ("scaling_factor", None)})
    manifest = load_first_stage(network, str(file.parent))
    return network.eval().requires_grad_(False), None if manifest is None else Manifest.load(manifest).image_size
