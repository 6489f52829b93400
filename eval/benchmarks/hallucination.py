"""CHAIR (Rohrbach et al., 2018): objects that a caption mentions and its image does not have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from vprune.errors import VPruneError
from vprune.eval.benchmarks.rows import read_text

_IRREGULAR = {"people": "person", "children": "child", "mice": "mouse", "geese": "goose", "oxen": "ox"}
_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("es", ""), ("s", ""))
# Compounds that the metric reads as one word, so that no part of them counts: a train track is no train.
_COMPOUNDS = """
    air plane, baseball bat, baseball glove, cell phone, fire hydrant, hair drier, home plate, hot dog, laptop computer,
    mobile phone, motor bike, motor cycle, parking meter, potted plant, sports ball, stop light, stop sign, suit case,
    street light, teddy bear, tennis racket, traffic light, traffic signal, train track, wine glass
"""
# ... and those that mean their second word: a baby elephant is an elephant and no person.
_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
_QUALIFIED = {"baby": _ANIMALS, "adult": _ANIMALS, "passenger": ["jet", "train"]}
_ALIAS = {"bow tie": "tie", "toilet seat": "toilet"}


class ObjectWords:
    """The words for objects, from the published `synonyms.txt`: a line an object, its name first, then synonyms.

    A word in two lines stands for the later object, as in the published metric. Raises VPruneError for a file without
    words.
    """

    def __init__(self, path: Path) -> None:
        self._object_of: dict[str, str] = {}
        for line in read_text(path).splitlines():
            words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
            self._object_of |= dict.fromkeys(words, words[0] if words else "")
        if not self._object_of:
            raise VPruneError(f"{path} holds no words; it should have a line an object: person, girl, boy, man")
        listed = {" ".join(phrase.split()) for phrase in _COMPOUNDS.split(",")}
        self._phrases = listed | {word for word in self._object_of if " " in word}
        self._longest = max(len(phrase.split()) for phrase in self._phrases)

    def object_of(self, word: str) -> str | None:
        """The object that a word or phrase stands for, in the singular or the plural."""
        singular = _singular(word, self._object_of)
        return self._object_of.get(_ALIAS.get(singular, singular))

    def mentioned(self, caption: str) -> list[str]:
        """The objects a caption mentions, in its order and as often as it does."""
        found = (self.object_of(word) for word in self._words(caption))
        return [name for name in found if name is not None]

    def _words(self, caption: str) -> Iterator[str]:
        """Words and compounds; the longest compound at a place wins."""
        words = re.findall(r"[a-z]+", caption.lower().replace("'s", ""))
        place = 0
        while place < len(words):
            length = self._compound(words[place:])
            phrase = words[place : place + length]
            qualified = length == 2 and phrase[0] in _QUALIFIED
            yield phrase[1] if qualified else " ".join(phrase)
            place += length

    def _compound(self, words: list[str]) -> int:
        """How many of the next words belong together."""
        for length in range(min(self._longest, len(words)), 1, -1):
            phrase = " ".join(words[:length])
            if _singular(phrase, self._phrases) in self._phrases or _singular(phrase, _ALIAS) in _ALIAS:
                return length
        if len(words) > 1 and words[0] in _QUALIFIED:
            kinds = _QUALIFIED[words[0]]
            return 2 if _singular(words[1], kinds) in kinds else 1
        return 1


def chair(captions: Iterable[tuple[list[str], set[str]]]) -> dict[str, float]:
    """CHAIR-i, CHAIR-s and recall, from the objects each caption mentions and those its image has.

    `chair_i = hallucinated mentions / mentions`, `chair_s = captions with one / captions`,
    `recall = objects mentioned / objects there`; 0.0 of nothing.
    """
    counts = [
        (len(mentions), sum(name not in there for name in mentions), len(there & set(mentions)), len(there))
        for mentions, there in captions
    ]
    mentions, wrong, named, there = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0, 0)
    return {
        "chair_i": wrong / mentions if mentions else 0.0,
        "chair_s": sum(one[1] > 0 for one in counts) / len(counts) if counts else 0.0,
        "object_recall": named / there if there else 0.0,
    }


def _singular(word: str, known: Iterable[str]) -> str:
    """The form of a word or phrase that is among `known`; the word itself if none is."""
    known = known if isinstance(known, set | dict | list) else set(known)
    if word in known:
        return word
    *before, last = word.split()
    forms = [_IRREGULAR.get(last, last)]
    forms += [last.removesuffix(plural) + single for plural, single in _ENDINGS if last.endswith(plural)]
    return next((" ".join([*before, form]) for form in forms if " ".join([*before, form]) in known), word)
