"""Weights & Biases as a mirror: offline unless a key is there, never a prompt, never the reason a run dies."""

from __future__ import annotations

import contextlib
import netrc
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from sdtrain.tracker.redact import without_secrets
from sdtrain.tracker.row import edges, histograms, numbers

INIT_TIMEOUT_SECONDS = 60.0
UPLOAD_TIMEOUT_SECONDS = 45.0  # below the fan-out's own limit, so that what was uploaded by then is kept
PLACE_KEYS = {"event", "stage", "step", "images", "time"}


class WandbTracker:
    """One W&B run per stage, in the group of the run's name, continued under the same id after a resume.

    `mode="auto"` follows WANDB_MODE if it is set, else goes online where a key is found and offline where none is.
    The lineage of record is the run's own manifests; the run's config has their hashes, and where W&B is online
    artifacts mirror them, so that it draws which stage came from which.
    """

    def __init__(
        self, project: str = "sdtrain", mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    ) -> None:
        self.project = project
        self.mode = mode
        self._run: Any = None
        self._is_online = False
        self._directory, self._name, self._stage = Path(), "", ""
        self._lineage: dict[str, Any] = {}

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:
        mode = resolved_mode(self.mode)
        if mode == "disabled":
            return
        if self.mode == "online" != mode:
            print("wandb: offline, as there is no key: set WANDB_API_KEY, or `wandb login`", flush=True)
        self._is_online, self._lineage = mode == "online", {}
        self._directory, self._name, self._stage = run_directory, name, stage
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline runs would ask the DNS for a telemetry host
        os.environ.setdefault("WANDB_DATA_DIR", str(run_directory / "wandb"))  # tables' pictures would stay in the home
        import wandb

        settings = wandb.Settings(
            x_transaction_log_flush_interval=2.0,  # the default keeps 15 s in memory
            x_disable_meta=True,  # it records sys.argv, secrets in overrides included
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT_SECONDS,
            finish_timeout=UPLOAD_TIMEOUT_SECONDS,
        )
        self._run = wandb.init(
            project=self.project,
            dir=str(run_directory),
            mode=mode,
            id=_run_id(run_directory / stage / "wandb_id", stage),
            name=f"{name}/{stage}",
            group=name,
            job_type=stage,
            config=without_secrets(dict(config)),
            resume="allow",
            reinit="create_new",
            settings=settings,
        )
        # Never `step=`: W&B drops rows whose step goes backwards, and a resume does that.
        self._run.define_metric("step")
        self._run.define_metric("images", step_metric="step")  # and so an axis that panels offer
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            print(f"wandb: {self._run.url}", flush=True)

    def log(self, row: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        if row.get("event") == "start":
            self._tell_lineage({key: value for key, value in row.items() if key not in PLACE_KEYS})
        elif row.get("event") == "alert":
            self._run.alert(title=row["title"], text=row["text"], level="WARN")
        elif "event" not in row:
            self._run.log({**numbers(row), **_histograms(row)})

    def image(
        self, name: str, path: Path, step: int, captions: Sequence[str] = (), pictures: Sequence[Any] = ()
    ) -> None:
        if self._run is None:
            return
        import wandb

        shown = {name: wandb.Image(str(path), caption=" | ".join(captions)[:2000] or None)}
        if len(pictures):
            rows = [[step, prompt, wandb.Image(picture)] for prompt, picture in zip(captions, pictures)]
            shown[f"{name}_by_prompt"] = wandb.Table(columns=["step", "prompt", "picture"], data=rows)
        self._run.log({**shown, "step": step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the stage's run, and W&B's service with it: its exit hook would wait for it without a limit."""
        if self._run is None:
            return
        import wandb

        try:
            if "weight_hash" in summary:
                self._tell_lineage({"weight_hash": summary["weight_hash"]})
            if self._is_online and summary:
                self._mirror_manifests()
            self._run.summary.update(dict(summary))
            self._run.finish()
        finally:
            self._run = None
            wandb.teardown()

    def _tell_lineage(self, found: Mapping[str, Any]) -> None:
        parent = self._directory / "autoencoder" / "wandb_id"
        if self._stage == "diffusion" and parent.is_file():
            found = {**found, "parent_run_id": parent.read_text().strip()}
        self._lineage |= found
        self._run.config.update({"lineage": dict(self._lineage)}, allow_val_change=True)

    def _mirror_manifests(self) -> None:
        """An artifact of the manifests that this stage left, no weights; stage 2's names stage 1's as its source."""
        import wandb

        if "first_stage" in self._lineage:
            with contextlib.suppress(Exception):  # one that W&B never saw: trained elsewhere, or offline
                self._run.use_artifact(f"{_artifact(self._name, 'autoencoder')}:{self._lineage['first_stage'][:12]}")
        artifact = wandb.Artifact(_artifact(self._name, self._stage), type="model", metadata=dict(self._lineage))
        folder = self._directory / self._stage
        newest = sorted(folder.glob("checkpoints/*/COMPLETE.json"))[-1:]
        for path in (*folder.glob("manifest.json"), *folder.glob("first_stage.json"), *newest):
            artifact.add_file(str(path), name=path.name)
        own = self._lineage.get("weight_hash", "")[:12]
        self._run.log_artifact(artifact, aliases=["latest", *([own] if own else [])])

    def abandon(self) -> None:
        """Kill W&B's service where it no longer answers: what waits for it fails at once, and its exit hook is gone."""
        import wandb
        from wandb.sdk.wandb_setup import singleton

        connection = getattr(singleton(), "_connection", None)
        process = getattr(getattr(connection, "_proc", None), "_process", None)
        if process is not None:
            process.kill()
        with contextlib.suppress(Exception):
            wandb.teardown()


def resolved_mode(mode: str) -> str:
    """The mode W&B is started in. Online without a key would prompt, so it becomes offline."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "online")
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return "disabled"
    return "online" if api_key() else "offline"


def api_key() -> str:
    """The key for the server that WANDB_BASE_URL names, from the environment or a netrc file; "" without one."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            entry = netrc.netrc(os.path.expanduser(candidate)).hosts.get(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return entry[2]
    return ""


def _run_id(path: Path, stage: str) -> str:
    """The id saved beside the stage. A new one is random: two people's runs of one name must not become one run."""
    if path.exists() and (saved := path.read_text().strip()):
        return saved
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{stage}-{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def _histograms(row: Mapping[str, Any]) -> dict[str, Any]:
    import wandb

    found = histograms(row).items()
    return {key: wandb.Histogram(np_histogram=(value["counts"], edges(value))) for key, value in found}


def _artifact(name: str, stage: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}-{stage}"
