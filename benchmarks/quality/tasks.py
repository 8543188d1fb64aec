# SPDX-License-Identifier: Apache-2.0
"""What the models are asked: pairs over a distance, the value of an expression, the next byte, the next pixel.

A task makes batches of B sequences of L tokens, and says at which positions an answer is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from combiner.cli.demo import Text, read_text, windows

IGNORED = -100  # the class that PyTorch's cross entropy leaves out: no answer is wanted
HELD_OUT_SEED = 1 << 20  # training seeds are small numbers

Integers = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Tokens and the answers wanted after reading each of them: int64 `[B, L]`, IGNORED where none is wanted."""

    tokens: Tensor
    answers: Tensor


class Task(Protocol):
    """A source of batches."""

    measure: ClassVar[str]
    """What a model is judged by: "recall" or "accuracy", both the share of right answers, or "bits per ..."."""

    @property
    def vocabulary(self) -> int:
        """Tokens and answers are below this number."""
        ...

    def batch(self, rng: np.random.Generator, count: int, length: int) -> Batch:
        """`count` sequences to train on."""
        ...

    def held_out(self, count: int, length: int) -> Batch:
        """`count` sequences to judge by, the same in every call."""
        ...


@dataclass(frozen=True)
class Recall:
    """Recall of pairs that are spread over the first half of the sequence.

    A pair is a key and the value behind it, at a random even position of the first half. Each key comes once more at a
    random position of the second half, where its value is the answer. All other tokens are noise, from a vocabulary of
    their own. So nothing near a question helps to answer it. This is the multi-query associative recall of Arora et al.
    (2023, arXiv 2312.04927) with pairs that lie apart from each other; with one pair it is the search for a needle.
    Each key is asked for `asked` times.
    """

    measure: ClassVar[str] = "recall"
    pairs: int
    asked: int = 1
    keys: int = 64
    values: int = 64
    noise: int = 64

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values + self.noise

    def batch(self, rng: np.random.Generator, count: int, length: int) -> Batch:
        def distinct(below: int, number: int = self.pairs) -> Integers:
            """`number` different numbers for each sequence."""
            return rng.permuted(np.tile(np.arange(below), (count, 1)), axis=1)[:, :number]

        half = length // 2
        tokens = rng.integers(self.keys + self.values, self.vocabulary, (count, length))
        answers = np.full((count, length), IGNORED)
        keys, values = distinct(self.keys), self.keys + rng.integers(0, self.values, (count, self.pairs))
        places, questions = 2 * distinct(half // 2), half + distinct(length - half, self.pairs * self.asked)
        for where, what in ((places, keys), (places + 1, values), (questions, np.tile(keys, self.asked))):
            np.put_along_axis(tokens, where, what, axis=1)
        np.put_along_axis(answers, questions, np.tile(values, self.asked), axis=1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answers))

    def held_out(self, count: int, length: int) -> Batch:
        return self.batch(np.random.default_rng(HELD_OUT_SEED), count, length)


def _median(digits: list[int]) -> int:
    ordered, middle = sorted(digits), (len(digits) - 1) / 2
    return (ordered[math.floor(middle)] + ordered[math.ceil(middle)]) // 2


OPERATORS: tuple[Callable[[list[int]], int], ...] = (min, max, _median, lambda digits: sum(digits) % 10)
FIRST_OPERATOR, CLOSE, PADDING, START = 10, 14, 15, 16  # tokens; those before the first operator are the digits


