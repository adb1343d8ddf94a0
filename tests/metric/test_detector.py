"""The detector: transformers' own logits from a folder, and what objects they stand for."""

import json
import shutil

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.detector import MEAN, OBJECTS, STD, Detector, _instances


def test_logits_are_transformers_own(official_detector):
    theirs, folder = official_detector
    detector = Detector(str(folder), side=64)
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = (picture / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels[None])
        classes, masks = detector.network(pixels[None])
    torch.testing.assert_close(classes, wanted.class_queries_logits)
    torch.testing.assert_close(masks, wanted.masks_queries_logits)
    expected = _instances(wanted.class_queries_logits[0], wanted.masks_queries_logits[0], (64, 64))
    found = detector(picture)
    assert found
    assert [one[:3] for one in found] == [one[:3] for one in expected]
    assert (detector.identity["network"], len(detector.identity["sha256"])) == ("mask2former", 64)
    assert not any(p.requires_grad for p in detector.parameters())
    assert detector(torch.zeros(3, 20, 40, dtype=torch.uint8)) is not None  # not a square


def test_an_instance_is_a_class_of_a_query_and_as_certain_as_its_pixels():
    logits = torch.full((3, 81), -20.0)
    logits[0, OBJECTS.index("dog")] = 20.0
    logits[1, [OBJECTS.index("cat"), OBJECTS.index("sheep")]] = 20.0  # half and half
    logits[2, 80] = 20.0  # nothing
    masks = torch.full((3, 8, 8), -4.0)
    masks[0, 2:5, 1:7] = 4.0
    masks[1, 6:, :2] = 0.5
    masks[2] = 4.0
    dog, *halves = _instances(logits, masks, (8, 8))
    assert (dog.name, dog.box, int(dog.mask.sum())) == ("dog", (1, 2, 7, 5), 18)
    assert dog.score == pytest.approx(float(torch.tensor(4.0).sigmoid()), rel=1e-5)
    assert sorted(one.name for one in halves) == ["cat", "sheep"]
    assert [one.box for one in halves] == [(0, 6, 2, 8)] * 2
    assert [one.score for one in halves] == pytest.approx([0.5 * float(torch.tensor(0.5).sigmoid())] * 2, rel=1e-5)
    (doubled, *_) = _instances(logits, masks, (16, 16))
    assert doubled.box == (2, 4, 14, 10)
    logits[:, :80] = -20.0
    assert _instances(logits, masks, (8, 8)) == []
    logits[0, 0], masks[0] = 20.0, -1.0
    assert _instances(logits, masks, (8, 8)) == []  # certain of something that is nowhere


def test_what_is_missing_or_of_other_things_is_named(official_detector, tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*config.json; it wants a folder of .*mask2former-swin-small"):
        Detector(str(tmp_path))
    folder = shutil.copytree(official_detector[1], tmp_path / "other")
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state.pop("class_predictor.bias")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"does not fit \(class_predictor.bias\)"):
        Detector(str(folder))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        Detector(str(folder))
    few = shutil.copytree(official_detector[1], tmp_path / "few")
    config = json.loads((few / "config.json").read_text())
    config |= {"id2label": {"0": "cell"}, "label2id": {"cell": 0}}
    (few / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="it wants a folder|cannot be read"):
        Detector(str(few))


def test_coco_has_80_things():
    assert len(set(OBJECTS)) == 80
    assert (OBJECTS[0], OBJECTS[64], OBJECTS[79]) == ("person", "computer mouse", "toothbrush")
