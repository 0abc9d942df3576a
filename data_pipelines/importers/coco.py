"""COCO's captions and the VQA questions about its images: a sample per image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .rows import Rows, inside, load, packed, pictures

__all__ = ["CocoCaptions", "CocoQuestions"]


class CocoCaptions(Rows):
    """``captions_*.json``: ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``.

    The first caption of an image is its ``caption``, all of them are its ``captions``; images without one are left out.

    Args:
        file: The annotations.
        images: Folder of the images.

    Raises:
        ConfigError: Not of that form, or an image's name leads out of the folder.
    """

    def __init__(self, file: Path, images: Path) -> None:
        tree = _tree(file, "images", "annotations")
        captions: dict[Any, list[str]] = {}
        for entry in _entries(tree["annotations"], file, "image_id", "caption"):
            captions.setdefault(entry["image_id"], []).append(str(entry["caption"]).strip())
        found = [e for e in _entries(tree["images"], file, "id", "file_name") if e["id"] in captions]
        if not found:
            raise ConfigError(f"{file}: no image has a caption")
        self._folder, self._file = images, file
        self._images = [(str(e["file_name"]), e["id"], captions[e["id"]]) for e in found]
        super().__init__(_keys(file, [name for name, *_ in self._images], images), f"coco {file.stat().st_size}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The image and its captions; errors as in `Rows`."""
        name, number, captions = self._images[i]
        info = {"caption": captions[0], "captions": captions, "image_id": number}
        return {**pictures([inside(self._folder, name, str(self._file))]), "json": packed(info)}


class CocoQuestions(Rows):
    """The VQA files: ``{"questions": [{"question_id", "image_id", "question"}]}`` and their annotations.

    An image's questions are its ``qa``, each with the most common answer and the type of the answer as its kind; where
    there are several answers they are kept as ``answers``, by question.

    Args:
        file: The questions.
        answers: The annotations: ``{"annotations": [{"question_id", "multiple_choice_answer", "answers"}]}``.
        images: Folder of the images, named as COCO names them (``COCO_train2014_000000000009.jpg``, or the number).

    Raises:
        ConfigError: Not of that form, or a question without an answer.
    """

    def __init__(self, file: Path, answers: Path, images: Path) -> None:
        asked = _tree(file, "questions")
        told = {e["question_id"]: e for e in _entries(_tree(answers, "annotations")["annotations"], answers)}
        self._subset = str(asked.get("data_subtype", ""))
        found: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        for entry in _entries(asked["questions"], file, "question_id", "image_id", "question"):
            if entry["question_id"] not in told:
                raise ConfigError(f"{answers}: no answer to question {entry['question_id']} of {file}")
            found.setdefault(int(entry["image_id"]), []).append((entry, told[entry["question_id"]]))
        self._folder, self._file, self._images = images, file, sorted(found.items())
        size = file.stat().st_size + answers.stat().st_size
        super().__init__([f"{n:012d}" for n, _ in self._images], f"vqa {size}")

    def members(self, i: int) -> Mapping[str, bytes]:
        """The image, its questions and answers; errors as in `Rows`."""
        number, pairs = self._images[i]
        info = {
            "qa": [[q["question"], _answer(a), str(a.get("answer_type", ""))] for q, a in pairs],
            "answers": [[str(e.get("answer", "")) for e in a.get("answers", [])] for _, a in pairs],
            "question_ids": [q["question_id"] for q, _ in pairs],
            "image_id": number,
        }
        return {**pictures([self._image(number)]), "json": packed(info)}

    def _image(self, number: int) -> Path:
        names = [f"COCO_{self._subset}_{number:012d}.jpg", f"{number:012d}.jpg", f"{number}.jpg"]
        paths = [inside(self._folder, name, str(self._file)) for name in names]
        return next((path for path in paths if path.is_file()), paths[0])


def _answer(annotation: dict[str, Any]) -> str:
    if isinstance(annotation.get("multiple_choice_answer"), str):
        return annotation["multiple_choice_answer"]
    given = [str(e.get("answer", "")) for e in annotation.get("answers", [])]
    # Of equally common answers the first one in the alphabet, whatever their order in the file.
    return max(sorted(set(given)), key=given.count, default="")


def _tree(file: Path, *lists: str) -> dict[str, Any]:
    tree = load(file)
    for name in lists:
        if not isinstance(tree, dict) or not isinstance(tree.get(name), list):
            raise ConfigError(f"{file}: expected an object with a list {name!r}")
    return tree


def _entries(entries: list[Any], file: Path, *fields: str) -> list[dict[str, Any]]:
    for number, entry in enumerate(entries):
        missing = [f for f in fields or ("question_id",) if not isinstance(entry, dict) or f not in entry]
        if missing:
            raise ConfigError(f"{file}: entry {number} has no {', '.join(missing)}")
    return entries


def _keys(file: Path, names: list[str], images: Path) -> list[str]:
    for name in names:
        inside(images, name, str(file))
    return [name.rpartition(".")[0] for name in names]
