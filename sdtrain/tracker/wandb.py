"""Weights & Biases as a mirror: offline unless a key is there, never a prompt, never the reason a run dies."""

from __future__ import annotations

import contextlib
import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdtrain.errors import ConfigError
from sdtrain.tracker.redact import without_secrets

MODES = ("auto", "online", "offline", "disabled")
INIT_TIMEOUT_SECONDS = 60.0
UPLOAD_TIMEOUT_SECONDS = 45.0  # below the fan-out's own limit, so that what was uploaded by then is kept


class WandbTracker:
    """One W&B run per stage, in the group of the run's name, continued under the same id after a resume.

    `mode="auto"` follows WANDB_MODE if it is set, else goes online where a key is found and offline where none is.
    """

    def __init__(self, project: str = "sdtrain", mode: str = "auto") -> None:
        if mode not in MODES:
            raise ConfigError(f"tracker.mode={mode} is unknown; choose one of {', '.join(MODES)}")
        self.project = project
        self.mode = mode
        self._run: Any = None

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:
        mode = resolved_mode(self.mode)
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline runs would ask the DNS for a telemetry host
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
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            print(f"wandb: {self._run.url}", flush=True)

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in row.items() if _is_number(value)}
        if self._run is not None and "event" not in row:
            self._run.log(numbers)

    def image(self, name: str, path: Path, step: int, captions: Sequence[str] = ()) -> None:
        if self._run is None:
            return
        import wandb

        caption = " | ".join(captions)[:2000] or None
        self._run.log({name: wandb.Image(str(path), caption=caption), "step": step})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the stage's run, and W&B's service with it: its exit hook would wait for it without a limit."""
        if self._run is None:
            return
        import wandb

        run, self._run = self._run, None
        try:
            run.summary.update(dict(summary))
            run.finish()
        finally:
            wandb.teardown()

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
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            entry = netrc.netrc(os.path.expanduser(candidate)).hosts.get(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if entry and entry[2]:
            return True
    return False


def _run_id(path: Path, stage: str) -> str:
    """The id saved beside the stage. A new one is random: two people's runs of one name must not become one run."""
    if path.exists() and (saved := path.read_text().strip()):
        return saved
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{stage}-{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
