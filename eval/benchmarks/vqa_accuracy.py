"""VQA accuracy: answers normalised as the official evaluation does, and compared with ten annotators'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")  # a point before a digit belongs to the number
# Written without one of its apostrophes, each of these gets it back: the words of the official evaluation.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def normalise_vqa(answer: str) -> str:
    """An answer as VQA compares it: punctuation, articles and case dropped, number words as digits.

    A punctuation mark next to a blank vanishes, one inside a word becomes a blank; where the answer holds digits
    around a comma, all of them vanish.

    >>> normalise_vqa("The two  cats!"), normalise_vqa("1,000 m."), normalise_vqa("left-handed"), normalise_vqa("Dont")
    ('2 cats', '1000 m', 'left handed', "don't")
    """
    text = " ".join(answer.split())
    cleaned = text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or _THOUSANDS.search(text) else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", cleaned).lower().split())
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


def normalise_textvqa(answer: str) -> str:
    """An answer as TextVQA and VizWiz compare it: commas and question marks dropped first, 's set apart.

    >>> normalise_textvqa("Dunkin's, Donuts")
    "dunkin 's donuts"
    """
    return normalise_vqa(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3).

    As in VQA's official evaluation, texts are compared as they are where all annotators agree to the letter, and
    normalised elsewhere.

    >>> round(vqa_accuracy("yes", ["yes"] * 3 + ["no"] * 7), 2)
    0.9
    """
    plain = [_one_line(answer) for answer in answers]
    if len(set(plain)) == 1:
        return leave_one_out(_one_line(prediction), plain)
    return leave_one_out(normalise_vqa(prediction), [normalise_vqa(answer) for answer in plain])


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreeing others / 3), everything normalised."""
    return leave_one_out(normalise_textvqa(prediction), [normalise_textvqa(answer) for answer in answers])


def leave_one_out(prediction: str, answers: Sequence[str]) -> float:
    """Mean over all ways to leave one answer out of min(1, equal among the rest / 3)."""
    equal = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (equal - (answer == prediction)) / 3) for answer in answers) / len(answers)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@cache
def _contractions() -> dict[str, str]:
    spelled = {}
    for word in _CONTRACTIONS.split():
        for place in (i for i, sign in enumerate(word) if sign == "'"):
            spelled[word[:place] + word[place + 1 :]] = word
    return spelled | {"somebody'd": "somebodyd"}  # the official list has this one the other way round
