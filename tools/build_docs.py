"""The documentation: docs/config.md out of configs/ and the code, and all pages as a folder of HTML. No network.

python tools/build_docs.py            writes docs/config.md
python tools/build_docs.py --check    1 where docs/config.md is not what the code says, or a link leads nowhere
python tools/build_docs.py --out DIR  the pages as HTML
"""

from __future__ import annotations

import argparse
import ast
import html
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

from sdtrain.errors import ConfigError
from sdtrain.target import PACKAGE, parts, read_signature

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
INDEX, KEYS = "index.md", "config.md"
WITHOUT_PARTS = ("experiment", "debug", "hydra")
STYLE = """
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 1rem/1.55 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: 2rem }
nav a { display: block; padding: .15rem 0 } a { color: #0550ae }
nav a[aria-current] { font-weight: 700; color: inherit }
pre { overflow-x: auto; background: #f4f5f7; padding: .75rem; border-radius: 6px } code { font-size: .9em }
table { display: block; overflow-x: auto; border-collapse: collapse } th, td { border: 1px solid #d0d4da;
  padding: .25rem .5rem; text-align: left; vertical-align: top } img { max-width: 100% }
@media (max-width: 50rem) { body { display: block } } @media print { nav { display: none } body { display: block } }
@media (prefers-color-scheme: dark) { body { background: #15181c; color: #e4e6e9 } a { color: #79b8ff }
  pre { background: #22262c } th, td { border-color: #3a4048 } }
"""
SECTIONS = {
    "RunConfig": "The root",
    "AutoencoderConfig": "autoencoder",
    "RecognitionConfig": "autoencoder.recognition",
    "DiffusionConfig": "diffusion",
    "TrainerConfig": "trainer, of each of these three",
    "ClusterConfig": "cluster",
    "JobConfig": "cluster.autoencoder and cluster.diffusion",
}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where a page is stale or a link leads nowhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the HTML goes; made if absent")
    args = parser.parse_args(argv)
    faults = []
    if args.check:
        if not (DOCS / KEYS).is_file() or (DOCS / KEYS).read_text() != config_page():
            faults.append(f"docs/{KEYS} is not what the code says; run python tools/build_docs.py")
    elif args.out:
        build(args.out)
        print(args.out / "index.html")
    else:
        (DOCS / KEYS).write_text(config_page())
        print(DOCS / KEYS)
    for fault in (faults := [*faults, *dead_links(DOCS)]):
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def config_page() -> str:
    """Every key: the root's and its sections', then each group's parts with their arguments."""
    lines = [
        "# Every config key",
        "",
        "Made by `tools/build_docs.py` from `sdtrain/config.py`, `configs/` and the constructors; a test fails where",
        "it is stale. In configs: the value in the first of the group's files that names the key, … where others",
        "differ. A key that no file names has the default, and is added with a plus:",
        "`+model.dropout=0.1`.",
        "",
    ]
    for heading, rows in sections():
        lines += [heading, "", "| key | kind | default | |", "|---|---|---|---|", *map(row, rows), ""]
    for group in sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir()):
        if group not in WITHOUT_PARTS:
            lines += group_lines(group)
    return "\n".join(lines).rstrip() + "\n"


def row(cells: tuple[str, ...]) -> str:
    """A line of a table: words of the code, and last what they mean."""
    *words, what = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(f'`{word}`' if word else '' for word in words)} | {what} |"


