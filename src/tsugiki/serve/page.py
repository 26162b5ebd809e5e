"""The page as it is sent: one file, and a policy under which only its own script and style run."""
from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from starlette.responses import HTMLResponse

from tsugiki.serve.auth import Keys


@dataclass(frozen=True)
class Page:
    """The HTML holds no secret: without a key it is sent too, with status 401, and asks for one."""

    html: str
    policy: str

    def response(self, status: int) -> HTMLResponse:
        headers = {"Content-Security-Policy": self.policy, "Cache-Control": "no-store"}
        return HTMLResponse(self.html, status, headers=headers | ({"WWW-Authenticate": "Bearer"} if status == 401 else {}))


def load(keys: Keys) -> Page:
    html = (files("tsugiki.serve") / "page.html").read_text(encoding="utf-8")
    html = html.replace('data-key="none"', 'data-key="wanted"') if keys.user else html
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    return Page(html, f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
                      "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _hash(html: str, tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
