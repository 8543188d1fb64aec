# SPDX-License-Identifier: Apache-2.0
"""Arrays with heads after positions give what arrays with heads before them do, to the bit and without a copy."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import combiner
from combiner import AttendGradients, Axial, Decoder, Fixed, Gradients, LogSparse, Mixture, Plan, Routing, Summary

B, HQ, HK, L, D, DV = 2, 4, 2, 12, 8, 5
PATTERNS = [Fixed(4), LogSparse(), Axial(4, "rowmajor", "weighted"), Routing(np.arange(L) % 3), Fixed(4).plan(L)]


def turned(x: Any) -> Any:
    """What `layout` turns of arguments and results."""
    if isinstance(x, Summary):
        return Summary(turned(x.key), turned(x.value), x.lse)
    if isinstance(x, Gradients | AttendGradients):
        return type(x)(*map(turned, x))
    return None if x is None else x.swapaxes(-3, -2) if x.ndim > 2 else x


def equal(a: Any, b: Any) -> None:
    """Arrays, or tuples of them, with the same shapes and bits."""
    if isinstance(a, tuple):
        assert type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    elif a is None:
        assert b is None
    else:
        assert a.shape == b.shape and a.tobytes() == b.tobytes()


def arrays(rng, plan_regions: int, lead: tuple[int, ...] | None, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Arguments with heads before positions; without heads where `lead` is None."""

    def normal(heads: int, rows: int, features: int) -> np.ndarray:
        shape = (rows, features) if lead is None else (*lead, heads, rows, features)
        return rng.standard_normal(shape).astype(dtype)

    return {
        "query": normal(HQ, L, D),
        "key": normal(HK, L, D),
        "value": normal(HK, L, DV),
        "region_query": normal(HQ, plan_regions, D),
        "region_key": normal(HK, plan_regions, D),
    }


