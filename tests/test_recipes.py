"""The full-size recipes: each composes, says what it is for and for how long, names what it lacks, and hands on."""

import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.build import build
from sdtrain.checkpoint.commit import newest_valid
from sdtrain.config import load_config
from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError
from sdtrain.interop.weights import read_checkpoint
from sdtrain.plan.estimate import NOWHERE, estimate, images_at_once, load
from sdtrain.plan.report import CARDS

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "experiment"
DENOISERS = ["sd15_256", "sd15_512", "sd21_v", "sdxl", "sd3_medium", "sd35_large"]
AUTOENCODERS = ["kl_f8", "kl_f8_16ch", "vq_f4"]
RECIPES = [*DENOISERS, *AUTOENCODERS, "small_256"]
FILES = [f"data.shards='{NOWHERE}'", f"first_stage.weights='{NOWHERE}'"]


def header(name):
    """The comment at the top, whose lines that end with a backslash go on in the next."""
    lines = (CONFIGS / f"{name}.yaml").read_text().partition("defaults:")[0].splitlines()[1:]
    return re.sub(r"\\\n\s*", "", "\n".join(line.removeprefix("#") for line in lines))


def commands(name):
    return [shlex.split(line)[3:] for line in header(name).splitlines() if "python -m sdtrain" in line]


def check(name, cfg):
    """Mixed precision, pictures of the user's, the stages of its kind, and a batch that its cards divide."""
    assert (cfg.precision, cfg.data.shards) == ("bf16-mixed", NOWHERE)
    kinds = {"diffusion": [*DENOISERS, "small_256"], "autoencoder": [*AUTOENCODERS, "small_256"]}
    assert set(cfg.stages) == {stage for stage, names in kinds.items() if name in names}
    for stage in cfg.stages:
        portions = cfg[stage].trainer.num_accumulate * cfg.devices * cfg.num_nodes
        assert images_at_once(cfg, stage) * portions == cfg[stage].trainer.batch_size


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_of_a_header_composes(name):
    found = commands(name)
    assert f"+experiment={name}" in [argument for arguments in found for argument in arguments]
    directories = []
    for arguments in found:
        cfg = load(arguments)
        directories.append(cfg.output_dir)
        check(name, cfg)
        if started := [argument.partition("=")[2] for argument in arguments if argument.startswith("model.weights=")]:
            before = {"sd35_large": ["outputs/sd35_512"]}.get(name, directories[:-1])  # its header gives the last alone
            assert started[0] in before
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize("name", ["sd15_256", "kl_f8", "small_256"])
def test_without_shards_one_line_names_them(name):
    with pytest.raises(ConfigError, match=r"^data\.shards has no value; set it with data\.shards=\.\.\.") as caught:
        load_config([f"+experiment={name}"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["sd15_512", "sd35_large"])
def test_without_a_first_stage_one_line_names_it(name):
    with pytest.raises(ConfigError, match=r"needs a first stage.*set first_stage\.weights=") as caught:
        load_config([f"+experiment={name}", FILES[0]])
    assert "\n" not in str(caught.value)
    load_config([f"+experiment={name}", *FILES])


@pytest.mark.parametrize("name", ["sd15_256", "sd21_v", "sdxl", "sd3_medium"])
def test_without_its_text_encoder_one_line_names_it(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"pretrained=\S+: no such folder with a config\.json") as caught:
        build(load_config([f"+experiment={name}", *FILES]).conditioner)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["kl_f8", "vq_f4"])
def test_without_lpips_files_one_line_names_them(name):
    with pytest.raises(ConfigError, match=r"no file weights/vgg16-397923af\.pth; LPIPS wants"):
        build(load_config([f"+experiment={name}", FILES[0]]).autoencoder.objective)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_hours_of_a_header_are_the_computed_ones(name):
    """And the cards it names are those that it is configured for and fits; but for one that says it fits none."""
    count, card_name, *hours = re.search(
        r"(\d+) x (\w+(?: \d+)?): ([\d.]+)(?: and ([\d.]+))? hours", header(name)
    ).groups()
    cfg, (card,) = load([f"+experiment={name}"]), [card for card in CARDS if card.name == card_name]
    assert int(count) == cfg.devices * cfg.num_nodes
    for stage, said in zip(cfg.stages, [float(text) for text in hours if text], strict=True):
        found = estimate(cfg, stage)
        assert card.hours(cfg, stage, found) == pytest.approx(said, rel=0.01)
        fits = card.most_images(found, found.is_checkpointed) >= images_at_once(cfg, stage)
        assert fits != ("fits no device" in header(name))
        if name == "small_256":
            assert CARDS[0].most_images(found, found.is_checkpointed) >= images_at_once(cfg, stage)


TINY = """
accelerator=cpu precision=32-true tracker=none devices=1 num_nodes=1 data.image_size=16 data.num_workers=0
first_stage=identity conditioner=none model=unet_tiny sampler.num_steps=1
model.block_out_channels=[8,16] model.attention_head_dim=[1,1] model.norm_num_groups=4
diffusion.trainer.max_steps=2 diffusion.trainer.batch_size=4 diffusion.optim.warmup_steps=0
diffusion.callback.samples=null diffusion.callback.evaluate=null
""".split()


def picture(number):
    """A sample of a picture with a caption."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 10 * number, np.uint8)).save(buffer, "PNG")
    return {"__key__": f"{number:06d}", "png": buffer.getvalue(), "txt": f"picture {number}".encode()}


def test_the_second_leg_starts_from_the_averaged_weights_of_the_first(train, tmp_path):
    """Both legs as small as they go; the second one's learning rate is 0, so that it ends as it starts."""
    write_shards([picture(n) for n in range(16)], tmp_path / "shards" / "x-%06d.tar", 100)
    shards = f"data.shards='{tmp_path}/shards/*.tar'"
    first = train(tmp_path / "a", "diffusion.optim.lr=0.05", base=["+experiment=sd15_256", *TINY, shards], blind=False)
    on = ["data.image_size=32", f"model.weights='{first}'", "diffusion.optim.lr=0.0"]
    second = train(tmp_path / "b", *on, base=["+experiment=sd15_512", *TINY, shards], blind=False)
    given, raw = (
        read_checkpoint(newest_valid(first / "diffusion/checkpoints")[0], averaged) for averaged in (True, False)
    )
    taken = read_checkpoint(newest_valid(second / "diffusion/checkpoints")[0], averaged=False)
    assert taken.keys() == given.keys()
    assert all(torch.equal(taken[name], given[name]) for name in given)
    assert any(not torch.equal(raw[name], given[name]) for name in given)
