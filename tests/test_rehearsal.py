"""What stage 2 would refuse when it begins is refused before stage 1, in one line; what trains is not refused."""

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.model.unet import UNet
from sdtrain.plan.rehearsal import rehearse

SMOKE = "+experiment=smoke"

# (what was typed, what the line must contain)
REFUSED = [
    ("conditioner=label model.class_embed_type=identity", "no seat for the condition class_labels"),
    ("conditioner=editing", "model: in_channels is 4, but x_t with what joins it has 8"),
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
]


@pytest.mark.parametrize(("typed", "expected"), REFUSED)
def test_what_stage_2_would_refuse_is_refused_before_stage_1(typed, expected):
    with pytest.raises(ConfigError) as caught:
        rehearse(load_config([SMOKE, *typed.split()]))
    assert expected in str(caught.value).splitlines()[0]


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "diffusion.cache_latents=false conditioner=none",
        "+objective@diffusion.decoded=decoded_perceptual",  # its network is made by the run, before stage 1
        "conditioner=label conditioner.key=kind conditioner.num_class_embeds=3 conditioner.names=[a,b]"
        " +model.num_class_embeds=3",
        "objective=epsilon_learned_variance model.out_channels=8 sampler=ddpm sampler.variance=learned"
        " sampler.num_steps=3",
    ],
)
def test_what_trains_is_let_through_without_a_word(typed, capsys):
    state = torch.get_rng_state()
    rehearse(load_config([SMOKE, *typed.split()]))
    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("failure", [lambda x: x.sum().item(), lambda x: {}["numbers"]])
def test_a_part_that_does_not_run_without_numbers_is_no_reason_not_to_train(failure, capsys, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, x, time, cond: failure(x))
    rehearse(load_config([SMOKE]))
    assert "its parts were not tried together before stage 1" in capsys.readouterr().out
