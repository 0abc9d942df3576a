"""Every error a user can cause ends the command with its own exit code and survives a worker process."""

from __future__ import annotations

import pickle

import pytest

from mmdiff import errors

CODES = {
    "MmdiffError": 2,
    "ConfigError": 2,
    "MissingExtraError": 2,
    "ShardError": 3,
    "SampleError": 3,
    "CheckpointError": 4,
    "UnsafeFileError": 4,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_code_is_the_promised_one(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_every_public_error_has_a_promised_exit_code() -> None:
    assert {n for n in errors.__all__ if isinstance(getattr(errors, n), type)} == set(CODES)
    assert errors.EXIT_STOPPED == 75


@pytest.mark.parametrize(
    "error",
    [
        errors.ShardError("a.tar: gone"),
        errors.SampleError("missing_codes", "a.tar: sample 'x' has no codes.npy"),
        errors.MissingExtraError("peft", "lora", "to load an adapter"),
    ],
)
def test_error_raised_in_a_worker_arrives_whole(error: errors.MmdiffError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_missing_extra_says_how_to_install_it() -> None:
    text = str(errors.MissingExtraError("peft", "lora", "to load an adapter"))
    assert text == "peft is needed to load an adapter; install it with: pip install 'mmdiff[lora]'"