def laid(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with heads after positions and contiguous so."""
    return {name: np.ascontiguousarray(turned(x)) for name, x in given.items()} | {"layout": "BLHD"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("lead", [None, (), (B,), (3, B)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda x: str(x)[:24])
def test_every_function(pattern, lead, dtype, rng):
    plan = pattern if isinstance(pattern, Plan) else pattern.plan(L, True)
    options: dict[str, Any] = {
        "is_causal": plan.is_causal,
        "scale": 0.4,
        "key_mask": rng.random((*(lead or ()), L)) < 0.8,
    }
    given = arrays(rng, plan.region_count, lead, dtype)
    if plan.weighted:
        given["region_key"] = given["region_query"]
    other = laid(given)

    out, lse = combiner.attention(pattern=pattern, return_lse=True, **given, **options)
    equal(turned(out), (x := combiner.attention(pattern=pattern, return_lse=True, **other, **options))[0])
    equal(lse, x[1])
    memory = np.zeros(turned(out).shape, dtype)
    assert combiner.attention(pattern=pattern, out=memory, **other, **options) is memory
    equal(turned(out), memory)

    out, saved = combiner.attention_forward(pattern=pattern, dropout_p=0.3, seed=1, **given, **options)
    out2, saved2 = combiner.attention_forward(pattern=pattern, dropout_p=0.3, seed=1, **other, **options)
    equal(turned(out), out2)
    assert all(np.shares_memory(saved2[name], other[name]) for name in given)
    grad_out, grad_lse = rng.standard_normal(out.shape).astype(dtype), rng.standard_normal(lse.shape).astype(lse.dtype)
    equal(
        turned(combiner.attention_backward(grad_out, saved, grad_lse=grad_lse)),
        combiner.attention_backward(turned(grad_out), saved2, grad_lse=grad_lse),
    )

    summary, saved = combiner.summarize_forward(pattern=pattern, **given, **options)
    summary2, saved2 = combiner.summarize_forward(pattern=pattern, **other, **options)
    equal(turned(summary), summary2)
    equal(summary2, combiner.summarize(pattern=pattern, **other, **options))
    grads = rng.standard_normal(summary.key.shape).astype(dtype), rng.standard_normal(summary.value.shape).astype(dtype)
    equal(
        turned(combiner.summarize_backward(*grads, saved)),
        combiner.summarize_backward(*map(turned, grads), saved2),
    )

    stage = {name: x for name, x in given.items() if name != "region_query"}
    stage |= {"region_key": summary.key, "region_value": summary.value}
    other = laid(stage)
    out, saved = combiner.attend_forward(pattern=pattern, **stage, **options)
    out2, saved2 = combiner.attend_forward(pattern=pattern, **other, **options)
    equal(turned(out), out2)
    equal(out2, combiner.attend(pattern=pattern, **other, **options))
    equal(
        turned(combiner.attend_backward(grad_out, saved, grad_lse=grad_lse)),
        combiner.attend_backward(turned(grad_out), saved2, grad_lse=grad_lse),
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mixtures(dtype, rng):
    pattern = Mixture(Fixed(4), LogSparse())
    R = sum(plan.region_count for plan in pattern.plan(L, True).patterns)
    given = arrays(rng, R, (B,), dtype)
    other = laid(given)
    out, saved = combiner.attention_forward(pattern=pattern, is_causal=True, **given)
    out2, saved2 = combiner.attention_forward(pattern=pattern, is_causal=True, **other)
    equal(turned(out), out2)
    memory = np.zeros_like(out2)
    assert combiner.attention(pattern=pattern, is_causal=True, out=memory, **other) is memory
    equal(out2, memory)
    grad = rng.standard_normal(out.shape).astype(dtype)
    equal(turned(combiner.attention_backward(grad, saved)), combiner.attention_backward(turned(grad), saved2))


@pytest.mark.parametrize("pattern", (Fixed(4), LogSparse(), Axial(4, "rowmajor", "weighted")), ids=str)
def test_terms_of_the_logit(pattern, rng):
    """Biases have no features: they and their gradients are the same in both layouts."""
    R = pattern.plan(L, True).region_count
    given = {name: x for name, x in arrays(rng, R, (B,)).items() if "region" not in name}
    grad = rng.standard_normal((B, HQ, L, DV)).astype(np.float32)
    shapes = {"key_bias": (B, HK, L), "region_bias": (HQ, R), "sink": (HQ,)}
    terms = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    options = {"pattern": pattern, "is_causal": True, "softcap": 2.0, **terms}
    out, saved = combiner.attention_forward(**given, **options)
    out2, saved2 = combiner.attention_forward(**laid(given), **options)
    equal(turned(out), out2)
    gradients = combiner.attention_backward(grad, saved)
    gradients2 = combiner.attention_backward(turned(grad), saved2)
    equal(turned(gradients)[:3], gradients2[:3])
    equal(gradients[5:], gradients2[5:])
    assert all(getattr(gradients2, name).shape == shapes[name] for name in terms)


def test_packed_sequences_weights_and_workspace(rng):
    given = {name: x for name, x in arrays(rng, 0, (B,)).items() if "region" not in name}
    other = laid(given)
    for options in ({"cu_seqlens": [0, 5, 5, L]}, {"is_causal": True}):
        equal(
            turned(combiner.attention(pattern=Fixed(4), **given, **options)),
            combiner.attention(pattern=Fixed(4), **other, **options),
        )
        q, k = given["query"], given["key"]
        equal(
            combiner.attention_weights(q, k, Fixed(4), **options),
            combiner.attention_weights(other["query"], other["key"], Fixed(4), layout="BLHD", **options),
        )
    for backward in (False, True):
        plain = combiner.workspace_bytes(pattern=Fixed(4), backward=backward, **given)
        assert combiner.workspace_bytes(pattern=Fixed(4), backward=backward, **other) == plain


def test_results_and_inputs_are_views(rng):
    """No copy: a result's memory is written once, and inputs are read where they lie."""
    q, k, v = (rng.standard_normal((B, L, heads, D)) for heads in (HQ, HK, HK))
    out, saved = combiner.attention_forward(q, k, v, Fixed(4), layout="BLHD")
    assert out.base is not None and np.shares_memory(saved["query"], q) and np.shares_memory(saved["out"], out)


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_arrays_of_other_libraries(library, rng):
    xp = pytest.importorskip(library)
    given = {name: x for name, x in arrays(rng, 0, (B,)).items() if "region" not in name}
    out = combiner.attention(pattern=Fixed(4), **given)
    other = {name: xp.asarray(np.ascontiguousarray(turned(x))) for name, x in given.items()}
    result, lse = combiner.attention(pattern=Fixed(4), layout="BLHD", return_lse=True, **other)
    assert type(result) is type(other["query"])
    equal(np.ascontiguousarray(turned(out)), np.ascontiguousarray(np.asarray(result)))
    assert lse.shape == (B, HQ, L)


def test_wrong_layouts(rng):
    q, k, v = (rng.standard_normal((B, L, heads, D)) for heads in (HQ, HK, HK))
    for layout, error, says in [
        ("LBHD", ValueError, "layout must be one of 'BHLD', 'BLHD', got 'LBHD'"),
        (None, TypeError, "layout must be a str, got NoneType"),
        (1, TypeError, "layout must be a str, got int"),
    ]:
        for call in (
            lambda layout=layout: combiner.attention(q, k, v, Fixed(4), layout=layout),
            lambda layout=layout: combiner.attention(q, k, v, Mixture(Fixed(4)), layout=layout),
            lambda layout=layout: combiner.attention_weights(q, k, Fixed(4), layout=layout),
            lambda layout=layout: combiner.workspace_bytes(q, k, v, Fixed(4), layout=layout),
            lambda layout=layout: Decoder(Fixed(4), layout=layout),
        ):
            with pytest.raises(error, match=says):
                call()
    says = r"key must have shape \(2, Hk, 12, 8\), got \(2, 2, 11, 8\), with heads before positions, as layout='BHLD'"
    for pattern in (Fixed(4), Mixture(Fixed(4))):
        with pytest.raises(ValueError, match=says):
            combiner.attention(q, k[:, :-1], v, pattern, layout="BLHD")
    _, saved = combiner.attention_forward(q, k, v, Fixed(4), layout="BLHD")
    with pytest.raises(ValueError, match=r"grad_out must have shape .*, with heads before positions"):
        combiner.attention_backward(q.swapaxes(1, 2), saved)
    with pytest.raises(TypeError, match="out must be a float32"):
        combiner.attention(q, k, v, Fixed(4), layout="BLHD", out=[[0.0]])


@pytest.mark.parametrize("heads", [(), (3,)])
def test_decoder(heads, rng):
    """[n, heads, D], and one head alone as [n, D] in both layouts."""
    q, k, v = (rng.standard_normal((*heads, 20, D)) for _ in range(3))
    plain, other = Decoder(Fixed(4)), Decoder(Fixed(4), layout="BLHD")
    for first, end in ((0, 9), (9, 10), (10, 20)):
        part = [x[..., first:end, :] for x in (q, k, v)]
        method = "step" if first else "prefill"
        equal(turned(getattr(plain, method)(*part)), getattr(other, method)(*map(turned, part)))
    assert other.length == 20


MASKS = {
    "positions": (L,),
    "one for the batch": (1, L),
    "heads and queries": (B, 1, 1, L),
    "heads and queries, for the batch": (1, 1, 1, L),
    "heads and queries, without a batch": (1, 1, L),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_masks_that_broadcast(shape, layout, rng):
    given = {name: x for name, x in arrays(rng, 0, (B,)).items() if "region" not in name}
    mask = rng.random(shape) < 0.7
    whole = np.ascontiguousarray(np.broadcast_to(mask.reshape(-1, L), (B, L)))
    other = given if layout == "BHLD" else laid(given)
    for pattern in (Fixed(4), Mixture(Fixed(4), LogSparse())):
        expected, saved = combiner.attention_forward(pattern=pattern, key_mask=whole, **other)
        out, saved2 = combiner.attention_forward(pattern=pattern, key_mask=mask, **other)
        equal(expected, out)
        equal(combiner.attention_backward(out, saved), combiner.attention_backward(out, saved2))
        combiner.workspace_bytes(pattern=pattern, key_mask=mask, **other)
    x = combiner.summarize(pattern=Fixed(4), key_mask=mask, **other)
    equal(x, combiner.summarize(pattern=Fixed(4), key_mask=whole, **other))
    other = {name: x for name, x in other.items() if name != "value"}
    equal(
        combiner.attention_weights(pattern=Fixed(4), key_mask=mask, **other),
        combiner.attention_weights(pattern=Fixed(4), key_mask=whole, **other),
    )


def test_masks_of_several_leading_axes(rng):
    q, k, v = (rng.standard_normal((3, B, heads, L, D)) for heads in (HQ, HK, HK))
    for shape in ((L,), (B, L), (1, L), (3, 1, L), (3, B, 1, 1, L), (B, 1, 1, L), (1, 1, 1, L)):
        mask = rng.random(shape) < 0.7
        rows = mask.reshape((*mask.shape[:-3], L)) if mask.shape[-3:-1] == (1, 1) else mask
        whole = np.ascontiguousarray(np.broadcast_to(rows, (3, B, L)))
        equal(
            combiner.attention(q, k, v, Fixed(4), key_mask=mask), combiner.attention(q, k, v, Fixed(4), key_mask=whole)
        )
