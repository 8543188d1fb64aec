# SPDX-License-Identifier: Apache-2.0
"""Several attentions in one call: packed sequences, each as if alone, and the mean of a mixture's components."""

import copy
import functools
import itertools
import pickle
import re
from collections.abc import Callable

import cases
import numpy as np
import pytest
from cases import close, rebuilt

import combiner
from combiner import (
    Axial,
    AxialMixture,
    Dense,
    Fixed,
    HeavilyCompressed,
    LogSparse,
    Mixture,
    Plan,
    Routing,
    Selected,
    Tree,
    reference,
)
from combiner.problem import Saved

B, HQ, HK, L, D, DV = 2, 4, 2, 83, 8, 5
CU_SEQLENS = (0, 1, 20, 20, 52, 83)
CLUSTERS = np.random.default_rng(1).integers(0, 6, (B, HK, L))


def selected(base, lead=(), block=8, **options):
    """Regions that the sequences have, listed for their blocks."""
    rng, lists = np.random.default_rng(block), []
    for start, end in itertools.pairwise(CU_SEQLENS):
        plans = of_sequence(base, start, end).plan(end - start, False)
        R = min(plan.region_count for plan in (plans if isinstance(plans, tuple) else (plans,)))
        lists.append(rng.integers(-1, R, (*lead, -(-(end - start) // block), 3)))
    return Selected(base, np.concatenate(lists, axis=-2), block=block, **options)


def of_sequence(pattern, start: int, end: int):
    """The pattern that a sequence has alone; its clusters' ids may be as large as the whole's."""
    if isinstance(pattern, Mixture):
        return Mixture(*(of_sequence(each, start, end) for each in pattern.patterns))
    if isinstance(pattern, Selected):
        before = sum(-(-(b - a) // pattern.block) for a, b in itertools.pairwise(CU_SEQLENS) if b <= start)
        blocks = -(-(end - start) // pattern.block)
        lists = pattern.regions
        lists = lists[..., before : before + blocks, :] if lists.ndim > 1 else lists
        base = pattern.pattern
        base = Routing(base.clusters[..., start:end]) if isinstance(base, Routing) else base
        return Selected(base, lists, block=pattern.block, open=pattern.open, rest=pattern.rest)
    sparse = isinstance(pattern, combiner.patterns.Sparse)
    routing = pattern.pattern if sparse else pattern
    if not isinstance(routing, Routing):
        return pattern

    class Part:
        def plan(self, length, is_causal):
            return routing._build_segment(start, end, is_causal, sparse)

    return Part()


def count_regions(pattern, length: int, is_causal: bool) -> int:
    def count(plan) -> int:
        return max((each.region_count for each in plan), default=0) if isinstance(plan, tuple) else plan.region_count

    plan = pattern.plan(length, is_causal)
    return sum(map(count, plan.patterns)) if isinstance(plan, Mixture) else count(plan)


PATTERNS = [
    Dense(),
    Fixed(),
    Fixed(4, pooling="mean", size_bias=True),
    LogSparse(),
    LogSparse(hierarchical=True),
    Fixed(5).sparse(),
    Axial(),
    Axial(4, "horizontal"),
    Axial(5, "rowmajor"),
    Axial(5, "rowmajor", "weighted"),
    AxialMixture(4),
    Tree(3),
    Routing(CLUSTERS[0, 0]),
    Routing(CLUSTERS),
    Routing(CLUSTERS).sparse(),
    Mixture(Fixed(4), Axial(3)),
    Mixture(Routing(CLUSTERS), LogSparse(pooling="sum"), Dense()),
]
PACKED = [  # whose lists are those of the blocks of CU_SEQLENS
    selected(Fixed(4, window=6), (B, HK)),
    selected(Fixed(), (B, HK), block=1),
    selected(Tree(3, pooling="mean"), block=5, rest=False),
    selected(HeavilyCompressed(5, 7), (B, HK), block=64, rest=False, open=False),
    Mixture(selected(LogSparse(hierarchical=True, size_bias=True)), Fixed(4)),
    selected(Routing(CLUSTERS), (B, HK)),
    selected(Routing(CLUSTERS[0, 0]), block=100),
    Selected(Routing(CLUSTERS), [0], block=8),
]
both_directions = pytest.mark.parametrize("is_causal", (True, False))
each_direction = pytest.mark.parametrize(
    "pattern, is_causal",
    [
        pytest.param(pattern, is_causal, id=f"{pattern}-{is_causal}")
        for pattern, is_causal in itertools.product(PATTERNS + PACKED, (True, False))
        if not (is_causal and isinstance(pattern, Selected) and isinstance(pattern.pattern, Routing))
    ],
)
agree = functools.partial(cases.agree, within=1e-11)


def arrays(rng, dtype=np.float64):
    shapes = (B, HQ, L, D), (B, HK, L, D), (B, HK, L, DV), (B, HQ, L, DV), (B, HQ, L)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def cut_options(options, here: slice, there: slice):
    """A sequence's own part of key_mask, region_query and region_key."""
    rows = {"key_mask": (..., here), "region_query": (..., there, slice(None)), "region_key": (..., there, slice(None))}
    return {name: x[rows[name]] if name in rows else x for name, x in options.items()}


@each_direction
def test_packed_sequences_are_as_if_alone(rng, pattern, is_causal):
    """In every bit, forward and backward, with masks, given regions and dropout."""
    ends = [count_regions(of_sequence(pattern, a, b), b - a, is_causal) for a, b in itertools.pairwise(CU_SEQLENS)]
    starts = [0, *itertools.accumulate(ends)]
    is_mixture = isinstance(pattern, Mixture)
    for dtype in (np.float32, np.float64):
        q, k, v, grad_out, grad_lse = arrays(rng, dtype)
        given = {
            "region_query": rng.standard_normal((B, HQ, starts[-1], D)).astype(dtype),
            "region_key": rng.standard_normal((B, HK, starts[-1], D)).astype(dtype),
        }
        for extra in ({}, {"key_mask": rng.random((B, L)) < 0.7}, given, {"dropout_p": 0.3, "seed": 5}):
            options = {"is_causal": is_causal, **extra}
            out, saved = combiner.attention_forward(q, k, v, pattern, cu_seqlens=CU_SEQLENS, **options)
            again = np.full_like(out, np.nan)
            combiner.attention(q, k, v, pattern, cu_seqlens=np.array(CU_SEQLENS, np.int32), out=again, **options)
            assert out.tobytes() == again.tobytes()
            gradients = combiner.attention_backward(grad_out, saved, grad_lse=None if is_mixture else grad_lse)
            for n, (a, b) in enumerate(itertools.pairwise(CU_SEQLENS)):
                here, there = slice(a, b), slice(starts[n], starts[n + 1])
                alone = (x[..., here, :] for x in (q, k, v))
                own, own_saved = combiner.attention_forward(
                    *alone, of_sequence(pattern, a, b), **cut_options(options, here, there)
                )
                assert out[..., here, :].tobytes() == own.tobytes()
                own_gradients = combiner.attention_backward(
                    grad_out[..., here, :], own_saved, grad_lse=None if is_mixture else grad_lse[..., here]
                )
                for name, x, y in zip(gradients._fields, gradients, own_gradients, strict=True):
                    assert (x is None) == (y is None)
                    if x is not None:
                        rows = there if name.startswith("region") else here
                        assert x[..., rows, :].tobytes() == y.tobytes(), name


@each_direction
def test_packed_sequences_against_the_reference(rng, pattern, is_causal):
    q, k, v, grad_out, grad_lse = arrays(rng)
    options = {"is_causal": is_causal, "key_mask": rng.random((B, L)) < 0.8, "cu_seqlens": CU_SEQLENS}
    dropout = {"dropout_p": 0.4, "seed": 2**64 - 1}
    out, saved = combiner.attention_forward(q, k, v, pattern, **options, **dropout)
    expected, exact = reference.attention_forward(q, k, v, pattern, **options, **dropout)
    close(out, expected, 1e-12, "out")
    W = combiner.attention_weights(q, k, pattern, **options)
    close(W, reference.attention_weights(q, k, pattern, **options), 1e-12, "weights")
    if isinstance(pattern, Mixture):
        agree(combiner.attention_backward(grad_out, saved), reference.attention_backward(grad_out, exact))
        return
    agree(
        combiner.attention_backward(grad_out, saved, grad_lse=grad_lse),
        reference.attention_backward(grad_out, exact, grad_lse=grad_lse),
    )
    summary, saved = combiner.summarize_forward(q, k, v, pattern, **options)
    expected, exact = reference.summarize_forward(q, k, v, pattern, **options)
    agree(summary, expected)
    grads = rng.standard_normal(summary.key.shape), rng.standard_normal(summary.value.shape)
    agree(combiner.summarize_backward(*grads, saved), reference.summarize_backward(*grads, exact))
    given = (q, k, v, summary.key, summary.value, pattern)
    out, saved = combiner.attend_forward(*given, **options, **dropout)
    expected, exact = reference.attend_forward(*given, **options, **dropout)
    close(out, expected, 1e-12, "out")
    close(combiner.attend(*given, **options, **dropout), expected, 1e-12, "out")
    agree(
        combiner.attend_backward(grad_out, saved, grad_lse=grad_lse),
        reference.attend_backward(grad_out, exact, grad_lse=grad_lse),
    )


@both_directions
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if isinstance(p, Mixture)], ids=str)
def test_a_mixture_is_the_mean_of_its_components(rng, pattern, is_causal):
    q, k, v, grad_out, _ = arrays(rng)
    counts = [count_regions(each, L, is_causal) for each in pattern.patterns]
    starts = [0, *itertools.accumulate(counts)]
    region_query, region_key = (rng.standard_normal((B, h, starts[-1], D)) for h in (HQ, HK))
    options = {"is_causal": is_causal, "key_mask": rng.random((B, L)) < 0.8}
    for given in ({}, {"region_query": region_query}, {"region_query": region_query, "region_key": region_key}):
        out, saved = combiner.attention_forward(q, k, v, pattern, **options, **given)
        gradients = combiner.attention_backward(grad_out, saved)
        expected, exact = reference.attention_forward(q, k, v, pattern, **options, **given)
        close(out, expected, 1e-12, "out")
        agree(gradients, reference.attention_backward(grad_out, exact))
        each, weights = [], []
        for n, component in enumerate(pattern.patterns):
            own = {name: x[..., starts[n] : starts[n + 1], :] for name, x in given.items()}
            each.append(combiner.attention_forward(q, k, v, component, **options, **own))
            weights.append(combiner.attention_weights(q, k, component, **options, **own))
        assert out.tobytes() == (sum(own for own, _ in each) / len(each)).tobytes()
        close(combiner.attention_weights(q, k, pattern, **options, **given), sum(weights) / len(weights), 1e-14, "W")
        parts = [combiner.attention_backward(grad_out, own) for _, own in each]
        for n in range(3):  # one sum over all components, in another order: some hundred terms, rounded by 1e-16 each
            close(gradients[n], sum(own[n] for own in parts) / len(parts), 1e-13, gradients._fields[n])
        for n, name in enumerate(("region_query", "region_key"), 3):
            if name in given:
                joined = np.concatenate([own[n] for own in parts], axis=-2) / len(parts)
                assert gradients[n].tobytes() == joined.tobytes()


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plans_of_a_mixture_are_a_mixture(rng, is_causal):
    """With one batch entry and two key heads a tuple of two plans would be one for each head."""
    q, k, v = rng.standard_normal((3, 1, 2, 16, 8))
    mixture = Mixture(Fixed(4), LogSparse(), Routing(rng.integers(0, 4, (1, 2, 16))))
    out = combiner.attention(q, k, v, mixture, is_causal=is_causal)
    plans = mixture.plan(16, is_causal)
    assert isinstance(plans, Mixture) and isinstance(plans.patterns[0], Plan) and len(plans.patterns[2]) == 2
    np.testing.assert_array_equal(combiner.attention(q, k, v, plans), out)
    assert Mixture(Routing(np.zeros((0, 2, 16), int))).plan(16).patterns == ((),)


def test_a_mixture_of_plans_and_its_sparse_baseline(rng):
    q, k, v = rng.standard_normal((3, 40, 4))
    plan = Plan.from_parts([[i] for i in range(40)])
    out = combiner.attention(q, k, v, Mixture(plan, Fixed(8)))
    np.testing.assert_array_equal(out, (v + combiner.attention(q, k, v, Fixed(8))) / 2)
    mixture = Mixture(Fixed(8), LogSparse())
    sparse = mixture.sparse()
    assert sparse == Mixture(Fixed(8).sparse(), LogSparse().sparse()) and hash(sparse) == hash(mixture.sparse())
    assert str(mixture) == "Mixture(Fixed(span=8), LogSparse())"
    assert [p.is_causal for p in mixture.plan(40, True).patterns] == [True, True]
    assert combiner.attention(q, k, v, Mixture(Fixed(8))).tobytes() == combiner.attention(q, k, v, Fixed(8)).tobytes()


def test_a_component_with_nothing_to_attend_counts_as_zero(rng):
    q, k, v = rng.standard_normal((3, 6, 4))
    nothing = Plan.from_parts([[]] * 6)
    out, saved = combiner.attention_forward(q, k, v, Mixture(nothing, Dense()))
    np.testing.assert_array_equal(out, combiner.attention(q, k, v, Dense()) / 2)
    assert np.isfinite(combiner.attention_backward(v, saved).query).all()


def test_many_short_sequences(rng):
    """More sequences than tables in flight, on any number of threads."""
    lengths = rng.integers(0, 6, 3000)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    total = int(cu_seqlens[-1])
    q, k, v = rng.standard_normal((3, 2, total, 4))
    found = set()
    for threads in (1, 2, 5):
        with combiner.num_threads(threads):
            out, saved = combiner.attention_forward(q, k, v, Fixed(2), is_causal=True, cu_seqlens=cu_seqlens)
            found.add(out.tobytes() + b"".join(x.tobytes() for x in combiner.attention_backward(v, saved)[:3]))
    assert len(found) == 1
    for n in (0, 1234, 2999):
        here = slice(cu_seqlens[n], cu_seqlens[n + 1])
        alone = combiner.attention(*(x[:, here] for x in (q, k, v)), Fixed(2), is_causal=True)
        assert out[:, here].tobytes() == alone.tobytes()


@pytest.mark.parametrize("cu_seqlens, total", [([0], 0), ([0, 0], 0), ([0, 0, 0], 0), ([0, 9], 9), ([0, 0, 9, 9], 9)])
def test_empty_sequences(rng, cu_seqlens, total):
    q, k, v = rng.standard_normal((3, 2, total, 4))
    for pattern in (Fixed(4), Mixture(Fixed(4), Dense())):
        out, saved = combiner.attention_forward(q, k, v, pattern, cu_seqlens=cu_seqlens)
        assert out.tobytes() == combiner.attention(q, k, v, pattern).tobytes()
        assert combiner.attention_backward(v, saved).query.shape == q.shape


X = np.ones((2, 8, 4))
EMPTY = np.ones((2, 0, 4))


@pytest.mark.parametrize(
    "call, error, says",
    [
        (dict(cu_seqlens=[0.0, 8.0]), TypeError, "cu_seqlens must hold integers, got float64"),
        (dict(cu_seqlens="08"), TypeError, "cu_seqlens must hold integers"),
        (dict(cu_seqlens=[[0, 8]]), ValueError, "cu_seqlens must have shape (N + 1,), got (1, 2)"),
        (dict(cu_seqlens=np.zeros(0, int)), ValueError, "cu_seqlens must have shape (N + 1,), got (0,)"),
        (dict(cu_seqlens=[1, 8]), ValueError, "cu_seqlens must run from 0 to the length of query, 8"),
        (dict(cu_seqlens=[0, 9]), ValueError, "cu_seqlens must run from 0 to the length of query, 8"),
        (dict(cu_seqlens=[0, 7]), ValueError, "cu_seqlens must run from 0 to the length of query, 8"),
        (dict(cu_seqlens=[0, 5, 4, 8]), ValueError, "and not decrease, got [0 5 4 8]"),
        (dict(cu_seqlens=[0, 8], pattern=Fixed(4).plan(8)), ValueError, "pattern must make a plan for each sequence"),
        (dict(cu_seqlens=[0, 8], pattern=(Fixed(4).plan(8),)), ValueError, "got a tuple"),
        (dict(cu_seqlens=[0, 8], pattern=Mixture(Fixed(4).plan(8))), ValueError, "pattern must make a plan for each"),
        (dict(cu_seqlens=[0, 8], pattern=3), TypeError, "pattern must be a pattern such as combiner.Fixed(), got int"),
        (dict(cu_seqlens=[0, 8], pattern=Routing([0, 1])), ValueError, "clusters are of 2 positions, got length 8"),
        (dict(cu_seqlens=[0, 8], is_causal=1), TypeError, "is_causal must be a bool, got int"),
        (
            dict(cu_seqlens=[0, 3, 8], pattern=Selected(Fixed(4), [[0], [0]], block=4)),
            ValueError,
            "regions must have 3 blocks of 4 queries for the sequences of cu_seqlens, [0, 3, 8], got 2",
        ),
        (
            dict(cu_seqlens=[0, 3, 8], pattern=Selected(Fixed(4), [[0], [0], [2]], block=4)),
            ValueError,
            "regions must lie between -1 and 1, got 2 for block 1 of the sequence from position 3 on",
        ),
        (dict(cu_seqlens=[0, 3, 8], region_key=np.ones((2, 2, 4))), ValueError, "shape (Hk or Hq, 3, 4)"),
        (dict(pattern=Mixture(Fixed(4)), return_lse=True), ValueError, "return_lse must be False with a Mixture"),
        (dict(pattern=Mixture(Fixed(4)), is_causal=1), TypeError, "is_causal must be a bool"),
        (dict(pattern=Mixture(Fixed(4)), region_key=np.ones((2, 3, 4))), ValueError, "(Hk or Hq, 2, 4), got (2, 3, 4)"),
        (dict(pattern=Mixture(Fixed(4), Fixed(4).plan(7))), ValueError, "a plan for the length of query, 8"),
        (dict(pattern=Mixture(Fixed(4).plan(8)), is_causal=True), ValueError, "is_causal must be False with"),
        (dict(pattern=Mixture(Fixed(4)), query=3), TypeError, "query must be a float32, float64"),
        (dict(dropout_p=-0.1), ValueError, "dropout_p must be between 0 and 1, got -0.1"),
        (dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
        (dict(dropout_p=float("nan")), ValueError, "dropout_p must be between 0 and 1, got nan"),
        (dict(dropout_p="half"), TypeError, "dropout_p must be a number, got str"),
        (dict(dropout_p=None), TypeError, "dropout_p must be a number, got NoneType"),
        (dict(seed=1.5), TypeError, "seed must be an integer, got float"),
        (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (dict(seed=2**64), ValueError, "seed must be below 2^64"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments(call, error, says):
    out = np.full((2, 8, 4), 7.0)
    arguments = {"query": X, "key": X, "value": X, "pattern": Fixed(4), "out": out} | call
    with pytest.raises(error, match=re.escape(says)):
        combiner.attention(**arguments)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: Mixture(), ValueError, "patterns must be at least one, got none"),
        (lambda: Mixture(3), TypeError, "patterns must be patterns such as combiner.Fixed() or plans, got int"),
        (lambda: Mixture(Fixed), TypeError, "got Fixed"),
        (lambda: Mixture(Mixture(Fixed())), TypeError, "got Mixture"),
        (lambda: Mixture(Fixed(4).plan(8)).sparse(), TypeError, "patterns must have a sparse baseline each, got Plan"),
        (lambda: combiner.summarize(X, X, X, Mixture(Fixed(4))), ValueError, "pattern must have one normaliser"),
        (lambda: combiner.attend(X, X, X, X, X, Mixture(Fixed(4))), ValueError, "pattern must have one normaliser"),
        (
            lambda: combiner.attention_backward(
                X, combiner.attention_forward(X, X, X, Mixture(Fixed(4)))[1], grad_lse=X[..., 0]
            ),
            ValueError,
            "grad_lse must be None with a Mixture",
        ),
    ],
)
def test_wrong_mixtures(call, error, says):
    with pytest.raises(error, match=re.escape(says)):
        call()


def damaged() -> list[tuple[str, Callable[[], Saved]]]:
    """What a pickle of `saved` may hold after a slip, by key: None, or something else."""
    _, saved = combiner.attention_forward(X, X, X, Fixed(4), dropout_p=0.5, seed=1)
    _, mean = combiner.attention_forward(X, X, X, Mixture(Fixed(4), LogSparse()))
    cases: list[tuple[str, Callable[[], Saved]]] = []
    for name in ("query", "key", "value"):
        cases += [(name, lambda name=name, x=x: rebuilt(saved, **{name: x})) for x in (None, 3, "x", X[0, 0])]
    for name in ("scale", "key_mask", "cu_seqlens", "region_query", "region_key"):  # which may be absent
        cases += [(name, lambda name=name, x=x: rebuilt(saved, **{name: x})) for x in ("x", object(), (3,))]
    for junk in (None, 3, (), (None,), Fixed(4), Fixed(4).plan(7)):
        cases.append(("pattern", lambda junk=junk: rebuilt(saved, plan=junk)))
    for name in ("out", "softmax", "summary_value", "summary_softmax"):
        cases += [(name, lambda name=name, x=x: rebuilt(saved, **{name: x})) for x in (None, 3, X[:, :3])]
    cases.append(("summary_key", lambda: rebuilt(saved, summary_key=3)))  # of no use where keys are pooled
    for junk in (
        3,
        "x",
        (),
        (0.5,),
        ("half", 1, None),
        (0.5, "seed", None),
        (0.5, -1, None),
        [0.5, 1, None],
        (2, 1, None),
    ):
        cases.append(("dropout", lambda junk=junk: rebuilt(saved, dropout=junk)))
    for junk in (None, 3, [], (), "x"):
        cases.append(("components", lambda junk=junk: rebuilt(mean, plan=junk)))
    for junk in ((3,), ((1, 2, 3),), (Fixed(4).plan(8), None), (Fixed(4).plan(8), (saved,))):
        cases.append(("pattern", lambda junk=junk: rebuilt(mean, plan=junk)))
    for name in ("component_out", "softmax", "summary_value", "summary_softmax"):
        cases += [(name, lambda name=name, x=x: rebuilt(mean, **{name: x})) for x in (None, 3, X[:, :3])]
    cases += [("results", lambda junk=junk: replace(saved, results=junk)) for junk in (None, 3, ())]
    cases.append(("summary_value", lambda: replace(mean, results=saved.results)))
    cases.append(("summary_value", lambda: replace(saved, results=mean.results)))
    cases += [("problem", lambda junk=junk: replace(saved, problem=junk)) for junk in (None, 3, saved)]
    cases.append(("layout", lambda: replace(saved, layout="LBHD")))
    cases.append(("function", lambda: replace(saved, function=None)))
    return cases


def replace(saved: Saved, **changed: object) -> Saved:
    """With other parts."""
    names = "function", "layout", "problem", "results"
    return Saved(**{name: getattr(saved, name) for name in names} | changed)


@pytest.mark.parametrize("name, saved", damaged(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_damaged_saved_names_its_key(name, saved):
    with pytest.raises((TypeError, ValueError), match=name):
        combiner.attention_backward(np.ones((2, 8, 4)), saved())


def test_regions_of_another_mixture():
    """The regions of all components are one axis: their number is that of the plans, whatever was saved."""
    pattern = Mixture(Fixed(4), LogSparse())
    R = sum(plan.region_count for plan in pattern.plan(8).patterns)
    _, saved = combiner.attention_forward(X, X, X, pattern, region_key=np.ones((2, R, 4)), cu_seqlens=[0, 8])
    assert saved.problem.region_count == R and saved["summary_value"].shape == (2, R, 4)
    for wrong in (R - 1, R + 1):
        with pytest.raises(ValueError, match=rf"shape \(Hk or Hq, {R}, 4\), got \(2, {wrong}, 4\)"):
            rebuilt(saved, region_key=np.ones((2, wrong, 4)))
    with pytest.raises(ValueError, match="region_key must have shape"):
        rebuilt(saved, plan=saved["plan"][:1])


@pytest.mark.parametrize("pattern", [Fixed(4), Mixture(Fixed(4), LogSparse())])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_saved_is_copied_and_pickled(rng, pattern, how):
    """And says what it holds."""
    q, k, v = rng.standard_normal((3, 8, 2, 4))
    options = {"layout": "BLHD", "dropout_p": 0.4, "key_mask": rng.random(8) < 0.8, "cu_seqlens": [0, 3, 8]}
    _, saved = combiner.attention_forward(q, k, v, pattern, **options)
    again = how(saved)
    for x, y in zip(combiner.attention_backward(v, saved), combiner.attention_backward(v, again), strict=True):
        assert (x is None and y is None) or x.tobytes() == y.tobytes()
    for text in ("attention_forward", "query (2, 8, 4)", "float64", "BLHD"):
        assert text in repr(again)
    assert ("Mixture" in repr(again)) == isinstance(pattern, Mixture)
    with pytest.raises(KeyError, match="nothing"):
        again["nothing"]
