"""The page at /: files that the browser runs as they are, a chat and a view of the engine."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

FOLDER = Path(__file__).with_name("page")

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PAGE = {
    "/" if file.name == "index.html" else f"/page/{file.name}": file
    for file in sorted(FOLDER.iterdir())
    if file.suffix in TYPES
}
"""Which file is where. They hold nothing of this server's, and the guard asks for no key."""

HEADERS = {
    # Nothing from elsewhere, nothing written inside the page, and the page in nobody's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # 30 kB, and never a script of one version with the page of another.
    "Cache-Control": "no-store",
}


def page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, file in PAGE.items():
        router.add_api_route(path, _answer(file), methods=["GET"])
    return router


def _answer(file: Path):
    body, kind = file.read_bytes(), f"{TYPES[file.suffix]}; charset=utf-8"

    async def answer() -> Response:
        return Response(body, media_type=kind, headers=HEADERS)

    return answer
