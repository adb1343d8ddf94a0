"""Mistakes end in one line with the key and the fix, before torch; what is accepted is read; one directory, one run."""

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from sdtrain.agreement import STAGES, doubts, figures_of
from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.continuation import check_continuation, compare, config_hash, resolve_and_redact
from sdtrain.errors import ConfigError
from sdtrain.target import check_node

SMOKE = "+experiment=smoke"

# (what was typed, what the first line must contain)
WRONG = [
    (
        ["diffusion.trainer.max_step=3"],
        "unknown key 'diffusion.trainer.max_step'; did you mean 'diffusion.trainer.max_steps'?",
    ),
    (["+diffusion.trainer.max_step=3"], "did you mean 'max_steps'?"),
    (["max_steps=3"], "did you mean autoencoder.trainer.max_steps or diffusion.trainer.max_steps"),
    (["sede=3"], "unknown key 'sede'; did you mean 'seed'?"),
    (["+sede=3"], "unknown key 'sede'; did you mean 'seed'?"),
    (["modle=unet"], "unknown key 'modle'; did you mean 'model'?"),
    (["model.layers_per_blok=3"], "did you mean 'model.layers_per_block'?"),
    (["+model.layers_per_blok=3"], "did you mean 'layers_per_block'?"),
    (["model.dropout=0.1"], "+model.dropout=..."),
    (["model=unett"], "model=unett: there is no model/unett.yaml; did you mean 'unet'?"),
    (["experiment=quikstart"], "did you mean 'quickstart'?"),
    (["objective@autoencodr.objective=epsilon"], "autoencoder.objective"),
    (["diffusion.trainer.max_steps=abc"], "diffusion.trainer.max_steps must be a whole number, not 'abc'"),
    (["diffusion.trainer.clip_norm=abc"], "diffusion.trainer.clip_norm must be a number, not 'abc'"),
    (["diffusion.trainer.max_steps=0"], "diffusion.trainer.max_steps=0 must be at least 1"),
    (["model.layers_per_block=abc"], "model.layers_per_block must be a whole number or a list, not 'abc'"),
    (["model.block_out_channels=64"], "model.block_out_channels must be a list, not 64"),
    (["model.block_out_channels=[a]"], "model.block_out_channels must be a list"),
    (["++model.use_linear_projection=1"], "model.use_linear_projection must be true or false, not 1"),
    (
        ["+model.layers_per_block=1"],
        "'model.layers_per_block' is set already; write model.layers_per_block=... without the plus",
    ),
    (["seed=null"], "seed"),
    (["seed=-1"], "seed=-1 must be 0 or more"),
    (["seed=4294967296"], "seed=4294967296 must be 0 or more, and at most 4294967295"),
    (["name="], "name is empty; write name=..."),
    (["output_dir="], "output_dir is empty; write output_dir=..."),
    (["tracker.mode=onlin"], "tracker.mode must be one of auto, online, offline, disabled, not 'onlin'"),
    (["diffusion.trainer.clip_norm=-1"], "diffusion.trainer.clip_norm=-1.0 must be above 0; null clips nothing"),
    (["autoencoder.trainer.clip_norm=0"], "autoencoder.trainer.clip_norm=0.0 must be above 0; null clips nothing"),
    (["diffusion.optim.lr=nan"], "diffusion.optim.lr=nan is no number to train with"),
    (["sampler.guidance.scale=inf"], "sampler.guidance.scale=inf is no number to train with"),
    (["diffusion.callback.logg.every_steps=5"], "did you mean diffusion.callback.log.every_steps?"),
    (["=3"], "cannot read the argument '=3'; write key=value"),
    (["diffusion=abc"], "diffusion is a section"),
    (["model=null"], "model=null"),
    (["~model"], "model has no value"),
    (
        ["conditioner=label"],
        "conditioner.num_class_embeds=1001: the labels go up to 1000, and the model's table has no rows "
        "(model.num_class_embeds=null); write +model.num_class_embeds=1001",
    ),
    (
        ["conditioner=label", "model=mmdit_tiny"],
        "conditioner: it gives class labels, and MMDiT has no table for them; write model=unet "
        "+model.num_class_embeds=1001",
    ),
    (
        ["+data@diffusion.data=webdataset", "diffusion.data.shards='nowhere/*.tar'"],
        "diffusion.data.shards: there is nothing at nowhere/*.tar",
    ),
    (
        ["data=bucket", "data.shards=.", "diffusion.cache_latents=true"],
        "of one square of each picture, and data.buckets asks for others; set diffusion.cache_latents=false",
    ),
    (
        ["data=webdataset", "data.shards=.", "data.reader.flip=true", "diffusion.cache_latents=true"],
        "of one square of each picture, and data.reader.flip=True asks for others",
    ),
    (
        ["data=sequential", "data.shards=.", "diffusion.cache_latents=true"],
        "diffusion.cache_latents: shards that are read in sequence have no list of samples; set diffusion.cache",
    ),
    (
        ["+data@diffusion.data=latents", "diffusion.data.folder=."],
        "diffusion.data: these latents are of a first stage that is done, and stage 1 would train another one",
    ),
    (
        ["diffusion.callback.checkpoint.keep_best={metric: val/los, mode: min}"],
        "diffusion.callback.checkpoint.keep_best.metric=val/los is not measured here; there are val/loss, "
        "val/x0_error; did you mean 'val/loss'?",
    ),
    (
        ["autoencoder.callback.checkpoint.keep_best={metric: psnr, mode: max}"],
        "autoencoder.callback.checkpoint.keep_best.metric=psnr is not measured here; there are val/loss, val/psnr",
    ),
    (
        ["diffusion.callback.checkpoint.keep_best={metric: val/fid, mode: min}"],
        "keep_best.metric=val/fid is not measured here",
    ),
    (
        ["diffusion.callback.checkpoint.keep_best={metric: val/loss, mode: min}", "diffusion.callback.evaluate=null"],
        "diffusion.callback.checkpoint.keep_best: nothing is measured without diffusion.callback.evaluate; set ",
    ),
    (
        ["conditioner=label", "conditioner.num_class_embeds=6", "+model.num_class_embeds=5"],
        "the labels go up to 5, and the model's table has 5 rows",
    ),
    (
        ["model=unet_upscale", "conditioner=upscaling", "model.num_class_embeds=349"],
        "conditioner.parts.image.max_noise_level=350: the labels go up to 349, and the model's table has 349 rows "
        "(model.num_class_embeds=349); write model.num_class_embeds=350",
    ),
    (
        ["conditioner.dropout=0"],
        "scale=3.0 moves away from the null condition, and with conditioner.dropout=0 no sample teaches "
        "it; set conditioner.dropout=0.1, or sampler.guidance.scale=1",
    ),
    (
        ["conditioner=editing", "conditioner.parts.text.dropout=0", "conditioner.parts.image.dropout=0"],
        "with conditioner.parts.text.dropout=0, conditioner.parts.image.dropout=0 no sample",
    ),
    (["autoencoder.objective=autoencoding"], "write objective@autoencoder.objective=NAME"),
    (["objective@autoencoder.objective=epsilon"], "Denoising is not the autoencoder stage's objective"),
    (["objective=autoencoding"], "Autoencoding is not the diffusion stage's objective"),
    (["+objective@diffusion.decoded=v"], "Denoising is not a loss on decoded pictures"),
    (["objective@diffusion.decoded=decoded_pixel"], "added with a plus: +objective@diffusion.decoded="),
    (["diffusion.decoded=decoded_pixel"], "write +objective@diffusion.decoded=NAME"),
    (["+diffusion.callback.planted.every_steps=3"], "stands where a part belongs"),
    (["stages=autoencoder"], "stages must be a list; write stages=[autoencoder]"),
    (["stages=[autoencodr]"], "did you mean 'autoencoder'?"),
    (["stages=[diffusion,autoencoder]"], "in this order"),
    (["stages=[]"], "name one or both"),
    (["stages=[diffusion]", "output_dir=/tmp/no"], "stages=[diffusion] needs a first stage, and /tmp/no/autoencoder"),
    (["devices=0"], "devices=0 must be a whole number from 1 on, or auto"),
    (["num_nodes=two"], "num_nodes=two must be a whole number from 1 on, or auto"),
    (["diffusion.trainer.num_accumulate=7"], "diffusion.trainer.batch_size="),
    (["accelerator=cpuu"], "did you mean 'cpu'?"),
    (["precision=bf16"], "precision=bf16 is none of"),
    (["diffusion.precision=bf16-true"], "diffusion.precision=bf16-true is none of 32-true, bf16-mixed, 16-mixed; did"),
    (["precision=16-mixed", "accelerator=cpu"], "precision=16-mixed does not exist on a CPU"),
    (["diffusion.precision=16-mixed", "accelerator=cpu"], "diffusion.precision=16-mixed does not exist on a CPU"),
    (["resume=sometimes"], "resume=sometimes is none of auto, must, never"),
    (["name=${modell.width}"], "name: '${modell.width}': Interpolation key 'modell.width' not found"),
    (["name=${now:%Y}"], "asks the clock"),
    (["name=${oc.env:SDTRAIN_NO_SUCH_VARIABLE}"], "SDTRAIN_NO_SUCH_VARIABLE"),
    (["name=a=b"], "cannot read the argument 'name=a=b'; quote the value:  'name=\"a=b\"'"),
    (["name={a..b}"], "quote the value:  'name=\"{a..b}\"'"),
    (["name=a cat, sitting"], "quote it:  'name=\"a cat, sitting\"'"),
    (["seed"], "cannot read the argument 'seed'; write key=value"),
    (["+tracker.api_key=sk-123"], "'tracker.api_key' looks like a secret"),
    (["+hf_token=sk-123"], "'hf_token' looks like a secret"),
    (["model._target_=os.system"], "model._target_ 'os.system' is not allowed"),
    (["model._target_=torch.distributed.run.main"], "is not allowed"),
    (["model._target_=sdtrain.model.unet._Level"], "is not allowed"),
    (["model._target_=sdtrain.model.unet.nn.Module"], "defines no 'nn'"),
    (["model._target_=sdtrain.model.unet.Unet"], "did you mean 'UNet'?"),
    (["model._target_=sdtrain.model.unett.UNet"], "did you mean 'unet'?"),
    (["model._target_=sdtrain.sampler.euler.Euler"], "is no part of sdtrain/model/"),
    (["+model._args_=[1]"], "unknown key 'model._args_'"),
    (["output_dir=/etc/hostname"], "output_dir=/etc/hostname: /etc/hostname is a file"),
    (["output_dir=/etc/hostname/run"], "/etc/hostname is a file"),
    (["data=webdataset"], "data.shards has no value"),
    (
        ["experiment=quickstart", "data=webdataset", "data.shards=/no/such/*.tar"],
        "data.shards: there is nothing at /no/such/*.tar",
    ),
    (["first_stage.weights=/no/such/run"], "first_stage.weights: there is nothing at /no/such/run"),
]


