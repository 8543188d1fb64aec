# SPDX-License-Identifier: Apache-2.0
"""`attend` of some consecutive positions, by an offset: the bits of those rows among all, and their gradients alone."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from cases import STAGED, agree, close, each_isa, problem

import combiner
from combiner import (
    Axial,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Tree,
    Window,
    reference,
)

OF_BITS = [case for case in STAGED if case.L > 17]
OF_GRADIENTS = [case for case in STAGED if case.L in (17, 97)]
WIDE = (np.float32, np.float64)
NARROW = (np.float16, ml_dtypes.bfloat16)


def slices_of(L: int) -> list[tuple[int, int]]:
    """First position and number of queries: none, one, some in the middle of a tile, all."""
    return sorted({(L, 0), (0, 1), (L - 1, 1), (L // 3, (L + 1) // 2), (0, L)})


def given(p) -> tuple[list, dict]:
    """The arguments of attend for a problem: its arrays and summaries, and its options."""
    summary = combiner.summarize(*p.inputs, p.pattern, **p.of_summarize)
    return [*p.inputs, summary.key, summary.value], p.of_attend | {"region_bias": summary.bias}


def cut(x: np.ndarray, first: int, n: int) -> np.ndarray:
    return x[..., first : first + n, :]


@pytest.mark.parametrize("case", OF_BITS, ids=str)
def test_the_bits_of_the_rows(case):
    for isa in each_isa(pairing=True):
        for dtype in (*WIDE, *NARROW):
            p = problem(case).as_type(dtype)
            (query, *others), options = given(p)
            out, lse = combiner.attend(query, *others, p.pattern, return_lse=True, **options)
            for first, n in slices_of(case.L):
                part = cut(query, first, n), *others, p.pattern
                own, own_lse = combiner.attend(*part, offset=first, return_lse=True, **options)
                where = f"{isa} {np.dtype(dtype)} {first} {n}"
                assert own.dtype == dtype and own.shape == cut(out, first, n).shape, where
                assert own.tobytes() == cut(out, first, n).tobytes(), where
                assert own_lse.tobytes() == lse[..., first : first + n].tobytes(), where


@pytest.mark.parametrize("case", OF_GRADIENTS, ids=str)
def test_gradients_are_those_of_the_rows(case):
    p = problem(case)
    (query, *others), options = given(p)
    for first, n in slices_of(case.L):
        inputs, options = (cut(query, first, n), *others, p.pattern), options | {"offset": first}
        out, saved = combiner.attend_forward(*inputs, **options)
        expected, exact = reference.attend_forward(*inputs, **options)
        close(out, expected, 1e-10 * (1 + np.abs(expected).max(initial=0)), "out")
        grads = cut(p.grad_out, first, n), p.grad_lse[..., first : first + n]
        made = combiner.attend_backward(grads[0], pickle.loads(pickle.dumps(saved)), grad_lse=grads[1])
        agree(made, reference.attend_backward(grads[0], exact, grad_lse=grads[1]))
        assert made.query.shape == inputs[0].shape and made.key.shape == others[0].shape


@pytest.mark.parametrize("pattern", (Fixed(16), HeavilyCompressed(16, 20), Axial(12, "rowmajor"), Dense()), ids=str)
@pytest.mark.parametrize("threads", (1, 3))
def test_gradients_add_up(rng, pattern, threads):
    """Over slices that divide the positions, gradients of keys, values and regions add up to those of all."""
    L, R = 300, pattern.plan(300, True).region_count
    q, k, v, grad = (rng.standard_normal((2, heads, L, 8)) for heads in (4, 2, 2, 4))
    r_k, r_v = rng.standard_normal((2, 2, R, 8)), rng.standard_normal((2, 4, R, 8))
    options = {"is_causal": True, "sink": rng.standard_normal(4), "key_bias": rng.standard_normal((2, L))}
    before = combiner.get_num_threads()
    combiner.set_num_threads(threads)
    try:
        _, saved = combiner.attend_forward(q, k, v, r_k, r_v, pattern, **options)
        whole = combiner.attend_backward(grad, saved)
        parts = []
        for first, n in ((0, 70), (70, 1), (71, 129), (200, 100)):
            _, saved = combiner.attend_forward(cut(q, first, n), k, v, r_k, r_v, pattern, offset=first, **options)
            parts.append(combiner.attend_backward(cut(grad, first, n), saved))
    finally:
        combiner.set_num_threads(before)
    close(np.concatenate([x.query for x in parts], axis=-2), whole.query, 1e-12, "query")
    for name in ("key", "value", "region_key", "region_value", "key_bias", "sink"):
        close(sum(getattr(x, name) for x in parts), getattr(whole, name), 1e-12, name)


def test_a_plan_for_each_head_and_masked_regions(rng):
    """Clusters of each batch entry and key head; a region all of whose positions are masked leaves the softmax."""
    clusters = rng.integers(0, 5, (2, 2, 90))
    q, k, v = (rng.standard_normal((2, heads, 90, 6)) for heads in (4, 2, 2))
    for pattern in (Routing(clusters), Fixed(9, size_bias=True)):
        for is_causal in (True, False):
            mask = np.broadcast_to(np.arange(90) >= 30, (2, 90))
            options = {"is_causal": is_causal, "key_mask": mask}
            summary = combiner.summarize(q, k, v, pattern, **options)
            given = k, v, summary.key, summary.value, pattern
            whole = combiner.attend(q, *given, **options)
            assert (
                combiner.attend(cut(q, 37, 20), *given, offset=37, **options).tobytes() == cut(whole, 37, 20).tobytes()
            )


@pytest.mark.parametrize("pattern", (Fixed(), LogSparse(), Axial(4, "rowmajor"), Tree(3), Window(5)), ids=str)
@pytest.mark.parametrize("is_causal", (True, False))
def test_packed_sequences(rng, pattern, is_causal):
    """The queries of some sequences, of parts of them, or of none: the bits of a call of all, and the gradients."""
    L, bounds = 60, [0, 3, 3, 41, 60]
    q, grad = rng.standard_normal((2, 2, 4, L, 6))
    k, v = rng.standard_normal((2, 2, 2, L, 6))
    grad_lse = rng.standard_normal((2, 4, L))
    bias, sink = rng.standard_normal((2, L)), rng.standard_normal(4)
    options = {"is_causal": is_causal, "cu_seqlens": bounds, "key_mask": rng.random((2, L)) < 0.8}
    summary = combiner.summarize(q, k, v, pattern, key_bias=bias, **options)
    given = k, v, summary.key, summary.value, pattern
    options |= {"key_bias": bias, "region_bias": summary.bias, "sink": sink, "dropout_p": 0.2, "seed": 5}
    out, lse = combiner.attend(q, *given, return_lse=True, **options)
    for first, n in ((0, 0), (0, 2), (1, 2), (2, 1), (3, 38), (2, 50), (45, 10), (60, 0), (0, 60)):
        rows = cut(q, first, n)
        own, own_lse = combiner.attend(rows, *given, offset=first, return_lse=True, **options)
        assert own.tobytes() == cut(out, first, n).tobytes(), (first, n)
        assert own_lse.tobytes() == lse[..., first : first + n].tobytes(), (first, n)
        made, saved = combiner.attend_forward(rows, *given, offset=first, **options)
        _, exact = reference.attend_forward(rows, *given, offset=first, **options)
        grads = cut(grad, first, n), grad_lse[..., first : first + n]
        made = combiner.attend_backward(grads[0], saved, grad_lse=grads[1])
        agree(made, reference.attend_backward(grads[0], exact, grad_lse=grads[1]))


@pytest.mark.parametrize("packed", (None, [0, 3, 3, 41, 90]), ids=("one", "packed"))
def test_workspace_is_told_in_advance(rng, packed):
    """Of fewer queries no more; of an offset, only what `attend` has."""
    q, k, v = rng.standard_normal((3, 2, 90, 8)).astype(np.float16)
    options = {"is_causal": True, "cu_seqlens": packed}
    summary = combiner.summarize(q, k, v, LogSparse(), **options)
    given = {"pattern": LogSparse(), "region_key": summary.key, "region_value": summary.value, **options}
    for backward in (False, True):
        told = [
            combiner.workspace_bytes(cut(q, 40, n), k, v, offset=40, backward=backward, **given) for n in (1, 20, 50)
        ]
        whole = combiner.workspace_bytes(q, k, v, backward=backward, **given)
        assert told == sorted(told) and told[-1] <= whole
        turned = [x.swapaxes(0, 1) for x in (cut(q, 40, 20), k, v)]
        of_regions = {name: given[name].swapaxes(0, 1) for name in ("region_key", "region_value")}
        other = given | of_regions | {"layout": "BLHD", "offset": 40, "backward": backward}
        assert combiner.workspace_bytes(*turned, **other) == told[1]
    with pytest.raises(ValueError, match="offset must be None without region_value, as of attention, got 40"):
        combiner.workspace_bytes(q, k, v, Fixed(4), offset=40)


def test_layouts_and_arrays_without_heads(rng):
    q, k, v = rng.standard_normal((3, 2, 40, 4, 8))
    summary = combiner.summarize(q, k, v, Fixed(8), layout="BLHD")
    given = k, v, summary.key, summary.value, Fixed(8)
    whole = combiner.attend(q, *given, layout="BLHD")
    part = combiner.attend(q[:, 11:29], *given, layout="BLHD", offset=11, out=(out := np.empty((2, 18, 4, 8))))
    np.testing.assert_array_equal(part, whole[:, 11:29])
    assert part is out
    one = [x[0, :, 0] for x in given[:4]]
    np.testing.assert_array_equal(combiner.attend(q[0, 11:29, 0], *one, Fixed(8), offset=11), whole[0, 11:29, 0])


def test_only_these_rows_are_read(rng):
    """Keys that none of the queries attends may be NaN, and so may other rows of the regions."""
    q, k, v = rng.standard_normal((3, 2, 100, 8))
    summary = combiner.summarize(q, k, v, HeavilyCompressed(10, 12), is_causal=True)
    r_k, r_v = summary.key.copy(), summary.value.copy()
    options = {"is_causal": True, "offset": 50}
    rows = cut(q, 50, 5)
    expected = combiner.attend(rows, k, v, r_k, r_v, HeavilyCompressed(10, 12), **options)
    for x in (k, v):
        x[:, :39] = x[:, 55:] = np.nan
    for x in (r_k, r_v):
        x[:, 5:] = np.nan
    np.testing.assert_array_equal(combiner.attend(rows, k, v, r_k, r_v, HeavilyCompressed(10, 12), **options), expected)


def test_the_plan_may_be_a_plan(rng):
    q, k, v = rng.standard_normal((3, 2, 30, 4))
    parts = Plan.from_parts([[i, 29 - i] for i in range(30)])
    nothing = np.zeros((2, 0, 4))
    whole = combiner.attend(q, k, v, nothing, nothing, parts)
    np.testing.assert_array_equal(
        combiner.attend(cut(q, 4, 9), k, v, nothing, nothing, parts, offset=4), cut(whole, 4, 9)
    )


def test_bad_arguments(rng):
    q, k, v = rng.standard_normal((3, 2, 30, 4))
    none = np.zeros((2, 0, 4))
    for offset, error, message in (
        (21, ValueError, "offset must be between 0 and 20, key's length less query's, got 21"),
        (-1, ValueError, "offset must be at least 0, got -1"),
        (2.0, TypeError, "offset must be an integer, got float"),
        (2**63, ValueError, r"offset must be below 2\^63, got 9223372036854775808"),
    ):
        with pytest.raises(error, match=message):
            combiner.attend(q[:, :10], k, v, none, none, Window(4), offset=offset)
    with pytest.raises(ValueError, match="query must have at most key's length, 20, with an offset, got 30"):
        combiner.attend(q, k[:, :20], v[:, :20], none, none, Window(4), offset=0)
    with pytest.raises(ValueError, match=r"value must have shape \(2, 30, Dv\), got \(2, 20, 4\)"):
        combiner.attend(q[:, :10], k, v[:, :20], none, none, Window(4), offset=0)
    with pytest.raises(ValueError, match=r"key must have shape \(Hk, L, 4\), got \(30, 4\)"):
        combiner.attend(q[:, :10], k[0], v, none, none, Window(4), offset=0)
    with pytest.raises(ValueError, match="pattern must be a plan for the length of key, 30, got one for 10"):
        combiner.attend(q[:, :10], k, v, none, none, Window(4).plan(10), offset=0)
    with pytest.raises(ValueError, match="pattern must have one normaliser, got a Mixture"):
        combiner.attend(q[:, :10], k, v, none, none, Mixture(Window(4), Dense()), offset=0)
    with pytest.raises(ValueError, match=r"key must have shape \(Hk, 10, 4\), got \(2, 30, 4\)"):
        combiner.attend(q[:, :10], k, v, none, none, Window(4))
    with pytest.raises(ValueError, match=r"out must have shape \(2, 10, 4\), got \(2, 30, 4\)"):
        combiner.attend(q[:, :10], k, v, none, none, Window(4), offset=3, out=np.empty((2, 30, 4)))
