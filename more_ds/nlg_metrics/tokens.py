"""The tokenisations of the official scripts: COCO's (E2E), and that of WebNLG and DART."""

from __future__ import annotations

import re
import unicodedata

_CLITIC = r"'(?:s|re|ve|ll|d|m)\b"
_COCO = re.compile(
    rf"""
    (?:[^\W\d_]\.){{2,}}                                                            # u.s.
  | \b(?:[^\W\d_]|mr|mrs|ms|dr|st|jr|sr|inc|co|ltd|corp|no|vs|mt|ft)\.(?!\s*$)      # dr. j. smith
  | n't\b | {_CLITIC}                                                               # do n't, it 's
  | (?<!\S)[-+]\d[\w.,/-]*\w                                                        # -3.5
  | \d+\.\d+(?=[^\W\d_])                                                            # 8.3 m
  | \w+?(?=n't\b)
  | \w+(?:(?:(?!{_CLITIC})[-/.&']|(?<=\d),(?=\d))\w+)*                              # family-friendly, 20,000
  | --+ | \.\.\. | \S
    """,
    re.VERBOSE,
)
_SPACED = str.maketrans(
    {"’": "'", "‘": "`", "“": " ", "”": " ", '"': " ", "–": " -- ", "—": " -- ", "£": " # ", "(": " ( ", ")": " ) "}
)
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_WITHOUT_ACCENT = str.maketrans(
    {"–": "-", "—": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "ł": "l", "ø": "o", "đ": "d"}
    | {"ı": "i", "æ": "ae", "œ": "oe", "ß": "ss", "ə": "@", "£": "ps", "€": "eur"}
)


def coco(text: str) -> list[str]:
    """Lower case, Penn Treebank tokens, without punctuation, as the COCO caption scorers see a text.

    The official tokeniser is Stanford's, in Java. On the references of E2E this one differs from it in 1 text of 1000
    (of WebNLG: in 3 of 100).
    """
    spaced = re.sub(r"\bcan(?=not\b)", "can ", text.lower().translate(_SPACED))
    return [token for token in _COCO.findall(spaced) if token not in _DROPPED]


def words(text: str) -> list[str]:
    """Lower case, ASCII, every character but letters, digits and `_` a token: `evaluation.py` of WebNLG 2017.

    Tokens joined with blanks give the same tokens again, so a file that was tokenised in this way scores as it is.
    """
    folded = unicodedata.normalize("NFKD", text.lower().translate(_WITHOUT_ACCENT))
    ascii_only = folded.encode("ascii", "ignore").decode("ascii").lower()
    return re.findall(r"\w+|[^\w\s]", ascii_only)