def fault(overrides: list[str], extra: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, str(extra) if extra else None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("typed", "expected"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_command_ends_in_one_line_with_the_key_and_the_fix(typed: list[str], expected: str) -> None:
    message = fault([SMOKE, *typed] if not typed[0].startswith("experiment=") else typed)
    assert expected in message.splitlines()[0]
    assert "sk-123" not in message


@pytest.mark.parametrize(
    "typed",
    [
        ["conditioner.dropout=0", "sampler.guidance.scale=1"],
        ["conditioner.dropout=0", "stages=[autoencoder]"],
        ["conditioner.dropout=0", "model.weights=/tmp"],  # which know the null condition
        ["conditioner=editing", "conditioner.parts.text.dropout=0"],
        ["conditioner=none"],
    ],
    ids=" ".join,
)
def test_guidance_where_the_null_condition_is_taught_or_not_asked_for(typed: list[str]) -> None:
    load_config([SMOKE, *typed])


def test_what_trains_on_without_a_word_is_told() -> None:
    typed = ["autoencoder.optim.warmup_steps=13", "diffusion.optim.warmup_steps=12"]
    assert doubts(load_config([SMOKE, *typed, "autoencoder.objective.adversarial_start=12"])) == [
        "autoencoder.optim.warmup_steps=13: the rate still rises at the last step, 12",
        "autoencoder.objective.adversarial_start=12: the adversary enters after the last step, 12",
    ]
    never = ["autoencoder.objective.adversarial_start=12", "autoencoder.objective.adversarial_weight=0"]
    assert doubts(load_config([SMOKE, *never])) == []
    assert doubts(load_config([SMOKE, "autoencoder.recognition.optim.warmup_steps=5"])) == [
        "autoencoder.recognition.optim.warmup_steps=5: the rate still rises at the last step, 4"
    ]
    assert doubts(load_config([SMOKE, "diffusion.optim.warmup_steps=13", "stages=[autoencoder]"])) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede: 7", "unknown key 'sede'; did you mean 'seed'? (in configs/experiment/planted.yaml)"),
        ("diffusion: {trainer: {max_step: 7}}", "did you mean 'diffusion.trainer.max_steps'?"),
        ("diffusion: {trainr: {max_steps: 7}}", "did you mean 'diffusion.trainer'?"),
        ("model: {layers_per_blok: 7}", "unknown key 'model.layers_per_blok'; did you mean 'layers_per_block'?"),
        ("objective: {path: {planted: 7}}", "unknown key 'objective.path.planted'"),
        ("diffusion: {callback: {planted: {every_steps: 7}}}", "diffusion.callback.planted"),
        ("diffusion: {callback: {samples: {planted: 7}}}", "unknown key 'diffusion.callback.samples.planted'"),
        (
            "diffusion: {trainer: {max_steps: many}}",
            "must be a whole number, not 'many' (in configs/experiment/planted",
        ),
        ("diffusion: abc", "is a section"),
        ("model: unet", "model: 'unet' stands where a part belongs; write model=NAME"),
        ("defaults: [override /model: unett]", "there is no model/unett.yaml; did you mean 'unet'?"),
        ("model: {in_channels: '${first_stag.latent_channels}'}", "'first_stag.latent_channels' not found"),
        ("name: '${now:%Y-%m-%d}'", "asks the clock"),
        ("model: {_target_: torch.hub.load}", "'torch.hub.load' is not allowed"),
        ("model: [", "not YAML"),
    ],
)
def test_a_key_planted_in_an_experiment_file_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "planted.yaml").write_text(f"# @package _global_\n{text}\n")
    assert expected in fault(["experiment=planted"], tmp_path).splitlines()[0]


