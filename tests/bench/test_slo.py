"""bench-slo on a scripted machine: what is measured, what it is compared with, and what the verdicts say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from omniserve.bench import slo, slo_run, slo_variants
from omniserve.bench.attainment import Record
from omniserve.bench.slo import main
from omniserve.bench.slo_placement import Spot, placement_verdict
from omniserve.bench.slo_run import Result, Timing, Traffic, Trial
from omniserve.bench.slo_setup import Memory
from omniserve.bench.slo_variants import (
    POLICIES,
    Variant,
    check_policies,
    device_rows,
    engine_settings,
    tunings,
    variants,
)
from omniserve.bench.slo_verdict import Cell, judge
from omniserve.bench.workloads import SHAREGPT, Arrival, BatchJobs
from omniserve.config import CpuSplit
from omniserve.errors import OmniServeError
from omniserve.machine import CpuBudget
from omniserve.types import SLO

LS, BE = "latency_sensitive", "best_effort"
PAGE_BYTES = 1024


# ---------------------------------------------------------------- a machine that obeys a script


@dataclass
class Machine:
    """Runs trials in no time: TTFT by policy, batch tokens/s by where they decode.

    LS alone: TTFT 0.1 s, TPOT 0.01 s, 10 pages. saturated: 100 tokens/s.
    """

    ttft_s: dict[str, float] = field(default_factory=dict)
    be_rate: Callable[[Trial], float] = lambda trial: 10.0
    trials: list[Trial] = field(default_factory=list)
    durations_s: list[float] = field(default_factory=list)

    def __call__(
        self, trial: Trial, timing: Timing, traffic: Traffic, depth: int, model: str, on_tick: Any
    ) -> Result:
        self.trials.append(trial)
        self.durations_s.append(timing.duration_s)
        on_tick(timing.total_s)
        result = Result(trial, timing, engine_settings(trial.variant, trial.device_memory_bytes, trial.slo))
        result.pages = [10] * 20
        result.device_pages = (trial.device_memory_bytes or 100 * PAGE_BYTES) // PAGE_BYTES
        if trial.saturated:
            result.records.append(spread(LS, timing, 100.0))
        for arrival in trial.sent(traffic, timing):
            result.records.append(self._chat(trial, arrival))
        if trial.jobs is not None:
            result.records.append(spread(BE, timing, self.be_rate(trial)))
        return result

    def _chat(self, trial: Trial, arrival: Arrival) -> Record:
        ttft_s = self.ttft_s.get(trial.variant.policy, 0.1) if trial.jobs else 0.1
        if trial.variant.admits_all and trial.arrivals is None:
            ttft_s = 5.0
        first_s = arrival.at_s + ttft_s
        return Record(LS, arrival.at_s, 8, 3, arrival.at_s, [first_s, first_s + 0.01], "finished")


def spread(kind: str, timing: Timing, rate: float) -> Record:
    """One endless request that gets `rate` tokens in every second of the window."""
    count = round(rate * timing.duration_s)
    step_s = timing.duration_s / max(1, count)
    return Record(kind, 0.0, 8, 10**6, 0.0, [timing.warmup_s + (i + 0.5) * step_s for i in range(count)])


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slo, "available_cpus", lambda: CpuBudget(2, (0, 1)))
    monkeypatch.setattr(slo, "split_with_targets", lambda _: CpuSplit(1, 1, (0,), (1,)))


SMALL = ["--duration", "60", "--seeds", "0", "1", "--slo-factors", "1.5", "2", "--memory-factors", "4"]
QUICK = [*SMALL, "--no-tune"]


def bench(machine: Machine, tmp_path: Path, *flags: str) -> dict[str, Any]:
    path = tmp_path / "new" / "slo.json"
    flags = (*QUICK, "--be-context", "64", "4096", "--json", str(path), *flags)
    assert main(list(flags), run=machine) == 0
    report = json.loads(path.read_text())
    assert isinstance(report, dict)
    return report


# ---------------------------------------------------------------- the set-up


def test_rate_targets_and_memory_come_from_the_reference(tmp_path: Path) -> None:
    machine = Machine()
    report = bench(machine, tmp_path)
    setup = report["setup"]
    # 100 tokens/s over a mean output of 338 / 4 tokens, and half of that.
    assert setup["capacity"] == pytest.approx(100 / 84.5)
    assert setup["rate"] == pytest.approx(50 / 84.5)
    assert (setup["ttft_p95_s"], setup["tpot_p95_s"]) == pytest.approx((0.1, 0.01))
    table = report["slo"]["tables"][0]
    assert table["slo"] == pytest.approx({"ttft_s": 0.15, "tpot_s": 0.015})
    assert table["device_tokens"] == 4 * 10 * 16
    assert table["contexts"]["used"] == [64, 640]  # 4k contexts do not fit such a device
    mixed = [t for t in machine.trials if t.jobs and t.rate]
    assert {t.device_memory_bytes for t in mixed} == {4 * 10 * PAGE_BYTES}


def test_everybody_gets_the_same_arrivals_and_jobs_and_nobody_always_goes_first(tmp_path: Path) -> None:
    machine = Machine()
    bench(machine, tmp_path)
    mixed = [t for t in machine.trials if t.device_memory_bytes == 40 * PAGE_BYTES]
    assert len({(t.rate, t.jobs) for t in mixed if t.jobs}) == 1
    by_seed = [[t.variant.name for t in mixed if t.seed == seed] for seed in (0, 1)]
    assert sorted(by_seed[0]) == sorted(by_seed[1])
    assert by_seed[0][0] != by_seed[1][0]
    alone = [t for t in mixed if t.jobs is None]
    assert {t.variant.policy for t in alone} == {"ls_only"}


def test_policies_that_heed_targets_run_once_for_each_and_the_others_once(tmp_path: Path) -> None:
    machine = Machine()
    bench(machine, tmp_path)
    told = [(t.variant.policy, t.slo.ttft_s if t.slo else None) for t in machine.trials if t.jobs and t.rate]
    for policy in ("omniserve", "paper"):
        assert sorted(s for p, s in told if p == policy if s) == pytest.approx([0.15, 0.15, 0.2, 0.2])
    assert {s for p, s in told if p in ("sarathi", "vllm_priority", "llumnix")} == {None}


def test_a_device_too_small_for_the_shortest_job_is_refused_with_the_way_out() -> None:
    with pytest.raises(OmniServeError, match=r"256 tokens, exceed the 100 tokens .* lower --be-context"):
        Memory(1.25, 1, 100).fit(BatchJobs(256, 4096))


def test_how_many_batch_contexts_were_cut_and_to_what_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of contexts spread log-uniformly from 64 to 4096, a third end above 1024."""
    for scenario in ("slo", "arrival", "overload"):
        flags = ("--memory-factors", "6.4", "--scenario", scenario)
        report = bench(Machine(), tmp_path, *flags)[scenario]
        found = report["tables"][0] if scenario == "slo" else report
        assert found["contexts"]["asked"] == [64, 4096]
        assert found["contexts"]["used"] == [64, 1024]
        assert found["contexts"]["share_too_long"] == pytest.approx(1 / 3)
        printed = " ".join(capsys.readouterr().out.split())
        assert "BE context 64 to 1024, CUT from 64 to 4096: 33.3 % of those asked for exceed" in printed


