# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: the models that are trained, and what takes the place of their attention.

CASES are measured in about a quarter of an hour on one core, LONG_CASES in hours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from model import Shape, Training
from swap import DENSE, SCORES, Selection, Swap
from tasks import Bytes, ListOps, Pixels, Recall, Task

from combiner import Axial, AxialMixture, Fixed, HeavilyCompressed, LogSparse, Tree, Window
from combiner.patterns import Factorization

SEEDS = (0, 1, 2)
OPENED = (1, 2, 4, 8)  # regions that a query opens
BLOCKS = (16, 64)  # queries that open the same regions, beside one
SPANS = (16, 32, 64)
KEPT_SPANS = (4, 8, 16, 32, 64)
TUNED = 100  # steps


@dataclass(frozen=True)
class Model:
    """A model trained with dense attention, and the sequences that it is judged by.

    Parameters
    ----------
    weights : the name of the trained weights, which several models share. A model without an encoding of positions is
        trained at one length and judged at several.
    length, held_out : positions, and number, of the sequences that the model is judged by.
    span : that of the `Fixed` that is looked at closely; about sqrt(length).
    """

    name: str
    weights: str
    task: Task
    shape: Shape
    training: Training
    length: int
    held_out: int
    span: int


def _recall(kind: str, task: Recall, length: int, span: int) -> Model:
    training = Training(512, steps=500, tokens=2048, short=0.5)
    shape = Shape(task.vocabulary)
    return Model(f"{kind}-{length}", kind, task, shape, training, length, held_out=2**15 // length, span=span)


def _bytes(kind: str, rotary: bool) -> Model:
    shape = Shape(256, recent=3, rotary=rotary, heads=4)
    training = Training(1024, steps=1000, tokens=1024)
    return Model(f"{kind}-1024", kind, Bytes(), shape, training, length=1024, held_out=16, span=32)


MODELS = (
    _recall("recall", Recall(12), 512, span=16),
    _recall("recall", Recall(12), 1024, span=32),
    _recall("recall", Recall(12), 2048, span=32),
    _recall("needle", Recall(1, asked=12), 1024, span=32),
    _bytes("bytes", rotary=True),
    _bytes("bytes-unrotated", rotary=False),
    Model(
        "listops-64",
        "listops",
        ListOps(),
        Shape(ListOps.vocabulary, rotary=True, heads=4),
        Training(64, steps=600, tokens=1024),
        length=64,
        held_out=1024,
        span=8,
    ),
    Model(
        "pixels-1024",
        "pixels",
        Pixels(),
        Shape(32, recent=1, rotary=True, heads=4),
        Training(1024, steps=300, tokens=1024),
        length=1024,
        held_out=32,
        span=32,
    ),
)


def quick(model: Model) -> Model:
    """The same at a size at which nothing is learned."""
    training = replace(model.training, length=64, steps=1, tokens=128, short=0)
    return replace(model, training=training, shape=replace(model.shape, width=16), length=64, held_out=1)


def poolings(pattern: Factorization) -> list[Factorization]:
    """The pattern with each pooling: the paper's maximum; the mean; the mean where a region counts as many keys as it
    has positions. A pattern that pools nothing, alone.
    """
    if pattern.sparse() == pattern or (isinstance(pattern, Axial) and pattern.order == "rowmajor"):
        return [pattern]
    return [pattern, replace(pattern, pooling="mean"), replace(pattern, pooling="mean", size_bias=True)]


def compared(model: Model) -> list[Factorization]:
    """Patterns of about the same cost."""
    span = model.span
    return [
        Fixed(span),
        Fixed(span, window=span),
        LogSparse(),
        LogSparse(hierarchical=True),
        Tree(8),
        Axial(span),
        Axial(span, "horizontal"),
        Axial(span, "rowmajor"),
        AxialMixture(span),
        HeavilyCompressed(span, 2 * span),
        Window(2 * span),
        Window(8 * span),
    ]


def opened(model: Model) -> Iterator[Swap]:
    """Fixed, with regions that each query opens."""
    yield Swap(DENSE)
    for k, pattern in product((0, *OPENED), poolings(Fixed(model.span))):
        yield Swap(pattern, Selection(k) if k else None)
    yield Swap(Fixed(model.span).sparse())


def spans(model: Model) -> Iterator[Swap]:
    """The same with other spans."""
    for span in SPANS:
        for k, pattern in product((0, *OPENED[1:]), poolings(Fixed(span))[:2]):
            yield Swap(pattern, Selection(k) if k else None)
        yield Swap(Fixed(span).sparse())


def windows(model: Model) -> Iterator[Swap]:
    """Fixed with and without a window, with regions that each query opens."""
    for window in (1, model.span):
        for k, pattern in product((0, *OPENED), poolings(Fixed(model.span, window=window))):
            yield Swap(pattern, Selection(k) if k else None)


def blocks(model: Model) -> Iterator[Swap]:
    """Blocks of queries that open the same regions, and how these are scored."""
    for pattern, k, block, score in product(poolings(Fixed(model.span)), (2, 4), BLOCKS, SCORES):
        yield Swap(pattern, Selection(k, block, score))


def parts(model: Model) -> Iterator[Swap]:
    """Opened regions without the others' summaries; regions chosen by another pooling."""
    base = Fixed(model.span)
    for pattern, k in product(poolings(base), (2, 4)):
        yield Swap(pattern, Selection(k, rest=False))
    for k in (2, 4):
        yield Swap(base, Selection(k, pooling="mean"))
        yield Swap(replace(base, pooling="mean"), Selection(k, pooling="max"))


def patterns(model: Model) -> Iterator[Swap]:
    """Every pattern with each pooling, and its sparse baseline."""
    yield Swap(DENSE)
    for pattern in compared(model):
        yield from map(Swap, (*poolings(pattern), pattern.sparse()))


def tuned(model: Model) -> Iterator[Swap]:
    """Patterns with which the model is trained for some more steps; dense attention too, for comparison."""
    yield Swap(DENSE, tuned=TUNED)
    for pattern in (Fixed(model.span), Fixed(model.span, window=model.span), LogSparse(), Window(2 * model.span)):
        for each in (*poolings(pattern), pattern.sparse()):
            yield Swap(each, tuned=TUNED)


def remembered(model: Model) -> Iterator[Swap]:
    """Patterns that keep more or less of the past, each trained for some more steps; dense attention as it is."""
    yield Swap(DENSE)
    kept = [*map(Fixed, KEPT_SPANS), Tree(4), LogSparse(hierarchical=True), *map(Window, (64, 128, 256))]
    yield from (Swap(pattern, tuned=TUNED) for pattern in kept)


def ablation(model: Model) -> Iterator[Swap]:
    """What the parts of a pattern are worth to models that are trained with them.

    As many direct keys as `Fixed` with a window has, and none of the rest; the last position of every other span beside
    them; a summary of every other span. `Fixed` without a window, and its sparse baseline. For text and recall,
    summaries of which each query opens two; for pictures, `Axial`, whose width is theirs.
    """
    span = model.span
    whole = Fixed(span, window=span)
    yield Swap(DENSE)
    yield from (Swap(each, fresh=True) for each in (Window(3 * span // 2), whole.sparse(), whole))
    yield from (Swap(each, fresh=True) for each in (Fixed(span).sparse(), Fixed(span)))
    if isinstance(model.task, Pixels):
        grid = (Axial(span).sparse(), Axial(span), Axial(span, "rowmajor"))
        yield from (Swap(each, fresh=True) for each in grid)
    elif not isinstance(model.task, ListOps):
        yield Swap(whole, Selection(2), fresh=True)


SWEEPS = {
    "opened": opened,
    "spans": spans,
    "windows": windows,
    "blocks": blocks,
    "parts": parts,
    "patterns": patterns,
    "tuned": tuned,
    "remembered": remembered,
    "ablation": ablation,
}
CASES = (  # in this order
    ("recall-512", "opened"),
    ("recall-1024", "opened"),
    ("bytes-1024", "patterns"),
    ("bytes-1024", "tuned"),
)
LONG_CASES = (  # after these
    ("listops-64", "ablation"),
    ("pixels-1024", "ablation"),
    ("bytes-1024", "ablation"),
    ("recall-512", "remembered"),
    ("needle-1024", "opened"),
    ("bytes-unrotated-1024", "ablation"),
    ("bytes-1024", "windows"),
    ("recall-512", "blocks"),
    ("recall-512", "parts"),
    ("recall-1024", "blocks"),
    ("recall-1024", "parts"),
    ("bytes-1024", "blocks"),
    ("recall-512", "spans"),
    ("recall-1024", "spans"),
    ("recall-2048", "opened"),
    ("recall-512", "ablation"),
)
