"""The thirty subjects of MMMU in their six disciplines, in the order in which the official tools print them."""

from __future__ import annotations

import re

from mmdiff.errors import ConfigError

__all__ = ["DOMAINS", "ORDER", "SHORT_NAMES", "subject_of", "subjects_of"]

DOMAINS: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""Discipline -> subjects."""

SHORT_NAMES: dict[str, str] = {
    "acc": "Accounting",
    "agri": "Agriculture",
    "arch": "Architecture_and_Engineering",
    "art": "Art",
    "art_theory": "Art_Theory",
    "bas_med": "Basic_Medical_Science",
    "bio": "Biology",
    "chem": "Chemistry",
    "cli_med": "Clinical_Medicine",
    "cs": "Computer_Science",
    "design": "Design",
    "diag_med": "Diagnostics_and_Laboratory_Medicine",
    "econ": "Economics",
    "elec": "Electronics",
    "ep": "Energy_and_Power",
    "fin": "Finance",
    "geo": "Geography",
    "his": "History",
    "liter": "Literature",
    "manage": "Manage",
    "mark": "Marketing",
    "mate": "Materials",
    "math": "Math",
    "mech": "Mechanical_Engineering",
    "music": "Music",
    "phar": "Pharmacy",
    "phys": "Physics",
    "psy": "Psychology",
    "pub_health": "Public_Health",
    "socio": "Sociology",
}
"""The official command line's names, in the order of its ``ALL``: random fallbacks are drawn in this order."""

ORDER = tuple(SHORT_NAMES.values())


def subject_of(identity: str) -> str:
    """Subject in an id such as ``validation_Art_Theory_7``: what stands between the first and the last underscore.

    Raises:
        ConfigError: Not such an id, or no subject of MMMU.
    """
    found = re.fullmatch(r"[^_]+_(.+)_[^_]+", identity)
    if found is None or found[1] not in ORDER:
        raise ConfigError(f"id {identity!r}: expected SPLIT_Subject_NUMBER with one of MMMU's {len(ORDER)} subjects")
    return found[1]


def subjects_of(text: str) -> tuple[str, ...]:
    """Subjects named on a command line: ``ALL``, or short or full names with commas.

    Raises:
        ConfigError: A name is unknown.
    """
    if text == "ALL":
        return ORDER
    named = {SHORT_NAMES.get(word.strip(), word.strip()) for word in text.split(",")}
    if unknown := sorted(named - set(ORDER)):
        raise ConfigError(f"subject {unknown[0]!r}; known: ALL, {', '.join(SHORT_NAMES)}, or the full names")
    return tuple(subject for subject in ORDER if subject in named)
