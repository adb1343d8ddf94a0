"""The documentation: every command has a rule and obeys it, quoted error lines are the code's, links lead somewhere."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ENDS = "|;&<>"
KINDS = ("python", "yaml")

# Words that stand for a reader's own things, and what is there for them in a test.
STANDS_FOR = {
    "SHARDS/*.tar": "{shards}/*.tar",
    "shards/*.tar": "{shards}/*.tar",
    "INDEX": "{index}",
    "PHOTOS": "{shards}",
    "ART": "{shards}",
    "VAE": "{vae}",
    "RUN/autoencoder": "{vae}",
    "outputs/quickstart/autoencoder": "{vae}",
    "model.weights=outputs/sd15_256": "model.weights={vae}",
    "MINE": "{mine}",
    "FOLDER": "{folder}",
}
# What no test runs, each with its reason. Its first words; a new command that is not here must have a rule below.
NOT_RUN = {
    "python3.11 -m venv": "a whole environment: .ci/run begins with it, as make test",
    "python -m pip install": "a download: .ci/run begins with it, as make test",
    "wandb leet": "a screen for a terminal",
    "python slurm/status.py": "it wants jobs: tests/slurm/test_status.py",
    "python slurm/evaluate.py": "it wants a run that was sent: tests/slurm/test_evaluate.py",
    "python tools/evaluate.py": "it wants a run: tests/tools/test_evaluate.py",
    "python tools/compare.py": "it wants runs: tests/tools/test_compare.py",
    "python tools/dashboard.py": "it wants a run: tests/tools/test_dashboard.py",
    "python tools/precompute_latents.py": "it wants a run: tests/tools/test_precompute_latents.py",
    "python tools/ema.py": "it wants a run with power-function averages: tests/tools/test_ema.py",
}
# What the model of the run in the tests does not read: tests/tools/test_sample.py and tests/interop/test_pipeline.py.
OF_OTHER_MODELS = ("--label", "--num", "--image", "--source", "--original-size")


def commands():
    """Every command of the pages, as (page, words)."""
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text()):
            if language != "bash":
                continue
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    words[0] = words[0].removeprefix(".venv/bin/")
                    yield page.name, words


COMMANDS = list(commands())


def rule_of(words):
    """The name of the rule that a command is held by, or nothing."""
    line = " ".join(words)
    if any(line.startswith(start) for start in NOT_RUN):
        return "not run"
    if words[:3] == ["python", "-m", "sdtrain"]:
        return "composed"
    if words[0] == "make":
        return "make"
    if words[0] == "touch":
        return "touch"
    if words[0] == "python" and len(words) > 1 and (ROOT / words[1]).is_file():
        return Path(words[1]).stem
    return ""


def of(*rules):
    """The commands of some rules, as parameters."""
    found = [(page, words) for page, words in COMMANDS if rule_of(words) in rules]
    return pytest.mark.parametrize("words", [w for _, w in found], ids=[f"{p}: {' '.join(w)}"[:90] for p, w in found])


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """What the documentation's reader has: a folder of pictures, its shards, their index, configs of their own."""
    home = tmp_path_factory.mktemp("reader")
    places = {name: home / name for name in ("folder", "shards", "index", "mine", "vae")}
    for name in ("folder", "mine/objective", "vae"):
        (home / name).mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (96, 64 + 8 * number), (40 * number, 90, 160)).save(places["folder"] / f"{number}.png")
        (places["folder"] / f"{number}.txt").write_text(f"picture {number}")
    (places["mine"] / "objective" / "mine.yaml").write_text((ROOT / "configs/objective/v.yaml").read_text())
    assert load(ROOT / "tools/make_shards.py").main([str(places["folder"]), str(places["shards"])]) == 0
    index = load(ROOT / "tools/index_shards.py")
    assert index.main([str(places["shards"]), "--out", str(places["index"]), "--workers", "1"]) == 0
    return places


def given(words, things):
    """The words with the reader's things in them."""
    result = []
    for word in words:
        for stands, there in STANDS_FOR.items():
            pattern = rf"(?<![\w/]){re.escape(stands)}(?![\w/])"
            word = re.sub(pattern, lambda _, there=there: there.format(**things), word)
        result.append(word)
    return result


def test_every_fence_says_what_it_is():
    known = {"bash", "text", "python", "yaml"}
    found = {(page.name, language) for page in PAGES for language, _ in FENCE.findall(page.read_text())}
    assert {(page, language) for page, language in found if language not in known} == set()
    assert all(page.read_text().count("```") % 2 == 0 for page in PAGES)


