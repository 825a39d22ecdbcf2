"""The page at `/`: a few static files that ask the API with the visitor's key. They contain no data, so they need no key.

The policy allows a browser to load nothing but these files, and to send nothing anywhere but to this server. A text that a
model or a registry contains is written as text, so it cannot become part of the page.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import FastAPI, Request, Response

from ptuning.serving.auth import Scope, is_loopback
from ptuning.serving.http_request import unknown_route
from ptuning.settings.running import ServeConfig

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
PLACE = "/page"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # another version of ptuning brings others
}


def is_shown(limits: ServeConfig, keys: dict[str, Scope]) -> bool:
    """Whether the page is there. On an address that other machines can reach it is only there with keys."""
    return bool(keys) or is_loopback(limits.host)


@cache
def files() -> dict[str, bytes]:
    """The files of the page by name."""
    return {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}


def add_page(app: FastAPI, limits: ServeConfig, keys: dict[str, Scope]) -> None:
    """Add the routes of the page, if it is shown."""
    if not is_shown(limits, keys):
        return

    async def index() -> Response:
        return _file("index.html")

    async def file(name: str, request: Request) -> Response:
        if name not in files():  # only names of a fixed list: no path is made of what is asked
            return unknown_route(request.url.path, {}).response()
        return _file(name)

    app.get("/", include_in_schema=False)(index)
    app.get(f"{PLACE}/{{name}}", include_in_schema=False)(file)


def _file(name: str) -> Response:
    return Response(files()[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)
