"""Names and phrases: which are said in a text, and where their tokens stand in a prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vprune.errors import VPruneError

_STOP = (
    "a an the of on in at to with and or is are was that this there it its their his her from by for as which what "
    "where . , ; : ? !"
)
STOP_WORDS = frozenset(_STOP.split())
"""Words and signs whose attention falls anywhere (RefAM, arXiv 2509.22650): their rows are left out."""
_ARTICLE = re.compile(r"^(?:(?:a|an|the|some|one|several)(?:\s+|$))+", re.IGNORECASE)
_BETWEEN = re.compile(r"[,;\n]|\band\b|(?<=[a-z])\.(?:\s|$)", re.IGNORECASE)
_BULLET = re.compile(r"^[\s\-*•]*(?:\d+[.)]\s*)?")
_LONGEST = 6
_SMALL_VOCABULARY = 500  # tokens; of a larger one the words are not listed


def names_in(answer: str) -> list[str]:
    r"""The object names of a model's listing, in order; a name said twice is there twice.

    Example:
        >>> names_in("1. A red circle\n2. the dog and a cat.")
        ['red circle', 'dog', 'cat']
    """
    names = []
    for part in _BETWEEN.split(answer):
        name = plain(_BULLET.sub("", part))
        if name and len(name.split()) <= _LONGEST and name.lower() not in STOP_WORDS | {"none", "nothing"}:
            names.append(name)
    return names


def plain(name: str) -> str:
    """A name without article and without signs around it."""
    return _ARTICLE.sub("", name.strip(" \t\n.,;:!?\"'()[]*")).strip()


@dataclass(frozen=True)
class TokenText:
    """The text of a prompt behind its last image, and which token each of its letters comes from.

    `letters` is lower case and without blanks, `owner[i]` the place in the prompt of the token that ends letter i.
    """

    letters: str
    owner: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], start: int) -> TokenText:
        """Read the tokens from place `start` on."""
        letters, owner = "", []
        for place in range(start, len(ids)):
            text = _squeezed(tokenizer.decode(ids[start : place + 1], skip_special_tokens=True))
            # A letter of several tokens shows as a sign of doubt until the last of them.
            text = text.rstrip("�")
            if text.startswith(letters):
                owner += [place] * (len(text) - len(letters))
                letters = text
        return cls(letters, tuple(owner))

    def find(self, phrase: str, after: int = 0, last: bool = False) -> tuple[list[int], int] | None:
        """The places of the tokens of `phrase`, from letter `after` on, and the letter behind it; None: not there."""
        wanted = _squeezed(phrase)
        at = self.letters.rfind(wanted) if last else self.letters.find(wanted, after)
        if not wanted or at < 0:
            return None
        places = list(dict.fromkeys(self.owner[at : at + len(wanted)]))
        return places, at + len(wanted)

    def content(self, phrase: str, places: Sequence[int]) -> list[int]:
        """The places of `phrase` that carry meaning: no stop words, unless there is nothing else."""
        kept: list[int] = []
        at = self.letters.rfind(_squeezed(phrase))
        for word in re.findall(r"\w+|[^\w\s]", phrase.lower()):
            end = at + len(word)
            if word not in STOP_WORDS:
                kept += [place for place in dict.fromkeys(self.owner[at:end]) if place in places]
            at = end
        return list(dict.fromkeys(kept)) or list(places)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def refuse_unsayable(phrase: str, tokenizer: Any) -> None:
    """Refuse a phrase before any picture is looked at.

    Raises:
        VPruneError: it names nothing, or holds words that the tokenizer does not know.
    """
    if not plain(phrase):
        raise VPruneError(f"phrase={phrase!r} names nothing")
    unknown = tokenizer.unk_token_id
    words = [word for word in plain(phrase).split() if unknown in tokenizer(word, add_special_tokens=False).input_ids]
    if unknown is not None and words:
        vocabulary = tokenizer.get_vocab()
        told = sorted(word for word in vocabulary if word.isalpha() and word not in STOP_WORDS)
        known = f" (it knows {', '.join(told)})" if len(vocabulary) <= _SMALL_VOCABULARY else ""
        raise VPruneError(
            f"phrase={phrase!r}: the model's tokenizer does not know {', '.join(map(repr, words))}{known}; say it in "
            "other words, or give a model that knows them with model="
        )


def unaligned(phrase: str) -> VPruneError:
    """The error for a phrase whose tokens cannot be found in the prompt."""
    return VPruneError(
        f"phrase={phrase!r} cannot be found in what the model's tokenizer makes of the prompt: "
        "its letters may be unknown to it; say it in other words"
    )