def test_every_command_has_a_rule():
    tested = {"not run", "composed", "make", "touch", "doctor", "sample", "export", "plan", "submit"}
    tested |= {"make_shards", "index_shards", "inspect_shards"}
    assert [f"{page}: {' '.join(words)}" for page, words in COMMANDS if rule_of(words) not in tested] == []
    assert [words for _, words in COMMANDS if set(words) & set(ENDS)] == []  # one command a line
    stale = [start for start in NOT_RUN if not any(" ".join(words).startswith(start) for _, words in COMMANDS)]
    assert stale == []
    assert rule_of(["python", "tools/nonesuch.py"]) == rule_of(["curl", "x"]) == ""


@of("composed")
def test_a_run_composes(words, things, tmp_path, monkeypatch):
    from sdtrain.config import load_config
    from sdtrain.sweep import jobs

    monkeypatch.chdir(tmp_path)
    arguments = given(words[3:], things)
    folder = arguments.pop(arguments.index("--config-dir") + 1) if "--config-dir" in arguments else None
    if "--help" in arguments:
        return
    overrides = [argument for argument in arguments if argument not in ("-m", "--config-dir", "--cfg", "job")]
    assert not [override for override in overrides if override.startswith("-")]
    if "-m" in arguments:
        assert len(jobs(overrides, folder)) > 1
    else:
        assert load_config(overrides, folder).name


@of("make")
def test_a_make_target_is_there(words):
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@of("touch")
def test_a_file_that_is_touched_is_looked_at(words):
    (name,) = words[1:]
    assert f'"{Path(name).name}"' in (ROOT / "sdtrain/callback/stop.py").read_text()


