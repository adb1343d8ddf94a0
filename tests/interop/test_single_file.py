"""One file out, and in again: by diffusers and by us."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sdtrain.errors import ConfigError
from sdtrain.interop import single_file
from sdtrain.interop.export import write
from sdtrain.interop.single_file import write_single_file
from sdtrain.interop.weights import load_first_stage, load_model, own_whitening


@pytest.fixture(scope="module")
def made(loaded, tmp_path_factory):
    """The run, its folder, its file, and what was said of it."""
    pipe, place = loaded("objective=v", "first_stage.mid_block_add_attention=true"), tmp_path_factory.mktemp("single")
    write(pipe, None, place / "out")
    return (
        pipe,
        place / "out",
        place / "one.safetensors",
        write_single_file(place / "out", place / "one.safetensors", "a title"),
    )


def test_diffusers_reads_it_with_the_folder_as_its_config(made):
    from diffusers import StableDiffusionPipeline

    _, folder, file, note = made
    assert note.startswith("its sizes are its own: diffusers reads it with config=")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures = []
    for pipeline in (
        StableDiffusionPipeline.from_pretrained(folder),
        StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True),
    ):
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": 2, "latents": latents.clone(), "output_type": "np"}
        pictures.append(pipeline("a big red star", **given).images)
    assert (pictures[0] == pictures[1]).all()


def test_we_read_it_bit_for_bit(made, loaded):
    pipe, folder, file, _ = made
    other = loaded("objective=v", "first_stage.mid_block_add_attention=true", seed=9).generation
    load_model(other.model, str(file))
    assert all(torch.equal(t, other.model.state_dict()[n]) for n, t in pipe.generation.model.state_dict().items())
    assert load_first_stage(other.first_stage, str(file)) is None
    written = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, other.first_stage.state_dict()[name]) for name, tensor in written.items())
    manifest = own_whitening(other.first_stage, str(file), 64)
    assert (manifest.latent_mean, manifest.latent_std) == ([0.0] * 4, [1.0] * 4)


def test_names_shapes_and_what_it_says_of_itself(made):
    _, _, file, _ = made
    state = load_file(file)
    heads = {name.split(".")[0] for name in state}
    assert heads == {"model", "first_stage_model", "cond_stage_model", "v_pred"}
    assert state["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    assert state["v_pred"].numel() == 0
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight" in state
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert said["modelspec.architecture"] == "stable-diffusion-v1"
    assert (said["modelspec.prediction_type"], said["modelspec.resolution"]) == ("v", "64x64")
    assert json.loads(said["sdtrain.vae"]) == {"scaling_factor": 1.0, "shift_factor": 0.0}


def test_two_text_encoders(loaded, clip_folders, tmp_path):
    pipe = loaded(f"conditioner.parts.clip_l.pretrained={clip_folders}/text_encoder", kind="xl")
    write(pipe, None, tmp_path / "out")
    write_single_file(tmp_path / "out", tmp_path / "one.safetensors", "xl")  # which reads it again and compares
    state = load_file(tmp_path / "one.safetensors")
    assert state["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (72, 24)
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias" in state
    assert state["model.diffusion_model.label_emb.0.0.weight"].shape == (128, 72)


@pytest.mark.parametrize("kind", ["ldm", "mmdit"])
def test_what_a_single_file_has_no_names_for_is_refused(loaded, clip_folders, tmp_path, kind):
    overrides = (
        [f"conditioner.parts.clip.parts.clip_l.pretrained={clip_folders}/text_encoder"] if kind == "mmdit" else []
    )
    write(loaded(*overrides, kind=kind), None, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no place in a single file"):
        write_single_file(tmp_path / "out", tmp_path / "one.safetensors", "")
    assert not (tmp_path / "one.safetensors").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_what_was_written_wrong_is_found(made, tmp_path, monkeypatch, part, harm):
    pack = single_file.pack
    prefix = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}[part]

    def spoiled(*given):
        state = pack(*given)
        name = next(name for name in sorted(state) if name.startswith(prefix))
        tensor = state.pop(name)
        return state if harm == "missing" else state | {name: tensor + 1}

    monkeypatch.setattr(single_file, "pack", spoiled)
    with pytest.raises(ConfigError, match=f"one.safetensors was not written right: {part} "):
        write_single_file(made[1], tmp_path / "one.safetensors", "")


def test_a_place_that_cannot_be_written(made, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_single_file(made[1], tmp_path / "taken" / "one.safetensors", "")
