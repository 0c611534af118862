"""Servers that misbehave in exactly the way a test asks for, and a clock that moves only when it is told to."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import importlib.util
import json
import os
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Union, cast

import trustme
import uvicorn
from conftest import Spool, wait_until
from ingest_server import PacketStore

PATIENCE = 10.0  # seconds a misbehaving server goes on: a sender that puts up with it fails its test, and hangs none
TIMEOUT = 5.0  # seconds of a Clock: the REQUEST_TIMEOUT that load() sets


class Clock:
    """Stands in for the module `time` inside one loaded sender.py. It stands still until somebody sleeps or moves it.

    So waits cost nothing and are counted exactly, and a slow server is one whose script moves the clock.
    """

    def __init__(self, module: Any) -> None:
        self.now = 1_800_000_000.0
        self.slept = 0.0  # seconds in all
        self.at_sleep: Callable[[], object] = lambda: None  # called after each sleep
        module.time = self

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.at_sleep()

    def move(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Request(NamedTuple):
    """What a ScriptedServer was asked."""

    number: int  # counted from 0, over all connections
    connection: int  # counted from 0
    line: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def plain(self) -> bytes:
        return gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body

    @property
    def packets(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", json.loads(self.plain))

    @property
    def numbers(self) -> list[int]:
        """The numbers that conftest's packet() gave to the packets."""
        return [packet["length"] for packet in self.packets]

    @property
    def key(self) -> str:
        return self.headers["idempotency-key"]


Behaviour = Callable[[socket.socket], None]  # does something with a connection, which is closed afterwards
Answer = Union[bytes, Behaviour, None]  # bytes: sent, and the connection is kept; None: the packets are stored, and 200
Script = Callable[[Request], Answer]


def reply(status: int, body: bytes | str | dict[str, Any] = b"", *headers: str) -> bytes:
    """A well-formed HTTP reply; `headers` are whole lines."""
    content = json.dumps(body) if isinstance(body, dict) else body
    content = content.encode() if isinstance(content, str) else content
    head = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Whatever')}", *headers]
    if status not in (204, 304):
        head.append(f"Content-Length: {len(content)}")
    return "\r\n".join([*head, "", ""]).encode("latin-1") + content


def close(connection: socket.socket) -> None:
    """Close without a word."""


def reset(connection: socket.socket) -> None:
    """Close with an RST, as a crashed or restarted machine does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))


def hold(connection: socket.socket) -> None:
    """Say nothing until the client hangs up."""
    while connection.recv(65536):
        pass


def say(words: bytes) -> Behaviour:
    """Send `words`, then close."""
    return lambda connection: connection.sendall(words)


def say_and_hold(words: bytes) -> Behaviour:
    """Send `words`, then nothing more until the client hangs up."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(words)
        hold(connection)

    return behave


def drip(words: bytes, drop: bytes) -> Behaviour:
    """Send `words`, then `drop` again and again, slowly enough to need no memory, fast enough for any idle time-out."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(words)
        connection.settimeout(0.02)  # the client says nothing: this is the pause between two drops
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            connection.sendall(drop)
            with contextlib.suppress(socket.timeout):
                if not connection.recv(1):
                    return

    return behave


def flood(words: bytes, piece: bytes, sent: Counter[str], most: int = 1 << 28) -> Behaviour:
    """Send `words`, then `piece` for ever (256 MB); sent["bytes"] counts what the client took."""

    def behave(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        connection.sendall(words)
        block = piece * (65536 // len(piece))
        end = time.monotonic() + PATIENCE
        while sent["bytes"] < most and time.monotonic() < end:
            connection.sendall(block)
            sent["bytes"] += len(block)

    return behave


def too_late(clock: Clock, seconds: float) -> Behaviour:
    """No whole answer while `seconds` pass on the sender's clock; next to no real time passes."""

    def behave(connection: socket.socket) -> None:
        connection.settimeout(0.005)
        while True:
            clock.move(seconds)
            connection.sendall(b"H")  # makes the sender look at its clock
            with contextlib.suppress(socket.timeout):
                if not connection.recv(1):
                    return

    return behave


def tunnel(port: int) -> Behaviour:
    """What a proxy does with CONNECT: carry bytes to and fro, whatever name was asked for."""

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def behave(connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", port)) as upstream:
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=carry, args=(upstream, connection), daemon=True)
            back.start()
            carry(connection, upstream)
            back.join()

    return behave


