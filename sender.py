#!/usr/bin/env python3
"""Upload what a packet sniffer captures: every packet, once, whatever breaks in between.

The sniffer writes X.json (an array of packet objects) into logs/pending_upload/ and then creates the marker
X.json.ready. Once a second this program takes what is ready, POSTs it in batches to SERVER_URL and moves the file
to logs/processed/ or logs/failed_uploads/; the latter is retried by itself.

The spool: states of one file. A step from row to row is one rename; a crash leaves one of the rows, and the next
start goes on from there.

    state          pending_upload/                failed_uploads/           processed/   next step
    being written  X.json                                                                none: it has no marker
    ready          X.json, X.json.ready                                                  take it
    taken          X.json.taken (+ X.json.state)                                         upload what is left of it
    failed                                        X.json (+ X.json.state)                the next sweep
    done                                                                    X.json       none

X.json.state says how far the upload got and what failed last. X.rejected.json holds single packets that the server
will not have, with its reasons in X.rejected.json.state; they wait for a person. Nothing is ever overwritten: where
a name exists, the newcomer becomes X.1.json. Besides, logs/ has .sender.lock, a folder for an instant .sender.tmp; a
.gitkeep is let be.

Delivery is at least once on the wire, and exactly once on a server that honours Idempotency-Key: a batch whose answer
was lost goes out again byte for byte the same, under the same key.

Ctrl-C and SIGTERM let the current request finish and keep all progress; a second Ctrl-C ends at once.
Exit status: 0 done; 1 another sender is running, unusable folders, or (--once, --status) not all is well; 2 a bad
setting.
Settings come from the environment or from a .env beside this file; .env.example explains each.
"""

import argparse
import base64
import bisect
import codecs
import contextlib
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
import os
import random
import re
import signal
import socket
import ssl
import stat
import sys
import textwrap
import threading
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, TypeVar, Union
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import requests
import urllib3
from dotenv.parser import parse_stream
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

try:
    import sqlite3
except ImportError:  # a Python built without it: reading is then slower, and as exact
    sqlite3 = None  # type: ignore[assignment]

__version__ = "1.0.0"
logger = logging.getLogger("sender")

# ---------------------------------------------------------------- settings

T = TypeVar("T")
AnyPath = Union[str, "os.PathLike[str]"]
_bad_settings: list[str] = []  # one line each: name, value, what is allowed. Importing this module never fails


def _read_environment() -> dict[str, Optional[str]]:
    """The environment over the .env beside this file, which is not let into os.environ: that is the host's."""
    from_file = {}
    try:
        with open(Path(__file__).with_name(".env"), encoding="utf-8-sig") as file:
            for line in parse_stream(file):
                if line.error:
                    _bad_settings.append(f".env, line {line.original.line}, is not allowed: it must be NAME=value")
                elif line.key:
                    from_file[line.key] = line.value
    except FileNotFoundError:
        pass  # it is optional
    except (OSError, ValueError) as error:
        _bad_settings.append(f".env cannot be read ({error}): it must be a text file in UTF-8")
    return {**from_file, **os.environ}


_environment = _read_environment()


def _setting(name: str, default: T, convert: Callable[[str], T], allowed: str) -> T:
    """What the environment or .env says of `name`, else the default. An empty value counts as none."""
    text = (_environment.get(name) or "").strip()
    try:
        return convert(text) if text else default
    except (ValueError, RuntimeError):  # the latter from a ~ without a home
        shown = "***" if name == "API_TOKEN" else re.sub(r"(?s).*@|[?#;].*", "***", text)
        _bad_settings.append(f"{name}={_printable(shown)} is not allowed: it must be {allowed}")
        return default


def _number(kind: Callable[[str], float], least: float) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value <= 1_000_000:  # so that no sum of seconds overflows a clock; false for a NaN, too
            raise ValueError(text)
        return value

    return convert


def _one_of(*words: str) -> Callable[[str], str]:
    return lambda text: words[[word.lower() for word in words].index(text.lower())]


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(text)
    prepared = requests.Request("POST", text).prepare()  # what cannot be sent is refused now, not at the first file
    (urlsplit(prepared.url or "").hostname or "").encode("idna")  # as a look-up of the name will
    return text


