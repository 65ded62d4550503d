"""The profiler measures a real, tiny model beside a real host; the cache gives its result back."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.conftest import TinySubject
from engine.driver import BE, LS, Subject, build_engine, executor_of
from omniserve import cli
from omniserve.config import DEVICE_ROWS_WITH_TARGETS, EngineConfig, split_cpus
from omniserve.engine import calibration
from omniserve.engine.calibration import ensure_profile, profile_key, profile_path
from omniserve.engine.profiler import Profiler, profile
from omniserve.engine.sandbox import Mix, Sandbox
from omniserve.policy.latency import WalkLoad
from omniserve.policy.latency_model import LatencyFit, LatencyModel, WalkCosts
from omniserve.types import BEST_EFFORT, LATENCY_SENSITIVE, SLO, SamplingParams
from policy.latency_fits import small_fit

SMALL = EngineConfig(
    max_num_batched_tokens=12, max_lane_rows=3, max_num_seqs=4, device_threads=1, host_threads=1
)
MODEL_LEN = 128


@pytest.fixture
def subject(tiny_subject: TinySubject) -> Subject:
    return tiny_subject()


def measured(subject: Subject, config: EngineConfig) -> LatencyFit:
    return profile(config, subject.decoder, split_cpus(config), MODEL_LEN, {"model": "tiny"}, budget_s=0.3)


def numbers(costs: WalkCosts) -> list[float]:
    plain = [getattr(costs, name) for name in WalkCosts.__slots__ if name not in ("dense", "head")]
    return [*plain, *costs.dense.seconds, *costs.head.seconds]


def test_every_part_of_a_real_model_is_measured(subject: Subject) -> None:
    fit = measured(subject, SMALL)
    for costs in (fit.idle, fit.busy):
        assert all(math.isfinite(number) and number >= 0 for number in numbers(costs))
        assert costs.dense.seconds[0] > 0
        assert (costs.dense.rows[0], costs.dense.rows[-1]) == (1, 12 + 3)
        assert (costs.head.rows[0], costs.head.rows[-1]) == (1, 4 + 3)
    assert fit.host_bytes_per_s > 0
    assert fit.copy_bytes_per_s > 0
    assert all(errors for errors in fit.residuals.values()), "walks of every kind are in it"
    assert LatencyModel.from_json(json.loads(json.dumps(fit.to_json()))).fit == fit


def test_an_engine_with_targets_and_few_settings_can_be_measured(subject: Subject) -> None:
    """Rows of a walk left at None: there are more of them with targets, and the sandbox has as many."""
    classes = (replace(LATENCY_SENSITIVE, slo=SLO(5.0, 1.0)), BEST_EFFORT)
    config = replace(SMALL, classes=classes, max_num_batched_tokens=None)
    profiler = Profiler(config, subject.decoder, split_cpus(config), MODEL_LEN, 0.0)
    try:
        rows = config.max_device_rows
        assert profiler.fit({}).idle.dense.rows[-1] == rows + config.max_lane_rows
        load, _ = profiler.sandbox.walk(Mix(chunks=((0, 100, True), (8, 110, True), (0, rows - 210, True))))
        assert load.num_tokens == rows == DEVICE_ROWS_WITH_TARGETS
    finally:
        profiler.close()


def test_a_profile_does_not_depend_on_the_engines_memory(subject: Subject) -> None:
    """It stands for every engine with the same key, so it looks at the same contexts."""
    sizes, keys = set(), []
    for memory in (None, subject.kv_bytes(2, SMALL.page_size), 1 << 30):
        config = replace(SMALL, device_memory_bytes=memory)
        sandbox = Sandbox(config, subject.decoder, split_cpus(config), MODEL_LEN)
        sizes.add(sandbox.kv_tokens)
        sandbox.close()
        keys.append(profile_key(config, subject.decoder, split_cpus(config), MODEL_LEN))
    assert keys[0] == keys[1] == keys[2]
    (kv_tokens,) = sizes
    assert kv_tokens >= SMALL.max_num_seqs * MODEL_LEN


def test_without_a_host_there_is_nothing_to_measure_there(subject: Subject) -> None:
    fit = measured(subject, replace(SMALL, host_offload="never", host_threads=None))
    assert (fit.host_bytes_per_s, fit.copy_bytes_per_s) == (0, 0)
    assert not any(errors for kind, errors in fit.residuals.items() if "lanes" in kind or "busy" in kind)
    assert fit.busy == fit.idle


def test_the_sandbox_runs_the_walk_that_is_asked_for(subject: Subject) -> None:
    config = replace(SMALL, max_model_len=MODEL_LEN)
    sandbox = Sandbox(config, subject.decoder, split_cpus(config), MODEL_LEN)
    try:
        load, seconds = sandbox.walk(Mix(decodes=(5, 100), chunks=((8, 4, False), (0, 3, True))))
        assert seconds > 0
        expected = WalkLoad()
        expected.add_decode(5)
        expected.add_decode(100)
        expected.add_chunk(8, 4)
        expected.add_chunk(0, 3)
        expected.num_samples += 1
        assert load == expected
        sandbox.use_lanes(True)
        rows = [sandbox.walk(Mix(decodes=(5,), lane_starts=2))[0].lane_rows for _ in range(8)]
        layers = subject.decoder.num_layers  # a walk in, a row is at its first layer; then at one more each
        assert rows == [2 * min(i, layers) for i in range(8)]
    finally:
        sandbox.close()


def test_the_budget_ends_the_measuring(subject: Subject) -> None:
    told: list[tuple[str, float]] = []
    profiler = Profiler(
        SMALL,
        subject.decoder,
        split_cpus(SMALL),
        MODEL_LEN,
        0.0,
        lambda what, share: told.append((what, share)),
    )
    try:
        assert profiler.fit({}).source["walks"] == 24 * 2 * 2  # without and with lanes, host idle and busy
    finally:
        profiler.close()
    assert [share for _, share in told] == sorted(share for _, share in told)
    assert {"dense modules", "logits", "walks"} == {what for what, _ in told}


# ---------------------------------------------------------------- the cache


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """An empty cache, and the keys of what was measured since: fits made up, none measured."""
    keys: list[dict[str, object]] = []

    def made_up(*arguments: object) -> LatencyFit:
        keys.append(arguments[4])  # type: ignore[arg-type]
        source = {"how": "made up", "seconds": 0, "cores_of_others": 0.0}
        return small_fit(key=arguments[4], source=source)

    monkeypatch.setenv("OMNISERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "profile", made_up)
    return keys


def ensured(subject: Subject, config: EngineConfig = SMALL, **options: bool) -> LatencyFit:
    return ensure_profile(config, subject.decoder, split_cpus(config), MODEL_LEN, **options).fit


def test_a_profile_is_measured_once(subject: Subject, profiles: list[dict[str, object]]) -> None:
    assert ensured(subject) == ensured(subject)
    assert len(profiles) == 1
    ensured(subject, refresh=True)
    assert len(profiles) == 2


def test_other_threads_or_larger_walks_need_another_profile(
    subject: Subject, profiles: list[dict[str, object]]
) -> None:
    others = (
        replace(SMALL, max_num_batched_tokens=13, max_lane_rows=2),  # as many rows in all
        replace(SMALL, max_num_seqs=5),
        replace(SMALL, host_kv_dtype="int8"),
    )
    for config in (SMALL, *others):
        ensured(subject, config)
    assert len(profiles) == 4
    ensured(subject)
    assert len(profiles) == 4


def test_an_engine_with_targets_uses_the_profile_made_without_any(
    subject: Subject, profiles: list[dict[str, object]]
) -> None:
    """Rows left at None are 64 without targets and 256 with them; a profile holds for both."""
    config = replace(SMALL, max_num_batched_tokens=None)
    with_targets = replace(config, classes=(replace(LATENCY_SENSITIVE, slo=SLO(5.0, 1.0)), BEST_EFFORT))
    assert config.max_device_rows < with_targets.max_device_rows
    assert ensured(subject, config) == ensured(subject, with_targets)
    (key,) = profiles
    assert key["max_device_rows"] == DEVICE_ROWS_WITH_TARGETS


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "omniserve-latency/0"}'])
def test_a_broken_profile_is_measured_again_with_a_warning(
    subject: Subject, profiles: list[dict[str, object]], content: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = ensured(subject)
    path = profile_path(profile_key(SMALL, subject.decoder, split_cpus(SMALL), MODEL_LEN))
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert ensured(subject) == good
    assert "measured again" in caplog.text
    assert str(path) in caplog.text
    caplog.clear()
    assert ensured(subject) == good  # from the file that took its place
    assert len(profiles) == 2
    assert caplog.text == ""


# ---------------------------------------------------------------- in the engine


def test_an_engine_without_a_profile_says_so(subject: Subject) -> None:
    engine = build_engine(subject, replace(SMALL, host_offload="never"))
    try:
        stats = engine.stats()
        assert (stats["cost_model"], stats["prediction"]) == ("uncalibrated", {})
    finally:
        engine.close()


def test_an_engine_learns_from_every_walk_it_makes(subject: Subject) -> None:
    config = replace(SMALL, host_offload="always")
    engine = build_engine(subject, config)
    engine.latency = LatencyModel(small_fit(num_layers=subject.decoder.num_layers))
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    try:
        while not engine.state.host_ready:
            engine.step()
            engine.sleep(timeout_s=0.2)
        engine.add(range(1, 20), params, LS)
        engine.add(range(1, 20), params, BE)
        while not engine.is_idle:
            if engine.step().was_idle:
                engine.sleep(timeout_s=0.2)
        stats = engine.stats()
        assert stats["cost_model"] == "calibrated"
        counts = {kind: int(found["count"]) for kind, found in stats["prediction"].items()}
        assert sum(counts.values()) == executor_of(engine).counters.walks
        assert any("chunk" in kind for kind in counts)
        assert any("decode" in kind for kind in counts)
        assert any("lanes" in kind for kind in counts)
    finally:
        engine.close()


# ---------------------------------------------------------------- the command


@pytest.fixture
def keeps_its_cpus() -> Iterator[None]:
    """The command pins its own process as an engine would: here that is the tests'."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("keeps_its_cpus")
def test_the_command_shows_the_profile(
    tiny_llama: Callable[..., Path],
    profiles: list[dict[str, object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["--model", str(tiny_llama()), "--device-threads", "1", "--host-threads", "1"]
    cpus = os.sched_getaffinity(0)
    assert cli.main(["profile", "--json", *settings]) == 0
    os.sched_setaffinity(0, cpus)  # each command is a process of its own, not pinned by the one before
    assert LatencyFit.from_json(json.loads(capsys.readouterr().out)).key["device_threads"] == 1
    assert cli.main(["profile", *settings]) == 0
    assert torch.get_num_threads() == 1, "as in an engine, all threads are the decoder's"
    shown = capsys.readouterr().out
    assert "dense modules, 8 rows" in shown
    assert "10.0 GB/s" in shown
    assert len(profiles) == 1
    assert profiles[0]["quantization"] == "none"
    assert cli.main(["profile", "--quantization", "int8", *settings]) == 0
    assert profiles[1]["quantization"] == "int8"
    assert cli.main(["profile", "--plot", "profile.bmp", *settings]) == 1
    assert "--plot profile.bmp" in capsys.readouterr().err
