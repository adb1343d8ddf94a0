"""The frame of an HTML page that stands alone: style and script inside, nothing from outside, not even by accident."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sdtrain.tracker.chart import LEFT, RIGHT

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, facts: Iterable[str], body: str, footer: str) -> str:
    """The whole page. `body` is HTML, the rest is text."""
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    script = script.replace("PLOT_LEFT", str(LEFT)).replace("PLOT_RIGHT", str(RIGHT))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)} · sdtrain</title>
<style>{(here / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header><h1>{escape(title)}</h1><p>{escape(" · ".join(facts))}</p></header>
{body}
<footer>{escape(footer)}</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def section(title: str, content: str) -> str:
    """Nothing where there is no content, so is `details`."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def columns(content: str) -> str:
    return f'<div class="columns">{content}</div>' if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A card with a table of plain text; nothing where there are no rows."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    if not body:
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    kind = f' class="{kind}"' if kind else ""
    return f'<div class="card scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