def _token(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise ValueError(text)
    return text


def _printable(text: object) -> str:
    """`text` with control characters and undecodable bytes escaped: no file name can forge a log line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


_SECONDS, _ABOVE_0 = "a number of seconds above 0, at most 1000000", sys.float_info.min
_WHOLE = "a whole number from 1 to 1000000"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

SERVER_URL = _setting("SERVER_URL", "http://localhost:8000/ingest", _url, "an http or https URL with a host")
API_TOKEN = _setting("API_TOKEN", "", _token, "printable ASCII")  # sent as Authorization: Bearer
POLL_INTERVAL = _setting("POLL_INTERVAL", 1.0, _number(float, _ABOVE_0), _SECONDS)
MAX_RETRIES = _setting("MAX_RETRIES", 3, _number(int, 1), _WHOLE)  # attempts for one batch
RETRY_DELAY = _setting("RETRY_DELAY", 5.0, _number(float, 0), "a number of seconds from 0 to 1000000")  # then doubling
BATCH_SIZE = _setting("BATCH_SIZE", 1000, _number(int, 1), _WHOLE)  # packets in one request
REQUEST_TIMEOUT = _setting("REQUEST_TIMEOUT", 30.0, _number(float, _ABOVE_0), _SECONDS)
RETRY_FAILED_INTERVAL = _setting("RETRY_FAILED_INTERVAL", 300.0, _number(float, _ABOVE_0), _SECONDS)
COMPRESS = _setting("COMPRESS", "none", _one_of("none", "gzip"), "gzip or none")  # for slow links
KEEP_PROCESSED_DAYS = _setting("KEEP_PROCESSED_DAYS", 0.0, _number(float, 0), "a number of days, 0 for ever")
LOGS_DIR = _setting("LOGS_DIR", Path(__file__).with_name("logs"), lambda s: Path(s).expanduser(), "a folder").absolute()
LOG_LEVEL = _setting("LOG_LEVEL", "INFO", _one_of(*_LEVELS), "DEBUG, INFO, WARNING or ERROR")

PENDING_DIR = LOGS_DIR / "pending_upload"
FAILED_DIR = LOGS_DIR / "failed_uploads"
PROCESSED_DIR = LOGS_DIR / "processed"

# Suffixes beside a file X.json. None is longer than .ready, so whatever name had a marker has room for them.
READY, TAKEN, STATE = ".ready", ".taken", ".state"
REJECTED = ".rejected.json"
TEMPORARY = ".sender.tmp"
LOCK = LOGS_DIR / ".sender.lock"
NO_DATA = (TEMPORARY, ".gitkeep", ".DS_Store")
LONGEST_NAME = 255 - len(STATE)  # bytes

BLOCK = 128 * 1024  # bytes read and proved at a time: enough to be fast, and they stay in the CPU's cache
READ_AHEAD = 1024 * 1024  # bytes; to have a smaller file read by another thread costs more than it saves
LONGEST_PACKET = 4 * 1024 * 1024  # bytes; a longer one is damage, and not worth the memory
LONGEST_RECORD = 64 * 1024 * 1024  # bytes; some 200 for each rejected packet
REPLY_LIMIT = 8 * 1024  # bytes of a reply that are read
EARLY_SWEEPS = 5  # ahead of their time, until a new file fails: one that brings the server down must not do so often
RETRY_AFTER_LIMIT = 60  # seconds of a Retry-After that are honoured


def check_settings() -> None:
    """Raise ValueError with one line for each bad setting: its name, its value, what is allowed."""
    if _bad_settings:
        raise ValueError("\n".join(_bad_settings))


# ---------------------------------------------------------------- what an upload can come to


class Outcome(enum.Enum):
    """What one POST came to; truthy only for success. Each asks for a move of its own."""

    DELIVERED = "delivered"
    UNREACHABLE = "no connection, or a broken one: again later"
    BUSY = "429, 502, 503, 504, the server asks for patience: again later"
    TIMED_OUT = "no answer in time: again later, and smaller when it happens again"
    FAULT = "500, the server is broken or chokes on a packet: again later, then as REJECTED"
    AGAIN = "any other trouble that may pass: again later"
    REFUSED = "the configuration is wrong, for every file"
    TOO_LARGE = "413: a smaller batch"
    REJECTED = "400, 422, something in this batch: a smaller batch, until the offender is alone"
    TRY_PLAIN = "refused while compressed: the same once more, plain"
    UNREADABLE = "the file is not an array of packets: nothing is sent"
    STOPPED = "asked to stop: the next start goes on"

    def __bool__(self) -> bool:
        return self is Outcome.DELIVERED


_AGAIN_LATER = (Outcome.UNREACHABLE, Outcome.BUSY, Outcome.TIMED_OUT, Outcome.FAULT, Outcome.AGAIN)
_ENDS_SWEEP = (Outcome.UNREACHABLE, Outcome.BUSY, Outcome.TIMED_OUT, Outcome.REFUSED, Outcome.STOPPED)


@dataclass
class Answer:
    """What a batch came to, in words for a person: `headline` and `detail`. Times are seconds."""

    outcome: Outcome
    headline: str = ""
    detail: str = ""
    retry_after: float = 0
    took: float = 0

    def __bool__(self) -> bool:
        return bool(self.outcome)

    @property
    def reason(self) -> str:
        return f"{self.headline}: {self.detail}" if self.detail else self.headline


@dataclass
class Link:
    """What this process has learned about the server, carried from file to file."""

    batch_size: int = sys.maxsize  # what batches have shrunk to
    plain: bool = False  # compressed requests were refused
    kept_alive: bool = False  # the last exchange left a connection open
    down_since: Optional[float] = None  # monotonic time of the first failure after a success
    sweep_when_back: bool = False  # files have failed since the last sweep
    sweep_now: bool = False
    early_sweeps: int = 0  # sweeps that may still come ahead of their time
    accepted_at: str = ""  # time of the last success, as _now() writes it


_link = Link()
_serving = 0  # calls of monitor_and_upload() under way
_stopping = False
_turn = threading.RLock()  # one file at a time, also where a host calls process_json_file() beside the loop
_STAYS = "it stays in its folder and is tried again"
_told: dict[Path, str] = {}  # trouble that lasts is told once, not at every poll
_stale_markers: set[Path] = set()  # files that are taken, but whose markers could not be removed yet


def stop_sender() -> None:
    """Ask a running monitor_and_upload() to return: after its current request, within a second of any wait."""
    global _stopping
    _stopping = _serving > 0  # without a loop there is nothing to stop, and a later process_json_file() is not meant


def _nap(seconds: float) -> bool:
    """Wait; False when asked to stop. A plain flag: Event.set in a signal handler can deadlock with Event.wait."""
    end = time.monotonic() + seconds
    while not _stopping and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
    return not _stopping


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")  # sorts as text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    for unit, noun in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= (unit if unit == 60 else 2 * unit):
            return _count(int(seconds // unit), noun)
    return _count(max(int(seconds), 0), "second")


def _complain(path: Path, error: Exception, consequence: str) -> None:
    """Tell of a file operation that failed: once, for as long as it fails in the same way."""
    text = f"{_printable(path.name)}: {_reason(error)}; {consequence}"
    if _told.get(path) != text:
        _told[path] = text
        logger.error("%s", text)


@contextlib.contextmanager
def _complaining(path: Path, consequence: str) -> Iterator[None]:
    """Go on after a file operation that fails, with a _complain(); once it succeeds, forget what was told."""
    try:
        yield
        _told.pop(path, None)
    except OSError as error:
        _complain(path, error, consequence)


def _cause(error: BaseException) -> BaseException:
    """The innermost cause of an error: what happened, without the URLs that the outer ones carry."""
    while True:
        wrapped = (argument for argument in error.args if isinstance(argument, BaseException))  # urllib3's way
        context = None if error.__suppress_context__ else error.__context__
        inner = error.__cause__ or context or next(wrapped, None)
        if inner is None:
            return error
        error = inner


def _reason(error: BaseException) -> str:
    error = _cause(error)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return _one_line(f"{text} ({name})" if name else text)


@functools.lru_cache(maxsize=1)
def _secrets(url: str, token: str) -> list[str]:
    """What must not be shown, longest first: the token, the URL's password and query, what goes into Authorization."""
    parts = urlsplit(url)
    credentials = ""
    with contextlib.suppress(OSError):  # told by whoever sends
        credentials = _session(url, token)[1].headers.get("Authorization", "").partition(" ")[2]
    secrets = {token, credentials, parts.query, parts.password or "", unquote(parts.password or "")}
    secrets |= {value for _, value in parse_qsl(parts.query) if len(value) > 3}
    with contextlib.suppress(ValueError):  # not Basic, as from .netrc
        secrets.add(base64.b64decode(credentials, validate=True).decode().partition(":")[2])
    for respell in (quote, functools.partial(quote, safe=""), lambda secret: json.dumps(secret)[1:-1]):
        secrets |= {respell(secret) for secret in secrets}
    return sorted(filter(None, secrets), key=len, reverse=True)


def _one_line(text: str) -> str:
    """Foreign text made fit for the log: one printable line of at most 200 characters, with secrets hidden."""
    for secret in _secrets(SERVER_URL, API_TOKEN):
        text = text.replace(secret, "***")
    line = _printable(" ".join(text.split()))
    return line if len(line) <= 200 else line[:199] + "…"


def _public_url() -> str:
    url = urlsplit(SERVER_URL)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


# ---------------------------------------------------------------- where the platforms differ

# Odd files are never followed, and opening one never blocks. Windows has neither these flags nor FIFOs.
_OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))

if sys.platform == "win32":
    import msvcrt

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
    _BUSY_FILE_PAUSES = (0.1,) * 20  # seconds: a virus scanner holds a new file for a moment

    def _lock_file(fd: int, shared: bool = False) -> None:
        os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte far behind the pid, because a locked byte cannot be read
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def _sync_folder(folder: Path) -> None:
        """Windows cannot flush a folder; NTFS keeps its renames in order by its journal."""

else:
    import fcntl

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
    _BUSY_FILE_PAUSES: tuple[float, ...] = ()

    def _lock_file(fd: int, shared: bool = False) -> None:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))

    def _sync_folder(folder: Path) -> None:
        with contextlib.suppress(OSError):  # some filesystems cannot; the step itself has been made
            fd = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


# ---------------------------------------------------------------- the spool's files


class NotRegular(OSError):
    """A symlink, FIFO, folder or device stands where a file should."""

    def __init__(self, path: Path) -> None:
        super().__init__(errno.EINVAL, "not a regular file, refused", str(path))


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file. Checked before (a device may act on being opened) and after (it may be swapped)."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise NotRegular(path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _OPEN_FLAGS))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotRegular(path)
    return file


def _exists(path: Path) -> bool:
    """lexists() that raises OSError where it cannot tell; that one says no, and a rename would overwrite."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _free_path(folder: Path, name: str, rejected: bytes = b"") -> Path:
    """Where `name` can go in `folder` without overwriting: X.json, X.1.json, … (X.rejected.json for `rejected` ones).

    A file that holds just those counts as free: a crash came between its writing and the note of it.
    """
    stem, suffix = os.path.splitext(name)
    number = -1
    while True:
        number += 1
        tail = (f".{number}" if number else "") + (REJECTED if rejected else suffix)
        while stem and tail != suffix and len(os.fsencode(stem + tail)) > LONGEST_NAME:
            stem = stem[:-1]
        path = folder / (stem + tail)
        if folder == FAILED_DIR and not rejected and path.name.endswith(REJECTED):
            continue  # a capture by that name would pass for set-aside packets, and never be swept
        if not _exists(path):
            if folder != FAILED_DIR or not _exists(_beside(path, STATE)) or _has_record(path):
                return path
        elif rejected:
            with contextlib.suppress(OSError), _open_regular(path) as file:
                if file.read() == rejected:
                    return path


def _has_record(path: Path) -> bool:
    """Whether X.json.state is ours: a record, or the reasons beside set-aside packets."""
    with contextlib.suppress(OSError, *_DAMAGED):
        Progress.read(path)
        return True
    with contextlib.suppress(OSError, *_DAMAGED), _open_regular(_beside(path, STATE)) as file:
        content = json.loads(file.read(LONGEST_RECORD))
        return isinstance(content, dict) and content.keys() == {"file", "rejected"}
    return False


def _rename(step: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    for pause in _BUSY_FILE_PAUSES:
        try:
            return step(source, target)
        except PermissionError:
            time.sleep(pause)
    return step(source, target)


def _move(source: Path, target: Path) -> None:
    """Rename, durably: once this has returned, no power cut brings the old name back."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _rename(os.rename, source, target)
    _sync_folder(target.parent)


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably: at any moment `path` holds the old content or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY)
    try:
        _remove(temporary)
        with open(temporary, "xb") as file:  # never through a link, never into a FIFO
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a power cut could else leave the new name without content
        _rename(os.replace, temporary, path)
    except OSError:
        _remove(temporary)
        raise
    _sync_folder(path.parent)


