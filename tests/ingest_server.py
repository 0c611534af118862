"""An embedded receiver for captures: `python tests/ingest_server.py`, standard library only.

    POST /ingest   a JSON array of objects, plain or with `Content-Encoding: gzip`
                   200 {"status": "success", "packets_received": N, "duplicate": false}
                   422 {"detail": "..."} for anything else, with nothing stored
    GET  /health   200 {"status": "ok", "packets": N, "repeats": N}

Every packet becomes one row of an SQLite database, as the exact JSON text that arrived. A batch sent again under
an Idempotency-Key that is already on record is not stored again; it is answered with the `packets_received` of the
first time and `"duplicate": true`. The key is written in the same transaction as the packets, so whatever moment the
receiver dies at, a repeat is neither lost nor stored twice.

In a test: `with IngestServer(tmp_path / "ingest.sqlite3") as server: ... server.url, server.packets(), server.repeats`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import logging
import os
import re
import signal
import socket
import socketserver
import sqlite3
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

DEFAULT_DB = Path(__file__).with_name("ingest.sqlite3")

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS packets (
    id     INTEGER PRIMARY KEY,
    packet TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS idempotency_keys (
    key              TEXT PRIMARY KEY,
    packets_received INTEGER NOT NULL,
    repeats          INTEGER NOT NULL DEFAULT 0
);
"""

log = logging.getLogger("ingest_server")


class Receipt(NamedTuple):
    """What became of one batch."""

    packets_received: int
    duplicate: bool


class PacketStore:
    """The database behind a receiver. One object belongs to one thread; any number may share the file."""

    def __init__(self, db_path: str | os.PathLike[str]) -> None:
        self._db = sqlite3.connect(db_path, timeout=30)
        self._db.executescript(SCHEMA)

    def __enter__(self) -> PacketStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def add(self, packets: list[str], key: str | None) -> Receipt:
        """Store one batch, given as the JSON text of each packet, unless `key` is already on record."""
        with self._db:  # one transaction: the key is on record exactly when its packets are
            if key is not None:
                # Written before it is read, so that of two equal batches at once the second waits here for the first.
                self._db.execute(
                    "INSERT INTO idempotency_keys (key, packets_received) VALUES (?, ?)"
                    " ON CONFLICT (key) DO UPDATE SET repeats = repeats + 1",
                    (key, len(packets)),
                )
                received, repeats = self._db.execute(
                    "SELECT packets_received, repeats FROM idempotency_keys WHERE key = ?", (key,)
                ).fetchone()
                if repeats:
                    return Receipt(received, duplicate=True)
            self._db.executemany("INSERT INTO packets (packet) VALUES (?)", ((packet,) for packet in packets))
        return Receipt(len(packets), duplicate=False)

    def packets(self) -> list[str]:
        """The JSON text of every stored packet, in the order of arrival."""
        return [packet for (packet,) in self._db.execute("SELECT packet FROM packets ORDER BY id")]

    def count(self) -> int:
        """How many packets are stored."""
        return int(self._db.execute("SELECT count(*) FROM packets").fetchone()[0])

    def repeats(self) -> int:
        """How many batches were dropped because their key was already on record."""
        return int(self._db.execute("SELECT coalesce(sum(repeats), 0) FROM idempotency_keys").fetchone()[0])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)
_whitespace = re.compile(r"[ \t\n\r]*")


def _skip_whitespace(text: str, at: int) -> int:
    match = _whitespace.match(text, at)
    return match.end() if match else at


