"""Does the kernel gain as much from more cores as a plain read of memory does?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from omniserve.bench.host import Case, HostBench, OurReader
from omniserve.bench.measure import Rounds, Spread

ROUNDS = 11


def scaling_cases(bench: HostBench) -> Iterator[Case]:
    """8 lanes at context 4096, on all cores; nothing to compare on a single one."""
    threads = max(bench.sweep.threads)
    if threads == 1:
        return
    for dtype in bench.sweep.dtypes:
        for group in bench.sweep.groups:
            yield Case(dtype, group, 128, 4096, 8, threads)
        yield Case(dtype, 3, 64, 4096, 8, threads)


@dataclass(frozen=True, slots=True)
class ScalingResult:
    """`rounds`: GB/s of "ours", "stream", "ours_alone", "stream_alone", the latter two on one thread."""

    case: Case
    rounds: Rounds

    def as_dict(self) -> dict[str, Any]:
        ours, stream = self.rounds.ratio("ours", "ours_alone"), self.rounds.ratio("stream", "stream_alone")
        s = self.rounds.samples
        readers = zip(s["ours"], s["ours_alone"], s["stream"], s["stream_alone"], strict=True)
        over = [(all_ours / one) / (all_stream / alone) for all_ours, one, all_stream, alone in readers]
        return {
            **asdict(self.case),
            "ours": ours.as_dict(),
            "stream": stream.as_dict(),
            "ours_over_stream": Spread(over).as_dict(),
        }


def measure_scaling(case: Case, bench: HostBench) -> ScalingResult:
    bench.fill(case)
    alone = replace(case, threads=1)
    ours = OurReader(case, bench.arena, bench.team(case.threads))
    ours_alone = OurReader(alone, bench.arena, bench.team(1))
    rounds, single = Rounds(), Rounds()
    for _ in range(ROUNDS):
        bench.read_between_streams(rounds, case.threads, "ours", lambda: bench.rate(ours, case))
        bench.read_between_streams(single, 1, "ours", lambda: bench.rate(ours_alone, alone))
    for name, values in single.samples.items():
        rounds.samples[f"{name}_alone"] = values
    return ScalingResult(case, rounds)