def test_contexts_that_all_fit_are_not_called_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--memory-factors", "40", "--policies", "sarathi")
    contexts = bench(Machine(), tmp_path, *flags)["slo"]["tables"][0]["contexts"]
    assert contexts == {"asked": [64, 4096], "used": [64, 4096], "share_too_long": 0.0}
    printed = capsys.readouterr().out
    assert "BE context 64 to 4096;" in " ".join(printed.split())
    assert "CUT" not in printed


def test_the_share_of_longer_jobs_is_that_of_the_jobs_drawn() -> None:
    jobs = BatchJobs(64, 4096)
    drawn = [p + o for (p, o), _ in zip(jobs.draw(0), range(4000), strict=False)]
    for tokens in (50, 100, 700, 4096):
        share = sum(context > tokens for context in drawn) / len(drawn)
        assert jobs.share_longer(tokens) == pytest.approx(share, abs=0.03)


def test_too_few_requests_for_a_percentile_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--rate", "0.01", "--json", str(tmp_path / "x.json")], run=Machine()) == 1
    assert "needed for a 95th percentile; raise --duration" in capsys.readouterr().err


def test_an_unknown_policy_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--policies", "fifo"], run=Machine()) == 2
    assert "unknown fifo; known policies: omniserve" in capsys.readouterr().err


