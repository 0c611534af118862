#!/usr/bin/env python3
"""Upload what a packet sniffer captures: every packet, once, whatever breaks in between.

usage: python sender.py [--once | --status | --help | --version]

The sniffer writes X.json (an array of packet objects) into logs/pending_upload/ and then creates the marker
X.json.ready. Once a second this program takes what is ready, POSTs it in batches to SERVER_URL and moves the
file to logs/processed/ or logs/failed_uploads/; the latter is retried by itself.

The spool: states of one file. Each step between two rows is one rename; a crash leaves one of the rows, and
the next start goes on from it.

    state          pending_upload/                failed_uploads/           processed/   next step
    being written  X.json                                                                none, it has no marker
    ready          X.json, X.json.ready                                                  take it
    taken          X.json.taken (+ X.json.state)                                         upload what is left of it
    failed                                        X.json (+ X.json.state)                the next sweep
    done                                                                    X.json       none

X.json.state says how far the upload got and what failed last. X.rejected.json holds single packets that the
server will not have, X.rejected.json.state its reasons; they wait for a person. Nothing is ever overwritten:
where a name exists, the newcomer becomes X.1.json.

Delivery is at least once on the wire and exactly once for a server that honours Idempotency-Key: a batch whose
answer was lost is sent again byte for byte the same, under the same key.

Ctrl-C and SIGTERM finish the current request and keep all progress; a second Ctrl-C ends at once.
Exit status: 0 done; 1 another sender is running, folders unusable, or with --once something is left; 2 bad setting.
Settings come from the environment or from a .env beside this file; .env.example explains each.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import email.utils
import enum
import errno
import functools
import gzip
import hashlib
import http.client
import io
import itertools
import json
import logging
import operator
import os
import random
import re
import signal
import socket
import ssl
import stat
import sys
import threading
import time
from array import array
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from dotenv import dotenv_values

try:
    import sqlite3
except ImportError:  # a Python built without it: the reader is then three times slower, and as exact
    sqlite3 = None  # type: ignore[assignment]

__version__ = "1.0.0"
logger = logging.getLogger("sender")
T = TypeVar("T")

# ---------------------------------------------------------------- settings

_bad_settings: list[str] = []  # told by check_settings(): importing this module never fails


def _environment() -> dict[str, str | None]:
    try:
        from_file = dotenv_values(Path(__file__).with_name(".env"), encoding="utf-8-sig", interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        _bad_settings.append(f".env cannot be read: {error}; a UTF-8 text file is allowed")
        from_file = {}
    return {**from_file, **os.environ}


def _setting(name: str, default: T, convert: Callable[[str], T], allowed: str) -> T:
    """One setting: what the environment or .env says, else the default. An empty value counts as none."""
    text = (_ENVIRONMENT.get(name) or "").strip()
    try:
        return convert(text) if text else default
    except ValueError:
        shown = "***" if name == "API_TOKEN" else re.sub(r"//.*@|\?.*", "***", text)
        _bad_settings.append(f"{name}={_printable(shown)} is not allowed: it must be {allowed}")
        return default


N = TypeVar("N", int, float)


def _number(kind: Callable[[str], N], least: float, above: bool = False) -> Callable[[str], N]:
    def convert(text: str) -> N:
        value = kind(text)
        if not (least < value if above else least <= value) or not value <= 1_000_000:  # a NaN is neither
            raise ValueError(text)
        return value

    return convert


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda text: words[[word.lower() for word in words].index(text.lower())]


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(text)
    requests.Request("POST", text).prepare()  # what requests cannot send is refused here, not at the first file
    return text


def _header(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise ValueError(text)
    return text


def _printable(text: object) -> str:
    """`text` with control characters and undecodable bytes escaped: a file name cannot forge a log line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


_ENVIRONMENT = _environment()
_SECONDS = "a number of seconds above 0 (at most 1000000)"
_WHOLE = "a whole number from 1 to 1000000"

SERVER_URL = _setting("SERVER_URL", "http://localhost:8000/ingest", _url, "an http:// or https:// URL with a host")
API_TOKEN = _setting("API_TOKEN", "", _header, "printable ASCII")  # sent as Authorization: Bearer
POLL_INTERVAL = _setting("POLL_INTERVAL", 1.0, _number(float, 0, above=True), _SECONDS)
MAX_RETRIES = _setting("MAX_RETRIES", 3, _number(int, 1), _WHOLE)  # attempts for one batch
RETRY_DELAY = _setting("RETRY_DELAY", 5.0, _number(float, 0), "a number of seconds (0 to 1000000)")  # then doubling
BATCH_SIZE = _setting("BATCH_SIZE", 1000, _number(int, 1), _WHOLE)  # packets in one request
REQUEST_TIMEOUT = _setting("REQUEST_TIMEOUT", 30.0, _number(float, 0, above=True), _SECONDS)
RETRY_FAILED_INTERVAL = _setting("RETRY_FAILED_INTERVAL", 300.0, _number(float, 0, above=True), _SECONDS)
COMPRESS = _setting("COMPRESS", "none", _one_of("none", "gzip"), "gzip or none")  # for slow links
KEEP_PROCESSED_DAYS = _setting("KEEP_PROCESSED_DAYS", 0.0, _number(float, 0), "a number of days (0: for ever)")
LOGS_DIR = _setting("LOGS_DIR", Path(__file__).with_name("logs"), lambda s: Path(s).expanduser(), "a folder").absolute()
LOG_LEVEL = _setting("LOG_LEVEL", "INFO", _one_of("DEBUG", "INFO", "WARNING", "ERROR"), "DEBUG, INFO, WARNING or ERROR")

PENDING_DIR = LOGS_DIR / "pending_upload"
FAILED_DIR = LOGS_DIR / "failed_uploads"
PROCESSED_DIR = LOGS_DIR / "processed"

# Suffixes beside a file X.json. None is longer than .ready, so whatever name had a marker has room for them.
READY, TAKEN, STATE = ".ready", ".taken", ".state"
REJECTED = ".rejected.json"
TEMPORARY = ".sender.tmp"
LONGEST_NAME = 255 - len(STATE)  # bytes

BLOCK = 128 * 1024  # bytes read and proved at a time: large enough to be fast, small enough for the CPU's cache
LONGEST_PACKET = 8 * 1024 * 1024  # bytes; a longer "packet" is damage, and is not worth the memory
REPLY_LIMIT = 8 * 1024  # bytes of a reply that are read
RETRY_AFTER_LIMIT = 60  # seconds


