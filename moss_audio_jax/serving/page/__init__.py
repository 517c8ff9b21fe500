"""Page for a browser: a clip, questions about it, and answers with times on its waveform.

Files are served as they are: no build step, and nothing from other hosts. vendor/README.md says where wavesurfer.js is
from.
"""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from moss_audio_jax.timelines.prompts import PROMPTS

FOLDER = Path(__file__).parent
# Said here, as some machines' tables have another type for .js, with which browsers refuse modules.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
EXAMPLES = {
    "Sentences with times": PROMPTS["sentences"],
    "Words with times": PROMPTS["words"],
    "Who says what": PROMPTS["speakers"],
    "Sounds with times": PROMPTS["events"],
    "Describe it": "Describe this audio in detail.",
    "Speech, sound or music?": "Is there speech, sound or music in this audio?",
}
HEADERS = {
    "Cache-Control": "no-cache",  # asks each time whether a file is new, so that an update of the package shows
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# wavesurfer.js writes one style sheet of its own; the nonce lets in that one. Clips that were made here are blobs.
POLICY = (
    "default-src 'self'; style-src 'self' 'nonce-{nonce}'; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def page_routes() -> list[BaseRoute]:
    """Returns the routes of the page, `/` and `/page/...`: they need no key and read nothing outside this folder."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    return [
        Route("/", _index),
        Route("/page/examples.json", _examples),
        *(Route(f"/page/{path.relative_to(FOLDER).as_posix()}", _file(path)) for path in paths),
    ]


async def _index(request: Request) -> Response:
    nonce = secrets.token_urlsafe(16)
    text = (FOLDER / "index.html").read_text("utf-8").replace("STYLE_NONCE", nonce)
    return HTMLResponse(text, headers={**HEADERS, "Content-Security-Policy": POLICY.format(nonce=nonce)})


async def _examples(request: Request) -> Response:
    return JSONResponse([{"name": name, "prompt": prompt} for name, prompt in EXAMPLES.items()], headers=HEADERS)


def _file(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)

    return send
