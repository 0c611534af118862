"""Every file and network operation of a program, seen from outside: to end it there, to make the call fail, or to
write it down. The program itself is not touched: Python's audit events tell what is about to happen, and wrappers
around os, open() and sockets tell what has happened and what has no event. Nothing is really fsynced meanwhile.

    python tests/faults.py LOGS N sender.py --once      ends that process hard at its N-th point
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import os
import pathlib
import runpy
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from ingest_server import IngestHandler, IngestServer, Refusal, split_packets

BEFORE, HALF, AFTER = "before", "half", "after"
CRASHED = 9  # exit status
NETWORK = ("connect", "send", "recv")
LOOKS = ("lstat", "stat", "fstat", "read")
WITHOUT_TRACE = (*LOOKS, "scandir", "open", "recv")

_AUDITED = {
    "open": "open",
    "os.mkdir": "mkdir",
    "os.rename": "rename",  # os.replace too
    "os.remove": "unlink",  # os.unlink too
    "os.rmdir": "rmdir",
    "os.link": "link",
    "os.symlink": "symlink",
    "os.utime": "utime",
    "os.chmod": "chmod",
    "os.truncate": "truncate",
    "os.scandir": "scandir",
    "os.listdir": "scandir",
    "socket.connect": "connect",
}
_ENDS_TOLD = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "utime", "truncate", "ftruncate")
_WITHOUT_EVENT = ("lstat", "stat", "fstat", "fsync", "fdatasync")
_ACCESSOR = getattr(pathlib, "_NormalAccessor", None)  # up to Python 3.10 pathlib keeps its own references to os


class Killed(BaseException):
    """The end of the program, acted out in a thread: nothing that it still does has an effect."""


class Operation(NamedTuple):
    """One call. Paths are relative to the watched folder; the network has none."""

    call: str
    path: str = ""
    target: str = ""  # of a rename
    data: bytes = b""  # of a write

    def __str__(self) -> str:
        return f"{self.call} {self.path}" + (f" -> {self.target}" if self.target else "")


Observer = Callable[[Operation, str], None]  # may raise OSError, or Killed


class _Watch:
    """The operations of one thread on one folder and on sockets."""

    def __init__(self, folder: Path, observer: Observer, any_thread: bool = False) -> None:
        self.folder, self.observer, self.dead = str(folder), observer, False
        self.thread = None if any_thread else threading.get_ident()
        self.paths: dict[int, str] = {}  # of open file descriptors

    def tell(self, operation: Operation, phase: str) -> None:
        if self.dead:
            raise Killed
        try:
            self.observer(operation, phase)
        except Killed:
            self.dead = True
            raise

    def mine(self) -> bool:
        return self.thread in (None, threading.get_ident())

    def path(self, given: Any) -> str | None:
        """The path as seen from the watched folder; None when it is elsewhere."""
        if isinstance(given, int):
            return self.paths.get(given)
        path = os.fsdecode(given)
        if not f"{path}{os.sep}".startswith(self.folder + os.sep):
            return None
        return path[len(self.folder) + 1 :].replace(os.sep, "/") or "."

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        call = _AUDITED[event]
        if call == "connect":
            return self.tell(Operation(call), BEFORE)
        if call == "open" and isinstance(arguments[0], int):
            return None  # an open descriptor gets a file object
        path = self.path(arguments[0] if arguments[0] is not None else ".")
        if path is None:
            return None
        if call == "open" and arguments[2] & (os.O_CREAT | os.O_TRUNC):
            call = "create"
        return self.tell(Operation(call, path, self.path(arguments[1]) or "" if call == "rename" else ""), BEFORE)

    def in_two(self, operation: Operation, step: Callable[[bytes], Any]) -> int:
        """A write, with a point in its middle. What a dead program still has in its buffers is lost."""
        if self.dead:
            return len(operation.data)
        half = len(operation.data) // 2
        self.tell(operation, BEFORE)
        if half:
            step(operation.data[:half])
            self.tell(operation, HALF)
        step(operation.data[half:])
        self.tell(operation, AFTER)
        return len(operation.data)


class _File(io.FileIO):
    """A file whose reads and writes are told."""

    def __init__(self, watch: _Watch, told_as: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.watch, self.told_as = watch, told_as
        watch.paths[self.fileno()] = told_as

    def write(self, data: Any) -> int:
        return self.watch.in_two(Operation("write", self.told_as, data=bytes(data)), super().write)

    def readinto(self, buffer: Any) -> int | None:
        self.watch.tell(Operation("read", self.told_as), BEFORE)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.watch.tell(Operation("read", self.told_as), BEFORE)
        return super().readall()


_watch: _Watch | None = None
_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watch and event in _AUDITED and _watch.mine():
        _watch.audit(event, arguments)


def _told_after(watch: _Watch, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """For calls whose beginning is audited."""
    name = {"replace": "rename", "remove": "unlink", "ftruncate": "truncate"}.get(call, call)

    @functools.wraps(real)
    def wrapper(first: Any, *arguments: Any, **options: Any) -> Any:
        result = real(first, *arguments, **options)
        if watch.mine() and (path := watch.path(first)) is not None:
            target = watch.path(arguments[0]) or "" if name == "rename" else ""
            watch.tell(Operation(name, path, target), AFTER)
        return result

    return wrapper


def _told_around(watch: _Watch, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """For calls without an audit event."""

    @functools.wraps(real)
    def wrapper(first: Any, *arguments: Any, **options: Any) -> Any:
        path = watch.path(first) if watch.mine() else None
        if path is None:
            return real(first, *arguments, **options)
        watch.tell(Operation(call, path), BEFORE)
        result = None if call in ("fsync", "fdatasync") else real(first, *arguments, **options)
        watch.tell(Operation(call, path), AFTER)
        return result

    return wrapper


def _opening(watch: _Watch, real: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(real)
    def wrapper(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        fd = real(path, flags, *arguments, **options)
        if watch.mine() and (told_as := watch.path(path)) is not None:
            watch.paths[fd] = told_as
            watch.tell(Operation("create" if flags & (os.O_CREAT | os.O_TRUNC) else "open", told_as), AFTER)
        else:
            watch.paths.pop(fd, None)
        return fd

    return wrapper


def _file_opening(watch: _Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    """open() whose file objects tell of their reads and writes."""

    @functools.wraps(real)
    def wrapper(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        told_as = watch.path(file) if watch.mine() else None
        if told_as is None:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(watch, told_as, file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if not isinstance(file, int):
            watch.tell(Operation("open" if mode[0] == "r" else "create", told_as), AFTER)
        binary = (
            io.BufferedRandom(raw)
            if "+" in mode
            else io.BufferedReader(raw)
            if raw.readable()
            else io.BufferedWriter(raw)
        )
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding, errors, newline)

    return wrapper


@contextlib.contextmanager
def _breaking(sock: socket.socket) -> Iterator[None]:
    """An error that was put into a connection has ended it: what comes after fails as well."""
    try:
        yield
    except (OSError, Killed):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        raise


def _sending(watch: _Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    sendall = socket.socket.sendall

    def wrapper(sock: socket.socket, data: Any, *flags: int) -> Any:
        if not watch.mine():
            return real(sock, data, *flags)
        with _breaking(sock):
            return watch.in_two(Operation("send", data=bytes(data)), lambda part: sendall(sock, part, *flags))

    return wrapper


def _receiving(watch: _Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(sock: socket.socket, *arguments: Any) -> Any:
        if not watch.mine():
            return real(sock, *arguments)
        with _breaking(sock):
            watch.tell(Operation("recv"), BEFORE)
            result = real(sock, *arguments)
            watch.tell(Operation("recv"), AFTER)
        return result

    return wrapper


def _connecting(watch: _Watch, real: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any) -> Any:
        result = real(*arguments)
        if watch.mine():
            watch.tell(Operation("connect"), AFTER)
        return result

    return wrapper


def _os_writing(watch: _Watch, real: Callable[..., int]) -> Callable[..., int]:
    def wrapper(fd: int, data: Any) -> int:
        path = watch.path(fd) if watch.mine() else None
        if path is None:
            return real(fd, data)
        return watch.in_two(Operation("write", path, data=bytes(data)), lambda part: real(fd, part))

    return wrapper


@contextlib.contextmanager
def watched(folder: Path, observer: Observer, any_thread: bool = False) -> Iterator[None]:
    """Tell `observer` of every operation of this thread (or any) in `folder` and on sockets. It may raise instead.

    After Killed nothing that the thread does in here has an effect any more: neither a clean-up nor a file's buffer.
    """
    global _watch, _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # there is no way to remove one
        _hooked = True
    watch = _Watch(folder, observer, any_thread)
    with contextlib.ExitStack() as patches:

        def patch(module: Any, name: str, wrap: Callable[..., Any], *arguments: Any) -> None:
            if hasattr(module, name):
                real = getattr(module, name)
                wrapper = wrap(watch, *arguments, real)
                patches.enter_context(mock.patch.object(module, name, wrapper))
                if getattr(_ACCESSOR, name, None) is real:
                    patches.enter_context(mock.patch.object(_ACCESSOR, name, staticmethod(wrapper)))

        for call in _ENDS_TOLD:
            patch(os, call, _told_after, call)
        for call in _WITHOUT_EVENT:
            patch(os, call, _told_around, call)
        patch(os, "open", _opening)
        patch(os, "write", _os_writing)
        patch(builtins, "open", _file_opening)
        patch(io, "open", _file_opening)
        for name in ("recv", "recv_into"):
            patch(socket.socket, name, _receiving)
        patch(socket.socket, "connect", _connecting)
        patch(socket.socket, "send", _sending)
        patch(socket.socket, "sendall", _sending)
        _watch = watch
        try:
            yield
        finally:
            _watch = None


class Countdown:
    """Calls `end` at the N-th point; counts the points. A point is a moment around an operation that leaves a trace."""

    def __init__(self, number: int, end: Callable[[], None]) -> None:
        self.number, self.end, self.count = number, end, 0
        self.where = ""
        self.receiving = False

    def __call__(self, operation: Operation, phase: str) -> None:
        received, self.receiving = self.receiving, operation.call == "recv"
        if (operation.call in WITHOUT_TRACE and phase != BEFORE) or operation.call in LOOKS:
            return  # comes to the same as the point before
        if received and self.receiving:
            return  # in how many pieces an answer arrives is chance, and would make the numbers drift
        self.count += 1
        if self.count == self.number:
            self.where = f"{phase} {operation}"
            self.end()


def kill() -> None:
    raise Killed


# ---------------------------------------------------------------- a receiver with moods

STORED_BUT_CUT_OFF = 0  # a mood: the packets are stored, the connection ends without an answer


class _MoodyHandler(IngestHandler):
    def do_POST(self) -> None:
        moody: MoodyServer = self.server.moody  # type: ignore[attr-defined]
        try:
            packets = split_packets(self._read_body().decode())
        except Refusal as refusal:  # a request that was cut off in its headers
            return self._answer(refusal.status, {"detail": refusal.detail})
        status = moody.mood([json.loads(packet) for packet in packets])
        key = self.headers["Idempotency-Key"]
        if key in moody.stored and status in (413, 422, 500):
            status = 200  # what it has stored once it does not look at again
        if status not in (200, STORED_BUT_CUT_OFF):
            return self._answer(status, {"detail": f"scripted {status}"})
        moody.stored.add(key)
        moody.on_stored(key, packets)
        receipt = self.store.add(packets, key)
        if status == 200:
            return self._answer(200, {"status": "success", **receipt._asdict()})
        self.close_connection = True
        return None


class MoodyServer(IngestServer):
    """The embedded receiver, whose answers a test decides: `mood(packets)` returns the status; only 200 is stored."""

    def __init__(self, db_path: Path) -> None:
        self.mood: Callable[[list[dict[str, Any]]], int] = lambda packets: 200
        self.on_stored: Callable[[str, list[str]], None] = lambda key, packets: None
        self.stored: set[str] = set()  # keys
        super().__init__(db_path)
        self._http.moody = self  # type: ignore[attr-defined]
        self._http.RequestHandlerClass = _MoodyHandler

    def __enter__(self) -> MoodyServer:
        return self

    def start_afresh(self, db_path: Path) -> None:
        """Another, empty database, and no connections left from before."""
        self.sever_connections()
        self.db_path = self._http.db_path = db_path
        self.stored.clear()

    def sever_connections(self) -> None:
        """End every connection, and wait for the requests that were on their way."""
        self._http.sever_connections()


def main() -> None:
    logs, number, *sys.argv = sys.argv[1:]
    with watched(Path(logs), Countdown(int(number), lambda: os._exit(CRASHED)), any_thread=True):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