def check_settings() -> None:
    """Raise ValueError with one line per bad setting: its name, its value, what is allowed."""
    if _bad_settings:
        raise ValueError("\n".join(_bad_settings))


# ---------------------------------------------------------------- what an upload can come to


class Outcome(enum.Enum):
    """What one POST came to; truthy only for success. Each member asks for a different move."""

    DELIVERED = "delivered"
    UNREACHABLE = "no connection, or it broke: again later"
    BUSY = "the server asks for patience (429, 502, 503, 504): again later"
    TIMED_OUT = "no answer in time: again later, and smaller when it happens again"
    FAULT = "500, the server is broken or chokes on a packet: again later, then as REJECTED"
    AGAIN = "any other passing trouble: again later"
    REFUSED = "the configuration is wrong, for every file"
    TOO_LARGE = "413: a smaller batch"
    REJECTED = "400, 422, something in this batch: a smaller batch, until the offender is alone"
    TRY_PLAIN = "refused while compressed: the same once more, plain"
    UNREADABLE = "the file is not an array of packets: nothing is sent"

    def __bool__(self) -> bool:
        return self is Outcome.DELIVERED


_AGAIN_LATER = (Outcome.UNREACHABLE, Outcome.BUSY, Outcome.TIMED_OUT, Outcome.FAULT, Outcome.AGAIN)
_ENDS_SWEEP = (Outcome.UNREACHABLE, Outcome.BUSY, Outcome.TIMED_OUT, Outcome.REFUSED)


@dataclasses.dataclass
class Answer:
    """The answer to one batch: `outcome`, what to tell a person, and how long it took (seconds)."""

    outcome: Outcome
    headline: str = ""
    detail: str = ""
    retry_after: float = 0
    seconds: float = 0

    def __bool__(self) -> bool:
        return bool(self.outcome)

    @property
    def reason(self) -> str:
        return f"{self.headline}: {self.detail}" if self.detail else self.headline


@dataclasses.dataclass
class Link:
    """What this process has learned about the server; carried from file to file."""

    size: int = 0  # packets a batch may hold now; 0 means BATCH_SIZE
    plain: bool = False  # compressed bodies were refused
    kept_alive: bool = False  # the last exchange left a connection open
    down_since: float | None = None  # monotonic
    sweep_when_back: bool = False  # a file failed, so the next success calls for a sweep
    sweep_now: bool = False
    accepted_at: str = ""  # time of the last success, as _now() writes it


_link = Link()
_serving = False
_stopping = False
_told: dict[str, str] = {}  # trouble that lasts, by file: it is told once, not at every poll


def stop_sender() -> None:
    """Ask a running monitor_and_upload() to return: after its current request, or within a second of any wait."""
    global _stopping
    _stopping = _serving  # with no loop to stop, a direct call of process_json_file() must not be stopped instead


def _nap(seconds: float) -> bool:
    """Wait; False when asked to stop. Short naps and a plain flag: an Event.set in a signal handler can deadlock."""
    end = time.monotonic() + seconds
    while not _stopping and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
    return not _stopping


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _complain(path: Path, error: Exception, then: str) -> None:
    """Tell of a file operation that failed, once for as long as it fails in the same way."""
    text = f"{_printable(path.name)}: {_reason(error)}; {then}"
    if _told.get(str(path)) != text:
        _told[str(path)] = text
        logger.error("%s", text)


def _cause(error: BaseException) -> BaseException:
    """The innermost cause of an error: what really happened, without the URLs that the outer ones carry."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    return error


def _reason(error: BaseException) -> str:
    error = _cause(error)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if name := getattr(error, "filename2", None) or getattr(error, "filename", None):
        text = f"{text} ({name})"
    return _one_line(text)


def _one_line(text: str) -> str:
    """Foreign text made fit for the log: one printable line of at most 200 characters, secrets hidden."""
    url = urlsplit(SERVER_URL)
    secrets = {API_TOKEN, url.query, *(value for word in (url.username, url.password) if word for value in (word, unquote(word)))}
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    line = _printable(" ".join(text.split()))
    return line if len(line) <= 200 else line[:199] + "…"


def _public_url() -> str:
    url = urlsplit(SERVER_URL)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


# ---------------------------------------------------------------- where the platforms differ

# Hostile or odd files are never followed, and opening one never blocks; Windows has neither flag nor FIFO.
_OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))

if sys.platform == "win32":
    import msvcrt

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
    _BUSY_FILE_PAUSES = (0.1,) * 20  # seconds: a virus scanner holds a new file for a moment

    def _lock_file(fd: int, shared: bool = False) -> None:
        os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte far behind the pid: a locked byte cannot be read
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def _sync_folder(folder: Path) -> None:
        """Windows cannot flush a folder; NTFS journals its renames in order."""

else:
    import fcntl

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
    _BUSY_FILE_PAUSES: tuple[float, ...] = ()

    def _lock_file(fd: int, shared: bool = False) -> None:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))

    def _sync_folder(folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---------------------------------------------------------------- the spool's files


def _open_regular(path: Path) -> BinaryIO:
    """Open for reading, regular files only: checked before (a device may act on open) and after (it may be swapped)."""
    for check in (os.lstat, None):
        fd = -1 if check else os.open(path, os.O_RDONLY | _OPEN_FLAGS)
        if not stat.S_ISREG((check(path) if check else os.fstat(fd)).st_mode):
            if fd >= 0:
                os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file, refused", str(path))
    return open(fd, "rb")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _holds(path: Path, content: bytes) -> bool:
    with contextlib.suppress(OSError), _open_regular(path) as file:
        return file.read() == content
    return False


def _free_path(folder: Path, name: str, suffix: str = "", content: bytes | None = None) -> Path:
    """Where `name` can go in `folder` without overwriting: X.json, X.1.json, … (X.rejected.json with that suffix).

    A file that holds just `content` is free too: a crash came between its writing and the note of it.
    """
    stem, own_suffix = os.path.splitext(name)
    for number in itertools.count():
        tail = (f".{number}" if number else "") + (suffix or own_suffix)
        while tail != own_suffix and len(os.fsencode(stem + tail)) > LONGEST_NAME:
            stem = stem[:-1]
        # A capture must not pass for set-aside packets, which no sweep would ever send.
        taken_for_rejected = folder == FAILED_DIR and not suffix and (stem + tail).endswith(REJECTED)
        path = folder / (stem + tail)
        if not taken_for_rejected and (not os.path.lexists(path) or content is not None and _holds(path, content)):
            return path
    raise AssertionError("unreachable")


def _rename(step: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    for pause in _BUSY_FILE_PAUSES:
        try:
            return step(source, target)
        except PermissionError:
            time.sleep(pause)
    return step(source, target)


def _move(source: Path, target: Path) -> None:
    """Rename durably: when this returns, no power cut brings the old name back."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _rename(os.rename, source, target)
    _sync_folder(target.parent)


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably: at every moment `path` holds the old content or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power cut could leave the new name with no content
        _rename(os.replace, temporary, path)
    except OSError:
        _remove(temporary)
        raise
    _sync_folder(path.parent)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _forget(record: Path) -> None:
    """Remove a record whose file has moved on. It must not fail the move; what is left belongs to no file."""
    _unsaved.pop(record, None)
    with contextlib.suppress(OSError):
        os.unlink(record)


