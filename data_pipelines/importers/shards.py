"""Webdataset shards made by others, such as those of MMaDA and BLIP, under the names that are read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdiff.errors import ConfigError

from ..index import ShardIndex
from ..ranges import shown
from ..reader import TEXT_SUFFIXES, ShardReader
from ..source import open_shards
from .rows import Rows, load, packed

__all__ = ["Shards"]


class Shards(Rows):
    """Samples of shards: one image, its text, JSON and class.

    The text may be a member ``txt``, ``text`` or ``caption``, or stand in a separate file of captions by key, as MMaDA
    keeps recaptioned sets. Members of other suffixes that are read here are kept, all others are dropped.

    Args:
        shards: As `source.open_shards` takes them.
        captions: A JSON file ``{key: caption}``; a caption of it takes the place of the sample's own.

    Raises:
        ConfigError: The captions are of another form, or none of their keys occurs.
        ShardError: The shards cannot be read.
    """

    def __init__(self, shards: str | Path | Sequence[str], captions: Path | None = None) -> None:
        indexes = open_shards(shards)
        self._reader = ShardReader(indexes)
        self._places = [(s, i) for s, index in enumerate(indexes) for i in range(len(index))]
        self._captions = _captions(captions)
        keys = [indexes[s].key(i) for s, i in self._places]
        if self._captions and not any(key in self._captions for key in keys):
            raise ConfigError(f"{captions}: none of its {len(self._captions):,} keys is a key of the shards")
        origin = f"shards {[(len(s), s.size, int(s.crc32.sum())) for s in indexes]} {len(self._captions)}"
        super().__init__(_unique(keys, self._places, indexes), origin)

    def members(self, i: int) -> Mapping[str, bytes]:
        """The members that are read here; errors as `reader.ShardReader.read`'s."""
        sample = self._reader.read(*self._places[i])
        texts = [sample.members[s] for s in TEXT_SUFFIXES if s in sample.members]
        members = {s: data for s, data in sample.members.items() if s not in TEXT_SUFFIXES}
        caption = self._captions.get(sample.key)
        if caption is not None:
            members["json"] = packed({**sample.info(), "caption": caption})
        elif texts:
            members["txt"] = texts[0]
        return members


def _captions(file: Path | None) -> dict[str, str]:
    content = {} if file is None else load(file)
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ConfigError(f"{file}: expected an object {{key: caption}}")
    return content


def _unique(keys: list[str], places: Sequence[tuple[int, int]], shards: Sequence[ShardIndex]) -> list[str]:
    """The keys; with their shard's name in front if some occur in several shards, as in sets that count anew."""
    if len(set(keys)) == len(keys):
        return keys
    stems = [shown(s.url).rpartition("/")[2].removesuffix(".tar") for s in shards]
    if len(set(stems)) < len(stems):
        stems = [f"{number:05d}-{stem}" for number, stem in enumerate(stems)]
    return [f"{stems[s]}/{key}" for key, (s, _) in zip(keys, places, strict=True)]