# ---------------------------------------------------------------- who competes


def test_targets_and_admission_go_to_those_that_heed_them_alone() -> None:
    slo = SLO(1.0, 0.1)
    ours, sarathi = (Variant(p, 1, "auto") for p in ("omniserve", "sarathi"))
    settings = engine_settings(ours, 5000, slo)
    assert settings["classes"][0].slo == slo
    assert settings["classes"][1].best_effort
    assert (settings["admission"], settings["device_memory_bytes"]) == ("on", 5000)
    assert engine_settings(replace(ours, admits_all=True), None, slo)["admission"] == "off"
    assert engine_settings(sarathi, None, slo)["admission"] == "off"
    assert "classes" not in engine_settings(sarathi, None, slo)


def test_only_baselines_without_host_attention_get_all_cores_as_well() -> None:
    names = [v.name for v in variants(POLICIES, CpuSplit(1, 1, (), ()), all_threads=2)]
    assert [n for n in names if "2 threads" in n] == [
        f"{p}, 2 threads" for p in ("sarathi", "vllm_priority", "llumnix")
    ]
    assert len(names) == len(set(names)) == len(POLICIES) + 3


def test_where_ours_shares_all_cores_nobody_runs_twice() -> None:
    found = variants(POLICIES, CpuSplit(2, 2, (), ()), all_threads=2)
    assert [v.policy for v in found] == list(POLICIES)
    threads = {v.policy: engine_settings(v, None, None)["host_threads"] for v in found}
    assert threads == {p: 2 if p in ("omniserve", "paper") else None for p in POLICIES}


def test_ours_and_the_reference_always_run() -> None:
    assert check_policies(["sarathi"]) == ["omniserve", "ls_only", "sarathi"]