class ScriptedServer:
    """A server whose every answer comes from `script`, a function that may be exchanged at any time.

    Packets of answer None are counted in `stored` by their numbers, those of a repeated key only once. `early` is asked
    before the body of a request is read. Built with `listening=False` it refuses connections until listen().
    What fails in a script fails the test, at the end of the `with` block.
    """

    def __init__(
        self,
        script: Script = lambda request: None,
        *,
        early: Script = lambda request: None,
        tls: ssl.SSLContext | None = None,
        listening: bool = True,
        receive_buffer: int = 0,
    ) -> None:
        self.script, self.early, self._tls = script, early, tls
        self.requests: list[Request] = []
        self.connections = 0
        self.stored: Counter[int] = Counter()
        self.keys: set[str] = set()
        self._errors: list[BaseException] = []
        self._open: set[socket.socket] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._listener = socket.socket()
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/ingest"
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        if listening:
            self.listen()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept()
        if self._acceptor.ident:
            self._acceptor.join(PATIENCE)
        self._listener.close()
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._changed.wait_for(lambda: not self._open, PATIENCE)
        if self._errors and not kind:
            raise self._errors[0]

    def listen(self) -> None:
        self._listener.listen(128)
        self._acceptor.start()

    @property
    def repeats(self) -> int:
        """How often a packet was stored once too many."""
        return sum(self.stored.values()) - len(self.stored)

    @property
    def sizes(self) -> list[int]:
        """Packets per request."""
        return [len(request.packets) for request in self.requests]

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if self._closing:
                connection.close()
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._open.add(connection)
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection, self.connections - 1), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            wire = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            if self._tls:
                with self._changed:
                    self._open.symmetric_difference_update((connection, wire))
                connection = wire
            with connection, connection.makefile("rb") as stream:
                while self._serve_one(connection, stream, number):
                    pass
        except OSError:
            pass  # the client hung up, or the test is over
        except BaseException as error:
            self._errors.append(error)
        finally:
            with contextlib.suppress(OSError):
                connection.close()
            with self._changed:
                self._open.discard(connection)
                self._changed.notify_all()

    def _serve_one(self, connection: socket.socket, stream: Any, number: int) -> bool:
        line = stream.readline().decode("latin-1").rstrip()
        if not line:
            return False
        headers = {}
        while header := stream.readline().decode("latin-1").rstrip():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        request = Request(len(self.requests), number, line, headers, b"")
        answer = self.early(request)
        if answer is None:
            body = stream.read(int(headers.get("content-length", 0)))
            if len(body) < int(headers.get("content-length", 0)):
                return False
            request = request._replace(body=body)
            self.requests.append(request)
            answer = self.script(request)
        if answer is None:
            answer = self.store(request)
        if isinstance(answer, bytes):
            connection.sendall(answer)
            return True
        answer(connection)
        return False

    def store(self, request: Request) -> bytes:
        numbers = request.numbers
        if request.key not in self.keys:
            self.keys.add(request.key)
            self.stored.update(numbers)
        return reply(200, {"status": "success", "packets_received": len(numbers)})


class Certificates(NamedTuple):
    """A certificate authority of its own, and servers' certificates made by it."""

    authority: trustme.CA
    bundle: Path  # what a sender must trust

    def server(self, *names: str, not_after: datetime | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names, not_after=not_after).configure_cert(context)
        return context


def make_certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Certificates(authority, folder / "ca.pem")


class IngestApp:
    """tests/ingest_app.py under a real uvicorn, in a thread; `moods` are its variables without their INGEST_."""

    def __init__(self, folder: Path, keep_alive: float = 5, **moods: object) -> None:
        self._db = folder / "ingest_app.sqlite3"
        before = dict(os.environ)
        os.environ.update({f"INGEST_{name}": str(value) for name, value in {"DB": self._db, **moods}.items()})
        try:
            path = Path(__file__).with_name("ingest_app.py")
            spec = importlib.util.spec_from_file_location("ingest_app", path)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            os.environ.clear()
            os.environ.update(before)
        self.requests = 0
        self._app = module.app
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._count,
                interface="asgi3",
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=cast(int, keep_alive),  # a fraction works as well: it goes to call_later()
                timeout_graceful_shutdown=1,
            )
        )
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/ingest"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    async def _count(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += scope["type"] == "http"
        await self._app(scope, receive, send)

    def __enter__(self) -> IngestApp:
        self._thread.start()
        wait_until(lambda: self._server.started, "uvicorn's start")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        self._socket.close()

    @property
    def open_connections(self) -> int:
        return len(self._server.server_state.connections)

    def stored(self) -> Counter[int]:
        """How often each packet number was stored."""
        with PacketStore(self._db) as store:
            return Counter(json.loads(packet)["length"] for packet in store.packets())


def load(spool: Spool, server: ScriptedServer, **settings: object) -> tuple[Any, Clock]:
    """The spool's sender.py as a fresh module, which is what a restart is, and its clock."""
    sender = spool.load(**{"SERVER_URL": server.url, "REQUEST_TIMEOUT": TIMEOUT, "RETRY_DELAY": 1, **settings})
    return sender, Clock(sender)


def play(sender: Any, clock: Clock, *steps: Callable[[], object]) -> None:
    """Run monitor_and_upload(). Each time it would wait for its next poll, a step is done; in the end it is stopped."""
    left = iter(steps)

    def turn() -> None:
        step = next(left, sender.stop_sender)
        step()

    clock.at_sleep = turn
    sender.monitor_and_upload()


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    """The URL of a port at which connections are neither taken nor refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/ingest"
