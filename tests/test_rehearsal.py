"""What stage 2 would refuse when it begins is refused before stage 1, in one line; what trains is not refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.build import build
from sdtrain.callback.log import COLUMNS
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.interop.folder import network_config, write_json
from sdtrain.model.unet import UNet
from sdtrain.plan.rehearsal import check_sizes, rehearse
from sdtrain.run import build_once
from sdtrain.stage import latents
from sdtrain.stage.diffusion import DiffusionStage

# The colour behind the shapes as a class.
GROUND = (
    "conditioner=label conditioner.key=ground conditioner.num_class_embeds=9"
    " conditioner.names=[white,black,gray,navy,beige,mint,sky,teal]"
)

# (what was typed, what the line must contain)
REFUSED = [
    (f"{GROUND} model.class_embed_type=identity", "no seat for the condition class_labels"),
    (
        "conditioner=inpainting diffusion.cache_latents=false",
        "model: in_channels is 4, but x_t with what joins it has 9",
    ),
    ("conditioner=inpainting", "the batch has no 'image'; set diffusion.cache_latents=false"),
    ("model.cross_attention_dim=77", "stage 2's parts do not fit each other at 64 pixels"),
    ("objective=epsilon_learned_variance", "model.out_channels=4 must be 8"),
    ("sampler=ddpm sampler.variance=learned", "needs a run with objective.learned_variance=true"),
    ("sampler.guidance.image_scale=1.5", "sampler.guidance.image_scale needs a picture"),
    ("objective=epsilon sampler.spacing=trailing sampler.num_steps=3000", "sampler.num_steps=3000 with spacing=trail"),
    ("+diffusion.optim.lr_scale.texts=2", "optim.lr_scale names texts; this stage trains model, conditioner"),
    ("conditioner=clip conditioner.pretrained=nowhere", "conditioner.pretrained=nowhere: no such folder"),
    (
        "+objective@diffusion.decoded=decoded_perceptual diffusion.decoded.perceptual.weights=nowhere.pth",
        "diffusion.decoded.perceptual: no file nowhere.pth",
    ),
    (
        "diffusion.callback.alert.key=losss",
        "diffusion.callback.alert.key=losss is not in the stage's rows; there are loss",
    ),
    ("diffusion.callback.alert.key=decoded", "alert.key=decoded is not in the stage's rows; there are loss"),
    (
        "conditioner=label conditioner.key=kind conditioner.num_class_embeds=3 conditioner.names=[a,b]"
        " +model.num_class_embeds=3",
        "'kind' in its .json is None, not a name of conditioner.names",
    ),
    (f"{GROUND} +model.num_class_embeds=9".replace(",mint", ",mnt"), "is 'mint', not a name of conditioner.names"),
    (
        "metric@diffusion.metric=diffusion_words",
        "diffusion.metric.caption_match: it reads 0% of the data's own pictures right, so it is for others; write",
    ),
    ("data=words data.num_train=16", "diffusion.metric.caption_match: it reads 0% of the data's own pictures right"),
    ("conditioner=editing model.in_channels=8 diffusion.cache_latents=false", "no sample of train has a source"),
]
# The same of the shards that `shapes` holds, with words of the config that only anybody's shards have.
REFUSED_OF_SHARDS = [
    ("data.reader.caption.fields={json.text:1.0}", "none of 61 samples has a caption in json.text"),
    (
        "data=bucket data.buckets.step=4 data.buckets.max_ratio=1.3 model=mmdit_tiny model.pos_embed_max_size=12",
        "is not cut evenly by patch_size 2",
    ),
    (
        "data=bucket data.buckets.step=16 data.buckets.max_ratio=4 model=mmdit_tiny model.pos_embed_max_size=12",
        "raise pos_embed_max_size",
    ),
    ("data.max_samples=0", "data: no sample is left to train on"),
]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Overrides of the smoke run over few pictures, written once."""
    root = tmp_path_factory.mktemp("shapes")
    return ["+experiment=smoke", f"data.root={root}", "data.num_train=64", "data.num_val=16", "data.num_held_out=8"]


@pytest.fixture(scope="module")
def shards(smoke):
    """The same over their shards, read as anybody's."""
    data = build(load_config(smoke).data)
    data.prepare_data()
    return [
        "+experiment=smoke",
        "data=webdataset",
        f"data.shards={data.folder}/train-*.tar",
        "diffusion.cache_latents=false",
    ]


@pytest.mark.parametrize(("typed", "expected"), REFUSED)
def test_what_stage_2_would_refuse_is_refused_before_stage_1(typed, expected, smoke):
    with pytest.raises(ConfigError) as caught:
        rehearse(load_config([*smoke, *typed.split()]))
    assert expected in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(("typed", "expected"), REFUSED_OF_SHARDS)