def test_baselines_run_with_their_best_tunables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch tokens/s rise with the token budget; above 64 the targets are missed."""

    class Tunable(Machine):
        def _chat(self, trial: Trial, arrival: Arrival) -> Record:
            record = super()._chat(trial, arrival)
            if dict(trial.variant.extra).get("max_num_batched_tokens", 0) > 64:
                record.token_s = [t + 3 for t in record.token_s]
            return record

    monkeypatch.setitem(slo_variants.TUNABLES, "sarathi", {"max_num_batched_tokens": (32, 64, 128)})
    machine = Tunable(be_rate=lambda t: float(dict(t.variant.extra).get("max_num_batched_tokens", 1)))
    path = tmp_path / "slo.json"
    flags = [*SMALL, "--policies", "sarathi", "--be-context", "64", "512", "--json", str(path)]
    assert main(flags, run=machine) == 0
    report = json.loads(path.read_text())["slo"]
    tuned = report["tuned"]["sarathi, 1 thread"]
    assert tuned["chosen"] == {"max_num_batched_tokens": 64}
    assert [t["be_tokens_per_s"] for t in tuned["tried"]] == [32.0, 64.0, 128.0]
    runs = [r for r in report["runs"] if r["variant"].startswith("sarathi")]
    assert {r["settings"]["max_num_batched_tokens"] for r in runs} == {64}
    # The capacity, the six tuning runs and the reference beside them are brief, all others whole.
    assert (machine.durations_s.count(30.0), set(machine.durations_s)) == (8, {30.0, 60.0})


@pytest.mark.parametrize(("late", "chosen", "holds"), [(0.1, 64, True), (0.0, 32, False)])
def test_settings_are_judged_by_what_the_reference_reaches(
    late: float, chosen: int, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The reference misses as many as the middle setting, of three that all miss some: with as many batch
    tokens as that one makes it is the best. Beside a reference that misses none, the one nearest to it is."""
    share = {32: 0.05, 64: 0.1, 128: 0.3}

    class Late(Machine):
        def _chat(self, trial: Trial, arrival: Arrival) -> Record:
            record = super()._chat(trial, arrival)
            is_tried = trial.device_memory_bytes == 40 * PAGE_BYTES
            missed = share.get(dict(trial.variant.extra).get("max_num_batched_tokens", 0), late)
            if is_tried and round(1e3 * arrival.at_s) % 1000 < 1000 * missed:
                record.token_s = [t + 3 for t in record.token_s]
            return record

    monkeypatch.setitem(slo_variants.TUNABLES, "sarathi", {"max_num_batched_tokens": (32, 64, 128)})
    machine = Late(be_rate=lambda t: float(dict(t.variant.extra).get("max_num_batched_tokens", 1)))
    flags = [*SMALL, "--rate", "20", "--policies", "sarathi", "--be-context", "64", "512"]
    path = tmp_path / "slo.json"
    assert main([*flags, "--json", str(path)], run=machine) == 0
    tuned = json.loads(path.read_text())["slo"]["tuned"]["sarathi, 1 thread"]
    assert tuned["reference_offered"] == pytest.approx(1 - late, abs=0.03)
    assert (tuned["chosen"], tuned["holds"]) == ({"max_num_batched_tokens": chosen}, holds)
    assert ("none holds, this one is nearest" in capsys.readouterr().out) is not holds


def test_token_budgets_are_swept_as_far_as_ours_goes() -> None:
    ours = engine_settings(Variant("omniserve", 1, "auto"), None, SLO(1.0, 0.1))
    for policy in ("sarathi", "vllm_priority", "llumnix"):
        tried = [dict(v.extra)["max_num_batched_tokens"] for v in tunings(Variant(policy, 1, "never"))]
        assert sorted(set(tried)) == [64, 128, 256]
        assert max(tried) == device_rows(ours)


def test_a_baseline_that_is_not_tuned_says_what_it_runs_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = bench(Machine(), tmp_path, "--policies", "sarathi", "llumnix")["slo"]
    assert report["untuned"]["sarathi, 1 thread"] == {"max_num_batched_tokens": 64}
    assert report["untuned"]["llumnix, 2 threads"] == {"max_num_batched_tokens": 64, "watermark": 0.1}
    told = {r["settings"]["max_num_batched_tokens"] for r in report["runs"] if r["variant"].startswith("sar")}
    assert told == {64}
    rows = {row["policy"]: row["device_rows"] for row in report["tables"][0]["rows"]}
    assert rows == {"omniserve": 256, "ls_only": 64, "sarathi": 64, "llumnix": 64}
    assert "sarathi, 1 thread: not tuned, {'max_num_batched_tokens': 64}" in capsys.readouterr().out


def test_a_variant_without_tunables_is_its_own_only_tuning() -> None:
    ours = Variant("omniserve", 1, "auto")
    assert tunings(ours) == [ours]


# ---------------------------------------------------------------- verdicts


def cell(policy: str, offered: float, be: float, name: str = "") -> Cell:
    is_baseline = policy in slo_variants.BASELINES
    return Cell(name or policy, policy, is_baseline, (offered,), (offered,), (be,), (1.0,))