def _remove(path: Path) -> None:
    """Remove a file of ours that nobody needs any more; where that fails, a later sweep removes it."""
    with contextlib.suppress(OSError):
        os.unlink(path)


@dataclass
class Progress:
    """How far one file got: the content of X.json.state, for the next round and for the person who asks."""

    size: int  # bytes
    mtime_ns: int  # with `size`: the file that this belongs to
    packets: int = -1  # in the file; -1 until it has been read
    uploaded: int = 0  # packets done with, from the file's beginning
    batch_size: int = 1
    attempts: int = 0  # rounds that failed
    last_error: str = ""
    time: str = ""  # of the last failure, UTC
    unreadable: bool = False  # not JSON: not read again until it changes
    timed_out_to: int = 0  # end of the batch on which a round ended with a time-out
    fault_to: int = 0  # the same with a 500
    set_aside: int = 0  # packets of the file in X.rejected.json
    rejected: list[tuple[int, str]] = field(default_factory=list)  # a packet's index, the server's reason

    def next_batch(self) -> tuple[int, int]:
        return self.uploaded, self.batch_size

    def belongs_to(self, status: os.stat_result) -> bool:
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)

    def to_json(self) -> bytes:
        return json.dumps(vars(self), ensure_ascii=False).encode(errors="surrogatepass")

    @classmethod
    def read(cls, path: Path) -> "Progress":
        """The record of X.json. Raises OSError, and one of _DAMAGED for what to_json() cannot have written."""
        text = _unsaved.get(path)
        if text is None:
            with _open_regular(_beside(path, STATE)) as file:
                text = file.read(LONGEST_RECORD)
        progress = cls(**json.loads(text))
        blank = cls(0, 0)
        if any(type(value) is not type(getattr(blank, name)) for name, value in vars(progress).items()):
            raise TypeError("wrong types")
        if not 0 <= progress.uploaded <= max(progress.packets, 0) <= progress.size or progress.batch_size < 1:
            raise ValueError("wrong numbers")
        if max(progress.size, progress.attempts, progress.timed_out_to, progress.fault_to) > sys.maxsize:
            raise ValueError("absurd numbers")
        progress.rejected = [(range(progress.uploaded)[index], str(why)) for index, why in progress.rejected]
        return progress


_DAMAGED = (NotRegular, ValueError, TypeError, IndexError, RecursionError)  # what a record can be that is not ours
_unsaved: dict[Path, bytes] = {}  # the records that a full disk refuses, by their X.json
_unmoved: dict[Path, Answer] = {}  # why files failed that failed_uploads/ does not take


def _load_progress(path: Path, data: Path) -> Progress:
    """The progress of X.json: from its record, if that belongs to this very `data`, else a fresh one.

    Raises OSError where the record is there but cannot be read now: to start afresh would send packets again.
    """
    status = os.lstat(data)
    fresh = Progress(status.st_size, status.st_mtime_ns, batch_size=min(_link.batch_size, BATCH_SIZE))
    try:
        progress = Progress.read(path)
    except _DAMAGED as error:
        what = "this record is damaged and ignored, the upload starts from the first packet"
        _complain(_beside(path, STATE), error, what)
        return fresh
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):  # the latter: put there by hand, with no room for one
            return fresh
        raise
    if progress.time > _now():  # a clock was wrong
        progress.time = ""
    return progress if progress.belongs_to(status) else fresh


def _save_progress(path: Path, progress: Progress, tell: bool = True) -> None:
    """Write the record. A disk that refuses it stops no upload: it is kept in memory until the disk takes it."""
    record, _unsaved[path] = _beside(path, STATE), progress.to_json()
    try:
        _write(record, _unsaved[path])
        del _unsaved[path]
        _told.pop(record, None)
    except OSError as error:
        if tell:
            _complain(record, error, "the upload goes on, but a crash now would send packets again")


def _forget(path: Path) -> None:
    _unsaved.pop(path, None)
    _told.pop(_beside(path, STATE), None)
    _remove(_beside(path, STATE))


# ---------------------------------------------------------------- reading


class Batch(NamedTuple):
    """One request's worth of packets: `body` is a JSON array of so many `packets`."""

    body: bytes
    packets: int
    label: str = ""  # "X.json: ", for the log
    progress: str = ""  # " (3,000/20,000 packets)", once this batch is delivered
    attempts: int = 1


Packets = Union[list[dict[str, Any]], Batch]

_WHITE = b" \t\r\n"
_DELIMITER = re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")
_SEPARATOR = re.compile(rb'\}[ \t\r\n]{0,32},[ \t\r\n]{0,32}(\{[ \t\r\n]{0,32}"\w)')
_LONG_NUMBER = re.compile(rb"\d{16}")  # of more than 2,000 digits, in every 128th byte
_COUNT = "SELECT CASE WHEN json_valid(?1) THEN json_array_length(?1) END"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=len, parse_constant=_no_constant)  # only finds ends: builds no dicts


def _walk(data: bytes, last: bool, limit: int) -> tuple[list[int], int, bool]:
    """Step from packet to packet, decoding each; stop before one that goes on in the next block.

    Returns where each starts, how many bytes they take, and whether the array ends there. Raises ValueError(reason,
    packets of the block before it, its place in the block).
    """
    text = data.decode("latin-1")  # a character a byte, so that positions are offsets; UTF-8 is checked below
    starts: list[int] = []
    at, closed = 0, False
    try:
        while not closed and len(starts) < limit:
            if not text.startswith("{", at):
                raise json.JSONDecodeError("Expecting a packet (an object)", text, at)
            end = _DECODER.raw_decode(text, at)[1]
            delimiter = _DELIMITER.match(text, end)
            if not delimiter:
                raise json.JSONDecodeError("Expecting ',' or ']' after a packet", text, end)
            starts.append(at)
            at, closed = delimiter.end(), delimiter[1] == "]"
    except (ValueError, RecursionError) as error:
        if last or len(data) - at > LONGEST_PACKET:
            reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise ValueError(reason, len(starts), getattr(error, "pos", at)) from None
    try:
        data[:at].decode()
    except UnicodeDecodeError as error:
        before = sum(start <= error.start for start in starts) - 1
        raise ValueError(f"not UTF-8, {error.reason}", before, error.start) from None
    return starts, at, closed


class _Leap:
    """Takes all packets of a block at once, where it can be proved that `separator` stands between all of them.

    The proof. In brackets the text is valid JSON, and it begins with an object. Wherever a comma follows a closing
    brace, that is the separator (`odd` finds any other), so what follows an object in the array is an object: all are.
    Without a bracket in the text there is no other array. And no separator lies in a string: it ends in a quote and a
    letter; the quote would close the string, and no letter follows a string. So each is a boundary, and there are no
    others. SQLite's parser, five times as fast as json's, is kept from what it sees with other eyes: a NUL would end
    its text, Python refuses an integer of thousands of digits, and both refuse deep nesting, but not the same depth.
    """

    def __init__(self, separator: re.Match[bytes]) -> None:
        self.separator = separator[0]
        self.tail = len(separator[1])  # of the separator, what belongs to the packet behind it
        self.find = re.compile(re.escape(separator[0]))
        self.odd = re.compile(rb"\}(?!%s)(?:,|[ \t\r\n]+[,}]|\}{20})" % re.escape(separator[0][1:]))
        self.database = sqlite3.connect(":memory:")

    def take(self, data: bytes, last: bool) -> Optional[tuple[int, int, bool]]:
        """How many packets there are, how many bytes they take, and whether the array ends there."""
        if last:
            body, used = data.rstrip(_WHITE), len(data)
            body = body[:-1].rstrip(_WHITE) if body.endswith(b"]") else b""
        else:
            cut = data.rfind(self.separator)
            body, used = data[: cut + 1], cut + len(self.separator) - self.tail
        if not body.startswith(b"{") or b"[" in body or b"\0" in body:
            return None
        if self.odd.search(body) or _LONG_NUMBER.search(body[::128]):
            return None
        try:
            (count,) = self.database.execute(_COUNT, (f"[{body.decode()}]",)).fetchone()
        except (UnicodeDecodeError, sqlite3.Error):
            return None
        return (count, used, last) if count else None


