"""CLIP (Radford et al. 2021) from a local folder: features of pictures for CMMD, and how well a caption fits one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.metric.extractor import find_resize, sha256_of

WANTED = (
    "a folder of config.json, model.safetensors and the tokenizer's files, such as "
    "https://huggingface.co/openai/clip-vit-large-patch14-336 (CMMD) or .../clip-vit-base-patch32 (CLIP score)"
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip(nn.Module):
    """Picture embeddings of unit length, and the CLIP score of captions.

    Args:
        weights: a folder as transformers saves it. Nothing is downloaded and no code in it is run.
        resize: by name, see extractor.py; squares are resized whole.

    Raises:
        ConfigError: naming what is missing.
    """

    def __init__(self, weights: str, resize: str = "bicubic_antialiased") -> None:
        super().__init__()
        self.resize = resize
        self._resized = find_resize(resize, "clip.resize")
        folder = Path(weights)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ConfigError(f"clip.weights: no file {folder / name}; it wants {WANTED}")
        from transformers import CLIPModel

        try:
            self.network = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"clip.weights: {folder} cannot be read: {str(error).splitlines()[0]}") from error
        self.folder, self.side = folder, self.network.config.vision_config.image_size
        self.num_features = self.network.config.projection_dim
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.identity = {"network": "clip", "sha256": sha256_of(folder / "model.safetensors")}

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> (B, F) of unit length."""
        x = self._resized(pictures.float(), self.side).clamp(0, 255) / 255
        network = self.network
        pooled = network.vision_model(pixel_values=(x - self.mean) / self.std).pooler_output
        return _unit(network.visual_projection(pooled))

    @torch.no_grad()
    def score(self, pooled: Tensor, captions: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each picture's features with its caption's, (B,) (Hessel et al. 2021, with w = 100)."""
        return 100 * (self.texts(captions) * pooled).sum(dim=1).clamp(min=0)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """(B, F) of unit length, of captions."""
        ids = self._tokenize(captions).to(self.mean.device)
        network = self.network
        text = network.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
        return _unit(network.text_projection(text))

    def _tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        from transformers import AutoTokenizer

        if not hasattr(self, "_tokenizer"):
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        length = self.network.config.text_config.max_position_embeddings
        return self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)
