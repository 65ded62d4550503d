"""Progress bars of a run against a server. Drawn twice a second: more would disturb what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from omniserve.bench.http_batch import BatchResult
from omniserve.bench.load import Load, Sender

DRAWN_PER_S = 2.0


@contextmanager
def show_progress(
    load: Load, sender: Sender, batch: BatchResult, console: Console
) -> Iterator[Callable[[], None]]:
    """A bar for each class, and one for the batch once there is one; the function yielded brings them up to
    date."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=DRAWN_PER_S) as progress:
        bars = Bars(progress, load)

        def show() -> None:
            bars.show_classes(sender)
            bars.show_batch(batch)

        yield show
        show()


class Bars:
    """What runs in the background has no end of its own, hence a bar without a length."""

    def __init__(self, progress: Progress, load: Load) -> None:
        self._progress = progress
        self._by_class = {
            s.service_class: self._bar(s.service_class, _length(s.arrivals)) for s in load.streams
        }
        beside = [stream.service_class for stream in load.background]
        beside += [load.backlog.service_class] if load.backlog else []
        self._by_class |= {name: self._bar(name, None) for name in beside}
        self._batch = progress.add_task("batch", total=None, visible=False)

    def _bar(self, name: str, total: int | None) -> TaskID:
        return self._progress.add_task(name, total=total, visible=total != 0)

    def show_classes(self, sender: Sender) -> None:
        for name, bar in self._by_class.items():
            ended = {outcome: n for (kind, outcome), n in sender.ended.items() if kind == name}
            lost = sum(n for outcome, n in ended.items() if outcome != "finished")
            words = f"{name}, {lost} lost" if lost else name
            self._progress.update(bar, completed=sum(ended.values()), description=words)

    def show_batch(self, batch: BatchResult) -> None:
        done = batch.counts.get("completed", 0) + batch.counts.get("failed", 0)
        self._progress.update(
            self._batch,
            completed=done,
            total=batch.counts.get("total"),
            description=f"batch, {batch.status}",
            visible=bool(batch.id),
        )


def _length(arrivals: object) -> int | None:
    return len(arrivals) if isinstance(arrivals, Sized) else None
