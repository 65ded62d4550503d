"""LLM and AsyncLLM as a user meets them: classes, bad input, stops, seeds, threads."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import omniserve
from omniserve import LLM, ConfigError, EngineDeadError, ModelError, RequestError, SamplingParams
from omniserve.config import CpuSplit, EngineConfig, split_cpus
from omniserve.engine.async_llm import AsyncLLM
from omniserve.machine import CpuBudget
from omniserve.types import DEFAULT_CLASSES, SLO

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(host_offload="always", max_model_len=512) as engine:
        yield engine


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, omniserve; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_can_be_had() -> None:
    assert {name for name in omniserve.__all__ if not hasattr(omniserve, name)} == set()


def test_the_engine_starts_without_transformers() -> None:
    code = (
        "import sys\nfrom omniserve.engine.build import load_engine\n"
        "from omniserve.config import EngineConfig\nfrom omniserve.model.sources import ensure_model\n"
        "engine = load_engine(EngineConfig(max_model_len=64), ensure_model('smollm2-135m'))\n"
        "engine.close()\nsys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_both_classes_answer_alike(llm: LLM) -> None:
    prompt = "The capital of France is"
    chat, batch = llm.generate([prompt, prompt], GREEDY, ["latency_sensitive", "best_effort"])
    assert chat.token_ids == batch.token_ids
    assert chat.text == batch.text
    assert chat.metrics.num_lane_tokens == 0
    assert batch.metrics.num_lane_tokens == GREEDY.max_tokens - 1


def test_an_output_carries_text_reason_and_metrics(llm: LLM) -> None:
    (output,) = llm.generate("One, two, three,", GREEDY)
    assert output.finish_reason == "length"
    assert len(output.token_ids) == GREEDY.max_tokens
    assert output.text == llm.tokenizer.decode(output.token_ids)
    assert output.metrics.ttft_s is not None
    assert output.metrics.tpot_s is not None
    found = output.metrics
    times = (0.0, found.queued_s, found.started_s, found.ttft_s, found.last_token_s)
    assert all(
        before is not None and after is not None and before <= after for before, after in pairwise(times)
    )


def test_a_prompt_seen_before_is_not_computed_again_unless_its_salt_differs(llm: LLM) -> None:
    prompt = list(range(100, 150))
    (first,) = llm.generate([prompt], GREEDY)
    again = llm.generate([prompt] * 2, GREEDY, cache_salt=["somebody", "somebody else"])
    (same,) = llm.generate([prompt], GREEDY)
    assert [o.metrics.num_cached_tokens for o in (first, *again, same)] == [0, 0, 0, 48]
    assert all(o.token_ids == first.token_ids for o in (*again, same))
    assert llm.stats()["prefix_cache"]["device_latency_sensitive"]["hit_tokens"] >= 48
    with pytest.raises(RequestError, match="cache_salt"):
        llm.generate([prompt], GREEDY, cache_salt="")


def test_prompt_log_probabilities_are_whole_though_the_prompt_is_cached(llm: LLM) -> None:
    prompt, scored = list(range(200, 250)), replace(GREEDY, prompt_logprobs=0)
    (before,) = llm.generate([prompt], scored)
    llm.generate([prompt], GREEDY)
    (cached,) = llm.generate([prompt], GREEDY)
    (after,) = llm.generate([prompt], scored)
    assert [o.metrics.num_cached_tokens for o in (before, cached, after)] == [0, 48, 0]
    first, second = before.prompt_logprobs, after.prompt_logprobs
    assert first is not None
    assert second is not None
    assert len(second) == len(prompt)
    for token, one, other in zip(prompt[1:], first[1:], second[1:], strict=True):
        assert one is not None
        assert other is not None
        assert other[token].logprob == pytest.approx(one[token].logprob, abs=1e-4)


def test_chat_uses_the_template_and_stops_at_the_end_of_turn(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=40))
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
    assert "<|im_end|>" not in output.text


@pytest.mark.parametrize(
    ("prompt", "params", "service_class", "field", "says"),
    [
        ("", GREEDY, "latency_sensitive", "prompt", "at least one token"),
        ([], GREEDY, "best_effort", "prompt", "at least one token"),
        ([1, 10**9], GREEDY, "latency_sensitive", "prompt", "out of range"),
        ([1, -1], GREEDY, "latency_sensitive", "prompt", "out of range"),
        ([1, "a"], GREEDY, "latency_sensitive", "prompt", "list of token ids"),
        ([True, 1], GREEDY, "best_effort", "prompt", "out of range"),
        (None, GREEDY, "best_effort", "prompt", "list of token ids"),
        ([1] * 600, GREEDY, "latency_sensitive", "prompt", "max_model_len 512"),
        ([1] * 505, GREEDY, "best_effort", "max_tokens", "max_model_len 512"),
        ("hello", GREEDY, "urgent", "service_class", "known classes: latency_sensitive, best_effort"),
        ("hello", SamplingParams(stop_token_ids=[10**9]), "best_effort", "stop_token_ids", "out of range"),
        ("hello", SamplingParams(logit_bias={10**9: 1.0}), "best_effort", "logit_bias", "out of range"),
        ("hello", SamplingParams(logprobs=21), "latency_sensitive", "logprobs", "max_logprobs 20"),
        ("hello", SamplingParams(prompt_logprobs=-1), "best_effort", "prompt_logprobs", "max_logprobs 20"),
        ("hello", SamplingParams(max_tokens=None, min_tokens=512), "best_effort", "min_tokens", "lower it"),
    ],
)
def test_a_bad_request_names_field_and_limit_and_disturbs_nobody(
    llm: LLM, prompt: Any, params: SamplingParams, service_class: str, field: str, says: str
) -> None:
    with ThreadPoolExecutor() as pool:
        neighbour = pool.submit(llm.generate, "The sky is", GREEDY, "best_effort")
        with pytest.raises(RequestError, match=says) as caught:
            llm.generate([prompt], params, service_class)
        assert caught.value.field == field
        (output,) = neighbour.result()
    assert len(output.token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"n": 0}, r"in \[1, 16384\]"),
        ({"n": 2, "temperature": 0.0}, "raise temperature"),
        ({"max_tokens": 0}, r"in \[1, 2147483647\]"),
        ({"max_tokens": True}, r"in \[1, 2147483647\]"),
        ({"max_tokens": 2.0}, r"in \[1, 2147483647\]"),
        ({"max_tokens": 2**31}, r"in \[1, 2147483647\]"),
        ({"min_tokens": -1}, r"in \[0, 2147483647\]"),
        ({"min_tokens": 2**31, "max_tokens": None}, r"in \[0, 2147483647\]"),
        ({"min_tokens": 17}, "at most max_tokens 16"),
        ({"temperature": -1.0}, r"in \[0, 100\]"),
        ({"temperature": float("nan")}, r"in \[0, 100\]"),
        ({"temperature": "hot"}, "a number"),
        ({"temperature": Decimal("0.5")}, "a number"),
        ({"top_p": 0.0}, r"in \(0, 1\]"),
        ({"top_p": 1.01}, r"in \(0, 1\]"),
        ({"top_k": -2}, "-1"),
        ({"top_k": 2**31}, r"in \[1, 2147483647\]"),
        ({"temperature": 10**400}, r"in \[0, 100\]"),
        ({"repetition_penalty": 10**400}, "finite"),
        ({"logit_bias": {"1" * 5000: 1.0}}, r"in \[0, 2147483647\]"),
        ({"logit_bias": {2**31: 1.0}}, r"in \[0, 2147483647\]"),
        ({"top_k": 5.0}, "an integer"),
        ({"min_p": 1.5}, r"in \[0, 1\]"),
        ({"presence_penalty": 2.5}, r"in \[-2, 2\]"),
        ({"frequency_penalty": -2.5}, r"in \[-2, 2\]"),
        ({"repetition_penalty": 0}, "above 0"),
        ({"repetition_penalty": float("inf")}, "finite"),
        ({"logit_bias": [1]}, "token ids to numbers"),
        ({"logit_bias": {"a": 1.0}}, "token ids"),
        ({"logit_bias": {-1: 1.0}}, "token ids"),
        ({"logit_bias": {1: float("nan")}}, r"in \[-100, 100\]"),
        ({"logprobs": -2}, "2147483647], -1"),
        ({"logprobs": False}, "2147483647], -1"),
        ({"logprobs": 2**31}, "2147483647], -1"),
        ({"prompt_logprobs": 1.5}, "2147483647], -1"),
        ({"bad_words": "word"}, "a list"),
        ({"bad_words": [""]}, "non-empty"),
        ({"stop": [""]}, "non-empty"),
        ({"stop": 5}, "or one"),
        ({"stop": "\ud800"}, "texts"),
        ({"stop_token_ids": [-3]}, r"in \[0, 2147483647\]"),
        ({"stop_token_ids": [2**31]}, r"in \[0, 2147483647\]"),
        ({"stop_token_ids": 3}, "a list"),
        ({"ignore_eos": 1}, "True or False"),
        ({"include_stop_str_in_output": None}, "True or False"),
        ({"seed": 2**63}, "2\\*\\*63"),
        ({"seed": True}, "an integer"),
    ],
)
def test_bad_sampling_params_are_refused_by_name_and_limit(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        SamplingParams(**bad)
    assert caught.value.field == next(iter(bad))


def test_an_unknown_sampling_parameter_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_sampling_params_are_brought_to_one_form() -> None:
    params = SamplingParams(
        temperature=0.001,
        seed=-1,
        top_k=-1,
        stop="x",
        stop_token_ids=[3, 3],
        logit_bias={"7": 1000},
        logprobs=True,
    )
    assert (params.temperature, params.seed, params.top_k) == (0.01, None, 0)
    assert (params.stop, params.stop_token_ids) == (("x",), (3,))
    assert (params.logit_bias, params.logprobs) == ({7: 100.0}, 1)
    greedy = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1)
    assert (greedy.top_p, greedy.top_k, greedy.min_p) == (1.0, 0, 0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"colour": "red"}, "unknown setting colour"),
        ({"page_size": 0}, "page_size"),
        ({"host_offload": "sometimes"}, "auto, always, never"),
        ({"reentry": "later"}, "same_iteration"),
        ({"dtype": "int3"}, "dtype"),
        ({"device": "cuda"}, "not supported yet"),
        ({"watermark": 1.5}, "watermark"),
        ({"watermark": "a"}, "watermark"),
        ({"prefix_cache_reserve": 1.0}, "prefix_cache_reserve"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching"),
        ({"seed": None}, "seed"),
        ({"max_logprobs": -2}, "max_logprobs"),
        ({"max_lanes": 1 << 30}, "max_lanes"),
        ({"host_threads": 5000}, "host_threads"),
        ({"device_threads": 10_000}, "CPUs are available"),
        ({"max_model_len": 10**6}, "positions"),
        ({"device_memory_bytes": 1000}, "at least 2 pages"),
    ],
)
def test_a_bad_setting_is_refused_by_name(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM(**settings)


def test_an_unknown_model_names_what_is_there() -> None:
    with pytest.raises(ModelError, match="smollm2-135m"):
        LLM("no-such-model")


def test_memory_too_small_for_one_request_is_said_at_acceptance() -> None:
    with LLM(device_memory_bytes=4 << 20, host_offload="never", max_model_len=512) as small:
        with pytest.raises(RequestError, match="device_memory_bytes"):
            small.generate([[1] * 200], GREEDY)
        assert len(small.generate([[1] * 20], GREEDY)[0].token_ids) == GREEDY.max_tokens


def test_stop_strings_end_the_text_before_them(llm: LLM) -> None:
    (free,) = llm.generate(
        "The capital of France is", SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    )
    stop = free.text[8:13]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=stop)
    seen: list[str] = []
    (output,) = llm.generate(
        "The capital of France is", params, on_progress=lambda _, partial: seen.append(partial.text)
    )
    assert output.finish_reason == "stop"
    assert output.text == free.text[: free.text.index(stop)]
    assert all(output.text.startswith(text) for text in seen), "text once given never shrinks"


def test_lane_tokens_are_counted_whatever_ends_a_request(llm: LLM) -> None:
    (free,) = llm.generate(
        "The capital of France is", SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    )
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, stop=free.text[20:25])
    counts: list[int] = []
    (output,) = llm.generate(
        "The capital of France is",
        params,
        "best_effort",
        on_progress=lambda _, partial: counts.append(partial.metrics.num_lane_tokens),
    )
    assert output.finish_reason == "stop"
    assert output.metrics.num_lane_tokens == len(output.token_ids) - 1
    assert counts == list(range(len(output.token_ids)))


def test_numpy_token_ids_are_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon a time")
    (plain,) = llm.generate([ids], GREEDY)
    assert llm.generate([np.array(ids)], GREEDY)[0].token_ids == plain.token_ids


def test_stop_token_ids_end_at_that_token(llm: LLM) -> None:
    (free,) = llm.generate("Once upon a time", GREEDY)
    stop_id = free.token_ids[5]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop_id])
    (output,) = llm.generate("Once upon a time", params)
    assert output.finish_reason == "stop"
    assert output.token_ids == free.token_ids[: free.token_ids.index(stop_id) + 1]


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    (alone,) = llm.generate("The weather today", params)
    crowd = llm.generate(["The weather today"] + ["Hello"] * 5, params, ["best_effort"] * 6)
    assert crowd[0].token_ids == alone.token_ids
    other = SamplingParams(max_tokens=12, temperature=1.0, seed=6, ignore_eos=True)
    assert llm.generate("The weather today", other)[0].token_ids != alone.token_ids


DRAWN = SamplingParams(
    n=4, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True, logprobs=1, prompt_logprobs=0
)


@pytest.mark.parametrize("service_class", ["latency_sensitive", "best_effort"])
def test_n_gives_so_many_different_texts_in_order_and_the_first_is_that_of_n_1(
    llm: LLM, service_class: str
) -> None:
    partial: list[list[int]] = []

    def note(_: int, output: omniserve.RequestOutput) -> None:
        partial.append([c.index for c in output.outputs])

    (output,) = llm.generate("The weather today", DRAWN, service_class, on_progress=note)
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert set(map(tuple, partial)) == {(0, 1, 2, 3)}
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    assert all(c.finish_reason == "length" and len(c.logprobs or []) == 12 for c in output.outputs)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    (again,) = llm.generate("The weather today", DRAWN, service_class)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    (single,) = llm.generate("The weather today", replace(DRAWN, n=1), service_class)
    assert single.token_ids == output.outputs[0].token_ids
    lane_tokens = 4 * 11 if service_class == "best_effort" else 0
    assert output.metrics.num_lane_tokens == lane_tokens


def test_bad_words_never_come_at_the_beginning_or_behind_a_space(llm: LLM) -> None:
    (free,) = llm.generate("The capital of France is", GREEDY)
    assert "Paris" in free.text
    (kept,) = llm.generate("The capital of France is", replace(GREEDY, bad_words=["Paris"]))
    assert "Paris" not in kept.text


def test_greedy_log_probabilities_name_the_chosen_token_as_the_likeliest(llm: LLM) -> None:
    (output,) = llm.generate("The capital of France is", replace(GREEDY, logprobs=3))
    positions = output.outputs[0].logprobs
    assert positions is not None
    for token, position in zip(output.token_ids, positions, strict=True):
        assert next(iter(position)) == token
        assert position[token].rank == 1
        assert position[token].decoded_token == llm.tokenizer.decode([token])
        values = [p.logprob for p in position.values()]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    total = sum(p[t].logprob for t, p in zip(output.token_ids, positions, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


def test_max_tokens_none_goes_on_to_max_model_len(llm: LLM) -> None:
    prompt = [100] * 480
    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert len(output.token_ids) == 512 - 480
    assert output.finish_reason == "length"


def test_calls_from_several_threads_run_at_once(llm: LLM) -> None:
    prompts = [f"Number {i} is" for i in range(8)]
    expected = [o.token_ids for o in llm.generate(prompts, GREEDY)]
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(llm.generate, p, GREEDY, c)
            for p, c in zip(prompts, ["latency_sensitive", "best_effort"] * 4, strict=True)
        ]
        assert [call.result()[0].token_ids for call in calls] == expected


def test_stats_count_lanes_and_pages_by_owner(llm: LLM) -> None:
    before = llm.stats()
    llm.generate(["A", "B"], GREEDY, "best_effort")
    after = llm.stats()
    assert after["num_lane_tokens"] - before["num_lane_tokens"] == 2 * (GREEDY.max_tokens - 1)
    layers = 30
    assert after["lane_entries"] - before["lane_entries"] == 2 * (GREEDY.max_tokens - 1) * layers
    for name in ("same_iteration_entries", "lane_passes", "device_wait_s", "starved_s", "host_busy_share"):
        assert name in after
    pages = after["pages"]
    assert pages["device_free"] == pages["device_total"]
    assert pages["host_lanes"] == 0


@pytest.mark.parametrize("service_class", ["latency_sensitive", "best_effort"])
def test_abort_by_id_ends_the_iterator_and_frees_everything(service_class: str) -> None:
    async def scenario() -> None:
        engine = AsyncLLM(host_offload="always", max_model_len=512)
        try:
            outputs = []
            params = SamplingParams(n=2, max_tokens=400, ignore_eos=True)
            async for output in engine.submit("Hello", params, service_class, request_id="mine"):
                outputs.append(output)
                if len(outputs) == 3:
                    assert await engine.abort("mine")
            assert [c.finish_reason for c in outputs[-1].outputs] == ["abort", "abort"]
            assert len(outputs) < 50
            assert not await engine.abort("mine")
            while any((stats := await engine.stats())["requests"].values()):
                await asyncio.sleep(0.02)
            while (stats := await engine.stats())["pages"]["host_retiring"]:
                await asyncio.sleep(0.02)
            pages = stats["pages"]
            assert pages["device_free"] == pages["device_total"]
            assert pages["host_free"] == pages["host_total"]
        finally:
            engine.close()

    asyncio.run(scenario())


def test_a_given_up_question_and_a_closed_loop_hurt_nobody_else() -> None:
    engine = AsyncLLM(host_offload="never", max_model_len=512)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.stats(), timeout=0)
        stream = engine.submit("Hello", params, request_id="left")
        await anext(aiter(stream))

    async def patient() -> int:
        return len([output async for output in engine.submit("Hello", params)])

    try:
        asyncio.run(impatient())  # closes its loop with the request under way
        assert asyncio.run(asyncio.wait_for(patient(), 120)) == params.max_tokens
    finally:
        engine.close()


def test_a_refused_request_leaves_its_id_free(llm: LLM) -> None:
    engine = llm._llm

    async def scenario() -> str | None:
        with pytest.raises(RequestError):
            await anext(aiter(engine.submit([10**9], GREEDY, request_id="again")))
        return [o async for o in engine.submit("Hello", GREEDY, request_id="again")][-1].finish_reason

    assert asyncio.run(scenario()) == "length"


def test_calls_after_close_are_refused_clearly() -> None:
    llm = LLM(host_offload="never", max_model_len=512)
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("Hello")
    with pytest.raises(EngineDeadError, match="closed"):
        llm.stats()


def budget(count: int, cpus: tuple[int, ...]) -> CpuBudget:
    return CpuBudget(count, cpus)


def test_threads_never_exceed_the_cpus_and_without_targets_sides_do_not_overlap() -> None:
    split = split_cpus(EngineConfig(), budget(5, (0, 1, 2, 3, 4)))
    assert (split.device_cpus, split.host_cpus) == ((0, 1), (2, 3, 4))
    assert split_cpus(EngineConfig(host_offload="never"), budget(2, (3, 5))).device_cpus == (3, 5)
    assert split_cpus(EngineConfig(device_threads=3), budget(4, (0, 1, 2, 3))).host_cpus == (3,)
    with pytest.raises(ConfigError, match="device_threads: 5 asked for, 4 CPUs"):
        split_cpus(EngineConfig(device_threads=5), budget(4, (0, 1, 2, 3)))
    with pytest.raises(ConfigError, match="host_threads: 5 asked for, 4 CPUs"):
        split_cpus(EngineConfig(host_threads=5), budget(4, (0, 1, 2, 3)))


def test_sides_share_all_cpus_where_predictions_hold_targets_or_two_numbers_say_so() -> None:
    chat = replace(DEFAULT_CLASSES[0], slo=SLO(1.0, 0.1))
    with_targets = EngineConfig(classes=(chat, *DEFAULT_CLASSES[1:]))
    split = split_cpus(with_targets, budget(3, (0, 1, 2)))
    assert split == CpuSplit(3, 3, (0, 1, 2), (0, 1, 2))
    assert split_cpus(replace(with_targets, device_threads=2), budget(3, (0, 1, 2))).host_cpus == (2,)
    assert split_cpus(replace(with_targets, calibrate="never"), budget(2, (0, 1))).host_cpus == (1,)
    told = split_cpus(EngineConfig(device_threads=3, host_threads=2), budget(4, (0, 1, 2, 3)))
    assert (told.device_cpus, told.host_cpus) == ((0, 1, 2), (2, 3)), "the host shares as few as it must"


def test_one_cpu_is_shared_and_a_quota_pins_nobody() -> None:
    alone = split_cpus(EngineConfig(), budget(1, (7,)))
    assert (alone.device_cpus, alone.host_cpus) == ((7,), (7,))
    quota = split_cpus(EngineConfig(), budget(4, tuple(range(64))))
    assert (quota.device_threads, quota.host_threads) == (2, 2)
    assert quota.device_cpus == quota.host_cpus == ()


def test_engines_that_share_cpus_can_be_told_to_pin_nothing() -> None:
    assert split_cpus(EngineConfig(pin_cpus=False), budget(4, (0, 1, 2, 3))) == CpuSplit(2, 2, (), ())
    with pytest.raises(ConfigError, match="pin_cpus: must be True or False"):
        EngineConfig(pin_cpus=0)  # type: ignore[arg-type]