@dataclasses.dataclass
class Progress:
    """How far one file got: the content of X.json.state, for the next round and for the person who asks."""

    size: int  # bytes
    mtime_ns: int  # with `size`: the file this belongs to
    packets: int = -1  # in the file; -1 until it has been read
    uploaded: int = 0  # packets that need not be sent any more, in file order
    batch_size: int = 0
    attempts: int = 0  # rounds that failed
    last_error: str = ""
    time: str = ""  # of the last failure, UTC
    unreadable: bool = False  # not JSON: not read again until it changes
    failed_to: int = 0  # end of the batch that the last round failed on with a time-out or a 500
    rejected: list[list[Any]] = dataclasses.field(default_factory=list)  # [packet's index, the server's reason]

    @property
    def complete(self) -> bool:
        return self.uploaded == self.packets and not self.rejected

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def key(self) -> tuple[int, int]:
        """What must be on disk before the next POST."""
        return self.uploaded, self.batch_size

    def valid(self) -> bool:
        numbers = (self.size, self.mtime_ns, self.packets, self.uploaded, self.batch_size, self.attempts, self.failed_to)
        return (
            all(type(number) is int for number in numbers)
            and 0 <= self.uploaded <= max(self.packets, 0)
            and 0 < self.batch_size
            and isinstance(self.last_error, str)
            and isinstance(self.time, str)
            and all(type(i) is int and 0 <= i < self.uploaded and isinstance(why, str) for i, why in self.rejected)
        )


_unsaved: dict[Path, Progress] = {}  # progress that a full disk kept from its file


def _read_record(record: Path) -> Progress | None:
    """The progress in a state file; None where there is none. Raises ValueError where it is damaged."""
    try:
        with _open_regular(record) as file:
            progress = Progress(**json.load(file))
        if progress.valid():
            return progress
    except FileNotFoundError:
        return None
    except (TypeError, ValueError, OSError, RecursionError):
        pass  # garbage of any kind: said below
    raise ValueError("not a progress record, damaged")


def _load_progress(data: Path, record: Path) -> Progress:
    """The progress of `data`, from `record` if that belongs to this very file, else a fresh one."""
    status = os.lstat(data)
    fresh = Progress(status.st_size, status.st_mtime_ns, batch_size=min(_link.size or BATCH_SIZE, BATCH_SIZE))
    try:
        progress = _unsaved.get(record) or _read_record(record)
    except ValueError as error:
        _complain(record, error, "it is ignored, the upload starts from the first packet")
        return fresh
    if progress and (progress.size, progress.mtime_ns) == (fresh.size, fresh.mtime_ns):
        return dataclasses.replace(progress, batch_size=min(progress.batch_size, BATCH_SIZE))
    return fresh


def _save_progress(record: Path, progress: Progress) -> None:
    """Write the record. A disk that refuses it stops no upload: it is kept in memory until the disk takes it."""
    try:
        _write(record, progress.to_json())
        _unsaved.pop(record, None)
        _told.pop(str(record), None)
    except OSError as error:
        _unsaved[record] = dataclasses.replace(progress, rejected=list(progress.rejected))
        _complain(record, error, "the upload goes on, but a crash now would send packets again")


# ---------------------------------------------------------------- reading


class Batch(NamedTuple):
    """One request's worth of packets: `body` is a JSON array of so many `packets`."""

    body: bytes
    packets: int
    label: str = ""  # the file's name, for the log
    progress: str = ""  # "3,000/20,000 packets" once this batch is delivered
    attempts: int = 0  # 0 means MAX_RETRIES

_WHITE = b" \t\r\n"
_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*(\]?)")
_DELIMITER = re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")
_SEPARATOR = re.compile(rb'\}[ \t\r\n]*,[ \t\r\n]*\{[ \t\r\n]*"\w')
_COUNT = "SELECT CASE WHEN json_valid(?1) THEN json_array_length(?1) END"
_Found = tuple[list[int], int, bool]  # starts of packets in the block, bytes used, array closed


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=len, parse_constant=_no_constant)  # only finds ends: builds no dicts


def _walk(data: bytes, last: bool, limit: int) -> _Found:
    """Step from packet to packet, decoding each. Stops before a packet that goes on in the next block.

    Raises ValueError(reason, packets before it in the block, its position in the block).
    """
    text = data.decode("latin-1")  # one character a byte, so that positions are offsets; UTF-8 is checked below
    found: list[int] = []
    at, closed = 0, False
    try:
        while not closed and len(found) < limit:
            if not text.startswith("{", at):
                raise json.JSONDecodeError("Expecting a packet (an object)", text, at)
            end = _DECODER.raw_decode(text, at)[1]
            delimiter = _DELIMITER.match(text, end)
            if not delimiter:
                raise json.JSONDecodeError("Expecting ',' or ']' after a packet", text, end)
            found.append(at)
            at, closed = delimiter.end(), delimiter[1] == "]"
    except (ValueError, RecursionError) as error:
        if last or len(data) - at > LONGEST_PACKET:
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(reason, len(found), getattr(error, "pos", at)) from None
    try:
        data[:at].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, {error.reason}", sum(s <= error.start for s in found) - 1, error.start) from None
    return found, at, closed


