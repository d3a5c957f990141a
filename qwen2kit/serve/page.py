"""The chat page: one HTML file with its own script and style, and nothing from elsewhere."""

from __future__ import annotations

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from starlette.responses import HTMLResponse, Response


def page_response() -> Response:
    """The page, with headers that let exactly its own script and style run."""
    html, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@cache
def _page() -> tuple[str, str]:
    html = files("qwen2kit.serve").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(html: str, tag: str) -> str:
    """The source expression of the one inline element ``tag``."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    assert found is not None
    return "sha256-" + b64encode(sha256(found[1].encode()).digest()).decode()
