"""The attention kernel against a short float64 reference, on every path it has."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omniserve import _native as native

Floats = npt.NDArray[np.float32]
DTYPES = ["float32", "bfloat16", "float16"]
HEAD_DIMS = [64, 72, 80, 96, 112, 128, 256]
TOLERANCE = 3e-6  # float32 accumulation over a few hundred tokens of values near 1


ALL_SIMD = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon"]


def is_available(name: str) -> bool:
    try:
        native.set_simd(name)
    except ValueError:
        return False
    finally:
        native.set_simd("auto")
    return True


SIMD = [name for name in ALL_SIMD if is_available(name)]


def rounded(rows: Floats, dtype: str) -> Floats:
    """The values that storage in `dtype` keeps, nearest, ties to even."""
    if dtype == "float16":
        return rows.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = rows.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return rows


def reference(
    q: Floats, keys: Floats, values: Floats, scale: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """q [heads, dim], keys and values [tokens, kv_heads, dim] -> attention [heads, dim], lse [heads]."""
    group = q.shape[0] // keys.shape[1]
    out, lse = np.empty(q.shape), np.empty(q.shape[0])
    for head, query in enumerate(q.astype(np.float64)):
        scores = keys[:, head // group].astype(np.float64) @ query * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group].astype(np.float64) / weights.sum()
        lse[head] = scores.max() + np.log(weights.sum())
    return out, lse


@dataclass(frozen=True)
class Case:
    """One sequence in a store whose pages lie in shuffled order."""

    num_tokens: int
    page_size: int = 16
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    seed: int = 0
    score_size: float = 1.0
    num_layers: int = 2
    rounds_queries: bool = False  # to the storage type, as the queries of a model in that type are

    def build(self) -> "Store":
        return Store(self)

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


class Store:
    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        geometry = native.KvGeometry(
            num_layers=case.num_layers,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            page_size=case.page_size,
            dtype=case.dtype,
        )
        num_pages = -(-case.num_tokens // case.page_size) + 2
        # Whatever was never written must not count, be it NaN.
        self.memory = np.full(num_pages * geometry.page_bytes, 0xFF, np.uint8)
        self.kv = native.PagedKv(geometry, self.memory.ctypes.data, num_pages)
        self.table = rng.permutation(num_pages).astype(np.int32)
        shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
        self.q = rng.standard_normal(
            (case.num_kv_heads * case.group, case.head_dim), np.float32
        ) * np.float32(case.score_size)
        if case.rounds_queries:
            self.q = rounded(self.q, case.dtype)
        self.keys, self.values = (
            rounded(rng.standard_normal(shape, np.float32), case.dtype) for _ in range(2)
        )
        for layer in range(case.num_layers):
            self.write(layer, self.keys, self.values)

    def write(self, layer: int, keys: Floats, values: Floats) -> None:
        tokens = np.arange(len(keys), dtype=np.int32)
        page_ids, offsets = self.table[tokens // self.case.page_size], tokens % self.case.page_size
        width = self.case.num_kv_heads * self.case.head_dim
        self.kv.write(
            layer, len(keys), keys.ctypes.data, width, values.ctypes.data, width, "float32",
            page_ids.ctypes.data, offsets.ctypes.data,
        )  # fmt: skip

    def attend(self, bounds: list[int], layer: int = 1) -> tuple[Floats, Floats]:
        return native.attention_pieces(self.kv, layer, self.q, self.table, bounds, self.case.scale)


def cases_of(dtypes: list[str]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        num_tokens=st.integers(1, 300),
        page_size=st.sampled_from([1, 2, 3, 7, 8, 13, 16, 17, 24, 32, 64]),
        num_kv_heads=st.integers(1, 3),
        group=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9]),
        head_dim=st.sampled_from(HEAD_DIMS),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 2**32 - 1),
        rounds_queries=st.booleans(),
    )


cases = cases_of(DTYPES)


@pytest.fixture(params=ALL_SIMD)
def simd(request: pytest.FixtureRequest) -> Any:
    if request.param not in SIMD:
        pytest.skip(f"this CPU has no {request.param}")
    native.set_simd(request.param)
    yield request.param
    native.set_simd("auto")


def across_simd(check: Any) -> None:
    for name in SIMD:
        native.set_simd(name)
        try:
            check()
        finally:
            native.set_simd("auto")


def test_the_best_path_is_the_default(simd: str) -> None:
    """Also says, by skipping, which paths the tests that compare all of them left out."""
    assert native.simd() == simd
    native.set_simd("auto")
    assert native.simd() == SIMD[-1]


# One sequence


@given(case=cases)
@example(Case(num_tokens=1, page_size=1))
@example(Case(num_tokens=64, page_size=64, group=9, head_dim=256, dtype="bfloat16"))
@example(Case(num_tokens=300, page_size=64, group=8, head_dim=128, dtype="bfloat16", rounds_queries=True))
@example(Case(num_tokens=99, page_size=24, group=5, head_dim=72, dtype="bfloat16", rounds_queries=True))
@example(Case(num_tokens=65, page_size=1, head_dim=72, dtype="float16"))
@example(Case(num_tokens=200, page_size=17, group=64, num_kv_heads=1, head_dim=128))
@settings(max_examples=150, deadline=None)
def test_attention_is_the_reference(case: Case) -> None:
    store = case.build()
    out, lse = reference(store.q, store.keys, store.values, case.scale)

    def check() -> None:
        got, got_lse = store.attend([0, case.num_tokens])
        np.testing.assert_allclose(got, out, atol=TOLERANCE)
        np.testing.assert_allclose(got_lse, lse, atol=TOLERANCE, rtol=1e-6)

    across_simd(check)


@given(case=cases, data=st.data())
@settings(max_examples=100, deadline=None)
def test_merged_pieces_are_the_whole(case: Case, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, case.num_tokens), max_size=6))  # equal cuts make empty pieces
    store = case.build()

    def check() -> None:
        whole, whole_lse = store.attend([0, case.num_tokens])
        merged, merged_lse = store.attend(sorted([0, case.num_tokens, *cuts]))
        np.testing.assert_allclose(merged, whole, atol=TOLERANCE)
        np.testing.assert_allclose(merged_lse, whole_lse, atol=TOLERANCE, rtol=1e-6)

    across_simd(check)


@given(case=cases, data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_range_attends_to_its_own_tokens_only(case: Case, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, case.num_tokens - 1))
    last = data.draw(st.integers(first + 1, case.num_tokens))
    store = case.build()
    out, _ = reference(store.q, store.keys[first:last], store.values[first:last], case.scale)
    across_simd(lambda: np.testing.assert_allclose(store.attend([first, last])[0], out, atol=TOLERANCE))


def test_no_tokens_give_zeros_and_minus_infinity(simd: str) -> None:
    store = Case(num_tokens=20).build()
    for bounds in ([7, 7], [7], [0, 0, 0]):
        out, lse = store.attend(bounds)
        assert not out.any()
        assert np.isneginf(lse).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_size", [1e3, 1e4])
def test_huge_scores_stay_finite_and_exact(simd: str, dtype: str, score_size: float) -> None:
    """Scores of 1e4 differ by thousands: softmax picks the largest, exp must not overflow or give NaN."""
    case = Case(num_tokens=333, group=5, head_dim=128, dtype=dtype, score_size=score_size)
    store = case.build()
    out, lse = reference(store.q, store.keys, store.values, case.scale)
    got, got_lse = store.attend([0, 100, 100, 333])
    assert np.abs(lse).max() > score_size
    # float32 scores carry an error of a few 2^-24 of their size; weights move by as much.
    np.testing.assert_allclose(got, out, atol=score_size * 2e-6)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_is_no_number_gives_none(dtype: str, bad: float) -> None:
    """A broken row must be seen to be broken; the others are what they were."""
    store = Case(num_tokens=150, page_size=64, group=4, dtype=dtype, rounds_queries=True).build()
    before = store.attend([0, 150])[0]
    others = [0, 1, 3, 4, 5, 6, 7]
    store.q[2] = bad

    def check() -> None:
        got = store.attend([0, 150])[0]
        assert np.isnan(got[2]).all()
        np.testing.assert_allclose(got[others], before[others], atol=TOLERANCE)

    across_simd(check)


def test_equal_scores_average_the_values(simd: str) -> None:
    store = Case(num_tokens=97, page_size=8).build()
    store.q[:] = 0.0
    out, lse = store.attend([0, 97])
    means = store.values.astype(np.float64).mean(axis=0).repeat(2, axis=0)
    np.testing.assert_allclose(out, means, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(97.0), rtol=1e-6)


def test_exp_keeps_its_stated_bound(simd: str) -> None:
    x = np.concatenate([-np.geomspace(1e-8, 87.0, 200_000), [0.0, -0.0]]).astype(np.float32)
    y = native.exp_nonpositive(x).astype(np.float64)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(y / exact - 1.0).max() <= 1e-7
    assert not native.exp_nonpositive(np.array([-87.01, -1e4, -np.inf], np.float32)).any()


# Many sequences, on a team of threads


def batch_attention(
    store: Store,
    team: native.ThreadTeam,
    context_lens: npt.NDArray[np.int32],
    q: Floats,
    layer: int = 0,
    window: int = 0,
) -> Floats:
    tables = np.tile(store.table, (len(context_lens), 1))
    out = np.full_like(q, np.nan)
    native.paged_attention(
        team, store.kv, layer, len(context_lens), q.ctypes.data, tables.ctypes.data, tables.shape[1],
        context_lens.ctypes.data, out.ctypes.data, store.q.shape[0], store.case.scale, window,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("window", [1, 16, 100, 700, 5000])
def test_a_query_with_a_window_attends_to_the_last_tokens_alone(
    teams: list[native.ThreadTeam], window: int
) -> None:
    store = Case(num_tokens=3000, page_size=16, group=2, num_layers=1).build()
    context_lens = np.array([1, 100, 2999, 0, 701], np.int32)
    q = np.random.default_rng(1).standard_normal((len(context_lens), *store.q.shape), np.float32)
    for team in teams:
        out = batch_attention(store, team, context_lens, q, window=window)
        for i, length in enumerate(context_lens.tolist()):
            expected, _ = native.attention_pieces(
                store.kv, 0, q[i], store.table, [max(0, length - window), length], store.case.scale
            )
            np.testing.assert_allclose(out[i], expected, atol=2e-6)


@pytest.fixture(scope="module")
def teams() -> list[native.ThreadTeam]:
    return [native.ThreadTeam(1), native.ThreadTeam(3)]


@given(
    lens=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    group=st.integers(1, 4),
    page_size=st.sampled_from([5, 16, 64]),
)
@example(lens=[3000], dtype="float32", group=1, page_size=16)
@example(lens=[0, 3000, 1], dtype="bfloat16", group=3, page_size=5)
@settings(max_examples=25, deadline=None)
def test_one_thread_and_three_give_the_reference(
    teams: list[native.ThreadTeam], lens: list[int], dtype: str, group: int, page_size: int
) -> None:
    store = Case(num_tokens=3000, page_size=page_size, group=group, dtype=dtype, num_layers=1).build()
    context_lens = np.array(lens, np.int32)
    q = np.random.default_rng(1).standard_normal((len(lens), *store.q.shape), np.float32)
    for team in teams:
        out = batch_attention(store, team, context_lens, q)
        for i, length in enumerate(lens):
            if length == 0:
                assert not out[i].any()
                continue
            expected, _ = reference(q[i], store.keys[:length], store.values[:length], store.case.scale)
            np.testing.assert_allclose(out[i], expected, atol=TOLERANCE)


def test_a_team_is_as_good_the_hundredth_time(teams: list[native.ThreadTeam]) -> None:
    store = Case(num_tokens=1200, num_layers=1).build()
    q = store.q[None].copy()
    lens = np.array([1200], np.int32)
    first = batch_attention(store, teams[1], lens, q)
    for _ in range(100):
        np.testing.assert_allclose(batch_attention(store, teams[1], lens, q), first, atol=TOLERANCE)


# Writing and gathering


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_gather_returns_what_was_written(dtype: str, page_size: int) -> None:
    store = Case(num_tokens=37, page_size=page_size, num_kv_heads=3, head_dim=80, dtype=dtype).build()
    storage = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    for first, last in ((0, 37), (5, 31), (12, 12)):
        k, v = (np.empty((3, last - first, 80), storage) for _ in range(2))
        store.kv.gather(1, store.table.ctypes.data, last, k.ctypes.data, v.ctypes.data, first)
        for got, rows in ((k, store.keys), (v, store.values)):
            wide = (
                (got.astype(np.uint32) << 16).view(np.float32)
                if dtype == "bfloat16"
                else got.astype(np.float32)
            )
            np.testing.assert_array_equal(wide, rows[first:last].transpose(1, 0, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_writes_round_to_nearest_even(dtype: str) -> None:
    """Ties, halves of the smallest subnormal, overflow and the signs of zero, as numpy rounds them."""
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    special = [
        0.0,
        -0.0,
        1 + step,
        1 + 3 * step,
        -1 - step,
        65504.0,
        65520.0,
        1e9,
        np.inf,
        -np.inf,
        2.0**-24,
        2.0**-25,
    ]
    special += [3 * 2.0**-25, 6.1e-5, 5.9e-8, 1e-30]
    rows = np.resize(np.array(special, np.float32), (1, 1, 64))
    store = Case(num_tokens=1, num_kv_heads=1, dtype=dtype, num_layers=1).build()
    store.write(0, rows, rows)
    k, v = (np.empty(64, np.uint16) for _ in range(2))
    store.kv.gather(0, store.table.ctypes.data, 1, k.ctypes.data, v.ctypes.data)
    with np.errstate(over="ignore"):
        kept = rounded(rows.ravel(), dtype)
    bits = kept.astype(np.float16).view(np.uint16) if dtype == "float16" else (kept.view(np.uint32) >> 16)
    np.testing.assert_array_equal(k, bits)
    np.testing.assert_array_equal(v, bits)


def test_a_write_outside_the_store_changes_nothing() -> None:
    store = Case(num_tokens=10).build()
    before = store.memory.copy()
    rows = np.zeros((2, 128), np.float32)
    for page_ids, offsets, message in (
        ([0, 3], [0, 0], r"page 3 is outside 0 \.\. 2"),
        ([0, -1], [0, 0], r"page -1 is outside"),
        ([0, 1], [0, 16], r"token 16 is outside 0 \.\. 15"),
    ):
        ids, at = np.array(page_ids, np.int32), np.array(offsets, np.int32)
        with pytest.raises(ValueError, match=message):
            store.kv.write(
                0, 2, rows.ctypes.data, 128, rows.ctypes.data, 128, "float32", ids.ctypes.data, at.ctypes.data
            )
    np.testing.assert_array_equal(store.memory, before)


# Errors name field and limit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 32}, "head_dim must be a multiple of 8 from 64 to 256, not 32"),
        ({"head_dim": 100}, "head_dim must be a multiple of 8 from 64 to 256, not 100"),
        ({"page_size": 0}, "page_size must be from 1 to 1048576, not 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be from 1 to 65536, not 0"),
        ({"dtype": "int4"}, "dtype must be float32, bfloat16, float16 or int8, not int4"),
    ],
)
def test_a_bad_geometry_is_refused(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {
        "num_layers": 1, "num_kv_heads": 1, "head_dim": 64, "page_size": 16, "dtype": "float32",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        native.KvGeometry(**{**sizes, **change})


def test_attention_refuses_heads_and_pages_that_do_not_fit(teams: list[native.ThreadTeam]) -> None:
    store = Case(num_tokens=10).build()
    with pytest.raises(ValueError, match="num_heads must be a positive multiple of num_kv_heads 2, not 3"):
        native.attention_pieces(store.kv, 0, store.q[:3], store.table, [0, 1], 1.0)
    with pytest.raises(ValueError, match="needs 4 pages, more than the page table's 3"):
        batch_attention(store, teams[0], np.array([49], np.int32), store.q[None].copy())
    store.table[0] = 77
    with pytest.raises(ValueError, match=r"page 77 is outside 0 \.\. 2"):
        store.attend([0, 1])
    with pytest.raises(ValueError, match=r"simd must be auto, scalar, .* or neon, not sse"):
        native.set_simd("sse")
