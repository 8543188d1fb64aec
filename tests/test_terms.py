# SPDX-License-Identifier: Apache-2.0
"""The terms of a logit beside the sweep of test_attention.py: softcap, key_bias, region_bias and sink."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import PATTERNS, Case, Judge, agree, close, draw, each_isa, random_parts

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Routing,
    Tree,
    Window,
    reference,
)

L = 150
EVERY = [
    Dense(),
    Fixed(16),
    Fixed(16, pooling="mean", size_bias=True),
    LogSparse(),
    LogSparse(hierarchical=True, pooling="sum"),
    Axial(12),
    Axial(12, "horizontal"),
    Axial(12, "rowmajor"),
    Axial(12, "rowmajor", "weighted"),
    AxialMixture(12),
    Tree(3),
    Routing(np.arange(L) * 7 % 5),
    Window(20),
]
every_pattern = pytest.mark.parametrize("pattern", EVERY, ids=str)
both_directions = pytest.mark.parametrize("is_causal", (True, False))


def arrays_of(rng, pattern, is_causal=True, dtype=np.float32, L=L, B=2, Hq=4, Hk=2, D=20, Dv=12):
    """query, key, value, cotangents of out and lse, and every term."""
    R = pattern.plan(L, is_causal).region_count
    shapes = (B, Hq, L, D), (B, Hk, L, D), (B, Hk, L, Dv), (B, Hq, L, Dv)
    wide = np.float64 if dtype == np.float64 else np.float32
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    grad_lse, bias, regions, sink = (
        rng.standard_normal(shape).astype(wide) for shape in ((B, Hq, L), (B, Hk, L), (B, Hq, R), (Hq,))
    )
    return [*arrays, grad_lse], {"softcap": 2.0, "key_bias": bias, "region_bias": regions, "sink": sink}


def run(arrays, pattern, **options) -> list[np.ndarray]:
    """out, lse and every gradient."""
    *inputs, grad_out, grad_lse = arrays
    out, saved = combiner.attention_forward(*inputs, pattern, **options)
    same, lse = combiner.attention(*inputs, pattern, return_lse=True, **options)
    assert same.tobytes() == out.tobytes() and lse.tobytes() == saved["lse"].tobytes()
    gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)
    return [out, lse, *(x for x in gradients if x is not None)]


def assert_same(actual, expected) -> None:
    for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape and x.tobytes() == y.tobytes(), n


def subsets(terms: dict) -> list[dict]:
    """All terms, and all but those of regions, which the library then makes."""
    return [terms, {name: x for name, x in terms.items() if name != "region_bias"}]


# ---- numbers


@pytest.mark.parametrize("hierarchical", (True, False))
@pytest.mark.parametrize("pooling", ("max", "mean", "sum"))
@both_directions
def test_finite_differences(rng, hierarchical, pooling, is_causal):
    check_slopes(rng, LogSparse(hierarchical=hierarchical, pooling=pooling), is_causal)


@pytest.mark.parametrize(
    "pattern", (Window(6), Fixed(5, window=4), HeavilyCompressed(4, 6), Axial(5, "rowmajor", "weighted")), ids=str
)
@both_directions
def test_finite_differences_of_windows_and_weighted_keys(rng, pattern, is_causal):
    check_slopes(rng, pattern, is_causal)


def check_slopes(rng, pattern, is_causal) -> None:
    """Independent of the reference: the library's backward is the slope of the library's forward."""
    given, terms = arrays_of(rng, pattern, is_causal, np.float64, L=19, D=5, Dv=3)
    *inputs, grad_out, grad_lse = given
    for some in subsets(terms):
        cap = some["softcap"]
        named = dict(zip(("query", "key", "value"), inputs, strict=True)) | {
            name: x for name, x in some.items() if name != "softcap"
        }

        def loss(cap=cap, **named) -> float:
            out, lse = combiner.attention(pattern=pattern, is_causal=is_causal, return_lse=True, softcap=cap, **named)
            return float((out * grad_out).sum() + (lse * grad_lse).sum())

        _, saved = combiner.attention_forward(pattern=pattern, is_causal=is_causal, softcap=cap, **named)
        gradients = combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)._asdict()
        for name, x in named.items():
            step = 1e-6 * rng.standard_normal(x.shape)
            slope = (loss(**named | {name: x + step}) - loss(**named | {name: x - step})) / 2e-6
            assert (gradients[name] * step).sum() / 1e-6 == pytest.approx(slope, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "sparse" not in p])
def test_a_query_with_nothing_else_attends_the_sink(rng, pattern):
    """out 0, lse the sink, whose gradient is that of lse."""
    made, is_causal = PATTERNS[pattern](), True
    given, terms = arrays_of(rng, made, is_causal, np.float64, L=53)
    mask = np.broadcast_to(np.arange(53) >= 20, (2, 53))
    *inputs, grad_out, grad_lse = given
    options = {"is_causal": is_causal, "key_mask": mask, **terms}
    out, saved = combiner.attention_forward(*inputs, made, **options)
    assert not out[:, :, :20].any()
    np.testing.assert_array_equal(saved["lse"][:, :, :20], np.broadcast_to(terms["sink"][:, None], (2, 4, 20)))
    exact_out, exact = reference.attention_forward(*inputs, made, **options)
    close(out, exact_out, 1e-10, "out")
    agree(
        combiner.attention_backward(grad_out, saved, grad_lse=grad_lse),
        reference.attention_backward(grad_out, exact, grad_lse=grad_lse),
    )


def test_a_sink_is_a_key_whose_value_is_zero(rng):
    """Of dense attention: one more key of zeros, with the sink for its bias."""
    q, k, v = rng.standard_normal((3, 2, 30, 8))
    sink, bias = rng.standard_normal(2), rng.standard_normal((2, 30))
    out, lse = combiner.attention(q, k, v, Dense(), key_bias=bias, sink=sink, return_lse=True)
    wider = [np.concatenate([x, np.zeros((2, 1, 8))], axis=1) for x in (q, k, v)]
    more = np.concatenate([bias, sink[:, None]], axis=1)
    expected, expected_lse = combiner.attention(*wider, Dense(), key_bias=more, return_lse=True)
    close(out, expected[:, :30], 1e-13, "out")
    close(lse, expected_lse[:, :30], 1e-13, "lse")


def test_a_bias_is_one_more_feature_of_the_key(rng):
    """With a query of ones beside it, for every rule of pooling."""
    for pooling, hierarchical in itertools.product(("max", "mean", "sum"), (False, True)):
        pattern = LogSparse(hierarchical=hierarchical, pooling=pooling)
        q, k, v = rng.standard_normal((3, 2, 50, 6))
        bias = rng.standard_normal((2, 50))
        R = pattern.plan(50, True).region_count
        options = {"is_causal": True, "scale": 1.0}
        q_R = rng.standard_normal((2, R, 6))
        out = combiner.attention(q, k, v, pattern, key_bias=bias, region_query=q_R, **options)
        one, one_R = np.ones((2, 50, 1)), np.ones((2, R, 1))
        wider = np.concatenate([q, one], -1), np.concatenate([k, bias[..., None]], -1), v
        expected = combiner.attention(*wider, pattern, region_query=np.concatenate([q_R, one_R], -1), **options)
        close(out, expected, 1e-12, f"{pattern}")


@pytest.mark.parametrize("slope", (0.5, 1 / 256))
@pytest.mark.parametrize("pattern", (Fixed(256), Fixed(256, window=300), LogSparse(), Axial(256, "rowmajor")), ids=str)
def test_biases_as_large_as_alibi(rng, pattern, slope):
    """A bias of up to 32,768 costs a float32 logit nothing: the softmax depends on differences of biases, and these are
    exact where weights are not 0."""
    length = 65536
    q, k, v = rng.standard_normal((3, 1, length, 8)).astype(np.float32)
    grad = rng.standard_normal((1, length, 8)).astype(np.float32)
    bias = (slope * np.arange(length, dtype=np.float32))[None]
    results = []
    for dtype in (np.float64, np.float32):
        given = [x.astype(dtype) for x in (q, k, v)]
        out, saved = combiner.attention_forward(*given, pattern, is_causal=True, key_bias=bias.astype(dtype))
        gradients = combiner.attention_backward(grad.astype(dtype), saved)
        results.append([out, *gradients[:3], gradients.key_bias])
    for name, exact, x in zip(("out", "dq", "dk", "dv", "db"), *results, strict=True):
        scale = np.abs(exact).max()
        close(x.astype(np.float64), exact, 64 * 2.0**-24 * scale, name)


@pytest.mark.parametrize("dtype", (np.float16, ml_dtypes.bfloat16))
@pytest.mark.parametrize("name", ("fixed7", "hierarchical", "rowmajor", "rowmajor weighted", "vertical"))
def test_16_bits(name, dtype):
    """As test_half.py, with every term in float32."""
    case = Case(name, 64, 1, 4, 2, 16, 16, True, terms="softcap key_bias sink")
    made = PATTERNS[name]()
    p = draw(np.random.default_rng(7), made, case).as_type(dtype)
    exactly = p.as_type(np.float64)
    judge = Judge(exactly)
    for _ in each_isa(pairing=True):
        out, saved = combiner.attention_forward(*p.inputs, made, **p.options)
        assert out.dtype == dtype and saved["lse"].dtype == np.float32
        judge.accepts_forward(out, saved["lse"])
        gradients = combiner.attention_backward(p.grad_out, saved, grad_lse=p.grad_lse.astype(np.float32))
        assert gradients.key_bias.dtype == gradients.sink.dtype == np.float32
        for key in ("key_bias", "sink"):  # sums of weights' gradients, which out's rounding moves
            x, expected = getattr(gradients, key), getattr(judge.gradients, key)
            close(x.astype(np.float64), expected, 0.05 * np.abs(expected).max(), key)


def test_packed_sequences_and_mixtures(rng):
    for pattern in (
        Fixed(8),
        LogSparse(hierarchical=True),
        Axial(6, "rowmajor", "weighted"),
        Mixture(Fixed(8), Tree(2)),
    ):
        for packed in (None, [0, 3, 3, 41, 60]):
            q, grad = (rng.standard_normal((2, 4, 60, n)) for n in (6, 5))
            k, v = (rng.standard_normal((2, 2, 60, n)) for n in (6, 5))
            options = {"is_causal": True, "cu_seqlens": packed, "dropout_p": 0.2, "seed": 3}
            R = combiner.attention_forward(q, k, v, pattern, **options)[1].problem.region_count
            terms = {"softcap": 2.0, "key_bias": rng.standard_normal((2, 60)), "sink": rng.standard_normal((2, 1))}
            for given in ({}, {"region_bias": rng.standard_normal((4, R))}):
                out, saved = combiner.attention_forward(q, k, v, pattern, **options, **terms, **given)
                expected, exact = reference.attention_forward(q, k, v, pattern, **options, **terms, **given)
                close(out, expected, 1e-10, "out")
                agree(combiner.attention_backward(grad, saved), reference.attention_backward(grad, exact))


def test_any_parts(rng):
    """Regions that nest, overlap and repeat rows."""
    for n, pooling, is_causal in itertools.product(range(6), ("max", "mean", "sum"), (True, False)):
        case = Case("random", 11, 2, 4, 2, 3, 2, is_causal, masked=0.3 * (n % 2), terms="softcap key_bias sink")
        parts = random_parts(rng, 11, 7, is_causal, pooling=pooling)
        p = draw(rng, parts, case)
        plan = combiner.Plan.from_parts(
            parts.direct,
            parts.regions,
            [[m for m in rows] for rows in parts.members],
            is_causal=is_causal,
            pooling=pooling,
        )
        out, saved = combiner.attention_forward(*p.inputs, plan, **p.options)
        expected, exact = reference.attention_forward(*p.inputs, parts, **p.options)
        close(out, expected, 1e-10, "out")
        agree(combiner.attention_backward(p.grad_out, saved), reference.attention_backward(p.grad_out, exact))


def test_alibi(rng):
    """The published slopes, and the bias of a key's distance, whose part of the query cancels in the softmax."""
    np.testing.assert_allclose(combiner.alibi_slopes(8), [2.0**-n for n in range(1, 9)], rtol=1e-15)
    np.testing.assert_allclose(combiner.alibi_slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    assert [len(combiner.alibi_slopes(n)) for n in range(5)] == [*range(5)]
    q, k, v = rng.standard_normal((3, 4, 40, 8))
    bias = combiner.alibi_bias(4, 40, dtype=np.float64)
    out = combiner.attention(q, k, v, Dense(), is_causal=True, key_bias=bias)
    i, j = np.ogrid[:40, :40]
    s = q @ k.swapaxes(-1, -2) / np.sqrt(8) + combiner.alibi_slopes(4)[:, None, None] * (j - i)
    p = np.exp(np.where(j <= i, s, -np.inf))
    close(out, p / p.sum(-1, keepdims=True) @ v, 1e-12, "out")
    assert combiner.alibi_bias(2, 3).dtype == np.float32
    np.testing.assert_array_equal(combiner.alibi_bias(2, 3, slopes=[1, 2]), [[0, 1, 2], [0, 2, 4]])
    with pytest.raises(ValueError, match=r"slopes must have shape \(2,\), got \(3,\)"):
        combiner.alibi_bias(2, 3, slopes=[1, 2, 3])
    with pytest.raises(ValueError, match="heads must be at least 0, got -1"):
        combiner.alibi_slopes(-1)


# ---- shapes


def test_gradients_have_the_shapes_that_were_given(rng):
    """Sums over what was broadcast."""
    pattern = Fixed(8)
    q, grad = rng.standard_normal((2, 3, 2, 4, 30, 6))
    k, v = rng.standard_normal((2, 3, 2, 2, 30, 6))
    R = pattern.plan(30).region_count
    whole = {"key_bias": (3, 2, 4, 30), "region_bias": (3, 2, 4, R), "sink": (3, 2, 4)}
    for name, shape in whole.items():
        tail = shape[2:]
        for given in {shape, tail, (1, 2, *tail), (3, 1, *tail), (2, 1, *tail[1:])} | (
            set() if name == "sink" else {tail[1:], (2, 2, *tail[1:]), (1, *tail[1:])}
        ):
            x = rng.standard_normal(given)
            out, saved = combiner.attention_forward(q, k, v, pattern, **{name: x})
            actual = getattr(combiner.attention_backward(grad, saved), name)
            assert actual.shape == given
            full = np.broadcast_to(
                np.repeat(x, 2, -2) if name != "sink" and x.ndim > 1 and x.shape[-2] == 2 else x, shape
            )
            same, saved = combiner.attention_forward(q, k, v, pattern, **{name: np.ascontiguousarray(full)})
            np.testing.assert_allclose(same, out, rtol=0, atol=1e-12)
            own = getattr(combiner.attention_backward(grad, saved), name)
            _, exact = reference.attention_forward(q, k, v, pattern, **{name: x})
            expected = getattr(reference.attention_backward(grad, exact), name)
            close(actual, expected, 1e-10, name)
            assert own.shape == shape and own.sum() == pytest.approx(actual.sum(), abs=1e-9)


def test_arrays_without_heads(rng):
    q, k, v, grad = rng.standard_normal((4, 20, 5))
    for sink in (rng.standard_normal(()), rng.standard_normal(1)):
        out, saved = combiner.attention_forward(q, k, v, Fixed(4), key_bias=q[:, 0], sink=sink)
        expected, exact = reference.attention_forward(q, k, v, Fixed(4), key_bias=q[:, 0], sink=sink)
        close(out, expected, 1e-12, "out")
        gradients = combiner.attention_backward(grad, saved)
        assert gradients.sink.shape == sink.shape and gradients.key_bias.shape == (20,)
        agree(gradients, reference.attention_backward(grad, exact))


def test_nothing_at_all():
    """No position, no head and no batch entry: gradients of sinks are zeros."""
    for B, H, length in ((2, 3, 0), (0, 3, 4), (2, 0, 4)):
        x = np.zeros((B, H, length, 5))
        terms = {"key_bias": np.zeros((B, H, length)), "sink": np.ones(H)}
        out, saved = combiner.attention_forward(x, x, x, Fixed(2), **terms)
        gradients = combiner.attention_backward(out, saved)
        assert gradients.key_bias.shape == (B, H, length)
        np.testing.assert_array_equal(gradients.sink, np.zeros(H))


# ---- bits


@pytest.mark.parametrize("dtype", (np.float32, np.float64, ml_dtypes.bfloat16))
@both_directions
@every_pattern
def test_threads_heads_and_batch_entries(rng, pattern, is_causal, dtype):
    """The same bits for any number of threads, and for one head of one batch entry alone."""
    arrays, terms = arrays_of(rng, pattern, is_causal, dtype)
    for some in subsets(terms):
        with combiner.num_threads(1):
            expected = run(arrays, pattern, is_causal=is_causal, **some)
        for threads in (2, 3):
            with combiner.num_threads(threads):
                assert_same(run(arrays, pattern, is_causal=is_causal, **some), expected)
        own = {name: x if name == "softcap" else x[1:] if x.ndim > 1 else x for name, x in some.items()}
        alone = run([x[1:] for x in arrays], pattern, is_causal=is_causal, **own)
        assert_same(alone[:5], [x[1:] for x in expected[:5]])
        assert_same(alone[5:-1], [x[1:] for x in expected[5:-1]])


@both_directions
@every_pattern
def test_instruction_sets_with_fma(rng, pattern, is_causal):
    for dtype in (np.float32, np.float64):
        arrays, terms = arrays_of(rng, pattern, is_causal, dtype)
        results = [run(arrays, pattern, is_causal=is_causal, **terms) for isa in each_isa() if isa != "base"]
        for other in results[1:]:
            assert_same(other, results[0])


@every_pattern
def test_causal_prefix(rng, pattern):
    """With explicit sizes row i depends on nothing after i."""
    if isinstance(pattern, Routing):
        pytest.skip("clusters are of one length")
    arrays, terms = arrays_of(rng, pattern)
    terms = {name: x for name, x in terms.items() if name != "region_bias"}
    whole = combiner.attention(*arrays[:3], pattern, is_causal=True, **terms)
    for length in (1, 37, 149):
        cut = terms | {"key_bias": terms["key_bias"][..., :length]}
        own = combiner.attention(*(x[..., :length, :] for x in arrays[:3]), pattern, is_causal=True, **cut)
        assert own.tobytes() == np.ascontiguousarray(whole[..., :length, :]).tobytes()


@both_directions
@every_pattern
def test_the_stages_are_the_whole(rng, pattern, is_causal):
    arrays, terms = arrays_of(rng, pattern, is_causal)
    inputs = arrays[:3]
    whole = combiner.attention(*inputs, pattern, is_causal=is_causal, **terms)
    of_summary = {name: x for name, x in terms.items() if name != "sink"}
    summary = combiner.summarize(*inputs, pattern, is_causal=is_causal, **of_summary)
    of_attend = terms | {"region_bias": summary.bias}
    out = combiner.attend(*inputs, summary.key, summary.value, pattern, is_causal=is_causal, **of_attend)
    assert out.tobytes() == whole.tobytes()


# ---- NaN and Inf


@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
@both_directions
@every_pattern
def test_a_poisoned_bias_reaches_what_reads_it(rng, pattern, is_causal, poison):
    """And moves no bit of anything else; the reference says which rows read it."""
    for dtype, j in itertools.product((np.float32, np.float64), (0, 40, L - 1)):
        (q, k, v, grad, _), terms = arrays_of(rng, pattern, is_causal, dtype, B=1, Hq=1, Hk=1, D=4, Dv=4)
        terms.pop("region_bias")
        worse = terms | {"key_bias": terms["key_bias"].copy()}
        worse["key_bias"][..., j] = poison
        with np.errstate(all="ignore"):
            expected, exact = reference.attention_forward(q, k, v, pattern, is_causal=is_causal, **worse)
            exactly = reference.attention_backward(grad, exact)
        for isa in each_isa():
            clean = combiner.attention(q, k, v, pattern, is_causal=is_causal, **terms)
            out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, **worse)
            spoiled = ~np.isfinite(expected).all(axis=-1)
            np.testing.assert_array_equal(~np.isfinite(out).all(axis=-1), spoiled, err_msg=isa)
            assert out[~spoiled].tobytes() == clean[~spoiled].tobytes(), isa
            gradients = combiner.attention_backward(grad, saved)
            for name in ("query", "key", "value", "key_bias", "sink"):
                x, y = getattr(gradients, name), getattr(exactly, name)
                np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=f"{isa}: {name}")


