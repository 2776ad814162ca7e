"""The house rules of CONTRIBUTING.md, over the source: what a plea would not hold, a test does."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE_MAX = 120
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_P90 = 30

GENERATED = ("gpuguard/api/v1/",)
BANNED_MODULE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}
# What a class of ours may stand on: data, enums, errors, protocols, and the frameworks' own hooks.
BASES_ALLOWED = {
    "Tried",  # compiled: its fields are what is counted by the row
    "io.RawIOBase",  # what is to be read as a file
    "ABC", "Enum", "IntEnum", "StrEnum", "Exception", "Generic", "NamedTuple", "OSError", "Protocol", "RuntimeError",
    "Struct", "TypedDict", "ValueError", "str", "msgspec.Struct", "NodeVisitor", "ast.NodeVisitor",
}
BASE_SUFFIXES_ALLOWED = ("Servicer", "Group", "Loader", "Thread", "App", "Screen", "Widget", "Static", "Handler")
MACHINE_PATHS = re.compile(r"/work/(?:main|shared)|/root/|/home/(?!one\b|user\b)[a-z]+/|file:///|\.pyenv|/opt/pypi")
REGISTRY_HOSTS = re.compile(r"https?://(?:[\w.-]*\.)?(?:pypi|pythonhosted|npmjs|artifactory|jfrog)\b", re.IGNORECASE)
# Split, so that this line is not found by itself.
LEFT_OVER = re.compile(r"\b(?:TO" + "DO|FIX" + "ME|X" + r"XX|HA" + r"CK)\b")
BINARY = {
    ".png", ".svg", ".gz", ".zst", ".pcap", ".pcapng", ".bin", ".npz", ".npy", ".cubin", ".gpuguard", ".ggr", ".rec",
}
# What only programs outside the package load by name.
ENTRY_POINTS = {"gpuguard", "gpuguard.cli", "gpuguard.lab.soak"}


@cache
def tracked() -> tuple[Path, ...]:
    """Return the files that belong to the project: tracked, or new and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project cannot be listed")
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


@cache
def sources(*folders: str) -> tuple[Path, ...]:
    return tuple(
        path for path in tracked()
        if path.suffix == ".py" and relative(path).startswith(folders) and not relative(path).startswith(GENERATED))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_files() -> list[Path]:
    return [path for path in tracked() if path.suffix not in BINARY and "recordings" not in path.parts]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines the body has, without signature and docstring."""
    body = function.body
    if ast.get_docstring(function):
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def functions() -> list[tuple[str, int]]:
    return [
        (f"{relative(path)}:{node.lineno} {node.name}", body_lines(node))
        for path in sources("gpuguard/", "kernels/")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_functions_are_short():
    measured = functions()
    assert [f"{name}: {lines} lines" for name, lines in measured if lines > FUNCTION_LINES_MAX] == []
    assert statistics.quantiles([lines for _, lines in measured], n=10)[-1] <= FUNCTION_LINES_P90


def test_lines_are_short():
    """Python's lines are ruff's to measure; these are all others'."""
    code = {".pyx", ".pxi", ".pxd", ".c", ".h", ".sh", ".proto", ".cu"}
    long = [
        f"{relative(path)}:{number}"
        for path in text_files() if path.suffix in code and not relative(path).startswith(GENERATED)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > LINE_MAX and "noqa: E501" not in line
    ]
    assert long == []


def test_no_module_is_named_after_nothing():
    assert [relative(path) for path in sources("") if path.stem in BANNED_MODULE_NAMES] == []


def test_there_are_no_base_classes():
    found = [
        f"{relative(path)}:{node.lineno} {node.name}({base})"
        for path in sources("gpuguard/", "kernels/")
        for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)
        for base in map(ast.unparse, node.bases)
        if not allowed_base(base, path)
    ]
    assert found == []


def allowed_base(base: str, path: Path) -> bool:
    plain = base.partition("[")[0]
    if plain in BASES_ALLOWED or plain.endswith(BASE_SUFFIXES_ALLOWED) or plain.endswith(("Error", "Exception")):
        return True
    # An error of ours may be a kind of another error of ours.
    classes = {node.name: node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef)}
    own = classes.get(plain)
    return own is not None and any(ast.unparse(one).endswith(("Exception", "Error")) for one in own.bases)