def test_ours_is_measured_by_the_best_baseline_that_holds_the_targets() -> None:
    cells = [
        cell("omniserve", 0.985, 60.0),
        cell("ls_only", 0.99, 0.0),
        cell("llumnix", 0.98, 30.0),
        cell("sarathi", 0.981, 40.0),
        cell("vllm_priority", 0.70, 90.0),  # many tokens, targets missed: does not count
    ]
    found = judge(cells)
    assert found.within_point
    assert (found.best_baseline, found.be_ratio) == ("sarathi", 1.5)
    assert (found.hardest, found.too_easy) == (0.70, False)


def test_more_than_a_point_below_the_reference_is_not_held() -> None:
    assert judge([cell("omniserve", 0.98, 1.0), cell("ls_only", 0.99, 0.0)]).within_point
    assert not judge([cell("omniserve", 0.979, 1.0), cell("ls_only", 0.99, 0.0)]).within_point


def test_a_load_that_every_baseline_bears_is_too_easy() -> None:
    cells = [cell("omniserve", 1.0, 9.0), cell("ls_only", 1.0, 0.0), cell("sarathi", 0.8, 9.0)]
    assert judge(cells).too_easy
    assert judge(cells[:2]).too_easy  # with no baseline nothing is proved


def test_a_baseline_is_given_by_the_better_of_its_thread_counts() -> None:
    """With one thread it collapses, with two it holds: the load is not hard because of the one."""
    cells = [
        cell("omniserve", 1.0, 9.0),
        cell("ls_only", 1.0, 0.0),
        cell("sarathi", 0.1, 99.0, "sarathi, 1 thread"),
        cell("sarathi", 1.0, 12.0, "sarathi, 2 threads"),
    ]
    found = judge(cells)
    assert (found.best_baseline, found.be_ratio) == ("sarathi, 2 threads", 0.75)
    assert (found.hardest, found.too_easy) == (1.0, True)


def test_no_baseline_that_holds_is_no_ratio() -> None:
    found = judge([cell("omniserve", 1.0, 9.0), cell("ls_only", 1.0, 0.0), cell("sarathi", 0.5, 9.0)])
    assert (found.best_baseline, found.be_ratio) == (None, None)


@pytest.mark.parametrize(
    ("auto", "lanes", "device", "winner", "is_near"),
    [
        (95.0, 100.0, 50.0, "lanes", True),
        (94.0, 50.0, 100.0, "device", False),
        (0.0, 0.0, 0.0, "lanes", None),  # near to nothing: not known
    ],
)
def test_the_automatic_choice_is_held_to_the_better_place(
    auto: float, lanes: float, device: float, winner: str, is_near: bool | None
) -> None:
    found = placement_verdict(spot_of({"auto": auto, "lanes": lanes, "device": device}))
    assert (found["winner"], found["is_near"]) == (winner, is_near)


def spot_of(rates: dict[str, float], offered: dict[str, float] | None = None) -> Spot:
    """One seed; ls_only attains 99 %, and everybody else who is not in `offered`."""
    attained = dict.fromkeys(rates, 0.99) | (offered or {})
    whole_box = {"device, all cores": [999.0]}
    return Spot(
        256,
        2.0,
        [0.99],
        {n: [r] for n, r in rates.items()} | whole_box,
        {n: [a] for n, a in attained.items()},
    )


@pytest.mark.parametrize(
    ("broken", "winner", "is_near"),
    [
        ({"lanes": 0.97}, "device", True),  # many tokens, targets missed: does not win
        ({"lanes": 0.97, "device": 0.5}, None, None),  # nobody to come near to
        ({"auto": 0.97}, "lanes", False),  # near by its tokens, at the cost of the targets
        ({"lanes": 0.98, "auto": 0.98}, "lanes", True),  # within the point
    ],
)
def test_a_choice_that_breaks_targets_neither_wins_nor_is_good(
    broken: dict[str, float], winner: str | None, is_near: bool | None
) -> None:
    found = placement_verdict(spot_of({"auto": 96.0, "lanes": 100.0, "device": 50.0}, broken))
    assert (found["winner"], found["is_near"]) == (winner, is_near)
    assert [name for name, held in found["holds"].items() if not held] == [
        name for name in ("auto", "lanes", "device") if broken.get(name, 1.0) < 0.98
    ]


