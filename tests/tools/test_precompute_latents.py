"""The tool that encodes pictures once: alone, killed and started again, on two processes, and in training."""

import importlib.util
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.latent_file import ABOUT, read_about
from sdtrain.data.shard_writer import write_shards

TOOL = Path(__file__).parents[2] / "tools" / "precompute_latents.py"
NUM_SHARDS = 12


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    samples = [
        {"__key__": f"{number:04d}", "png": picture(number), "txt": f"number {number}".encode()}
        for number in range(4 * NUM_SHARDS)
    ]
    return write_shards(samples, tmp_path / "shards" / "x-%04d.tar", 4)[0].parent


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("precompute_latents", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        capsys.readouterr()
        return module.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_latents_are_made_kept_and_verified(tool, first_stage, shards, tmp_path):
    out = tmp_path / "out"
    code, printed, error = tool(first_stage, shards, "--out", out)
    assert (code, printed) == (2, "")
    assert "--size: nothing in" in error
    code, printed, _ = tool(first_stage, shards, "--out", out, "--size", 16, "--flips")
    assert code == 0
    assert printed.startswith("48 samples")
    assert f"data.folder={out} data.image_size=16" in printed
    about = read_about(out)
    assert (about["image_size"], about["has_flips"], len(about["parts"])) == (16, True, NUM_SHARDS)
    before = content(out)
    code, printed, _ = tool(first_stage, shards, "--out", out, "--size", 16, "--flips")
    assert (code, printed) == (0, f"finished before; {NUM_SHARDS} files are what was written\n")
    assert content(out) == before
    (out / "parts" / "000003.bin").write_bytes(b"x")
    code, _, error = tool(first_stage, shards, "--out", out, "--size", 16, "--flips")
    assert code == 1
    assert "000003.bin is damaged" in error
    code, _, error = tool(first_stage, shards, "--out", out, "--size", 32, "--flips")
    assert code == 2
    assert "image_size is 16 there, 32 here" in error


@pytest.mark.parametrize("is_masked", [False, True])
def test_text_embeddings_stand_in_for_the_text_encoder(tool, first_stage, shards, save_clip, tmp_path, is_masked):
    import torch

    from sdtrain.conditioner.clip import CLIP
    from sdtrain.conditioner.composite import Composite
    from sdtrain.data.caption import CaptionRule
    from sdtrain.data.latents import LatentDataModule
    from sdtrain.errors import ConfigError
    from sdtrain.ops.random import Draw
    from sdtrain.stage.latents import use_stored_text

    out, folder = tmp_path / "out", save_clip()
    asked = ["--out", out, "--size", 16]
    assert tool(first_stage, shards, *asked)[0] == 0  # embeddings may be added to latents that are there
    before = content(out)
    asked += ["--text", folder, "--text-tokens", 12, "--text-pooled", *(["--text-masked"] if is_masked else [])]
    code, printed, _ = tool(first_stage, shards, *asked)
    assert code == 0
    assert "48 text embeddings" in printed
    assert {name: data for name, data in content(out).items() if not name.startswith("text/")} == before
    assert tool(first_stage, shards, *asked)[0] == 0

    def conditioner(folder=folder, **options):
        values = {"width": 16, "pooled_width": 16, "masked": is_masked, "max_tokens": 12, "dropout": 0.5} | options
        part = CLIP(str(folder), **values)
        return Composite({"text": part}, width=16, pooled_width=values["pooled_width"])

    data = LatentDataModule(str(out), image_size=16)
    data.connect(3, 8)
    data.setup()
    batch, (name,) = next(iter(data.train_dataloader())), data.text
    lengths = batch[f"text_mask/{name}"].sum(dim=1)
    assert (lengths < 12).all() if is_masked else (lengths == 12).all()
    for part_bytes in (one["num_bytes"] for one in data.text[name]["parts"]):
        assert (part_bytes < 4 * 2 * 13 * 16) == is_masked  # four samples: unpadded where padding is not read
    online, stored = conditioner(), conditioner()
    use_stored_text(stored, data)
    draw = Draw(0, batch["sample_id"], batch["epoch"])
    seen = torch.ones(8, 12) if not is_masked else batch[f"text_mask/{name}"].float()
    for drawn in (None, draw):
        expected, told = online(batch, drawn), stored(batch, drawn)
        assert expected.keys() == told.keys() >= {"context", "pooled"}
        weight = expected.get("context_mask", seen).unsqueeze(-1)  # padding that is masked is not compared
        assert (weight * (expected["context"] - told["context"])).abs().max() < 2e-3
        assert (expected["pooled"] - told["pooled"]).abs().max() < 2e-3
        if is_masked:
            assert torch.equal(expected["context_mask"], told["context_mask"])
    stored.parts["text"].encoder.forward = None  # it is not asked again
    stored(batch)

    wrong = [(conditioner(save_clip("other", 1)), "weight_hash"), (conditioner(max_tokens=11), "max_tokens")]
    wrong += [(conditioner(masked=not is_masked), "masked"), (conditioner(layer="penultimate"), "layer")]
    for other, field in [*wrong, (conditioner(pooled_width=None), "pooled_width")]:
        with pytest.raises(ConfigError, match=f"another text encoder .*: {field} is"):
            use_stored_text(other, data)
    with pytest.raises(ConfigError, match=r"none; set data\.text=false"):
        use_stored_text(conditioner(trained=True), data)
    (out / "text" / name / "parts" / "000001.bin").write_bytes(b"x")
    code, _, error = tool(first_stage, shards, *asked)
    assert code == 1
    assert "000001.bin damaged" in error
    with pytest.raises(ConfigError, match=r"data\.caption: .* set data\.text=false"):
        LatentDataModule(str(out), image_size=16, caption=CaptionRule(prefix="a ")).setup()
    without = LatentDataModule(str(out), image_size=16, caption=CaptionRule(prefix="a "), text=False)
    without.connect(3, 8)
    assert not any(key.startswith("text_") for key in next(iter(without.train_dataloader())))


@pytest.mark.parametrize("is_masked", [False, True])
def test_several_text_encoders_are_read_together(tool, first_stage, shards, save_clip, save_t5, tmp_path, is_masked):
    """As SD 3 has them: two CLIPs and a T5, joined along the tokens; the second CLIP's layer is another."""
    import torch

    from sdtrain.conditioner.clip import CLIP
    from sdtrain.conditioner.composite import Composite
    from sdtrain.conditioner.t5 import T5
    from sdtrain.data.latents import LatentDataModule
    from sdtrain.errors import ConfigError
    from sdtrain.ops.random import Draw
    from sdtrain.stage.latents import use_stored_text

    out, first, second, third = tmp_path / "out", save_clip("one", 1), save_clip("two", 2), save_t5("three")
    asked = [first_stage, shards, "--out", out, "--size", 16, *(["--text-masked"] if is_masked else []), "--text"]
    assert tool(*asked, first, "--text-tokens", 12, "--text-pooled")[0] == 0
    assert tool(*asked, second, "--text-tokens", 12, "--text-pooled", "--text-layer", "penultimate")[0] == 0
    assert tool(*asked, third, "--text-tokens", 14)[0] == 0
    before = content(out)
    assert tool(*asked, third, "--text-tokens", 14)[0] == 0
    assert content(out) == before

    def conditioner(max_tokens=14, **more):
        how = {"masked": is_masked, "dropout": 0.5, "empty_caption": "zeros"}
        clip = how | {"width": 16, "pooled_width": 16, "max_tokens": 12}
        parts = {"one": CLIP(str(first), **clip), "two": CLIP(str(second), layer="penultimate", **clip)}
        parts["three"] = T5(str(third), width=24, max_tokens=max_tokens, **how)
        return Composite(parts | more, width=24, pooled_width=32, join="tokens")

    def module():
        data = LatentDataModule(str(out), image_size=16)
        data.connect(3, 8)
        data.setup()
        return data

    data, online, stored = module(), conditioner(), conditioner()
    use_stored_text(stored, data)
    assert len(data.text) == 3
    batch = next(iter(data.train_dataloader()))
    for drawn in (None, Draw(0, batch["sample_id"], batch["epoch"])):
        expected, told = online(batch, drawn), stored(batch, drawn)
        assert expected.keys() == told.keys()
        seen = expected["context_mask"].unsqueeze(-1) if is_masked else 1
        assert (seen * (expected["context"] - told["context"])).abs().max() < 4e-3
        assert (expected["pooled"] - told["pooled"]).abs().max() < 4e-3
        assert not is_masked or torch.equal(expected["context_mask"], told["context_mask"])
    for part in stored.parts.values():
        part.encoder.forward = None  # none is asked again
        assert part.cut_captions() == (0, 0)  # the tool told it
    assert all(part.cut_captions()[1] > 1 for part in online.parts.values())
    stored(batch)
    with pytest.raises(ConfigError, match="another text encoder .*: max_tokens is 14 there, 9 here"):
        use_stored_text(conditioner(max_tokens=9), module())
    alone, data = Composite({"two": conditioner().parts["two"]}, width=16, pooled_width=16), module()
    use_stored_text(alone, data)
    assert sum(key.startswith("text_states/") for key in next(iter(data.train_dataloader()))) == 1  # no more is read


def test_captions_that_are_cut_are_told(tool, first_stage, shards, save_clip, tmp_path):
    asked = [first_stage, shards, "--out", tmp_path / "out", "--size", 16, "--text", save_clip(), "--text-tokens"]
    assert "48 of 48 captions are longer than --text-tokens 3 and lose their end" in tool(*asked, 3)[1]
    assert "lose their end" not in tool(*asked, 20)[1]


@pytest.mark.slow
def test_a_killed_job_goes_on_on_other_ranks_and_makes_the_same_bytes(tool, first_stage, shards, tmp_path):
    arguments = [first_stage, shards, "--size", 16, "--out"]
    assert tool(*arguments, tmp_path / "whole")[0] == 0
    whole, out = content(tmp_path / "whole"), tmp_path / "out"
    # Held up by a first part that is written slowly: the process is killed between two parts, not before or after all.
    slow = (
        "import runpy, sys, time; from sdtrain.data.latent_file import PartWriter as P; w = P.write\n"
        "P.write = lambda self, part: (time.sleep(0.3), w(self, part))[1]\n"
        f"sys.argv = [{str(TOOL)!r}, *sys.argv[1:]]; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, arguments), out], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while not (out / "parts" / "000002.json").exists() and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list((out / "parts").glob("*.json")))
    assert 3 <= done < NUM_SHARDS
    assert not (out / ABOUT).exists()
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL)]
    subprocess.run([*ranks, *map(str, arguments), out], check=True, timeout=300, capture_output=True)
    assert {name: data for name, data in content(out).items() if "/." not in name} == whole


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(tool, first_stage, shards, tmp_path):
    arguments = [first_stage, shards, "--size", 16, "--out"]
    assert tool(*arguments, tmp_path / "one")[0] == 0
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TOOL)]
    subprocess.run([*ranks, *map(str, arguments), tmp_path / "two"], check=True, timeout=300, capture_output=True)
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_stage_two_trains_on_them(tool, train, small, tmp_path, capsys):
    from sdtrain.errors import ConfigError

    run = train(tmp_path / "run", "stages=[autoencoder]")
    root = next(word for word in small if word.startswith("data.root=")).removeprefix("data.root=")
    shards, out = next(Path(root).glob("shapes-*")), tmp_path / "out"
    assert tool(run, *shards.glob("train-*.tar"), "--out", out)[0] == 0
    base = [word for word in small if not word.startswith(("data.", "autoencoder.", "diffusion.metric"))]
    base += ["stages=[diffusion]", "data=latents", f"data.folder={out}", f"first_stage.weights={run / 'autoencoder'}"]
    capsys.readouterr()
    made = train(tmp_path / "latents", base=base)
    assert "latents: 16 encoded again, they agree" in capsys.readouterr().out
    assert "diffusion" in json.loads((made / "summary.json").read_text())
    other = train(tmp_path / "other", "stages=[autoencoder]", "seed=9")
    with pytest.raises(ConfigError, match="another first stage: weight_hash"):
        train(tmp_path / "wrong", f"first_stage.weights={other / 'autoencoder'}", base=base)