def _leap(prover: sqlite3.Connection, data: bytes, last: bool, separator: bytes) -> _Found | None:
    """Take all packets of the block at once, cut at `separator`, if that can be proved; else None.

    The proof. In brackets, the text is valid JSON, so its two ends are packet boundaries. No cut lies in a string:
    a separator ends in a quote and a letter, the quote would close the string, and no letter follows a string. With
    no bracket in the text no cut lies in an inner array. So all cuts are boundaries; and where the array has just
    one element more than there are cuts, every element stands between `{` and `}`. What SQLite's parser (five times
    as fast as json's) sees with other eyes is left to the walk: a NUL ends its text, and it has no limit for the
    digits of an integer, which a packet below 4 KiB cannot exceed.
    """
    tail = len(separator) - separator.rindex(b"{")  # of the separator, what belongs to the packet after it
    if last:
        body, used = data.rstrip(_WHITE), len(data)
        body = body[:-1].rstrip(_WHITE) if body.endswith(b"]") else b""
    else:
        cut = data.rfind(separator)
        body, used = data[: cut + 1], cut + len(separator) - tail
    if not body.startswith(b"{") or b"[" in body or b"\0" in body:
        return None
    found = [0, *(match.end() - tail for match in re.finditer(re.escape(separator), body))]
    if max(map(operator.sub, [*found[1:], len(body)], found)) > 4096:
        return None
    try:
        (count,) = prover.execute(_COUNT, (f"[{body.decode()}]",)).fetchone()
    except (UnicodeDecodeError, sqlite3.Error):
        return None
    return (found, used, last) if count == len(found) else None


def _index(file: BinaryIO) -> array[int]:
    """The byte offset of every packet in `file`, then of the array's end: 8 bytes a packet, whatever the file's size.

    Returns only when the whole file has been proved to be one UTF-8 JSON array of objects (a byte-order mark is
    allowed: RFC 8259, section 8.1). Raises ValueError with the reason and the place.
    """
    data = file.read(BLOCK)
    opening = _OPENING.match(data)
    if not opening:
        raise ValueError("Expecting an array of packets, which begins with '['" if data else "the file is empty")
    starts, base, closed = array("Q"), opening.end(), bool(opening[1])
    data = data[base:]
    separator: bytes | None = None  # what stands between this file's packets; b"" where a leap cannot use it
    with contextlib.closing(sqlite3.connect(":memory:")) if sqlite3 else contextlib.nullcontext() as prover:
        while not closed:
            more = file.read(max(BLOCK, len(data)))  # twice as much while not one packet fits
            data += more
            leap = _leap(prover, data, not more, separator) if prover and separator else None
            try:
                found, used, closed = leap or _walk(data, not more, sys.maxsize if separator is not None else 2)
            except ValueError as error:
                reason, before, at = error.args
                raise ValueError(f"{reason} (packet {len(starts) + before + 1:,}, byte {base + at:,})") from None
            if separator is None and len(found) == 2:
                between = _SEPARATOR.match(data, data.rfind(b"}", 0, found[1]))
                separator = between[0] if between else b""
            starts.extend(map(base.__add__, found))
            data, base = data[used:], base + used
    while data or (data := file.read(BLOCK)):
        if rest := data.lstrip(_WHITE):
            raise ValueError(f"Extra data after the array (byte {base + len(data) - len(rest):,})")
        data, base = b"", base + len(data)
    starts.append(base)
    return starts


