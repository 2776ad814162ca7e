"""What the documents promise is there: files that they link, commands and names that they show."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import gpuguard
from gpuguard.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """Return what a link may lead to within a page: its headings, in small letters, with dashes for spaces."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_sections(page):
    links = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text())
    targets = [(page.parent / name if name else page, anchor) for name, anchor in links]
    assert [(target.name, anchor) for target, anchor in targets if anchor not in anchors(target)] == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_that_are_shown_exist(page):
    shown = set(re.findall(r"(?:^|`|bin/)gpuguard ([a-z][a-z-]+)", page.read_text(), flags=re.MULTILINE))
    commands = main.list_commands(None)
    assert shown - {*commands} == set()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_targets_of_make_that_are_shown_exist(page):
    targets = set(re.findall(r"^([a-z%-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), flags=re.MULTILINE))
    assert {name for name in shown if name not in targets and not name.startswith("bench-")} == set()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_that_is_shown_uses_names_that_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gpuguard":
                assert node.attr in gpuguard.__all__
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_public_name_is_there():
    for name in gpuguard.__all__:
        assert getattr(gpuguard, name) is not None
    assert dir(gpuguard) == sorted(gpuguard.__all__)
    with pytest.raises(AttributeError, match="no attribute 'guard_all'"):
        _ = gpuguard.guard_all

