"""Weights from anywhere: what fits is taken as it is, what does not is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import weight_hash
from sdtrain.interop.folder import WEIGHTS, network_config, write_json
from sdtrain.interop.names import vae_names
from sdtrain.interop.weights import load_first_stage, load_model, own_whitening, save_first_stage


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def pipe(loaded):
    return loaded("first_stage.mid_block_add_attention=true")


@pytest.fixture
def other(loaded):
    """The same networks with other weights."""
    return loaded("first_stage.mid_block_add_attention=true", seed=9)


@pytest.fixture
def folder(pipe, tmp_path):
    """A diffusers folder of both networks, by hand."""
    parts, cfg = pipe.generation, pipe.cfg
    for name, part, config in (
        ("unet", parts.model, network_config(parts.model, cfg.model)),
        ("vae", parts.first_stage, network_config(parts.first_stage, cfg.first_stage, scaling_factor=0.25)),
    ):
        write_json(tmp_path / "folder" / name / "config.json", config)
        state = {key: tensor.contiguous() for key, tensor in part.state_dict().items()}
        save_file(state, tmp_path / "folder" / name / WEIGHTS)
    return tmp_path / "folder"


def edit(path, **values):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v != "absent"}))


@pytest.mark.parametrize("end", ["", "unet", f"unet/{WEIGHTS}"])
def test_a_folder_its_unet_and_its_file(pipe, other, folder, end):
    load_model(other.generation.model, str(folder / end), other.cfg.model)
    assert equal(pipe.generation.model.state_dict(), other.generation.model.state_dict())


def test_a_model_in_several_files(pipe, other, folder):
    state = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    shards = {f"part-{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, folder / "unet" / name)
    index = {"weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    (folder / "unet" / (WEIGHTS + ".index.json")).write_text(json.dumps(index))
    load_model(other.generation.model, str(folder), other.cfg.model)
    assert equal(pipe.generation.model.state_dict(), other.generation.model.state_dict())


@pytest.mark.parametrize(
    ("part", "values", "expected"),
    [
        ("unet", {"attention_head_dim": [2, 2]}, "model.attention_head_dim is .2, 2. there, here .1, 2."),
        ("unet", {"attention_head_dim": "absent"}, "model.attention_head_dim is 8 there, here .1, 2."),
        ("unet", {"norm_eps": 1e-6}, "model.norm_eps is 1e-06 there, here 1e-05"),
        ("unet", {"center_input_sample": True}, "center_input_sample is True there; only False is built here"),
        ("unet", {"atention_head_dim": 3}, "unknown key 'atention_head_dim'; did you mean 'attention_head_dim'"),
        ("vae", {"norm_num_groups": 2}, "first_stage.norm_num_groups is 2 there, here 4"),
        ("vae", {"act_fn": "gelu"}, "act_fn is 'gelu' there"),
    ],
)
def test_a_network_that_is_configured_otherwise_is_refused(other, folder, part, values, expected):
    """None of these shows in a shape."""
    edit(folder / part / "config.json", **values)
    load, name = {"unet": (load_model, "model"), "vae": (load_first_stage, "first_stage")}[part]
    with pytest.raises(ConfigError, match=expected) as caught:
        load(getattr(other.generation, name), str(folder), other.cfg[name])
    assert "\n" not in str(caught.value)


def test_one_number_is_a_list_of_it_and_training_is_free(other, folder):
    edit(folder / "unet" / "config.json", layers_per_block=[1, 1], dropout=0.3, sample_size=99)
    load_model(other.generation.model, str(folder), other.cfg.model)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda state: state.pop("conv_out.bias"), "conv_out.bias is None there and .4,. here"),
        (lambda state: state.update(extra=torch.zeros(2)), "extra is .2,. there and None here"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(5)}), "conv_in.bias is .5,. there and .32,. here"),
    ],
)
def test_the_first_name_that_does_not_fit_is_told(other, folder, harm, expected):
    state = load_file(folder / "unet" / WEIGHTS)
    harm(state)
    save_file(state, folder / "unet" / WEIGHTS)
    with pytest.raises(ConfigError, match=f"model.weights: .* does not fit the configured part: {expected}"):
        load_model(other.generation.model, str(folder), other.cfg.model)


def test_what_is_no_model_is_told(other, folder, tmp_path):
    for harm, expected in [
        (lambda: (folder / "unet" / WEIGHTS).write_bytes(b"x" * 99), "is no safetensors file"),
        (lambda: (folder / "unet" / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda: shutil.rmtree(folder / "unet"), f"holds no {WEIGHTS}, neither itself nor in unet, transformer"),
        (lambda: shutil.rmtree(folder), "model.weights: no file or folder"),
    ]:
        harm()
        with pytest.raises(ConfigError, match=expected):
            load_model(other.generation.model, str(folder), other.cfg.model)


def legacy(state):
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        state = {name.replace(f"attentions.0.{new}", f"attentions.0.{old}"): t for name, t in state.items()}
    return state


def alone(state):
    """As sd-vae-ft-mse was first given out: latent-diffusion's names without a prefix, 1x1 convolutions."""
    names = vae_names(state)
    return {names[n]: t[:, :, None, None] if ".attn_1." in names[n] and t.dim() == 2 else t for n, t in state.items()}


