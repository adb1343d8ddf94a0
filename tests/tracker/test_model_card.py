"""The model card of a run's files."""

import json

from sdtrain.tracker.model_card import model_card
from sdtrain.tracker.run_files import RunFiles


def test_it_says_what_was_trained_on_what_and_how_good_it_is(tmp_path):
    config = "name: mine\nmodel:\n  _target_: sdtrain.model.unet.UNet\ndata:\n  num_val: 1000\n"
    config += "diffusion:\n  metric:\n    caption_match:\n      num_captions: 256\n"
    (tmp_path / "config.yaml").write_text(config)
    told = {"parameters": 5256132, "steps": 500, "images": 64000, "caption_match": {"one": {"all": 0.66}}}
    (tmp_path / "summary.json").write_text(json.dumps({"autoencoder": {"psnr": 30.8}, "diffusion": told}))
    (tmp_path / "metrics.jsonl").write_text('{"stage": "diffusion", "step": 1, "loss": 1.0}\n')
    for step, fingerprint in ((5, "old"), (10, "ce9e")):
        checkpoint = tmp_path / "diffusion" / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE.json").write_text(json.dumps({"data_fingerprint": fingerprint}))
    card = model_card(RunFiles.read(tmp_path))
    for fact in ("model.unet.UNet", "5,256,132 parameters, 500 steps, 64,000 images", "66.0 %, 256 captions", "ce9e"):
        assert fact in card
    for fact in ("30.80 dB on 1,000 held-out pictures", "licence", "intended use"):
        assert fact in card
    assert ">old<" not in card


def test_a_run_without_a_summary_or_a_config_has_none_or_a_short_one(tmp_path):
    assert model_card(RunFiles.read(tmp_path)) == ""
    (tmp_path / "summary.json").write_text('{"diffusion": 3}')
    (tmp_path / "config.yaml").write_text("a: [")
    assert "licence" in model_card(RunFiles.read(tmp_path))