def test_what_its_data_refuse_is_refused_before_stage_1(typed, expected, shards):
    with pytest.raises(ConfigError) as caught:
        rehearse(load_config([*shards, *typed.split()]))
    assert expected in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "diffusion.cache_latents=false conditioner=none",
        "+objective@diffusion.decoded=decoded_perceptual",  # its network is made by the run, before stage 1
        f"{GROUND} +model.num_class_embeds=9",
        "diffusion.callback.alert.key=step_seconds",
        "data=words data.num_train=16 metric@diffusion.metric=diffusion_words",
        "diffusion.callback.alert.key=grad_norm/model",
        "objective=epsilon_learned_variance model.out_channels=8 sampler=ddpm sampler.variance=learned"
        " sampler.num_steps=3",
    ],
)
def test_what_trains_is_let_through_without_a_word(typed, capsys, smoke):
    state = torch.get_rng_state()
    rehearse(load_config([*smoke, *typed.split()]))
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("failure", [lambda x: x.sum().item(), lambda x: {}["numbers"]])
def test_a_part_that_does_not_run_without_numbers_is_no_reason_not_to_train(failure, capsys, monkeypatch, smoke):
    monkeypatch.setattr(UNet, "forward", lambda self, x, time, cond: failure(x))
    rehearse(load_config(smoke))
    assert "its parts were not tried together before stage 1" in capsys.readouterr().out


def test_a_stage_that_asks_its_trainer_is_no_reason_not_to_train(capsys, monkeypatch, smoke):
    monkeypatch.setattr(DiffusionStage, "training_step", lambda self, batch, number: self.trainer.global_step)
    rehearse(load_config(smoke))
    assert "its parts were not tried together before stage 1" in capsys.readouterr().out


def test_latents_that_memory_does_not_hold_are_refused_before_they_are_made(smoke, monkeypatch):
    one = 4 * 4 * 16**2
    monkeypatch.setattr(latents, "_MOST_BYTES", 64 * one)
    rehearse(load_config(smoke))
    monkeypatch.setattr(latents, "_MOST_BYTES", 64 * one - 1)
    with pytest.raises(ConfigError, match="diffusion.cache_latents: the latents of 64 pictures take 0 GiB of memory"):
        rehearse(load_config(smoke))
    rehearse(load_config([*smoke, "diffusion.cache_latents=false"]))


@pytest.mark.parametrize("change", ["", "missing", "shape", "config"])
def test_weights_to_start_from_fit_before_stage_1(change, smoke, tmp_path):
    node = load_config(smoke).model
    model = build(node)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if change == "missing":
        del state["conv_in.bias"]
    if change == "shape":
        state["conv_in.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    heads = {"attention_head_dim": [4, 4]} if change == "config" else {}
    write_json(tmp_path / "config.json", network_config(model, node) | heads)
    cfg = load_config([*smoke, f"model.weights={tmp_path}"])
    if not change:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return rehearse(cfg)
    with pytest.raises(ConfigError, match="model.weights: .*(conv_in|attention_head_dim)"):
        rehearse(cfg)
    return None


@pytest.mark.parametrize(
    ("typed", "stage", "expected"),
    [
        ("data.image_size=62", "autoencoder", "data: a side of 62 pixels is no multiple of 4"),
        (
            "data=bucket data.image_size=96 data.buckets.step=6",
            "diffusion",
            "data: a side of 66 pixels is no multiple of 4, the pixels that a latent stands for; make data.image",
        ),
        ("data.image_size=64", "diffusion", ""),
    ],
)
def test_pictures_are_whole_latents(typed, stage, expected, shards):
    cfg = load_config([*shards, *typed.split()])
    if not expected:
        return check_sizes(cfg, stage)
    with pytest.raises(ConfigError) as caught:
        check_sizes(cfg, stage)
    assert str(caught.value).startswith(expected)
    with pytest.raises(ConfigError, match="is no multiple of 4"):
        build_once(cfg, [stage])
    return None


def test_a_stage_that_has_trained_is_not_rehearsed_again(smoke, tmp_path, monkeypatch):
    cfg, rehearsed = load_config([*smoke, f"output_dir={tmp_path}"]), []
    monkeypatch.setattr("sdtrain.run.rehearse", rehearsed.append)
    build_once(cfg, ["diffusion"])
    assert rehearsed == [cfg]
    (tmp_path / "diffusion" / "checkpoints").mkdir(parents=True)
    build_once(cfg, ["diffusion"])
    assert rehearsed == [cfg]


def test_a_strategy_that_is_not_installed_is_refused_before_stage_1(smoke, tmp_path, monkeypatch):
    stage_2 = ["+strategy@diffusion.strategy=deepspeed_zero3", "optim@diffusion.optim=adamw"]
    cfg = load_config([*smoke, f"output_dir={tmp_path}", *stage_2])
    monkeypatch.setattr("sdtrain.strategy.deepspeed.find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(ConfigError, match="the package deepspeed is not installed"):
        build_once(cfg, ["autoencoder", "diffusion"])


def test_what_a_row_says_is_what_an_alert_may_watch(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row.get("stage") == "diffusion" and "loss" in row)
    place = {"time", "run", "stage", "step", "images", "loss"}
    assert {name for name in row if "/" not in name} - place <= COLUMNS
