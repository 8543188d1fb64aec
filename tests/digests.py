# SPDX-License-Identifier: Apache-2.0
"""The bits of some 700 calls, to see that a change which must not move them has not.

python tests/digests.py > before.json             of the package that is installed, on every instruction set
python tests/digests.py --against before.json     exits with 1 and names the calls whose bits are others

The bits are those of one machine: with another NumPy or on a processor without fused multiply-add they may differ.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from cases import each_isa, grid, grid_of_terms, problem

import combiner
from combiner import Axial, Decoder, Fixed, LogSparse, Mixture, Tree

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
SHAPES = ((1, 1, 1, 64, 64), (2, 4, 2, 24, 40), (1, 3, 1, 5, 111))  # B, Hq, Hk, D, Dv
DECODED = (Fixed(8), LogSparse(), Tree(3), Axial(7), Axial(7, "rowmajor"))
Call = tuple[str, list[np.ndarray]]


def of_grid() -> Iterator[Call]:
    """Every case of the tests' grid, the dtypes in turn: both stages at once, forward and backward."""
    for n, case in enumerate(grid()):
        for dtype in (DTYPES[n % 4], DTYPES[(n + 1 + n // 4) % 4])[: 2 if case.L == 130 else 1]:
            given = problem(case).as_type(dtype)
            yield f"{case}-{np.dtype(dtype)}", attention(given, case.dropout_p == 0)


def attention(given, has_lse: bool) -> list[np.ndarray]:
    """out, lse and the gradients."""
    out, lse = combiner.attention(*given.inputs, given.pattern, return_lse=True, **given.options)
    same, saved = combiner.attention_forward(*given.inputs, given.pattern, **given.options)
    assert same.tobytes() == out.tobytes()
    grad_lse = given.grad_lse.astype(lse.dtype) if has_lse else None
    return [out, lse, *without_terms(combiner.attention_backward(given.grad_out, saved, grad_lse=grad_lse))]


def without_terms(gradients: tuple) -> tuple:
    """The gradients but for those of terms that were not given, which have no bits."""
    assert gradients[5:] == (None,) * 3
    return gradients[:5]


def of_terms() -> Iterator[Call]:
    """The terms of a logit, with the pattern and the dtype in turn."""
    for n, case in enumerate(grid_of_terms()):
        given = problem(case).as_type(DTYPES[n % 4])
        wide = np.float64 if DTYPES[n % 4] == np.float64 else np.float32
        out, saved = combiner.attention_forward(*given.inputs, given.pattern, **given.options)
        gradients = combiner.attention_backward(given.grad_out, saved, grad_lse=given.grad_lse.astype(wide))
        yield f"terms-{case}-{np.dtype(DTYPES[n % 4])}", [out, saved["lse"], *gradients]


def of_stages() -> Iterator[Call]:
    """The two stages one after the other."""
    for n, case in enumerate(case for case in grid() if case.L == 97 and case.is_causal):
        dtype = DTYPES[n % 4]
        given = problem(case).as_type(dtype)
        query, key, value = given.inputs
        own, saved = combiner.summarize_forward(query, key, value, given.pattern, **given.of_summarize)
        of_regions = combiner.summarize_backward(own.key, own.value, saved)
        options = given.of_attend
        out, saved = combiner.attend_forward(query, key, value, own.key, own.value, given.pattern, **options)
        gradients = combiner.attend_backward(given.grad_out, saved)
        yield f"stages-{case}-{np.dtype(dtype)}", [*own[:3], out, *without_terms(of_regions), *without_terms(gradients)]


def of_the_rest() -> Iterator[Call]:
    """Packed sequences, mixtures, other layouts, decoders, clusters."""
    for n, (B, Hq, Hk, D, Dv) in enumerate(SHAPES * 2):
        dtype = DTYPES[n % 4]
        rng = np.random.default_rng(n)
        L = 150
        query, key, value, grad = (
            rng.standard_normal((B, heads, L, features)).astype(np.float32).astype(dtype)
            for heads, features in ((Hq, D), (Hk, D), (Hk, Dv), (Hq, Dv))
        )
        patterns = {
            "mixture": Mixture(Fixed(16), LogSparse()),
            "packed": Fixed(8),
            "packed mixture": Mixture(Tree(2), Fixed(8)),
        }
        for name, pattern in patterns.items():
            options = {"cu_seqlens": [0, 3, 3, 70, L]} if "packed" in name else {}
            options |= {"is_causal": n % 2 == 0, "dropout_p": 0.2 * (n % 3), "seed": 7}
            out, saved = combiner.attention_forward(query, key, value, pattern, **options)
            gradients = without_terms(combiner.attention_backward(grad, saved))
            yield f"{name}-{n}-{np.dtype(dtype)}", [out, *gradients]
        turned = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (query, key, value)]
        yield f"turned-{n}", [combiner.attention(*turned, LogSparse(), layout="BLHD")]
        if dtype in (np.float32, np.float64):
            clusters = combiner.cluster(key, 5, seed=n, balanced=n % 2 == 0)
            yield f"clusters-{n}", [clusters, combiner.fit_centroids(key, 5, seed=n)]
        for pattern in DECODED:
            decoder = Decoder(pattern)
            steps = [decoder.prefill(query[:, :, :40], key[:, :, :40], value[:, :, :40])]
            steps += [decoder.step(*(x[:, :, t : t + 3] for x in (query, key, value))) for t in range(40, 70, 3)]
            yield f"decoder-{pattern}-{n}", steps


def digests() -> dict[str, str]:
    """From "instruction set: call" to the hash of all its results."""
    found = {}
    for isa in each_isa(pairing=True):
        for calls in (of_grid(), of_stages(), of_the_rest(), of_terms()):
            for name, arrays in calls:
                hashed = hashlib.sha256()
                for x in arrays:
                    hashed.update(b"none" if x is None else f"{x.dtype}{x.shape}".encode() + x.tobytes())
                found[f"{isa}: {name}"] = hashed.hexdigest()[:16]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="FILE", help="what an earlier run printed")
    wanted = parser.parse_args().against
    found = digests()
    if not wanted:
        print(json.dumps(found, indent=0))
        return 0
    with open(wanted, encoding="utf-8") as file:
        before = json.load(file)
    others = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print(*others, f"{len(others)} of {len(found)} calls have other bits", sep="\n")
    return bool(others)


if __name__ == "__main__":
    sys.exit(main())
