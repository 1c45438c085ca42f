"""The page at /raee: files of this package, the same for everybody on every server.

They are open where `--api-key` guards the rest, for a browser cannot send a key with an address
that was typed. They know nothing of this server: what the page shows it asks for as any client
does, with the key that is typed into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from starlette.responses import RedirectResponse, Response

from raee_serve.server.access import Access
from raee_serve.server.options import MethodError, RequestError, shown

PAGE = "/raee"
"""Its other files are one level below, and it calls /v1/ and /metrics beside it: all by relative
addresses, so that it also works behind a --root-path."""

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    # Nothing but these files and this server's own API; and no text ever becomes markup or code.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cache-control": "no-cache",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def is_page(path: str) -> bool:
    return path == PAGE or path.startswith(f"{PAGE}/")


def page_file(access: Access, path: str, method: str) -> Response:
    """The file at a path of the page. Raises RequestError if it is off or has no such file."""
    file = FILES.get(path)
    if not access.allows("page") or (file is None and path != f"{PAGE}/"):
        raise RequestError(None, f"there is no {shown(path)} here", HTTPStatus.NOT_FOUND)
    if method not in ("GET", "HEAD"):
        raise MethodError("GET, HEAD")
    if file is None:
        return RedirectResponse(f"..{PAGE}", headers=HEADERS)
    return Response(file.read_bytes(), media_type=MEDIA_TYPES[file.suffix], headers=HEADERS)


def _files(folder: Path) -> Mapping[str, Path]:
    """By path: the page itself and what it loads."""
    files = {f"{PAGE}/{file.name}": file for file in folder.iterdir()}
    return files | {PAGE: files.pop(f"{PAGE}/index.html")}


FILES = _files(Path(__file__).with_name("page_files"))
