"""Weights that were trained to predict something else are told of, by name."""

import json

import pytest
from omegaconf import OmegaConf

from sdtrain.interop.prediction import other_prediction

VP, FLOW = "sdtrain.diffusion.path.VariancePreserving", "sdtrain.diffusion.path.RectifiedFlow"


def configured(weights, prediction="epsilon", path=VP):
    objective = {"prediction": prediction, "path": {"_target_": path}}
    return OmegaConf.create({"model": {"weights": weights and str(weights)}, "objective": objective})


def test_a_run_of_ours(tmp_path):
    (tmp_path / "diffusion").mkdir()
    OmegaConf.save(configured(None, "v"), tmp_path / "config.yaml")
    assert other_prediction(configured(tmp_path, "v")) == []
    assert other_prediction(configured(tmp_path)) == [
        f"model.weights: {tmp_path} was trained with another objective: prediction is v there, here epsilon; "
        "choose it by objective="
    ]
    (told,) = other_prediction(configured(tmp_path, "v", FLOW))
    assert "path is VariancePreserving there, here RectifiedFlow" in told


@pytest.mark.parametrize(
    ("scheduler", "prediction", "path"),
    [
        ({"_class_name": "PNDMScheduler"}, "epsilon", VP),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v", VP),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "x0", VP),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "velocity", FLOW),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "velocity", FLOW),
    ],
)
def test_a_diffusers_folder_and_its_unet(tmp_path, scheduler, prediction, path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for place in (tmp_path, tmp_path / "unet"):
        assert other_prediction(configured(place, prediction, path)) == []
        (told,) = other_prediction(configured(place, "another", path))
        assert f"prediction is {prediction} there, here another" in told


@pytest.mark.parametrize("content", ["[1]", "{", "3"])
def test_nothing_said_is_nothing_told(tmp_path, content):
    assert other_prediction(configured(None)) == other_prediction(configured(tmp_path / "file")) == []
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
    assert other_prediction(configured(tmp_path)) == []
