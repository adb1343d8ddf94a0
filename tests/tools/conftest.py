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


@pytest.fixture
def save_t5(tmp_path):
    """save_t5(name) -> the folder of a small T5 encoder and its tokenizer."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from sdtrain.conditioner.tokenizer import train_tokenizer

    def save(name="t5"):
        torch.manual_seed(2)
        tokenizer = train_tokenizer([f"number {n}" for n in range(50)], 300)
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """Folders of a small CLIP and a small Mask2Former with random weights, as transformers saves them."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, SwinConfig

    from sdtrain.conditioner.tokenizer import LEARNED_IDS, train_tokenizer
    from sdtrain.metric.detector import _network_class

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    tokenizer = train_tokenizer(["a photo of a red bus", "two dogs"] * 9, 300)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **LEARNED_IDS}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    stages = {"depths": [1] * 4, "num_heads": [1, 1, 2, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, window_size=4, **stages)
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    width |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, **width, num_attention_heads=2, num_queries=5, num_labels=80)
    _network_class()(config).save_pretrained(folder / "detector")
    return folder
