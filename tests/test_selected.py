# SPDX-License-Identifier: Apache-2.0
"""Selected: the parts that its definition names, on every pattern whose regions queries share."""

import itertools
import pickle

import numpy as np
import pytest
from test_plan import check

import combiner
from combiner import Axial, Dense, Fixed, HeavilyCompressed, LogSparse, Routing, Selected, Tree, reference

SHARED = [
    Fixed(5),
    Fixed(16),
    Fixed(9, window=20),
    HeavilyCompressed(6, 20),
    LogSparse(),
    LogSparse(hierarchical=True),
    Tree(3),
    Tree(4, 2),
]


@pytest.mark.parametrize("open, rest", ((True, True), (True, False), (False, False)))
@pytest.mark.parametrize("block", (1, 7, 16, 64, 100))
def test_selected_says_what_the_spec_says(block, open, rest):
    """Regions that are no part, repeats and -1 among those listed."""
    rng = np.random.default_rng(block)
    for L in (0, 1, 5, 17, 64, 65, 110):
        for base in (*SHARED, Routing(rng.integers(0, 6, L))):
            for is_causal in (False,) if isinstance(base, Routing) else (True, False):
                R = base.plan(L, is_causal).region_count
                regions = rng.integers(-1, R, (-(-L // block), int(rng.integers(0, 7)) if R else 0))
                pattern = Selected(base, regions, block=block, open=open, rest=rest)
                check(pattern.plan(L, is_causal), reference.parts(pattern, L, is_causal), L, is_causal)


@pytest.mark.parametrize("base", SHARED, ids=str)
def test_opening_everything_is_dense_and_opening_nothing_the_pattern(base):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 100, 8))
    for is_causal in (True, False):
        for block in (1, 64):
            every = Selected(base, np.arange(base.plan(100, is_causal).region_count), block=block)
            plan = every.plan(100, is_causal)
            assert plan.pairs == Dense().plan(100, is_causal).pairs and plan.is_partition
            out, dense = (combiner.attention(q, k, v, x, is_causal=is_causal) for x in (every, Dense()))
            np.testing.assert_allclose(out, dense, rtol=0, atol=1e-12)
            none = Selected(base, [-1, -1], block=block)
            out, own = (combiner.attention(q, k, v, x, is_causal=is_causal) for x in (none, base))
            assert out.tobytes() == own.tobytes()


def test_selected_has_a_plan_for_each_batch_entry_and_key_head():
    rng = np.random.default_rng(0)
    regions, clusters = rng.integers(-1, 4, (2, 3, 2, 2)), rng.integers(0, 4, (2, 3, 100))
    q, k, v = rng.standard_normal((3, 2, 3, 100, 4))
    for base in (Tree(5), Routing(clusters)):
        pattern = Selected(base, regions, block=50)
        assert len(pattern.plan(100)) == 6
        out = combiner.attention(q, k, v, pattern)
        for b, h in itertools.product(range(2), range(3)):
            own = Routing(clusters[b, h]) if isinstance(base, Routing) else base
            alone = combiner.attention(q[b, h], k[b, h], v[b, h], Selected(own, regions[b, h], block=50))
            assert out[b, h].tobytes() == alone.tobytes()


# ---- blocks of one query: four query heads or more that share a key head are lanes of one tile


TERMS = ("", "softcap", "key_bias", "head_bias", "sink", "key_mask", "dropout")


def draw_shared(rng, group, Hk, L, dtype, terms):
    """Arguments of attention, all terms together, and the keyword arguments of query head h of batch entry b."""
    Hq = group * Hk
    q, k, v = (rng.standard_normal((2, h, L, d)).astype(dtype) for h, d in ((Hq, 5), (Hk, 5), (Hk, 3)))
    biases = {"key_bias": Hk, "head_bias": Hq}
    given = {
        "softcap": 2.5,
        "key_bias": rng.standard_normal((2, Hk, L)).astype(dtype),
        "head_bias": rng.standard_normal((2, Hq, L)).astype(dtype),
        "sink": rng.standard_normal(Hq).astype(dtype),
        "key_mask": rng.random((2, L)) < 0.8,
        "dropout": 0.3,
    }
    names = {"head_bias": "key_bias", "dropout": "dropout_p"}
    options = {names.get(term, term): given[term] for term in terms.split()}
    if "dropout" in terms:
        options["seed"] = 3

    def of_head(b, h, company):
        own = dict(options)
        for term in biases:
            if term in terms.split():
                own["key_bias"] = given[term][b, h * biases[term] // Hq][None]
        if "sink" in options:
            own["sink"] = given["sink"][h : h + 1].repeat(company)
        if "key_mask" in options:
            own["key_mask"] = given["key_mask"][b]
        return own

    return q, k, v, options, of_head


def forward_and_backward(q, k, v, pattern, grad, **options):
    out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=True, **options)
    return out, saved["lse"], combiner.attention_backward(grad, saved)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("group", (2, 3, 8, 67, 70))
@pytest.mark.parametrize("base", (Fixed(16), HeavilyCompressed(6, 20), LogSparse()), ids=repr)
def test_heads_have_the_bits_that_they_have_in_other_company(base, group, terms, rng):
    """A group of the same head is as good as any; of up to three heads one head alone too. Rows of keys are sums over
    the heads."""
    L, Hk = 100, 2
    is_alone = group in (2, 3, 67) or "head_bias" in terms
    company = 1 if is_alone else 4
    q, k, v, options, of_head = draw_shared(rng, group, Hk, L, np.float32, terms)
    regions = rng.integers(-1, base.plan(L, True).region_count, (2, Hk, L, 3))
    grad = rng.standard_normal((2, group * Hk, L, 3), dtype=np.float32)
    out, lse, grads = forward_and_backward(q, k, v, Selected(base, regions, block=1), grad, **options)
    if "dropout" in terms:  # draws differ between heads: see test_threads_do_not_matter
        return
    sums = np.zeros_like(k), np.zeros_like(v)
    for b, h in itertools.product(range(2), range(group * Hk)):
        own = h // group
        alone = Selected(base, regions[b, own], block=1)
        one, grad_one = (x[b, h : h + 1].repeat(company, axis=0) for x in (q, grad))
        arguments = one, k[b, own : own + 1], v[b, own : own + 1], alone, grad_one
        own_out, own_lse, own_grads = forward_and_backward(*arguments, **of_head(b, h, company))
        for n in range(company):
            assert np.array_equal(out[b, h], own_out[n]) and np.array_equal(lse[b, h], own_lse[n])
            assert np.array_equal(grads.query[b, h], own_grads.query[n])
        sums[0][b, own] += own_grads.key[0] / company
        sums[1][b, own] += own_grads.value[0] / company
    for whole, summed in zip((grads.key, grads.value), sums, strict=True):
        np.testing.assert_allclose(whole, summed, rtol=0, atol=2e-6 * group * np.abs(summed).max())


@pytest.mark.parametrize("terms", (*TERMS, "softcap key_bias sink key_mask"))
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
@pytest.mark.parametrize("Hk", (1, 3))
def test_threads_do_not_matter(Hk, dtype, terms, rng):
    """Nor for sums over the heads of a key head that threads share."""
    L, base = 600, Fixed(16)
    if dtype == np.float16 and "key_mask" in terms.split():
        terms = terms.replace("key_mask", "").strip()
    q, k, v, options, _ = draw_shared(rng, 6, Hk, L, dtype, terms)
    if dtype == np.float16:  # the dtype of biases is the one that is computed with
        options = {name: x.astype(np.float32) if hasattr(x, "astype") else x for name, x in options.items()}
    regions = rng.integers(-1, base.plan(L, True).region_count, (2, Hk, L, 3))
    grad = rng.standard_normal((2, 6 * Hk, L, 3)).astype(dtype)
    results = []
    for threads in (1, 2, 4, 5):
        with combiner.num_threads(threads):
            out, lse, grads = forward_and_backward(q, k, v, Selected(base, regions, block=1), grad, **options)
        results.append([x.tobytes() for x in (out, lse, *grads) if x is not None])
    assert all(each == results[0] for each in results)


@pytest.mark.parametrize("terms", ("", "softcap key_bias sink key_mask"))
def test_heads_that_share_keys_are_what_the_reference_says(terms, rng):
    L, base = 150, HeavilyCompressed(8, 20)
    q, k, v, options, _ = draw_shared(rng, 4, 2, L, np.float64, terms)
    pattern = Selected(base, rng.integers(-1, base.plan(L, True).region_count, (2, 2, L, 2)), block=1)
    grad = rng.standard_normal((2, 8, L, 3))
    out, _, grads = forward_and_backward(q, k, v, pattern, grad, **options)
    expected = reference.attention(q, k, v, pattern, is_causal=True, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    step = 1e-6
    for name, array, given in (("query", q, grads.query), ("key", k, grads.key), ("value", v, grads.value)):
        direction = rng.standard_normal(array.shape)
        sides = []
        for sign in (1, -1):
            moved = {"query": q, "key": k, "value": v} | {name: array + sign * step * direction}
            sides.append((reference.attention(*moved.values(), pattern, is_causal=True, **options) * grad).sum())
        np.testing.assert_allclose((given * direction).sum(), (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-6)


def test_selected_is_a_value():
    pattern = Selected(Fixed(4), [[0, 1], [2, -1]], block=8, rest=False)
    assert repr(pattern) == "Selected(Fixed(span=4), <regions [2, 2]>, block=8, rest=False)"
    copied = pickle.loads(pickle.dumps(pattern))
    assert repr(copied) == repr(pattern) and copied != pattern and not copied.regions.flags.writeable
    assert (copied.regions == pattern.regions).all()
    assert pattern.sparse().rest is False and Selected(Fixed(4), [0]).sparse().rest is False
    given = np.array([0, 1])
    pattern = Selected(Fixed(4), given)
    given[0] = 1
    assert pattern.regions.tolist() == [0, 1]
    assert pattern.plan(16, True) is pattern.plan(16, True)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (
            lambda: Selected(Axial(4), [0]),
            ValueError,
            r"pattern must have regions .* share \(Fixed, .* Axial\(",
        ),
        (lambda: Selected(Fixed(4).sparse(), [0]), ValueError, "pattern must have regions that queries share"),
        (lambda: Selected(Fixed, [0]), TypeError, "pattern must be .*, got Fixed, a class: call it"),
        (lambda: Selected(Fixed(4), 3), ValueError, r"regions must have shape \[k\], \[T, k\] or .*, got \(\)"),
        (lambda: Selected(Fixed(4), [0.5]), TypeError, "regions must hold integers, got float64"),
        (lambda: Selected(Fixed(4), [0], block=0), ValueError, "block must be at least 1, got 0"),
        (lambda: Selected(Fixed(4), [0], open=1), TypeError, "open must be a bool, got int"),
        (lambda: Selected(Fixed(4), [0], open=False), ValueError, "open must be True where rest is True"),
        (lambda: Selected(Fixed(4), [2]).plan(8), ValueError, "regions must lie between -1 and 1, got 2 for block 0"),
        (lambda: Selected(Fixed(4), [-2]).plan(8), ValueError, "regions must lie between -1 and 1, got -2 for block 0"),
        (lambda: Selected(Fixed(4), [[0]]).plan(65), ValueError, "regions must have 2 blocks of 64 queries .*, got 1"),
        (lambda: Selected(Routing([0, 1]), [0]).plan(2, True), ValueError, "pattern must not be a Routing where is_ca"),
        (
            lambda: Selected(Routing(np.zeros((2, 4), int)), np.zeros((3, 1, 1), int)).plan(4),
            ValueError,
            "regions must have a set for each of 2 plans of the pattern, got 3",
        ),
    ],
)
def test_selections_that_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