def _changed(path: Path) -> OSError:
    return OSError(errno.EBUSY, "it changed while it was read", str(path))


class NotACapture(ValueError):
    """The file is not one UTF-8 JSON array of objects: the reason, and the place."""


class Capture(contextlib.AbstractContextManager["Capture"]):
    """A capture file, open, from which batches are cut.

    Made only when the whole file is proved to be one UTF-8 JSON array of objects; raises NotACapture otherwise, and
    OSError. In memory is one mark for each block of packets.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open_regular(path)
        self._numbers, self._offsets = array("Q"), array("Q")  # marks: packet number, byte offset; at last the end
        self._leapt = bytearray()  # whether all packets behind a mark have the leap's separator between them
        self._leap: Optional[_Leap] = None
        self._last = (-1, 0)  # the last batch's end, packet number and byte offset: mostly the next one's beginning
        try:
            self.status = os.fstat(self._file.fileno())
            self._index()
        except BaseException:
            self._file.close()
            raise
        finally:
            if self._leap:
                self._leap.database.close()  # in the thread to which it belongs

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._numbers[-1]

    def _skip_white(self, data: bytes, base: int) -> tuple[bytes, int]:
        """`data`, which stands at offset `base`, and what follows it: from where white space ends, and that offset."""
        while not (rest := data.lstrip(_WHITE)) and (more := self._file.read(BLOCK)):
            data, base = more, base + len(data)
        return rest, base + len(data) - len(rest)

    def _index(self) -> None:
        data = self._file.read(len(codecs.BOM_UTF8))
        data, base = (b"", len(data)) if data == codecs.BOM_UTF8 else (data, 0)  # let pass (RFC 8259, section 8.1)
        data, base = self._skip_white(data, base)
        if not data.startswith(b"["):
            what = "which begins with '['" if data else "but the file is empty"
            raise NotACapture(f"Expecting an array of packets, {what} (byte {base:,})")
        data, base = self._skip_white(data[1:], base + 1)
        closed = data.startswith(b"]")
        if closed:
            data, base = data[1:], base + 1
        number = 0
        limit = 2 if sqlite3 else sys.maxsize  # two packets show what separates them
        while not closed:
            more = self._file.read(max(BLOCK, len(data)))  # twice as much while not one packet fits
            data, base = self._skip_white(data + more, base)
            try:
                leapt = self._leap and self._leap.take(data, not more)
                if leapt:
                    count, used, closed = leapt
                else:
                    starts, used, closed = _walk(data, not more, limit)
                    count = len(starts)
            except ValueError as error:
                reason, before, at = error.args
                raise NotACapture(f"{reason} (packet {number + before + 1:,}, byte {base + at:,})") from None
            if limit == count == 2:
                limit = sys.maxsize
                separator = _SEPARATOR.match(data, data.rfind(b"}", 0, starts[1]))
                self._leap = _Leap(separator) if separator else None
            if count:
                self._numbers.append(number)
                self._offsets.append(base)
                self._leapt.append(bool(leapt))
            number += count
            data, base = data[used:], base + used
        data, base = self._skip_white(data, base)
        if data:
            raise NotACapture(f"Extra data after the array (byte {base:,})")
        self._numbers.append(number)
        self._offsets.append(base)

    def _offset(self, number: int) -> int:
        """Where packet `number` starts: at a mark, or so many packets behind it."""
        mark = bisect.bisect_right(self._numbers, number) - 1
        offset, behind = self._offsets[mark], number - self._numbers[mark]
        if not behind:
            return offset
        self._file.seek(offset)
        block = self._file.read(self._offsets[mark + 1] - offset)
        try:
            if self._leap and self._leapt[mark]:
                cut = next(itertools.islice(self._leap.find.finditer(block), behind - 1, None))
                return offset + cut.end() - self._leap.tail
            return offset + _walk(block, False, behind + 1)[0][behind]
        except (ValueError, IndexError, StopIteration):
            raise _changed(self._path) from None

    def cut(self, start: int, stop: int) -> bytes:
        """Packets `start` to `stop` as a JSON array: their bytes, and what stands between them, as in the file."""
        begin = self._last[1] if start == self._last[0] else self._offset(start)
        end = self._offset(stop)
        self._last = (stop, end)
        self._file.seek(begin)
        text = self._file.read(end - begin)
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise _changed(self._path)  # what was proved is no more
        return b"".join((b"[", memoryview(text)[: text.rfind(b"}") + 1], b"]"))


_ahead: dict[Path, "Future[Capture]"] = {}  # taken files that another thread reads


def _read_in_background(path: Path) -> "Future[Capture]":
    future: Future[Capture] = Future()

    def read() -> None:
        try:
            future.set_result(Capture(path))
        except BaseException as error:  # raised where the capture is asked for
            future.set_exception(error)

    threading.Thread(target=read, daemon=True).start()
    return future


def _capture(path: Path) -> Capture:
    ahead = _ahead.pop(path, None)
    return ahead.result() if ahead else Capture(path)


def _forget_ahead(path: Path) -> None:
    """Close what has been read and was not needed, now or when its reader is done."""

    def close(ahead: "Future[Capture]") -> None:
        with contextlib.suppress(OSError, NotACapture), ahead.result():
            pass

    if ahead := _ahead.pop(path, None):
        ahead.add_done_callback(close)


def read_json_file(json_path: AnyPath) -> list[dict[str, Any]]:
    """The whole file as a list of packet dicts. Raises ValueError with the reason if it is no JSON array of objects."""
    with Capture(Path(json_path)) as capture:
        try:
            packets: list[dict[str, Any]] = json.loads(capture.cut(0, len(capture)))
        except RecursionError:  # SQLite's limit for nesting is the higher one
            raise NotACapture("nested too deeply") from None
    return packets


# ---------------------------------------------------------------- one upload


class _Countdown(io.RawIOBase):
    """The read side of a socket whose time-out holds for a whole reply; a socket's own starts anew with every byte."""

    def __init__(self, sock: socket.socket, raw: Any) -> None:
        self._sock, self._raw = sock, raw
        self._end = time.monotonic() + (sock.gettimeout() or REQUEST_TIMEOUT)
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        left = self._end - time.monotonic()
        if left <= 0:
            raise socket.timeout("timed out")
        self._sock.settimeout(left)
        received: Optional[int] = self._raw.readinto(buffer)
        self.ended = received == 0
        return received

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Reply(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._wire = _Countdown(sock, self.fp.detach())
        self.fp = io.BufferedReader(self._wire)

    def begin(self) -> None:
        super().begin()
        while self.status in (102, 103):  # not yet the answer (RFC 9110, section 15.2); http.client skips 100 alone
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        if self._wire.ended:  # http.client takes headers that were cut off for whole ones
            raise http.client.HTTPException("the reply ends within its headers")
        self.headers.defects.clear()  # urllib3 would log them, with a traceback and the whole URL
        self.headers.set_payload("")


class _Adapter(requests.adapters.HTTPAdapter):
    """requests' own adapter for the one server, with its pool looked up once and replies that cannot drip for ever."""

    _pool: Any = None

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        if self._pool is None:
            try:
                self._pool = super().get_connection_with_tls_context(*args, **kwargs)
            except requests.RequestException:
                raise
            except (TypeError, ValueError):
                raise requests.exceptions.InvalidProxyURL("the environment's proxy has a malformed URL") from None
            self._pool.ConnectionCls = type("Connection", (self._pool.ConnectionCls,), {"response_class": _Reply})
        return self._pool


@functools.lru_cache(maxsize=1)
def _session(url: str, token: str) -> tuple["functools.partial[requests.Response]", requests.PreparedRequest]:
    """What sends through the one session, and a prepared POST.

    Proxies, CA bundle and .netrc are looked up here, once; a session does so at every request, at half of its cost.
    It is the session's adapter that sends: the session would read a redirect's endless body to its end. So redirects
    are not followed: a POST would become a GET, and a login page's 200 would look like success.
    """
    session = requests.Session()
    session.mount(url, _Adapter())
    session.headers.clear()  # of requests' own none is needed
    headers = {"Content-Type": "application/json", "User-Agent": f"sender.py/{__version__}"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    # A callable as auth keeps requests from looking into .netrc and the URL: the token wins.
    auth = (lambda request: request) if token else None
    try:
        post = session.prepare_request(requests.Request("POST", url, headers=headers, auth=auth))
    except ValueError:  # not with its text: it may quote a password
        raise OSError(errno.EINVAL, "the .netrc, or the URL's password, has a character that cannot be sent") from None
    bundle = _environment.get("REQUESTS_CA_BUNDLE") or None  # requests does not know .env
    arguments: Any = session.merge_environment_settings(url, {}, True, bundle, None)
    return functools.partial(session.get_adapter(url).send, **arguments), post


def _post(batch: Batch, compress: bool) -> tuple[int, Any, str]:
    """One POST: status, headers and the beginning of the reply's text. Raises OSError and urllib3's HTTPError."""
    send, post = _session(SERVER_URL, API_TOKEN)
    request = post.copy()
    request.headers["Idempotency-Key"] = f'"{hashlib.sha256(batch.body).hexdigest()}"'
    request.body = gzip.compress(batch.body, 6, mtime=0) if compress else batch.body
    if compress:
        request.headers["Content-Encoding"] = "gzip"
    request.headers["Content-Length"] = str(len(request.body))
    reused, _link.kept_alive = _link.kept_alive, False
    try:
        response = send(request, timeout=REQUEST_TIMEOUT)
    except requests.ConnectionError as error:
        # A server may close an idle connection at the very moment that it is used again. That is no failure, and the
        # key makes it safe to send once more at once (RFC 9110, section 9.2.2).
        if not (reused and isinstance(_cause(error), (ConnectionError, ssl.SSLEOFError))):
            raise
        response = send(request, timeout=REQUEST_TIMEOUT)
    with contextlib.closing(response.raw):  # what is not read to its end is not kept alive
        response.raw.enforce_content_length = True  # urllib3 1 does not do so by itself
        try:
            text = b""
            while more := response.raw.read(REPLY_LIMIT - len(text), decode_content=False):
                text += more
        except (OSError, HTTPError):
            if 200 <= response.status_code < 300:  # success counts only when it has arrived whole
                raise
            text = b""
        else:
            closes = response.headers.get("Connection", "").lower() == "close" or response.raw.version == 10
            _link.kept_alive = len(text) < REPLY_LIMIT and not closes
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


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, section 10.2.3: a number or a date); 0 for nonsense."""
    try:
        wait = float(value) if value.isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return 0
    return min(max(wait, 0), RETRY_AFTER_LIMIT)


def _ask(batch: Batch, compress: bool) -> Answer:
    """POST a batch and put what came of it into words."""
    try:
        status, headers, text = _post(batch, compress)
    except (OSError, HTTPError) as error:  # requests' exceptions are OSErrors
        return _network_answer(error)
    outcome, detail = _classify(status, compress), _one_line(text)
    if outcome:
        _check_count(batch, text)
        return Answer(outcome)
    if outcome is Outcome.REFUSED:
        advice = "check API_TOKEN" if status in (401, 403) else "check SERVER_URL"
        if 300 <= status < 400:
            advice += f", the server points to {_one_line(headers.get('Location', 'nowhere'))}"
        detail = f"{advice}; {detail}" if detail else advice
    headline = f"Server error: {status} {http.client.responses.get(status, '')}".rstrip()
    return Answer(outcome, headline, detail, _retry_after(headers.get("Retry-After", "")))


def _network_answer(error: Exception) -> Answer:
    server, cause = _public_url(), _cause(error)
    mistrust = (ssl.SSLCertVerificationError, urllib3.util.ssl_match_hostname.CertificateError)
    if isinstance(cause, mistrust) or getattr(cause, "library", "") in ("X509", "PEM"):
        what = getattr(cause, "verify_message", None) or str(cause)
        bundle = _session(SERVER_URL, API_TOKEN)[0].keywords["verify"]
        now = f" (now {bundle})" if isinstance(bundle, str) else ""
        advice = f"{_one_line(what)}; check SERVER_URL, or name the right CA in REQUESTS_CA_BUNDLE{now}"
        return Answer(Outcome.REFUSED, f"Cannot trust server {server}", advice)
    foreign = not isinstance(error, (requests.RequestException, HTTPError))  # no CA bundle, say
    if foreign or isinstance(error, ValueError):  # so are requests' InvalidURL and InvalidSchema
        return Answer(Outcome.REFUSED, f"Cannot send to server {server}", _reason(error))
    wrapped = getattr(error.args[0] if error.args else None, "reason", None)
    if isinstance(wrapped, (ConnectTimeoutError, NewConnectionError, ProxyError)):
        through = " through the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
        return Answer(Outcome.UNREACHABLE, f"Cannot connect to server {server}{through}", _reason(error))
    if isinstance(cause, (socket.timeout, urllib3.exceptions.TimeoutError)):
        return Answer(Outcome.TIMED_OUT, "Request timed out", f"no complete answer within {REQUEST_TIMEOUT:g} seconds")
    return Answer(Outcome.UNREACHABLE, f"No usable answer from server {server}", _reason(error))


def _check_count(batch: Batch, text: str) -> None:
    """Warn where the server's own count is below ours."""
    with contextlib.suppress(ValueError, RecursionError):  # the reply need not be JSON
        reply = json.loads(text)
        for name in ("packets_received", "raw_packets"):
            count = reply.get(name) if isinstance(reply, dict) else None
            if isinstance(count, int) and 0 <= count < batch.packets:
                logger.warning("%ssent %d packets, but the server's %s is %d", batch.label, batch.packets, name, count)


def _batch(packets: Packets) -> Batch:
    if isinstance(packets, Batch):
        return packets
    return Batch(json.dumps(packets, allow_nan=False).encode(), len(packets), attempts=MAX_RETRIES)


def upload_packets(packets: Packets, retry_count: int = 0) -> Answer:
    """Exactly one POST of one batch; the answer is truthy only on success. An empty list needs none.

    `retry_count` is the number of attempts before, for the log. Never raises for what a server or network does.
    """
    check_settings()
    batch = _batch(packets)
    if not batch.packets:
        return Answer(Outcome.DELIVERED)
    started = time.monotonic()
    answer = _ask(batch, compress=COMPRESS == "gzip" and not _link.plain)
    answer.took = time.monotonic() - started
    if answer:
        logger.info("%s✓ Successfully uploaded %d packets%s", batch.label, batch.packets, batch.progress)
        _note_success()
        return answer
    attempt = f" (attempt {retry_count + 1}/{batch.attempts})" if answer.outcome in _AGAIN_LATER else ""
    level = logging.ERROR if answer.outcome is Outcome.REFUSED else logging.WARNING
    logger.log(level, "%s%s%s%s", batch.label, answer.headline, attempt, answer.detail and f": {answer.detail}")
    if _link.down_since is None and (attempt or answer.outcome is Outcome.REFUSED):
        _link.down_since = started
    return answer


def _note_success() -> None:
    """The server accepts: after a failure, tell how long it did not, and have the failed files swept."""
    _link.accepted_at = _now()
    if _link.down_since is not None:
        away, _link.down_since = time.monotonic() - _link.down_since, None
        logger.info("The server is back after %s; %s waiting", _duration(away), _count(_waiting(), "file"))
    if _link.sweep_when_back:
        _link.sweep_when_back, _link.sweep_now = False, True


def upload_with_retry(packets: Packets) -> Answer:
    """Up to MAX_RETRIES attempts (a Batch says how many); truthy only on success.

    Waits RETRY_DELAY before the second attempt, then twice that, and so on; longer where a Retry-After asks for it. Up
    to 10 % of jitter keeps many senders from coming back in step. stop_sender() ends the wait.
    """
    batch = _batch(packets)
    for attempt in range(batch.attempts):
        answer = upload_packets(batch, attempt)
        if answer.outcome is Outcome.TRY_PLAIN:
            _link.plain = True
            answer = upload_packets(batch, attempt)
            _link.plain = bool(answer)
            if answer:
                logger.warning("The server takes plain requests only: compression stays off")
        if answer.outcome not in _AGAIN_LATER or attempt == batch.attempts - 1:
            break
        delay = max(RETRY_DELAY * 2 ** min(attempt, 20), answer.retry_after)
        logger.info("%sRetrying in %g seconds...", batch.label, round(delay, 1))
        if not _nap(delay * random.uniform(1, 1.1)):  # noqa: S311
            break
    return answer


# ---------------------------------------------------------------- one file


def _learn(progress: Progress, sent: int, answer: Answer) -> bool:
    """Move `progress` on by the answer to a batch of `sent` packets; False when this round of the file is over.

    One mechanism serves 413, slow answers, time-outs and rejected packets: the batch size, halved where the answer
    says that a batch was too much, and growing back with every success.
    """
    outcome, end, half = answer.outcome, progress.uploaded + sent, max(1, sent // 2)
    works_for_others = "" < progress.time < _link.accepted_at <= _now()  # false where the clock was put back
    if outcome is Outcome.FAULT and progress.uploaded < progress.fault_to and works_for_others:
        outcome = Outcome.REJECTED
    if outcome:
        progress.uploaded = end
        bearable = int(sent * REQUEST_TIMEOUT / 2 / max(answer.took, 1e-3))  # packets, at the pace of this answer
        grown = min(BATCH_SIZE, max(progress.batch_size, min(2 * progress.batch_size, bearable)))
        progress.batch_size = half if answer.took > REQUEST_TIMEOUT / 2 else grown
        return True
    if outcome in (Outcome.TOO_LARGE, Outcome.REJECTED):
        progress.batch_size = half
        return sent > 1 or _pass_over(progress, answer, works_for_others)
    if outcome is Outcome.FAULT:
        progress.fault_to = end
    if outcome is Outcome.TIMED_OUT:
        progress.batch_size = half if progress.uploaded < progress.timed_out_to else progress.batch_size
        progress.timed_out_to = end
    return False


def _pass_over(progress: Progress, answer: Answer, works_for_others: bool) -> bool:
    """Pass over one packet that is refused alone; False where it is not about this packet, with nothing passed over.

    It is not when three in a row are refused, or every packet of a file that has no three, unless the server has
    accepted others since this file failed.
    """
    progress.rejected.append((progress.uploaded, answer.reason))
    progress.uploaded += 1
    in_a_row = progress.rejected[-3:]
    three = len(in_a_row) == 3 and in_a_row[0][0] == progress.uploaded - 3
    if not three and (len(in_a_row) < progress.packets or works_for_others):
        return True
    del progress.rejected[-3:]
    progress.uploaded -= len(in_a_row)
    return False


def _upload(capture: Capture, path: Path, progress: Progress, attempts: int) -> Answer:
    """Upload what `progress` says is left; returns the last answer.

    Before each POST the record on disk says which batch goes out. So a crash repeats that one batch and no other, byte
    for byte and under its old key, whether or not the server got it.
    """
    on_disk = progress.next_batch() if progress.packets >= 0 else (0, BATCH_SIZE)
    progress.packets = len(capture)
    if progress.uploaded >= progress.timed_out_to:  # else the server may have this very batch, and know its key
        progress.batch_size = min(progress.batch_size, BATCH_SIZE)
    while progress.uploaded < progress.packets:
        if progress.next_batch() != on_disk:
            _save_progress(path, progress)
            on_disk = progress.next_batch()
        if _stopping:
            return Answer(Outcome.STOPPED)
        stop = min(progress.uploaded + progress.batch_size, progress.packets)
        sent = stop - progress.uploaded
        told = f" ({stop:,}/{progress.packets:,} packets)" if sent < progress.packets else ""
        answer = upload_with_retry(
            Batch(capture.cut(progress.uploaded, stop), sent, f"{_printable(path.name)}: ", told, attempts)
        )
        if _stopping and not answer:
            return Answer(Outcome.STOPPED)
        goes_on = _learn(progress, sent, answer)
        _link.batch_size = progress.batch_size
        if not goes_on:
            return answer
    if progress.rejected:
        _set_aside(capture, path, progress)
    return Answer(Outcome.DELIVERED)


def _set_aside(capture: Capture, path: Path, progress: Progress) -> None:
    """Keep the packets that the server refused one by one in X.rejected.json, with its reasons beside them."""
    content = b"[" + b",\n".join(capture.cut(index, index + 1)[1:-1] for index, _ in progress.rejected) + b"]\n"
    reasons = [{"packet": index + 1, "reason": reason} for index, reason in progress.rejected]
    target = _free_path(FAILED_DIR, path.name, content)
    _write(target, content)
    _write(_beside(target, STATE), json.dumps({"file": path.name, "rejected": reasons}, indent=1).encode())
    progress.set_aside = len(progress.rejected)
    progress.rejected = []  # only now: after a crash before this, the same content goes to the same place again
    _save_progress(path, progress)
    what = f"the server rejects {_count(len(reasons), 'packet')}, kept in failed_uploads/{_printable(target.name)}"
    logger.error("%s: %s: %s", _printable(path.name), what, reasons[0]["reason"])


def _round(path: Path, data: Path, attempts: int) -> Answer:
    """One round of X.json: upload what is left of `data`, then move it. Raises OSError where a file operation fails."""
    progress = _load_progress(path, data)
    noted = progress.to_json()
    delivered = progress.uploaded == progress.packets and not progress.rejected
    only_move = delivered or data in _unmoved
    answer = _unmoved.pop(data, Answer(Outcome.DELIVERED))
    try:
        if not only_move:
            try:
                with _capture(data) as capture:
                    if not progress.belongs_to(capture.status):
                        raise _changed(data)
                    if progress.packets not in (-1, len(capture)):
                        _forget(path)  # it lies
                        progress = _load_progress(path, data)
                    answer = _upload(capture, path, progress, attempts)
            except NotACapture as error:
                progress.unreadable = True
                answer = Answer(Outcome.UNREADABLE, "Not a capture", _one_line(str(error)))
        if answer:
            _done(path, data, progress)
        elif answer.outcome is not Outcome.STOPPED:
            if not only_move:
                progress.attempts += 1
                progress.last_error, progress.time = answer.reason, _now()
            _failed(path, data, progress, answer)
    except OSError:
        if not answer:
            _unmoved[data] = answer  # until the next sweep only the move is tried again
        if progress.to_json() != noted:
            _save_progress(path, progress, tell=False)  # so that nothing acknowledged is sent again
        raise
    return answer


def _done(path: Path, data: Path, progress: Progress) -> None:
    """Move a delivered file to processed/."""
    target = _free_path(PROCESSED_DIR, path.name)
    _move(data, target)
    _forget(path)  # last: a crash before this leaves a record without a file, and no file without its record
    consequence = "KEEP_PROCESSED_DAYS will count from its capture, not from its upload"
    with _complaining(target, consequence) if KEEP_PROCESSED_DAYS else contextlib.suppress(OSError):
        os.utime(target)
    aside = f", {progress.set_aside} set aside" if progress.set_aside else ""
    renamed = "" if target.name == path.name else f", kept as {_printable(target.name)}"
    delivered = progress.packets - progress.set_aside
    logger.info("✓ %s processed successfully (%d packets)%s%s", _printable(path.name), delivered, aside, renamed)


def _failed(path: Path, data: Path, progress: Progress, answer: Answer) -> None:
    """Tell why a file failed, and move it to failed_uploads/ where it is not there yet."""
    what = f"{_printable(path.name)} stays in failed_uploads/"
    if path.parent == FAILED_DIR:
        _save_progress(path, progress)
    else:
        target = _free_path(FAILED_DIR, path.name)
        # The record first: a crash between the two leaves the file taken, with its old record. The other way round it
        # would stand in failed_uploads/ without any, and all of it would be sent again.
        _write(_beside(target, STATE), progress.to_json())
        _unsaved.pop(target, None)  # of an earlier file there
        _move(data, target)
        _forget(path)
        renamed = "" if target.name == path.name else f" as {_printable(target.name)}"
        what = f"{_printable(path.name)} moved to failed_uploads/{renamed}"
        _link.sweep_when_back |= answer.outcome is not Outcome.UNREADABLE
        _link.early_sweeps = EARLY_SWEEPS
    _link.sweep_when_back |= answer.outcome in (Outcome.UNREACHABLE, Outcome.BUSY)
    done = f" ({progress.uploaded:,}/{progress.packets:,} packets uploaded)" if progress.uploaded else ""
    then = f"next try within {RETRY_FAILED_INTERVAL:g} seconds"
    if answer.outcome is Outcome.UNREADABLE:
        then = "nothing was sent; it is kept, and read again when it changes"
    level = logging.WARNING if answer.outcome in _AGAIN_LATER else logging.ERROR
    logger.log(level, "✗ %s%s: %s; %s", what, done, answer.reason, then)


def _take(path: Path) -> Optional[Path]:
    """Claim a ready file: X.json becomes X.json.taken, then its marker goes. None where there is no marker.

    By rename, and before reading: what cannot be moved is never uploaded, hence never uploaded again and again. Takes
    up, too, what a crash left taken.
    """
    taken = _beside(path, TAKEN)
    if not _exists(taken):
        if not _exists(_beside(path, READY)):
            return None
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise NotRegular(path)
        _move(path, taken)  # durable before the marker goes: X.json without a marker would wait for ever
    _remove_marker(path)
    return taken


def _remove_marker(path: Path) -> None:
    """Remove the marker of a file that is taken, but not one that its producer has put for a new file of that name."""
    marker = _beside(path, READY)
    _stale_markers.add(path)
    with _complaining(marker, "this marker stays for now, which does no harm"):
        if not _exists(path) and _exists(marker):
            os.unlink(marker)
            if _exists(path):  # written anew this very moment, and what has just been removed may have been its marker
                marker.touch()
        _stale_markers.remove(path)


def process_json_file(json_path: AnyPath) -> bool:
    """The whole life of one ready file: take it, upload it, move it. True only when it has reached processed/."""
    check_settings()
    path = Path(json_path)
    with _turn, _complaining(path, _STAYS):
        taken = _take(path)
        return taken is not None and bool(_round(path, taken, MAX_RETRIES))
    return False


# ---------------------------------------------------------------- the folders


def _scan(folder: Path) -> dict[str, os.DirEntry[str]]:
    """What is in a folder, by name; a folder that is missing is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with os.scandir(folder) as entries:
        return {entry.name: entry for entry in entries}


def _is_regular(entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False):
        return True
    _complain(Path(entry), NotRegular(Path(entry)), "it is left alone")
    return False


def _ready_names(found: dict[str, os.DirEntry[str]]) -> list[str]:
    """The names X.json in pending_upload/ to process: those with a marker, and those taken before a crash."""
    taken = {name[: -len(TAKEN)] for name in found if name.endswith(".json" + TAKEN)}
    marked = {name for name in found if name.endswith(".json") and name + READY in found} - taken
    return sorted(taken | {name for name in marked if _is_regular(found[name])})


def _failed_names(found: dict[str, Any]) -> list[str]:
    """The data files in failed_uploads/, whatever their names: not records, set-aside packets and placeholders."""
    return [
        name
        for name in found
        if not (name.endswith(STATE) and name[: -len(STATE)] in found)
        and not name.endswith(REJECTED)
        and name not in NO_DATA
    ]


def _due() -> list[Path]:
    """The failed files to try, least recently tried first; one that is not JSON only once it has changed."""
    found, due = _scan(FAILED_DIR), []
    for path in [FAILED_DIR / name for name in _failed_names(found)]:
        try:
            if _is_regular(found[path.name]):
                progress = _load_progress(path, path)
                if not progress.unreadable:
                    due.append((progress.time, path))
        except FileNotFoundError:
            pass  # gone since the scan
        except OSError as error:
            _complain(path, error, _STAYS)
    return [path for _, path in sorted(due)]


def _waiting() -> int:
    """How many files are still to be delivered, in both folders; a folder that cannot be read is one."""
    number = 0
    for folder, choose in ((PENDING_DIR, _ready_names), (FAILED_DIR, _failed_names)):
        try:
            number += len(choose(_scan(folder)))
        except OSError:
            number += 1
    return number


def _remove_orphans(folder: Path) -> None:
    """Remove the records of ours that a crash left when their file had moved on."""
    with _turn:  # else one that is just being written would pass for one
        found = _scan(folder)
        for name in [name for name in found if name.endswith(STATE)]:
            base = name[: -len(STATE)]
            if base not in found and base + TAKEN not in found and _has_record(folder / base):
                _remove(folder / name)


def _read_ahead(path: Path) -> None:
    """Take a file, and have it read while the file before it is sent: a quarter less time for both.

    Not one with a record, of which perhaps only the move is left, nor one that is read before a thread has started.
    """
    try:
        with _turn:
            taken = _take(path)
        fresh = path not in _unsaved and not _exists(_beside(path, STATE))
        if taken and fresh and os.lstat(taken).st_size >= READ_AHEAD:
            _ahead[taken] = _read_in_background(taken)
    except OSError as error:
        _complain(path, error, _STAYS)
    except RuntimeError:
        pass  # no thread is to be had: it is read in its turn


def _upload_ready() -> bool:
    """Process what is ready, in chronological order: that of the names. True if something has been delivered."""
    names = []
    with _complaining(PENDING_DIR, "nothing can be uploaded until that is mended"):
        names = _ready_names(_scan(PENDING_DIR))
    with _turn:
        for path in list(_stale_markers):
            _remove_marker(path)
    delivered = False
    for name, following in itertools.zip_longest(names, names[1:]):
        if not _stopping:
            if following:
                _read_ahead(PENDING_DIR / following)
            delivered |= process_json_file(PENDING_DIR / name)
        _forget_ahead(PENDING_DIR / (name + TAKEN))
    return delivered


def retry_failed_uploads() -> None:
    """One sweep over failed_uploads/: one attempt a file, new files first. Ends early when it is the server's."""
    check_settings()
    _unmoved.clear()
    with contextlib.suppress(OSError):  # told by _upload_ready()
        _remove_orphans(PENDING_DIR)
    due = []
    with _complaining(FAILED_DIR, "failed uploads are not retried until that is mended"):
        _remove_orphans(FAILED_DIR)
        due = _due()
    if due:
        logger.info("Retrying %d failed uploads...", len(due))
    faults = 0
    for number, path in enumerate(due, 1):
        _upload_ready()
        if _stopping:
            break
        try:
            with _turn:
                answer = _round(path, path, attempts=1)
        except OSError as error:
            _complain(path, error, "somebody has taken it away" if isinstance(error, FileNotFoundError) else _STAYS)
            continue
        _told.pop(path, None)
        faults = faults + 1 if answer.outcome in (Outcome.FAULT, Outcome.AGAIN) else 0
        if answer.outcome in _ENDS_SWEEP or faults == 3:
            if (left := len(due) - number) and not _stopping:
                logger.info("The other %s can wait: it is the server's trouble", _count(left, "failed upload"))
            break


def _prune_processed() -> None:
    """Delete what was uploaded more than KEEP_PROCESSED_DAYS ago; _done() set each file's time to its upload."""
    oldest, pruned = time.time() - KEEP_PROCESSED_DAYS * 86400, 0
    with _complaining(PROCESSED_DIR, "old files stay until that is mended"):
        for name, entry in _scan(PROCESSED_DIR).items() if KEEP_PROCESSED_DAYS else ():
            if name.endswith(".json") and entry.is_file(follow_symlinks=False) and entry.stat().st_mtime < oldest:
                with _complaining(PROCESSED_DIR / name, "it stays until that is mended"):
                    os.unlink(PROCESSED_DIR / name)
                    pruned += 1
    if pruned:
        logger.info("Deleted %s from processed/: older than %g days", _count(pruned, "file"), KEEP_PROCESSED_DAYS)


# ---------------------------------------------------------------- the loop


class AlreadyRunning(RuntimeError):
    """Another sender serves this LOGS_DIR."""


def _lock(fd: int, shared: bool = False) -> str:
    """Take the lock; returns the pid of another sender that has it. Raises OSError where files cannot be locked."""
    try:
        _lock_file(fd, shared)
    except (BlockingIOError, PermissionError):
        os.lseek(fd, 0, os.SEEK_SET)
        return re.sub(r"\D", "", os.read(fd, 20).decode("ascii", "replace")) or "unknown"
    return ""


@contextlib.contextmanager
def _only_sender() -> Iterator[Callable[[], bool]]:
    """Hold LOGS_DIR's lock: the operating system's, so it dies with the process. Its file only names the holder.

    Yields a function that tells whether the lock is still the one that others would find.
    """
    LOGS_DIR.mkdir(parents=True, exist_ok=True)
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o644)

    def in_place() -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(LOCK))
        except FileNotFoundError:
            return False
        except OSError:  # out of reach for a moment, which is not gone
            return True

    try:
        end = time.monotonic() + 1  # --status holds the lock for an instant
        while holder := _lock(fd):
            if _stopping or time.monotonic() > end:
                raise AlreadyRunning(f"Another sender (pid {holder}) serves {_printable(LOGS_DIR)}: stop it first")
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk has no room for a pid
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, str(os.getpid()).encode())
        yield in_place
    finally:
        os.close(fd)


