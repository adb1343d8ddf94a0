"""What the parts of a config ask of each other: each is right alone, and together they would train something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdtrain.errors import ConfigError
from sdtrain.target import nearest, parts, read_signature

STAGES = ("autoencoder", "diffusion")
# Keys of a conditioner that say how many classes it gives the denoiser, by number, from 0 on.
COUNTS_OF_CLASSES = ("num_class_embeds", "max_noise_level")
PLAIN = {"crop": "center", "flip": False}  # views that are the same each time
SEQUENTIAL, LATENTS = "sdtrain.data.sequential.SequentialDataModule", "sdtrain.data.latents.LatentDataModule"
CHECKPOINT, EVALUATE = "sdtrain.callback.checkpoint.Checkpoint", "sdtrain.callback.evaluate.Evaluate"
OF_PAIRS = "sdtrain.metric.reconstruction.reconstruction"
OF_SETS = "sdtrain.metric.distribution.Distribution"


def check_agreement(cfg: dict[str, Any]) -> None:
    """Raise a ConfigError for the first two parts that do not fit each other."""
    check_objectives(cfg)
    check_num_steps(cfg["objective"])
    check_classes(cfg)
    check_guidance(cfg)
    check_cache(cfg)
    check_latents(cfg)
    for stage in cfg["stages"]:
        check_best(stage, cfg[stage])


def doubts(cfg: DictConfig) -> list[str]:
    """What may be meant, and would train on without a word: a line each."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = {stage: values[stage] for stage in values["stages"]}
    if recognition := sections.get("autoencoder", {}).get("recognition"):
        sections["autoencoder.recognition"] = recognition
    found = []
    for path, section in sections.items():
        warmup, last = section["optim"].get("warmup_steps") or 0, section["trainer"]["max_steps"]
        if warmup > last:
            found.append(f"{path}.optim.warmup_steps={warmup}: the rate still rises at the last step, {last}")
        objective = section.get("objective") or {}
        start = objective.get("adversarial_start") or 0
        if start >= last and objective.get("discriminator") and objective.get("adversarial_weight"):
            found.append(
                f"{path}.objective.adversarial_start={start}: the adversary enters after the last step, {last}"
            )
    return found


def check_objectives(cfg: dict[str, Any]) -> None:
    """Three places take parts of the room `objective`; each takes another kind, told by its methods."""
    for path, node, wanted, unwanted, what in (
        ("objective", cfg["objective"], "to_x0", "", "the diffusion stage's objective"),
        (
            "autoencoder.objective",
            cfg["autoencoder"]["objective"],
            "loss",
            "to_x0",
            "the autoencoder stage's objective",
        ),
        ("diffusion.decoded", cfg["diffusion"]["decoded"], "forward", "loss", "a loss on decoded pictures"),
    ):
        methods = read_signature(node["_target_"], path).methods if node else {wanted}
        if wanted not in methods or unwanted in methods:
            spelled = path if path == "objective" else f"objective@{path}"
            raise ConfigError(f"{path}: {node['_target_']} is not {what}; choose one with {spelled}=NAME")


def check_num_steps(objective: dict[str, Any]) -> None:
    """Discrete timesteps are drawn from as many as the path has."""
    path, timestep = objective.get("path"), objective.get("timestep")
    counts = [node.get("num_steps") if isinstance(node, dict) else None for node in (path, timestep)]
    if None not in counts and counts[0] != counts[1]:
        raise ConfigError(
            f"objective.timestep.num_steps={counts[1]} and objective.path.num_steps={counts[0]} must be the same"
        )


def check_classes(cfg: dict[str, Any]) -> None:
    """The denoiser's table has a row for every class that the conditioner can name."""
    model = cfg["model"]
    if model.get("class_embed_type") in ("timestep", "identity"):
        return  # computes from the number itself
    num_rows = model.get("num_class_embeds") or 0
    has_table = "num_class_embeds" in read_signature(model["_target_"], "model").arguments
    for path, node in parts(cfg["conditioner"], "conditioner"):
        for key in (key for key in COUNTS_OF_CLASSES if (node.get(key) or 0) > num_rows):
            if not has_table:
                name = model["_target_"].rpartition(".")[2]
                raise ConfigError(
                    f"{path}: it gives class labels, and {name} has no table for them;"
                    f" write model=unet +model.num_class_embeds={node[key]}"
                )
            raise ConfigError(
                f"{path}.{key}={node[key]}: the labels go up to {node[key] - 1}, and the model's table has "
                f"{num_rows or 'no'} rows (model.num_class_embeds={model.get('num_class_embeds', 'null')}); write "
                f"{'' if 'num_class_embeds' in model else '+'}model.num_class_embeds={node[key]}, or lower {path}.{key}"
            )


