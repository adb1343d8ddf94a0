"""What several tools are given."""

import json

import pytest


@pytest.fixture
def first_stage(tmp_path):
    """A folder with a small autoencoder as diffusers saves it."""
    import torch
    from safetensors.torch import save_file

    from sdtrain.first_stage.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "norm_num_groups": 4}
    folder = tmp_path / "first" / "vae"
    folder.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in AutoencoderKL.from_diffusers(config).state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return tmp_path / "first"


@pytest.fixture
def save_clip(tmp_path):
    """save_clip(name, seed) -> the folder of a small CLIP text model and its tokenizer, as transformers saves them."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from sdtrain.conditioner.tokenizer import LEARNED_IDS, train_tokenizer

    def save(name="clip", seed=0):
        torch.manual_seed(seed)
        tokenizer = train_tokenizer([f"number {n}" for n in range(50)], 300)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, **sizes, **LEARNED_IDS)
        CLIPTextModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