class Capture:
    """A capture file, open and proved; batches are cut from its own text. Raises OSError, and ValueError as _index()."""

    def __init__(self, path: Path) -> None:
        self._file = _open_regular(path)
        try:
            self.identity = self._identify()
            self._starts = _index(self._file)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _identify(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def cut(self, start: int, stop: int) -> bytes:
        """Packets start to stop as a JSON array, their bytes and what stands between them as in the file."""
        self._file.seek(self._starts[start])
        text = self._file.read(self._starts[stop] - self._starts[start])
        if self._identify() != self.identity:
            raise OSError(errno.EBUSY, "it changed while it was read", self._file.name)
        return b"".join((b"[", memoryview(text)[: text.rfind(b"}") + 1], b"]"))


def read_json_file(json_path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The whole file as a list of packet dicts. Raises ValueError with the reason where it is no JSON array of objects."""
    with Capture(Path(json_path)) as capture:
        packets: list[dict[str, Any]] = json.loads(capture.cut(0, len(capture)))
    return packets


# ---------------------------------------------------------------- one upload


class _Countdown(io.RawIOBase):
    """The read side of a socket whose time-out holds for a whole reply; the socket's own starts anew with every byte."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw
        self._end = time.monotonic() + (sock.gettimeout() or REQUEST_TIMEOUT)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Countdown(sock, self.fp.detach()))


class _HTTPConnection(urllib3.connection.HTTPConnection):
    response_class = _Reply


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    response_class = _Reply


class _Adapter(requests.adapters.HTTPAdapter):
    """requests' own adapter, with replies that cannot drip for ever."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _HTTPSConnection if pool.scheme == "https" else _HTTPConnection
        return pool


def _bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
    request.headers["Authorization"] = f"Bearer {API_TOKEN}"
    return request


@functools.lru_cache(maxsize=1)
def _connect(url: str, token: str) -> tuple[requests.adapters.BaseAdapter, requests.PreparedRequest, Any]:
    """The one session: its adapter (which holds the connection), a prepared POST, and the arguments to send it with.

    Proxies, the CA bundle and .netrc are looked up here, once, and not at every request as a session does: that
    would be half of a request's cost.
    """
    session = requests.Session()
    session.mount("http://", _Adapter())
    session.mount("https://", _Adapter())
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": f"sender.py/{__version__}"}
    request = session.prepare_request(requests.Request("POST", url, headers=headers, auth=_bearer if token else None))
    bundle = _ENVIRONMENT.get("REQUESTS_CA_BUNDLE") or None  # requests itself would not look into .env
    return session.get_adapter(url), request, session.merge_environment_settings(url, {}, True, bundle, None)


def _post(batch: Batch, compressed: bool) -> tuple[int, requests.structures.CaseInsensitiveDict[str], str]:
    """Exactly one POST: status, headers and the beginning of the reply's text. Raises OSError, urllib3's HTTPError.

    Redirects are not followed: requests would turn the POST into a GET, and a login page's 200 would look like success.
    """
    adapter, template, arguments = _connect(SERVER_URL, API_TOKEN)
    request = template.copy()
    request.headers["Idempotency-Key"] = f'"{hashlib.sha256(batch.body).hexdigest()}"'
    request.body = gzip.compress(batch.body, 6, mtime=0) if compressed else batch.body
    if compressed:
        request.headers["Content-Encoding"] = "gzip"
    request.headers["Content-Length"] = str(len(request.body))
    used, _link.kept_alive = _link.kept_alive, False
    try:
        response = adapter.send(request, timeout=REQUEST_TIMEOUT, **arguments)
    except requests.ConnectionError as error:
        # A kept-alive connection that the server closed at this very moment says nothing about the server: the POST
        # goes out again on a new one. The key makes that safe (RFC 9110, section 9.2.2).
        if not used or not isinstance(_cause(error), (ConnectionError, ssl.SSLEOFError)):
            raise
        response = adapter.send(request, timeout=REQUEST_TIMEOUT, **arguments)
    try:
        text = response.raw.read(REPLY_LIMIT, decode_content=False)
        _link.kept_alive = len(text) < REPLY_LIMIT
    except (OSError, urllib3.exceptions.HTTPError):
        if 200 <= response.status_code < 300:  # a 2xx counts only when it has arrived whole
            raise
        text = b""
    finally:
        if not _link.kept_alive:
            response.raw.close()
        response.close()
    return response.status_code, response.headers, text.decode(errors="replace")


def _classify(status: int, compressed: bool) -> Outcome:
    """The one place that knows HTTP's status codes."""
    if 200 <= status < 300:
        return Outcome.DELIVERED
    if compressed and status in (400, 415, 422):
        return Outcome.TRY_PLAIN
    if status == 413:
        return Outcome.TOO_LARGE
    if status in (400, 422):
        return Outcome.REJECTED
    if status in (429, 502, 503, 504):
        return Outcome.BUSY
    if status == 500:
        return Outcome.FAULT
    if status in (408, 409, 425) or status > 500:
        return Outcome.AGAIN
    return Outcome.REFUSED


def _advice(status: int, headers: requests.structures.CaseInsensitiveDict[str]) -> str:
    """What a person can mend when the server refuses everything."""
    if 300 <= status < 400:
        return f"it points to {_one_line(headers.get('Location', 'nowhere'))}; put the server's own address into SERVER_URL"
    if status in (401, 403):
        return "check API_TOKEN"
    return "check SERVER_URL"


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, section 10.2.3: a number or a date); 0 for nonsense."""
    try:
        wait = float(int(value)) if value.isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0
    return min(max(wait, 0), RETRY_AFTER_LIMIT)


def _answer(batch: Batch, compressed: bool) -> Answer:
    try:
        status, headers, text = _post(batch, compressed)
    except (OSError, urllib3.exceptions.HTTPError) as error:  # requests' exceptions are OSErrors
        return _network_answer(error)
    outcome = _classify(status, compressed)
    if outcome:
        _check_count(batch, text)
        return Answer(outcome)
    detail = _one_line(text)
    if outcome is Outcome.REFUSED:
        detail = _advice(status, headers) + (f" ({detail})" if detail else "")
    headline = f"Server error: {status} {http.client.responses.get(status, '')}".rstrip()
    return Answer(outcome, headline, detail, _retry_after(headers.get("Retry-After", "")))


def _network_answer(error: BaseException) -> Answer:
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        advice = f"{_one_line(cause.verify_message)}; check SERVER_URL, or name its CA in REQUESTS_CA_BUNDLE"
        return Answer(Outcome.REFUSED, f"Cannot trust server {_public_url()}", advice)
    connecting = isinstance(error, requests.ConnectTimeout) or isinstance(
        getattr(error.args[0] if error.args else None, "reason", None), urllib3.exceptions.NewConnectionError
    )
    if isinstance(cause, (socket.timeout, urllib3.exceptions.ReadTimeoutError)) and not connecting:
        return Answer(Outcome.TIMED_OUT, "Request timed out", f"no whole answer within {REQUEST_TIMEOUT:g} seconds")
    if not isinstance(error, (requests.RequestException, urllib3.exceptions.HTTPError)):  # such as a missing CA bundle
        return Answer(Outcome.REFUSED, f"Cannot send to server {_public_url()}", _reason(error))
    return Answer(Outcome.UNREACHABLE, f"Cannot connect to server {_public_url()}", _reason(error))


def _check_count(batch: Batch, text: str) -> None:
    """Warn when the server's own count is below ours."""
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):
        return  # it need not be JSON
    for field in ("packets_received", "raw_packets"):
        received = reply.get(field) if isinstance(reply, dict) else None
        if isinstance(received, int) and received < batch.packets:
            logger.warning("%s: sent %d packets, but the server says %s: %d", batch.label, batch.packets, field, received)


def upload_packets(packets: list[dict[str, Any]] | Batch, retry_count: int = 0) -> Answer:
    """Exactly one POST of one batch; the answer is truthy only on success. `retry_count` is for the log: attempts before.

    Never raises for what a server or network does. A list is sent as json.dumps writes it.
    """
    if not isinstance(packets, Batch):
        packets = Batch(json.dumps(packets, allow_nan=False).encode(), len(packets), "packets")
    if not packets.packets:
        return Answer(Outcome.DELIVERED)
    started = time.monotonic()
    answer = _answer(packets, COMPRESS == "gzip" and not _link.plain)
    answer.seconds = time.monotonic() - started
    if answer:
        logger.info("✓ Successfully uploaded %d packets: %s%s", packets.packets, packets.label, packets.progress)
        _server_accepts()
        return answer
    level = logging.ERROR if answer.outcome is Outcome.REFUSED else logging.WARNING
    attempt = f" (attempt {retry_count + 1}/{packets.attempts or MAX_RETRIES})" if answer.outcome in _AGAIN_LATER else ""
    logger.log(level, "%s: %s%s%s", packets.label, answer.headline, attempt, answer.detail and f": {answer.detail}")
    if answer.outcome in (*_AGAIN_LATER, Outcome.REFUSED) and _link.down_since is None:
        _link.down_since = started
    return answer


def _server_accepts() -> None:
    """Note a success; after a failure, say how long it lasted and have the failed files swept."""
    _link.accepted_at = _now()
    if _link.down_since is not None:
        away = _duration(time.monotonic() - _link.down_since)
        logger.info("The server accepts uploads again after %s; waiting: %s", away, _count(_waiting(), "file"))
        _link.down_since = None
    if _link.sweep_when_back:
        _link.sweep_when_back, _link.sweep_now = False, True


def upload_with_retry(packets: list[dict[str, Any]] | Batch) -> Answer:
    """Up to MAX_RETRIES attempts (a Batch may ask for fewer) with doubling waits; truthy only on success.

    Only what may pass by itself is tried again. A Retry-After is heeded where it asks for more; up to 10 % of jitter
    keeps a fleet of senders from coming back in step. stop_sender() ends the wait, and the answer is the last one.
    """
    attempts = packets.attempts if isinstance(packets, Batch) and packets.attempts else MAX_RETRIES
    for attempt in itertools.count():
        answer = upload_packets(packets, attempt)
        if answer.outcome is Outcome.TRY_PLAIN:
            _link.plain = True
            answer = upload_packets(packets, attempt)
            _link.plain = bool(answer)
            if answer:
                logger.warning("The server accepts plain requests only: compression stays off")
        if answer.outcome not in _AGAIN_LATER or attempt + 1 >= attempts:
            return answer
        delay = max(RETRY_DELAY * 2 ** min(attempt, 20), answer.retry_after)
        logger.info("Retrying in %g seconds...", round(delay, 1))
        if not _nap(delay * random.uniform(1, 1.1)):
            return answer
    raise AssertionError("unreachable")


