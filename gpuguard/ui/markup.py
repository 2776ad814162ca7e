"""HTML and SVG by small functions: what is not markup already is escaped, by construction.

Names, arguments and addresses on a page come from whoever is accused there. So a plain string can never become markup:
only `tag` makes `Markup`, and every string that it is given is escaped, control and direction characters made visible.
"""

from __future__ import annotations

import html
from typing import Final

VOID: Final = frozenset({"meta", "br", "hr", "col"})
#: Shapes of SVG: what is in none needs no end.
SHAPES: Final = frozenset({"rect", "path"})


class Markup(str):
    """Text that is markup: made by `tag`, or by a file of this package."""

    __slots__ = ()


def visible(text: str) -> str:
    r"""Return ``text`` with every character that hides, breaks or reorders it written out as \\xNN or \\uNNNN.

    Format characters reorder or hide text (Trojan Source, CVE-2021-42574); surrogates cannot be written at all.
    """
    return "".join(character if character.isprintable() else _written_out(character) for character in text)


def escape(text: str) -> Markup:
    """Return ``text`` as markup that shows it."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(text), quote=True))


def join(*children: str | None) -> Markup:
    """Return the children one after the other; None is nothing."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """Return an element. ``class_`` is class, ``font_size`` is font-size; an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items() if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    if name in SHAPES:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def _number(value: str | float) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