def test_what_is_right_is_accepted() -> None:
    cfg = load_config(["experiment=smoke", "+model.dropout=0.5", "~diffusion.callback.samples", "devices=auto"])
    assert (cfg.model.dropout, cfg.devices, "samples" in cfg.diffusion.callback) == (0.5, "auto", False)
    # What Lightning adds to the command of a rank that it starts itself.
    added = ['hydra.run.dir="."', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert load_config(["experiment=smoke", "stages=[autoencoder]", *added]).stages == ["autoencoder"]


@pytest.mark.parametrize(
    ("typed", "stage", "metric"),
    [
        ([], "autoencoder", "val/out_of_range"),
        (["autoencoder.metric.reconstruction._target_=sdtrain.metric.multiscale.ms_ssim"], "autoencoder", "val/theirs"),
        ([], "diffusion", "val_raw/x0_error_at/t0.05"),
        (["metric@diffusion.metric=diffusion_fid"], "diffusion", "val/fid"),
        (
            ["metric@diffusion.metric=diffusion_fd", "diffusion.metric.distribution.metric=[precision_recall]"],
            "diffusion",
            "val/recall",
        ),
    ],
)
def test_what_is_measured_may_keep_the_best(typed: list[str], stage: str, metric: str) -> None:
    load_config([SMOKE, *typed, f"{stage}.callback.checkpoint.keep_best={{metric: {metric}, mode: min}}"])


def test_what_a_stage_measures_is_known_before(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    metric = OmegaConf.to_container(load_config([SMOKE]).autoencoder.metric)
    for stage in STAGES:
        row = next(row for row in rows if row.get("stage") == stage and "val/loss" in row)
        assert {name for name in row if name.startswith("val/") and "_at/" not in name} == {*figures_of(stage, metric)}


def test_latents_of_the_first_stage_that_is_done_here_are_taken(tmp_path: Path) -> None:
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "manifest.json").touch()
    load_config([SMOKE, f"output_dir={tmp_path}", "+data@diffusion.data=latents", "diffusion.data.folder=."])


SOURCE = """
from __future__ import annotations
from typing import Literal, NamedTuple
from dataclasses import dataclass, field
from torch import nn
from sdtrain.contracts import Sampler
Kind = Literal["a", "b"]

class Base:
    def __init__(self, width: int, kind: Kind = "a") -> None: ...

class Child(Base):
    def forward(self): ...

@dataclass(frozen=True)
class Record:
    rate: float = 1.0
    names: tuple[str, ...] = ()
    hidden: int = field(init=False, default=0)

class More(Record): ...

class Holder:
    def __init__(self, sampler: Sampler | None, net: nn.Module | None = None, *, table: dict[str, int] = {}): ...

class Open(Base):
    def __init__(self, **rest: object) -> None: ...

    @classmethod
    def make(cls, size: Optional[int] = None) -> Open: ...

def function(size: "int | list[int]") -> None: ...
"""


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("Base width: 3 kind: b", ""),
        ("Base width: 3.5", "x.width must be a whole number"),
        ("Base width: true", "x.width must be a whole number"),
        ("Base kind: c", "x.kind must be one of a, b"),
        ("Child width: 3", ""),
        ("Child widht: 3", "did you mean 'width'?"),
        ("Record rate: 1", ""),
        ("Record names: [a, b]", ""),
        ("Record names: [1]", "x.names must be a list"),
        ("Record hidden: 1", "unknown key 'x.hidden'"),
        ("More rate: fast", "x.rate must be a number"),
        ("Holder sampler: null", ""),
        ("Holder sampler: euler", "x.sampler must be a part"),
        ("Holder net: unet", "x.net must be a part"),
        ("Holder sampler: {_target_: sdtrain.sampler.x.Holder}", ""),
        ("Holder table: {a: 1}", ""),
        ("Holder table: {a: one}", "x.table must be a mapping"),
        ("Holder table: 1", "x.table must be a mapping"),
        ("Open anything: 1", ""),
        ("Open.make size: 1", ""),
        ("Open.make sise: 1", "did you mean 'size'?"),
        ("function size: [1, 2]", ""),
        ("function size: a", "x.size must be a whole number or a list"),
        ("Missing size: 1", "defines no 'Missing'"),
    ],
)
def test_a_constructors_arguments_are_read_from_its_source(
    node: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / f"{tmp_path.name}.py").write_text(SOURCE)
    (tmp_path / "contracts.py").write_text("class Sampler: ...\n")
    monkeypatch.setattr("sdtrain.target.PACKAGE", tmp_path)
    name, _, arguments = node.partition(" ")
    values = OmegaConf.to_container(OmegaConf.create(f"{{{arguments.replace(' kind', ', kind')}}}"))
    call = {"_target_": f"sdtrain.sampler.{tmp_path.name}.{name}", **values}
    if not expected:
        check_node("x", call)
        return
    with pytest.raises(ConfigError) as caught:
        check_node("x", call)
    assert expected in str(caught.value)