# ---------------------------------------------------------------- one file


def _learn(progress: Progress, sent: int, answer: Answer) -> bool:
    """Move `progress` on by the answer to a batch of `sent` packets; False when this round of the file is over.

    The one mechanism behind 413, slow answers, time-outs and rejected packets: the batch size, halved where the
    answer says that a batch was too much, growing back after every success.
    """
    outcome, end = answer.outcome, progress.uploaded + sent
    failed_before = progress.uploaded < progress.failed_to
    works_for_others = bool(progress.time) and _link.accepted_at > progress.time
    if outcome is Outcome.FAULT and failed_before and works_for_others:
        outcome = Outcome.REJECTED
    if outcome:
        progress.uploaded = end
        half = REQUEST_TIMEOUT / 2
        bearable = int(sent * half / max(answer.seconds, 1e-3))
        progress.batch_size = max(1, sent // 2) if answer.seconds > half else max(
            progress.batch_size, min(2 * progress.batch_size, BATCH_SIZE, bearable)
        )
        return True
    if outcome in (Outcome.TOO_LARGE, Outcome.REJECTED):
        progress.batch_size = max(1, sent // 2)
        return sent > 1 or _refuse_packet(progress, answer, works_for_others)
    if outcome is Outcome.TIMED_OUT and failed_before:
        progress.batch_size = max(1, sent // 2)
    if outcome in (Outcome.TIMED_OUT, Outcome.FAULT):
        progress.failed_to = end
    return False


def _refuse_packet(progress: Progress, answer: Answer, works_for_others: bool) -> bool:
    """Pass over one packet that is refused alone; but where it is not about a packet, go back and end the round.

    It is not about a packet when three in a row are refused, or every packet of a file so short that there are not
    three, unless the server has accepted others since that happened before.
    """
    progress.rejected.append([progress.uploaded, answer.reason])
    progress.uploaded += 1
    row = 0
    while row < len(progress.rejected) and progress.rejected[-row - 1][0] == progress.uploaded - row - 1:
        row += 1
    if row >= 3 or (row == progress.packets and not works_for_others):
        del progress.rejected[-row:]
        progress.uploaded -= row
        return False
    return True


def _upload(capture: Capture, record: Path, name: str, progress: Progress, attempts: int) -> Answer | None:
    """Upload what `progress` says is left; None when stopped, else the last answer.

    Before each POST the record on disk says which batch goes out. A crash then repeats that one batch and no other,
    byte for byte and under its old key, whether or not the server got it.
    """
    on_disk = progress.key() if progress.packets >= 0 else (0, BATCH_SIZE)
    progress.packets = len(capture)
    while progress.uploaded < progress.packets:
        if progress.key() != on_disk:
            _save_progress(record, progress)
            on_disk = progress.key()
        if _stopping:
            return None
        stop = min(progress.uploaded + progress.batch_size, progress.packets)
        told = f" ({stop:,}/{progress.packets:,} packets)" if progress.packets > BATCH_SIZE else ""
        sent = stop - progress.uploaded
        batch = Batch(capture.cut(progress.uploaded, stop), sent, _printable(name), told, attempts)
        answer = upload_with_retry(batch)
        if _stopping and not answer:
            return None
        goes_on = _learn(progress, sent, answer)
        _link.size = progress.batch_size
        if not goes_on:
            return answer
    if progress.rejected:
        _set_aside(capture, record, name, progress)
    return Answer(Outcome.DELIVERED)


def _set_aside(capture: Capture, record: Path, name: str, progress: Progress) -> None:
    """Keep the packets that the server refused one by one in X.rejected.json, its reasons beside them."""
    content = b"[" + b",\n".join(capture.cut(i, i + 1)[1:-1] for i, _ in progress.rejected) + b"]\n"
    target = _free_path(FAILED_DIR, name, REJECTED, content)
    reasons = [{"packet": i + 1, "reason": reason} for i, reason in progress.rejected]
    _write(target, content)
    _write(_beside(target, STATE), json.dumps({"file": name, "rejected": reasons}, indent=1).encode())
    kept = _count(len(reasons), "packet")
    logger.error("%s: %s refused by the server, set aside in failed_uploads/%s", _printable(name), kept, _printable(target.name))
    progress.rejected = []  # only now: a crash before this finds the same content in place, and writes it no second time
    _save_progress(record, progress)


def _round(data: Path, record: Path, name: str, attempts: int) -> Answer | None:
    """One round of one file: upload what is left, then move it. None when stopped; raises OSError where files fail."""
    progress = _load_progress(data, record)
    was_complete = progress.complete
    answer: Answer | None = Answer(Outcome.DELIVERED)
    if not was_complete:
        try:
            with Capture(data) as capture:
                if capture.identity != (progress.size, progress.mtime_ns):
                    raise OSError(errno.EBUSY, "it changed while it was read", str(data))
                answer = _upload(capture, record, name, progress, attempts)
        except ValueError as error:
            progress.unreadable = True
            answer = Answer(Outcome.UNREADABLE, "Not a capture", _one_line(str(error)))
    if answer:
        _done(data, record, name, progress, was_complete)
    elif answer is not None:
        _failed(data, record, name, progress, answer)
    return answer


def _done(data: Path, record: Path, name: str, progress: Progress, noted: bool) -> None:
    """Move a delivered file to processed/. Where that fails, the record says that only the move is left."""
    target = _free_path(PROCESSED_DIR, name)
    try:
        _move(data, target)
    except OSError:
        if not noted:
            _save_progress(record, progress)
        raise
    _forget(record)  # after the move: a crash between the two leaves a record that belongs to no file, see _scan()
    with contextlib.suppress(OSError):  # KEEP_PROCESSED_DAYS would then count from the capture's own time
        os.utime(target)
    renamed = "" if target.name == name else f", kept as {_printable(target.name)}"
    logger.info("✓ %s processed successfully (%d packets)%s", _printable(name), progress.packets, renamed)


def _failed(data: Path, record: Path, name: str, progress: Progress, answer: Answer) -> None:
    """Note why a file failed, and move it to failed_uploads/ if it is not there yet."""
    progress.attempts += 1
    progress.last_error, progress.time = answer.reason, _now()
    where = "stays in"
    if data.parent == FAILED_DIR:
        _save_progress(record, progress)
    else:
        target = _free_path(FAILED_DIR, name)
        # The record goes first: between the two steps the file is still taken, with its old record; the other way
        # round it would stand in failed_uploads/ with no progress, and all of it would be sent again.
        _write(_beside(target, STATE), progress.to_json())
        _move(data, target)
        _forget(record)
        where, name = "moved to", target.name
    if answer.outcome is Outcome.UNREADABLE:
        then = "it is kept, and read again when it changes"
    else:
        _link.sweep_when_back |= where == "moved to" or answer.outcome is Outcome.UNREACHABLE
        then = f"{progress.uploaded:,}/{progress.packets:,} packets uploaded; next try within {RETRY_FAILED_INTERVAL:g} seconds"
    level = logging.WARNING if answer.outcome in _AGAIN_LATER else logging.ERROR
    logger.log(level, "✗ %s %s failed_uploads/ (%s): %s", _printable(name), where, then, answer.reason)


def _take(path: Path) -> Path | None:
    """Claim a ready file: X.json becomes X.json.taken, then its marker goes. None where there is no marker.

    Taken by rename, before reading: what cannot be moved is never uploaded, so never uploaded again and again. Goes
    on, too, where a crash ended it between its steps.
    """
    taken, marker = _beside(path, TAKEN), _beside(path, READY)
    if not os.path.lexists(taken):
        if not os.path.lexists(marker):
            return None
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file, refused", str(path))
        _move(path, taken)
    try:
        if not os.path.lexists(path):
            _remove(marker)
        if os.path.lexists(path):  # the producer has written this name anew, and that may have been its new marker
            marker.touch()
    except OSError as error:  # a marker without its file does no harm
        _complain(marker, error, "the marker stays")
    return taken


def process_json_file(json_path: str | os.PathLike[str]) -> bool:
    """The whole life of one ready file: take it, upload it, move it. True only when it reached processed/."""
    path = Path(json_path)
    try:
        taken = _take(path)
        if taken is None:
            return False
        answer = _round(taken, _beside(path, STATE), path.name, attempts=0)
    except OSError as error:
        _complain(path, error, "it stays in the folder and is tried again")
        return False
    _told.pop(str(path), None)
    return bool(answer)


# ---------------------------------------------------------------- the folders


def _scan(folder: Path) -> dict[str, os.DirEntry[str]]:
    """What is in a folder, by name; a folder that is missing is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries}


def _regular(folder: Path, entry: os.DirEntry[str]) -> bool:
    if not entry.is_file(follow_symlinks=False):
        _complain(folder / entry.name, OSError(errno.EINVAL, "not a regular file, refused"), "it is left alone")
        return False
    return True


def _ready_files(found: dict[str, os.DirEntry[str]]) -> list[str]:
    """The names X.json in pending_upload/ that can be processed: those with a marker, and those taken before a crash."""
    taken = {name[: -len(TAKEN)] for name in found if name.endswith(".json" + TAKEN)}
    marked = {name for name in found if name.endswith(".json") and name + READY in found and name not in taken}
    return sorted(taken | {name for name in marked if _regular(PENDING_DIR, found[name])})


def _failed_files(found: dict[str, os.DirEntry[str]]) -> list[str]:
    """The data files in failed_uploads/, whatever their names; not records, set-aside packets and placeholders."""
    return [
        name
        for name in found
        if not (name.endswith(STATE) and name[: -len(STATE)] in found)
        and not name.endswith(REJECTED)
        and (not name.startswith(".") or name.endswith(".json"))
    ]


def _due(found: dict[str, os.DirEntry[str]]) -> list[Path]:
    """The failed files that a sweep should try, least recently tried first. Not JSON: only once it has changed."""
    due = []
    for name in _failed_files(found):
        path = FAILED_DIR / name
        with contextlib.suppress(FileNotFoundError):  # gone since the scan
            if _regular(FAILED_DIR, found[name]):
                progress = _load_progress(path, _beside(path, STATE))
                if not progress.unreadable:
                    due.append((progress.time, name))
    return [FAILED_DIR / name for _, name in sorted(due)]


def _remove_orphans(folder: Path, found: dict[str, os.DirEntry[str]]) -> None:
    """Remove the records that a crash left behind when their file had moved on; a record is a JSON object, data never is."""
    for name in [name for name in found if name.endswith(STATE)]:
        base = name[: -len(STATE)]
        if base not in found and base + TAKEN not in found:
            with contextlib.suppress(OSError, ValueError, RecursionError):  # not a record: none of our business
                with _open_regular(folder / name) as file:
                    is_record = isinstance(json.load(file), dict)
                if is_record:
                    _remove(folder / name)
                    del found[name]


def _waiting() -> int:
    """How many files wait for the server, in both folders."""
    with contextlib.suppress(OSError):
        return len(_ready_files(_scan(PENDING_DIR))) + len(_failed_files(_scan(FAILED_DIR)))
    return 0


def _upload_ready() -> None:
    """Process what is ready, in chronological order (of the names)."""
    try:
        names = _ready_files(_scan(PENDING_DIR))
        _told.pop(str(PENDING_DIR), None)
    except OSError as error:
        return _complain(PENDING_DIR, error, "nothing can be uploaded until that is mended")
    for name in names:
        if _stopping:
            return
        process_json_file(PENDING_DIR / name)


def retry_failed_uploads() -> None:
    """One sweep over failed_uploads/: each file once, new ready files first, an early end where the server is the trouble."""
    try:
        _remove_orphans(PENDING_DIR, _scan(PENDING_DIR))
        found = _scan(FAILED_DIR)
        _remove_orphans(FAILED_DIR, found)
        due = _due(found)
        _told.pop(str(FAILED_DIR), None)
    except OSError as error:
        return _complain(FAILED_DIR, error, "no sweep until that is mended")
    if due:
        logger.info("Retrying %d failed uploads...", len(due))
    faults = 0
    for number, path in enumerate(due, 1):
        _upload_ready()
        if _stopping:
            return
        try:
            answer = _round(path, _beside(path, STATE), path.name, attempts=1)
        except OSError as error:
            _complain(path, error, "it stays where it is")
            continue
        if answer is None:
            return
        _told.pop(str(path), None)
        faults = faults + 1 if answer.outcome in (Outcome.FAULT, Outcome.AGAIN) else 0
        if answer.outcome in _ENDS_SWEEP or faults == 3:
            if number < len(due):
                logger.info("%s left for later: it is the server's trouble", _count(len(due) - number, "failed upload"))
            return


def _prune_processed() -> None:
    """Delete what was uploaded more than KEEP_PROCESSED_DAYS ago; _done() set each file's time to its upload."""
    if not KEEP_PROCESSED_DAYS:
        return
    oldest, pruned = time.time() - KEEP_PROCESSED_DAYS * 86400, 0
    try:
        for name, entry in _scan(PROCESSED_DIR).items():
            if name.endswith(".json") and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                _remove(PROCESSED_DIR / name)
                pruned += 1
    except OSError as error:
        _complain(PROCESSED_DIR, error, "old files stay until that is mended")
    if pruned:
        logger.info("Deleted %s from processed/, uploaded more than %g days ago", _count(pruned, "file"), KEEP_PROCESSED_DAYS)


# ---------------------------------------------------------------- the loop


class AlreadyRunning(RuntimeError):
    """Another sender serves this LOGS_DIR."""


@contextlib.contextmanager
def _only_sender() -> Iterator[None]:
    """Hold LOGS_DIR's lock. It is the operating system's, so it dies with the process; the file only names the holder."""
    LOGS_DIR.mkdir(parents=True, exist_ok=True)
    fd = os.open(_lock_path(), os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)
    try:
        for _ in range(10):
            try:
                _lock_file(fd)
                break
            except (BlockingIOError, PermissionError):
                time.sleep(0.1)  # --status may be looking, for an instant
        else:
            raise AlreadyRunning(f"Another sender (pid {_holder(fd)}) serves {LOGS_DIR}; stop it first")
        with contextlib.suppress(OSError):  # a full disk has no room for a pid
            os.ftruncate(fd, 0)
            os.write(fd, str(os.getpid()).encode())
        yield
    finally:
        os.close(fd)


def _lock_path() -> Path:
    return LOGS_DIR / ".sender.lock"


def _holder(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    return os.read(fd, 20).decode(errors="replace") or "unknown"


def _check_folders() -> None:
    """Make the folders, tell what cannot be used, and clear away what a crash left half-written."""
    for folder in (PENDING_DIR, FAILED_DIR, PROCESSED_DIR):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to read and write", str(folder))
            _remove(folder / TEMPORARY)
        except OSError as error:
            _complain(folder, error, "uploads wait until that is mended")


def monitor_and_upload(once: bool = False) -> None:
    """Upload what is ready every POLL_INTERVAL, sweep failed files every RETRY_FAILED_INTERVAL, until stop_sender().

    Runs in any thread, any number of times in a process. With `once`, returns when nothing more can be done now.
    Raises ValueError for a bad setting, AlreadyRunning, and OSError where LOGS_DIR cannot be used at all.
    """
    global _serving, _stopping
    check_settings()
    _serving, _stopping = True, False
    try:
        with _only_sender():
            logger.info("Watching %s, uploading to %s", PENDING_DIR, _public_url())
            _check_folders()
            next_sweep = time.monotonic()
            while not _stopping:
                _upload_ready()
                if _link.sweep_now or time.monotonic() >= next_sweep:
                    _link.sweep_now = False
                    retry_failed_uploads()
                    _prune_processed()
                    next_sweep = time.monotonic() + RETRY_FAILED_INTERVAL
                if once and not _link.sweep_now:
                    break
                _nap(0 if _link.sweep_now else POLL_INTERVAL)
            logger.info("Stopped; %s waiting", _count(_waiting(), "file"))
    finally:
        _serving = _stopping = False


# ---------------------------------------------------------------- --status


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * unit or unit == 60 <= seconds:
            return _count(int(seconds // unit), name)
    return _count(int(seconds), "second")


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _server_state() -> str:
    """Empty when the server answers HTTP within two seconds, whatever it answers; else why not."""
    problem = ["no answer within 2 seconds"]

    def ask() -> None:
        try:
            adapter, template, arguments = _connect(SERVER_URL, API_TOKEN)
            request = template.copy()
            request.method = "GET"
            adapter.send(request, timeout=2, **arguments).close()
            problem[0] = ""
        except (OSError, urllib3.exceptions.HTTPError) as error:
            problem[0] = _reason(error)

    asking = threading.Thread(target=ask, daemon=True)  # a thread, because no time-out bounds a name look-up
    asking.start()
    asking.join(2)
    return problem[0]


def _running() -> str:
    """The pid of the sender that holds the lock; empty where there is none."""
    try:
        fd = os.open(_lock_path(), os.O_RDONLY | _OPEN_FLAGS)
    except OSError:
        return ""
    try:
        _lock_file(fd, shared=True)  # let go at once by the close
        return ""
    except OSError:
        return _holder(fd)
    finally:
        os.close(fd)


def _listing(folder: Path) -> dict[str, os.stat_result]:
    """Names and file information, for --status, which makes no folder and changes nothing."""
    found = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    found[entry.name] = entry.stat(follow_symlinks=False)
    return found


def print_status() -> bool:
    """Print what a person wants to know at a glance; True when all is well. Locks and changes nothing."""
    now, pid, down = time.time(), _running(), _server_state()
    pending, failed, processed = map(_listing, (PENDING_DIR, FAILED_DIR, PROCESSED_DIR))
    print(f"Sender  {f'running (pid {pid})' if pid else 'not running'}")
    print(f"Server  {_public_url()} {f'not reachable: {down}' if down else 'reachable'}\n")
    return True


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Upload the sniffer's captures.", epilog="Settings: see .env.example.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--once", action="store_true", help="upload what is there, then exit: 0 when nothing is left, else 1")
    mode.add_argument("--status", action="store_true", help="tell how things stand: exit 0 when all is well, else 1")
    parser.add_argument("--version", action="version", version=f"sender.py {__version__}")
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(LOG_LEVEL)
    logging.raiseExceptions = False  # a console that went away (| head) stops no upload
    try:
        check_settings()
        if options.status:
            return 0 if print_status() else 1
        for number in _STOP_SIGNALS:
            signal.signal(number, _on_signal)
        monitor_and_upload(once=options.once)
        return 1 if options.once and _waiting() else 0
    except ValueError as error:
        logger.error("%s", error)
        return 2
    except (AlreadyRunning, OSError) as error:
        logger.error("%s", error)
        return 1


def _on_signal(number: int, frame: object) -> None:
    stop_sender()
    signal.signal(number, signal.SIG_DFL)  # the second one ends the program at once


if __name__ == "__main__":
    sys.exit(main())