def check_guidance(cfg: dict[str, Any]) -> None:
    """Guidance moves away from the null condition, which is learned from the samples that dropout leaves without their
    own (Ho and Salimans 2021, algorithm 1), or was before the run.
    """
    nodes = parts(cfg["conditioner"], "conditioner")
    shares = {f"{path}.dropout": node["dropout"] for path, node in nodes if "dropout" in node}
    scale = (cfg["sampler"].get("guidance") or {}).get("scale", 1)
    is_taught = not shares or any(shares.values()) or cfg["model"].get("weights")
    if scale != 1 and not is_taught and "diffusion" in cfg["stages"]:
        raise ConfigError(
            f"sampler.guidance.scale={scale} moves away from the null condition, and with {'=0, '.join(shares)}=0 no "
            f"sample teaches it; set {next(iter(shares))}=0.1, or sampler.guidance.scale=1"
        )


def check_cache(cfg: dict[str, Any]) -> None:
    """Latents in memory are of one square of each picture."""
    key = "diffusion.data" if cfg["diffusion"]["data"] else "data"
    data = cfg["diffusion"]["data"] or cfg["data"]
    reader = data.get("reader") or {}
    if data["_target_"] == SEQUENTIAL and cfg["diffusion"]["cache_latents"] and "diffusion" in cfg["stages"]:
        raise ConfigError(
            "diffusion.cache_latents: shards that are read in sequence have no list of samples; set "
            "diffusion.cache_latents=false, or index the shards and use data=webdataset"
        )
    asked = [f"{key}.buckets"] if data.get("buckets") else []
    asked += [f"{key}.reader.{name}={reader[name]}" for name in PLAIN if reader.get(name, PLAIN[name]) != PLAIN[name]]
    if asked and cfg["diffusion"]["cache_latents"] and "diffusion" in cfg["stages"]:
        raise ConfigError(
            f"diffusion.cache_latents: latents in memory are of one square of each picture, and {asked[0]} asks for"
            " others; set diffusion.cache_latents=false"
        )


def check_latents(cfg: dict[str, Any]) -> None:
    """Latents on disk are of a finished first stage, and not of one that is still to be trained."""
    key = "diffusion.data" if cfg["diffusion"]["data"] else "data"
    data = cfg["diffusion"]["data"] or cfg["data"]
    is_made = Path(cfg["output_dir"], "autoencoder", "manifest.json").is_file()
    if data["_target_"] == LATENTS and cfg["stages"] == [*STAGES] and not is_made:
        raise ConfigError(
            f"{key}: these latents are of a first stage that is done, and stage 1 would train another one; write "
            "stages=[diffusion] first_stage.weights=RUN/autoencoder"
        )


def check_best(stage: str, section: dict[str, Any]) -> None:
    """What checkpoints are kept by is measured while the stage trains."""
    nodes = {key: node for key, node in section["callback"].items() if node}
    for key, node in nodes.items():
        metric = (node.get("keep_best") or {}).get("metric") if node["_target_"] == CHECKPOINT else None
        path, known = f"{stage}.callback.{key}.keep_best", figures_of(stage, section["metric"])
        if metric is not None and not any(other["_target_"] == EVALUATE for other in nodes.values()):
            raise ConfigError(f"{path}: nothing is measured without {stage}.callback.evaluate; set {path}=null")
        if metric is not None and known and metric.replace("val_raw/", "val/").partition("_at/")[0] not in known:
            raise ConfigError(
                f"{path}.metric={metric} is not measured here; there are {', '.join(known)}{nearest(metric, known)}"
            )


def figures_of(stage: str, metric: dict[str, Any]) -> list[str]:
    """What a stage measures of held-out samples while it trains; empty where a part that is not ours says it."""
    name, ours = ("reconstruction", OF_PAIRS) if stage == "autoencoder" else ("distribution", OF_SETS)
    node = metric.get(name) or {}
    if node.get("_target_", ours) != ours:
        return []
    names = ["loss"] if stage == "autoencoder" else ["loss", "x0_error", *node.get("metric", ())]
    names += ["psnr", "ssim", "l1", "out_of_range"] if node.get("_target_") == OF_PAIRS else []
    names += ["precision", "recall"] if "precision_recall" in names else []
    return [f"val/{name}" for name in names]
