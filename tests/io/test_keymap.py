from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdiff.io.keymap import KeyMap
from mmdiff.io.layouts import LAYOUTS
from mmdiff.io.tensors import TensorInfo, Tensors
from tests.helpers import published


def keys_of(layout: str) -> KeyMap:
    return LAYOUTS[layout].key_map(LAYOUTS[layout].read(published.CONFIGS[layout], {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_key_has_one_name_here_and_comes_back(layout):
    described = LAYOUTS[layout]
    config = described.read(published.CONFIGS[layout], {})
    shapes = published.shapes(layout, published.CONFIGS[layout])
    repeated = described.copies(config)
    info = {
        k: TensorInfo(shape=s, dtype=torch.float32, file=Path("published"))
        for k, s in shapes.items()
        if k not in repeated
    }
    # What a layout stacks or keeps apart is put in order before keys are renamed.
    keys = list(described.regroup(Tensors(info, lambda name: torch.empty(info[name].shape)), config))
    ours = [keys_of(layout).forward(k) for k in keys]
    assert None not in ours
    assert len(set(ours)) == len(keys)
    assert [keys_of(layout).backward(str(o)) for o in ours] == keys


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None)
@given(data=st.data())
def test_key_maps_are_bijective_on_every_key_their_templates_can_form(layout, data):
    keys = keys_of(layout)
    theirs, ours = data.draw(st.sampled_from(keys.rules))
    fields = {
        "i": str(data.draw(st.integers(0, 10**6))),
        "rest": data.draw(st.from_regex(r"[a-z_]+(\.[a-z0-9_]+){0,3}", fullmatch=True)),
    }
    assert keys.forward(theirs.format(**fields)) == ours.format(**fields)
    assert keys.backward(ours.format(**fields)) == theirs.format(**fields)


def test_the_two_layouts_of_llada_agree_with_the_published_table(fixtures):
    table = json.loads((fixtures / "llada" / "key_map.json").read_text())
    for olmo, llama in table.items():
        assert LAYOUTS["olmo"].keys.forward(olmo) == LAYOUTS["llama"].keys.forward(llama)


@pytest.mark.parametrize(
    "key", ["a.01.w", "a.-1.w", "a..w", "a.1.w.more", "xa.1.w", "a.1.W", "a.1.w\n", "", "a.\u0661.w"]
)
def test_keys_that_only_look_alike_are_unknown(key):
    assert KeyMap(("a.{i}.w", "b.{i}.w")).forward(key) is None


def test_dots_are_not_wildcards():
    assert KeyMap(("a.b", "c")).forward("aXb") is None


def test_the_fixture_folder_is_the_one_in_the_repository(repository):
    assert (Path(repository) / "tests" / "fixtures" / "llada" / "key_map.json").is_file()
