"""/dashboard: the live page, and what it asks every two seconds."""

# No deferred annotations here: FastAPI reads those of routes that are made inside a function.
import base64
import hashlib
import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import HTMLResponse, Response

from omniserve.server.answers import JsonBody
from omniserve.server.dashboard.watch import Watch

PAGE = Path(__file__).parent / "dashboard" / "page.html"
# Should a name that a user chose ever get past the page's own care, nothing runs it, and there is no place to
# send anything to. Nobody puts the page into a frame.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
DATA_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


def page_headers(page: str) -> dict[str, str]:
    """Only the page's own script and style run."""
    policy = POLICY.format(script=_hash_of(page, "script"), style=_hash_of(page, "style"))
    return DATA_HEADERS | {"content-security-policy": policy, "referrer-policy": "no-referrer"}


def _hash_of(page: str, tag: str) -> str:
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def dashboard_router(watch: Watch) -> APIRouter:
    """Who may come here is the gate's affair."""
    router = APIRouter(tags=["dashboard"])
    page = PAGE.read_text()
    headers = page_headers(page)

    @router.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> Response:
        """The live page. It asks for the admin key where one is set."""
        return HTMLResponse(page, headers=headers)

    @router.get("/dashboard/data")
    async def data(since: Annotated[float, Query(allow_inf_nan=False)] = 0.0) -> JsonBody:
        """State, and the history later than `since` (seconds since the epoch, as in an earlier answer)."""
        return JsonBody(watch.data(since), headers=DATA_HEADERS)

    return router