# What a resolved name leads to counts, however it is spelled.
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.distributed.run.main",
        "torch.load",
        "hydra.utils.get_method",
        "sdtrain.config.load_config",
        "sdtrain.tracker.redact.os.system",
        "sdtrain.tracker.redact.re.compile",
        "sdtrain.tracker.redact._redact",
        "sdtrain.tracker.redact.REDACTED",
        "sdtrain.tracker.redact.without_secrets.__globals__",
        "torch.optim.lr_scheduler.torch.load",
        "torch.optim.Nothing",
        "sdtrain.model.nothing.Net",
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_build_refuses_what_is_not_allowed(target: str, is_nested: bool) -> None:
    evil = {"_target_": target}
    node = {"_target_": "sdtrain.tracker.redact.without_secrets", "tree": [evil]} if is_nested else evil
    cfg = OmegaConf.create({"part": node})
    with pytest.raises(ConfigError, match="part"):
        build(cfg.part)


def test_build_gives_plain_containers_and_keeps_the_objects_it_is_given() -> None:
    target = "sdtrain.tracker.redact.without_secrets"
    cfg = OmegaConf.create({"size": 3, "part": {"_target_": target, "tree": {"a": ["${size}", {"b": 1}]}}})
    made = build(cfg.part)
    assert made == {"a": [3, {"b": 1}]}
    assert type(made["a"]) is list

    class Thing:
        pass

    thing = Thing()
    assert build(OmegaConf.create({"_target_": target}), tree=thing) is thing
    assert build(OmegaConf.create({"_target_": target, "_partial_": True}), tree=thing)() is thing


