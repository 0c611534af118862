"""Whole lives of a sensor, each made from one number, in virtual time: the real sender.py in a world that breaks.

    python tests/simulation.py --seeds 0:100000      lives on two processes, and a line for each that goes wrong
    python tests/simulation.py --seed 4711           one life, told as a story of at most a screen
    ... --sender PATH                                another sender.py

In the manner of FoundationDB's and TigerBeetle's simulators. Real are sender.py, loaded afresh at each start, and its
folder. Made up are the clock, the wire (at requests' adapter), the server behind it, the producer, and the host: kills,
power cuts, SIGTERM, changed settings, wrong clocks, a full disk, permissions, a person. Each life mixes some of these;
then all heals, and it must come to rest. What must be true at each request is in `Ledger`, what must be true in the
end in `Life.balance`. Whatever is not is raised as `Wrong`, which no handler of sender.py catches.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple, Union
from unittest import mock

import requests
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPResponse
from urllib3.exceptions import ConnectTimeoutError, MaxRetryError, NewConnectionError, ProtocolError, ReadTimeoutError

SENDER = Path(__file__).resolve().parent.parent / "sender.py"
PENDING, FAILED, PROCESSED = "pending_upload", "failed_uploads", "processed"
TAKEN, STATE, READY = ".taken", ".state", ".ready"
WORD, TOKEN, PASSWORD = "pl4intext-of-a-packet", "t0ken-of-the-sensor", "hunter2-of-the-url"  # never in the log
ODD_NAMES = ('a b "c".json', "new\nline.json", "%s%d.json", "\x1b[31m\udcff.json", "x.json.json")
ROOM = 1000  # numbers of packets that each capture has for itself
SCREEN = 50  # lines of a story


class Killed(BaseException):
    """The end of the process: nothing that it still does has an effect."""


class Wrong(BaseException):
    """What is not as it must be."""


# ---------------------------------------------------------------- what a life is made of

# Each life has about a third of these: what is left out matters as much as what is in ("swarm testing").
FEATURES = (
    "bad packets", "bad runs", "limit", "slow", "moods", "lost answers", "lies", "idle resets", "kills", "power cuts",
    "stops", "resizing", "cron", "clock", "full disk", "permissions", "hiccups", "person", "same names", "disorder",
    "growing", "corrupt", "odd names", "markers", "collisions", "gzip", "large", "races",
)  # fmt: skip

Reply = Union[int, str]  # a status, or what becomes of the connection
AWAY, PAGE = ("refused", "unreachable"), "web page"
UNANSWERED = ("reset", "timeout", "truncated", 408, 502, 504)
BAD: tuple[Reply, ...] = (400, 403, 404, 408, 413, 415, 422, 500, 501, 502, 504, "reset", "timeout")  # to a bad packet
LIMIT = "limits the rate"
MOODS: dict[str, tuple[Reply, ...]] = {  # what a request may be answered with for a while, before anything is stored
    "refuses connections": ("refused",),
    "cannot be reached": ("unreachable",),
    "is busy": (503, 429, 409, 425),
    "wants a token": (401,),
    "redirects": (302, 307),
    "is behind a portal": (PAGE,),
    "answers 500": (500,),
    "chokes": (500, 502, 503, "reset"),
    "refuses everything": (422, 400, 403),
    "breaks off": ("reset", "truncated", "timeout", 504),
    LIMIT: (429,),
}


def outcome(reply: Reply) -> str:
    """The row of SPEC 5's table."""
    if reply in AWAY:
        return "away"
    if reply in UNANSWERED:
        return "unanswered"
    if reply in (409, 425, 429, 503):
        return "busy"
    if reply in (401, 407, PAGE) or 300 <= int(reply) < 400:
        return "misconfigured"
    return "delivered" if int(reply) < 300 else "fault" if int(reply) >= 500 else "rejected"


@dataclass(eq=False)
class Batch:
    """Packets that were sent under one key, and what became of them."""

    start: int
    end: int
    stored: bool = False
    told: bool = False  # the sender knows that they are
    lied: bool = False  # they are, and it was told of a failure
    lost_in_search: bool = False  # its last answer was lost, and it was a piece of a suspected batch
    lost_by: int = -1  # the process that lost the answer of success
    rounds: set[object] = field(default_factory=set)  # in which it went without an answer
    excuse: str = ""  # it may be cut anew, whatever its answers: SPEC's (c) size, (d) person, (e) disk

    def __str__(self) -> str:
        return f"[{self.start}:{self.end})"


@dataclass(eq=False)
class Capture:
    """One file of the producer's, and what has become of it."""

    first: int  # packet's number; the others follow
    name: str
    count: int  # packets
    text: bytes  # what is in it, and must be found in the end
    mtime: int = 0  # in ns, as it must be in the end
    valid: bool = True
    grown: tuple[int, bytes] | None = None  # packets and text when its producer or a person has gone on
    texts: list[bytes] = field(default_factory=list)  # what it has been
    batches: dict[tuple[int, int], Batch] = field(default_factory=dict)
    last: Batch | None = None  # the last request's
    last_round: tuple[int, object] = (-1, None)  # that this request belonged to: process and sweep
    began: tuple[int, int] = (-1, -1)  # the first request's in this round
    answers: list[str] = field(default_factory=list)  # in this round
    search: tuple[int, int] | None = None  # the suspected batch whose pieces go out
    inherited: tuple[int, int] | None = None  # this process' first request, which may be larger than BATCH_SIZE
    tried: int = 0  # the last sweep
    doubtful: bool = False  # somebody changed it or its record, which need not tell what is sent
    unsaved: bool = False  # nor where the disk refused that, until it has taken it
    disturbed: int = -1  # by a person or its producer, while that process lived
    ready: int | None = None  # turns of failed files when it became ready; None: not, or it has been tried

    def __str__(self) -> str:
        return ascii(self.name)[1:-1]

    @property
    def in_doubt(self) -> bool:
        return self.doubtful or self.unsaved

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + self.count)

    def disturb(self, process: int, reason: str) -> None:
        """What is on the wire may go out once more, in other batches."""
        self.doubtful, self.disturbed = True, process
        for batch in self.batches.values():
            batch.excuse, batch.told = reason, False


# ---------------------------------------------------------------- the disk


class Written(io.FileIO):
    """A file that the sender writes."""

    def __init__(self, disk: Disk, path: str, fd: int) -> None:
        super().__init__(fd, "w")
        self.disk, self.path = disk, path

    def write(self, data: Any) -> int:
        return self.disk.write(self.path, bytes(data), super().write)


