"""Words of a caption as the COCO tool has them: a Penn-Treebank tokeniser in plain Python.

The tool runs a Java program and then drops punctuation. The rules here were found by asking that program about every
word up to three letters, a dictionary, and the marks a caption may hold; they cover captions. Web addresses, smileys
and mathematics are not chased to the end.
"""

from __future__ import annotations

import re

__all__ = ["tokenise"]

_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
"""In the Java program, all but the first shift every later caption by one line, silently; here they are blanks."""

_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u0091\u0092\u2039\u203a", "'"),
        **dict.fromkeys("\u201c\u201d\u0093\u0094\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2013\u2014\u0096\u0097", " -- "),
        "\u2026": " ... ",
        "\u00a0": " ",
        "\u20ac": "$",
        "\u00a3": "#",
        "\u00a2": " cents ",
        "\u00bd": " 1/2 ",
        "\u00bc": " 1/4 ",
        "\u00be": " 3/4 ",
        "\u00ad": "",
    }
)
_GONE = re.compile("[\U00010000-\U0010ffff\ufe00-\ufe0f\u200d]")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])

# Abbreviations keep their full stop: in any case, only with a capital, only before a number.
_ALWAYS = """adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd bros calif capt cf cie cmdr co
col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov hon inc ind
intl jan jos jr jul jun kan kans ky lt ltd maj mar md mfg mich minn mme mo mon mont mr mrs ms mt mtg natl neb nev nov
oct okla penn pfc ph plc pres prof profs pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste
supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wm wyo""".split()
_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash ARK AZ DEL ILL LA MASS MISS ORE PA TEX WASH".split()
_NUMBERED = "art ca fig figs no nos op pp prop".split()
# Before these words a single letter's full stop ends a sentence.
_STARTS = """A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More
Now Once One Other Our She Since So Some Such That The Their Then There These They This We What When
While Yet You""".split()

_L, _W = r"[^\W\d_]", r"[^\W_]"
_CONTRACTED = r"s|m|d|re|ve|ll"
_TOKEN = re.compile(
    "|".join(
        (
            r"(?:https?|ftp)://\S+|www\.\S+\w",
            rf"{_W}[\w.+-]*@(?:{_W}+\.)*{_W}+",
            r"</?[A-Za-z!][^<>\s]*>",
            rf"[@#]{_L}\w*",
            rf"(?<![\w'])(?i:{'|'.join(_ALWAYS)})\.(?!{_L})",
            rf"(?<![\w'])(?i:{'|'.join(_NUMBERED)})\.(?=\s*\d)",
            rf"(?<![\w'])(?:{'|'.join(_CAPITAL)})\.(?!{_W})",
            r"(?<![\w'])(?i:ph\.d)\.?(?!\w)",
            rf"(?<![\w'.]){_L}(?=\.\s+(?:{'|'.join(_STARTS)})(?!\S))",
            rf"(?<![\w'])(?:{_L}\.)+{_L}(?![\w.'])",
            rf"(?<![\w'])(?:{_L}\.)+(?!\w)",
            r"(?<!\w)\d{1,2}:\d\d(?![\d:/])",
            r"(?<![\w.,/-])\d{1,4}[ \u00a0]\d{1,4}/\d{1,4}(?!\w)",  # 1 1/2
            r"(?<![\w-])[-+]?(?:\d+(?:[.,/:-]\d+)+|\.\d+)(?!\w)",
            r"(?<![\w-])[-+]\d+(?!\w)",
            r"(?<!\w)'(?:\d\ds?|em|til|cause)(?!\w)",
            r"(?<!\w)'[tT](?=(?i:is|was)\b)|'[nN]'?(?!\w)",
            r"(?<!\w)[A-Z]{1,2}&[A-Z]",
            rf"(?:(?<=\.)|(?<!\S))'(?i:{_CONTRACTED})(?!\w)|(?<!\S)[nN]'[tT](?!\w)",
            rf"{_W}+(?:(?:[-/_']|(?<={_L})[.?!](?={_L})){_W}+)*",
            r"\.(?:\s?\.)+",
            r"-+|[?!]+|\*+|_+",
            r"[:;=]-?[()DP]",
            r"\S",
        )
    )
)
"""What is one token, the first rule first: addresses, markup, abbreviations, initials, times, numbers, words, marks."""

_WHOLE = re.compile(
    rf"o'clock|ma'am|ne'er|e'er|o'er|s'mores|[cC]'mon|[dl]'{_L}+|o'{_L}{{2,}}|c'{_L}+|qu'{_L}+|j'{_L}+", re.IGNORECASE
)
_ENDING = re.compile(rf"(.+?)(n't|'(?:{_CONTRACTED}))", re.IGNORECASE)
_HALVES = {"cannot": 3, "gonna": 3, "wanna": 3, "gotta": 3, "gimme": 3, "lemme": 3}


def tokenise(text: str) -> list[str]:
    """Lower-case tokens of a caption, without punctuation.

    Contractions are split (do n't, dog 's), abbreviations keep their full stop, brackets become ``-lrb-`` and stay,
    marks in a row such as ``!!!`` stay, words with hyphens are one token.

    Source: behaviour of Stanford's PTBTokenizer 3.4.1 and pycocoevalcap 1.2 around it.
    """
    text = _LINE_BREAKS.sub(" ", text)
    for entity, mark in _ENTITIES.items():
        text = text.replace(entity, mark)
    text = _GONE.sub("", text.translate(_SAME))
    parts = [part for token in _TOKEN.findall(text) for part in _parts(token)]
    return [_BRACKETS.get(p, p.lower()) for p in parts if p not in _DROPPED and not re.fullmatch(r"-+|\.[.\s]+", p)]


def _parts(token: str) -> list[str]:
    """A word in its parts: contractions, and halves such as gon na."""
    if " " in token and token[0].isdigit():
        return [token.replace(" ", "\u00a0")]  # one token, with a blank that does not break
    if cut := _HALVES.get(token.lower()):
        return [token[:cut], token[cut:]]
    if token[0] in ":;=" and token[-1] in _BRACKETS:
        return [token[:-1] + _BRACKETS[token[-1]]]
    if "'" not in token or not token[0].isalnum() or token.lower() == "n't":
        return [token]
    return _contraction(token)


def _contraction(word: str) -> list[str]:
    if _WHOLE.fullmatch(word):
        return [word]
    if found := _ENDING.fullmatch(word):
        return [*_contraction(found[1]), found[2]]
    if found := re.fullmatch(rf"([yY]')({_L}+)", word):
        return [found[1], found[2]]
    if found := re.fullmatch(r"(\w+)('n'?)(\w*)", word):
        return [part for part in found.groups() if part]
    return [part for part in word.split("'") if part]
