"""The table of neighbouring runs: real directories, the broken ones left out."""

import json

from sdtrain.tracker.beside import beside_table


def write(parent, name, first_stage, speed, one=None):
    directory = parent / name
    directory.mkdir()
    part = {"first_stage": {"_target_": f"sdtrain.first_stage.x.{first_stage}"}, "model": {"_target_": "a.UNet"}}
    (directory / "config.yaml").write_text(json.dumps(part))
    match = {} if one is None else {"caption_match": {"one": {"all": one}}}
    (directory / "summary.json").write_text(json.dumps({"diffusion": match}))
    rows = [
        {"stage": "autoencoder", "step": 1, "images": 4, "loss": 1.0, "images_per_second": 9999.0},
        *({"stage": "diffusion", "step": i, "images": 8 * i, "loss": 1.0, "images_per_second": s} for i, s in speed),
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_pixels_stand_beside_latents_with_their_images_a_second(tmp_path):
    latent = write(tmp_path, "latent", "AutoencoderKL", [(1, 10.0), (2, 150.0), (3, 160.0)], one=0.5)
    write(tmp_path, "pixels", "Identity", [(1, 12.25)])
    table = beside_table(latent)
    rows = [row.split("</td><td>") for row in table.split("<tr><td>")[1:]]
    assert [row[:5] for row in rows] == [
        ["latent", "AutoencoderKL", "UNet", "150.0", "24"],
        ["pixels", "Identity", "UNet", "12.2", "8"],
    ]
    assert "50" in rows[0][5]


def test_a_run_alone_or_unfinished_or_torn_neighbours_make_no_table(tmp_path):
    own = write(tmp_path, "own", "AutoencoderKL", [(1, 1.0)])
    assert beside_table(own) == ""
    torn = write(tmp_path, "torn", "Identity", [(1, 1.0)])
    (torn / "summary.json").write_text('{"diffusion": ')
    half = write(tmp_path, "half", "Identity", [(1, 1.0)])
    (half / "summary.json").write_text('{"autoencoder": {}}')
    (tmp_path / "empty").mkdir()
    assert beside_table(own) == ""
    write(tmp_path, "other", "Identity", [(1, 1.0)])
    assert beside_table(own).count("<tr>") == 3
    assert beside_table(torn) == ""


def test_names_are_escaped(tmp_path):
    own = write(tmp_path, "own", "AutoencoderKL", [(1, 1.0)])
    write(tmp_path, "<b>", "Identity", [(1, 1.0)])
    assert "&lt;b&gt;" in beside_table(own)
    assert "<b>" not in beside_table(own)
