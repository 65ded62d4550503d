"""Attention of prompts over their pages against a float64 reference, on every path it has."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from host.test_kernel import DTYPES, SIMD, TOLERANCE, Case, Floats, Store, reference, rounded
from omniserve import _native as native

NUM_TOKENS = 400
LAYER = 1  # of two
GAP = 5  # elements between rows of a result
Chunks = list[tuple[int, int]]  # of each: the position of its first token, its number of tokens


@pytest.fixture(scope="module")
def teams() -> list[native.ThreadTeam]:
    return [native.ThreadTeam(1), native.ThreadTeam(3)]


def queries(store: Store, num_rows: int) -> Floats:
    q = np.random.default_rng(1).standard_normal((num_rows, *store.q.shape), np.float32)
    return rounded(q, store.case.dtype) if store.case.rounds_queries else q


def prompt_attention(
    store: Store, team: native.ThreadTeam, chunks: Chunks, q: Floats, window: int = 0, first_row: int = 0
) -> Floats:
    """Rows `first_row`.. of q are those of the chunks, one after the other; the rest stays NaN."""
    counts = np.array([count for _, count in chunks], np.int64)
    firsts = first_row + np.cumsum(counts) - counts
    starts = np.array([start for start, _ in chunks], np.int64)
    pages = [-(-(start + count) // store.case.page_size) for start, count in chunks]
    tables = np.full((len(chunks), len(store.table)), -1, np.int32)  # behind its end a table is never read
    for table, num_pages in zip(tables, pages, strict=True):
        table[:num_pages] = store.table[:num_pages]
    width, stride = q[0].size, q[0].size + GAP
    out = np.full((len(q), stride), np.nan, np.float32)
    native.prompt_attention(
        team, store.kv, LAYER, np.stack([firsts, counts, starts], axis=1), tables.ctypes.data,
        tables.shape[1], "float32", q.ctypes.data, width, out.ctypes.data, stride, store.q.shape[0],
        store.case.scale, window,
    )  # fmt: skip
    assert np.isnan(out[:, width:]).all(), "written between rows"
    return out[:, :width].reshape(q.shape)


def one_layer(case: Case) -> Store:
    """A store that has keys and values in `LAYER` alone; elsewhere it holds what is no number."""
    store = case.build()
    layers = store.memory.reshape(store.kv.num_pages, case.num_layers, -1)
    layers[:, 1 - LAYER] = 0xFF
    return store


def expected_of(store: Store, chunks: Chunks, q: Floats, window: int = 0) -> npt.NDArray[np.float64]:
    """What each row's token sees is itself and what came before it, the last `window` of that."""
    positions = [start + i for start, count in chunks for i in range(count)]
    firsts = [max(0, p + 1 - window) if window else 0 for p in positions]
    seen = [slice(first, position + 1) for first, position in zip(firsts, positions, strict=True)]
    return np.stack(
        [
            reference(row, store.keys[s], store.values[s], store.case.scale)[0]
            for row, s in zip(q, seen, strict=True)
        ]
    )