@of("make_shards", "index_shards", "inspect_shards")
def test_a_tool_for_data_runs(words, things, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = given(words[2:], things)
    if "make_shards" in words[1]:
        arguments[1] = str(tmp_path / "made")
    if "--out" in arguments:
        arguments[arguments.index("--out") + 1] = str(tmp_path / "made")
    if "--filter" in arguments:  # these pictures tell nothing, and that is said
        assert load(ROOT / words[1]).main(arguments) == 2
        assert "--filter" in capsys.readouterr().err
        return
    extra = ["--workers", "1"] if "index_shards" in words[1] else []
    assert load(ROOT / words[1]).main([*arguments, *extra]) == 0
    if "--sheet" in arguments:
        assert Path(arguments[arguments.index("--sheet") + 1]).is_file()


@of("submit")
def test_a_job_is_rendered(words, things, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("submit", ROOT / "slurm/submit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "submit", module)
    spec.loader.exec_module(module)
    arguments = [word for word in given(words[2:], things) if word != "--test-only"]
    assert module.main([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])]) == 0
    assert "#SBATCH" in capsys.readouterr().out


@of("plan", "doctor")
def test_a_tool_for_configs_knows_the_arguments(words, things, tmp_path, monkeypatch, capsys):
    """plan takes minutes for the large ones, and doctor starts processes: tests of their own run them."""
    from sdtrain.config import load_config

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tools")
    with pytest.raises(SystemExit) as ended:
        load(ROOT / words[1]).main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert [word for word in words[2:] if word.startswith("--") and word not in said] == []
    overrides = [word for word in given(words[2:], things) if not word.startswith("--")]
    if overrides:
        missing = [f"data.shards={things['shards']}/*.tar", f"first_stage.weights={things['vae']}"]
        wants = "quickstart" not in overrides[0] and "smoke" not in overrides[0]
        assert load_config([*overrides, *(missing if wants else [])]).name


@of("sample", "export")
def test_a_tool_for_runs_knows_its_options(words, capsys):
    with pytest.raises(SystemExit) as ended:
        load(ROOT / words[1]).main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert [word for word in words[2:] if word.startswith("--") and word not in said] == []


@pytest.mark.slow
def test_what_is_drawn_and_loaded(finished, tmp_path, monkeypatch):
    """The commands and the Python of the pages that take a run, on a small one that is done."""
    for page, words in COMMANDS:
        if rule_of(words) != "sample" or {"--averages", *OF_OTHER_MODELS} & {*words}:
            continue
        arguments = [str(finished), *words[3:], "--out", str(tmp_path / page)]
        assert load(ROOT / words[1]).main(arguments) == 0
    monkeypatch.chdir(tmp_path)
    pages = [page for page in PAGES if page.name != "add.md"]  # its blocks are files
    blocks = {text for page in pages for language, text in FENCE.findall(page.read_text()) if language == "python"}
    for number, text in enumerate(sorted(blocks)):
        (tmp_path / f"block{number}.py").write_text(text.replace("outputs/quickstart", str(finished)))
        load(tmp_path / f"block{number}.py")
    assert (tmp_path / "star.png").is_file()


def made_files():
    """The files that docs/add.md makes, {path: text}."""
    blocks = FENCE.findall((ROOT / "docs/add.md").read_text())
    return {
        text.partition("\n")[0].removeprefix("# "): text.partition("\n")[2] for kind, text in blocks if kind in KINDS
    }


def test_what_is_added_keeps_the_house_rules(tmp_path):
    files = made_files()
    assert len(files) == 8
    rules = load(ROOT / "tests/test_architecture.py").RULES
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert [found for rule in rules[:4] for found in rule(tmp_path)] == []


@pytest.mark.slow
def test_what_is_added_trains(small, tmp_path):
    for folder in ("sdtrain", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in made_files().items():
        assert not (tmp_path / path).exists()
        (tmp_path / path).write_text(text)
    (line,) = [text for kind, text in FENCE.findall((ROOT / "docs/add.md").read_text()) if kind == "text"]
    own = [word for word in shlex.split(line)[3:] if not word.startswith(("+experiment=", "name="))]
    kept = [o for o in small if not o.startswith(("data.", "model.", "diffusion.metric."))]
    typed = [*kept, *own, f"output_dir={tmp_path}/run", "data.num_pictures=64", "diffusion.metric.memorisation=null"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sdtrain", *typed]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "sharpness" in (tmp_path / "run/metrics.jsonl").read_text()
    assert (tmp_path / "outputs/datasets/stripe/train-00000.tar").is_file()


def strings():
    """What the code says: its string constants, each by itself, and the job's script."""
    for path in (path for folder in ("sdtrain", "tools", "slurm") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    yield (ROOT / "slurm/job.sh").read_text()


def test_error_lines_are_the_code_s():
    said = "\0".join(strings())
    text = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", text, re.M)
    assert len(quoted) > 20
    assert len(quoted) == len(re.findall(r"^### ", text, re.M))
    pieces = [(line, piece.strip()) for line in quoted for piece in line.split("…") if piece.strip()]
    assert [line for line, piece in pieces if piece not in said] == []


def test_the_config_page_is_fresh_and_links_lead_somewhere(capsys):
    assert load(ROOT / "tools/build_docs.py").main(["--check"]) == 0, capsys.readouterr().err


def test_a_dead_link_and_a_lost_page_are_found(tmp_path, monkeypatch):
    tool = load(ROOT / "tools/build_docs.py")
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "index.md").write_text("# A\n[b](b.md) [c](nowhere.md) [d](b.md#one-two) [e](b.md#three)\n")
    (folder / "b.md").write_text("# B\n## One two\n```\n# Three\n```\n")
    (folder / "lost.md").write_text("# L\n")
    monkeypatch.setattr(tool, "DOCS", folder)
    assert tool.dead_links(folder) == [
        "index.md: nowhere.md leads nowhere",
        "index.md: b.md#three leads nowhere",
        "lost.md is not in index.md",
    ]


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.names = [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.found += [attrs[key] for key in ("href", "src") if key in attrs]
        self.names |= {attrs["id"]} if "id" in attrs else set()


def test_the_site_is_whole_and_needs_no_network(tmp_path):
    assert load(ROOT / "tools/build_docs.py").main(["--out", str(tmp_path)]) == 0
    read = {}
    for page in tmp_path.glob("*.html"):
        read[page.name] = Links()
        read[page.name].feed(page.read_text())
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {name.removesuffix(".html") for name in read}
    for name, links in read.items():
        for link in links.found:
            file, _, anchor = link.partition("#")
            assert "://" not in file or not file.endswith((".js", ".css", ".png"))
            if "://" not in link:
                assert (tmp_path / (file or name)).is_file(), f"{name}: {link}"
                assert not anchor or anchor in read[file or name].names, f"{name}: {link}"


def test_the_config_page_names_every_argument_of_every_file():
    """Read apart from the tool: each key that a config file gives a part stands in the page, under its group."""
    text = (ROOT / "docs/config.md").read_text()
    groups = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    for file in sorted((ROOT / "configs").glob("*/*.yaml")):
        values = yaml.safe_load(file.read_text()) or {}
        if file.parent.name in ("experiment", "debug", "cluster") or "_target_" not in values:
            continue
        missing = [key for key in values if key not in ("_target_", "_partial_", "defaults", "weights")]
        missing = [key for key in missing if f"| `{key}` |" not in groups[file.parent.name]]
        assert missing == [], file
