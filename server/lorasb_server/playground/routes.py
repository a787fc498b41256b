"""Serves the playground's files. They hold no secret, so they need no key."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing is loaded from elsewhere or written into the page, and no text ever becomes HTML.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGE = {
    "/" if file.name == "index.html" else f"/playground/{file.name}": file
    for file in files(__package__).joinpath("page").iterdir()
}


def playground_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    def add(path: str, content: bytes, media_type: str) -> None:
        async def show() -> Response:
            return Response(content, media_type=media_type, headers=HEADERS)

        router.add_api_route(path, show, methods=["GET", "HEAD"])

    for path, file in PAGE.items():
        add(path, file.read_bytes(), TYPES[file.name[file.name.rindex(".") :]])
    return router