def whole(state):
    named = {f"first_stage_model.{name}": tensor for name, tensor in alone(state).items()}
    return named | {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(1)}


@pytest.mark.parametrize("layout", [legacy, alone, whole])
def test_a_vae_of_any_age(pipe, other, tmp_path, layout):
    file, vae = tmp_path / "vae.safetensors", other.generation.first_stage
    written = layout(pipe.generation.first_stage.state_dict())
    assert not equal(written, pipe.generation.first_stage.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, file)
    assert load_first_stage(vae, str(file), other.cfg.first_stage) is None
    assert equal(pipe.generation.first_stage.state_dict(), vae.state_dict())
    manifest = own_whitening(vae, str(file), 64)
    assert manifest is None if layout is not whole else manifest.latent_std == [1 / 0.18215] * 4


@pytest.mark.parametrize(
    ("names", "scale", "shift"),
    [
        (["input_blocks.0.0.bias"], 0.18215, 0.0),
        (["input_blocks.0.0.bias", "label_emb.0.0.weight"], 0.13025, 0.0),  # SDXL, also without its text encoders
        (["input_blocks.0.0.bias", "label_emb.weight"], 0.08333, 0.0),  # the upscaler
        (["joint_blocks.0.x_block.attn.qkv.bias"], 1.5305, 0.0609),  # Stable Diffusion 3
    ],
)
def test_the_scale_of_a_single_file_is_its_familys(other, tmp_path, names, scale, shift):
    file = tmp_path / "model.safetensors"
    save_file({f"model.diffusion_model.{name}": torch.zeros(1) for name in names}, file)
    manifest = own_whitening(other.generation.first_stage, str(file), 64)
    assert (manifest.latent_mean, manifest.latent_std) == ([shift] * 4, [1 / scale] * 4)


def test_a_single_file_of_another_width_is_refused(pipe, loaded, tmp_path):
    written = whole(pipe.generation.first_stage.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, tmp_path / "vae.safetensors")
    wide = loaded("first_stage.mid_block_add_attention=true", "first_stage.block_out_channels=[8,8,16]")
    with pytest.raises(ConfigError, match="does not fit the configured part: decoder.conv_in.bias is .8,. there"):
        load_first_stage(wide.generation.first_stage, str(tmp_path / "vae.safetensors"))


def test_an_imported_vae_keeps_its_scale(other, folder):
    vae, config = other.generation.first_stage, folder / "vae" / "config.json"
    load_first_stage(vae, str(folder), other.cfg.first_stage)

    def whitening():
        manifest = own_whitening(vae, str(folder), 64)
        manifest.apply(vae)  # which checks that it is of these weights
        return vae.shift, vae.scale

    assert whitening() == ([0.0] * 4, [0.25] * 4)
    edit(config, shift_factor=0.5)
    assert whitening() == ([0.5] * 4, [0.25] * 4)
    edit(config, shift_factor=None, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    assert whitening() == ([1.0, 2.0, 3.0, 4.0], [0.25, 0.125, 0.0625, 0.03125])
    edit(config, scaling_factor="absent", latents_mean=None, latents_std=None)
    assert whitening()[1] == pytest.approx([0.18215] * 4), "the default of diffusers, which SD 1's folders rely on"
    edit(config, scaling_factor=None)
    assert own_whitening(vae, str(folder), 64) is None, "unwhitened: to be measured"


def test_stage_one_writes_no_scale_that_it_does_not_know(pipe, other, tmp_path):
    """Its folder is unwhitened: diffusers must not take 0.18215 for it, nor we."""
    save_first_stage(pipe.generation.first_stage, pipe.cfg.first_stage, tmp_path)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["scaling_factor"] is None
    assert (config["_class_name"], config["down_block_types"]) == ("AutoencoderKL", ["DownEncoderBlock2D"] * 3)
    vae = other.generation.first_stage
    assert load_first_stage(vae, str(tmp_path), other.cfg.first_stage) is None
    assert own_whitening(vae, str(tmp_path), 64) is None
    (tmp_path / "manifest.json").write_text("{}")
    for place in (tmp_path, tmp_path / "vae", tmp_path / "vae" / WEIGHTS):
        assert load_first_stage(vae, str(place), other.cfg.first_stage) == tmp_path / "manifest.json"
    assert weight_hash(vae) == weight_hash(pipe.generation.first_stage)


@pytest.mark.slow
def test_a_run_of_ours(finished):
    from omegaconf import OmegaConf

    from sdtrain.build import build

    node = OmegaConf.load(finished / "config.yaml")
    model = build(node.model)
    load_model(model, str(finished), node.model)
    newest = sorted((finished / "diffusion" / "checkpoints").iterdir())[-1]
    averaged = load_file(newest / "ema.safetensors")
    assert all(torch.equal(averaged[f"model.{name}"], tensor) for name, tensor in model.state_dict().items())
    node.model.attention_head_dim = [2, 2]
    with pytest.raises(ConfigError, match="is of another network: model.attention_head_dim is .1, 1. there"):
        load_model(build(node.model), str(finished), node.model)
