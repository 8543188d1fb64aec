# SPDX-License-Identifier: Apache-2.0
"""The same bits come out whatever the threads, batch, heads, strides, length that follows and width of vectors.

Compared as bytes, but for -0 and +0 where a sum ends in exact zeros. One test says that bits differ where they should.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from cases import Clustered, Opened, draw_cancelling, each_isa

import combiner
from combiner import Axial, AxialMixture, Dense, Fixed, HeavilyCompressed, LogSparse, Routing, Tree, Window

PATTERNS = [
    Dense(),
    Fixed(8),
    Fixed(70),
    LogSparse(),
    LogSparse(hierarchical=True),
    Fixed(16).sparse(),
    Axial(8),
    Axial(70, "horizontal"),
    Axial(9, "horizontal"),
    Axial(12, "rowmajor"),
    Axial(12, "rowmajor", "weighted"),
    AxialMixture(11),
    AxialMixture(100),
    Tree(2),
    Tree(3, 2),
    Tree(7).sparse(),
    Axial(8).sparse(),
    Clustered(7),
    Clustered(100),
    Clustered(5).sparse(),
    Window(1),
    Window(20),
    Window(100),
    Fixed(8, window=12),
    Fixed(70, window=20),
    Fixed(16, window=50).sparse(),
    Opened(Fixed(8), 64),
    Opened(Fixed(5), 32),
    Opened(Fixed(7), 20),
    Opened(Fixed(8, window=12), 1),
    Opened(Fixed(70), 1, 2),
    Opened(Fixed(5), 16).sparse(),
    Opened(Fixed(5), 16, open=False),
    HeavilyCompressed(1, 1),
    HeavilyCompressed(8, 12),
    HeavilyCompressed(70, 20),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
both_directions = pytest.mark.parametrize("is_causal", (True, False))
both_dtypes = pytest.mark.parametrize("dtype", (np.float32, np.float64, ml_dtypes.bfloat16))


def draw(rng, L=150, B=2, Hq=4, Hk=2, D=20, Dv=12, dtype=np.float32) -> list[np.ndarray]:
    """query, key, value, and the cotangents of out and lse."""
    shapes = [(B, Hq, L, D), (B, Hk, L, D), (B, Hk, L, Dv), (B, Hq, L, Dv), (B, Hq, L)]
    *arrays, grad_lse = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return [*arrays, grad_lse.astype(np.float64 if dtype == np.float64 else np.float32)]


def run(arrays, pattern, **options) -> list[np.ndarray]:
    """out, lse, dq, dk, dv."""
    q, k, v, grad_out, grad_lse = arrays
    out, lse = combiner.attention(q, k, v, pattern, return_lse=True, **options)
    again, saved = combiner.attention_forward(q, k, v, pattern, **options)
    assert again.tobytes() == out.tobytes()
    return [out, lse, *combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)[:3]]


def assert_same(actual, expected) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.shape == y.shape and x.tobytes() == np.ascontiguousarray(y).tobytes(), name


@both_dtypes
@both_directions
@every_pattern
def test_threads(rng, pattern, is_causal, dtype):
    arrays = draw(rng, dtype=dtype)
    with combiner.num_threads(1):
        expected = run(arrays, pattern, is_causal=is_causal)
    for threads in (2, 3, 7):
        with combiner.num_threads(threads):
            for _ in range(3):
                assert_same(run(arrays, pattern, is_causal=is_causal), expected)


@both_dtypes
def test_a_tile_that_shows_a_query_nothing_keeps_its_lse(rng, dtype):
    """Before position 0 lies no other cluster, though its neighbours see some: its lse is that of itself alone."""
    q, k, v = rng.standard_normal((3, 200, 3, 4)).astype(dtype)
    _, lse = combiner.attention(q, k, v, Routing([0, 1, 2]), is_causal=True, return_lse=True)
    _, alone = combiner.attention(q[:, :1], k[:, :1], v[:, :1], Dense(), is_causal=True, return_lse=True)
    assert np.ascontiguousarray(lse[:, :1]).tobytes() == alone.tobytes()


LONG = [  # beyond the sizes of tasks and of chunks
    Fixed(64),
    Fixed(600),
    LogSparse(),
    LogSparse(hierarchical=True),
    Axial(70),
    Axial(130, "horizontal"),
    Axial(64, "rowmajor"),
    Axial(70, "rowmajor", "weighted"),
    AxialMixture(70),
    Tree(2),
    Tree(13),
    Clustered(40),
    Clustered(600),
    Window(16),
    Window(600),
    Fixed(16, window=16),
    Fixed(128, window=100),
    Fixed(600, window=1000),
    Opened(Fixed(64), 64),
    Opened(Tree(5), 16),
    Opened(LogSparse(), 1),
    HeavilyCompressed(16, 16),
    HeavilyCompressed(128, 128),
    HeavilyCompressed(600, 300),
]


@both_directions
@pytest.mark.parametrize("pattern", [Dense(), *LONG], ids=str)
def test_threads_on_many_tasks(rng, pattern, is_causal):
    arrays = draw(rng, L=2500, B=1, Hq=2, Hk=1, D=8, Dv=8)
    with combiner.num_threads(1):
        expected = run(arrays, pattern, is_causal=is_causal)
    for threads in (2, 7):
        with combiner.num_threads(threads):
            assert_same(run(arrays, pattern, is_causal=is_causal), expected)


SHARED = [Fixed(64), LogSparse(), LogSparse(hierarchical=True), Tree(5), Tree(8), Axial(70, "rowmajor"), Window(50)]
OPTIONS: dict[str, Callable[[np.random.Generator, int], dict]] = {
    "mask": lambda rng, regions: {"key_mask": rng.random((1, 1500)) < 0.5},
    "nearly all masked": lambda rng, regions: {"key_mask": np.arange(1500)[None] % 300 == 7},
    "terms": lambda rng, regions: {
        "softcap": 2.0,
        "key_bias": rng.standard_normal((1, 1, 1500), dtype=np.float32),
        "region_bias": rng.standard_normal((1, 2, regions), dtype=np.float32),
        "sink": rng.standard_normal(2, dtype=np.float32),
    },
    "dropout": lambda rng, regions: {"dropout_p": 0.3, "seed": 5},
    "packed": lambda rng, regions: {"cu_seqlens": [0, 1, 90, 1500]},  # LogSparse of 89 has no blocks beyond a task's
    "learned": lambda rng, regions: {
        "region_query": rng.standard_normal((1, 2, regions, 16), dtype=np.float32),
        "region_key": rng.standard_normal((1, 1, regions, 16), dtype=np.float32),
    },
}


@both_directions
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SHARED, ids=str)
def test_threads_that_share_a_head(rng, pattern, options, is_causal):
    """All gradients of one key head with two query heads, under all that a call may carry."""
    arrays = draw(rng, L=1500, B=1, Hq=2, Hk=1, D=16, Dv=12)
    regions = pattern.plan(1500, is_causal=is_causal).region_count
    if options in ("terms", "learned") and not regions:
        pytest.skip("no regions")
    given = OPTIONS[options](rng, regions)
    results = []
    for threads in (1, 2, 5):
        with combiner.num_threads(threads):
            _, saved = combiner.attention_forward(*arrays[:3], pattern, is_causal=is_causal, **given)
            gradients = combiner.attention_backward(arrays[3], saved, grad_lse=arrays[4])
        results.append([x for x in gradients if x is not None])
    assert len(results[0]) == 3 + len({"key_bias", "region_bias", "sink", "region_query", "region_key"} & set(given))
    for other in results[1:]:
        assert [x.tobytes() for x in other] == [x.tobytes() for x in results[0]]


def test_threads_that_share_heads_with_plans_of_their_own(rng):
    """A plan may have fewer regions than the given keys have rows: the gradients of the others are zeros."""
    arrays = draw(rng, L=1500, B=1, Hq=2, Hk=2, D=16, Dv=12)
    plans = Fixed(64).plan(1500, is_causal=True), Fixed(128).plan(1500, is_causal=True)
    given = {"region_key": rng.standard_normal((1, 2, plans[0].region_count, 16), dtype=np.float32)}
    results = []
    for threads in (1, 3):
        combiner.release_memory()
        with combiner.num_threads(threads):
            _, saved = combiner.attention_forward(*arrays[:3], plans, is_causal=True, **given)
            np.full((1, 2, plans[0].region_count, 16), np.nan, np.float32)  # what the freed memory holds
            results.append(combiner.attention_backward(arrays[3], saved))
    assert not results[1].region_key[0, 1, plans[1].region_count :].any()
    for x, y in zip(*results, strict=True):
        assert (x is None and y is None) or x.tobytes() == y.tobytes()


def test_threads_at_rows_listed_twice(rng):
    """One item of a head that threads share asks for a gradient row more than once, within a chunk and across two."""
    arrays = draw(rng, L=1500, B=1, Hq=2, Hk=1, D=16, Dv=16)
    plan = combiner.Plan.from_parts(
        [[0, i, i // 2, i // 2, *range(max(0, i - 150), i, 3), 0] for i in range(1500)],
        [[r for r in range(i // 50) for _ in range(1 + r % 2)] for i in range(1500)],
        [[50 * r, *range(50 * r, 50 * r + 50), 50 * r] for r in range(30)],
        is_causal=True,
    )
    with combiner.num_threads(1):
        expected = run(arrays, plan, is_causal=True)
    for threads in (2, 7):
        with combiner.num_threads(threads):
            for _ in range(3):
                assert_same(run(arrays, plan, is_causal=True), expected)


@both_directions
@every_pattern
def test_one_head_and_one_batch_entry_at_a_time(rng, pattern, is_causal):
    arrays = draw(rng)
    expected = run(arrays, pattern, is_causal=is_causal)
    for b in range(2):
        for h in range(2):  # a key head and its two query heads

            def part(x, b=b, h=h):
                return x[b : b + 1, h : h + 1] if x.shape[1] == 2 else x[b : b + 1, 2 * h : 2 * h + 2]

            assert_same(run([part(x) for x in arrays], pattern, is_causal=is_causal), [part(x) for x in expected])
        whole = run([x[b] for x in arrays], pattern, is_causal=is_causal)
        assert_same(whole, [x[b] for x in expected])
    for h in range(4):  # a query head alone, with its key head
        q, k, v = arrays[0][:, h : h + 1], arrays[1][:, h // 2 : h // 2 + 1], arrays[2][:, h // 2 : h // 2 + 1]
        alone = combiner.attention(q, k, v, pattern, is_causal=is_causal, return_lse=True)
        for x, y in zip(alone, expected[:2], strict=True):
            assert x.tobytes() == y[:, h : h + 1].tobytes()


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same numbers in other places: any strides with contiguous features."""
    padded = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
    padded[..., : x.shape[-1]] = x
    return {
        "[B, L, H, D]": np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        "[L, B, H, D]": np.ascontiguousarray(x.transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
        "backwards": np.ascontiguousarray(x[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "padded rows": padded[..., : x.shape[-1]],
        "every third row": np.repeat(x, 3, axis=2)[:, :, 1::3],
        "unaligned": np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
        "features apart": np.repeat(x, 2, axis=3)[..., ::2],
    }


@both_directions
@every_pattern
def test_strides(rng, pattern, is_causal):
    arrays = draw(rng, L=90)
    mask = rng.random((2, 90)) < 0.8
    expected = run(arrays, pattern, is_causal=is_causal, key_mask=mask)
    views = [layouts(x) for x in arrays[:4]]
    for name in views[0]:
        again = [view[name] for view in views]
        before = [x.tobytes() for x in again]
        actual = run([*again, arrays[4][::-1][::-1]], pattern, is_causal=is_causal, key_mask=mask[:, ::-1][:, ::-1])
        assert_same(actual, expected)
        assert before == [x.tobytes() for x in again], "an input was written"


@both_directions
@every_pattern
def test_broadcast_strides(rng, pattern, is_causal):
    """One array for every head and batch entry, by strides of zero."""
    q, k, v, grad_out, grad_lse = draw(rng, L=70, B=1, Hq=1, Hk=1)
    small = [np.broadcast_to(x, (2, 3, *x.shape[2:])) for x in (q, k, v, grad_out, grad_lse)]
    copies = [np.ascontiguousarray(x) for x in small]
    assert_same(run(small, pattern, is_causal=is_causal), run(copies, pattern, is_causal=is_causal))
    repeated = np.broadcast_to(k[:, :, :1], k.shape)  # one key for every position
    for x, y in zip(
        combiner.attention(q, repeated, v, pattern, is_causal=is_causal, return_lse=True),
        combiner.attention(q, np.ascontiguousarray(repeated), v, pattern, is_causal=is_causal, return_lse=True),
        strict=True,
    ):
        assert x.tobytes() == y.tobytes()


@both_dtypes
@every_pattern
def test_causal_prefix(rng, pattern, dtype):
    """Row i depends on nothing after i, the length included: forward, and backward where nothing flows in after it."""
    arrays = draw(rng, L=210, B=1, dtype=dtype)
    out, lse, *_ = run(arrays, pattern, is_causal=True)
    for length in (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 209):
        short = [np.ascontiguousarray(x[:, :, :length]) for x in arrays]
        long = [
            *arrays[:3],
            *(np.concatenate([x, 0 * y[:, :, length:]], axis=2) for x, y in zip(short[3:], arrays[3:], strict=True)),
        ]
        actual, expected = run(short, pattern, is_causal=True), run(long, pattern, is_causal=True)
        assert actual[0].tobytes() == out[:, :, :length].tobytes(), length
        assert actual[1].tobytes() == lse[:, :, :length].tobytes(), length
        for name, x, y in zip(("dq", "dk", "dv"), actual[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(x, y[:, :, :length], err_msg=f"{name} of the first {length}")
            assert not y[:, :, length:].any()


@every_pattern
def test_causal_prefix_of_pairs(rng, pattern):
    """Products of bfloat16 pairs add words in groups: a row has the same place in them at every length."""
    if isinstance(pattern, Opened) and not pattern.open:
        pytest.skip("which regions a tile has depends on the choices of all its queries")
    query, key, value = draw_cancelling(rng, 1, 2, 210, 8)
    for isa in each_isa(pairing=True):
        out = combiner.attention(query, key, value, pattern, is_causal=True)
        for length in range(1, 131):
            short = [np.ascontiguousarray(x[:, :, :length]) for x in (query, key, value)]
            own = combiner.attention(*short, pattern, is_causal=True)
            assert own.tobytes() == out[:, :, :length].tobytes(), f"{isa}, length {length}"


@pytest.mark.parametrize("pattern", LONG, ids=str)
def test_long_causal_prefix(rng, pattern):
    """The same beyond the sizes of tasks and of LogSparse's chunks."""
    arrays = draw(rng, L=4500, B=1, Hq=1, Hk=1, D=4, Dv=4)
    for length in (601, 1024, 2049, 4095, 4097):
        short, long = [x[:, :, :length] for x in arrays], [x.copy() for x in arrays]
        for cotangent in long[3:]:
            cotangent[:, :, length:] = 0
        actual, expected = run(short, pattern, is_causal=True), run(long, pattern, is_causal=True)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
            np.testing.assert_array_equal(x, y[:, :, :length], err_msg=f"{name} of the first {length}")


@both_directions
def test_many_heads(rng, is_causal):
    """More heads than are worked on at once, each as if it were alone."""
    arrays = draw(rng, L=40, B=6, Hq=24, Hk=12, D=6, Dv=6)
    expected = run(arrays, LogSparse(), is_causal=is_causal)
    with combiner.num_threads(3):
        assert_same(run(arrays, LogSparse(), is_causal=is_causal), expected)
    for b, h in ((0, 0), (3, 7), (5, 11)):
        part = [x[b : b + 1, h : h + 1] if x.shape[1] == 12 else x[b : b + 1, 2 * h : 2 * h + 2] for x in arrays]
        actual = run(part, LogSparse(), is_causal=is_causal)
        for x, y in zip(actual, expected, strict=True):
            heads = slice(h, h + 1) if y.shape[1] == 12 else slice(2 * h, 2 * h + 2)
            assert x.tobytes() == y[b : b + 1, heads].tobytes()


@pytest.mark.skipif(len(combiner.info()["isas"]) < 3, reason="needs two instruction sets with FMA")
@both_dtypes
@both_directions
@every_pattern
def test_instruction_sets_with_fma(rng, pattern, is_causal, dtype):
    arrays = draw(rng, dtype=dtype, D=37, Dv=21)
    mask = rng.random((2, 150)) < 0.9
    results = [run(arrays, pattern, is_causal=is_causal, key_mask=mask) for isa in each_isa() if isa != "base"]
    for other in results[1:]:
        assert_same(other, results[0])


def test_bits_differ_where_they_should(rng):
    """The comparison is alive: another span, or arithmetic without FMA, moves bits that no tolerance would see."""
    arrays = draw(rng)
    expected = run(arrays, Fixed(8), is_causal=True)
    with pytest.raises(AssertionError):
        assert_same(run(arrays, Fixed(9), is_causal=True), expected)
    by_isa = {isa: run(arrays, Dense(), is_causal=True) for isa in each_isa()}
    for isa, results in by_isa.items():
        if isa != "base":
            np.testing.assert_allclose(results[0], by_isa["base"][0], rtol=0, atol=1e-5)
            with pytest.raises(AssertionError):
                assert_same(results, by_isa["base"])


def test_many_repeats(rng):
    """The same call 200 times over, on as many threads as there are tasks to race."""
    arrays = draw(rng, L=300, D=8, Dv=8)
    with combiner.num_threads(7):
        expected = run(arrays, LogSparse(hierarchical=True))
        for _ in range(200):
            assert_same(run(arrays, LogSparse(hierarchical=True)), expected)
