"""Sample grids with a slider over the steps: of one run, or of several side by side at the same step."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

MAX_PICTURES = 24  # on a slider, of all runs together; the first and the last of each are always among them
MAX_PICTURE_PIXELS = 1400  # width


def gallery(title: str, folders: Mapping[str, Path]) -> str:
    """The grids in the folders, by what each is called, standing at the last step.

    A run that has no grid at the step of the slider shows its last one before it.
    """
    most = max(4, MAX_PICTURES // max(1, len(folders)))
    runs = {name: found for name, folder in folders.items() if (found := _pictures(folder, most))}
    steps = sorted({step for pictures in runs.values() for step, _ in pictures})
    if not steps:
        return ""
    place = len(steps) - 1
    slider = f'<input type="range" min="0" max="{place}" value="{place}" aria-label="{escape(title)}: which step">'
    slider = f"<span>step {steps[0]}</span>{slider}" if place else ""
    groups = "".join(_group(title, name, pictures) for name, pictures in runs.items())
    kind = "side" if len(runs) > 1 else ""
    return (
        f'<div class="card gallery" data-steps="{json.dumps(steps)}">'
        f'<label>{slider}<output>step {steps[-1]}</output></label><div class="{kind}">{groups}</div></div>'
    )


def _group(title: str, name: str, pictures: list[tuple[int, str]]) -> str:
    last = len(pictures) - 1
    images = "".join(
        f'<img src="{data}" alt="{escape(f"{name} {title}".strip())} at step {step}" data-step="{step}"'
        f"{'' if index == last else ' hidden'}>"
        for index, (step, data) in enumerate(pictures)
    )
    heading = f"<h3>{escape(name)} <span>step {pictures[last][0]}</span></h3>" if name else ""
    return f'<div class="pictures">{heading}<div class="scroll">{images}</div></div>'


def _pictures(folder: Path, most: int) -> list[tuple[int, str]]:
    paths = sorted(folder.glob("step_*.png"))
    if len(paths) > most:
        paths = [paths[round(index * (len(paths) - 1) / (most - 1))] for index in range(most)]
    return [(int(path.stem.split("_")[1]), data) for path in paths if (data := _embedded(path))]


def _embedded(path: Path) -> str:
    """The picture as a data URL, smaller than its PNG; nothing for one that a crash cut off."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError):
        return ""
    if picture.width > MAX_PICTURE_PIXELS:
        height = round(picture.height * MAX_PICTURE_PIXELS / picture.width)
        picture = picture.resize((MAX_PICTURE_PIXELS, max(1, height)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
