"""A local web server with byte ranges that fails on demand."""

from __future__ import annotations

import http.server
import re
import socket
import struct
import threading
from pathlib import Path


class Server:
    """Serves a folder on 127.0.0.1.

    ``faults`` are used up by requests, one each: a number is answered as an error, ``cut`` sends half of the body,
    ``flip`` changes a bit of it, ``reset`` breaks the connection, ``no ranges`` answers 200, an empty one is no fault.

    Attributes:
        url: Where it listens.
        requests: Path and range of every request.
        tag: ETag of all files.
        ranges: Whether ranges are served at all.
        faults: What goes wrong next.
    """

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.tag = "one"
        self.ranges = True
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, folder))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def _handler(outer: Server, folder: Path) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            span = self.headers.get("Range", "")
            outer.requests.append((self.path, span))
            fault = outer.faults.pop(0) if outer.faults else ""
            file = folder / self.path.lstrip("/").split("?")[0]
            self.close_connection = True
            if fault == "reset":
                # Closing with a linger of zero seconds sends a reset instead of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            if fault.isdigit() or not file.is_file():
                self.send_error(int(fault) if fault else 404)
                return
            data = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
            first, last = (int(asked[1]), int(asked[2])) if asked and outer.ranges else (0, len(data) - 1)
            part = data[first : last + 1]
            self.send_response(206 if asked and outer.ranges and fault != "no ranges" else 200)
            self.send_header("ETag", f'"{outer.tag}"')
            self.send_header("Content-Length", str(len(part)))
            if asked and outer.ranges:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.end_headers()
            if fault == "cut":
                part = part[: len(part) // 2]
            if fault == "flip":
                part = bytes([part[0] ^ 1]) + part[1:]
            self.wfile.write(part)

    return Handler