@dataclass(frozen=True)
class ListOps:
    """The value of a nested expression, as in Long Range Arena (Tay et al., 2020, arXiv 2011.04006), but shorter.

    `[MAX 3 [MIN 5 2] 7]` is 7. An operator takes 2 to `arguments` digits or expressions, and gives a digit: the
    minimum, the maximum, the median rounded down, or the sum modulo 10. An operator and its opening bracket are one
    token. Two arguments of three are expressions, and expressions are nested `depth` deep. A token marks the start. An
    expression fills at least half of its sequence; the rest is padding behind it. In training the value is wanted after
    each closing bracket, and that of the whole expression after each padding too, which teaches it sooner. The score
    counts the whole expression's last bracket alone.
    """

    measure: ClassVar[str] = "accuracy"
    depth: int = 2
    arguments: int = 6
    vocabulary: int = 17

    def batch(self, rng: np.random.Generator, count: int, length: int) -> Batch:
        random = Random(int(rng.integers(2**63)))
        tokens = np.full((count, length), PADDING)
        answers = np.full((count, length), IGNORED)
        for row in range(count):
            made: list[int] = []
            while not length // 2 < len(made) < length:
                made, values = self._expression(random, self.depth)
            end = len(made) + 1
            tokens[row, 0], tokens[row, 1:end] = START, made
            answers[row, 1:end], answers[row, end:] = values, values[-1]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answers))

    def held_out(self, count: int, length: int) -> Batch:
        tokens, answers = self.batch(np.random.default_rng(HELD_OUT_SEED), count, length)
        last = (tokens != PADDING).sum(dim=1, keepdim=True) - 1
        return Batch(tokens, torch.full_like(answers, IGNORED).scatter(1, last, answers.gather(1, last)))

    def guessed(self, count: int, length: int) -> float:
        """The accuracy, on the held-out expressions, of naming the most frequent value of the outermost operator."""
        tokens, answers = self.held_out(count, length)
        values, operators = answers[answers != IGNORED], tokens[:, 1]
        right = (values[operators == each].bincount().max() for each in operators.unique())
        return float(sum(right) / count)

    def _expression(self, random: Random, depth: int) -> tuple[list[int], list[int]]:
        """The tokens of an expression, and the answers wanted after each of them."""
        operator = random.randrange(len(OPERATORS))
        tokens, answers, arguments = [FIRST_OPERATOR + operator], [IGNORED], []
        for _ in range(random.randint(2, self.arguments)):
            if depth > 1 and random.random() < 2 / 3:
                inner, values = self._expression(random, depth - 1)
                arguments.append(values[-1])
            else:
                inner, values = [random.randrange(10)], [IGNORED]
                arguments += inner
            tokens += inner
            answers += values
        return [*tokens, CLOSE], [*answers, OPERATORS[operator](arguments)]


@dataclass(frozen=True)
class Bytes:
    """The next byte of the Python standard library's top-level modules. Every tenth file is held out."""

    measure: ClassVar[str] = "bits per byte"
    vocabulary: int = 256

    def batch(self, rng: np.random.Generator, count: int, length: int) -> Batch:
        text = _text().train
        return Batch(*map(torch.from_numpy, windows(text, rng.integers(0, len(text) - length, count), length)))

    def held_out(self, count: int, length: int) -> Batch:
        text = _text().held_out
        starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
        return Batch(*map(torch.from_numpy, windows(text, starts, length)))


@dataclass(frozen=True)
class Pixels:
    """The next pixel of square patches of a photograph, row by row, in 32 shades of grey. L is a square.

    The photograph is Grace Hopper's, which matplotlib brings along. Of its strips of 32 rows, every fourth is held out:
    no patch that is trained on meets it.
    """

    measure: ClassVar[str] = "bits per pixel"
    vocabulary: int = 32

    def batch(self, rng: np.random.Generator, count: int, length: int) -> Batch:
        return self._patches(rng, count, math.isqrt(length), held_out=False)

    def held_out(self, count: int, length: int) -> Batch:
        return self._patches(np.random.default_rng(HELD_OUT_SEED), count, math.isqrt(length), held_out=True)

    def _patches(self, rng: np.random.Generator, count: int, side: int, held_out: bool) -> Batch:
        """`count` patches of side x side pixels, at random places of the rows that are held out, or of the others."""
        picture = _photograph() * self.vocabulary // 256
        height, width = picture.shape
        usable = (np.arange(height) // 32 % 4 == 3) == held_out
        tops = [top for top in range(height - side + 1) if usable[top : top + side].all()]
        top, left = rng.choice(tops, count), rng.integers(0, width - side + 1, count)
        rows, columns = top[:, None] + np.arange(side), left[:, None] + np.arange(side)
        tokens = picture[rows[:, :, None], columns[:, None]].reshape(count, -1)
        answers = np.full_like(tokens, IGNORED)
        answers[:, :-1] = tokens[:, 1:]
        return Batch(torch.from_numpy(tokens), torch.from_numpy(answers))


@lru_cache
def _text() -> Text:
    return read_text()


@lru_cache
def _photograph() -> Integers:
    """Shades of grey from 0 to 255, `[height, width]`."""
    from matplotlib.cbook import get_sample_data
    from matplotlib.image import imread

    pixels = imread(get_sample_data("grace_hopper.jpg", asfileobj=False))
    return np.asarray(pixels.mean(axis=2), np.int64)