@pytest.mark.parametrize("name", ("region_bias", "sink"))
@both_directions
@every_pattern
def test_a_poisoned_region_or_sink_reaches_its_head_alone(rng, pattern, is_causal, name):
    """And of that head what reads it, as the reference says; no bit of anything else moves."""
    (q, k, v, grad, _), terms = arrays_of(rng, pattern, is_causal, np.float64, B=1, Hq=2, Hk=1, D=4, Dv=4)
    R = terms["region_bias"].shape[-1]
    if name == "region_bias" and not R:
        pytest.skip("no regions")
    worse = terms | {name: terms[name].copy()}
    worse[name][(0, 1, R // 2) if name == "region_bias" else 1] = np.nan
    with np.errstate(all="ignore"):
        expected, exact = reference.attention_forward(q, k, v, pattern, is_causal=is_causal, **worse)
        exactly = reference.attention_backward(grad, exact)
    spoiled = ~np.isfinite(expected).all(axis=-1)
    assert not spoiled[:, 0].any() and (name == "region_bias" or spoiled[:, 1].all())
    for isa in each_isa():
        clean = combiner.attention(q, k, v, pattern, is_causal=is_causal, **terms)
        out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, **worse)
        np.testing.assert_array_equal(~np.isfinite(out).all(axis=-1), spoiled, err_msg=isa)
        assert out[~spoiled].tobytes() == clean[~spoiled].tobytes(), isa
        gradients = combiner.attention_backward(grad, saved)
        for term in ("query", "key", "value", *(each for each in terms if each != "softcap")):
            x, y = getattr(gradients, term), getattr(exactly, term)
            np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y), err_msg=f"{isa}: {term}")