def _check_folders() -> None:
    """Make the folders, tell which cannot be used, and clear away what a crash left half-written."""
    for folder in (PENDING_DIR, FAILED_DIR, PROCESSED_DIR):
        with _complaining(folder, "files stay where they are until that is mended"):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to read and write", str(folder))
            _remove(folder / TEMPORARY)


def monitor_and_upload(once: bool = False) -> None:
    """Upload what is ready every POLL_INTERVAL, sweep every RETRY_FAILED_INTERVAL, until stop_sender().

    Runs in any thread, and again after it has returned. With `once`, returns when nothing more can be done now.
    Raises ValueError for a bad setting, AlreadyRunning, and OSError where LOGS_DIR cannot be used.
    """
    global _serving, _stopping
    check_settings()
    _serving += 1
    watched = False
    try:
        while True:  # more than once only where LOGS_DIR has been taken away, with the lock in it
            try:
                with _only_sender() as lock_in_place:
                    watched = True
                    _check_folders()
                    if not _serve(once, lock_in_place):
                        break
            except OSError as error:
                if not watched:
                    raise
                _complain(LOGS_DIR, error, "nothing can be uploaded until that is mended")
            if not _nap(POLL_INTERVAL):
                break
    finally:
        _serving -= 1
        _stopping = _stopping and _serving > 0