chunk_lists = st.lists(
    st.integers(0, NUM_TOKENS - 2).flatmap(
        lambda start: st.tuples(st.just(start), st.integers(1, min(130, NUM_TOKENS - start)))
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("simd", SIMD)
@given(
    chunks=chunk_lists,
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([1, 2, 3, 8]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([64, 72, 128]),
    page_size=st.sampled_from([5, 16, 64]),
    window=st.sampled_from([0, 1, 7, 64, 100, 1000]),
    rounds_queries=st.booleans(),
)
@example(
    chunks=[(0, 130)],
    dtype="float32",
    group=3,
    num_kv_heads=3,
    head_dim=64,
    page_size=16,
    window=0,
    rounds_queries=False,
)
@example(
    chunks=[(63, 2)],
    dtype="float32",
    group=1,
    num_kv_heads=1,
    head_dim=64,
    page_size=64,
    window=1,
    rounds_queries=False,
)
@example(
    chunks=[(200, 130)],
    dtype="bfloat16",
    group=8,
    num_kv_heads=1,
    head_dim=128,
    page_size=5,
    window=7,
    rounds_queries=True,
)
@settings(max_examples=15, deadline=None)
def test_a_token_sees_itself_and_what_came_before(
    simd: str,
    teams: list[native.ThreadTeam],
    chunks: Chunks,
    dtype: str,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window: int,
    rounds_queries: bool,
) -> None:
    store = one_layer(Case(
        num_tokens=NUM_TOKENS, page_size=page_size, num_kv_heads=num_kv_heads, group=group,
        head_dim=head_dim, dtype=dtype, num_layers=2, rounds_queries=rounds_queries,
    ))  # fmt: skip
    q = queries(store, sum(count for _, count in chunks))
    expected = expected_of(store, chunks, q, window)
    native.set_simd(simd)
    try:
        for team in teams:
            out = prompt_attention(store, team, chunks, q, window)
            np.testing.assert_allclose(out, expected, atol=TOLERANCE)
    finally:
        native.set_simd("auto")


def test_rows_of_others_are_left_alone(teams: list[native.ThreadTeam]) -> None:
    store = one_layer(Case(num_tokens=NUM_TOKENS, num_layers=2))
    q = queries(store, 2 + 40 + 3)
    out = prompt_attention(store, teams[1], [(10, 40)], q, first_row=2)
    assert np.isnan(out[:2]).all()
    assert np.isnan(out[42:]).all()
    np.testing.assert_allclose(out[2:42], expected_of(store, [(10, 40)], q[2:42]), atol=TOLERANCE)


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [5, 64])
@pytest.mark.parametrize("window", [0, 9])
def test_what_was_never_written_counts_for_nothing(
    teams: list[native.ThreadTeam], simd: str, dtype: str, page_size: int, window: int
) -> None:
    """The last page of a prompt is read as far as it is written: behind that the store holds NaN."""
    store = one_layer(Case(num_tokens=71, page_size=page_size, dtype=dtype, num_layers=2))
    q = queries(store, 71)
    native.set_simd(simd)
    try:
        out = prompt_attention(store, teams[0], [(0, 71)], q, window)
    finally:
        native.set_simd("auto")
    np.testing.assert_allclose(out, expected_of(store, [(0, 71)], q, window), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_come_and_go_in_the_type_of_the_model(teams: list[native.ThreadTeam], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    store = one_layer(Case(num_tokens=100, dtype=dtype, num_layers=2))
    q = torch.from_numpy(queries(store, 30)).to(getattr(torch, dtype)).reshape(30, -1)
    rows = torch.empty(30, 2 * q.shape[1], dtype=q.dtype)  # as in the product that makes q, k and v together
    rows[:, : q.shape[1]] = q
    out = torch.empty_like(q)
    chunks = np.array([[0, 30, 70]], np.int64)
    native.prompt_attention(
        teams[1], store.kv, LAYER, chunks, store.table.ctypes.data, len(store.table), dtype,
        rows.data_ptr(), rows.stride(0), out.data_ptr(), out.stride(0), store.q.shape[0], store.case.scale,
    )  # fmt: skip
    wide = q.float().numpy().reshape(30, *store.q.shape)
    exact = torch.from_numpy(expected_of(store, [(70, 30)], wide)).reshape(30, -1)
    step = 2.0 ** (-7 if dtype == "bfloat16" else -10)
    assert ((out.double() - exact).abs() <= step * exact.abs() + 1e-3 * step).all()


def test_the_pieces_do_not_show(teams: list[native.ThreadTeam]) -> None:
    """A prompt in one chunk and the same in many give the same within rounding."""
    store = one_layer(Case(num_tokens=NUM_TOKENS, num_layers=2))
    q = queries(store, NUM_TOKENS)
    whole = prompt_attention(store, teams[0], [(0, NUM_TOKENS)], q)
    for start in range(0, NUM_TOKENS, 50):
        part = prompt_attention(store, teams[1], [(start, 50)], q[start : start + 50])
        np.testing.assert_allclose(part, whole[start : start + 50], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([(0, 0)], r"chunks\[0\] needs at least one row"),
        ([(-1, 3)], r"chunks\[0\] needs at least one row, and must not start before 0"),
        ([(0, 3), (40, 9)], r"chunks\[1\] needs 4 pages, more than the page table's 3"),
    ],
)
def test_chunks_outside_their_table_are_refused(
    teams: list[native.ThreadTeam], chunks: Chunks, message: str
) -> None:
    store = one_layer(Case(num_tokens=10, num_layers=2))
    with pytest.raises(ValueError, match=message):
        prompt_attention(store, teams[0], chunks, queries(store, 20))


def test_a_page_outside_the_store_is_refused(teams: list[native.ThreadTeam]) -> None:
    store = one_layer(Case(num_tokens=10, num_layers=2))
    store.table[0] = 77
    with pytest.raises(ValueError, match=r"page 77 is outside 0 \.\. 2"):
        prompt_attention(store, teams[0], [(0, 3)], queries(store, 3))
