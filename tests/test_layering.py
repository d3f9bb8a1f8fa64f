"""The shape of the package, checked by reading its source: who imports whom, names, sizes.

The layers are those of docs/architecture.md. Without a check they hold for a month: the first shortcut from the model
to a process group makes the reference semantics depend on the runtime that is tested against them.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import megascale_moe

PACKAGE = "megascale_moe"
ROOT = Path(megascale_moe.__file__).parent

# Each line may import the lines above it; siblings on one line do not import each other.
LAYERS = (
    ("config",),
    ("presets",),
    ("kernels", "comm", "data", "checkpoint"),
    ("model", "engine"),
    ("strategies", "huggingface"),
    ("pipeline", "optim"),
    ("planner",),
    ("train",),
    ("tools", "bench"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
UNBOUND = ("testing", "", "__main__")  # may import everything and be imported by none of the layers; "": the package

BANNED_NAMES = {"util", "utils", "common", "core", "base", "helper", "helpers", "misc", "manager", "experiments"}
FUNCTION_LINES = 80
FILE_LINES = 500
PARAMETERS = 8
"""Of a function, beside self. Triton's kernels have no structures to pass."""
ROOM_SHARE = 0.2
PACKAGE_TOKENS = 180_000
"""Of Python, without comments and line breaks, so that packing lines gains nothing. To be lowered when code goes."""