def _serve(once: bool, lock_in_place: Callable[[], bool]) -> bool:
    """The loop; True when it ended because the lock is gone."""
    logger.info("Watching %s, uploading to %s", _printable(PENDING_DIR), _public_url())
    # Having freed one large block, glibc does not return each batch's memory to the system: a fifth less CPU.
    bytes(16 << 20)
    next_sweep = time.monotonic()
    while not _stopping and lock_in_place():
        in_time = time.monotonic() >= next_sweep
        if in_time or _link.sweep_now:
            _link.early_sweeps = EARLY_SWEEPS if in_time else _link.early_sweeps - 1
            _link.sweep_now = False
            retry_failed_uploads()
            _prune_processed()
            next_sweep = time.monotonic() + RETRY_FAILED_INTERVAL
        at_once = _upload_ready()  # more may have come meanwhile
        _link.sweep_now &= _link.early_sweeps > 0
        at_once |= _link.sweep_now
        if once and not at_once:
            break
        _nap(0 if at_once else POLL_INTERVAL)
    logger.info("Stopped; %s waiting", _count(_waiting(), "file"))
    return not _stopping and not once


# ---------------------------------------------------------------- --status


def _server_trouble() -> str:
    """Why the server gives no answer within two seconds; empty when it does, whatever it answers."""
    trouble = ["no answer within 2 seconds"]

    def ask() -> None:
        try:
            send, post = _session(SERVER_URL, API_TOKEN)
            request = post.copy()
            request.method = "GET"
            send(request, timeout=2).raw.close()
            trouble[0] = ""
        except (OSError, HTTPError) as error:
            trouble[0] = _reason(error)

    asking = threading.Thread(target=ask, daemon=True)  # because no time-out bounds a name look-up
    asking.start()
    asking.join(2)
    return trouble[0]


