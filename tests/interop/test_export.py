"""What is exported draws what the run draws, comes back as it was, and is refused where it cannot be said."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtrain.diffusion.guidance import ClassifierFree
from sdtrain.errors import ConfigError
from sdtrain.interop.choice import choose
from sdtrain.interop.export import fold, write
from sdtrain.interop.folder import WEIGHTS, network_config
from sdtrain.interop.verify import verify
from sdtrain.interop.weights import load_first_stage, load_model, own_whitening

PROMPT, NUM_STEPS, GUIDANCE = "a big red star on a white background", 4, 3.0
NOISE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def draw(pipe, x0_of=None, sampler=None, noise=NOISE):
    """Our picture of PROMPT, (1, 3, H, W) in [0, 1]."""
    parts = pipe.generation
    batch = {"caption": [PROMPT]}
    cond, null = parts.conditioner(batch), parts.conditioner.unconditional(batch)
    x0_of = x0_of or parts.objective.x0_of(parts.model)
    latent = (sampler or parts.sampler)(ClassifierFree(GUIDANCE)(x0_of, cond, null), noise, parts.objective.path)
    return parts.first_stage.decode(parts.first_stage.unwhiten(latent)) / 2 + 0.5


@torch.no_grad()
def draw_theirs(folder, parts=None, **more):
    """The picture of diffusers, before it is clipped."""
    import diffusers

    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **(parts or {}))
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPT, "num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "latents": NOISE.clone()}
    latent = pipeline(**given, output_type="latent", **more).images
    vae = pipeline.vae
    latent = latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return vae.decode(latent).sample / 2 + 0.5, pipeline


def require_same_networks(pipe, loaded, folder, *overrides, **more):
    """Read back into a run of the same config: the denoiser bit for bit, the autoencoder as it was folded."""
    other = loaded(*overrides, seed=9, **more)
    load_model(other.generation.model, str(folder), other.cfg.model)
    ours, theirs = (p.generation.model.state_dict() for p in (pipe, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    vae = other.generation.first_stage
    assert load_first_stage(vae, str(folder), other.cfg.first_stage) is None
    own = pipe.generation.first_stage
    folded = fold(own, choose(pipe.generation, network_config(pipe.generation.model, pipe.cfg.model)).pipeline)
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in folded.state.items())
    own_whitening(vae, str(folder), 64).apply(vae)
    image, scale = torch.rand(1, 3, 32, 32) * 2 - 1, torch.tensor(own.scale)[None, :, None, None]
    mean, std = own.encode(image)
    (new_mean, new_std), new_scale = vae.encode(image), torch.tensor(vae.scale)[None, :, None, None]
    torch.testing.assert_close(vae.whiten(new_mean), own.whiten(mean), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new_std * new_scale, std * scale, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", ["v", "epsilon"])
def test_stable_diffusion_draws_our_picture(loaded, tmp_path, objective):
    pipe = loaded(f"objective={objective}")
    assert write(pipe, loaded(f"objective={objective}", seed=5), tmp_path / "out") == []
    picture, pipeline = draw_theirs(tmp_path / "out")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64
    ours = draw(pipe)
    assert ours.std() > 0.05
    torch.testing.assert_close(picture, ours, atol=1e-3, rtol=0)
    assert (draw_theirs(tmp_path / "out", negative_prompt=PROMPT)[0] - ours).abs().max() > 1e-2, "no word is heard"
    require_same_networks(pipe, loaded, tmp_path / "out", f"objective={objective}")
    raw = type(pipeline).from_pretrained(tmp_path / "out", variant="non_ema")
    own = loaded(seed=5).generation
    assert torch.equal(raw.unet.conv_in.weight, own.model.conv_in.weight)
    assert torch.equal(
        raw.text_encoder.get_input_embeddings().weight, own.conditioner.encoder.get_input_embeddings().weight
    )
    assert not torch.equal(raw.unet.conv_in.weight, pipeline.unet.conv_in.weight)


def test_a_rectified_flow_of_a_unet(loaded, tmp_path):
    """At the times that diffusers asks at, whose thousandths it cuts before the network is told."""
    overrides = ["objective=rectified_flow", "sampler=euler", "sampler.shift=2"]
    pipe = loaded(*overrides)
    write(pipe, None, tmp_path / "out")
    picture, pipeline = draw_theirs(tmp_path / "out")
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    told, sigmas, parts = pipeline.scheduler.timesteps, pipeline.scheduler.sigmas, pipe.generation
    assert len(told) == NUM_STEPS
    assert (told / 1000 - sigmas[:-1]).abs().max() < 1e-3

    def x0_of(x, t, cond):
        time = told[(sigmas[:-1] - t).abs().argmin()]
        return x - t * parts.model(x, time.expand(len(x)), cond)

    def sampler(denoise, x, path):
        for t, s in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
            x0 = denoise(x, t)
            x = (1 - s) * x0 + s * (x - (1 - t) * x0) / t
        return x

    torch.testing.assert_close(picture, draw(pipe, x0_of, sampler), atol=1e-3, rtol=0)
    require_same_networks(pipe, loaded, tmp_path / "out", *overrides)


@pytest.mark.parametrize("has_t5", [True, False])
def test_an_mmdit_draws_our_picture(loaded, clip_folders, tmp_path, has_t5):
    overrides = [f"conditioner.parts.clip.parts.clip_l.pretrained={clip_folders}/text_encoder"]
    overrides += [] if has_t5 else ["conditioner.parts.t5.pretrained=null", "conditioner.parts.t5.max_tokens=20"]
    if has_t5:
        overrides += ["+model.dual_attention_layers=[0]"]
    pipe = loaded(*overrides, kind="mmdit")
    notes = write(pipe, loaded(*overrides, kind="mmdit", seed=5), tmp_path / "out")
    without = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    assert [note.split(",")[0] for note in notes] == [
        "load it with text_encoder_3=None",
        "call the pipeline with max_sequence_length=20",
    ][: 2 * (not has_t5)]
    more = {} if has_t5 else {"max_sequence_length": 20}
    picture, pipeline = draw_theirs(tmp_path / "out", parts=without, **more)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert (pipeline.text_encoder_3 is not None) == has_t5
    ours = draw(pipe)
    assert ours.std() > 0.05
    torch.testing.assert_close(picture, ours, atol=1e-3, rtol=0)
    require_same_networks(pipe, loaded, tmp_path / "out", *overrides, kind="mmdit")


@pytest.mark.parametrize(
    ("kind", "name", "factor"),
    [
        ("xl", "StableDiffusionXLPipeline", 1.0),
        ("inpainting", "StableDiffusionInpaintPipeline", 1.0),
        ("upscaling", "StableDiffusionUpscalePipeline", 0.08333),
        ("editing", "StableDiffusionInstructPix2PixPipeline", 1.0),
        ("ldm", "LDMPipeline", 1.0),
        ("ldm_codebook", "LDMPipeline", 1.0),
    ],
)
def test_every_pipeline_says_what_our_parts_say(loaded, clip_folders, tmp_path, kind, name, factor):
    """`write` compares text encoders, denoiser and decoder with those of the pipeline itself."""
    overrides = [f"conditioner.parts.clip_l.pretrained={clip_folders}/text_encoder"] if kind == "xl" else []
    pipe = loaded(*overrides, kind=kind)
    write(pipe, None, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == name
    vae = "vqvae" if name == "LDMPipeline" else "vae"
    assert index[vae] == ["diffusers", "VQModel" if kind == "ldm_codebook" else "AutoencoderKL"]
    assert json.loads((tmp_path / "out" / vae / "config.json").read_text())["scaling_factor"] == factor
    other = loaded(*overrides, kind=kind, seed=9)
    load_model(other.generation.model, str(tmp_path / "out"), other.cfg.model)
    for key, tensor in pipe.generation.model.state_dict().items():
        assert torch.equal(other.generation.model.state_dict()[key], tensor), key
    if kind == "upscaling":
        low = json.loads((tmp_path / "out" / "low_res_scheduler" / "scheduler_config.json").read_text())
        assert (low["beta_start"], low["beta_end"], index["max_noise_level"]) == (1e-4, 0.02, 350)
    if kind == "xl":
        assert index["force_zeros_for_empty_prompt"] is True


@pytest.mark.parametrize("overrides", [["conditioner.layer=penultimate_norm"], ["conditioner.pooled_width=16"]])
def test_other_text_encoders(loaded, tmp_path, overrides):
    pipe = loaded(*overrides)
    write(pipe, None, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModel"]
    assert config["num_hidden_layers"] == (1 if "layer" in overrides[0] else 2)
    names = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names), "transformers before 5.6 reads no other names"


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "text",
            ["model.class_embed_type=projection", "model.projection_class_embeddings_input_dim=32"],
            "StableDiffusionPipeline passes its U-Net no class_labels; this one wants them .class_embed_type=proj",
        ),
        ("pixels", [], "decodes latents; this run's first stage is Identity"),
        ("codebook", [], "decodes with an AutoencoderKL"),
        ("text", ["conditioner.layer=penultimate"], "reads the hidden states last or penultimate_norm"),
        ("text", ["conditioner.masked=true"], "lets its denoiser see padding"),
        ("concat", [], "gives its denoiser text joined to the input"),
        (
            "text",
            ["objective=v", "objective.prediction=velocity"],
            "no scheduler of diffusers knows a prediction of velocity",
        ),
        ("inpainting", ["model.in_channels=10"], "takes 9 input channels, those of latents, mask and masked picture"),
        ("none", [], "LDMPipeline draws with a UNet2DModel"),
        ("text", ["+first_stage.use_post_quant_conv=false"], "has no quant_conv and post_quant_conv to fold that into"),
    ],
)
def test_what_no_pipeline_expresses_is_refused_with_the_reason(loaded, tmp_path, kind, overrides, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        write(loaded(*overrides, kind=kind), None, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [], "half an export is left"


def test_what_was_not_proven_is_not_left_behind(loaded, tmp_path, monkeypatch):
    def fail(*given):
        raise ConfigError("not what was meant")

    monkeypatch.setattr("sdtrain.interop.export.verify", fail)
    with pytest.raises(ConfigError, match="not what was meant"):
        write(loaded(), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    """A folder, and the run that it is of."""
    pipe, out = loaded(), tmp_path_factory.mktemp("exports") / "out"
    write(pipe, None, out)
    return out, pipe


def rename(state):
    state["conv_in.bais"] = state.pop("conv_in.bias")


def drop(state):
    del state[sorted(state)[0]]


def add(state):
    state["extra"] = torch.zeros(1)


def turn(state):
    first = state[sorted(state)[0]]
    first += torch.linspace(0, 1, first.numel()).view_as(first)


@pytest.mark.parametrize(
    ("folder", "harm", "expected"),
    [
        ("unet", rename, "conv_in.bais is .32,. there and None here"),
        ("unet", drop, "conv_in.bias is None there"),
        ("unet", add, "extra is .1,. there and None here"),
        ("unet", turn, "was not written right: conv_in.bias"),
        ("vae", drop, "decoder.conv_in.bias is None there"),
        ("vae", add, "extra is .1,. there and None here"),
        ("vae", turn, "the decoder says something else"),
        ("text_encoder", drop, "CLIPTextModel finds missing keys in .*text_encoder: embeddings.position_embedding"),
        ("text_encoder", add, "CLIPTextModel finds unexpected keys in .*text_encoder: extra"),
        ("text_encoder", turn, "the text encoders of diffusers .context. says something else"),
    ],
)
def test_what_was_written_wrong_is_found(exported, tmp_path, folder, harm, expected):
    out, pipe = exported
    copy = shutil.copytree(out, tmp_path / "copy")
    file = copy / folder / ("model.safetensors" if folder == "text_encoder" else WEIGHTS)
    state = load_file(file)
    harm(state)
    save_file(state, file, metadata={"format": "pt"})
    choice = choose(pipe.generation, network_config(pipe.generation.model, pipe.cfg.model))
    with pytest.raises(ConfigError, match=expected):
        verify(copy, pipe, choice)


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        ("vae", "scaling_factor", 0.5, "the decoder says something else"),
        ("vae", "norm_num_groups", 2, "the decoder says something else"),
        ("unet", "flip_sin_to_cos", False, "the denoiser of diffusers says something else"),
        ("unet", "attention_head_dim", [1, 1], "the denoiser of diffusers says something else"),
        ("text_encoder", "num_attention_heads", 2, "the text encoders of diffusers"),
    ],
)
def test_a_config_that_says_something_else_is_found(exported, tmp_path, file, key, value, expected):
    out, pipe = exported
    copy = shutil.copytree(out, tmp_path / "copy")
    path = copy / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    choice = choose(pipe.generation, network_config(pipe.generation.model, pipe.cfg.model))
    with pytest.raises(ConfigError, match=expected):
        verify(copy, pipe, choice)


def test_missing_diffusers_is_said(exported, monkeypatch):
    out, pipe = exported
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    choice = choose(pipe.generation, network_config(pipe.generation.model, pipe.cfg.model))
    assert "diffusers is not installed" in verify(out, pipe, choice)[0]
