"""`counted.py LOG ...`: the `omniserve` command; each request that an engine takes is a line of LOG, its id.

The engine knows requests by numbers of its own, so what goes in is written down at its door, when it is in.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from omniserve import cli
from omniserve.engine.client import EngineClient
from omniserve.server.gate import current_request_id


def count(log: int) -> None:
    add = EngineClient.add

    def counted(self: EngineClient, *arguments: Any, **options: Any) -> int:
        number = add(self, *arguments, **options)
        os.write(log, f"{current_request_id.get()}\n".encode())
        return number

    EngineClient.add = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    count(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    sys.exit(cli.main(sys.argv[2:]))
