"""The errors a user can cause, and the exit code each one ends the command with.

Every message says what, where, by how much and what to do. Nothing here imports anything heavy.
"""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "EXIT_STOPPED",
    "CheckpointError",
    "ConfigError",
    "MissingExtraError",
    "MmdiffError",
    "SampleError",
    "ShardError",
    "UnsafeFileError",
    "redact",
]

EXIT_STOPPED = 75
"""Exit code of a run that was interrupted and saved (sysexits' EX_TEMPFAIL): start it again with ``--resume``."""


class MmdiffError(Exception):
    """Base of every error that is the input's fault, not the program's."""

    exit_code = 2


class ConfigError(MmdiffError):
    """A configuration, argument or question that cannot be carried out."""


class MissingExtraError(MmdiffError):
    """An optional dependency is not installed.

    Args:
        package: The import name that failed.
        extra: The extra of mmdiff that installs it.
        purpose: What it is needed for, as the end of "is needed ...".
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is needed {purpose}; install it with: pip install 'mmdiff[{extra}]'")
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        return type(self), self._given


class ShardError(MmdiffError):
    """Data as a whole cannot be used: missing shard, wrong index, too many skipped samples."""

    exit_code = 3


class SampleError(MmdiffError):
    """One sample cannot be used. The data pipeline catches it, counts it and goes on.

    Args:
        reason: Short code for the counters, such as ``"undecodable_image"``.
        message: The sentence for the log.
    """

    exit_code = 3

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class CheckpointError(MmdiffError):
    """A checkpoint is missing, damaged, of another shape, or cannot do what was asked."""

    exit_code = 4


class UnsafeFileError(CheckpointError):
    """A file that could run code, or lies about its size, was refused."""


def redact(url: str) -> str:
    """The URL without user name, password, query and fragment, fit for messages, logs and services."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
