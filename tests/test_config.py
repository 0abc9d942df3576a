"""Configurations are read strictly, and every refusal names file, dotted path, value and what was meant."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdiff import config as cfg
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError


@config
class Cosine:
    type: Literal["cosine"] = "cosine"
    warmup: int = 0


@config
class Linear:
    type: Literal["linear"] = "linear"
    warmup: int = 0
    floor: float = 0.0


Schedule = Annotated[Cosine | Linear, Field(discriminator="type")]


@config
class Source:
    shards: tuple[str, ...]
    weight: int = Field(default=1, ge=1)


@config
class Crop:
    side: int = 64
    flip: bool = False


@config
class Run:
    name: str = "run"
    seed: int = 0
    rate: float = Field(default=1e-3, gt=0)
    mode: Literal["train", "check"] = "train"
    schedule: Schedule = Cosine()
    decay: Schedule | None = None
    crop: Crop | None = None
    sources: tuple[Source, ...] = ()
    extra: dict[str, Crop] = Field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)
    folder: Path = Path("out")
    limit: int | str = 0

    def __post_init__(self) -> None:
        if self.seed == 13:
            raise ConfigError("seed 13 is taken")
        if self.seed == 14:
            raise ValueError("seed 14 is taken")


REFUSED = [
    # unknown keys, at every kind of place
    ("sede: 1", ["unknown key 'sede'", "did you mean 'seed'?"]),
    ("Seed: 1", ["unknown key 'Seed'", "did you mean 'seed'?"]),
    ("zzzzzzzzz: 1", ["unknown key 'zzzzzzzzz'", "known keys: 'betas', 'crop'"]),
    ("schedule: {type: linear, wormup: 1}", ["unknown key 'schedule.wormup'", "did you mean 'warmup'?"]),
    ("schedule: {type: cosine, floor: 1.0}", ["unknown key 'schedule.floor'", "known keys: 'type', 'warmup'"]),
    ("decay: {type: linear, flor: 1.0}", ["unknown key 'decay.flor'", "did you mean 'floor'?"]),
    ("crop: {sid: 3}", ["unknown key 'crop.sid'", "did you mean 'side'?"]),
    ("crop: {qqqqqq: 3}", ["unknown key 'crop.qqqqqq'", "known keys: 'flip', 'side'"]),
    ("sources: [{shards: [a], wieght: 2}]", ["unknown key 'sources.0.wieght'", "did you mean 'weight'?"]),
    ("sources: [{shards: [a]}, {shard: [b]}]", ["unknown key 'sources.1.shard'", "did you mean 'shards'?"]),
    ("extra: {big: {sidee: 1}}", ["unknown key 'extra.big.sidee'", "did you mean 'side'?"]),
    ("type: cosine", ["unknown key 'type'"]),
    ("_target_: os.system", ["unknown key '_target_'"]),
    ("schedule: {type: cosine, _target_: os.system}", ["unknown key 'schedule._target_'"]),
    # required keys
    ("sources: [{weight: 1}]", ["key 'sources.0.shards' is required"]),
    ("schedule: {warmup: 1}", ["key 'schedule.type' is required", "'cosine', 'linear'"]),
    ("betas: [0.9]", ["key 'betas.1' is required"]),
    # wrong tags and choices
    ("schedule: {type: cosin}", ["schedule.type", "unknown value 'cosin'", "did you mean 'cosine'?"]),
    ("schedule: {type: polynomial}", ["schedule.type", "unknown value 'polynomial'", "one of: 'cosine', 'linear'"]),
    ("decay: {type: liner}", ["decay.type", "unknown value 'liner'", "did you mean 'linear'?"]),
    ("mode: trian", ["mode", "unknown value 'trian'", "did you mean 'train'?"]),
    ("mode: zzz", ["mode", "unknown value 'zzz'", "one of: 'check', 'train'"]),
    ("mode: 3", ["mode", "got 3"]),
    ("schedule: {type: 3}", ["schedule.type", "unknown value '3'"]),
    # wrong types: nothing is converted silently
    ("seed: true", ["seed", "integer", "got True"]),
    ("seed: 1.0", ["seed", "integer", "got 1.0"]),
    ("seed: 1.5", ["seed", "integer", "got 1.5"]),
    ("seed: '1'", ["seed", "integer", "got '1'"]),
    ("seed: 1e3", ["seed", "integer", "got 1000.0"]),
    ("seed: null", ["seed", "integer", "got None"]),
    ("seed: [1]", ["seed", "integer", "got [1]"]),
    ("seed: {a: 1}", ["seed", "integer", "got {'a': 1}"]),
    ("rate: '1e-3'", ["rate", "number", "got '1e-3'"]),
    ("rate: fast", ["rate", "number", "got 'fast'"]),
    ("rate: true", ["rate", "number", "got True"]),
    ("rate: 1e-3x", ["rate", "number", "got '1e-3x'"]),
    ("name: 3", ["name", "string", "got 3"]),
    ("name: true", ["name", "string", "got True"]),
    ("name: [a]", ["name", "string", "got ['a']"]),
    ("folder: 3", ["folder", "string", "got 3"]),
    ("crop: {flip: on}", ["crop.flip", "boolean", "got 'on'"]),
    ("crop: {flip: yes}", ["crop.flip", "boolean", "got 'yes'"]),
    ("crop: {flip: 1}", ["crop.flip", "boolean", "got 1"]),
    ("crop: 3", ["crop", "object", "got 3"]),
    ("crop: [1]", ["crop", "object", "got [1]"]),
    ("schedule: cosine", ["schedule", "object", "got 'cosine'"]),
    ("schedule: null", ["schedule", "got None"]),
    ("sources: a.tar", ["sources", "array", "got 'a.tar'"]),
    ("sources: {shards: [a]}", ["sources", "array"]),
    ("sources: [a.tar]", ["sources.0", "object", "got 'a.tar'"]),
    ("sources: [{shards: [1]}]", ["sources.0.shards.0", "string", "got 1"]),
    ("extra: [1]", ["extra", "object", "got [1]"]),
    ("extra: {big: 3}", ["extra.big", "object", "got 3"]),
    ("betas: [0.9, x]", ["betas.1", "number", "got 'x'"]),
    ("betas: [0.9, 0.99, 0.999]", ["betas", "at most 2"]),
    ("limit: 1.5", ["limit", "integer", "got 1.5"]),
    # wrong values
    ("rate: 0", ["rate", "greater than 0", "got 0"]),
    ("rate: -1.0", ["rate", "greater than 0", "got -1.0"]),
    ("rate: .nan", ["rate", "finite", "got nan"]),
    ("rate: .inf", ["rate", "finite", "got inf"]),
    ("rate: 1e999", ["rate", "finite", "got inf"]),
    ("sources: [{shards: [a], weight: 0}]", ["sources.0.weight", "greater than or equal to 1", "got 0"]),
    ("seed: 13", ["seed 13 is taken"]),
    ("seed: 14", ["seed 14 is taken"]),
    # what YAML can hold and a configuration cannot
    ("name: 2020-01-01", ["name", "date values are not allowed"]),
    ("name: !!binary aGk=", ["name", "bytes values are not allowed"]),
    ("name: !!set {a, b}", ["name", "set values are not allowed"]),
    ("1: 2", ["the top level", "key 1 is not text"]),
    ("crop: {null: 2}", ["crop", "key None is not text"]),
    ("extra: {2020-01-01: {}}", ["extra", "is not text"]),
    # not YAML, or YAML that could run code
    ("name: !!python/object/apply:os.system [id]", ["line 1", "python/object/apply:os.system"]),
    ("name: !!python/name:os.system", ["line 1", "python/name:os.system"]),
    ("name: !run id", ["line 1", "'!run'"]),
    ("!!python/object:os.system {}", ["line 1"]),
    ("seed: 1\nseed: 2", ["line 2", 'duplicate key "seed"']),
    ("crop: {side: 1, side: 2}", ["line 1", 'duplicate key "side"']),
    ("seed: [1", ["line"]),
    ("seed: 1\n\tname: a", ["line 2"]),
    ("seed: *nowhere", ["undefined alias", "nowhere"]),
    ("a: 1\n---\nb: 2", ["line"]),
    ("name: a: b", ["line 1"]),
    ("", ["NoneType", "mapping"]),
    ("# only a comment", ["NoneType", "mapping"]),
    ("- seed: 1", ["list", "mapping"]),
    ("seed", ["str", "mapping"]),
    ("name: " + "[" * 5000, ["nested too deeply"]),
]


@pytest.mark.parametrize(("text", "parts"), REFUSED, ids=range(len(REFUSED)))
def test_r24_malformed_file_is_refused_with_path_value_and_suggestion(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        cfg.load(Run, file)
    message = str(caught.value)
    assert all(line.startswith(f"{file}: ") for line in message.split("\n"))
    for part in parts:
        assert part in message


def test_r24_table_of_malformed_files_is_long_enough() -> None:
    assert len({text for text, _ in REFUSED}) == len(REFUSED) >= 60


def test_every_error_of_a_file_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        cfg.load(Run, {"sede": 1, "rate": -1.0, "crop": {"flop": True}})
    assert len(str(caught.value).split("\n")) == 3


GOOD = [
    ("{}", Run()),
    ("rate: 3e-4", Run(rate=3e-4)),
    ("rate: 1", Run(rate=1.0)),
    ("seed: 010", Run(seed=10)),
    ("seed: 0o10", Run(seed=8)),
    ("seed: 0x10", Run(seed=16)),
    ("name: on", Run(name="on")),
    ("name: no", Run(name="no")),
    ("name: 12:30:45", Run(name="12:30:45")),
    ("name: é", Run(name="é")),
    ("betas: [0, 1]", Run(betas=(0.0, 1.0))),
    ("limit: many", Run(limit="many")),
    ("crop: null", Run()),
    ("decay: {type: linear, floor: 1}", Run(decay=Linear(floor=1.0))),
    ("extra: {a: &x {side: 3}, b: *x}", Run(extra={"a": Crop(side=3), "b": Crop(side=3)})),
    ("crop: {<<: {side: 3}, flip: true}", Run(crop=Crop(side=3, flip=True))),
    ("\ufeffseed: 1", Run(seed=1)),
]


@pytest.mark.parametrize(("text", "expected"), GOOD, ids=range(len(GOOD)))
def test_yaml_1_2_is_read_as_it_looks(tmp_path: Path, text: str, expected: Run) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    assert cfg.load(Run, file) == expected


def keys_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


@settings(deadline=None)
@given(st.data())
def test_r24_key_with_one_typo_gets_the_right_suggestion(data: st.DataObject) -> None:
    keys = keys_of(Run)
    key = data.draw(st.sampled_from([k for k in keys if len(k) > 3]))
    i = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    kind = data.draw(st.sampled_from(["drop", "insert", "replace", "swap"]))
    typo = {
        "drop": key[:i] + key[i + 1 :],
        "insert": key[:i] + letter + key[i:],
        "replace": key[:i] + letter + key[i + 1 :],
        "swap": key[:i] + key[i + 1 : i + 2] + key[i : i + 1] + key[i + 2 :],
    }[kind]
    likeness = {k: difflib.SequenceMatcher(None, typo, k).ratio() for k in keys}
    if typo in keys or any(likeness[k] >= likeness[key] for k in keys if k != key):
        return  # "nate" is as near to "name" as to "rate"
    with pytest.raises(ConfigError, match=f"unknown key {typo!r}; did you mean {key!r}"):
        cfg.load(Run, {typo: 1})


text = st.text(st.characters(codec="utf-8"), max_size=20)
schedules = st.builds(Cosine, warmup=st.integers()) | st.builds(
    Linear, warmup=st.integers(-(2**70), 2**70), floor=st.floats(allow_nan=False, allow_infinity=False)
)
crops = st.builds(Crop, side=st.integers(), flip=st.booleans())
runs = st.builds(
    Run,
    name=text,
    seed=st.integers(20),
    rate=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    mode=st.sampled_from(["train", "check"]),
    schedule=schedules,
    decay=st.none() | schedules,
    crop=st.none() | crops,
    sources=st.lists(st.builds(Source, shards=st.lists(text, max_size=3).map(tuple)), max_size=3).map(tuple),
    extra=st.dictionaries(text, crops, max_size=3),
    limit=st.integers() | text,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(value=runs)
def test_r24_dump_then_load_gives_the_same_configuration(tmp_path: Path, value: Run) -> None:
    file = tmp_path / "dumped.yaml"
    file.write_bytes(cfg.dump(value).encode("utf-8"))
    again = cfg.load(Run, file)
    assert again == value
    assert cfg.fingerprint(again) == cfg.fingerprint(value)


@settings(deadline=None)
@given(a=runs, b=runs)
def test_fingerprint_differs_exactly_when_the_configuration_does(a: Run, b: Run) -> None:
    assert (cfg.fingerprint(a) == cfg.fingerprint(b)) == (cfg.dump(a) == cfg.dump(b))


def test_configurations_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().seed = 1  # type: ignore[misc]
    with pytest.raises((TypeError, pydantic.ValidationError)):
        Run("name")  # type: ignore[misc]


OVERRIDES = [
    ("seed=3", Run(seed=3)),
    ("rate=3e-4", Run(rate=3e-4)),
    ("name=", None),
    ("name=''", Run(name="")),
    ("name=a=b", Run(name="a=b")),
    ("crop.side=3", Run(crop=Crop(side=3))),
    ("crop={side: 3}", Run(crop=Crop(side=3))),
    ("sources.1.weight=5", Run(sources=(Source(shards=("a",)), Source(shards=("b",), weight=5)))),
    ("sources=[]", Run(sources=())),
    ("schedule={type: linear}", Run(schedule=Linear())),
]


@pytest.mark.parametrize(("text", "expected"), OVERRIDES, ids=[text for text, _ in OVERRIDES])
def test_override_replaces_one_value(text: str, expected: Run | None) -> None:
    base: dict[str, Any] = {}
    if text.startswith("sources"):
        base = {"sources": [{"shards": ["a"]}, {"shards": ["b"]}]}
    if expected is None:
        with pytest.raises(ConfigError, match=r"name: .*got None"):
            cfg.load(Run, base, [text])
    else:
        assert cfg.load(Run, base, [text]) == expected


BAD_OVERRIDES = [
    ("seed", "expected dotted.key=value"),
    ("=3", "expected dotted.key=value"),
    ("crop..side=3", "expected dotted.key=value"),
    (".seed=3", "expected dotted.key=value"),
    ("seed.x=3", "'x' lies below the plain value 7"),
    ("sources.5.weight=3", "'5' is not an index of a list of 1"),
    ("sources.x=3", "'x' is not an index of a list of 1"),
    ("sources.-1.weight=3", "'-1' is not an index of a list of 1"),
    ("seed=[1", "override 'seed=\\[1': line 1"),
    ("seed=!!python/name:os.system", "line 1, column 1"),
    ("sede=3", "unknown key 'sede'; did you mean 'seed'"),
    ("seed=x", "seed: .*integer.*got 'x'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_OVERRIDES, ids=[text for text, _ in BAD_OVERRIDES])
def test_bad_override_is_refused_and_names_file_and_override(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 7\nsources: [{shards: [a]}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        cfg.load(Run, file, [text])
    assert str(caught.value).startswith(f"{file}: ")


def test_later_override_wins() -> None:
    assert cfg.load(Run, {"seed": 1}, ["seed=2", "seed=3"]).seed == 3


def test_r09_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match="more than 100,000 values once aliases are expanded"):
        cfg.load(Run, file)


def test_endless_alias_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    file.write_text("extra: &a {b: *a}", encoding="utf-8")
    with pytest.raises(ConfigError, match="once aliases are expanded"):
        cfg.load(Run, file)


def test_file_over_one_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_bytes(b"#" * (1 << 20))
    with pytest.raises(ConfigError, match="mapping"):
        cfg.load(Run, file)
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="1,048,577 bytes, limit 1,048,576"):
        cfg.load(Run, file)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read \(No such file"):
        cfg.load(Run, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        cfg.load(Run, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not UTF-8"):
        cfg.load(Run, tmp_path / "latin.yaml")


def test_python_objects_in_a_mapping_are_refused_with_their_path() -> None:
    with pytest.raises(ConfigError, match=r"sources\.0\.shards: PosixPath values are not allowed"):
        cfg.load(Run, {"sources": [{"shards": Path("a")}]})


def test_recipe_is_found_by_path_first_then_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "configs"
    (root / "demo").mkdir(parents=True)
    (root / "demo" / "unified.yaml").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(cfg, "_recipe_root", lambda: root)
    monkeypatch.chdir(tmp_path)
    assert cfg.recipes() == ["demo/unified.yaml"]
    for name in ("demo/unified.yaml", "demo/unified"):
        assert cfg.find_recipe(name) == root / "demo" / "unified.yaml"
    assert cfg.find_recipe("configs/demo/unified.yaml").samefile(root / "demo" / "unified.yaml")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "unified.yaml").write_text("seed: 1", encoding="utf-8")
    assert cfg.find_recipe("demo/unified.yaml").read_text(encoding="utf-8") == "seed: 1"


def test_wrong_recipe_name_suggests_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    for name in ("unified", "vq"):
        (tmp_path / "demo" / f"{name}.yaml").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(cfg, "_recipe_root", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"demo/unifed: no such file.*did you mean demo/unified\.yaml"):
        cfg.find_recipe("demo/unifed")
    with pytest.raises(ConfigError, match=r"the recipes are: demo/unified\.yaml, demo/vq\.yaml"):
        cfg.find_recipe("0000")


def test_configuration_text_never_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    assert cfg.load(Run, {"name": "${oc.env:SECRET} $SECRET"}).name == "${oc.env:SECRET} $SECRET"