def split_packets(text: str) -> list[str]:
    """The exact text of each object in a JSON array of objects, `[{...}, {...}]`. ValueError if it is not one."""
    at = _skip_whitespace(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError("the body is not a JSON array")
    packets: list[str] = []
    at = _skip_whitespace(text, at + 1)
    more = text[at : at + 1] != "]"
    while more:
        packet, end = _decoder.raw_decode(text, at)
        if not isinstance(packet, dict):
            raise ValueError(f"element {len(packets)} is not an object")
        packets.append(text[at:end])
        at = _skip_whitespace(text, end)
        if text[at : at + 1] not in ("]", ","):
            raise ValueError(f"the array is broken off after element {len(packets) - 1}")
        more = text[at] == ","
        if more:
            at = _skip_whitespace(text, at + 1)
    if _skip_whitespace(text, at + 1) != len(text):
        raise ValueError("something follows the array")
    return packets


class Refusal(Exception):
    """A request that is answered with an error status and its reason."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def decode_body(body: bytes, encoding: str) -> list[str]:
    """The packets of a request body in the given Content-Encoding. Raises Refusal."""
    if encoding not in ("", "identity", "gzip"):
        raise Refusal(415, "Content-Encoding must be gzip or absent")
    try:
        plain = gzip.decompress(body) if encoding == "gzip" else body
        return split_packets(plain.decode("utf-8"))
    except RecursionError:
        raise Refusal(422, "the body is nested too deeply") from None
    except (ValueError, OSError, EOFError, zlib.error) as error:  # the last three are gzip's
        raise Refusal(422, str(error)) from None


class IngestHandler(BaseHTTPRequestHandler):
    """The requests of one connection, in its own thread and with its own database connection."""

    server: IngestHTTPServer
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # TCP_NODELAY: an answer is two small writes, the second would wait for an ACK

    def setup(self) -> None:
        super().setup()
        self.store = PacketStore(self.server.db_path)

    def finish(self) -> None:
        self.store.close()
        super().finish()

    def do_POST(self) -> None:
        try:
            body = self._read_body()
            if self._route() != "/ingest":
                raise Refusal(404, "packets go to POST /ingest")
            packets = decode_body(body, self.headers.get("Content-Encoding", "").strip().lower())
        except Refusal as refusal:
            log.info("refused with %d: %s", refusal.status, refusal.detail)
            self._answer(refusal.status, {"detail": refusal.detail})
            return
        receipt = self.store.add(packets, self.headers.get("Idempotency-Key"))
        log.info("batch of %d %s", len(packets), "dropped as a repeat" if receipt.duplicate else "stored")
        self._answer(200, {"status": "success", **receipt._asdict()})

    def do_GET(self) -> None:
        if self._route() == "/health":
            self._answer(200, {"status": "ok", "packets": self.store.count(), "repeats": self.store.repeats()})
        else:
            self._answer(404, {"detail": "there is GET /health and POST /ingest"})

    def _route(self) -> str:
        return self.path.partition("?")[0]

    def _read_body(self) -> bytes:
        """The whole body. Read even where the request is refused: the next request begins behind it."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True  # nobody knows where the next request would begin
            raise Refusal(411, "Content-Length is required")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError("the client went away in the middle of its request")
        return body

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class IngestHTTPServer(ThreadingHTTPServer):
    """A threading HTTP server that knows its open connections, to be able to end them."""

    # On Windows the option means that a second server may take the same port and half of the requests.
    allow_reuse_address = os.name == "posix"
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], db_path: str | os.PathLike[str]) -> None:
        super().__init__(address, IngestHandler)
        self.db_path = db_path
        self._connections: set[Any] = set()
        self._connection_ended = threading.Condition()

    def server_bind(self) -> None:
        # Not HTTPServer's own, which looks up this machine's name and hangs where DNS does not answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._connection_ended:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._connection_ended:
            self._connections.discard(request)
            self._connection_ended.notify_all()

    def sever_connections(self, patience: float = 2.0) -> None:
        """End every open connection. A batch being stored is stored, but its sender gets no answer."""
        with self._connection_ended:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # its client was faster
                    connection.shutdown(socket.SHUT_RDWR)
            self._connection_ended.wait_for(lambda: not self._connections, patience)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away is no error of ours
            super().handle_error(request, client_address)


class IngestServer:
    """A receiver in this process, listening from construction to `close()` or the end of its `with` block.

    `IngestServer(server.db_path, port=server.port)` is the same receiver started again. What was stored can be read
    while it runs and after it was closed.
    """

    def __init__(self, db_path: str | os.PathLike[str], host: str = "127.0.0.1", port: int = 0) -> None:
        self.db_path = db_path
        with PacketStore(db_path):  # a database that cannot be had is reported here, not on the first request
            self._http = IngestHTTPServer((host, port), db_path)
        self.port = self._http.server_port
        self.url = f"http://{host}:{self.port}/ingest"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> IngestServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and end the open connections too: a kept-alive one would go on being served."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.sever_connections()

    def packets(self) -> list[str]:
        """The JSON text of every stored packet, in the order of arrival."""
        with PacketStore(self.db_path) as store:
            return store.packets()

    @property
    def repeats(self) -> int:
        """How many batches were dropped because their key was already on record."""
        with PacketStore(self.db_path) as store:
            return store.repeats()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Receive captures by POST /ingest, keep them in an SQLite database.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one (default: %(default)s)")
    parser.add_argument("--db", type=Path, default=DEFAULT_DB, help="database file (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no line per request")
    return parser.parse_args()


def main() -> None:
    for name in ("SIGTERM", "SIGBREAK"):  # SIGBREAK is Ctrl-Break on Windows, and unknown elsewhere
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    arguments = _parse_arguments()
    logging.basicConfig(level=logging.WARNING if arguments.quiet else logging.INFO, format="%(asctime)s %(message)s")
    try:
        with IngestServer(arguments.db, arguments.host, arguments.port) as server:
            print(f"listening on {server.url}", flush=True)
            while True:
                time.sleep(0.2)  # short, because Ctrl-Break does not interrupt it
    except KeyboardInterrupt:
        pass  # asked to stop: exit status 0
    except (OSError, OverflowError, sqlite3.Error) as error:
        sys.exit(f"cannot start on {arguments.host}:{arguments.port} with {arguments.db}: {error}")


if __name__ == "__main__":
    main()