# ---------------------------------------------------------------- whole reports


def test_the_report_sets_ratios_beside_absolute_values_and_harvest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"omniserve": 30.0, "sarathi": 20.0, "llumnix": 15.0}

    def be_rate(trial: Trial) -> float:
        alone = 40.0 if trial.rate == 0 else 0.0
        return alone or rates.get(trial.variant.policy, 10.0)

    machine = Machine({"vllm_priority": 0.9}, be_rate)
    flags = ("--plot", str(tmp_path / "slo.svg")) if find_spec("matplotlib") else ()
    report = bench(machine, tmp_path, *flags)
    for table in report["slo"]["tables"]:
        rows = {row["variant"]: row for row in table["rows"]}
        ours = rows["omniserve, 1 thread"]
        assert ours["be_tokens_per_s"] == pytest.approx([30.0, 30.0], rel=0.01)
        assert ours["harvest_share"] == pytest.approx(0.75, rel=0.01)
        assert ours["be_over_best_baseline"] == pytest.approx(1.5, rel=0.01)
        assert not table["verdict"]["too_easy"]
        assert table["verdict"]["within_point"]
    printed = capsys.readouterr().out
    assert "1.50x the BE tok/s of sarathi" in printed
    assert "75.0 %" in printed
    assert "TTFT counts from the intended arrival" in printed
    if flags:
        assert (tmp_path / "slo.svg").stat().st_size > 1000


def test_a_load_that_is_too_easy_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(Machine(), tmp_path)
    assert "THE LOAD IS TOO EASY" in capsys.readouterr().out


def test_overload_shows_what_admission_keeps_and_what_collapses_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refusing(Machine):
        """Admission refuses every other request and serves the rest in time."""

        def _chat(self, trial: Trial, arrival: Arrival) -> Record:
            record = super()._chat(trial, arrival)
            if trial.slo and not trial.variant.admits_all and round(arrival.at_s * 1e6) % 2:
                return replace(record, token_s=[], outcome="refused")
            return record

    machine = Refusing()
    flags = ("--plot", str(tmp_path / "over.svg")) if find_spec("matplotlib") else ()
    report = bench(machine, tmp_path, "--scenario", "overload", *flags)
    found = report["overload"]
    assert found["rate"] == pytest.approx(2 * report["setup"]["capacity"])
    kept, collapsed = found["sides"]["with admission"], found["sides"]["without admission"]
    assert kept["ttft_of_admitted"] == 1.0
    assert 0.3 < kept["both_of_offered"] < 0.7  # a refusal is a miss over offered requests
    assert collapsed["ttft_of_admitted"] == 0.0
    assert found["verdict"]["holds"]
    assert "95% of the admitted requests meet TTFT: holds" in capsys.readouterr().out


def test_placement_shows_where_lanes_win_and_where_the_device_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lanes keep their rate at any context; the device is fast on short ones. The engine chooses lanes."""

    def be_rate(trial: Trial) -> float:
        assert trial.jobs is not None
        device = 5120.0 / trial.jobs.high
        return device if trial.variant.host_offload == "never" else 10.0

    flags = ("--plot", str(tmp_path / "place.svg")) if find_spec("matplotlib") else ()
    flags = ("--scenario", "placement", "--memory-factors", "7", *flags)
    report = bench(Machine(be_rate=be_rate), tmp_path, *flags)["placement"]
    found = {s["context"]: (s["winner"], s["is_near"]) for s in report["spots"]}
    assert found == {256: ("device", False), 1024: ("lanes", True)}
    assert [s["context"] for s in report["left_out"]] == [4096]
    assert report["verdict"] == {"spots": 2, "near": 1, "not_known": 0, "holds": False}
    printed = capsys.readouterr().out
    assert "context 4096 does not fit a device of 1120 tokens" in printed
    assert "auto is good at 1 of 2 spots, not known at 0: does NOT hold" in printed


def test_what_is_not_known_of_a_placement_is_printed_so_and_not_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All batch work breaks the targets: neither place wins."""
    machine = Machine({"omniserve": 9.0})
    flags = ("--scenario", "placement", "--memory-factors", "7")
    report = bench(machine, tmp_path, *flags)["placement"]
    assert {(s["winner"], s["is_near"]) for s in report["spots"]} == {(None, None)}
    assert report["verdict"] == {"spots": 2, "near": 0, "not_known": 2, "holds": False}
    printed = capsys.readouterr().out
    assert "not known" in printed
    assert "neither holds" in printed
    assert "auto is good at 0 of 2 spots, not known at 2: does NOT hold" in printed