class Disk:
    """The sender's file operations in `root`: counted, refused, undone by a power cut; and the end at one of them."""

    def __init__(self, root: Path, life: Life) -> None:
        self.root, self.life = str(root), life
        self.at_work = False  # the sender is; what the world does is neither counted nor refused
        self.where: dict[str, Capture] = {}  # by path
        self.full = False
        self.closed: dict[str, bool] = {}  # folders without permission; True: not even to look
        self.files: dict[int, str] = {}  # paths of descriptors
        self.unsynced: set[str] = set()  # paths whose content is in memory only
        self.begin(-1, "before", "", set(), False)

    def begin(self, fatal: int, manner: str, calls: str, hiccups: set[int], power_cut: bool) -> None:
        """A new process: at which of these calls it ends, and points at which an operation fails once."""
        self.dead, self.points, self.looks, self.refusals = False, 0, 0, 0
        self.fatal, self.manner, self.calls, self.hiccups = fatal, manner, calls, hiccups
        self.undo: list[Callable[[], None]] | None = [] if power_cut else None  # since the last flush

    def short(self, path: str) -> str:
        return path[len(self.root) + 1 :]

    def mine(self, path: Any) -> bool:
        return self.at_work and isinstance(path, (str, os.PathLike)) and str(path).startswith(self.root)

    def look(self, path: Any) -> None:
        if self.mine(path):
            if self.dead:
                raise Killed
            self.busy()
            self.refuse("look", str(path))

    def busy(self) -> None:
        self.looks += 1
        if self.looks > 50_000:
            raise Wrong("busy without a pause: 50,000 looks and log lines, nothing sent, written or waited for")

    def refuse(self, call: str, *paths: str) -> None:
        """Raise what a full disk, a missing permission or a virus scanner makes of an operation."""
        error: OSError | None = None
        for path in paths:
            folder = self.short(path).partition(os.sep)[0]
            if folder in self.closed and (call != "look" or self.closed[folder]):
                error = PermissionError(13, "Permission denied", path)
        if self.full and call in ("create", "write", "mkdir"):
            error = OSError(28, "No space left on device", paths[0])
        if call not in ("look", "request") and self.points in self.hiccups:
            error = PermissionError(13, "Permission denied", paths[0]) if self.points % 2 else OSError(5, "I/O error")
        if error:
            self.refusals += 1
            self.undo = None if call == "fsync" else self.undo  # a power cut after that is nobody's fault
            self.life.on_refusal(call, paths)
            raise error

    def step(self, call: str, do: Callable[[], Any], *paths: str) -> Any:
        """One operation that leaves a trace; perhaps the last one."""
        if self.dead:
            raise Killed
        self.points, self.looks = self.points + 1, 0
        counts = call in self.calls and (self.life.watching or "mkdir" in self.calls)
        self.fatal -= counts
        last = counts and self.fatal == 0
        if last and self.manner == "before":
            self.die(f"before {call} {self.short(paths[0])}")
        self.refuse(call, *paths)
        self.life.producer.race(call, paths[0])
        if self.undo is not None:
            self.remember(call, *paths)
        result = do()
        if call == "rename":
            self.moved(*paths)
        if last:
            self.die(f"after {call} {self.short(paths[-1])}")
        return result

    def write(self, path: str, data: bytes, step: Callable[[bytes], int]) -> int:
        if self.dead:
            return len(data)  # what a dead process has in its buffers is lost

        def in_two() -> None:
            step(data[: len(data) // 2])
            if self.fatal == 0 and self.manner == "half":
                self.die(f"amid write {self.short(path)}")
            step(data[len(data) // 2 :])

        self.unsynced.add(path)
        self.step("write", in_two, path)
        return len(data)

    def die(self, where: str) -> None:
        self.dead = True
        self.life.tell(f"KILLED {where}")
        raise Killed

    def moved(self, source: str, target: str) -> None:
        self.unsynced = {target if path == source else path for path in self.unsynced}
        if source in self.where:
            capture = self.where[target] = self.where.pop(source)
            self.life.tell(f"  {capture} is now {ascii(self.short(target))[1:-1]}", capture)
        for capture in self.recorded(target):
            capture.unsaved = False

    def recorded(self, record: str) -> list[Capture]:
        """Whose record this is."""
        paths = (record[: -len(STATE)], record[: -len(STATE)] + TAKEN) if record.endswith(STATE) else ()
        return [self.where[path] for path in paths if path in self.where]

    @contextlib.contextmanager
    def of_others(self) -> Iterator[None]:
        """What the world does is not on trial: not counted, not refused, not undone."""
        at_work, self.at_work = self.at_work, False
        yield
        self.at_work = at_work
        self.flushed()

    # -------- power cuts

    def remember(self, call: str, path: str, target: str = "") -> None:
        """How to undo an operation that is only in the journal."""
        assert self.undo is not None
        old = target or path
        content = Path(old).read_bytes() if call in ("rename", "unlink") and os.path.isfile(old) else None
        kept = os.stat(old).st_mtime_ns if content is not None else 0
        unsaved = [capture for capture in self.recorded(target) if capture.unsaved]

        def restore() -> None:
            if call == "rename" and os.path.exists(target):
                os.rename(target, path)
                self.moved(target, path)
            if call == "create" and os.path.exists(path):
                os.unlink(path)
            if content is not None:
                Path(old).write_bytes(content)
                os.utime(old, ns=(kept, kept))
            for capture in unsaved:
                capture.unsaved = True

        self.undo.append(restore)

    def fsync(self, fd: int) -> None:
        """A flush of a file or folder; it takes the journal before it along, as ext4, APFS and NTFS do."""
        path = self.files.get(fd, "")

        def flush() -> None:
            self.unsynced.discard(path)
            self.flushed()

        if self.at_work and path:
            self.step("fsync", flush, path)

    def flushed(self) -> None:
        if self.undo:
            self.undo.clear()

    def cut_power(self, rng: random.Random) -> None:
        """What was not flushed is gone from some moment on; of a file's content that was not, half is."""
        if self.undo is not None:
            lost = rng.randint(0, len(self.undo))
            self.life.tell(f"  it was a power cut: {lost} steps are lost")
            for _ in range(lost):
                self.undo.pop()()
            for path in sorted(self.unsynced):
                if os.path.exists(path):
                    os.truncate(path, os.path.getsize(path) // 2)
        self.unsynced.clear()

    # -------- the hooks

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        real: dict[str, Any] = {
            "open file": open,
            **{name: getattr(os, name) for name in ("open", "write", "scandir", "lstat")},
        }

        def traced(call: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(path: Any, *arguments: Any, **options: Any) -> Any:
                if not self.mine(path):
                    return function(path, *arguments, **options)
                paths = [str(path)] + ([str(arguments[0])] if call == "rename" else [])
                return self.step(call, lambda: function(path, *arguments, **options), *paths)

            return wrapper

        def looking(path: Any, **options: Any) -> Any:
            self.look(path)
            return real["lstat"](path, **options)

        def in_order(path: Any) -> Any:
            self.look(path)
            with real["scandir"](path) as entries:
                return contextlib.nullcontext(sorted(entries, key=lambda entry: str(entry.name)))

        def opening(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not self.mine(path):
                return int(real["open"](path, flags, *arguments, **options))
            name, do = str(path), functools.partial(real["open"], path, flags, *arguments, **options)
            creates = flags & os.O_CREAT and (flags & os.O_EXCL or not os.path.exists(name))
            if not creates:
                self.look(path)
            fd = int(self.step("create", do, name) if creates else do())
            self.files[fd] = name
            return fd

        def opening_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            path = self.files.get(file, "") if isinstance(file, int) else file
            if not self.mine(path) or mode.strip("bt") == "r":
                self.look(path)
                return real["open file"](file, mode, *arguments, **options)
            flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if "x" in mode else os.O_TRUNC)
            fd = file if isinstance(file, int) else opening(path, flags, 0o666)
            return io.BufferedWriter(Written(self, str(path), fd))

        def writing(fd: int, data: bytes) -> int:
            step = functools.partial(real["write"], fd)
            return self.write(self.files[fd], data, step) if self.at_work and fd in self.files else step(data)

        hooks: dict[str, Any] = {name: traced(name, getattr(os, name)) for name in ("unlink", "mkdir", "utime", "link")}
        hooks.update(remove=hooks["unlink"], rename=traced("rename", os.rename), replace=traced("rename", os.replace))
        hooks.update(lstat=looking, scandir=in_order, fsync=self.fsync, write=writing, open=opening)
        hooks.update(register_at_fork=lambda **_: None)  # it would keep each module for ever
        with mock.patch.multiple(os, **hooks), mock.patch("builtins.open", opening_file):
            yield


# ---------------------------------------------------------------- the server, and the network before it


class Server:
    """Knows keys, and stores a batch and its key in one transaction."""

    def __init__(self, life: Life) -> None:
        self.life, self.rng = life, life.rng
        self.times: Counter[int] = Counter()  # each packet was stored
        self.moods: list[tuple[str, float]] = []  # and the chance that one strikes
        self.lost = self.lies = 0.0  # chances
        self.pace = 0.0  # seconds a packet
        self.limit, self.over_limit = sys.maxsize, BAD[0]  # packets in a batch; the answer to a larger one
        self.bad: dict[int, Reply] = {}  # packets, and the answer to a batch with one
        self.used_at = self.accepted_at = 0.0

    def answer(self, capture: Capture, batch: Batch, timeout: float) -> tuple[Reply, float]:
        """What a request is answered, after how many seconds. Stores the batch, or does not."""
        now, chance = self.life.now, self.rng.random
        idle, self.used_at = now - self.used_at, now
        if "idle resets" in self.life.features and self.life.born + 5 < now - 5 and 5 < idle <= 60 and chance() < 0.5:
            self.used_at = now - 1
            return "reset", 0.01
        for mood, often in self.moods:
            strikes = now < self.accepted_at + 2 if mood == LIMIT else chance() < often
            if strikes:
                reply = self.rng.choice(MOODS[mood])
                return reply, timeout if reply in ("timeout", "unreachable") else 0.05
        packets = capture.numbers[batch.start : batch.end]
        took = 0.01
        if not batch.stored:
            took += self.pace * len(packets)
            trouble = [self.bad[number] for number in packets if number in self.bad]
            trouble += [self.over_limit] if len(packets) > self.limit else []
            if trouble:
                return trouble[0], timeout if trouble[0] == "timeout" else min(took, timeout)
            batch.stored, self.accepted_at = True, now
            self.times.update(packets)
        if chance() < self.lost:
            reply = self.rng.choice(UNANSWERED)
            return reply, timeout if reply == "timeout" else min(took, timeout)
        if chance() < self.lies:
            return self.rng.choice((500, 413, 422, 400)), min(took, timeout)
        return (200, took) if took < timeout else ("timeout", timeout)


def error_for(reply: str) -> requests.RequestException:
    """What requests raises for a connection that ends so."""
    pool: Any = None
    if reply == "refused":
        new = NewConnectionError(pool, "Failed to establish a new connection: [Errno 111] Connection refused")
        new.__cause__ = ConnectionRefusedError(111, "Connection refused")
        never = MaxRetryError(pool, "/ingest", new)
        never.__cause__ = new
        return requests.ConnectionError(never)
    if reply == "unreachable":
        slow = ConnectTimeoutError(pool, "Connection to server.test timed out")
        return requests.exceptions.ConnectTimeout(MaxRetryError(pool, "/ingest", slow))
    if reply == "timeout":
        return requests.exceptions.ReadTimeout(ReadTimeoutError(pool, "/ingest", "Read timed out."))
    reset = ConnectionResetError(104, "Connection reset by peer")
    return requests.ConnectionError(ProtocolError("Connection aborted.", reset))


def response_for(reply: Reply, packets: int, retry_after: str) -> requests.Response:
    status = 200 if isinstance(reply, str) else reply
    text = json.dumps({"status": "success", "packets_received": packets})
    if reply == PAGE:
        text = "\n<!DOCTYPE html><html><title>Log in</title>"
    elif status != 200:
        text = f'{{"detail": "no\r\n\x1b[31m{TOKEN} {PASSWORD} {"x" * 400}"}}'
    headers = {"Content-Length": str(len(text) + (9 if reply == "truncated" else 0)), "Location": "https://login.test/"}
    headers.update({"Retry-After": retry_after} if retry_after else {})
    response = requests.Response()
    response.status_code, response.headers = status, CaseInsensitiveDict(headers)
    body: Any = io.BytesIO(text.encode())
    response.raw = HTTPResponse(body=body, status=status, headers=headers, preload_content=False)
    return response


# ---------------------------------------------------------------- what must be true at each request


class Ledger:
    """Holds each request against the disk, the requests before it, and SPEC's list of exceptions."""

    def __init__(self, life: Life) -> None:
        self.life, self.where = life, life.disk.where

    def path(self, capture: Capture) -> str:
        return next((path for path, other in self.where.items() if other is capture), "")

    def record(self, path: str) -> dict[str, Any]:
        """The record that belongs to the data at `path`; empty where there is none."""
        name = path[: -len(TAKEN)] if path.endswith(TAKEN) else path
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            status, content = os.stat(path), json.loads(Path(name + STATE).read_bytes())
            if (content["size"], content["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
                return dict(content)
        return {}

    def told_by_disk(self, capture: Capture) -> set[tuple[int, int]]:
        """The batches that may be on the wire, by the disk alone (SPEC 3)."""
        record = self.record(self.path(capture))
        if not record or record["packets"] < 0:
            return {(0, min(self.life.batch_size, capture.count))}
        start = record["uploaded"]
        if start == capture.count:
            return {(number, number + 1) for number in record["refused"]}
        return {(start, min(start + record["batch_size"], capture.count))}

    def enter(self, capture: Capture, span: tuple[int, int]) -> Batch:
        """A request that is about to go out. Raises Wrong where it must not."""
        path, what = self.path(capture), f"{capture} [{span[0]}:{span[1]})"
        if not (path.endswith(TAKEN) or f"{os.sep}{FAILED}{os.sep}" in path):
            raise Wrong(f"{what} is sent, but the file is {self.life.disk.short(path) or 'gone'}")
        if not capture.valid:
            raise Wrong(f"{what} is sent, but the file is no capture")
        batch = capture.batches.setdefault(span, Batch(*span))
        told = self.told_by_disk(capture)
        if span in told:
            capture.doubtful = False
            batch.excuse = batch.excuse if capture.disturbed == self.life.starts else ""
        elif not capture.in_doubt:
            raise Wrong(f"{what} is sent, but the disk tells of {sorted(told)}")
        if batch.told and capture.disturbed != self.life.starts:
            raise Wrong(f"{what} is delivered, as the sender knows, and is sent again")
        capture.inherited = capture.inherited or span
        if span[1] - span[0] > self.life.batch_size and span != capture.inherited:
            raise Wrong(f"{what} is more than BATCH_SIZE={self.life.batch_size}")
        self.note_search(capture, span, (self.life.starts, self.round(path)))
        for other, earlier in capture.batches.items():
            if earlier.stored and other != span and other[0] < span[1] and span[0] < other[1]:
                self.check_repeat(capture, earlier, what)
        this_round = (self.life.starts, self.round(path))
        if this_round != capture.last_round:
            self.check_begin(capture, span, path)
            capture.began, capture.answers = span, []
        capture.last, capture.last_round, capture.ready = batch, this_round, None
        return batch

    def check_begin(self, capture: Capture, span: tuple[int, int], path: str) -> None:
        """After a round that has shown nothing the next one begins with the same batch (SPEC 5)."""
        last, starts = capture.batches.get(capture.began), self.life.starts
        odd = (
            not last
            or last.excuse
            or capture.in_doubt
            or starts == capture.disturbed
            or starts != capture.last_round[0]
        )
        ended = capture.answers[-1:] in (["fault"], ["rejected"], ["unanswered"]) and "delivered" not in capture.answers
        sent = self.record(path).get("uploaded") == capture.count
        if ended and not (odd or sent) and capture.began[0] == span[0] and capture.began != span:
            raise Wrong(f"{capture} {last} was answered {capture.answers}, and the next round begins with {span}")

    def round(self, path: str) -> object:
        return self.life.sweeps if f"{os.sep}{FAILED}{os.sep}" in path else PENDING

    def note_search(self, capture: Capture, span: tuple[int, int], this_round: tuple[int, object]) -> None:
        """A part of the batch that failed just before is a piece of it, and so are the other parts of that."""

        def piece_of(outer: tuple[int, int]) -> bool:
            return outer != span and outer[0] <= span[0] and span[1] <= outer[1]

        last, goes_on = capture.last, capture.search and piece_of(capture.search)
        if goes_on and capture.last_round[0] != this_round[0]:
            return  # after a restart
        if this_round != capture.last_round or not last:
            capture.search = None
        elif not goes_on:
            failed = (last.start, last.end)
            capture.search = failed if piece_of(failed) and not last.told else None

    def check_repeat(self, capture: Capture, batch: Batch, what: str) -> None:
        """`batch` is stored, and packets of it go out in another one: one of the listed exceptions, and no other."""
        if batch.told and not batch.excuse:
            raise Wrong(f"{capture} {batch} is stored, as the sender knows, and is in {what} again")
        unknown = batch.lost_in_search or len(batch.rounds) > 1  # (a)
        if not (batch.excuse or batch.lied or unknown):  # (c) to (e), (b)
            raise Wrong(f"{capture} {batch} is stored without an answer, and cut anew to {what} for no listed reason")

    def note_answer(self, capture: Capture, batch: Batch, reply: Reply, idle: bool) -> None:
        """A reset of an idle connection is no answer: the repeat's is judged by itself."""
        what = outcome(reply)
        batch.lost_in_search = what == "unanswered" and capture.search is not None
        if what == "unanswered":
            batch.rounds.add(self.round(self.path(capture)))
            batch.lost_by = self.life.starts if batch.stored and not (reply == "reset" and idle) else batch.lost_by
        this_round = self.round(self.path(capture))
        answered = batch.lost_by != self.life.starts or batch.rounds - {this_round} or capture.search is not None
        batch.lied = batch.stored and (batch.lied or (what in ("fault", "rejected") and bool(answered)))
        batch.told = what == "delivered"
        capture.answers.append(what)

    def end_of_process(self) -> None:
        """From now on the sender knows what the disk tells, and nothing else."""
        for path, capture in self.where.items():
            told, record = self.told_by_disk(capture), self.record(path)
            done, refused = record.get("uploaded", 0), record.get("refused", ())
            for span, batch in capture.batches.items():
                batch.told &= capture.disturbed != self.life.starts and (batch is not capture.last or span not in told)
                if capture.in_doubt and (batch.end > done or span in told or batch.start in refused):
                    batch.excuse, batch.told = "(e)", False
            capture.inherited = None

    def new_size(self) -> None:
        """BATCH_SIZE is another one: where there is no record, what is on the wire is cut anew."""
        for path, capture in self.where.items():
            for batch in capture.batches.values() if not self.record(path) else ():
                batch.excuse, batch.told = "(c)", False


# ---------------------------------------------------------------- the producer


class Producer:
    """Writes captures as the sniffer does, or worse."""

    def __init__(self, life: Life) -> None:
        self.life, self.rng, self.folder = life, life.rng, life.root / PENDING
        self.names: list[str] = []
        self.serial = itertools.count(1)

    def has(self, feature: str, chance: float = 0.5) -> bool:
        return feature in self.life.features and self.rng.random() < chance

    def name(self) -> str:
        number = self.rng.randint(0, 99) if self.has("disorder") else 100 + len(self.names)
        name = f"cap_{number:03}.json"
        if self.has("odd names"):
            name = self.rng.choice(ODD_NAMES)
        if self.names and self.has("same names"):
            name = self.rng.choice(self.names)
        self.names.append(name)
        return name

    def text(self, first: int, count: int) -> bytes:
        """A capture in one of many layouts."""
        rng = self.rng
        odd = rng.choice(("", '"s": "}, {\\"n\\"", ', '"l": [{"n": 0}, {"n": 1}], ', '"o": {"n": [{}]}, '))
        gap, begin, end = rng.choice(
            ((", ", "[", "]"), (",", "[", "]"), (" ,\n ", "\ufeff[\n", "\n]\n"), (",\n", " [ ", " ]"))
        )
        packets = [
            f'{{{odd if rng.random() < 0.5 else ""}"n": {first + index}, "w": "{WORD}"}}' for index in range(count)
        ]
        return (begin + gap.join(packets) + end).encode()

    def spoil(self, text: bytes) -> bytes:
        some = text[: len(text) * 2 // 3]
        return self.rng.choice(
            (some, text[:-3] + b"\0" * 9, text + b"]", text.replace(b"]", b", 7]"), b"", b"{}", b"\xff[]")
        )

    def new(self, healthy: bool = False) -> Capture:
        """A capture that will be dropped, with its bad packets."""
        rng, first = self.rng, next(self.serial) * ROOM
        size = self.life.batch_size
        count = (
            1 if healthy else rng.choice((0, 1, 2, size, size + 1, rng.randint(1, 3 * size), rng.randint(1, 3 * size)))
        )
        count = rng.randint(20, 40) if not healthy and self.has("large", 0.3) else count
        text = self.text(first, count)
        capture = Capture(first, f"now_{first}.json" if healthy else self.name(), count, text)
        if healthy:
            return capture
        if self.has("corrupt"):
            capture.valid, capture.text, capture.grown = False, self.spoil(text), (count, text)
        elif count and self.has("growing"):
            more = count + rng.randint(1, 4)
            begun = text.rstrip()[:-1].rstrip() + rng.choice((b"", b",", b', {"n'))
            capture.grown = more, self.text(first, more)
            if rng.random() < 0.5:
                capture.valid, capture.text = False, begun
        answer, lasting = rng.choice(BAD), rng.choice((0, 0.5, 1))
        spoilt = [n for n in range(count) if self.has("bad packets", 0.2)]
        if count and self.has("bad runs"):
            begin = rng.randrange(count)
            spoilt += range(begin, min(count, begin + rng.randint(2, 7)))
        for number in spoilt:
            self.life.server.bad[first + number] = rng.choice(BAD) if rng.random() < 0.3 else answer
            if rng.random() < lasting:
                self.life.for_good.add(first + number)
        return capture

    def plan(self, begin: float, span: float) -> None:
        for _ in range(self.rng.randint(1, 7)):
            when, capture = begin + self.rng.uniform(0, span), self.new()
            late = self.rng.choice((0.0, 3.0, 70.0)) if self.has("markers") else 0.0
            alone = self.names.count(capture.name) == 1 and "same names" not in self.life.features
            if self.has("markers", 0.3) and alone:
                self.life.at(when - 2, (self.folder / (capture.name + READY)).touch)
            self.life.at(when, functools.partial(self.drop, capture, late == 0))
            if late:
                self.life.at(when + late, functools.partial(self.mark, capture))
            if capture.grown and (capture.valid or self.has("growing")):
                soon = self.rng.choice((0.0, 0.2, 1.0, 5.0, 30.0))
                self.life.at(when + late + soon, functools.partial(self.grow, capture))

    def drop(self, capture: Capture, mark: bool = True) -> None:
        path = str(self.folder / capture.name)
        if overwritten := self.life.disk.where.get(path):
            self.life.captures.remove(overwritten)  # its producer's own loss: nobody had taken it yet
        temporary = path + ".tmp"
        capture.mtime = self.life.put(temporary, capture.text)
        os.replace(temporary, path)
        self.life.disk.where[path] = capture
        self.life.captures.append(capture)
        capture.texts.append(capture.text)
        bad = [f"{n - capture.first}: {self.life.server.bad[n]}" for n in capture.numbers if n in self.life.server.bad]
        what = f"{capture.count} packets" + (f", bad {{{', '.join(bad)}}}" if bad else "")
        self.life.tell(f"{capture} dropped: {what if capture.valid else 'not valid'}", capture)
        if mark:
            self.mark(capture)

    def race(self, call: str, path: str) -> None:
        """Write a name anew at the very moment when the sender takes it, or removes its marker; go on while it is sent.

        Not the former where it may end there: that marker is gone with the one that was to go, and a person is told so.
        """
        name, disk, sent = os.path.basename(path).replace(READY, ""), self.life.disk, self.life.last_capture
        calm = not (disk.fatal >= 0 or disk.hiccups or disk.full or disk.closed or self.life.healed_at)
        if call in ("rename", "unlink") and name in self.names and calm and self.has("races", 0.2):
            with disk.of_others():
                capture = self.new()
                capture.name = name
                self.drop(capture)
        elif call == "request" and sent and sent.grown and self.has("races", 0.2):
            with disk.of_others():
                self.grow(sent)

    def mark(self, capture: Capture) -> None:
        if self.life.disk.where.get(str(self.folder / capture.name)) is capture:
            (self.folder / (capture.name + READY)).touch()
            capture.ready = self.life.turns

    def grow(self, capture: Capture) -> None:
        """Its producer goes on writing, unless the file has reached processed/: then nobody can know any more."""
        path = self.life.ledger.path(capture)
        if path and capture.grown and f"{os.sep}{PROCESSED}{os.sep}" not in path and not self.life.healed_at:
            self.life.tell(f"{capture} grows to {capture.grown[0]} packets", capture)
            self.life.rewrite(capture, path)


# ---------------------------------------------------------------- a life


def damaged(path: Path) -> bool:
    """What a person has made of a record: nobody can tell that it was one, so it is kept."""
    return path.suffix == STATE and path.read_bytes().endswith(b"\0")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self, life: Life) -> None:
        self.life, self.sleep = life, life.sleep

    def monotonic(self) -> float:
        return self.life.now

    def time(self) -> float:
        return self.life.now + self.life.wall_offset

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Wall(datetime):
    """Stands in for datetime."""

    clock: Clock

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Wall:
        return cls.fromtimestamp(cls.clock.time(), tz)


class Ears(logging.Handler):
    def __init__(self, life: Life) -> None:
        super().__init__()
        self.emit = life.on_log  # type: ignore[method-assign]


class Line(NamedTuple):
    at: float
    text: str
    about: Capture | None


class Life:
    """One life: the world around one sender, from its first start until it is at rest."""

    def __init__(self, seed: int, code: types.CodeType, folder: Path) -> None:
        self.code, self.root = code, folder / "logs"
        self.rng = rng = random.Random(seed)
        self.features = {feature for feature in FEATURES if rng.random() < 0.33}
        self.now, self.wall_offset = 1000.0, 1_700_000_000.0
        self.born = self.now  # the process
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.serial = itertools.count()
        self.story: list[Line] = []
        self.sender: Any = None
        self.clock = Clock(self)
        self.captures: list[Capture] = []
        self.for_good: set[int] = set()  # packets that stay bad
        self.starts = self.sweeps = self.requests = self.said = self.turns = 0
        self.watching = self.doomed = self.over = False
        self.ended = False  # this sweep, by an answer
        self.stopped_at = self.healed_at = self.rested_at = 0.0
        self.asked_since_stop = self.asked_until_healed = 0
        self.last_look = (0, 0)
        self.last_capture: Capture | None = None
        self.due: list[tuple[Capture, int]] = []  # what this sweep must try, and in which sweep it was tried last
        self.answers: list[tuple[Capture, str]] = []  # since it began
        self.batch_size = rng.choice((1, 2, 3, 4, 5, 8))
        self.timeout, self.interval = rng.choice((2, 10, 30)), rng.choice((20, 60, 60, 300))
        self.settings = {
            "MAX_RETRIES": rng.choice((1, 2, 3, 3)), "RETRY_DELAY": rng.choice((0, 1, 5)),
            "POLL_INTERVAL": rng.choice((1, 5, 5, 15)), "REQUEST_TIMEOUT": self.timeout,
            "RETRY_FAILED_INTERVAL": self.interval, "COMPRESS": "gzip" if "gzip" in self.features else "none",
            "SERVER_URL": f"http://sensor:{PASSWORD}@server.test/ingest", "API_TOKEN": TOKEN, "LOGS_DIR": self.root,
        }  # fmt: skip
        self.span = rng.choice((20.0, 120.0, 600.0))  # seconds until all heals
        self.ends = rng.randint(1, 4) if {"kills", "power cuts"} & self.features else 0
        self.disk, self.server = Disk(self.root, self), Server(self)
        self.ledger, self.producer = Ledger(self), Producer(self)
        self.plan()

    # -------- time

    def at(self, when: float, happen: Callable[[], object]) -> None:
        heapq.heappush(self.events, (when, next(self.serial), happen))

    def tell(self, text: str, about: Capture | None = None) -> None:
        self.story.append(Line(self.now, text, about))

    def sleep(self, seconds: float) -> None:
        """What the sender does most of the time."""
        if self.disk.dead:
            raise Killed
        self.disk.looks = 0
        self.pass_time(max(seconds, 1e-3))
        if self.healed_at and not self.over:
            self.look_for_rest()

    def pass_time(self, seconds: float) -> None:
        """Let virtual time pass, and what is due happen."""
        end = self.now + seconds
        if self.events and self.events[0][0] <= end:
            with self.disk.of_others():
                while self.events and self.events[0][0] <= end:
                    when, _, happen = heapq.heappop(self.events)
                    self.now = max(self.now, when)
                    happen()
        self.now = max(self.now, end)
        if self.doomed and self.disk.at_work:
            self.disk.die("while it waited")

    # -------- what will happen

    def plan(self) -> None:
        rng, begin, has = self.rng, self.now, self.features.__contains__
        for folder in (PENDING, FAILED, PROCESSED):
            (self.root / folder).mkdir(parents=True)
        shown = " ".join(f"{name}={value}" for name, value in itertools.islice(self.settings.items(), 6))
        self.tell(f"BATCH_SIZE={self.batch_size} {shown}")
        self.tell(f"this life has: {', '.join(sorted(self.features)) or 'nothing odd'}")
        self.at(begin + self.span, self.heal)
        if has("limit"):
            self.server.limit = rng.randint(1, self.batch_size)
            self.server.over_limit = rng.choice((413, 413, 504, 500, "reset", "timeout"))
            self.tell(f"the server answers {self.server.over_limit} to more than {self.server.limit} packets")
        self.producer.plan(begin, self.span * 0.9)
        if has("collisions"):
            for name in self.producer.names[:1]:
                self.put(str(self.root / rng.choice((PROCESSED, FAILED)) / name), b"older, and no capture")
        for _ in range(rng.randint(1, 4) if has("moods") else 0):
            self.for_a_while(*self.mood())
        for feature, name in (("slow", "pace"), ("lost answers", "lost"), ("lies", "lies")):
            for _ in range(rng.randint(1, 2) if has(feature) else 0):
                self.for_a_while(*self.trouble(name))
        if has("full disk"):
            self.for_a_while("the disk is full", functools.partial(setattr, self.disk, "full"))
        if has("permissions"):
            folder, blind = rng.choice((PENDING, FAILED, PROCESSED)), rng.random() < 0.3
            what = f"{folder} may not be {'read' if blind else 'written'}"
            self.for_a_while(what, lambda shut: setattr(self.disk, "closed", {folder: blind} if shut else {}))
        moments = {"clock": self.jump, "person": self.interfere, "stops": self.stop, "kills": self.doom}
        for feature, happen in moments.items():
            for _ in range(rng.randint(1, 3) if has(feature) else 0):
                self.at(begin + rng.uniform(0, self.span), happen)

    def for_a_while(self, what: str, turn: Callable[[bool], object]) -> None:
        begin = self.now + self.rng.uniform(0, self.span)

        def change(on: bool) -> None:
            if not self.healed_at:
                self.tell(f"{what}{'' if on else ': no longer'}")
                turn(on)

        self.at(begin, functools.partial(change, True))
        self.at(begin + self.rng.choice((2, 15, 90, 400)), functools.partial(change, False))

    def mood(self) -> tuple[str, Callable[[bool], object]]:
        mood, server = (self.rng.choice(list(MOODS)), self.rng.choice((0.3, 0.6, 1.0))), self.server

        def turn(on: bool) -> None:
            server.moods = [*server.moods, mood] if on else [other for other in server.moods if other is not mood]

        return f"the server {mood[0]} ({mood[1]:.0%})", turn

    def trouble(self, name: str) -> tuple[str, Callable[[bool], object]]:
        much = self.rng.choice((0.2, 0.5, 0.9))
        if name == "pace":
            much = self.timeout * self.rng.uniform(0.3, 1.6) / self.batch_size
        words = {"pace": "needs {:.2g} s a packet", "lost": "loses {:.0%} of its answers", "lies": "lies ({:.0%})"}
        return f"the server {words[name].format(much)}", lambda on: setattr(self.server, name, much if on else 0.0)

    def heal(self) -> None:
        """From now on all is well, but for what stays; and the sniffer goes on."""
        self.tell("all heals")
        self.healed_at, self.asked_until_healed = self.now, self.requests
        self.server.moods, self.server.lost, self.server.lies, self.server.pace = [], 0, 0, 0
        self.server.bad = {number: reply for number, reply in self.server.bad.items() if number in self.for_good}
        if self.rng.random() < 0.5:
            self.server.limit = sys.maxsize
        self.disk.full, self.disk.closed, self.disk.hiccups, self.disk.fatal = False, {}, set(), -1
        self.doomed = False
        self.go_on()
        if self.rng.random() < 0.5:
            self.stop()

    def go_on(self) -> None:
        if not self.rested_at:
            self.producer.drop(self.producer.new(healthy=True))
            self.at(self.now + self.interval * self.rng.uniform(0.5, 1.5), self.go_on)

    # -------- the host and its person

    def stop(self) -> None:
        if self.watching and not self.stopped_at:
            self.tell("SIGTERM")
            self.stopped_at, self.asked_since_stop = self.now, 0
            self.sender.stop_sender()

    def doom(self) -> None:
        self.doomed = self.watching and not self.healed_at

    def jump(self) -> None:
        seconds = self.rng.choice((-86400, -300, 300, 40_000_000))
        self.wall_offset += seconds
        self.tell(f"the clock jumps by {seconds} s")

    def put(self, path: str, content: bytes) -> int:
        """Write into a file; its time is the life's, and no other file's."""
        with open(path, "r+b" if os.path.exists(path) else "wb") as file:
            file.write(content)
            file.truncate()
        ns = int((self.now + 1_700_000_000) * 1e9) + next(self.serial)
        os.utime(path, ns=(ns, ns))
        return ns

    def rewrite(self, capture: Capture, path: str) -> None:
        """Change the content, or only the time, of a file that may be on its way."""
        if capture.grown:
            capture.valid, (capture.count, capture.text), capture.grown = True, capture.grown, None
            capture.texts.append(capture.text)
        capture.mtime = self.put(path, capture.text)
        capture.disturb(self.starts, "(d)")

    def interfere(self, what: str = "") -> None:
        """A person touches or repairs a file, edits or removes its record, or moves both."""
        found = sorted(path for path in self.disk.where if path.endswith(TAKEN) or f"{os.sep}{FAILED}{os.sep}" in path)
        if not found or self.healed_at:
            return
        path = self.rng.choice(found)
        capture, name = self.disk.where[path], path[: -len(TAKEN)] if path.endswith(TAKEN) else path
        state, what = Path(name + STATE), what or self.rng.choice(("touch", "repair", "forget", "damage"))
        if what == "move":
            target = self.root / FAILED / Path(path).name
            if path.endswith(TAKEN) and not (target.exists() or target.with_suffix("").exists()):
                os.rename(path, target)
                self.disk.where[str(target)] = self.disk.where.pop(path)
                if state.exists():
                    os.replace(state, target.parent / state.name)
                self.tell(f"a person moves {capture} and its record to {FAILED}/", capture)
                if self.producer.has("same names"):
                    again = self.producer.new()
                    again.name = capture.name
                    self.producer.drop(again)
            return
        if what in ("touch", "repair"):
            grown, capture.grown = capture.grown, capture.grown if what == "repair" else None
            self.rewrite(capture, path)
            capture.grown = grown if what == "touch" else None
        elif state.exists():
            capture.disturb(self.starts, "(d)")
            state.unlink() if what == "forget" else state.write_bytes(state.read_bytes()[:-9] + b"\0" * 9)
        self.tell(f"a person: {what} {capture}", capture)

    def on_refusal(self, call: str, paths: tuple[str, ...]) -> None:
        if call != "look":
            self.tell(f"  refused: {call} {ascii(self.disk.short(paths[-1]))[1:-1]}")
        if any(path.endswith((STATE, ".tmp")) for path in paths):
            for capture in self.captures:
                capture.unsaved = True

    # -------- the sender's doings

    def wire(
        self, adapter: object, request: requests.PreparedRequest, stream: object = None, timeout: Any = None, *_: Any,
        **options: Any,
    ) -> requests.Response:  # fmt: skip
        """requests' adapter: one request and its answer."""
        self.requests += 1
        self.asked_since_stop += 1
        if self.stopped_at and self.asked_since_stop > 1:
            raise Wrong("it was asked to stop, and sends one request after the other")
        capture, span = self.identify(request)
        path = self.ledger.path(capture)
        repeat = capture is self.last_capture and capture.last and span == (capture.last.start, capture.last.end)
        if capture is not self.last_capture:
            self.turns, self.last_capture = self.turns + (FAILED in path), capture
        if self.ended and FAILED in path and not repeat:  # at once, on a new connection
            raise Wrong(f"{capture} is tried, although this sweep has shown that it is the server")
        batch, idle = self.ledger.enter(capture, span), 0.5 < self.now - self.server.used_at <= 60 + self.timeout
        self.check_turns()
        reply = self.disk.step("request", lambda: self.exchange(capture, batch), str(self.root / "server"))
        if reply in (*AWAY, "reset", "timeout", "truncated"):
            self.server.used_at = math.inf  # the next one goes over a connection of its own
        self.ledger.note_answer(capture, batch, reply, idle)
        self.answers.append((capture, outcome(reply)))
        capture.tried = self.sweeps
        ends = FAILED in path and outcome(reply) in ("away", "busy", "misconfigured")
        self.ended = ends or (self.ended and not repeat)
        if self.healed_at and self.now > self.healed_at + self.patience / 2:
            self.look_for_rest()  # a bad file that is tried without a pause must not hide it
        if self.requests - self.asked_until_healed > self.most_requests:
            raise Wrong(f"{self.requests - self.asked_until_healed} requests in {self.now - self.healed_at:.0f} s")
        if reply in (*AWAY, "reset", "timeout"):
            raise error_for(str(reply))
        busy = outcome(reply) == "busy" and self.rng.random() < 0.5
        return response_for(reply, batch.end - batch.start, str(self.rng.choice((1, 7, 60, 900))) if busy else "")

    def exchange(self, capture: Capture, batch: Batch) -> Reply:
        known = batch.stored
        reply, took = self.server.answer(capture, batch, self.timeout)
        note = ", known" if known else ", stored" if batch.stored else ""
        self.tell(f"  {capture} {batch} -> {reply}{note}" + (f", after {took:.1f} s" if took > 1 else ""), capture)
        self.pass_time(took)
        return reply

    def identify(self, request: requests.PreparedRequest) -> tuple[Capture, tuple[int, int]]:
        """Which packets of which capture a request holds; their bytes, its key and its token are as they must be."""
        body, headers = request.body, request.headers
        assert isinstance(body, bytes)
        if headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        try:
            numbers = [packet["n"] for packet in json.loads(body)]
            capture = next(capture for capture in self.captures if capture.first <= numbers[0] < capture.first + ROOM)
        except (ValueError, LookupError, TypeError, StopIteration):
            raise Wrong(f"what is sent is no batch of a capture: {body[:80]!r}") from None
        span = (numbers[0] - capture.first, numbers[0] - capture.first + len(numbers))
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise Wrong(f"{capture}: a batch is out of order: {numbers}")
        if body[:1] + body[-1:] != b"[]" or not any(body[1:-1] in text for text in capture.texts):
            raise Wrong(f"{capture} [{span[0]}:{span[1]}) is sent, but not byte for byte")
        if headers.get("Idempotency-Key") != f'"{hashlib.sha256(body).hexdigest()}"':
            raise Wrong(f"{capture} [{span[0]}:{span[1]}) is sent under the key {headers.get('Idempotency-Key')}")
        if headers.get("Authorization") != f"Bearer {TOKEN}" or headers.get("Content-Type") != "application/json":
            raise Wrong(f"the headers are {headers}")
        return capture, span

    def on_log(self, record: logging.LogRecord) -> None:
        """Each line that the sender says."""
        line = record.getMessage()
        self.said += 1
        self.disk.busy()
        if not line.isprintable() or not line or len(line) > 1000 or record.exc_info:
            raise Wrong(f"not a log line: {line!r}")
        if any(secret in line for secret in (WORD, TOKEN, PASSWORD)):
            raise Wrong(f"a secret in the log: {line}")
        self.watching |= line.startswith("Watching ")
        if line.endswith(" can wait: it is the server's trouble"):
            self.check_sweep(early=True)
        if line.startswith("Retrying ") and line.endswith(" failed uploads..."):
            self.check_sweep()
            self.sweeps, self.ended = self.sweeps + 1, False
            self.due = [
                (capture, capture.tried) for path, capture in self.disk.where.items() if self.is_due(path, capture)
            ]

    def is_due(self, path: str, capture: Capture) -> bool:
        if f"{os.sep}{FAILED}{os.sep}" not in path or not capture.valid or not capture.count:
            return False
        sent = self.ledger.record(path).get("uploaded") == capture.count
        return not sent and capture.disturbed != self.starts

    # -------- nobody is left behind

    def check_sweep(self, early: bool = False) -> None:
        """The sweep before this one has tried all that was due, or has ended early for a listed reason (SPEC 6)."""
        due, answers, self.due, self.answers = self.due, self.answers, [], []
        failed = {capture for capture, what in answers if what != "delivered"}
        whole, tried = {what for _, what in answers}, {capture for capture, _ in answers}
        latest = max((when for capture, when in due if capture in tried), default=0)
        for capture, when in due if "clock" not in self.features and not self.disk.refusals else ():
            if capture not in tried and when < latest and capture.disturbed < self.starts:
                raise Wrong(f"{capture} had no turn since sweep {when}, others in sweep {latest}")
        if whole & {"away", "busy", "misconfigured"} or self.disk.refusals:
            return
        if early and len(failed) >= 3 and "delivered" not in whole:
            return
        for capture, _ in due:
            if capture not in tried and capture.disturbed < self.starts and FAILED in self.ledger.path(capture):
                words = [what for _, what in answers[-9:]]
                raise Wrong(f"{capture} was not tried in this sweep, although the server is well: {words}")

    def check_turns(self) -> None:
        """No ready file waits while three failed ones have their turns (SPEC 3, 6)."""
        for path, capture in self.disk.where.items() if not self.disk.refusals else ():
            if capture.ready is None or PENDING not in path:
                continue
            if path + TAKEN in self.disk.where:  # first the older one of its name, which may rest
                capture.ready = self.turns
            waits = self.turns - capture.ready
            if waits > 2 and capture.count and capture.valid and capture.disturbed != self.starts:
                raise Wrong(f"{capture} is ready, and waits while {waits} failed files have their turns")

    def unfinished(self, newest: bool = True) -> str:
        """What is still to come, or nothing; perhaps without the newest files, for there are always some."""
        for path, capture in self.disk.where.items():
            age = self.now + 1_700_000_000 - capture.mtime / 1e9
            if not newest and capture.name.startswith("now_") and age < 2 * self.interval + 4 * self.timeout:
                continue
            missing = [number for number in capture.numbers if not self.server.times[number]] if capture.valid else []
            if set(missing) - self.for_good:
                return f"{capture}: packets {[number - capture.first for number in missing]} are not delivered"
            if (FAILED if missing or not capture.valid else PROCESSED) not in path:
                return f"{capture} is still {self.disk.short(path)}"
            record, numbers = self.ledger.record(path), [number - capture.first for number in missing]
            if FAILED in path and not record and capture.disturbed < 0:
                return f"{capture} has no record"  # the disk was full; it is written in its turn
            if missing and len(missing) < capture.count and record.get("refused") != numbers:
                return f"{capture}: {numbers} are missing, listed are {record.get('refused')}"
        left = [n for n in os.listdir(self.root / PENDING) if not n.endswith(READY) and (newest or n[:4] != "now_")]
        failed = {path.name for path in (self.root / FAILED).iterdir() if not damaged(path)}
        left += [name for name in failed if name.endswith(STATE) and not failed & {name[:-6], name[:-6] + TAKEN}]
        return f"left over: {sorted(left)}" if left else ""

    def look_for_rest(self) -> None:
        """After the healing: is it at rest, and does it stay so for more than a sweep? In bounded time and requests."""
        look = (self.requests, self.disk.points)
        if look == self.last_look and self.now < (self.rested_at or self.healed_at + self.patience):
            return
        self.last_look = look
        left = self.unfinished(newest=self.rested_at > 0)
        if left and self.now > max(self.rested_at, self.healed_at) + self.patience:
            raise Wrong(f"no rest {self.now - self.healed_at:.0f} s after all has healed: {left}")
        if not left and not self.rested_at:
            self.tell("at rest")
            self.rested_at = self.now
        if self.rested_at and not left and self.now > self.rested_at + 1.2 * min(self.interval, 60):
            self.over = True
            self.stop()

    @property
    def patience(self) -> float:
        """Seconds until rest: refused packets are tried hourly; a run of bad ones takes a sweep for each three."""
        return 3600.0 + 12 * self.interval + 60 * self.timeout

    @property
    def most_requests(self) -> int:
        return 200 + 15 * self.sweeps + 2 * sum(capture.count + 10 for capture in self.captures)

    # -------- the whole of it

    def run(self) -> None:
        """Live. Raises Wrong for what is not as it must be."""
        logger, ears = logging.getLogger("sender"), Ears(self)
        kept = (logger.level, logger.propagate, logger.handlers, logger.disabled)
        logger.level, logger.propagate, logger.handlers, logger.disabled = logging.INFO, False, [ears], False
        logger.manager._clear_cache()  # type: ignore[attr-defined]
        wire = functools.partialmethod(lambda adapter, *given, **options: self.wire(adapter, *given, **options))
        try:
            with self.disk.hooked(), mock.patch("requests.adapters.HTTPAdapter.send", wire):
                while not self.over:
                    self.one_process()
                    if not self.over:
                        self.between()
            self.balance()
        finally:
            logger.level, logger.propagate, logger.handlers, logger.disabled = kept
            logger.manager._clear_cache()  # type: ignore[attr-defined]

    def load(self) -> Any:
        """sender.py as a fresh module, with this life's settings, clock and luck."""
        settings = {**self.settings, "BATCH_SIZE": self.batch_size}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update({name: str(value) for name, value in settings.items()})
        module: Any = types.ModuleType("sender_in_simulation")
        sys.modules[module.__name__], module.__file__ = module, str(self.root.parent / "sender.py")
        try:
            exec(self.code, module.__dict__)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        module.time, module.random, Wall.clock = self.clock, self.rng, self.clock
        if hasattr(module, "datetime"):
            module.datetime = Wall
        return module

    def one_process(self) -> None:
        """From a start to the end, whichever way that comes."""
        rng = self.rng
        self.starts, self.born, self.watching, self.stopped_at = self.starts + 1, self.now, False, 0.0
        if self.starts > 400:
            raise Wrong(f"started 400 times; {self.unfinished()}")
        for capture in self.captures:
            capture.ready = None if capture.ready is None else self.turns
            capture.tried = self.sweeps  # what the last process was about is on no disk
        fatal, calls = -1, ""  # never
        if self.ends and not self.healed_at:
            calls, most = rng.choice(
                (("create write fsync rename unlink mkdir request", 99), ("rename unlink", 40), ("request", 20))
            )
            self.ends, fatal = self.ends - 1, rng.randint(1, rng.choice((most // 4, most)))
        few = {rng.randint(1, 150) for _ in range(3)} if "hiccups" in self.features and not self.healed_at else set()
        power_cut = "power cuts" in self.features and rng.random() < 0.7
        self.disk.begin(fatal, rng.choice(("before", "half", "after")), calls, few, power_cut)
        self.due, self.answers = [], []
        once = "cron" in self.features and rng.random() < 0.7
        self.tell(f"start {'--once ' if once else ''}with BATCH_SIZE={self.batch_size}")
        self.sender, self.disk.at_work = self.load(), True
        try:
            self.sender.monitor_and_upload(once=once)
            if once and not self.stopped_at:
                self.check_sweep()
        except Killed:
            self.disk.at_work = False
            self.disk.cut_power(rng)
        except OSError as error:
            if self.watching or not self.disk.refusals:
                raise Wrong(f"it ended with {error!r}") from error
            self.tell(f"it does not start: {error}")
            self.watching = False
        except Exception as error:
            where = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
            raise Wrong(f"it ended with {error!r} in {' < '.join(reversed(where))}") from error
        finally:
            self.disk.at_work = self.watching = self.doomed = False
        if self.stopped_at and self.now - self.stopped_at > 2 * self.timeout + 1:
            raise Wrong(f"asked to stop, it went on for {self.now - self.stopped_at:.0f} s")
        self.ledger.end_of_process()

    def between(self) -> None:
        """The host starts it again, perhaps with other settings."""
        started = self.now > self.born
        self.pass_time(self.rng.choice((0.1, 1, 30)) if started else 30)
        if self.producer.has("person"):  # mv pending_upload/* failed_uploads/
            self.interfere("move")
        if "resizing" in self.features and not self.healed_at and self.rng.random() < 0.6:
            before, self.batch_size = self.batch_size, self.rng.choice((1, 2, 3, 4, 5, 8))
            if before != self.batch_size:
                self.ledger.new_size()
        if self.healed_at:
            self.last_look = (0, 0)
            self.look_for_rest()

    def balance(self) -> None:
        """Every file is where it belongs, byte for byte, and its time is unchanged; nothing else is left."""
        if left := self.unfinished():
            raise Wrong(f"it was at rest, and is no more: {left}")
        for folder in (PENDING, FAILED, PROCESSED):
            meant = {path: capture for path, capture in self.disk.where.items() if Path(path).parent.name == folder}
            found = {str(path) for path in (self.root / folder).iterdir() if path.suffix not in (READY, ".tmp")}
            found -= {path for path in found if damaged(Path(path))}
            known = {path: path.replace(TAKEN, "") + STATE for path in meant}
            records = set(known.values()) if folder == FAILED else set()
            records -= {known[path] for path, capture in meant.items() if capture.disturbed >= 0}
            old = {path for path in found if path.endswith(".json") and Path(path).read_bytes().startswith(b"older")}
            older_record = {path + STATE for path in old}
            may_be = set(known.values()) - records  # a person has taken one away; the next sweep makes it again
            if extra := (found - old - older_record - may_be) ^ (meant.keys() | records):
                raise Wrong(f"in {folder}, too many or too few: {sorted(map(self.disk.short, extra))}")
            for path, capture in meant.items():
                stem, suffix = os.path.splitext(capture.name)
                if not re.fullmatch(
                    re.escape(stem) + r"(\.\d+)*" + re.escape(suffix) + rf"({TAKEN})?", Path(path).name
                ):
                    raise Wrong(f"{capture} has become {self.disk.short(path)}")
                if Path(path).read_bytes() != capture.text or os.stat(path).st_mtime_ns != capture.mtime:
                    raise Wrong(f"{self.disk.short(path)} is not what its producer wrote")
        if "collisions" in self.features and not any(
            b"older" in f.read_bytes()[:5] for f in self.root.glob("*/*.json")
        ):
            raise Wrong("a file that was there before is gone")


# ---------------------------------------------------------------- the command


def compiled(sender: Path) -> types.CodeType:
    return compile(sender.read_text(encoding="utf-8"), str(sender), "exec", dont_inherit=True)


def play(seed: int, code: types.CodeType) -> tuple[Life, str]:
    """One life, and what is wrong in it."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="sim", dir=shm))
    try:
        life = Life(seed, code, folder)
        try:
            life.run()
        except Wrong as wrong:
            return life, str(wrong)
        return life, ""
    finally:
        shutil.rmtree(folder)


def tell_story(life: Life, wrong: str) -> list[str]:
    """What happened, in at most a screen: what is about other files is left out first, then the middle."""
    lines: list[str] = []
    named = [capture for capture in life.captures if wrong.startswith(str(capture))]
    story = life.story
    if named and len(story) > SCREEN:
        story = [line for line in story if line.about in (None, *named)]
    for line in story:
        text = line.text
        if lines and lines[-1].split("  ", 1)[-1].partition("  (and ")[0] == text:
            times = int((re.findall(r"\(and (\d+) more\)$", lines[-1]) or ["0"])[0]) + 1
            lines[-1] = f"{lines[-1].partition('  (and ')[0]}  (and {times} more)"
        else:
            lines.append(f"{line.at - 1000:8.1f}  {text}")
    if len(lines) > SCREEN:
        lines[SCREEN // 3 : len(lines) - SCREEN * 2 // 3] = [f"          … {len(lines) - SCREEN} lines …"]
    return [*(line[:160] for line in lines), f"WRONG: {wrong}" if wrong else "All is well."]


def play_some(job: tuple[Path, Sequence[int]]) -> list[tuple[int, str]]:
    """For another process: the lives that went wrong."""
    code = compiled(job[0])
    played = ((seed, play(seed, code)[1]) for seed in job[1])
    return [(seed, wrong) for seed, wrong in played if wrong]


def play_all(sender: Path, seeds: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Play these lives on two processes. Gives, some at a time and in order, how many, and those that went wrong."""
    jobs = [(sender, seeds[at : at + 20]) for at in range(0, len(seeds), 20)]
    with multiprocessing.Pool(2) as pool:
        for job, found in zip(jobs, pool.imap(play_some, jobs)):
            yield len(job[1]), found


def main() -> int:
    parser = argparse.ArgumentParser(description="Whole lives of a sensor, in virtual time.")
    parser.add_argument("--seeds", metavar="A:B", default="0:1000", help="play these lives on two processes")
    parser.add_argument("--seed", type=int, metavar="N", help="play this life, and tell its story")
    parser.add_argument("--sender", type=Path, default=SENDER, help="another sender.py")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    os.environ["NETRC"] = os.devnull
    if options.seed is not None:
        life, wrong = play(options.seed, compiled(options.sender))
        print("\n".join(tell_story(life, wrong)))
        return int(bool(wrong))
    begin, end = map(int, options.seeds.split(":"))
    lives, failures, started = 0, 0, time.monotonic()
    for number, found in play_all(options.sender, range(begin, end)):
        lives, failures = lives + number, failures + len(found)
        for seed, wrong in found:
            print(f"\rseed {seed}: {wrong}", flush=True)
        pace = lives / (time.monotonic() - started) * 60
        print(f"\r{lives:,} lives, {failures:,} went wrong; {pace:,.0f} lives a minute ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
