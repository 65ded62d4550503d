"""What the page is told of each thing, as plain data: only what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omniserve.batch.records import BatchRecord
from omniserve.types import ServiceClass

# Characters of what users call their batches; the rest is of no use in a list.
MAX_LABEL = 160


def class_view(
    kind: ServiceClass, snapshot: Mapping[str, Any], running: Mapping[str, Any], tokens_per_s: float | None
) -> dict[str, Any]:
    """A service class: its targets, what became of them, and its requests that run now."""
    targets = None if kind.slo is None else {"ttft_s": kind.slo.ttft_s, "tpot_s": kind.slo.tpot_s}
    return {"targets": targets, "tokens_per_s": tokens_per_s, **snapshot, "running": running}


def engine_view(stats: Mapping[str, Any], busy_share: float | None, age_s: float) -> dict[str, Any]:
    """busy_share: of the host's threads, of late. age_s: since the engine said this."""
    host = {"state": stats["host_state"], "busy_share": busy_share, "num_deaths": stats["host_deaths"]}
    kept = ("policy", "promises_slo", "pages", "requests", "oldest_lane_s")
    return {"age_s": age_s, "host": host, **{name: stats[name] for name in kept}}


def batch_view(batch: BatchRecord, filename: str | None, eta_s: float | None) -> dict[str, Any]:
    """filename: of the input, None when it was deleted. Texts of users stay as they are: the page escapes."""
    label = ", ".join(f"{name}: {value}" for name, value in (batch.metadata or {}).items())
    return {
        "id": batch.id,
        "owner": batch.owner,
        "label": label[:MAX_LABEL],
        "filename": None if filename is None else filename[:MAX_LABEL],
        "status": str(batch.status),
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
        "created_at_s": batch.created_at,
        "expires_at_s": batch.expires_at,
        "ended_at_s": batch.ended_at,
        "eta_s": eta_s,
    }
