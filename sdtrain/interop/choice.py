"""Which diffusers pipeline a run is, or why none expresses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdtrain.conditioner.broadcast import Broadcast
from sdtrain.conditioner.composite import Composite
from sdtrain.conditioner.image import LowResolution, MaskedImage, SourceImage
from sdtrain.conditioner.label import Label
from sdtrain.conditioner.t5 import T5
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.vq import VQModel
from sdtrain.model.mmdit import MMDiT
from sdtrain.stage.generation import Generation

SD, XL, SD3 = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"
INPAINT, UPSCALE = "StableDiffusionInpaintPipeline", "StableDiffusionUpscalePipeline"
EDIT, LDM = "StableDiffusionInstructPix2PixPipeline", "LDMPipeline"
_T5S = {SD3: [False, False, True], XL: [False, False], LDM: []}  # which of its text encoders is a T5
_PICTURES = {MaskedImage: INPAINT, LowResolution: UPSCALE, SourceImage: EDIT}


@dataclass(frozen=True)
class Choice:
    """A pipeline and the conditioners that it has a component for."""

    pipeline: str
    texts: tuple[TextEncoder, ...]
    low_resolution: LowResolution | None = None

    @property
    def denoiser(self) -> str:
        """The component that the denoiser is."""
        return "transformer" if self.pipeline == SD3 else "unet"

    @property
    def vae(self) -> str:
        """The component that the first stage is."""
        return "vqvae" if self.pipeline == LDM else "vae"


def choose(generation: Generation, config: Mapping[str, Any]) -> Choice:
    """The pipeline of diffusers that draws as this run does.

    Args:
        config: of its denoiser, as `network_config` gives it.

    Raises:
        ConfigError: where there is none, with the reason.
    """
    parts = list(_flat(generation.conditioner))
    texts = tuple(part for part in parts if isinstance(part, TextEncoder))
    pictures = [part for part in parts if type(part) in _PICTURES]
    low_resolution = next((part for part in pictures if isinstance(part, LowResolution)), None)
    if isinstance(generation.model, MMDiT):
        name = SD3
    elif pictures:
        name = _PICTURES[type(pictures[0])]
    elif config.get("addition_embed_type") == "text_time":
        name = XL
    else:
        name = SD if texts else LDM
    for part in parts:
        if isinstance(part, Label | Broadcast):
            what = "class labels" if isinstance(part, Label) else "text joined to the input"
            raise ConfigError(f"no pipeline of diffusers gives its denoiser {what} (conditioner {type(part).__name__})")
    if len(pictures) > 1 or (pictures and name == SD3):
        raise ConfigError(f"{name} has no place for {' and '.join(type(part).__name__ for part in pictures)}")
    _check_first_stage(name, generation.first_stage)
    if name != SD3:
        _check_unet(name, config)
    _check_texts(name, texts, generation.conditioner)
    return Choice(name, texts, low_resolution)


def _flat(conditioner: nn.Module) -> Sequence[nn.Module]:
    """The conditioners that a composite is made of, in order."""
    if isinstance(conditioner, Composite):
        return [inner for part in conditioner.parts.values() for inner in _flat(part)]
    return [conditioner]


def _check_first_stage(name: str, first_stage: nn.Module) -> None:
    if not isinstance(first_stage, AutoencoderKL | VQModel):
        raise ConfigError(
            f"{name} decodes latents; this run's first stage is {type(first_stage).__name__}, without any"
        )
    if isinstance(first_stage, VQModel) and name != LDM:
        raise ConfigError(
            f"{name} decodes with an AutoencoderKL; it calls VQModel with arguments that this does not take"
        )


def _check_unet(name: str, config: Mapping[str, Any]) -> None:
    labelled = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
    if labelled and name != UPSCALE:
        raise ConfigError(
            f"{name} passes its U-Net no class_labels; this one wants them (class_embed_type="
            f"{config.get('class_embed_type')}, num_class_embeds={config.get('num_class_embeds')})"
        )
    if name == INPAINT and config["in_channels"] != 9:
        raise ConfigError(
            f"{name} takes 9 input channels, those of latents, mask and masked picture; this U-Net has"
            f" {config['in_channels']}"
        )
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if name == LDM and (kinds != {"DownBlock2D", "UpBlock2D"} or config["mid_block_type"] is not None):
        raise ConfigError(
            "LDMPipeline draws with a UNet2DModel, which has DownBlock2D, UpBlock2D and mid_block_type=null, but not "
            f"this U-Net's {', '.join(sorted(kinds - {'DownBlock2D', 'UpBlock2D'})) or config['mid_block_type']}"
        )


def _check_texts(name: str, texts: Sequence[TextEncoder], conditioner: nn.Module) -> None:
    wanted = {SD3: "two CLIP text models joined along their features, and a T5 joined along the tokens"}
    wanted[XL] = "two CLIP text models joined along their features, the second one pooled"
    clips = [text for text in texts if not isinstance(text, T5)]
    if [isinstance(text, T5) for text in texts] != _T5S.get(name, [False]):
        told = ", ".join(type(text).__name__ for text in texts) or "none"
        raise ConfigError(
            f"{name} reads {wanted.get(name, 'one CLIP text model')}; this run's text encoders are {told}"
        )
    layers = ("last", "penultimate_norm") if name not in (XL, SD3) else ("penultimate",)
    for text in clips:
        if text.layer not in layers:
            raise ConfigError(
                f"{name} reads the hidden states {' or '.join(layers)}, this run conditioner.layer={text.layer}"
            )
    for text in texts:
        if text.masked:
            raise ConfigError(f"{name} lets its denoiser see padding; this run masks it (conditioner.masked)")
        if text.empty_caption == "zeros" and name != XL:
            raise ConfigError(f"{name} encodes the empty caption; this run has zeros there (conditioner.empty_caption)")
    if len({text.tokens.max_tokens for text in clips}) > 1:
        raise ConfigError(f"{name} pads for both CLIP text models alike; here they have different max_tokens")
    if len({text.empty_caption for text in texts}) > 1:
        raise ConfigError(f"{name} drops both text encoders alike; here they differ (conditioner.empty_caption)")
    if name in (XL, SD3):
        _check_pooled(name, clips, conditioner)


def _check_pooled(name: str, clips: Sequence[TextEncoder], conditioner: nn.Module) -> None:
    pooled = [text.pooled_width is not None for text in clips]
    if pooled != ([True, True] if name == SD3 else [False, True]):
        raise ConfigError(f"{name} reads a pooled output of {'both' if name == SD3 else 'the second'} CLIP text model")
    if name == SD3 and conditioner.join != "tokens":
        raise ConfigError(f"{name} joins T5's context along the tokens (conditioner.join), this run along the features")
    for text in clips:
        tokenizer = text.tokens.tokenizer
        # transformers then takes the token of the highest number for the end, for the sake of old configurations
        if text.encoder.config.eos_token_id == 2 and tokenizer.eos_token_id < max(tokenizer.get_vocab().values()):
            raise ConfigError(
                f"{name} reads the pooled output where transformers sees the end: with eos_token_id=2 it takes the"
                " token of the highest number for it, which this run's tokenizer has elsewhere"
            )
