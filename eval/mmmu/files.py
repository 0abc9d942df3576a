"""The official files: answers, predictions, and the tree of responses by subject, read and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from ..files import no_twins, read_records, write_json
from .scoring import Item, MmmuResult
from .subjects import ORDER

__all__ = ["read_answers", "read_predictions", "read_tree", "response_record", "write_tree"]


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """References of the official answer file: ``{id: {"question_type", "ground_truth"}}``.

    Raises:
        ConfigError: Another file, or an id that occurs twice.
    """
    tree = _object(path)
    wrong = [k for k, v in tree.items() if not isinstance(v, dict) or not {"question_type", "ground_truth"} <= set(v)]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]} has no question_type and ground_truth")
    return [{"id": i, "question_type": v["question_type"], "answer": v["ground_truth"]} for i, v in tree.items()]


def read_predictions(path: str | Path) -> dict[str, str]:
    """Predictions of the official form ``{id: text}``, which is the test server's, too; or records of id and response.

    Raises:
        ConfigError: Another file, or an id that occurs twice.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_twins)
    except ValueError:
        tree = None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if isinstance(tree, dict):
        if wrong := [k for k, v in tree.items() if not isinstance(v, str)]:
            raise ConfigError(f"{path}: {wrong[0]} is no text")
        return tree
    found: dict[str, str] = {}
    for record in read_records(path):
        if not {"id", "response"} <= set(record):
            raise ConfigError(f"{path}: records need id and response; found {list(record)[:8]}")
        if str(record["id"]) in found:
            raise ConfigError(f"{path}: id {record['id']} occurs more than once")
        found[str(record["id"])] = str(record["response"])
    return found


def read_tree(folder: str | Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Responses and references of a tree ``<folder>/<Subject>/output.json``.

    Raises:
        ConfigError: No such tree, or a record that lacks something.
    """
    predictions: dict[str, str] = {}
    references = []
    for subject in ORDER:
        path = Path(folder) / subject / "output.json"
        for record in read_records(path) if path.is_file() else ():
            if missing := {"id", "question_type", "answer", "response"} - set(record):
                raise ConfigError(f"{path}: {record.get('id', 'a record')} has no {sorted(missing)[0]}")
            if record["id"] in predictions:
                raise ConfigError(f"{path}: id {record['id']} occurs more than once")
            predictions[record["id"]] = str(record["response"])
            references.append(_reference(record, subject))
    if not references:
        raise ConfigError(f"{folder}: no SUBJECT/output.json there")
    return predictions, references


def response_record(document: Mapping[str, Any], response: str) -> dict[str, Any]:
    """A document and its response as the official tree holds them."""
    record = {k: document[k] for k in ("id", "question_type", "answer")}
    if document["question_type"] == "multiple-choice":
        options = {chr(ord("A") + i): text for i, text in enumerate(document["options"])}
        record |= {"all_choices": list(options), "index2ans": options}
    return {**record, "response": response}


def write_tree(folder: Path, records: Sequence[Mapping[str, Any]], result: MmmuResult) -> None:
    """Write ``output.json``, ``parsed_output.json`` and ``result.json`` per subject, as the official tool does.

    Args:
        folder: Where to.
        records: From `response_record`.
        result: Their score.
    """
    scored = {item.id: item for item in result.items}
    by_subject: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_subject.setdefault(scored[record["id"]].subject, []).append(record)
    for subject, rows in by_subject.items():
        own = folder / subject
        judged = [scored[row["id"]] for row in rows]
        write_json(own / "output.json", rows)
        write_json(own / "parsed_output.json", [_judged(r, i) for r, i in zip(rows, judged, strict=True)])
        right = sum(item.correct for item in judged)
        write_json(own / "result.json", {"acc": right / len(judged), "num_example": len(judged)})


def _judged(record: Mapping[str, Any], item: Item) -> dict[str, Any]:
    parsed = item.prediction if isinstance(item.prediction, str) else list(item.prediction)
    return {**record, "parsed_pred": parsed, "judge": "Correct" if item.correct else "Wrong"}


def _reference(record: Mapping[str, Any], subject: str) -> dict[str, Any]:
    kept = {k: record[k] for k in ("id", "question_type", "answer")} | {"subject": subject}
    if record["question_type"] == "multiple-choice":
        if not isinstance(record.get("index2ans"), dict):
            raise ConfigError(f"{record['id']}: a multiple choice without index2ans")
        kept["options"] = list(record["index2ans"].values())
    return kept


def _object(path: str | Path) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=no_twins)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as a JSON object ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected one JSON object")
    return tree
