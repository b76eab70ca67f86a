"""A language to learn: a text that is the same everywhere, of any length, with nothing to download.

The texts that come with Python differ between its versions. The one in this repository that never changes,
its licence, has but 11,000 characters: a network knows them by heart before it learns anything, and what is
held back is too short to compare losses by. So these are sentences of a small grammar, drawn at random: words
of which some are a hundred times as frequent as others, verbs that agree with a subject several words before,
relative clauses within each other, capitals and digits that are rare. What is rare has gradients of zero most
of the time, which is where the storage of a second moment is tried.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

_CONSONANTS = ("t", "n", "s", "r", "l", "d", "m", "k", "p", "b", "v", "g", "f", "z", "st", "tr", "pl", "x")
_VOWELS = ("e", "a", "i", "o", "u", "ai", "ou", "y")
_NOUNS, _VERBS, _ADJECTIVES = 300, 120, 80
_ZIPF = list(accumulate(1 / rank for rank in range(1, _NOUNS + 1)))
_DRAWN_AT_ONCE = 4096


class _Chance:
    """Random choices, the same with every version of NumPy: the bits of a bit generator never change."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)
        self._numbers = self._uniform()

    def _uniform(self) -> Iterator[float]:
        while True:
            yield from ((self._bits.random_raw(_DRAWN_AT_ONCE) >> 11) * 2.0**-53).tolist()

    def happens(self, probability: float) -> bool:
        return next(self._numbers) < probability

    def of(self, choices: Sequence[str]) -> str:
        return choices[int(next(self._numbers) * len(choices))]

    def ranked(self, choices: Sequence[str]) -> str:
        """Return one: the second half as often as the first, the third a third as often, and so on (Zipf)."""
        return choices[bisect(_ZIPF, next(self._numbers) * _ZIPF[len(choices) - 1])]


def _words(chance: _Chance, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = 1 + chance.happens(0.7) + chance.happens(0.3)
        words["".join(chance.ranked(_CONSONANTS) + chance.ranked(_VOWELS) for _ in range(syllables))] = None
    return list(words)


class _Grammar:
    def __init__(self, seed: int) -> None:
        self._chance = chance = _Chance(seed)
        self._nouns, self._verbs, self._adjectives = (
            _words(chance, count) for count in (_NOUNS, _VERBS, _ADJECTIVES)
        )

    def sentence(self) -> str:
        chance = self._chance
        plural = chance.happens(0.4)
        words = [*self._subject(plural), *self._predicate(plural)]
        if chance.happens(0.03):
            words += ["in", "1" + "".join(chance.of("0123456789") for _ in range(3))]
        words[0] = words[0].capitalize()
        return " ".join(words).rstrip(",") + ("?" if chance.happens(0.1) else ".")

    def _subject(self, plural: bool, clauses: float = 0.3) -> list[str]:
        chance = self._chance
        words = [chance.of(("the", "many") if plural else ("the", "a"))]
        while chance.happens(0.25):
            words.append(chance.ranked(self._adjectives))
        words.append(chance.ranked(self._nouns) + ("n" if plural else ""))
        if chance.happens(clauses):
            *clause, last = self._predicate(plural, clauses / 2)
            words += ["that", *clause, last.rstrip(",") + ","]
        return words

    def _predicate(self, plural: bool, clauses: float = 0.1) -> list[str]:
        chance = self._chance
        verb = chance.ranked(self._verbs) + ("" if plural else "s")
        return [verb, *(self._subject(chance.happens(0.4), clauses) if chance.happens(0.7) else [])]


def text(characters: int, seed: int = 0) -> str:
    """Return sentences, cut off after a number of characters; longer texts begin with shorter ones."""
    grammar = _Grammar(seed)
    sentences: list[str] = []
    length = 0
    while length < characters:
        sentences.append(grammar.sentence())
        length += len(sentences[-1]) + 1
    return " ".join(sentences)[:characters]


def encoded(characters: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], str]:
    """Return the number of each character in the alphabet of a text, and that alphabet."""
    alphabet = "".join(sorted(set(characters)))
    numbers = {character: number for number, character in enumerate(alphabet)}
    return np.array([numbers[character] for character in characters]), alphabet
