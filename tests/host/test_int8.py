"""int8 KV: what rounding costs is bounded; attention over what was kept is as exact as for any type."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from host.lane_rig import (
    DEVICE_PAGE,
    HEAD_DIM,
    HOST_PAGE,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Rig,
    as_int8,
    dequantised,
)
from host.test_kernel import (
    TOLERANCE,
    Case,
    Floats,
    Store,
    across_simd,
    batch_attention,
    cases_of,
    reference,
)
from omniserve import _native as native

# x / scale is rounded twice: the quotient, up to 127, to 24 bits, and then to the nearest integer.
MAX_ERROR = 0.5 + 2.0**-16  # of a scale
# Below this an amax counts as zero (csrc/kv_int8.h).
SMALLEST = 2.0**-119


def stored(store: Store, layer: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """K and V of all tokens of `layer` by the documented layout: [2, tokens, heads, dim] and scales."""
    g = store.kv.geometry
    pages = store.memory.reshape(store.kv.num_pages, g.num_layers, -1)[store.table, layer]
    block, num_scales = g.num_kv_heads * g.head_dim * g.page_size, g.num_kv_heads * g.page_size
    k, v = pages[:, :block].view(np.int8), pages[:, block : 2 * block].view(np.int8)
    scales = pages[:, 2 * block : 2 * block + 8 * num_scales].copy().view(np.float32)
    k = k.reshape(-1, g.num_kv_heads, g.head_dim, g.page_size).transpose(0, 3, 1, 2)
    v = v.reshape(-1, g.num_kv_heads, g.page_size, g.head_dim).transpose(0, 2, 1, 3)
    scales = scales.reshape(-1, 2, g.num_kv_heads, g.page_size).transpose(1, 0, 3, 2)
    tokens = store.case.num_tokens
    integers = np.stack([x.reshape(-1, g.num_kv_heads, g.head_dim)[:tokens] for x in (k, v)])
    return integers, scales.reshape(2, -1, g.num_kv_heads)[:, :tokens]


def kept(store: Store, layer: int = 1) -> npt.NDArray[np.float64]:
    """K and V as attention must see them: [2, tokens, heads, dim]."""
    integers, scales = stored(store, layer)
    return integers * scales[..., None].astype(np.float64)


cases = cases_of(["int8"])


# Attention over what was kept

# They multiply integers for several queries where pages and head sizes are multiples of 64.
INTEGER_SIMD = ["avx512_vnni", "avx512_bf16"]
QUERY_LEVELS, WEIGHT_LEVELS = 32639, 65535
TILE = 64  # tokens


def cost_of_integers(
    store: Store, bounds: list[int], layer: int = 1
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What integers of 16 bits may cost attention over the pieces of `bounds`: [heads, dim], lse [heads].

    A query's element is off by up to half of largest / 32639, a weight times V's scale by up to half of the
    tile's largest / 65535. Scores that are off by up to s change the softmax by up to a factor exp(2 s).
    """
    case = store.case
    out, lse = np.zeros(store.q.shape), np.zeros(len(store.q))
    if native.simd() not in INTEGER_SIMD or case.group == 1 or case.page_size % 64 or case.head_dim % 64:
        return out, lse
    first, last = bounds[0], bounds[-1]
    (keys, values), (integers, scales) = kept(store, layer), stored(store, layer)
    for head, query in enumerate(store.q.astype(np.float64)):
        k, v = (x[first:last, head // case.group] for x in (keys, values))
        q_error = np.abs(query).max() / QUERY_LEVELS / 2
        lse[head] = case.scale * q_error * np.abs(k).sum(axis=1).max()
        scores = case.scale * k @ query
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        factor = np.exp(2 * lse[head])
        out[head] = (factor - 1) * (weights @ np.abs(v - weights @ v))
        weights *= factor * scales[1, first:last, head // case.group]
        for piece, end in pairwise(bounds):
            for t in range(piece, end, TILE):
                tile = slice(t, min(t + TILE, end))
                size = weights[t - first : tile.stop - first].max() / WEIGHT_LEVELS
                out[head] += size / 2 * np.abs(integers[1, tile, head // case.group].astype(int)).sum(axis=0)
    return out, lse


def assert_attends_to_what_was_kept(store: Store, bounds: list[int]) -> None:
    """On every path, as exactly as that path promises."""
    case = store.case
    keys, values = (x[bounds[0] : bounds[-1]] for x in kept(store))
    out, lse = reference(store.q, keys, values, case.scale)
    tolerance = TOLERANCE * max(1.0, case.score_size)

    def check() -> None:
        got, got_lse = store.attend(bounds)
        out_cost, lse_cost = cost_of_integers(store, bounds)
        assert (np.abs(got - out) <= out_cost + tolerance).all()
        assert (np.abs(got_lse - lse) <= lse_cost + tolerance + 1e-6 * np.abs(lse)).all()

    across_simd(check)


@given(case=cases)
@example(Case(num_tokens=1, page_size=1, dtype="int8"))
@example(Case(num_tokens=64, page_size=64, group=9, head_dim=256, dtype="int8"))
@example(Case(num_tokens=65, page_size=1, head_dim=72, dtype="int8"))
@settings(max_examples=150, deadline=None)
def test_attention_over_int8_is_the_reference_over_what_was_kept(case: Case) -> None:
    assert_attends_to_what_was_kept(case.build(), [0, case.num_tokens])


@given(case=cases, data=st.data())
@settings(max_examples=60, deadline=None)
def test_ranges_of_int8_tokens_attend_to_their_own_and_merge(case: Case, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, case.num_tokens - 1))
    last = data.draw(st.integers(first + 1, case.num_tokens))
    cut = data.draw(st.integers(first, last))
    assert_attends_to_what_was_kept(case.build(), [first, cut, last])


wide_cases = st.builds(
    Case,
    num_tokens=st.integers(1, 300),
    page_size=st.sampled_from([64, 128]),
    num_kv_heads=st.integers(1, 2),
    group=st.integers(1, 9) | st.sampled_from([12, 13]),
    head_dim=st.sampled_from([64, 128, 192, 256]),
    dtype=st.just("int8"),
    seed=st.integers(0, 2**32 - 1),
    score_size=st.sampled_from([0.01, 1.0, 30.0]),
)


@given(case=wide_cases, data=st.data())
@settings(max_examples=200, deadline=None)
def test_integers_cost_no_more_than_their_bound_for_every_group_and_range(
    case: Case, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, min(70, case.num_tokens - 1)))
    cut = data.draw(st.integers(first, case.num_tokens))
    assert_attends_to_what_was_kept(case.build(), [first, cut, case.num_tokens])


def test_integers_cost_a_hundredth_of_what_int8_costs() -> None:
    """The bound above is for the worst case; this is the ordinary one (root of mean squares)."""
    for group, head_dim in [(2, 128), (3, 64), (4, 128), (8, 128)]:
        store = Case(num_tokens=1000, page_size=64, group=group, head_dim=head_dim, dtype="int8").build()
        exact, _ = reference(store.q, store.keys, store.values, store.case.scale)
        over_kept, _ = reference(store.q, *kept(store), store.case.scale)
        of_int8 = np.sqrt(np.square(over_kept - exact).mean())

        def check(over_kept: Any = over_kept, of_int8: Any = of_int8, store: Store = store) -> None:
            got, _ = store.attend([0, 1000])
            assert np.sqrt(np.square(got - over_kept).mean()) <= of_int8 / 100

        across_simd(check)


@pytest.mark.parametrize("size", [2.0**-118, 2.0**-60, 2.0**100])
@pytest.mark.parametrize("q_size", [2.0**-40, 1.0])
def test_values_of_any_size_keep_their_precision(size: float, q_size: float) -> None:
    store = Case(num_tokens=100, page_size=64, head_dim=128, group=3, dtype="int8", score_size=q_size).build()
    store.write(1, store.keys / np.float32(q_size), store.values * np.float32(size))
    out, _ = reference(store.q, *kept(store), store.case.scale)
    across_simd(lambda: np.testing.assert_allclose(store.attend([0, 100])[0] / size, out / size, atol=1e-4))


def test_a_value_that_is_no_number_makes_its_queries_none_and_no_others() -> None:
    store = Case(num_tokens=150, page_size=64, group=4, head_dim=128, dtype="int8").build()
    values = store.values.copy()
    values[70, 1, 5] = np.nan
    before = store.attend([0, 150])[0]
    store.write(1, store.keys, values)

    def check() -> None:
        got, _ = store.attend([0, 150])
        assert np.isnan(got[4:]).all()
        np.testing.assert_allclose(got[:4], before[:4], atol=1e-4)

    across_simd(check)


def test_a_query_that_is_no_number_spoils_itself_alone() -> None:
    store = Case(num_tokens=150, page_size=64, group=4, head_dim=128, dtype="int8").build()
    before = store.attend([0, 150])[0]
    others = [0, 1, 3, 4, 5, 6, 7]
    store.q[2, 9] = np.nan

    def check() -> None:
        got = store.attend([0, 150])[0]
        assert np.isnan(got[2]).all()
        np.testing.assert_allclose(got[others], before[others], atol=1e-4)

    across_simd(check)


def test_a_team_attends_over_int8() -> None:
    store = Case(num_tokens=2000, group=3, dtype="int8", num_layers=1).build()
    q = np.random.default_rng(1).standard_normal((2, *store.q.shape), np.float32)
    lens = np.array([2000, 77], np.int32)
    got = batch_attention(store, native.ThreadTeam(3), lens, q)
    keys, values = kept(store, layer=0)
    for i, length in enumerate(lens):
        expected, _ = reference(q[i], keys[:length], values[:length], store.case.scale)
        np.testing.assert_allclose(got[i], expected, atol=TOLERANCE)


# What rounding costs


def rows_of(case: Case, rng: np.random.Generator) -> Floats:
    """Tokens of very different sizes, with zeros and ties among them."""
    rows = rng.standard_normal((case.num_tokens, case.num_kv_heads, case.head_dim), np.float32)
    rows *= np.float32(10.0) ** rng.integers(-25, 25, (case.num_tokens, case.num_kv_heads, 1)).astype(
        np.float32
    )
    rows[rng.random(rows.shape) < 0.05] = 0.0
    rows[rng.random(case.num_tokens) < 0.2] = 0.0
    tied = rng.random(case.num_tokens) < 0.2
    rows[tied] = rng.integers(-127, 127, rows[tied].shape) + np.float32(0.5)
    rows[tied, :, 0] = 127.0  # scale 1
    return rows


@given(case=cases)
@settings(max_examples=60, deadline=None)
def test_an_element_loses_at_most_half_a_scale(case: Case) -> None:
    store = case.build()
    rng = np.random.default_rng(case.seed)
    keys, values = rows_of(case, rng), rows_of(case, rng)
    store.write(0, keys, values)
    rows = np.stack([keys, values])
    integers, scales = stored(store, layer=0)
    np.testing.assert_array_equal(scales, np.abs(rows).max(axis=-1) / np.float32(127))
    error = np.abs(rows - integers * scales[..., None].astype(np.float64))
    assert (error <= MAX_ERROR * scales[..., None]).all()
    expected, _ = as_int8(rows)
    np.testing.assert_array_equal(integers, expected)  # nearest, ties to even
    assert np.abs(integers.astype(int)).max() <= 127


def test_sizes_at_the_ends_of_float32_are_kept_or_read_as_zero() -> None:
    store = Case(num_tokens=5, num_kv_heads=1, dtype="int8", num_layers=1).build()
    rows = np.random.default_rng(3).uniform(-1, 1, (5, 1, 64)).astype(np.float32)
    rows[:, 0, 0] = 1.0
    sizes = np.array([np.finfo(np.float32).max, SMALLEST, SMALLEST * 0.999, 1e-44, 0.0], np.float32)
    rows *= sizes[:, None, None]
    store.write(0, rows, rows)
    keys, _ = kept(store, layer=0)
    assert (np.abs(keys[:2] - rows[:2]).max(axis=-1)[:, 0] <= MAX_ERROR * sizes[:2] / 127 * 1.0001).all()
    assert not keys[2:].any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_no_number_spoils_itself_alone(bad: float) -> None:
    """It reads back as NaN, as it would in floating point, and no other token is touched."""
    store = Case(num_tokens=40, dtype="int8", num_layers=1).build()
    keys = store.keys.copy()
    keys[7, 1, 3] = bad
    before, _ = kept(store, layer=0)
    whole, later = (store.attend([first, 40], layer=0)[0] for first in (0, 8))
    store.write(0, keys, store.values)
    after, _ = kept(store, layer=0)
    assert np.isnan(after[7, 1]).all()
    mask = np.ones(before.shape, bool)
    mask[7, 1] = False
    np.testing.assert_array_equal(after[mask], before[mask])

    def check() -> None:
        got = store.attend([0, 40], layer=0)[0]
        assert np.isnan(got[2:]).all()  # the queries of KV head 1
        np.testing.assert_allclose(got[:2], whole[:2], atol=1e-4)
        np.testing.assert_allclose(store.attend([8, 40], layer=0)[0], later, atol=1e-4)

    across_simd(check)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_rows_are_rounded_as_the_numbers_they_are(dtype: str) -> None:
    store = Case(num_tokens=1, dtype="int8", num_layers=1, num_kv_heads=2).build()
    wide = np.random.default_rng(5).standard_normal(128).astype(np.float32)
    wide[:64] *= np.float32(2.0**-17)  # among halves mostly subnormal
    bits = wide.astype(np.float16).view(np.uint16) if dtype == "float16" else (wide.view(np.uint32) >> 16)
    rows = bits.astype(np.uint16)
    page, offset = store.table[:1], np.zeros(1, np.int32)
    store.kv.write(
        0, 1, rows.ctypes.data, 0, rows.ctypes.data, 0, dtype, page.ctypes.data, offset.ctypes.data
    )  # fmt: skip
    exact = rows.view(np.float16) if dtype == "float16" else (rows.astype(np.uint32) << 16).view(np.float32)
    expected = dequantised(exact.astype(np.float32).reshape(1, 2, 64))
    np.testing.assert_array_equal(kept(store, layer=0), np.stack([expected, expected]))


# Pages and lanes of an int8 host


def device_page(rows: Floats, dtype: str) -> npt.NDArray[np.uint8]:
    """A device page holding rows [2, layers, tokens, heads, dim] of K and V."""
    geometry = native.KvGeometry(
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=rows.shape[2],
        dtype=dtype,
    )
    page = np.zeros(geometry.page_bytes, np.uint8)
    write_tokens(
        native.PagedKv(geometry, page.ctypes.data, 1), rows, [0] * rows.shape[2], range(rows.shape[2])
    )
    return page


def write_tokens(kv: native.PagedKv, rows: Floats, pages: Any, offsets: Any) -> None:
    ids, at = np.array(pages, np.int32), np.array(offsets, np.int32)
    width = NUM_KV_HEADS * HEAD_DIM
    for layer in range(NUM_LAYERS):
        k, v = (np.ascontiguousarray(rows[i, layer]) for i in range(2))
        kv.write(
            layer, len(ids), k.ctypes.data, width, v.ctypes.data, width, "float32",
            ids.ctypes.data, at.ctypes.data,
        )  # fmt: skip


def bytes_of(kv: native.PagedKv) -> bytes:
    return ctypes.string_at(kv.page_address(0), kv.num_pages * kv.geometry.page_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device_page_size", [6, 130])
def test_a_landed_page_is_what_writing_its_tokens_gives(dtype: str, device_page_size: int) -> None:
    sizes = {"device_page_size": device_page_size, "host_page_size": 7 if device_page_size == 6 else 100}
    rig = Rig(act_dtype=dtype, kv_dtype=dtype, host_kv_dtype="int8", num_host_pages=5, **sizes)
    rows = np.random.default_rng(2).standard_normal((2, NUM_LAYERS, device_page_size, NUM_KV_HEADS, HEAD_DIM))
    rows = (rows * 16).round().astype(np.float32) / 16  # exact in every type
    page = device_page(rows, dtype)
    rig.port.land(1, page.ctypes.data, 2, device_page_size - 3, 5, [3, 1])
    assert rig.host.serve_copy(1)
    geometry = rig.host.kv.geometry
    memory = np.zeros(5 * geometry.page_bytes, np.uint8)
    tokens = np.arange(device_page_size - 3) + 5  # of the host pages 3, 1
    write_tokens(
        native.PagedKv(geometry, memory.ctypes.data, 5),
        rows[:, :, 2:-1],
        np.array([3, 1])[tokens // geometry.page_size],
        tokens % geometry.page_size,
    )
    assert bytes_of(rig.host.kv) == memory.tobytes()


def test_lanes_attend_to_what_an_int8_host_keeps() -> None:
    """Tokens appended one by one across pages; the rig compares with float64 over the rounded rows."""
    rig = Rig(host_kv_dtype="int8")
    for slot in (0, 2):
        rig.open_lane(slot)
    for _ in range(HOST_PAGE * 2 + 1):
        for slot in (0, 2):
            rig.start_token(slot)
        for layer in range(NUM_LAYERS):
            rig.exit(layer, 0, 2)
            rig.serve_all()
            assert sorted(rig.take(layer)) == [0, 2]


def test_bytes_of_int8_count_integers_and_scales() -> None:
    rig = Rig(host_kv_dtype="int8")
    per_token = 2 * NUM_KV_HEADS * (HEAD_DIM + 4)
    rig.open_lane(0)
    for position in range(3):
        rig.start_token(0)
        rig.exit(0, 0)
        rig.serve_all()
        rig.take(0)
        assert rig.host.stats()[0]["kv_bytes_read"] == per_token * (position + 1) * (position + 2) // 2
    page = np.zeros(rig.geometry.device_page_bytes, np.uint8)
    rig.port.land(1, page.ctypes.data, 0, DEVICE_PAGE, 0, [1, 2])
    rig.host.serve_copy(1)
    assert rig.host.stats()[0]["copied_bytes"] == per_token * DEVICE_PAGE * NUM_LAYERS


def test_a_page_of_int8_takes_little_more_than_a_byte_per_element() -> None:
    rig = Rig(host_kv_dtype="int8", host_page_size=64)
    elements = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 64
    assert rig.geometry.host_page_bytes == elements * (HEAD_DIM + 4) // HEAD_DIM
    assert rig.geometry.host_kv_dtype == "int8"
    assert Rig(kv_dtype="bfloat16", act_dtype="bfloat16").geometry.host_kv_dtype == "bfloat16"


# Refusals


def test_nothing_returns_from_an_int8_host() -> None:
    rig = Rig(host_kv_dtype="int8")
    page = np.zeros(rig.geometry.device_page_bytes, np.uint8)
    with pytest.raises(RuntimeError, match="host_kv_dtype is int8, and no page returns"):
        rig.port.fetch(1, 0, 4, 0, [1], page.ctypes.data)
    assert rig.port.free_frames() == rig.geometry.num_frames
    table = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="int8 KV cannot be gathered"):
        rig.host.kv.gather(0, table.ctypes.data, 1, page.ctypes.data, page.ctypes.data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_dtype": "int8"}, "kv_dtype must be float32, bfloat16 or float16, not int8"),
        ({"act_dtype": "int8"}, "act_dtype must be float32, bfloat16 or float16, not int8"),
        ({"host_kv_dtype": "float16"}, "host_kv_dtype must be kv_dtype float32 or int8, not float16"),
        ({"host_kv_dtype": "int4"}, "host_kv_dtype must be float32, bfloat16, float16 or int8, not int4"),
    ],
)
def test_only_the_host_may_keep_int8(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rig(**change)


def test_int8_is_no_type_of_activations() -> None:
    store = Case(num_tokens=1, dtype="int8").build()
    rows, zero = np.zeros(128, np.int8), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="act_dtype must be float32, bfloat16 or float16, not int8"):
        store.kv.write(
            0, 1, rows.ctypes.data, 0, rows.ctypes.data, 0, "int8", zero.ctypes.data, zero.ctypes.data
        )  # fmt: skip