def test_every_module_says_what_it_is_for():
    silent = [
        relative(path) for path in sources("gpuguard/", "kernels/", "benchmarks/")
        if path.read_text().strip() and not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


def test_public_functions_and_classes_are_documented():
    silent = []
    for path in sources("gpuguard/", "kernels/"):
        for owner in ast.walk(tree_of(path)):
            if not isinstance(owner, ast.Module | ast.ClassDef) or speaks_for_another(owner):
                continue
            silent += [
                f"{relative(path)}:{node.lineno} {node.name}" for node in owner.body
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and not node.name.startswith("_") and not ast.get_docstring(node) and not overloaded(node)
            ]
    assert silent == []


def speaks_for_another(owner: ast.Module | ast.ClassDef) -> bool:
    """Return whether the methods are documented elsewhere: a private class, or a form that a Protocol describes."""
    if not isinstance(owner, ast.ClassDef):
        return False
    hooks = any(ast.unparse(base).endswith(("Servicer", "NodeVisitor", "Handler")) for base in owner.bases)
    return hooks or owner.name.startswith("_") or owner.name in ("Detector", "Sensor")


def overloaded(node: ast.AST) -> bool:
    decorators = [ast.unparse(one) for one in getattr(node, "decorator_list", [])]
    return any(name.endswith(("overload", "override")) for name in decorators)


def test_nothing_speaks_of_one_machine():
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in text_files() if path.name != "test_tidy.py"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATHS.search(line) or REGISTRY_HOSTS.search(line)
    ]
    assert found == []


def test_nothing_is_left_for_later():
    found = [
        f"{relative(path)}:{number}: {line.strip()[:80]}"
        for path in text_files() if path.name != "LICENSE"
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if LEFT_OVER.search(line)
    ]
    assert found == []


def imported_by(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_product_imports_no_tests():
    guilty = [
        f"{relative(path)}: {name}" for path in sources("gpuguard/", "kernels/")
        for name in imported_by(path) if name.partition(".")[0] in ("tests", "benchmarks", "pytest", "hypothesis")
    ]
    assert guilty == []


def test_every_module_is_used():
    """A module is used if something imports it or names it in text, or if its folder is a registry."""
    registries = ("gpuguard.core.detectors.", "gpuguard.sensors.", "gpuguard.broker.actions.", "gpuguard.cli.commands.")
    readers = (*sources("gpuguard/", "benchmarks/", "tests/"), ROOT / "Makefile")
    words = "\n".join(path.read_text() for path in readers)
    imported = set().union(*(imported_by(path) for path in sources("gpuguard/", "kernels/", "benchmarks/")))
    dead = []
    for path in sources("gpuguard/"):
        name = relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name in imported or name in ENTRY_POINTS or name.startswith(registries) or path.stem == "__main__":
            continue
        if any(other.startswith(f"{name}.") for other in imported) or f'"{name}"' in words or f"-m {name}" in words:
            continue
        dead.append(name)
    assert dead == []


def test_the_reference_of_settings_is_that_of_the_program():
    import msgspec

    from gpuguard.config import Config
    from gpuguard.config_sources import all_keys, value_of

    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = [
        f"| `{key}` | `{msgspec.json.encode(value_of(Config(), key)).decode()}` | {kind.__metadata__[0].description} |"
        for key, kind in all_keys().items()
    ]
    assert [row for row in rows if row not in page] == []
    assert len(re.findall(r"^\| `[a-z]+\.", page, flags=re.MULTILINE)) == len(rows)


def test_every_compiled_module_has_a_typed_stub():
    modules = {path.stem for path in (ROOT / "ext").glob("*.pyx")}
    assert {name for name in modules if not (ROOT / "gpuguard" / f"_{name}.pyi").exists()} == set()


def test_every_exemption_of_the_linter_says_why():
    text = (ROOT / "pyproject.toml").read_text()
    ignores = text[text.index("[tool.ruff.lint]"):text.index("[tool.ruff.lint.flake8-builtins]")]
    bare = [line for line in ignores.splitlines() if re.match(r'\s+"[A-Z]+\d*",\s*$', line)]
    assert bare == []
