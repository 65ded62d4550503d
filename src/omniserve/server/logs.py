"""Log lines that carry the id of the request they are about."""

from __future__ import annotations

import logging

from omniserve.server.gate import current_request_id

FORMAT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


class _WithRequestId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = current_request_id.get()
        return True


def set_up_logs(level: str) -> None:
    """Everything to standard error, from `level` ("debug", "info", ...) on."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(_WithRequestId())
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    for name in ("omniserve", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())
