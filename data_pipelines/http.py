"""Byte ranges over http and https with the standard library: no other package is needed for plain web servers.

Retrying is ``ranges``' business; here one request is made and its answer checked.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

from mmdiff.errors import ShardError
from mmdiff.images import redact

__all__ = ["HttpStore", "InterruptedTransferError"]

TIMEOUT_SECONDS = 30.0
"""Longest wait for a connection or for the next bytes."""


_CHUNK = 1 << 20


class InterruptedTransferError(OSError):
    """A connection that ended too early, with what had arrived: the next try goes on behind it.

    Args:
        message: What happened.
        data: Bytes from the beginning of the range on.
    """

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class HttpStore:
    """Sizes and ranges of files on web servers; a file that changes while it is being read is refused."""

    def __init__(self) -> None:
        self._tags: dict[str, str] = {}

    def size(self, url: str) -> int:
        """Bytes of the file, from a range request of one byte (not every server answers HEAD).

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The server or the network failed.
            ShardError: Access is denied, ranges are not served, or the file changed.
        """
        _, total = self._request(url, 0, 1)
        return total

    def exists(self, url: str) -> bool:
        """Whether the file is there; other errors as `size`."""
        try:
            self.size(url)
        except FileNotFoundError:
            return False
        return True

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """The bytes from ``start`` to before ``end``, fewer at the end of the file; errors as `size`.

        Raises:
            InterruptedTransferError: Only a part of them arrived.
        """
        return self._request(url, start, end)[0]

    def open(self, url: str) -> _Body:
        """The whole file from its beginning, for servers without ranges; errors as `size`."""
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
        with _named(url):
            return _Body(urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS))

    def _request(self, url: str, start: int, end: int) -> tuple[bytes, int]:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(url, headers=headers)
        with _named(url):
            try:
                answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
            except urllib.error.HTTPError as error:
                if error.code != 416:
                    raise
                error.close()
                return b"", 0  # the range begins behind the end
            with answer:
                self._check_tag(url, answer.headers.get("ETag"))
                span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
                if answer.status != 206 or not span or int(span[1]) != start:
                    how = "download the shards first, or set data.stream"
                    raise ShardError(f"{redact(url)}: the server does not serve ranges; {how}")
                wanted = min(end, int(span[3])) - start
                data = _read(answer, wanted)
        if len(data) < wanted:
            raise InterruptedTransferError(f"{wanted - len(data):,} bytes of {wanted:,} did not arrive", data)
        return data, int(span[3])

    def _check_tag(self, url: str, tag: str | None) -> None:
        if tag is None or tag.startswith("W/"):
            return
        if self._tags.setdefault(url, tag) != tag:
            raise ShardError(f"{redact(url)}: changed on the server while it was being read; start again")


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """Turns what urllib raises into the errors of `HttpStore.size`."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(url) from None
        if error.code in (400, 401, 403, 405):
            raise ShardError(f"{redact(url)}: the server answers {error.code} {error.reason}") from None
        raise OSError(f"the server answers {error.code} {error.reason}") from None
    except http.client.HTTPException as error:
        raise OSError(f"the connection broke ({type(error).__name__})") from None


class _Body:
    """The body of an answer; an end that comes too early is an error."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer

    def close(self) -> None:
        """End the connection."""
        self._answer.close()

    def read(self, size: int) -> bytes:
        """The next bytes, none at the end.

        Raises:
            OSError: The connection broke.
        """
        try:
            data = self._answer.read(size)
        except http.client.HTTPException as error:
            raise OSError(f"the connection broke ({type(error).__name__})") from None
        if not data and size and self._answer.length:
            raise OSError(f"{self._answer.length:,} bytes did not arrive")
        return data


def _read(answer: http.client.HTTPResponse, wanted: int) -> bytes:
    """Up to ``wanted`` bytes, fewer if the connection ends or breaks before."""
    data = bytearray()
    try:
        while len(data) < wanted and (chunk := answer.read(min(_CHUNK, wanted - len(data)))):
            data += chunk
    except (http.client.IncompleteRead, ConnectionError, TimeoutError):
        pass  # the caller sees that bytes are missing
    return bytes(data)
