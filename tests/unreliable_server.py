"""A local file server with range requests that fails, times out or disconnects on demand."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class UnreliableServer:
    """Files, planned failures and past requests of the server."""

    files: Mapping[str, bytes]
    """Content by path."""
    troubles: list[str] = field(default_factory=list)
    """Failures of the next requests, in order: a status, break, silence, garbled, no-ranges; later requests succeed."""
    asked: list[str | None] = field(default_factory=list)
    """Range of each request so far."""
    paths: list[str] = field(default_factory=list)
    """Path of each request so far."""
    address: str = ""
    awake: threading.Event = field(default_factory=threading.Event)
    """Set at the end to release silent connections."""


@contextmanager
def unreliable_server(files: Mapping[str, bytes], *troubles: str) -> Iterator[UnreliableServer]:
    state = UnreliableServer(files=files, troubles=list(troubles))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append(self.headers.get("Range"))
            state.paths.append(self.path)
            trouble = state.troubles.pop(0) if state.troubles else ""
            content = state.files.get(self.path)
            if trouble.isdigit() or content is None:
                self._answer(int(trouble or 404), b"sorry")
                return
            first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
            if trouble == "no-ranges":
                first = 0
            if first and first >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            wanted = bytes(len(content)) if trouble == "garbled" else content[first:]
            headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if first else {}
            self._answer(206 if first else 200, wanted, headers, trouble)

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}, trouble: str = "") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if trouble in ("break", "silence"):
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if trouble != "break":
                    state.awake.wait(20)
                self.close_connection = True
                return
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.awake.set()
        server.shutdown()
        server.server_close()
        thread.join()
