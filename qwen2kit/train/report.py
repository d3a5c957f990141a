"""``report.html``: a run on one page that can be sent to someone, pictures and recipe inside."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
td,th{{padding:.1em 1em .1em 0;text-align:left}}pre{{background:#f4f4f4;padding:1em}}
img{{max-width:100%}}</style>
<h1>{title}</h1>
<table>{figures}</table>
<img alt="loss, gradient norm, learning rate and speed over the steps" src="{picture}">
<h2>Recipe and versions</h2>
<pre>{provenance}</pre>
</html>
"""


def write_report(
    path: Path, picture: Path, figures: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Write the page.

    Args:
        picture: a PNG, which becomes part of the page.
        figures: name and value of each line of the table; nested ones get a line each.
        provenance: the frozen recipe and versions of ``run.json``.

    Raises:
        OSError: the picture cannot be read or the page not be written.
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in _lines(figures)
    )
    page = _PAGE.format(
        title=escape(path.parent.name),
        figures=rows,
        picture="data:image/png;base64," + b64encode(picture.read_bytes()).decode(),
        provenance=escape(json.dumps(provenance, indent=2, ensure_ascii=False)),
    )
    path.write_text(page, encoding="utf-8")


def _lines(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{name} ")
        elif value is not None:
            lines.append((f"{prefix}{name}".replace("_", " "), str(value)))
    return lines
