"""What an OpenAI-compatible server is asked, and how it says no."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from omniserve.bench.http_names import BACKENDS, CHAT, Backend
from omniserve.bench.load import Job, Refused
from omniserve.errors import ConfigError, OmniServeError

# "No room now", whoever says it: OpenAI and this project 429, vLLM and SGLang 503, Dynamo 529.
REFUSALS = (429, 503, 529)
MAX_RETRY_AFTER_S = 120.0
# Shorter than any server keeps an idle connection (uvicorn: 5 s): one that is closed by the server just as it
# is used again would look like a request that failed.
KEEPALIVE_S = 2.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Extras:
    """What requests of one class carry beside prompt and length. body: fields that overrule all others."""

    service_tier: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Api:
    """One model behind one endpoint of one server, and how to ask it."""

    model: str
    endpoint: str
    is_length_fixed: bool

    def body(self, job: Job, prompt: str, extras: Extras, is_streamed: bool) -> dict[str, Any]:
        """A request as JSON. Greedy, so that what is generated does not depend on chance."""
        is_chat = self.endpoint == CHAT
        body: dict[str, Any] = {"model": self.model, "temperature": 0.0}
        body |= {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
        body["max_completion_tokens" if is_chat else "max_tokens"] = job.num_output
        if is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.is_length_fixed:
            body |= {"ignore_eos": True, "min_tokens": job.num_output}
        if extras.service_tier is not None:
            body["service_tier"] = extras.service_tier
        return body | dict(extras.body)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What /v1/models says of a model.

    root: where its files come from, or its name again; max_model_len: tokens of its context.
    """

    name: str
    backend: Backend
    root: str
    max_model_len: int | None


def make_client(base_url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client that never asks twice, has as many connections as requests and no time limit on answers.

    httpx rather than the `openai` client: that one is httpx too, and builds a validated object of every
    chunk, time that would count as the server's. Bodies are asked for uncompressed, or chunks would wait for
    others. ConfigError for an address that is none.
    """
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base-url: must begin with http:// or https://, got {base_url!r}")
    return httpx.AsyncClient(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
        limits=httpx.Limits(
            max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S
        ),
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        follow_redirects=False,
    )


async def served_model(client: httpx.AsyncClient, name: str | None) -> ServedModel:
    """The model called `name`, or the first one; ConfigError with those that there are."""
    response = await client.get("/v1/models")
    check(response, "/v1/models")
    try:
        models = list(response.json()["data"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            "base-url: /v1/models there is none of OpenAI's; is it the right address?"
        ) from None
    found = [m for m in models if name in (None, m.get("id"))]
    if not found:
        known = ", ".join(str(m.get("id")) for m in models) or "none"
        raise ConfigError(f"model: the server has no {name!r}; it has: {known}")
    entry = found[0]
    owner, length = str(entry.get("owned_by")), entry.get("max_model_len")
    backend: Backend = next((b for b in BACKENDS if b == owner), "openai")
    return ServedModel(
        entry["id"],
        backend,
        str(entry.get("root") or entry["id"]),
        length if isinstance(length, int) else None,
    )


# ---------------------------------------------------------------- how it says no


def check(response: httpx.Response, what: str) -> None:
    """The body must be there. Raises Refused when there is no room now, OmniServeError for any other answer
    than a 2xx."""
    if response.is_success:
        return
    reason = f"{what}: {response.status_code} {error_text(response.content)}"
    if response.status_code in REFUSALS:
        raise Refused(reason, retry_after_s(response.headers))
    raise OmniServeError(reason)


def error_text(body: bytes | Mapping[str, Any]) -> str:
    """Code and message of an error as OpenAI writes them, also without the wrapper; else its beginning."""
    content: Any = body
    if isinstance(body, bytes):
        try:
            content = json.loads(body)
        except ValueError:
            return body[:200].decode("utf-8", errors="replace")
    error = content.get("error", content) if isinstance(content, Mapping) else content
    if not isinstance(error, Mapping):
        return str(error)[:200]
    parts = [str(error[key]) for key in ("code", "message") if error.get(key) is not None]
    return ": ".join(parts)[:200] or str(dict(error))[:200]


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds from `retry-after-ms` or `retry-after`, at most MAX_RETRY_AFTER_S; a date counts as none."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit_s
            if math.isfinite(seconds) and seconds >= 0:
                return min(seconds, MAX_RETRY_AFTER_S)
    return None