def sections() -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The dataclasses of the config, with the values of train.yaml and what is said behind a field."""
    text = (PACKAGE / "config.py").read_text()
    source, tree, found = text.splitlines(), ast.parse(text), {}
    values = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text())
    for node in tree.body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        rows: list[tuple[str, ...]] = []
        for item in (item for item in node.body if isinstance(item, ast.AnnAssign)):
            name, default = item.target.id, ast.unparse(item.value) if item.value else ""
            given = values.get(name) if node.name == "RunConfig" else None
            told = "" if default.startswith(("MISSING", "field(")) else plain(default)
            told = yaml_text(given) if given is not None and not isinstance(given, dict) else told
            rows.append((name, ast.unparse(item.annotation), told, source[item.lineno - 1].partition("  # ")[2]))
        found[node.name] = [(ast.get_docstring(node) or "").replace("\n", " ")], rows
    for name, heading in SECTIONS.items():
        what, rows = found.pop(name)
        yield f"## {heading}\n\n{' '.join(what)}", rows
    assert not found, f"tools/build_docs.py has no heading for {', '.join(found)}"


def group_lines(group: str) -> list[str]:
    """One group: its names, and for each class that they build its arguments."""
    files = sorted((ROOT / "configs" / group).glob("*.yaml"))
    lines = [f"## {group}", "", f"`{group}=` " + ", ".join(f"`{file.stem}`" for file in files), ""]
    if group == "cluster":
        return lines + ["Its keys are those in the section of that name.", ""]
    targets: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        values = yaml.safe_load(file.read_text()) or {}
        for _, node in parts(values):
            if isinstance(node["_target_"], str) and "${" not in node["_target_"]:
                targets.setdefault(node["_target_"], []).append(node)
    for target in sorted(targets):
        lines += part_lines(target, targets[target])
    return lines


def part_lines(target: str, nodes: list[dict[str, Any]]) -> list[str]:
    """One class or function: what it is, and its arguments with what `nodes` give them and what is said of them."""
    try:
        signature = read_signature(target)
    except ConfigError:
        return []
    what, told, defaults = documentation(target)
    lines = [f"### `{target.removeprefix('sdtrain.')}`", "", what, ""]
    if signature.arguments:
        lines += ["| key | kind | default | in configs | |", "|---|---|---|---|---|"]
        for name, (annotation, _) in signature.arguments.items():
            kind = ast.unparse(annotation).strip("'") if annotation else ""
            given = [shown(node[name]) for node in nodes if name in node]
            differs = " …" if len(set(given)) > 1 else ""
            first = given[0] + differs if given else ""
            lines.append(row((name, kind, plain(defaults.get(name, "")), first, told.get(name, ""))))
        lines.append("")
    return lines


def documentation(target: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The first paragraph of a part's docstring, its `Args`, and its arguments' defaults."""
    words = target.split(".")[1:]
    cut = next(n for n in range(len(words), 0, -1) if PACKAGE.joinpath(*words[:n]).with_suffix(".py").is_file())
    module = scope = ast.parse(PACKAGE.joinpath(*words[:cut]).with_suffix(".py").read_text())
    for name in words[cut:]:
        scope = next(node for node in scope.body if getattr(node, "name", "") == name)
    text = ast.get_docstring(scope) or ""
    functions = [node for node in scope.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    told: dict[str, str] = {}
    defaults: dict[str, str] = {}
    if isinstance(scope, ast.ClassDef) and not functions:  # what it inherits
        names = {ast.unparse(base) for base in scope.bases}
        bases = [f"sdtrain.{'.'.join(words[:cut])}.{n.name}" for n in module.body if getattr(n, "name", "") in names]
        for node in module.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdtrain."):
                bases += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in names]
        for base in bases:
            _, told, defaults = documentation(base)
        fields = [item for item in scope.body if isinstance(item, ast.AnnAssign) and item.value]  # of a dataclass
        written = {item.target.id: ast.unparse(item.value) for item in fields}
        defaults |= {name: value for name, value in written.items() if "field(" not in value}
    for function in functions or ([scope] if isinstance(scope, ast.FunctionDef) else []):
        arguments = function.args
        pairs = [*zip(reversed(arguments.posonlyargs + arguments.args), reversed(arguments.defaults))]
        pairs += zip(arguments.kwonlyargs, arguments.kw_defaults)
        defaults = {argument.arg: ast.unparse(value) for argument, value in pairs if value is not None}
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", text, re.M)
    for entry in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8,}.*)*)", block[1] if block else "", re.M):
        told |= {name: " ".join(entry[2].split()) for name in entry[1].split(", ")}
    return " ".join(text.partition("\n\n")[0].split()), told, defaults


def yaml_text(value: Any) -> str:
    """A value as it stands in YAML, on a line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n").removesuffix("\n...")


def plain(expression: str) -> str:
    """A default of the code as YAML writes it, where it is a plain value."""
    try:
        value = ast.literal_eval(expression) if expression else None
    except ValueError:
        return expression
    return yaml_text(list(value) if isinstance(value, tuple) else value) if expression else ""


def shown(value: Any) -> str:
    """A value of a file; of a part its name."""
    is_part = isinstance(value, dict) and "_target_" in value
    return value["_target_"].removeprefix("sdtrain.") if is_part else yaml_text(value)


def pages() -> list[Path]:
    """The pages as the index lists them, the index first."""
    listed = [DOCS / link.partition("#")[0] for link in LINK.findall((DOCS / INDEX).read_text())]
    return [DOCS / INDEX, *listed]


def title(page: Path) -> str:
    """A page's first line."""
    return page.read_text().partition("\n")[0].removeprefix("# ")


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in an address."""
    return {slug(line.lstrip("# ")) for line in FENCE.sub("", text).splitlines() if line.startswith("#")}


def slug(heading: str) -> str:
    """`Time limits` -> `time-limits`."""
    return re.sub(r"[^\w]+", "-", heading.lower()).strip("-")


def dead_links(folder: Path) -> list[str]:
    """Links to files and headings that are not there, and pages that the index does not lead to; no addresses."""
    found = []
    for page in sorted([*folder.glob("*.md"), *folder.parent.glob("*.md")]):
        for link in LINK.findall(FENCE.sub("", page.read_text())):
            name, _, anchor = link.partition("#")
            place = (page.parent / name) if name else page
            if "://" in link:
                continue
            if not place.exists() or (anchor and anchor not in anchors(place.read_text())):
                found.append(f"{page.name}: {link} leads nowhere")
    lost = {page.name for page in folder.glob("*.md")} - {page.name for page in pages()}
    return found + [f"{name} is not in {INDEX}" for name in sorted(lost)]


def build(out: Path) -> None:
    """Every page with the navigation, and the pictures beside them."""
    out.mkdir(parents=True, exist_ok=True)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for page in pages():
        names = ((other, title(other)) for other in pages())
        navigation = "".join(
            f'<a href="{other.stem}.html"{" aria-current=page" if other == page else ""}>{html.escape(name)}</a>'
            for other, name in names
        )
        tokens = markdown.parse(page.read_text())
        for opening, inline in zip(tokens, tokens[1:]):
            if opening.type == "heading_open":
                opening.attrSet("id", slug(inline.content))
        body = markdown.renderer.render(tokens, markdown.options, {})
        body = re.sub(r'href="(\w+)\.md(#[^"]*)?"', lambda found: f'href="{found[1]}.html{found[2] or ""}"', body)
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title(page))}</title>'
        head += f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        (out / f"{page.stem}.html").write_text(f"{head}<nav>{navigation}</nav><main>{body}</main></html>\n")
    for picture in DOCS.glob("*.png"):
        shutil.copy(picture, out)


if __name__ == "__main__":
    sys.exit(main())
