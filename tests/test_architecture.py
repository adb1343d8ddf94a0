"""The house rules as tests; each is a function of a root folder, so that a planted violation proves it can fail."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from sdtrain.agreement import doubts
from sdtrain.config import ROOT_KEYS, load_config
from sdtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

GROUND = {"contracts", "errors", "diffusion", "layer", "ops"}
FIRST = {"objective", "model", "first_stage", "conditioner", "sampler", "data", "metric", "optim", "checkpoint"}
SECOND = {"stage", "callback", "strategy", "tracker"}
ROOF = {"__main__", "run", "session", "interop", "config", "preflight", "target", "build", "continuation", "sweep"}
ROOF |= {"agreement", "plan", "trainer"}
FLOORS = [GROUND, FIRST, SECOND, ROOF]
EVERYONES = {"contracts", "errors"}  # what all rooms meet in, their own floor included
LIGHTNING_ROOMS = SECOND | {"run", "session", "trainer"}
LIGHTNING_FILES = {"data/datamodule.py", "data/sequential.py"}
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
DEBUGS = sorted(path.stem for path in (CONFIGS / "debug").glob("*.yaml"))


def sources(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders or ("sdtrain",) for path in (root / folder).rglob("*.py"))


def room_of(path: Path, root: Path) -> str:
    first = path.relative_to(root / "sdtrain").parts[0]
    return first.removesuffix(".py")


def floor_of(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports at run time, at its top or inside a function."""
    tree = ast.parse(path.read_text())
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_violations(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        room = room_of(path, root)
        if room == "__init__":
            continue
        for name in imports(path):
            words = name.split(".")
            other = words[1] if words[0] == "sdtrain" and len(words) > 1 else room
            is_up = floor_of(other) > floor_of(room)
            is_sibling = floor_of(other) == floor_of(room) and other not in {room, *EVERYONES} and room not in ROOF
            if is_up or is_sibling:
                found.append(f"{path.relative_to(root)} imports {name}")
            is_lightning_seat = room in LIGHTNING_ROOMS or str(path.relative_to(root / "sdtrain")) in LIGHTNING_FILES
            if words[0] in ("lightning", "pytorch_lightning") and not is_lightning_seat:
                found.append(f"{path.relative_to(root)} imports {name}")
            if words[0] in ("hydra", "omegaconf") and room not in ROOF:
                found.append(f"{path.relative_to(root)} imports {name}: parts take values, never cfg")
            known = {"torch", "numpy", "safetensors", "sdtrain", *sys.stdlib_module_names}
            if room in GROUND and words[0] not in known:
                found.append(f"{path.relative_to(root)} imports {name}: the ground knows torch, numpy and safetensors")
    return found


def budget_violations(root: Path) -> list[str]:
    """Files of 400 lines, functions of 80, 10 parameters; a network's constructor may be longer and take more."""
    found = []
    for path in sources(root, "sdtrain", "tools", "slurm"):
        where = path.relative_to(root)
        text = path.read_text()
        if text.count("\n") > 400:
            found.append(f"{where}: {text.count(chr(10))} lines")
        is_network_file = where.parts[1] in {"model", "first_stage", "layer"}
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef) or (is_network_file and node.name == "__init__"):
                continue
            if node.end_lineno - node.lineno + 1 > 80:
                found.append(f"{where}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([a for a in arguments if a.arg not in ("self", "cls")]) > 10:
                found.append(f"{where}: {node.name} has {len(arguments)} parameters")
    return found


def docstring_violations(root: Path) -> list[str]:
    found = []
    for path in sources(root, "sdtrain", "tools", "slurm"):
        if path.name == "__init__.py":
            continue
        tree = ast.parse(path.read_text())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        found += [f"{path.relative_to(root)}: no docstring" for node in [tree] if not ast.get_docstring(node)]
        found += [f"{path.relative_to(root)}: {c.name} has no docstring" for c in classes if not ast.get_docstring(c)]
    return found


def danger_violations(root: Path) -> list[str]:
    """Calls that would run what a file or an address says."""
    found = []
    for path in sources(root, "sdtrain", "tools", "slurm"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            flags = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
            bad = flags & {
                ("weights_only", False),
                ("shell", True),
                ("trust_remote_code", True),
                ("allow_pickle", True),
            }
            is_bad_call = name in {"eval", "exec", "os.system", "torch.hub.load", "torch.jit.load", "yaml.load"} or (
                name.split(".")[0] in {"pickle", "dill", "joblib", "cloudpickle"}
            )
            unsafe_load = name == "torch.load" and ("weights_only", True) not in flags
            if bad or is_bad_call or unsafe_load:
                found.append(f"{path.relative_to(root)}:{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def attribute_reads(root: Path, *folders: str) -> set[str]:
    trees = [ast.parse(path.read_text()) for path in sources(root, *folders)]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def unread_arguments(root: Path) -> list[str]:
    """Constructor arguments that are accepted and then read by nothing: a config key of theirs would be a lie."""
    reads, found = attribute_reads(root, "sdtrain", "tools"), []
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            constructor = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
            if constructor is None:
                continue
            arguments = [*constructor.args.args[1:], *constructor.args.kwonlyargs]
            for name in (argument.arg for argument in arguments):
                stored, used = _uses(constructor, name)
                if not used and not stored & reads:
                    found.append(f"{path.relative_to(root)}: {node.name} reads nothing of its argument '{name}'")
    return found


def _uses(function: ast.FunctionDef, name: str) -> tuple[set[str], bool]:
    """The attributes that only store an argument, and whether anything else reads it."""
    stored, storing = set(), set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = (
                zip(target.elts, node.value.elts, strict=False)
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                else [(target, node.value)]
            )
            for left, right in pairs:
                if isinstance(left, ast.Attribute) and isinstance(right, ast.Name) and right.id == name:
                    stored.add(left.attr)
                    storing.add(right)
    loads = {n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)}
    return stored, bool(loads - storing)


CHECKERS = {"config.py", "preflight.py", "agreement.py", "target.py", "continuation.py", "sweep.py", "build.py"}


def unread_fields(root: Path) -> list[str]:
    """Fields of the config's dataclasses that nothing but the checks reads."""
    tree = ast.parse((root / "sdtrain" / "config.py").read_text())
    reads = set()
    for path in sources(root, "sdtrain", "slurm"):
        if path.parent == root / "sdtrain" and path.name in CHECKERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                reads.add(node.attr)
    return [
        f"{node.name}.{item.target.id} is read by nothing"
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and item.target.id not in reads
    ]


RULES = [
    import_violations,
    budget_violations,
    docstring_violations,
    danger_violations,
    unread_arguments,
    unread_fields,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_its_rules(rule) -> None:
    assert rule(ROOT) == []


PLANTS = [
    (import_violations, "sdtrain/ops/x.py", "from sdtrain.model.unet import UNet\n"),
    (import_violations, "sdtrain/sampler/x.py", "def f():\n    from sdtrain.model.unet import UNet\n"),
    (import_violations, "sdtrain/layer/x.py", "from sdtrain.ops import random\n"),
    (import_violations, "sdtrain/model/x.py", "import lightning as L\n"),
    (import_violations, "sdtrain/callback/x.py", "from omegaconf import DictConfig\n"),
    (import_violations, "sdtrain/layer/x.py", "import einops\n"),
    (budget_violations, "sdtrain/ops/x.py", "a = 1\n" * 401),
    (budget_violations, "sdtrain/ops/x.py", "def f():\n" + "    a = 1\n" * 80),
    (budget_violations, "sdtrain/ops/x.py", "def f(a, b, c, d, e, f, g, h, i, j, k): ...\n"),
    (docstring_violations, "sdtrain/ops/x.py", "a = 1\n"),
    (docstring_violations, "sdtrain/ops/x.py", '"""Doc."""\nclass A: ...\n'),
    (danger_violations, "tools/x.py", "subprocess.run('ls', shell=True)\n"),
    (danger_violations, "sdtrain/ops/x.py", "torch.load(path)\n"),
    (danger_violations, "sdtrain/ops/x.py", "torch.load(path, weights_only=False)\n"),
    (danger_violations, "sdtrain/ops/x.py", "pickle.loads(data)\n"),
    (unread_arguments, "sdtrain/ops/x.py", "class A:\n    def __init__(self, planted): ...\n"),
    (unread_arguments, "sdtrain/ops/x.py", "class A:\n    def __init__(self, planted):\n        self.a = planted\n"),
    (unread_fields, "sdtrain/config.py", "class TrainerConfig:\n    planted: int = 3\n"),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTS)
def test_a_planted_violation_is_found(rule, path: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert len(rule(tmp_path)) >= 1


def test_ruff_is_content() -> None:
    folders = [folder for folder in ("sdtrain", "tests", "tools", "slurm") if (ROOT / folder).is_dir()]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_packages_are_empty_and_names_say_something() -> None:
    assert [path for path in ROOT.joinpath("sdtrain").rglob("__init__.py") if path.read_text()] == []
    assert [p for p in sources(ROOT) if p.stem in {"utils", "util", "helpers", "helper", "common", "misc"}] == []


def test_every_room_stands_on_a_floor() -> None:
    rooms = {path.parent.name for path in ROOT.joinpath("sdtrain").glob("*/__init__.py")}
    assert rooms <= set().union(*FLOORS), "a new room is a decision: give it a floor"


def test_root_keys_are_frozen() -> None:
    run = ("name", "seed", "output_dir", "stages", "resume")
    machine = ("accelerator", "devices", "num_nodes", "precision", "strategy")
    rooms = ("data", "first_stage", "conditioner", "model", "objective", "sampler")
    assert (*run, *machine, *rooms, "autoencoder", "diffusion", "tracker", "cluster") == ROOT_KEYS
    assert set(load_config()) == set(ROOT_KEYS)


def target_violations(configs: Path) -> list[str]:
    """A group's file describes parts of its room; what is nested in them may come from a first-floor or ground room."""

    def walk(value: object, allowed: set[str]) -> Iterator[str]:
        target = value.get("_target_", "") if isinstance(value, dict) else ""
        if target.startswith("sdtrain.") and target.split(".")[1] not in allowed:
            yield target
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from walk(child, allowed | FIRST | GROUND if target else allowed)

    found = []
    for path in sorted(configs.glob("*/*.yaml")):
        values, room = yaml.safe_load(path.read_text()) or {}, path.parent.name
        allowed = {room} | (FIRST | GROUND if "defaults" in values else set())  # a delta's nodes are another file's
        if room in FIRST | SECOND:
            found += [f"{path.relative_to(configs)}: {target} is not of {room}/" for target in walk(values, allowed)]
    return found


def test_a_target_names_its_room(tmp_path: Path) -> None:
    assert target_violations(CONFIGS) == []
    (tmp_path / "sampler").mkdir()
    (tmp_path / "sampler" / "x.yaml").write_text("_target_: sdtrain.model.unet.UNet\n")
    assert len(target_violations(tmp_path)) == 1


def composed(*typed: str) -> DictConfig:
    """The config of a command; where a recipe leaves its user's own files to be named, some that exist."""
    files = {"data.shards has no value": f"data.shards={ROOT}", "needs a first stage": f"first_stage.weights={ROOT}"}
    while True:
        try:
            return load_config(list(typed))
        except ConfigError as error:
            wanted = [argument for message, argument in files.items() if message in str(error)]
            if not wanted or wanted[0] in typed:
                raise
            typed = (*typed, wanted[0])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_passes_the_preflight(name: str) -> None:
    assert doubts(composed(f"+experiment={name}")) == []


@pytest.mark.parametrize("debug", DEBUGS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_debug_config_works_on_every_experiment(name: str, debug: str) -> None:
    composed(f"+experiment={name}", f"+debug={debug}")


def test_no_two_experiments_share_a_directory() -> None:
    directories = [composed(f"experiment={name}").output_dir for name in EXPERIMENTS]
    directories += [composed(f"experiment={EXPERIMENTS[0]}", f"debug={debug}").output_dir for debug in DEBUGS]
    assert len(set(directories)) == len(directories)
