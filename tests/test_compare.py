# SPDX-License-Identifier: Apache-2.0
"""`combiner.compare`: every number against dense attention and the effective attention, written out in float64."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

import combiner
from combiner import Dense, Fixed, LogSparse, Mixture, Routing, Window, compare
from combiner.effective import dense_rows, weight_rows


def dense(q, k, v, g, is_causal, mask=None):
    """Weights, out and the gradients of sum(out * g) of one head."""
    L, D = q.shape
    s = q @ k.T / np.sqrt(D)
    hidden = np.zeros((L, L), bool) if mask is None else np.broadcast_to(~mask, (L, L)).copy()
    if is_causal:
        hidden |= np.triu(np.ones((L, L), bool), 1)
    s[hidden] = -np.inf
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(s - s.max(axis=1, keepdims=True)))
    p /= np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
    dp = g @ v.T
    ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / np.sqrt(D)
    return p, p @ v, ds @ k, ds.T @ q, p.T @ g


def distance(x, exact):
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("sample", (None, 5))
def test_against_dense_attention(rng, is_causal, sample):
    L, H, D = 40, 3, 8
    q, k, v, g = rng.standard_normal((4, H, L, D))
    mask = np.arange(L) != 7
    patterns = {"fixed": Fixed(8), "window": Window(5), "mix": Mixture(Fixed(4), LogSparse()), "exact": Dense()}
    found = compare(q, k, v, patterns, is_causal=is_causal, key_mask=mask, grad_out=g, sample=sample, repeats=1)
    assert [line.name for line in found] == ["dense", *patterns] and len(found) == 5
    rows = np.arange(L) if sample is None else np.array([7, 15, 23, 31, 39])
    assert found.sample == len(rows)
    only = np.zeros_like(g)
    only[:, rows] = g[:, rows]
    of_heads = [dense(q[h], k[h], v[h], only[h], is_causal, mask) for h in range(H)]
    exact = [np.stack(x) for x in zip(*of_heads, strict=True)]
    for name, pattern in patterns.items():
        line = found[name]
        out, saved = combiner.attention_forward(q, k, v, pattern, is_causal=is_causal, key_mask=mask)
        gradients = combiner.attention_backward(only, saved)
        assert line.out_error == pytest.approx(distance(out[:, rows], exact[1][:, rows]), rel=1e-9, abs=1e-12)
        for error, gradient, its in zip(
            (line.query_error, line.key_error, line.value_error), gradients, exact[2:], strict=False
        ):
            assert error == pytest.approx(distance(gradient, its), rel=1e-9, abs=1e-12)
        w = combiner.attention_weights(q, k, pattern, is_causal=is_causal, key_mask=mask)[:, rows]
        p = exact[0][:, rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.where(w > 0, w * np.log(w / p), 0).sum(axis=-1).mean()
        assert line.kl == pytest.approx(kl, rel=1e-9, abs=1e-12)
        assert line.unseen == pytest.approx(np.where(w > 0, 0, p).sum(axis=-1).mean(), rel=1e-9, abs=1e-12)
        assert line.share == pattern.cost(L, is_causal=is_causal).share
        assert line.pairs == H * (
            pattern.cost(L, is_causal=is_causal).pairs + pattern.cost(L, is_causal=is_causal).summary_pairs
        )
        assert line.forward_bytes == combiner.workspace_bytes(q, k, v, pattern, is_causal=is_causal, key_mask=mask)
    assert found["exact"].out_error < 1e-12 and found["exact"].unseen == 0
    assert found["window"].unseen > 0 and found["fixed"].unseen == pytest.approx(0, abs=1e-12)


def test_grouped_heads_batches_and_plans_of_heads(rng):
    """A head has the numbers that it has alone; the whole has their mean."""
    B, Hq, Hk, L = 2, 4, 2, 24
    q, (k, v) = rng.standard_normal((B, Hq, L, 4)), rng.standard_normal((2, B, Hk, L, 4))
    clusters = rng.integers(0, 4, (B, Hk, L))
    whole = compare(q, k, v, {"x": Routing(clusters)}, repeats=1)["x"]
    alone = [
        compare(q[b, h], k[b, h // 2], v[b, h // 2], {"x": Routing(clusters[b, h // 2])}, repeats=1)["x"]
        for b in range(B)
        for h in range(Hq)
    ]
    assert whole.kl == pytest.approx(np.mean([line.kl for line in alone]), rel=1e-9)
    assert whole.pairs == sum(line.pairs for line in alone)
    turned = compare(*(x.swapaxes(1, 2) for x in (q, k, v)), {"x": Routing(clusters)}, layout="BLHD", repeats=1)["x"]
    for name in ("out_error", "query_error", "kl", "pairs", "share"):
        assert getattr(turned, name) == pytest.approx(getattr(whole, name), rel=1e-9)


def test_prints_and_shows(rng):
    q, k, v = rng.standard_normal((3, 2, 64, 8), np.float32)
    found = compare(q, k, v, [Fixed(8), LogSparse()], is_causal=True, repeats=1)
    assert [line.name for line in found] == ["dense", "Fixed(span=8)", "LogSparse()"]
    lines = str(found).splitlines()
    assert len(lines) == 5 and lines[1].startswith("dense") and "all queries" in lines[-1]
    assert len(ElementTree.fromstring(found._repr_html_()).findall(".//tbody/tr")) == 3
    again = json.loads(json.dumps(found.as_dict()))
    assert again["lines"][1]["name"] == "Fixed(span=8)" and again["shape"] == [2, 64, 8]
    assert found[0] is found["dense"] and found[0].out_error == 0 and found[0].share == 1
    with pytest.raises(KeyError):
        found["axial"]


def test_long_sequences_have_no_square_array(rng):
    """32 times the positions: an array of L^2 floats would have 4 GiB."""
    q, k, v = rng.standard_normal((3, 32768, 4), np.float32)
    combiner.release_memory()
    found = compare(q, k, v, Fixed(256), is_causal=True, sample=16, repeats=1)
    assert found.sample == 16 and "16 of 32,768 queries" in str(found)
    assert found["dense"].forward_seconds is None and found["Fixed(span=256)"].forward_seconds > 0
    assert "not timed" in str(found)


def test_plots(rng):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    q, k, v = rng.standard_normal((3, 64, 8), np.float32)
    found = compare(q, k, v, [Fixed(8), LogSparse()], repeats=1)
    ax = found.plot(ax=Figure().subplots())
    marks = [line for line in ax.lines if line.get_marker() not in ("", "None")]
    assert [float(line.get_ydata()[0]) for line in marks] == [found[n].out_error for n in (1, 2)]
    assert [float(line.get_xdata()[0]) for line in marks] == [1e3 * found[n].forward_seconds for n in (1, 2)]


def test_rows_of_the_effective_attention(rng):
    q, k = rng.standard_normal((2, 30, 4))
    rows = [3, 29, 3]
    for pattern in (Fixed(4), Mixture(Fixed(4), Window(3))):
        whole = combiner.attention_weights(q, k, pattern, is_causal=True)
        np.testing.assert_allclose(weight_rows(q, k, pattern, rows[:2], is_causal=True), whole[rows[:2]], rtol=1e-12)
    plan = dense_rows(30, rows, True)
    expected = np.tril(np.ones((30, 30), bool)) & np.isin(np.arange(30), rows)[:, None]
    np.testing.assert_array_equal(plan.to_mask(), expected)


X = np.ones((2, 6, 4))


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: compare(X, X, X, "fixed"), TypeError, "patterns must be patterns such as combiner.Fixed"),
        (lambda: compare(X, X, X, [Fixed]), TypeError, "Fixed, a class: call it"),
        (lambda: compare(X, X, X, []), ValueError, "patterns must be at least one, got none"),
        (lambda: compare(X, X, X, [Fixed(2), Fixed(2)]), ValueError, "patterns must differ"),
        (lambda: compare(X, X, X, Fixed(2).plan(5)), ValueError, "the plan's"),
        (lambda: compare(X, X, X, Fixed(2).plan(6, True)), ValueError, "is_causal must be True with a causal plan"),
        (lambda: compare(X, X, X, {"dense": Fixed(2)}), ValueError, "other names than 'dense'"),
        (lambda: compare(X[:0], X[:0], X[:0], Fixed(2)), ValueError, r"at least one position, head and .*\(0, 6, 4\)"),
        (lambda: compare(X, X, X, Fixed(2), grad_out=X[:1]), ValueError, "grad_out must have shape"),
        (lambda: compare(X, X, X, Fixed(2), sample=0), ValueError, "sample must be at least 1"),
        (lambda: compare(X, X, X, Fixed(2), repeats=0), ValueError, "repeats must be at least 1"),
        (lambda: compare(X, X, X, Fixed(2), is_causal=1), TypeError, "is_causal must be a bool"),
        (lambda: compare(X, X[:, :5], X, Fixed(2)), ValueError, "key"),
        (lambda: compare(X[:, :0], X[:, :0], X[:, :0], Fixed(2)), ValueError, "at least one position"),
        (lambda: compare(X, X, X, Fixed(2), causal=True), TypeError, "is_causal=True is causality"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()
