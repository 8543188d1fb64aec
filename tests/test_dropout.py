# SPDX-License-Identifier: Apache-2.0
"""Dropout: the weights that fall follow from seed and position alone, in forward and in backward."""

import numpy as np
import pytest
from cases import close, each_isa

import combiner
from combiner import Axial, Dense, Fixed, LogSparse, Mixture, Plan, Routing, reference

PATTERNS = [
    Dense(),
    Fixed(8),
    LogSparse(hierarchical=True),
    Axial(6, "rowmajor", "weighted"),
    Routing(np.arange(70) * 31 % 7),
    Mixture(Fixed(8), Axial(9)),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.mark.parametrize(
    "counter, key, words",
    [  # the known answers that Random123 ships for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(counter, key, words):
    assert tuple(reference.philox(counter, key).tolist()) == words


def test_the_weights_that_fall_are_the_specs(rng):
    """Values that are unit vectors show every weight of dense attention alone."""
    L, p, seed = 200, 0.37, 0x123456789ABCDEF0
    q, k = rng.standard_normal((2, 2, 3, L, 4))
    v = np.broadcast_to(np.eye(L), (2, 3, L, L))
    whole = combiner.attention(q, k, v, Dense())
    dropped = combiner.attention(q, k, v, Dense(), dropout_p=p, seed=seed)
    b, h, i, row = np.ix_(range(2), range(3), range(L), range(L))
    words = reference.philox((row // 4, i, h, b), (seed % 2**32, seed // 2**32))
    u = np.take_along_axis(words, np.broadcast_to(row % 4, words.shape[1:])[None], axis=0)[0] // 256 / 2**24
    close(dropped, np.where(u >= p, whole / (1 - p), 0), 1e-13, "weights")
    assert abs((dropped == 0).mean() - p) < 5 * (p * (1 - p) / u.size) ** 0.5


@pytest.mark.parametrize("is_causal", (True, False))
@every_pattern
def test_bits(rng, pattern, is_causal):
    """For any threads, instruction set with FMA, layout and drawn seed; lse does not know of dropout."""
    q, k, v, grad_out = rng.standard_normal((4, 2, 3, 70, 9)).astype(np.float32)
    options = {"is_causal": is_causal, "dropout_p": 0.2}

    def run(**more) -> bytes:
        out, saved = combiner.attention_forward(q, k, v, pattern, **options, **more)
        return out.tobytes() + b"".join(x.tobytes() for x in combiner.attention_backward(grad_out, saved)[:3])

    results = set()
    for isa in each_isa():
        for threads in (1, 2, 7):
            with combiner.num_threads(threads):
                if isa != "base":
                    results.add(run(seed=3))
    assert len(results) <= 1
    assert run(seed=3) == run(seed=3)
    assert run(seed=3) != run(seed=4) and run(seed=3) != run(seed=3 + 2**40)
    assert run(seed=None) != run(seed=None)
    if not isinstance(pattern, Mixture):
        _, lse = combiner.attention(q, k, v, pattern, seed=1, return_lse=True, **options)
        _, whole = combiner.attention(q, k, v, pattern, is_causal=is_causal, return_lse=True)
        assert lse.tobytes() == whole.tobytes()


def test_a_drawn_seed_is_kept_for_backward(rng):
    q, k, v = rng.standard_normal((3, 2, 50, 6))
    _, saved = combiner.attention_forward(q, k, v, Fixed(8), dropout_p=0.5)
    p, seed = saved["dropout"]
    out, again = combiner.attention_forward(q, k, v, Fixed(8), dropout_p=p, seed=seed)
    assert saved["out"].tobytes() == out.tobytes()
    for x, y in zip(combiner.attention_backward(v, saved), combiner.attention_backward(v, again), strict=True):
        assert (x is None and y is None) or x.tobytes() == y.tobytes()


@every_pattern
def test_ends(rng, pattern):
    """0 changes no bit, 1 leaves nothing; both have gradients."""
    q, k, v = rng.standard_normal((3, 2, 70, 9))
    whole = combiner.attention(q, k, v, pattern)
    for none in (0, 0.0, np.float32(0), False):
        assert combiner.attention(q, k, v, pattern, dropout_p=none, seed=1).tobytes() == whole.tobytes()
    for all_fall in (1, 1.0, 1 - 2.0**-30):
        out, saved = combiner.attention_forward(q, k, v, pattern, dropout_p=all_fall, seed=1)
        assert not out.any()
        assert not any(x.any() for x in combiner.attention_backward(v, saved)[:3])


@every_pattern
def test_expectation(rng, pattern):
    """The mean over seeds is attention without dropout: within five standard errors, as measured."""
    q, k, v = rng.standard_normal((3, 1, 70, 6))
    draws = np.stack([combiner.attention(q, k, v, pattern, dropout_p=0.3, seed=seed) for seed in range(1500)])
    error = draws.mean(axis=0) - combiner.attention(q, k, v, pattern)
    within = 5 * draws.std(axis=0) / len(draws) ** 0.5 + 1e-12
    assert (np.abs(error) < within).mean() > 0.999


@pytest.mark.parametrize("is_causal", (True, False))
@every_pattern
def test_gradients_are_the_slope(rng, pattern, is_causal):
    """Of the library's own forward with the same seed."""
    inputs = dict(zip(("query", "key", "value"), rng.standard_normal((3, 2, 70, 5)), strict=True))
    grad_out = rng.standard_normal((2, 70, 5))
    options = {"pattern": pattern, "is_causal": is_causal, "dropout_p": 0.4, "seed": 11}
    _, saved = combiner.attention_forward(**inputs, **options)
    gradients = combiner.attention_backward(grad_out, saved)._asdict()
    for name, x in inputs.items():
        step = 1e-6 * rng.standard_normal(x.shape)
        ends = [
            (combiner.attention(**(inputs | {name: x + sign * step}), **options) * grad_out).sum() for sign in (1, -1)
        ]
        assert (gradients[name] * step).sum() == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-6, abs=1e-11), name


def test_row_tiles_drop_too(rng):
    """A plan may have a query attend alone, by the row kernel."""
    L = 9
    plan = Plan.from_arrays(
        wave=[0, 1], task=[[0, 0], [0, L]], pool=[],
        tile=[*([i, 1, 1, i, 1] for i in range(L)), [0, 1, 0, L, 0]],
        run=[[0, 1, L, -1]] * L, index=[], mask=[], length=L,
    )  # fmt: skip
    q, k, v, grad_out = rng.standard_normal((4, 2, L, 5))
    options = {"dropout_p": 0.5, "seed": 9}
    out, saved = combiner.attention_forward(q, k, v, plan, **options)
    expected, exact = reference.attention_forward(q, k, v, Dense(), **options)
    close(out, expected, 1e-13, "out")
    for x, y in zip(
        combiner.attention_backward(grad_out, saved)[:3], reference.attention_backward(grad_out, exact)[:3], strict=True
    ):
        close(x, y, 1e-12, "gradient")


def test_poison_goes_where_it_did(rng):
    """A NaN that a weight of 0 meets reaches the rows that see it, and no others."""
    q, k, v = rng.standard_normal((3, 40, 5))
    v[20] = np.nan
    out = combiner.attention(q, k, v, Fixed(8), is_causal=True, dropout_p=0.5, seed=1)
    assert np.isnan(out[20:]).all() and np.isfinite(out[:20]).all()