def _running_pid() -> str:
    """The pid of the sender that holds the lock, empty where there is none."""
    with contextlib.suppress(OSError), _open_regular(LOCK) as file:
        return _lock(file.fileno(), shared=True)  # closed at once, and a sender that starts just now is patient
    return ""


def _listing(folder: Path) -> dict[str, os.stat_result]:
    """The regular files of a folder, none where it does not exist; nothing is made or changed. Raises OSError."""
    found = {}
    for name, entry in _scan(folder).items() if _exists(folder) else ():
        with contextlib.suppress(FileNotFoundError):  # gone since the scan
            if entry.is_file(follow_symlinks=False):
                found[name] = entry.stat(follow_symlinks=False)
    return found


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _print_rows(title: str, names: list[str], say: Callable[[str], str]) -> None:
    """The first five names with what there is to say of each, in 80 columns."""
    if names:
        print(f"\n{title}")
    for name in names[:5]:
        shown = _printable(name)
        print("  " + (shown if len(shown) < 78 else f"{shown[:76]}…"))
        print(textwrap.fill(say(name), 80, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if len(names) > 5:
        print(f"  and {len(names) - 5:,} more")


def _failure(name: str) -> str:
    """Why a file is in failed_uploads/, as its record says."""
    try:
        progress = Progress.read(FAILED_DIR / name)
    except (OSError, *_DAMAGED):
        return "not tried yet"
    done = f"{progress.uploaded:,}/{progress.packets:,} packets uploaded; " if progress.uploaded else ""
    return f"{done}failed {_count(progress.attempts, 'time')}, last with: {progress.last_error}"


def print_status() -> bool:
    """Print how things stand, in 80 columns; True when all is well. Nothing is changed."""
    now, pid, trouble = time.time(), _running_pid(), _server_trouble()
    listings, problems = [], [] if pid else ["no sender is running"]
    for folder in (PENDING_DIR, FAILED_DIR, PROCESSED_DIR):
        try:
            listings.append(_listing(folder))
        except OSError as error:
            listings.append({})
            problems.append(f"{folder.name} cannot be read ({_one_line(error.strerror or str(error))})")
    pending, failed, processed = listings
    ready = [name for name in pending if name + READY in pending or name.endswith(".json" + TAKEN)]
    unmarked = [name for name in pending if name.endswith(".json") and name + READY not in pending]
    again = _failed_names(failed)
    aside = [name for name in failed if name.endswith(REJECTED)]
    print(f"Sender  {f'running (pid {pid})' if pid else 'not running'}")
    print(textwrap.fill(f"Server  {f'not reachable: {trouble}' if trouble else 'reachable'}, {_public_url()}", 80))
    print(f"\n{'':16}{'files':>9}{'size':>12}   oldest")
    done = [name for name in processed if name not in NO_DATA]
    for title, names, found in (
        ("pending_upload", [*ready, *unmarked], pending),
        ("failed_uploads", again, failed),
        ("  set aside", aside, failed),
        ("processed", done, processed),
    ):
        oldest = _duration(now - min(found[name].st_mtime for name in names)) if names else "-"
        print(f"{title:16}{len(names):>9,}{_size(sum(found[name].st_size for name in names)):>12}   {oldest}")

    again.sort(key=lambda name: failed.get(name + STATE, failed[name]).st_mtime, reverse=True)
    _print_rows("Latest failures", again, _failure)
    ages = {name: now - pending[name].st_mtime for name in unmarked}
    title = "No marker: still being written, or its .ready file is missing"
    _print_rows(title, unmarked, lambda name: f"written {_duration(ages[name])} ago")
    late = [name for name in unmarked if ages[name] > 60]
    problems += ["the server is not reachable"] if trouble else []
    problems += [_count(len(again), "failed upload")] if again else []
    problems += [f"{_count(len(aside), 'file')} of rejected packets"] if aside else []
    problems += [f"{_count(len(late), 'file')} without a marker for over a minute"] if late else []
    print()
    print(textwrap.fill(f"Not well: {', '.join(problems)}." if problems else "All is well.", 80), flush=True)
    return not problems


# ---------------------------------------------------------------- the command


def main(arguments: Optional[list[str]] = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Upload the sniffer's captures until Ctrl-C.", epilog="Settings are explained in .env.example."
    )
    flag = functools.partial(parser.add_mutually_exclusive_group().add_argument, action="store_true")
    flag("--once", help="upload what is there, then exit: 0 if nothing is left, else 1")
    flag("--status", help="tell how things stand, then exit: 0 if all is well, else 1")
    parser.add_argument("--version", action="version", version=f"sender.py {__version__}")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that cannot show ✓ shows \\u2713
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(LOG_LEVEL)
    logging.raiseExceptions = False  # a console that has gone (| head) stops no upload
    if _bad_settings:
        for line in _bad_settings:
            logger.error("%s", line)
        return 2
    if options.status:
        try:
            return 0 if print_status() else 1
        except OSError:  # the console has gone: --status | head -1
            with contextlib.suppress(AttributeError, OSError):  # what is still buffered goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    for number in _STOP_SIGNALS:
        signal.signal(number, _on_signal)
    try:
        monitor_and_upload(once=options.once)
    except (AlreadyRunning, OSError) as error:
        logger.error("%s", error)
        return 1
    return 1 if options.once and _waiting() else 0


def _on_signal(number: int, frame: object) -> None:
    if not _serving:  # before the loop or after it
        sys.exit(0)
    stop_sender()
    signal.signal(number, signal.SIG_DFL)  # the second one ends the program at once


if __name__ == "__main__":
    sys.exit(main())
