"""The W&B workspace of a run's group or of a whole project, as plain data: what people look at first, in one order.

The format is that of W&B's own saved views. Nothing of W&B's is needed to make it; `push` sends it to the server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NamedTuple

from sdtrain.errors import ConfigError, RunError
from sdtrain.tracker.wandb import api_key

PUSH_TIMEOUT_SECONDS = 30.0
_FLOW = {"snapToColumns": True, "columnsPerPage": 3, "rowsPerPage": 2, "gutterWidth": 16}
_FLOW |= {"boxWidth": 460, "boxHeight": 300}
_LOOK = {"smoothingWeight": 0, "smoothingType": "none", "xAxis": "step", "ignoreOutliers": False}
_LOOK |= {"useRunsTableGroupingInPanels": False, "smoothingActive": False, "xAxisActive": True}
_SMOOTHED = {"smoothingWeight": 0.6, "smoothingType": "exponentialTimeWeighted", "showOriginalAfterSmoothing": True}
_MUTATION = """
mutation UpsertView($entityName: String, $projectName: String, $type: String, $name: String, $displayName: String,
  $description: String, $spec: String) {
  upsertView(input: {entityName: $entityName, projectName: $projectName, type: $type, name: $name,
    displayName: $displayName, description: $description, spec: $spec}) { view { id name } inserted }
}"""


class Curves(NamedTuple):
    """A panel of curves over the step: of keys, or of all keys that a pattern matches. Noisy ones are smoothed."""

    title: str
    keys: tuple[str, ...] = ()
    pattern: str = ""
    is_log: bool = False
    is_noisy: bool = False

    def panel(self) -> dict[str, Any]:
        config: dict[str, Any] = {"chartTitle": self.title, "xAxis": "step", "metrics": list(self.keys)}
        if self.pattern:
            config |= {"metricRegex": self.pattern, "useMetricRegex": True}
        config |= {"yLogScale": True} if self.is_log else {}
        return {"viewType": "Run History Line Plot", "config": config | (_SMOOTHED if self.is_noisy else {})}


class Pictures(NamedTuple):
    """A panel of the pictures under some keys, with a slider over the steps."""

    title: str
    keys: tuple[str, ...]

    def panel(self) -> dict[str, Any]:
        return {"viewType": "Media Browser", "config": {"chartTitle": self.title, "mediaKeys": list(self.keys)}}


class Table(NamedTuple):
    """A panel of the last table under a key."""

    title: str
    key: str

    def panel(self) -> dict[str, Any]:
        return {"viewType": "Weave", "config": {"panel2Config": {"exp": _last_table(self.key)}}}


Section = tuple[Curves | Pictures | Table, ...]
SECTIONS: dict[str, Section] = {
    "Losses": (
        Curves("Loss", ("loss",), is_log=True, is_noisy=True),
        Curves("Loss, held out", ("val/loss",), is_log=True),
        Curves("Terms of stage 1", ("pixel", "perceptual", "kl", "generator", "discriminator"), is_noisy=True),
        Curves("Reconstruction, held out", ("val/psnr",)),
        Curves("Loss by timestep", pattern="loss_at/.*", is_noisy=True),
    ),
    "x0 error by timestep": (
        Curves("x0 error, averaged and raw weights", ("val/x0_error", "val_raw/x0_error"), is_log=True),
        Curves("x0 error at each timestep, averaged weights", pattern="val/x0_error_at/.*", is_log=True),
        Curves("x0 error at each timestep, raw weights", pattern="val_raw/x0_error_at/.*", is_log=True),
    ),
    "Pictures": (
        Pictures("Samples", ("diffusion/samples",)),
        Pictures("Reconstructions", ("autoencoder/samples",)),
        Table("Samples by prompt", "diffusion/samples_by_prompt"),
    ),
    "Throughput": (
        Curves("Images per second", ("images_per_second",)),
        Curves("Model FLOPs utilisation", ("mfu",)),
        Curves("Seconds a step", ("step_seconds",)),
        Curves("Memory, bytes", ("peak_device_memory_bytes", "peak_memory_bytes")),
        Curves("Seconds spent looking", ("evaluation_seconds",)),
    ),
    "Data": (
        Curves("Share of the time that waits for data", ("data_wait_fraction",)),
        Curves("Samples read and replaced", ("data/read", "data/replaced")),
        Curves("Restarts", ("restarts",)),
    ),
    "Gradients": (
        Curves("Gradient norm by part", pattern="grad_norm/[^/]*$", is_log=True, is_noisy=True),
        Curves("Gradient norm by block, denoiser", pattern="grad_norm/model/.*", is_log=True, is_noisy=True),
        Curves(
            "Gradient norm by block, autoencoder",
            pattern="grad_norm/(first_stage|objective)/.*",
            is_log=True,
            is_noisy=True,
        ),
        Curves("Learning rate", pattern="lr(/.*)?$"),
        Curves("Decay of the averaged weights", ("ema_decay",)),
        Curves("Timesteps and latents", ("histogram/timestep", "histogram/latent")),
        Curves("Posterior of stage 1", ("histogram/posterior_mean", "histogram/posterior_log_variance")),
    ),
}


def workspace(project: str, group: str = "", entity: str = "") -> dict[str, Any]:
    """The view: panels in sections, of the runs of one group (a pipeline's stages) or of all, stages told apart.

    It is named by what it shows, so that it takes the place of the one that was pushed before.
    """
    title = f"sdtrain: {group}" if group else "sdtrain"
    filters = [{"key": _run_key("group"), "op": "=", "value": group, "disabled": False}] if group else []
    runs = {
        "id": "",
        "name": "Runs",
        "enabled": True,
        "runFeed": {"version": 2, "columnVisible": {}, "columnPinned": {}, "columnWidths": {}, "columnOrder": []},
        "search": {"query": ""},
        "filters": {"filterFormat": "filterV2", "filters": filters},
        "grouping": [] if group else [_run_key("group"), _run_key("jobType")],
        "sort": {"keys": [{"key": _run_key("createdAt"), "ascending": False}]},
        "selections": {"root": 1, "bounds": [], "tree": []},
    }
    bank = {
        "state": 1,
        "settings": {"autoOrganizePrefix": 2, "showEmptySections": False, "sortAlphabetically": False},
        "sections": [_section(name, panels) for name, panels in SECTIONS.items()],
    }
    section = {
        "panelBankConfig": bank,
        "panelBankSectionConfig": _grid("Report Panels", is_open=False) | {"type": "grid", "panels": []},
        "name": "",
        "runSets": [runs],
        "customRunColors": {},
        "settings": _LOOK | {"maxRuns": 10, "shouldAutoGeneratePanels": True},  # of keys that have no panel here
        "openRunSet": 0,
        "openViz": True,
    }
    view = {"entity": entity, "project": project, "displayName": title, "name": f"nw-{_id(title)}-v", "id": ""}
    return view | {"spec": {"section": section, "vizExpanded": False, "libraryExpanded": True}}


def push(view: Mapping[str, Any]) -> str:
    """Saves the view in its project and returns its address.

    Raises:
        ConfigError: where there is no key.
        RunError: where the server is not reached, or refuses.
    """
    key, host = api_key(), os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    if not key:
        raise ConfigError(f"dashboard: --push needs a key for {host}; run `wandb login`, or set WANDB_API_KEY")
    about = {"entityName": view["entity"] or None, "projectName": view["project"], "type": "project-view"}
    about |= {name: view[name] for name in ("name", "displayName")} | {"description": ""}
    body = json.dumps({"query": _MUTATION, "variables": about | {"spec": json.dumps(view["spec"])}}).encode()
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    try:
        request = urllib.request.Request(f"{host}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=PUSH_TIMEOUT_SECONDS) as answer:
            said = json.loads(answer.read())
    except (OSError, ValueError) as error:
        why = f"{error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else error
        raise RunError(f"dashboard: {host} did not take it: {why}", 1) from None
    if said.get("errors") or not (said.get("data") or {}).get("upsertView"):
        told = "; ".join(str(error.get("message")) for error in said.get("errors") or [])
        raise RunError(f"dashboard: {host} refused it: {told or 'no reason given'}", 1)
    name = said["data"]["upsertView"]["view"]["name"].removeprefix("nw-").removesuffix("-v")
    where = f"{view['entity']}/{view['project']}" if view["entity"] else view["project"]
    return f"workspace {view['displayName']!r} of {where} (?nw={name})"


def _section(name: str, panels: Section) -> dict[str, Any]:
    made = [
        {"__id__": _id(f"{name}/{panel.title}"), "layout": {"x": 8 * (i % 3), "y": 6 * (i // 3), "w": 8, "h": 6}}
        | panel.panel()
        for i, panel in enumerate(panels)
    ]
    return _grid(name, is_open=True) | {"__id__": _id(name), "type": "flow", "panels": made}


def _grid(name: str, is_open: bool) -> dict[str, Any]:
    return {
        "name": name,
        "isOpen": is_open,
        "flowConfig": _FLOW,
        "sorted": 0,
        "localPanelSettings": _LOOK,
        "pinned": False,
    }


def _run_key(name: str) -> dict[str, str]:
    return {"section": "run", "name": name}


def _id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:11]


def _dict(**properties: Any) -> dict[str, Any]:  # noqa: ANN401 types of W&B's query language
    return {"type": "typedDict", "propertyTypes": properties}


def _tagged(tag: dict[str, Any], value: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"type": "tagged", "tag": tag, "value": value}


def _last_table(key: str) -> dict[str, Any]:
    """The expression `runs.summary[key]`, with the types that W&B's query language wants to be told."""
    place = _tagged(
        _dict(entityName="string", projectName="string"), _dict(project="project", filter="string", order="string")
    )
    table = {"type": "file", "extension": "json", "wbObjectType": {"type": "table", "columnTypes": {}}}
    runtime = _dict(runtime="number")
    row = _dict(_step="number", table=table, _wandb=runtime, _runtime="number", _timestamp="number")
    summary = {"type": "union", "members": [_dict(_wandb=runtime), row]}

    def of_runs(item: dict[str, Any]) -> dict[str, Any]:
        return _tagged(place, {"type": "list", "objectType": _tagged(_dict(run="run"), item), "maxLength": 50})

    runs = {"nodeType": "var", "varName": "runs"}
    runs["type"] = _tagged(place, {"type": "list", "objectType": "run", "maxLength": 50})
    summaries = {"nodeType": "output", "type": of_runs(summary)}
    summaries["fromOp"] = {"name": "run-summary", "inputs": {"run": runs}}
    picked = {"obj": summaries, "key": {"nodeType": "const", "type": "string", "val": key}}
    return {
        "nodeType": "output",
        "type": of_runs({"type": "union", "members": [table, "none"]}),
        "fromOp": {"name": "pick", "inputs": picked},
        "__userInput": True,
    }
