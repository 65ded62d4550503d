"""Request traces in the formats of their publishers, and the ones that come with the package."""

from omniserve.bench.traces.read import SHIPPED, read_trace

__all__ = ["SHIPPED", "read_trace"]
