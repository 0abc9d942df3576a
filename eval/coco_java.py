"""The COCO tool's Java programs, where they are: its tokeniser, and METEOR, which exists nowhere else.

The package pycocoevalcap carries the archives; its Python code is not run.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmdiff.errors import ConfigError, MissingExtraError

__all__ = ["meteor", "tokenise"]

_TOKENISER = "tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "meteor/meteor-1.5.jar"
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
_DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())


def tokenise(texts: Sequence[str]) -> list[str]:
    """Tokens of each caption, single spaces between them, by Stanford's PTBTokenizer.

    Raises:
        MissingExtraError: Java or pycocoevalcap is not there.
    """
    if not texts:
        return []
    java, archive = _program(_TOKENISER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("".join(_LINE_BREAKS.sub(" ", t) + "\n" for t in texts), encoding="utf-8")
        words = [java, "-Dfile.encoding=UTF-8", "-cp", str(archive), "edu.stanford.nlp.process.PTBTokenizer"]
        lines = _run([*words, "-preserveLines", "-lowerCase", str(path)], "").split("\n")
    if len(lines) < len(texts):
        raise ConfigError(f"the Java tokeniser gave {len(lines)} lines for {len(texts)} captions")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in _DROPPED) for line in lines[: len(texts)]]


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, tuple[float, ...]]:
    """METEOR 1.5 of tokenised captions, for the set and for each image.

    Raises:
        MissingExtraError: Java or pycocoevalcap is not there.
        ConfigError: The program answered something else.
    """
    java, archive = _program(_METEOR)
    clean = [_field(caption) for caption in captions]
    truths = [" ||| ".join(_field(r) for r in rs) for rs in references]
    asked = [f"SCORE ||| {rs} ||| {caption}" for rs, caption in zip(truths, clean, strict=True)]
    words = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(archive), "-", "-", "-stdio", "-l", "en", "-norm"]
    found = _run(words, "\n".join(asked) + "\n").split("\n")[: len(asked)]
    said = _run(words, " ||| ".join(["EVAL", *found]) + "\n").split()
    if len(said) != len(asked) + 1:
        raise ConfigError(f"METEOR gave {len(said)} numbers for {len(asked)} images")
    *each, total = map(float, said)
    return total, tuple(each)


def _field(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")


def _program(archive: str) -> tuple[str, Path]:
    java = shutil.which("java")
    if java is None:
        raise ConfigError("METEOR and the protocol coco-java need Java, and there is no program java here")
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / archive).is_file():
            return java, path
    raise MissingExtraError("pycocoevalcap", "coco", "for METEOR and the protocol coco-java")


def _run(words: list[str], text: str) -> str:
    done = subprocess.run(words, input=text, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise ConfigError(f"{Path(words[0]).name} failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return done.stdout
