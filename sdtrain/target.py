"""What a `_target_` may name, and which arguments it takes, read from its source: nothing heavy is imported."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
ROOMS = {
    *("diffusion", "layer", "ops"),
    *("objective", "model", "first_stage", "conditioner", "sampler", "data", "metric", "optim", "checkpoint"),
    *("callback", "strategy", "tracker"),
}
NODE_KEYS = {"_target_", "_partial_"}  # `_args_`, `_recursive_` and `_convert_` would get around the checks below
READ_BY_RUN = {"first_stage.weights", "model.weights"}  # by `run.py`, as loading stands above the parts
EXTERNAL_WITHOUT_ARGUMENTS = {"object", "Module", "Callback", "Protocol", "ABC"}
SIMPLE = {"int": int, "float": (int, float), "bool": bool, "str": str, "Path": str}
SEQUENCES, MAPPINGS = {"list", "tuple", "set", "Sequence", "Iterable"}, {"dict", "Mapping"}


@dataclass
class Signature:
    """A target's arguments (annotation and the file it stands in), its methods, and whether it takes others too."""

    arguments: dict[str, tuple[ast.expr | None, Path]] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    is_open: bool = False


def parts(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_` below `value` (plain containers), outermost first, with its dotted path."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from parts(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from parts(child, f"{path}[{index}]")


def nearest(word: str, known: Iterator[str] | list[str] | set[str]) -> str:
    """`; did you mean 'x'?`, or nothing where nothing is near."""
    found = difflib.get_close_matches(str(word), sorted(known), 1, 0.6)
    return f"; did you mean '{found[0]}'?" if found else ""


def check_allowed(target: Any, path: str) -> None:
    """Refuse every target but a public name in one of sdtrain's rooms: a library's can reach a shell."""
    words = target.split(".") if isinstance(target, str) else []
    is_public = not any(word.startswith("_") for word in words)
    if not (len(words) > 3 and words[0] == "sdtrain" and words[1] in ROOMS and is_public):
        raise ConfigError(f"{path}._target_ '{target}' is not allowed; write sdtrain.<room>.<file>.<Class>")


def check_node(path: str, node: dict[str, Any]) -> None:
    """Refuse a node whose target is not allowed or missing, or whose arguments it does not take."""
    target = node["_target_"]
    signature = read_signature(target, path)
    for name, value in node.items():
        where = f"{path}.{name}"
        if name in NODE_KEYS or where in READ_BY_RUN:
            continue
        if name not in signature.arguments:
            if signature.is_open:
                continue
            raise ConfigError(
                f"unknown key '{where}'{nearest(name, set(signature.arguments))}"
                f"\n  {target} takes: {', '.join(signature.arguments) or 'no arguments'}"
            )
        wanted = _mismatch(*signature.arguments[name], value)
        if wanted:
            raise ConfigError(f"{where} must be {wanted}, not {value!r}")


@cache
def read_signature(target: str, path: str = "") -> Signature:
    """The target's signature out of its source file. Raises ConfigError where it is not allowed or not there."""
    check_allowed(target, path)
    _, *words = target.split(".")
    num_folders = next(
        (n for n in range(len(words), 0, -1) if PACKAGE.joinpath(*words[:n]).with_suffix(".py").is_file()), 0
    )
    if not num_folders:
        files = {f.stem for f in (PACKAGE / words[0]).glob("[a-z]*.py")}
        raise ConfigError(f"{path}._target_: there is no sdtrain/{words[0]}/{words[1]}.py{nearest(words[1], files)}")
    file = PACKAGE.joinpath(*words[:num_folders]).with_suffix(".py")
    scope: ast.AST = _tree(file)
    for name in words[num_folders:]:
        defined = {n.name: n for n in scope.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        if name not in defined:
            raise ConfigError(
                f"{path}._target_: {file.relative_to(PACKAGE.parent)} defines no '{name}'{nearest(name, set(defined))}"
            )
        scope = defined[name]
    signature = Signature()
    if isinstance(scope, ast.FunctionDef):
        _add_function(signature, scope, file, is_method=len(words) - num_folders > 1)
    else:
        _add_class(signature, scope, file)
    return signature


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _add_function(signature: Signature, function: ast.FunctionDef, file: Path, is_method: bool) -> None:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    for argument in arguments[1 if is_method and not is_static else 0 :]:
        signature.arguments[argument.arg] = argument.annotation, file
    signature.is_open |= function.args.kwarg is not None


def _add_class(signature: Signature, node: ast.ClassDef, file: Path) -> None:
    """Collect from the bases first, as Python does: an own `__init__` replaces theirs, dataclass fields add up."""
    for base in node.bases:
        name = ast.unparse(base).split("[")[0].split(".")[-1]
        found = _find(name, file)
        if found and isinstance(found[0], ast.ClassDef):
            _add_class(signature, *found)
        elif name not in EXTERNAL_WITHOUT_ARGUMENTS and name != "NamedTuple":
            signature.is_open = True
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    signature.methods |= set(methods)
    is_record = any("dataclass" in ast.unparse(d) for d in node.decorator_list) or any(
        ast.unparse(b).endswith("NamedTuple") for b in node.bases
    )
    if "__init__" in methods:
        signature.arguments, signature.is_open = {}, False
        _add_function(signature, methods["__init__"], file, is_method=True)
    elif is_record:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                default = ast.unparse(item.value) if item.value else ""
                if "ClassVar" not in ast.unparse(item.annotation) and "init=False" not in default:
                    signature.arguments[item.target.id] = item.annotation, file


def _find(name: str, file: Path) -> tuple[ast.ClassDef | ast.expr, Path] | None:
    """The class or type alias a name stands for in a file: written there, or imported from another of our files."""
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, file
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value, file
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdtrain."):
            for alias in node.names:
                source = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                if (alias.asname or alias.name) == name and source.is_file():
                    return _find(alias.name, source)
    return None


def _mismatch(annotation: ast.expr | None, file: Path, value: Any) -> str:
    """What the annotation asks for, in words, when `value` certainly does not fit it; else an empty string."""
    options = list(_options(annotation, file))
    fits = [_fits(option, file, value) for option in options]
    return "" if not fits or any(fits) else " or ".join(_words(option) for option in options)


def _options(annotation: ast.expr | None, file: Path) -> Iterator[ast.expr]:
    """The members of a union, of a type alias, or of either written as a string."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    found = _find(annotation.id, file) if isinstance(annotation, ast.Name) else None
    if isinstance(annotation, ast.BinOp):
        yield from _options(annotation.left, file)
        yield from _options(annotation.right, file)
    elif found and isinstance(found[0], ast.expr):
        yield from _options(*found)
    elif annotation is not None:
        yield annotation


def _name(annotation: ast.expr) -> str:
    head = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return ast.unparse(head).split(".")[-1]


def _arguments(annotation: ast.expr) -> list[ast.expr]:
    if not isinstance(annotation, ast.Subscript):
        return []
    inner = annotation.slice
    return list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]


def _fits(annotation: ast.expr, file: Path, value: Any) -> bool:
    name, inner = _name(annotation), _arguments(annotation)
    if name in SIMPLE:
        return isinstance(value, SIMPLE[name]) and (name == "bool" or not isinstance(value, bool))
    if name == "None":
        return value is None
    if name == "Literal":
        return any(isinstance(c, ast.Constant) and c.value == value for c in inner)
    if name in SEQUENCES:
        kinds = [a for a in inner if not (isinstance(a, ast.Constant) and a.value is ...)]
        return isinstance(value, list) and not (len(kinds) == 1 and any(_mismatch(kinds[0], file, v) for v in value))
    if name in MAPPINGS:
        kinds = inner[1:]
        return isinstance(value, dict) and not (kinds and any(_mismatch(kinds[0], file, v) for v in value.values()))
    found = _find(name, file)
    is_part = name == "Module" or (found is not None and "Enum" not in " ".join(ast.unparse(b) for b in found[0].bases))
    return not is_part or (isinstance(value, dict) and "_target_" in value)


def _words(annotation: ast.expr) -> str:
    name = _name(annotation)
    if name == "Literal":
        return "one of " + ", ".join(ast.unparse(choice).strip("'") for choice in _arguments(annotation))
    plain = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Path": "a path"}
    plain |= {"None": "null"} | dict.fromkeys(SEQUENCES, "a list") | dict.fromkeys(MAPPINGS, "a mapping")
    return plain.get(name, f"a part (a node with `_target_`, here a {name})")