@pytest.mark.parametrize(
    ("ttft_s", "ratio", "verdict"), [(0.138, 0.95, "holds"), (0.16, 1.5, "does NOT hold")]
)
def test_an_arrival_waits_no_longer_than_the_bound_of_one_walk(
    ttft_s: float, ratio: float, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone it takes 100 ms; a walk with batch rows may take 40 of the 160 ms that are the target."""
    flags = ("--plot", str(tmp_path / "arrival.svg")) if find_spec("matplotlib") else ()
    machine = Machine({"omniserve": ttft_s})
    report = bench(machine, tmp_path, "--scenario", "arrival", "--slo-factors", "1.6", *flags)["arrival"]
    assert report["walk_bound_s"] == pytest.approx(0.04)
    assert report["wait"]["p99"] == pytest.approx(ttft_s - 0.1)
    assert report["chats"] == 2 * 60, "one a second and seed"
    assert report["verdict"]["p99_over_bound"] == pytest.approx(ratio)
    assert f"is {ratio:.2f}x the walk bound; at most once that bound: {verdict}" in capsys.readouterr().out
    lone = [t for t in machine.trials if t.arrivals is not None]
    assert {t.jobs is None for t in lone} == {True, False}
    assert len({t.arrivals for t in lone}) == 2, "the same with batch work and without, others for each seed"
    assert all(t.variant.admits_all for t in lone)


@pytest.mark.parametrize("scenario", ["slo", "arrival", "overload", "placement"])
def test_the_number_of_runs_announced_is_the_number_made(
    scenario: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    flags = [*SMALL, "--be-context", "64", "512", "--scenario", scenario, "--json", str(tmp_path / "x.json")]
    assert main(flags, run=machine) == 0
    before = 1 + 2  # capacity, and the reference with two seeds
    assert f"{len(machine.trials) - before} runs to come" in capsys.readouterr().out


# ---------------------------------------------------------------- traffic and samples


def test_a_trace_gives_each_seed_a_part_of_its_own_at_the_rate() -> None:
    trace = tuple(Arrival(i / 5, 10 + i % 7, 5) for i in range(2000))
    traffic = Traffic(SHAREGPT, trace=trace)
    parts = [traffic.arrivals(2.0, 100.0, seed) for seed in (0, 1)]
    assert [len(p) for p in parts] == pytest.approx([200, 200], abs=1)
    assert all(0 <= a.at_s < 100.0 for p in parts for a in p)
    assert [a.num_prompt for a in parts[0]] != [a.num_prompt for a in parts[1]]
    assert traffic.mean_output == 5.0


def test_counters_are_the_growth_within_the_window() -> None:
    result = Result(Trial(Variant("omniserve", 1, "auto"), 0, 1.0), Timing(10.0, 20.0, 5.0), {})

    def stats(tokens: int, pages: int) -> dict[str, Any]:
        return {
            "num_lane_tokens": tokens,
            "pages": {"device_latency_sensitive": pages, "device_total": 50},
        }

    samples = [(9.0, stats(5, 99)), (10.5, stats(20, 3)), (29.5, stats(120, 4)), (31.0, stats(500, 99))]
    slo_run._note_samples(result, samples)
    assert result.counters == {"num_lane_tokens": 100}
    assert (result.pages, result.device_pages) == ([3, 4], 50)
