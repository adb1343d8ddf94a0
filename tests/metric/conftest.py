"""A detector's folder, with random weights, as transformers saves it."""

import pytest
import torch


@pytest.fixture(scope="session")
def official_detector(tmp_path_factory):
    """(transformers' own Mask2Former, tiny, and its folder)."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    from transformers.models.mask2former import modeling_mask2former

    stages = {"depths": [1] * 4, "num_heads": [1, 1, 2, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, window_size=4, **stages)
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    width |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=swin, **width, num_attention_heads=2, num_queries=5, num_labels=80)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # its loss wants scipy, and no loss is asked for
        patch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
        network = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        network.class_predictor.weight.mul_(300)  # certain of something
    folder = tmp_path_factory.mktemp("detector")
    network.save_pretrained(folder)
    return network, folder