@both_directions
@every_pattern
def test_masked_biases_are_not_read(rng, pattern, is_causal):
    mask = rng.random(L) < 0.6
    arrays, terms = arrays_of(rng, pattern, is_causal)
    terms.pop("region_bias")
    clean = run(arrays, pattern, is_causal=is_causal, key_mask=np.broadcast_to(mask, (2, L)), **terms)
    terms["key_bias"] = np.where(mask, terms["key_bias"], np.nan).astype(np.float32)
    assert_same(run(arrays, pattern, is_causal=is_causal, key_mask=np.broadcast_to(mask, (2, L)), **terms), clean)


def test_a_key_at_infinity_under_a_softcap(rng):
    """Its logit is the cap; queries that do not see it keep their bits, in backward too."""
    for pattern, dtype in itertools.product((Dense(), Fixed(16), LogSparse()), (np.float32, np.float64)):
        q, k, v, grad = rng.standard_normal((4, 100, 6)).astype(dtype)
        worse = k.copy()
        worse[60, 2] = np.inf
        for isa in each_isa():
            clean, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True, softcap=3.0)
            dq = combiner.attention_backward(grad, saved).query
            out, saved = combiner.attention_forward(q, worse, v, pattern, is_causal=True, softcap=3.0)
            assert np.isfinite(out[60:64]).all()
            assert out[:60].tobytes() == clean[:60].tobytes(), isa
            if pattern == Dense():  # in others a query reads regions that later queries read too
                assert combiner.attention_backward(grad, saved).query[:60].tobytes() == dq[:60].tobytes(), isa