def modules() -> dict[str, ast.Module]:
    """Dotted name below the package -> source, of every module."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


@pytest.fixture(scope="module")
def parsed() -> dict[str, ast.Module]:
    """The package's modules, for this file alone: the trees take 40 MB."""
    return modules()


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` counts as a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def ours(tree: ast.AST, *, without: str = "") -> Iterator[tuple[int, str]]:
    """(line, layer) of every import of our own package, but of modules whose name ends in `without`."""
    for line, name in imported(tree):
        if without and name.endswith(without):
            continue
        if name == PACKAGE:
            yield line, ""
        elif name.startswith(PACKAGE + "."):
            layer = name.split(".")[1]
            yield line, layer if layer in RANK or layer in UNBOUND else ""


def upward(name: str, tree: ast.Module) -> list[str]:
    """Imports that do not go to a layer above, or stay inside the module's own."""
    layer = name.split(".")[0]
    if layer in UNBOUND:
        return []
    if layer not in RANK:
        return [f"{name}: belongs to no layer; add {layer!r} to LAYERS or move it into one"]
    return [
        f"{name}:{line} imports {other or PACKAGE}"
        for line, other in ours(tree)
        if other != layer and RANK.get(other, len(LAYERS)) >= RANK[layer]
    ]


def relative(name: str, tree: ast.Module) -> list[str]:
    """Imports with dots: they hide which layer is meant."""
    return [f"{name}:{line} imports {other}" for line, other in imported(tree) if other.startswith(".")]


def hidden(name: str, tree: ast.Module) -> list[str]:
    """Imports of our package inside functions, but for kernels in Triton, which is optional."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{name}:{line}" for function in functions for line, _ in ours(function, without="_triton")]


def distributed(name: str, tree: ast.Module) -> list[str]:
    """Ways from the model to other ranks."""
    if name.split(".")[0] != "model":
        return []
    banned = ("torch.distributed", f"{PACKAGE}.comm")
    found = [f"{name}:{line} imports {other}" for line, other in imported(tree) if other.startswith(banned)]
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "distributed")
    return found + [f"{name}:{node.lineno} uses .distributed" for node in attributes]


def badly_named(name: str, tree: ast.Module) -> list[str]:
    """Names that say nothing about what is inside, and so collect everything."""
    return [f"{name}: {part}" for part in name.split(".") if part.strip("_") in BANNED_NAMES]


def too_long(name: str, tree: ast.Module) -> list[str]:
    """Functions nobody reads in one go."""
    sizes = {
        f"{name}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return [f"{function} has {lines} lines" for function, lines in sizes.items() if lines > FUNCTION_LINES]


def too_many_parameters(name: str, tree: ast.Module) -> list[str]:
    """Functions whose parameters belong together in some structure."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not compiled(node):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(each.arg not in ("self", "cls") for each in given)
            if count > PARAMETERS:
                found.append(f"{name}:{node.lineno} {node.name} has {count} parameters")
    return found


def compiled(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it."""
    return any(ast.unparse(each) == "triton.jit" for each in function.decorator_list)


def undocumented(name: str, tree: ast.Module) -> list[str]:
    """Modules with code that do not say what they are for."""
    return [f"{name}: no module docstring"] if tree.body and ast.get_docstring(tree) is None else []


Rule = Callable[[str, ast.Module], list[str]]
RULES: tuple[Rule, ...] = (
    upward, relative, hidden, distributed, badly_named, too_long, too_many_parameters, undocumented,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_every_module_keeps_the_rule(parsed: dict[str, ast.Module], rule: Rule) -> None:
    assert [problem for name, tree in parsed.items() for problem in rule(name, tree)] == []


def test_no_file_is_too_long() -> None:
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_one_word_for_one_thing(parsed: dict[str, ast.Module]) -> None:
    """No two public classes have the same name."""
    places = defaultdict(list)
    for name, tree in parsed.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_package_and_its_rooms_stay_small() -> None:
    sizes: Counter[str] = Counter()
    for path in ROOT.rglob("*.py"):
        sizes[path.relative_to(ROOT).parts[0]] += tokens(path.read_text(encoding="utf-8"))
    assert sizes.total() <= PACKAGE_TOKENS
    assert {room: size for room, size in sizes.items() if size > ROOM_SHARE * sizes.total()} == {}


def tokens(source: str) -> int:
    """Return how many tokens a file has that mean something."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    return sum(token.type not in silent for token in tokenize.generate_tokens(io.StringIO(source).readline))


def test_tokens_are_counted_whatever_the_lines() -> None:
    assert tokens("x = f(1)  # why\n") == tokens("x = (\n    f(1)\n)") - 2 == 6


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (upward, "model.block", "from megascale_moe.engine.op import Op"),
        (upward, "engine.op", "import megascale_moe.model.counts"),
        (upward, "config", "from megascale_moe import presets"),
        (upward, "train.loop", "import megascale_moe"),
        (upward, "train.loop", "from megascale_moe import __version__"),
        (upward, "train.loop", "from megascale_moe.testing import run_ranks"),
        (upward, "planner.search", "def f():\n    from megascale_moe.train import loop"),
        (upward, "novelty", ""),
        (upward, "train.loop", "import importlib\nimportlib.import_module('megascale_moe.tools.report')"),
        (upward, "engine.op", "__import__('megascale_moe.model.counts')"),
        (upward, "tools.plan", "from megascale_moe.bench import overlap"),
        (relative, "train.loop", "from .data import batch"),
        (hidden, "train.loop", "def f():\n    from megascale_moe.config import Config"),
        (hidden, "train.loop", "def f():\n    importlib.import_module('megascale_moe.config')"),
        (distributed, "model.block", "import torch.distributed as dist"),
        (distributed, "model.block", "from torch import distributed"),
        (distributed, "model.block", "import torch\ntorch.distributed.barrier()"),
        (distributed, "model.block", "from megascale_moe.comm.axis import Axis"),
        (badly_named, "train.utils", ""),
        (badly_named, "core.op", ""),
        (too_long, "train.loop", "def f():\n" + "    pass\n" * FUNCTION_LINES),
        (too_many_parameters, "train.loop", "def f(self, a, b, c, d, e, *, g, h, i, j): pass"),
        (undocumented, "train.loop", "x = 1"),
    ],
)
def test_the_rule_catches(rule: Rule, name: str, source: str) -> None:
    assert rule(name, ast.parse(source)) != []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (upward, "model.block", "from megascale_moe.kernels import norm\nfrom megascale_moe.model import router"),
        (upward, "testing", "from megascale_moe.cli import main"),
        (upward, "planner.cost", "from megascale_moe import presets"),
        (hidden, "train.loop", "def f():\n    import datasets"),
        (distributed, "comm.axis", "import torch.distributed as dist"),
        (badly_named, "strategies.basement", ""),
        (too_long, "train.loop", "def f():\n" + "    pass\n" * (FUNCTION_LINES - 1)),
        (too_many_parameters, "train.loop", "def f(self, a, b, c, d, e, *, g, h, i): pass"),
        (too_many_parameters, "kernels.narrow", "@triton.jit\ndef f(a, b, c, d, e, g, h, i, j): pass"),
    ],
)
def test_the_rule_allows(rule: Rule, name: str, source: str) -> None:
    assert rule(name, ast.parse(source)) == []