def test_a_constructors_complaint_names_the_key() -> None:
    cfg = OmegaConf.create({"diffusion": {"part": {"_target_": "sdtrain.tracker.redact.without_secrets", "tre": 1}}})
    with pytest.raises(ConfigError, match=r"diffusion\.part: .*'tre'"):
        build(cfg.diffusion.part)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """A config, written into the directory of a run that has begun a stage."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "autoencoder").mkdir()
    cfg = load_config([SMOKE, f"output_dir={directory}"])
    OmegaConf.save(OmegaConf.create(resolve_and_redact(cfg)), directory / "config.yaml")
    return cfg


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (["diffusion.callback.log.every_steps=7", "diffusion.callback.samples.every_steps=7"], "allowed"),
        (["accelerator=cpu", "stages=[autoencoder]", "resume=must", "tracker=none"], "allowed"),
        (["~diffusion.callback.samples"], "allowed"),
        (["precision=32-true"], "warned"),
        (["diffusion.trainer.clip_norm=0.5"], "warned"),
        (["seed=17"], "refused"),
        (["+model.dropout=0.1"], "refused"),
        (["objective=v"], "refused"),
        (["diffusion.trainer.batch_size=1024"], "refused"),
        (["autoencoder.objective.kl_weight=1e-5"], "refused"),
        (["autoencoder.recognition.num_words=3"], "refused"),
    ],
)
def test_a_directory_goes_on_only_with_its_own_run(changes: list[str], kind: str, before: DictConfig) -> None:
    now = load_config([SMOKE, f"output_dir={before.output_dir}", *changes])
    found = compare(resolve_and_redact(before), resolve_and_redact(now))
    assert getattr(found, kind)
    assert not any(getattr(found, other) for other in {"allowed", "warned", "refused"} - {kind})
    assert (config_hash(before) != config_hash(now)) == (kind == "refused")
    if kind == "refused":
        with pytest.raises(ConfigError, match=f"holds a run of another config: {found.refused[0].key}"):
            check_continuation(Path(before.output_dir), now)
    else:
        assert len(check_continuation(Path(before.output_dir), now)) == len(found.warned)


def test_other_steps_go_on_and_a_rate_that_they_move_is_told(tmp_path: Path) -> None:
    """The guard: a rate that falls until the last step jumped when a run was prolonged, and nobody knew."""
    steady = ["diffusion.optim.decay=constant", f"output_dir={tmp_path}"]
    before = load_config([SMOKE, *steady])
    (tmp_path / "autoencoder").mkdir()
    OmegaConf.save(OmegaConf.create(resolve_and_redact(before)), tmp_path / "config.yaml")
    now = load_config([SMOKE, *steady, "diffusion.trainer.max_steps=77", "autoencoder.trainer.max_steps=78"])
    assert config_hash(before) == config_hash(now)
    (told,) = check_continuation(tmp_path, now)
    assert told == (
        "autoencoder.trainer.max_steps 12 -> 78 moves the learning rate, which falls until the last step "
        "(autoencoder.optim.decay=linear)"
    )


def test_a_directory_is_checked_before_anything_else(tmp_path: Path, before: DictConfig) -> None:
    assert check_continuation(tmp_path / "new", before) == []
    (tmp_path / "config.yaml").write_text("a: [")
    assert check_continuation(tmp_path, before) == []
    (tmp_path / "autoencoder").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        check_continuation(tmp_path, before)


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "sk-planted-123")
    cfg = load_config([SMOKE, "name='${oc.env:PLANTED_TOKEN}'"])
    assert "sk-planted-123" not in str(resolve_and_redact(cfg))


def test_timesteps_are_those_of_the_path():
    with pytest.raises(ConfigError, match="objective.timestep.num_steps=500 and objective.path.num_steps=1000"):
        load_config(["+experiment=smoke", "objective=epsilon", "objective.timestep.num_steps=500"])
