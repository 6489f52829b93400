"""Multiple choice: options lettered from A, and the letter that a prediction means."""

from __future__ import annotations

import re
from collections.abc import Sequence

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ARTICLE_FROM = 6  # words: from this length on, an "A" or "I" on its own is read as English


def lettered(options: Sequence[str]) -> str:
    r"""The options, one a line.

    >>> lettered(["a cat", "a dog"])
    'A. a cat\nB. a dog'
    """
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ALPHABET, options, strict=False))


def chosen(prediction: str, options: Sequence[str]) -> str | None:
    """The letter a prediction chooses, None if it names no option or more than one.

    In this order: a letter alone; a letter in front, "B. a dog" or "(B)"; "the answer is B"; the one letter that
    stands as a word of its own; the one option whose text occurs.

    >>> chosen("The answer is (B).", ["cat", "dog"]), chosen("a dog", ["cat", "dog"]), chosen("A or B", ["cat", "dog"])
    ('B', 'B', None)
    """
    letters = ALPHABET[: len(options)]
    text = prediction.strip()
    alone = re.fullmatch(r"\W*([A-Za-z])\W*", text)
    if alone:
        return _known(alone.group(1).upper(), letters)
    for pattern in (
        r"\(?([A-Z])[).:](?=\s|$|\w)",
        r"(?:.*\W)?(?i:answer|option|choice)(?i:\s+is|\s*:)?\s*\(?([A-Z])\b.*",
    ):
        found = re.match(pattern, text, re.DOTALL)
        if found and found.group(1) in letters:
            return found.group(1)
    words = re.findall(r"\w+", text)
    named = {word for word in words if len(word) == 1 and word in letters}
    if len(words) >= _ARTICLE_FROM:
        named -= {"A", "I"}
    if named:
        return named.pop() if len(named) == 1 else None
    spoken = [letter for letter, option in zip(letters, options, strict=True) if _occurs(option, text)]
    return spoken[0] if len(spoken) == 1 else None


def _known(letter: str, letters: str) -> str | None:
    return letter if letter in letters else None


def _occurs(option: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(option.strip().lower())}(?!\w)", text.lower()) is not None
