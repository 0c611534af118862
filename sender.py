#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["requests>=2.32.3", "python-dotenv>=1.0.0"]
# ///
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

X.json.state, the record, is the only memory of a file: how far its upload got, which packets the server refused, what
failed last. Before any POST it says (or, where there is none, the first BATCH_SIZE packets are) what may be on the wire
without an answer; so a crash sends the same bytes again, under the same Idempotency-Key. Nothing is ever overwritten:
where a name exists, the newcomer becomes X.1.json. When a batch fails, one question decides: is it this batch, or the
server? A Round finds out by halves.

Ctrl-C and SIGTERM let the current request finish and keep all progress; a second Ctrl-C ends at once. Exit status:
0 done; 1 another sender is running, unusable folders, or (--once, --status) not all is well; 2 a bad setting.
Settings come from the environment or from a .env beside this file; .env.example explains each.
"""

import argparse
import base64
import bisect
import contextlib
import difflib
import enum
import errno
import functools
import gzip
import hashlib
import http.client
import io
import json
import logging
import logging.handlers
import os
import queue
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO, Callable, NamedTuple, Optional, TypeVar, Union, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import requests
import urllib3
from dotenv.parser import parse_stream
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

try:
    import sqlite3
except ImportError:  # a Python built without it: reading is then slower, and as exact
    sqlite3 = None  # type: ignore[assignment]

__version__ = "2.0.0"
logger = logging.getLogger("sender")

# ---------------------------------------------------------------- settings

T = TypeVar("T", str, int, float, Path)
AnyPath = Union[str, "os.PathLike[str]"]
_settings: dict[str, Any] = {}  # the values in force, by name
_bad_settings: list[str] = []  # one line each: name, value, what is allowed. Importing this module never fails
_environment: dict[str, Optional[str]] = {}  # over the .env beside this file, which is not let into os.environ
try:
    _text = Path(__file__).with_name(".env").read_text(encoding="utf-8-sig")
    if "\0" in _text:
        raise ValueError("it holds UTF-16, as PowerShell 5 appends it")
    for _line in parse_stream(io.StringIO(_text)):
        if _line.error:
            _bad_settings.append(f".env, line {_line.original.line}, is not allowed: it must be NAME=value")
        elif _line.key:
            _environment[_line.key] = _line.value
except FileNotFoundError:
    pass  # it is optional
except (OSError, ValueError) as _error:
    _bad_settings.append(f".env cannot be read ({_error}): it must be a text file in UTF-8")
_env_file = set(_environment)
_environment.update(os.environ)


def _setting(name: str, default: T, allowed: str, valid: Callable[[Any], object]) -> T:
    """What the environment or .env says of `name`, of the default's type; else the default. Empty counts as none."""
    text, value = (_environment.get(name) or "").strip(), default
    try:
        if text:
            value = type(default)(text)
            if not valid(value):
                raise ValueError(text)
    except (ValueError, RuntimeError, OSError):  # from a ~ without a home, from a name too long
        value, secret = default, r"(?s).*@|[?#;].*" + (r"|(?<=[^/]/)[^/]{20,}" if name == "SERVER_URL" else "")
        shown = "***" if name == "API_TOKEN" else re.sub(secret, "***", text)
        _bad_settings.append(f"{name}={_printable(shown)} is not allowed: it must be {allowed}")
    _settings[name] = value
    return value


def _usable_url(text: str) -> bool:
    parts = urlsplit(text)
    prepared = requests.Request("POST", text).prepare()  # what cannot be sent is refused now, not at the first file
    (urlsplit(prepared.url or "").hostname or "").encode("idna")  # as a look-up of the name will
    zone = "%" in parts.netloc.rpartition("@")[2]  # of an IPv6 address: libraries spell it differently
    return parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not zone


def _usable_folder(path: Path) -> bool:
    """Not a file, nor what a Windows path becomes when it is misspelt: with a tab for \\t, D:logs, %TEMP%."""
    misspelt = not str(path).isprintable() or re.search("%.+%", str(path)) or (path.drive and not path.root)
    return not misspelt and (path.expanduser().is_dir() or not os.path.lexists(path.expanduser()))


def _printable(text: object) -> str:
    """`text` with control characters and undecodable bytes escaped: no file name can forge a log line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


_ABOVE_0 = ("a number of seconds above 0, at most 1000000", lambda number: 0 < number <= 1_000_000)
_FROM_0 = ("a number from 0 to 1000000", lambda number: 0 <= number <= 1_000_000)
_WHOLE = ("a whole number from 1 to 1000000", lambda number: 1 <= number <= 1_000_000)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

SERVER_URL = _setting("SERVER_URL", "http://localhost:8000/ingest", "an http or https URL with a host", _usable_url)
API_TOKEN = _setting("API_TOKEN", "", "printable ASCII", lambda token: token.isascii() and token.isprintable())
POLL_INTERVAL = _setting("POLL_INTERVAL", 1.0, *_ABOVE_0)
MAX_RETRIES = _setting("MAX_RETRIES", 3, *_WHOLE)  # attempts for one batch
RETRY_DELAY = _setting("RETRY_DELAY", 5.0, *_FROM_0)  # seconds before the second attempt, then doubling
BATCH_SIZE = _setting("BATCH_SIZE", 1000, *_WHOLE)  # packets in one request
REQUEST_TIMEOUT = _setting("REQUEST_TIMEOUT", 30.0, *_ABOVE_0)
RETRY_FAILED_INTERVAL = _setting("RETRY_FAILED_INTERVAL", 300.0, *_ABOVE_0)  # between sweeps
COMPRESS = _setting("COMPRESS", "none", "gzip or none", lambda word: word.lower() in ("none", "gzip")).lower()
KEEP_PROCESSED_DAYS = _setting("KEEP_PROCESSED_DAYS", 0.0, *_FROM_0)  # 0 for ever
LOGS_DIR = _setting("LOGS_DIR", Path(__file__).with_name("logs"), "a folder, such as C:/sender/logs", _usable_folder)
LOG_LEVEL = _setting("LOG_LEVEL", "INFO", " or ".join(_LEVELS), lambda word: word.upper() in _LEVELS).upper()

LOGS_DIR = LOGS_DIR.expanduser().absolute()
PENDING_DIR, FAILED_DIR, PROCESSED_DIR = (LOGS_DIR / n for n in ("pending_upload", "failed_uploads", "processed"))
LOCK = LOGS_DIR / ".sender.lock"
READY, TAKEN, STATE, TEMPORARY = ".ready", ".taken", ".state", ".sender.tmp"
NO_DATA = re.compile(r"(?s).*(\.state|\.taken|\.ready|\.tmp|~|\.swp|\.bak)|\.gitkeep|\.DS_Store")

BLOCK = 128 * 1024  # bytes read and proved at a time: enough to be fast, and they stay in the CPU's cache
LONGEST_RECORD = 64 * 1024 * 1024  # bytes
LONGEST_PACKET = 4 * 1024 * 1024  # bytes; a longer one is damage, and not worth the memory
REPLY_LIMIT = 8 * 1024  # bytes of a reply that are read
RETRY_AFTER_LIMIT = 60  # seconds of a Retry-After that are honoured
IDLE_LIMIT = 60  # seconds after which a NAT may have forgotten a connection
REFUSED_INTERVAL = 3600  # seconds between two tries of packets that the server refused
IN_A_ROW = 3  # packets refused in a row that are not about packets, but about the server
TRIAL = 50  # one batch in so many tries whether the server takes twice as much again


def check_settings() -> None:
    """Raise ValueError with one line for each bad setting: its name, its value, what is allowed."""
    if _bad_settings:
        raise ValueError("\n".join(_bad_settings))


# ---------------------------------------------------------------- what an upload can come to


class Outcome(enum.Enum):
    """What one POST came to. Each asks for a move of its own."""

    DELIVERED = "2xx to the whole body, and the whole reply read"
    AWAY = "no connection: nothing was sent; again later"
    BUSY = "409, 425, 429, 503, the server asks for patience: again later"
    MISCONFIGURED = "3xx, 401, 407, a bad certificate, a web page: it holds for every file"
    UNANSWERED = "sent, but no usable answer; the server may have stored it: again later, unchanged"
    FAULT = "500 and other 5xx: the server is broken, or chokes on a packet"
    REJECTED = "413, 400, 422 and other 4xx: the server will not have it"
    REFUSED = "all is delivered but single packets that the server refuses"
    UNREADABLE = "the file is not an array of packets, or too much for the memory"
    STOPPED = "asked to stop: the next start goes on"


_AGAIN = (Outcome.AWAY, Outcome.BUSY, Outcome.UNANSWERED, Outcome.FAULT)
_PERHAPS = (Outcome.FAULT, Outcome.REJECTED, Outcome.UNANSWERED)  # it may be about the batch
_ENDS_SWEEP = (Outcome.AWAY, Outcome.BUSY, Outcome.MISCONFIGURED, Outcome.STOPPED)


class Answer(NamedTuple):
    """What a batch came to, and why, in words for a person; truthy only for success. Times are seconds."""

    outcome: Outcome
    reason: str = ""
    retry_after: float = 0

    def __bool__(self) -> bool:
        return self.outcome is Outcome.DELIVERED


@dataclass
class Server:
    """What this process has learned about the server, carried from file to file. Times are time.monotonic()'s."""

    size: int = sys.maxsize  # packets in the next batch, where BATCH_SIZE allows them
    limit: int = sys.maxsize  # packets in the largest batch that passed, where larger ones did not
    at_limit: int = 0  # batches accepted at this limit
    pinned_until: float = 0  # the last search has found that it was not the server: until then, no batch waits for it
    accepted: int = 0  # batches, in all
    turn: int = 0  # rounds that have failed, in all; like the one before, it goes on from the records of failed files
    down_since: Optional[float] = None  # the first trouble after a success
    sweep_when_back: bool = False  # files have failed since the last sweep
    early_sweeps: bool = True  # after one in vain, not before one comes in its time: a bad file must not cost more
    next_sweep: float = 0  # 0: at once
    next_refused: float = 0  # when packets that were refused may be tried again; 0: first of all, in their turn
    next_hint: float = 0
    hinted: int = 0  # files that a person was told of
    used_at: float = 0  # when the connection was last used; 0: there is none
    started: float = 0  # when the request under way was
    took: float = 0  # the last one, from its first byte on
    connecting: bool = False  # nothing of it has been sent
    cut_short: bool = False  # not all of it could be

    def learn(self, packets: int) -> None:
        """The size of the next batch by the pace of the last answer; one in fifty tries more than the limit."""
        self.limit, self.at_limit = (packets, 0) if packets > self.limit else (self.limit, self.at_limit)
        self.at_limit += packets == self.limit
        most = self.limit * (2 if self.at_limit == 1 or self.at_limit % TRIAL == 0 else 1)
        bearable = int(packets * REQUEST_TIMEOUT / 2 / max(self.took, 1e-3))  # at the pace of this answer
        grown = min(max(self.size, min(2 * self.size, bearable)), most, BATCH_SIZE)
        self.size = max(1, packets // 2) if self.took > REQUEST_TIMEOUT / 2 else grown

    def accept(self) -> None:
        """Note a success: after trouble, tell how long it lasted, and have the failed files swept at once."""
        self.accepted += 1
        if self.early_sweeps and (self.sweep_when_back or self.down_since is not None):
            self.early_sweeps, self.sweep_when_back, self.next_sweep = False, False, 0
        if self.down_since is not None:
            now, since, self.down_since = time.monotonic(), self.down_since, None
            self.next_refused, away = min(self.next_refused, now), int(now - since)
            logger.info("The server is back after %s; %s waiting", timedelta(seconds=away), _count(_waiting(), "file"))


_server = Server()
_stopping = False
_resting: dict[str, tuple[float, float, str]] = {}  # files whose file operation failed: until when, how long, why
_unsaved: dict[str, "Record"] = {}  # the records that a full disk refuses, by their X.json


def stop_sender() -> None:
    """Ask a running monitor_and_upload() to return: after its current request, within a second of any wait."""
    global _stopping
    _stopping = bool(_lock_fds)  # without a loop there is nothing to stop, and a later process_json_file() is not meant


def _nap(seconds: float) -> bool:
    """Wait; False when asked to stop. A plain flag: Event.set in a signal handler can deadlock with Event.wait."""
    end = time.monotonic() + seconds
    while not _stopping and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.5))
    return not _stopping


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _name(path: str) -> str:
    return _printable(os.path.basename(path))


def _rest(path: str, error: Exception, then: str = "it is left alone for now and tried again") -> None:
    """Let a file whose file operation failed rest, longer each time; tell of it once for as long as that lasts."""
    text = f"{_name(path)}: {_reason(error)}; {then}"
    _, pause, told = _resting.get(path, (0, 2.5, ""))
    if text != told:
        needs_person = isinstance(error, Untrusted) or then.endswith("mended")
        logger.log(logging.ERROR if needs_person else logging.WARNING, "%s", text)
    pause = min(2 * pause, RETRY_FAILED_INTERVAL)
    _resting[path] = (time.monotonic() + pause, pause, text)


def _rests(path: str) -> bool:
    return path in _resting and time.monotonic() < _resting[path][0]


def _cause(error: BaseException) -> BaseException:
    """The innermost cause of an error: what happened, without the URLs that the outer ones carry."""
    wrapped = (argument for argument in error.args if isinstance(argument, BaseException))  # urllib3's way
    context = None if error.__suppress_context__ else error.__context__
    inner = error.__cause__ or context or next(wrapped, None)
    return _cause(inner) if inner else error


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return _one_line(f"{text} ({name})" if name else text)


@functools.lru_cache(maxsize=1)
def _secrets(url: str, token: str) -> list[str]:
    """What must not be shown, longest first: the token, and what URL, .netrc and proxies hold of that kind."""
    parts = urlsplit(url)
    secrets = [token, parts.query, parts.password or parts.username or ""]
    secrets += [segment for segment in parts.path.split("/") if len(segment) >= 20]
    secrets += [value for _, value in parse_qsl(parts.query) if len(value) > 3]
    with contextlib.suppress(OSError, ValueError):  # told by whoever sends; credentials that are not base64
        _, post, options = _session(url, token)
        for proxy in map(urlsplit, options["proxies"].values()):
            login = unquote(proxy.netloc.rpartition("@")[0])
            secrets += [proxy.password or proxy.username or "", base64.b64encode(login.encode()).decode()]
        secrets.append(post.headers.get("Authorization", "").partition(" ")[2])
        secrets.append(base64.b64decode(secrets[-1], validate=True).decode().partition(":")[2])
    return sorted({s for secret in secrets for s in (secret, unquote(secret)) if s}, key=len, reverse=True)


def _one_line(text: str) -> str:
    """Foreign text made fit for the log: one printable line of at most 200 characters, with secrets hidden."""
    for secret in _secrets(SERVER_URL, API_TOKEN):
        text = text.replace(secret, "***")
    line = _printable(" ".join(text.split()))
    return line if len(line) <= 200 else line[:199] + "…"


def _public_url() -> str:
    url = urlsplit(SERVER_URL)
    return _one_line(f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}")


# ---------------------------------------------------------------- where the platforms differ

# Odd files are never followed, and opening one never blocks. Windows has neither these flags nor FIFOs.
_OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
_UID = getattr(os, "geteuid", int)()  # 0 on Windows, as st_uid is there
_lock_fds: list[int] = []  # of the loops under way; mostly one

if sys.platform == "win32":
    import msvcrt

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)

    def _lock_file(fd: int, shared: bool = False) -> None:
        os.lseek(fd, 1 << 20, os.SEEK_SET)  # a byte far behind the pid, because a locked byte cannot be read
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    _STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def _lock_file(fd: int, shared: bool = False) -> None:
        fcntl.flock(fd, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))


def _close_lock() -> None:
    while _lock_fds:
        os.close(_lock_fds.pop())


getattr(os, "register_at_fork", dict)(after_in_child=_close_lock)  # else a child of the host keeps the lock alive


def _sync_folder(folder: str) -> None:
    """Make a rename in `folder` last. Windows cannot open a folder; NTFS keeps renames in order by its journal."""
    with contextlib.suppress(OSError):  # some filesystems cannot; the step itself has been made
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# ---------------------------------------------------------------- the spool's files


class Untrusted(OSError):
    """A symlink, FIFO, folder or device stands where a file should, or another user's file where one of ours should."""


def _check(path: str, status: os.stat_result, ours: bool = False) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Untrusted(errno.EINVAL, "not a regular file, refused", path)
    if ours and status.st_uid != _UID:
        raise Untrusted(errno.EPERM, "it belongs to another user", path)


def _open_regular(path: str, ours: bool = False) -> BinaryIO:
    """Open a regular file. Checked before (a device may act on being opened) and after (it may be swapped)."""
    _check(path, os.lstat(path), ours)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _OPEN_FLAGS))  # noqa: SIM115
    with contextlib.ExitStack() as on_error:
        on_error.callback(file.close)
        _check(path, os.fstat(file.fileno()), ours)
        on_error.pop_all()
    return file


def _create(path: str) -> int:
    """A new file of the owner's alone: never through a link, never over another one."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)


def _exists(path: str) -> bool:
    """lexists() that raises OSError where it cannot tell; that one says no, and a rename would overwrite."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):
            raise
        return False
    return True


def _free_path(folder: Path, name: str) -> str:
    """Where `name` can go in `folder` without overwriting: X.json, X.1.json, …, found by doubling, then by halves."""
    folder.mkdir(parents=True, exist_ok=True)  # it may have vanished
    stem, suffix = os.path.splitext(os.path.join(folder, name))

    def numbered(number: int) -> str:
        return f"{stem}.{number}{suffix}" if number else stem + suffix

    taken, free = -1, 0  # numbers
    while _exists(numbered(free)) or _exists(numbered(free) + TAKEN):  # the latter, with its record, moved by hand
        taken, free = free, 2 * free + 1
    while free - taken > 1:
        middle = (taken + free) // 2
        taken, free = (middle, free) if _exists(numbered(middle)) else (taken, middle)
    return numbered(free)


def _move(source: str, target: str) -> None:
    """Rename, durably: once this has returned, no power cut brings the old name back."""
    os.rename(source, target)
    _sync_folder(os.path.dirname(target))


def _remove(path: str) -> None:
    """Remove a file of ours that nobody needs any more; where that fails, a later sweep removes it."""
    with contextlib.suppress(OSError):
        os.unlink(path)


@dataclass
class Record:
    """How far one file got: the content of X.json.state, for the next round and for the person who asks."""

    size: int  # bytes
    mtime_ns: int  # with `size`: the file that this belongs to
    packets: int = -1  # in the file; -1 until it has been read
    uploaded: int = 0  # packets done with, from the file's beginning
    batch_size: int = field(default_factory=lambda: BATCH_SIZE)  # packets in the batch that goes out behind them
    refused: list[int] = field(default_factory=list)  # packets (counted from 0) that the server refused alone
    row: int = 0  # the last so many of these were refused in a row: taken back if it shows that it is the server
    in_a_row: int = IN_A_ROW  # so many refused in a row show that
    rounds: int = 0  # that failed
    turn: int = 0  # the last one's number among those of all files: a clock that nobody puts back
    accepted: int = 0  # batches of any file that the server had accepted when a search was last in vain
    unanswered: list[int] = field(default_factory=list)  # from and to: the batch that a round left without an answer
    unreadable: bool = False  # no capture: not read again until it changes
    last_error: str = ""
    time: str = ""  # of the last failure, UTC

    @property
    def sent(self) -> bool:
        """Whether every packet has been delivered or refused."""
        return self.uploaded == self.packets

    def belongs_to(self, status: os.stat_result) -> bool:
        return (self.size, self.mtime_ns) == (status.st_size, status.st_mtime_ns)

    @classmethod
    def read(cls, path: str) -> "Record":
        """A record from disk. Raises OSError, and one of _DAMAGED for what save() cannot have written."""
        with _open_regular(path, ours=True) as file:
            size = os.fstat(file.fileno()).st_size  # else Python makes room for the longest
            record = cls(**json.loads(file.read(min(size, LONGEST_RECORD))))
        if [*map(type, vars(record).values())] != [*map(type, vars(cls(0, 0)).values())]:
            raise TypeError("wrong types")
        done, refused, row = record.uploaded, record.refused, record.row
        sound = 0 <= row <= done <= max(record.packets, 0) <= record.size and record.batch_size > 0
        sound &= refused == sorted({n for n in refused if type(n) is int and n in range(done)})
        if not sound or refused[len(refused) - row :] != [*range(done - row, done)]:
            raise ValueError("wrong numbers")
        record.last_error = _one_line(record.last_error)
        return record

    def save(self, path: str) -> None:
        """Replace X.json.state: at any moment it holds the old content or the new, whole.

        A disk that refuses it stops no upload: the record is kept in memory until the disk takes it.
        """
        folder, _unsaved[path] = os.path.dirname(path), self
        temporary = os.path.join(folder, TEMPORARY)
        try:
            _remove(temporary)  # a crash may have left it
            with open(_create(temporary), "wb") as file:
                file.write(json.dumps(vars(self)).encode())
                file.flush()
                os.fsync(file.fileno())  # before the rename: a power cut could else leave the name without content
            os.replace(temporary, path + STATE)
            _sync_folder(folder)
            del _unsaved[path]
            _resting.pop(path + STATE, None)
        except OSError as error:
            _remove(temporary)
            _rest(path + STATE, error, "the upload goes on, but a crash now would send packets again")


_DAMAGED = (Untrusted, ValueError, TypeError, RecursionError, MemoryError)  # what a record can be that is not ours


def _load(path: str, data: str) -> Record:
    """The record of X.json, if it belongs to this very `data`, else a fresh one.

    Raises OSError where the record is there but cannot be read now: to start afresh would send packets again.
    """
    status, record = os.lstat(data), _unsaved.get(path)
    try:
        record = record or Record.read(path + STATE)
    except _DAMAGED as error:
        _rest(path + STATE, error, "this record is ignored, the upload starts from the first packet")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENAMETOOLONG):  # the latter: the name leaves no room for one
            raise
    record = record if record and record.belongs_to(status) else Record(status.st_size, status.st_mtime_ns)
    _server.turn = max(_server.turn, record.turn)
    return record


def _forget(path: str) -> None:
    _unsaved.pop(path, None)
    _remove(path + STATE)


# ---------------------------------------------------------------- reading

_WHITE = b" \t\r\n"
_DELIMITER = re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")
_SEPARATOR = re.compile(rb'\}[ \t\r\n]{0,32},[ \t\r\n]{0,32}(\{[ \t\r\n]{0,32}"\w{1,32}")')
_LONG_NUMBER = re.compile(rb"\d{16}")  # of more than 2,000 digits, in every 128th byte
_COUNT = "SELECT CASE WHEN json_valid(?1) THEN json_array_length(?1) END"
_COUNT_OBJECTS = "SELECT min(type = 'object') * count(*) FROM json_each(CASE WHEN json_valid(?1) THEN ?1 END)"
if sqlite3:
    _sqlite = sqlite3.connect(":memory:", check_same_thread=False)  # for one caller at a time


class NotACapture(ValueError):
    """The file is not one UTF-8 JSON array of objects: the reason, and the place."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=len, parse_constant=_no_constant)  # only finds ends: builds no dicts


def _walk(data: bytes, last: bool, limit: int, number: int = 0, base: int = 0) -> tuple[list[int], int, bool]:
    """Step from packet to packet, decoding each; stop before one that goes on in the next block.

    Returns where each starts, how many bytes they take, and whether the array ends there. `number` and `base` say
    which packet of the file, and which byte, the block begins with.
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
            where = f"(packet {number + len(starts) + 1:,}, byte {base + getattr(error, 'pos', at):,})"
            raise NotACapture(f"{reason} {where}") from None
    try:
        data[:at].decode()
    except UnicodeDecodeError as error:
        where = f"(packet {number + bisect.bisect(starts, error.start):,}, byte {base + error.start:,})"
        raise NotACapture(f"not UTF-8, {error.reason} {where}") from None
    return starts, at, closed


def _prove(text: bytes, separator: bytes) -> int:
    """How many packets `text` is, with `separator` between all of them; 0 where that is not proved.

    SQLite's parser, five times as fast as json's, says that the text in brackets is a JSON array, and how long. No
    separator lies in a string: it ends in a quote, a word and a quote; the first quote would close the string, and no
    word follows one. Nor in another array, where the text has no bracket. So with one separator less than elements,
    each boundary is one, and each element an object. Where it has brackets, SQLite looks at the elements' types; a
    separator in an array within a packet can then stand in for an odd boundary, but the text before it is no array.
    SQLite is kept from what it sees with other eyes: a NUL ends its text, Python refuses integers of 4,300 digits.
    """
    if not sqlite3 or not text.startswith(b"{") or b"\0" in text or _LONG_NUMBER.search(text[::128]):
        return 0
    try:
        query = _COUNT_OBJECTS if b"[" in text else _COUNT
        count = _sqlite.execute(query, (f"[{text.decode()}]",)).fetchone()[0]
    except (UnicodeDecodeError, sqlite3.Error):
        return 0
    return count if count and count == text.count(separator) + 1 else 0


def _changed(path: str) -> OSError:
    return OSError(errno.EBUSY, "it changed while it was read", path)


class Capture:
    """An open capture file, from which batches are cut.

    Made only when the whole file is proved to be one UTF-8 JSON array of objects; raises NotACapture otherwise, and
    OSError. Valid pieces make a valid whole: it is read block by block, each cut at its last separator, and what is
    before the cut proved. In memory is one mark for each block of packets.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.status = file, os.fstat(file.fileno())
        self._marks: list[tuple[int, int]] = []  # a packet's number, and its byte offset; at last the end
        self._separator = b""  # what stands between two packets, and all others of most files
        self._gap = 0  # bytes from where it begins to the packet behind it
        self._last = (-1, 0)  # the last batch's end, packet number and byte offset: mostly the next one's beginning
        self._index()

    def __len__(self) -> int:
        return self._marks[-1][0]

    def _skip_white(self, data: bytes, base: int) -> tuple[bytes, int]:
        """`data`, which stands at offset `base`, and what follows it: from where white space ends, and that offset."""
        while not (rest := data.lstrip(_WHITE)) and (more := self._file.read(BLOCK)):
            data, base = more, base + len(data)
        return rest, base + len(data) - len(rest)

    def _index(self) -> None:
        data = self._file.read(3)
        data, base = (b"", 3) if data == b"\xef\xbb\xbf" else (data, 0)  # a mark let pass (RFC 8259, section 8.1)
        data, base = self._skip_white(data, base)
        if not data.startswith(b"["):
            what = "which begins with '['" if data else "but the file is empty"
            raise NotACapture(f"Expecting an array of packets, {what} (byte {base:,})")
        data, base = self._skip_white(data[1:], base + 1)
        number, closed = 0, data.startswith(b"]")
        data, base = data[closed:], base + closed
        while not closed:
            more = self._file.read(max(BLOCK, len(data)))  # twice as much while not one packet fits
            data, base = self._skip_white(data + more, base)
            count, used, closed = self._packets(data, not more, number, base)
            if count:
                self._marks.append((number, base))
            number, data, base = number + count, data[used:], base + used
        data, base = self._skip_white(data, base)
        if data:
            raise NotACapture(f"Extra data after the array (byte {base:,})")
        self._marks.append((number, base))

    def _packets(self, data: bytes, last: bool, number: int, base: int) -> tuple[int, int, bool]:
        """Of a block: how many packets are whole in it, how many bytes they take, and whether the array ends there."""
        cut = data.rfind(self._separator) if self._separator else -1
        if count := _prove(data[: cut + 1], self._separator):
            return count, cut + self._gap, False
        limit = sys.maxsize if number else 2  # the first two packets show what separates them
        starts, used, closed = _walk(data, last, limit, number, base)
        between = len(starts) > 1 and not self._separator and _SEPARATOR.match(data, data.rfind(b"}", 0, starts[1]))
        if between:
            self._separator, self._gap = between[0], between.start(1) - between.start()
        return len(starts), used, closed

    def _offset(self, number: int) -> int:
        """Where packet `number` starts: at a mark, or so many packets behind it."""
        mark = bisect.bisect_right(self._marks, (number, sys.maxsize)) - 1
        first, offset = self._marks[mark]
        behind = number - first
        if not behind:
            return offset
        self._file.seek(offset)
        block, at = self._file.read(self._marks[mark + 1][1] - offset), -1
        for _ in range(behind if self._separator else 0):
            at = block.find(self._separator, at + 1)
        if at >= 0 and _prove(block[: at + 1], self._separator) == behind:
            return offset + at + self._gap
        try:
            return offset + _walk(block, False, behind + 1)[0][behind]
        except (NotACapture, IndexError):
            raise _changed(self._file.name) from None

    def cut(self, start: int, stop: int) -> bytes:
        """Packets `start` to `stop` as a JSON array: their bytes, and what stands between them, as in the file."""
        begin = self._last[1] if start == self._last[0] else self._offset(start)
        self._last = (stop, self._offset(stop))
        self._file.seek(begin)
        text = self._file.read(self._last[1] - begin)
        if not Record(self.status.st_size, self.status.st_mtime_ns).belongs_to(os.fstat(self._file.fileno())):
            raise _changed(self._file.name)  # what was proved is no more
        return b"".join((b"[", memoryview(text)[: text.rfind(b"}") + 1], b"]"))


def read_json_file(json_path: AnyPath) -> list[dict[str, Any]]:
    """The whole file as a list of packet dicts. Raises ValueError with the reason if it is no JSON array of objects."""
    with _open_regular(os.fspath(json_path)) as file:
        capture = Capture(file)
        try:
            packets: list[dict[str, Any]] = json.loads(capture.cut(0, len(capture)))
        except RecursionError:  # SQLite's limit for nesting is the higher one
            raise NotACapture("nested too deeply") from None
    return packets


# ---------------------------------------------------------------- one upload


class Batch(NamedTuple):
    """One request's worth of packets: `body` is a JSON array of so many `packets`."""

    body: bytes
    packets: int
    attempts: int = 1
    label: str = ""  # "X.json: ", for the log
    progress: str = ""  # " (3,000/20,000 packets)", once this batch is delivered
    suspected: tuple[Outcome, ...] = ()  # outcomes that the caller looks into, and tells of
    unanswered: bool = False  # an attempt before: the server may have stored it
    searching: bool = False  # a piece of a suspected batch


Packets = Union[list[dict[str, Any]], Batch]


class _Reply(http.client.HTTPResponse):
    """A reply whose time-out holds for all of it; a socket's own starts anew with every byte."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        end, raw = time.monotonic() + (sock.gettimeout() or REQUEST_TIMEOUT), cast(Any, self.fp).raw
        self._read_more, self._ended = raw.readinto, False

        def readinto(buffer: memoryview) -> Any:
            if (left := end - time.monotonic()) <= 0:
                raise socket.timeout("timed out")
            sock.settimeout(left)
            received = self._read_more(buffer)
            self._ended = received == 0
            return received

        raw.readinto = readinto

    def begin(self) -> None:
        super().begin()
        if self._ended:  # http.client takes headers that were cut off for whole ones
            raise http.client.HTTPException("the reply ends within its headers")


class _Connection:
    """Mixed into urllib3's connections: notes in _server what becomes of the request under way."""

    response_class = _Reply
    sock: Any

    def connect(self) -> None:
        _server.connecting = True  # through a proxy and TLS, too
        super().connect()  # type: ignore[misc]
        _server.started, _server.connecting = time.monotonic(), False  # connecting is not slowness

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        try:
            super().send(data)  # type: ignore[misc]
        except socket.timeout:
            raise
        except OSError:  # SSLEOFError, too. The server may have answered and closed: after this error urllib3 reads on
            _server.cut_short = True
            raise BrokenPipeError(errno.EPIPE, "the server closed before the whole request was sent") from None


class _Adapter(requests.adapters.HTTPAdapter):
    """requests' own adapter, with connections and replies of the above kinds."""

    def build_response(self, request: requests.PreparedRequest, raw: Any) -> requests.Response:
        """Status, headers and stream; requests would look into headers that may be malformed, and raise."""
        response = requests.Response()
        response.status_code, response.headers, response.raw = raw.status, raw.headers, raw
        return response

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not issubclass(pool.ConnectionCls, _Connection):
            pool.ConnectionCls = type("Connection", (_Connection, pool.ConnectionCls), {})
        return pool


def _mask(record: logging.LogRecord) -> bool:
    """A filter for urllib3's log, where a host shows it: it has whole URLs, and tracebacks with such."""
    record.msg, record.args, record.exc_info = _one_line(record.getMessage()), (), None
    return True


@functools.lru_cache(maxsize=1)
def _session(url: str, token: str) -> tuple[_Adapter, requests.PreparedRequest, dict[str, Any]]:
    """What sends through the one session, a prepared POST, and the options to send it with.

    Proxies, CA bundle and .netrc are looked up here, once; a session does so at every request, at half of its cost.
    It is the session's adapter that sends: the session would read a redirect's endless body to its end. So redirects
    are not followed: a POST would become a GET, and a login page's 200 would look like success.
    """
    logging.getLogger("urllib3.connectionpool").addFilter(_mask)
    logging.getLogger("urllib3.connection").addFilter(_mask)
    session = requests.Session()
    session.headers.clear()  # of requests' own none is needed
    headers = {"Content-Type": "application/json", "User-Agent": f"sender.py/{__version__}"}
    headers.update({"Authorization": f"Bearer {token}"} if token else {})
    # A callable as auth keeps requests from looking into .netrc and the URL: the token wins.
    auth = (lambda request: request) if token else None
    bundle = _environment.get("REQUESTS_CA_BUNDLE") or None  # requests does not know .env
    try:
        post = session.prepare_request(requests.Request("POST", url, headers=headers, auth=auth))
        options: dict[str, Any] = dict(session.merge_environment_settings(url, {}, True, bundle, None))
        proxy = requests.utils.select_proxy(url, options["proxies"])  # among them is NO_PROXY's list of hosts
        options["proxies"] = {"all": proxy} if proxy else {}
        if proxy:
            requests.utils.prepend_scheme_if_needed(proxy, "http")  # type: ignore[no-untyped-call]
            urllib3.util.parse_url(proxy)
    except (ValueError, TypeError):  # not with its text: it may quote a password
        what = "the .netrc, a proxy's URL, or the password in SERVER_URL is malformed or has an odd character"
        raise OSError(errno.EINVAL, what) from None
    return _Adapter(), post, options


def _send(request: requests.PreparedRequest, timeout: float) -> requests.Response:
    """Send over the one connection. Raises OSError (requests' exceptions are such) and urllib3's HTTPError."""
    adapter, _, options = _session(SERVER_URL, API_TOKEN)
    idle, _server.used_at = time.monotonic() - (_server.used_at or time.monotonic()), 0
    if idle > IDLE_LIMIT:
        adapter.close()

    def send() -> requests.Response:
        _server.started, _server.connecting, _server.cut_short = time.monotonic(), False, False
        return adapter.send(request, timeout=timeout, **options)

    if 0.5 < idle <= IDLE_LIMIT:
        try:
            return send()
        except requests.ConnectionError as error:
            # A server may close an idle connection at the very moment that it is used again. That is no failure, and
            # the key makes it safe to send once more at once (RFC 9110, section 9.2.2); that is judged by itself.
            if not isinstance(_cause(error), (ConnectionError, ssl.SSLEOFError)):
                raise
    return send()


def _post(batch: Batch) -> tuple[int, Any, str]:
    """One POST: status, headers and the beginning of the reply's text. Raises as _send() does."""
    request = _session(SERVER_URL, API_TOKEN)[1].copy()
    request.headers["Idempotency-Key"] = f'"{hashlib.sha256(batch.body).hexdigest()}"'
    request.body = batch.body
    if COMPRESS == "gzip":
        request.body = gzip.compress(batch.body, 6, mtime=0)
        request.headers["Content-Encoding"] = "gzip"
    request.headers["Content-Length"] = str(len(request.body))
    response, text = _send(request, REQUEST_TIMEOUT), b""
    success = 200 <= response.status_code < 300
    with contextlib.closing(response.raw):  # what is not read to its end is not kept alive
        response.raw.enforce_content_length = True  # urllib3 1 does not do so by itself
        try:
            while more := response.raw.read(REPLY_LIMIT - len(text), decode_content=False):
                text += more
            closes = response.headers.get("Connection", "").lower() == "close" or response.raw.version == 10
            _server.used_at = 0 if closes or len(text) == REPLY_LIMIT else time.monotonic()
        except (OSError, HTTPError):
            if success:  # it counts only when it has arrived whole
                raise
    if success and _server.cut_short:
        raise ConnectionError(errno.EPIPE, "success was answered before the whole batch was sent")
    return response.status_code, response.headers, text.decode(errors="replace")


_HTML = re.compile(r"(?i)<(!doctype\s+html|html|head|body|script|meta\s+http-equiv)\b")


def _classify(status: int, text: str) -> Outcome:
    """The one place that knows HTTP's status codes."""
    if 200 <= status < 300:
        page = text.lstrip("\ufeff \t\r\n").startswith("<") and _HTML.search(text)
        return Outcome.MISCONFIGURED if page else Outcome.DELIVERED
    if status in (409, 425, 429, 503):
        return Outcome.BUSY
    if status in (401, 407) or 300 <= status < 400:
        return Outcome.MISCONFIGURED
    if status in (408, 502, 504):
        return Outcome.UNANSWERED
    return Outcome.REJECTED if 400 <= status < 500 else Outcome.FAULT


def _advice(status: int, headers: Any) -> str:
    """What a person is to look at."""
    if COMPRESS == "gzip" and status in (400, 406, 415, 422):
        return "check COMPRESS, the server may not take gzip"
    if 300 <= status < 400:
        location = re.sub(r"(?s)(?<=//)[^/]*@|[?#].*", "", headers.get("Location", "nowhere"))
        return f"check SERVER_URL, the server points to {_one_line(location)}"
    page = "a web page instead of a receipt, check SERVER_URL, or whether the network wants a login"
    token, path = "check API_TOKEN", "check SERVER_URL"
    known = {200: page, 401: token, 403: token, 404: path, 405: path, 407: f"check the proxy {_proxies()}"}
    return known.get(status, "")


def _proxies() -> str:
    proxies = _session(SERVER_URL, API_TOKEN)[2]["proxies"].values()
    return _one_line(" or ".join({proxy.rpartition("@")[2] for proxy in proxies}))


def _ask(batch: Batch) -> Answer:
    """POST a batch and put what came of it into words."""
    try:
        status, headers, text = _post(batch)
    except (OSError, HTTPError) as error:
        return _network_answer(error)
    finally:
        _server.took = time.monotonic() - _server.started
    outcome, wait = _classify(status, text), 0.0
    if outcome is Outcome.DELIVERED:
        _check_count(batch, text)
    with contextlib.suppress(HTTPError, ValueError, OverflowError):  # nonsense
        wait = min(urllib3.Retry().parse_retry_after(headers.get("Retry-After", "0")), RETRY_AFTER_LIMIT)
    headline = f"Server error: {status} {http.client.responses.get(status, '')}".rstrip()
    return Answer(outcome, ": ".join(filter(None, (headline, _advice(status, headers), _one_line(text)))), wait)


def _network_answer(error: Exception) -> Answer:
    """The answer where there is none."""
    cause, server = _cause(error), _public_url()
    reason = _reason(cause)
    mistrust = (ssl.SSLCertVerificationError, urllib3.util.ssl_match_hostname.CertificateError)
    if isinstance(cause, mistrust) or getattr(cause, "library", "") in ("X509", "PEM"):
        advice = f"check SERVER_URL, or REQUESTS_CA_BUNDLE (now {_session(SERVER_URL, API_TOKEN)[2]['verify']})"
        return Answer(Outcome.MISCONFIGURED, f"Cannot trust server {server}: {_one_line(str(cause))}; {advice}")
    through = f" through the proxy {_proxies()}" if isinstance(error, requests.exceptions.ProxyError) else ""
    foreign = not isinstance(error, (requests.RequestException, HTTPError, ConnectionError))  # no CA bundle, say
    unusable = isinstance(error, ValueError) and not isinstance(error, requests.exceptions.InvalidHeader)
    if foreign or unusable or (through and " 407" in reason):  # InvalidURL and InvalidSchema are ValueErrors
        return Answer(Outcome.MISCONFIGURED, f"Cannot send to server {server}{through}: {reason}")
    wrapped = getattr(error.args[0] if error.args else None, "reason", None)
    if _server.connecting or isinstance(wrapped, (ConnectTimeoutError, NewConnectionError, ProxyError)):
        return Answer(Outcome.AWAY, f"Cannot connect to server {server}{through}: {reason}")
    if isinstance(cause, (socket.timeout, urllib3.exceptions.TimeoutError)):
        return Answer(Outcome.UNANSWERED, f"Request timed out: no complete answer within {REQUEST_TIMEOUT:g} seconds")
    return Answer(Outcome.UNANSWERED, f"No usable answer from server {server}: {reason}")


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
    return Batch(json.dumps(packets, allow_nan=False).encode(), len(packets), MAX_RETRIES)


def upload_packets(packets: Packets, retry_count: int = 0) -> Answer:
    """Exactly one POST of one batch; the answer is truthy only on success. An empty list needs none.

    `retry_count` is the number of attempts before, for the log. Never raises for what a server or network does.
    """
    check_settings()
    batch = _batch(packets)
    answer = _ask(batch) if batch.packets else Answer(Outcome.DELIVERED)
    if batch.unanswered and answer.outcome in _PERHAPS:  # that is not what became of the batch
        answer = answer._replace(outcome=Outcome.UNANSWERED)
    suspected = answer.outcome in batch.suspected
    if answer:
        level = logging.DEBUG if batch.searching else logging.INFO
        logger.log(level, "%s✓ Successfully uploaded %d packets%s", batch.label, batch.packets, batch.progress)
        _server.accept()
    else:
        attempt = f" (attempt {retry_count + 1}/{batch.attempts})" if answer.outcome in _AGAIN else ""
        level = logging.DEBUG if suspected else logging.WARNING if attempt else logging.ERROR
        logger.log(level, "%s%s%s", batch.label, answer.reason, attempt)
        if _server.down_since is None and not suspected and answer.outcome is not Outcome.REJECTED:
            _server.down_since = time.monotonic()
    return answer


def upload_with_retry(packets: Packets) -> Answer:
    """Up to MAX_RETRIES attempts (a Batch says how many); truthy only on success.

    Waits RETRY_DELAY before the second attempt, then twice that, and so on; longer where a Retry-After asks for it. Up
    to 10 % of jitter keeps many senders from coming back in step. stop_sender() ends the wait.
    """
    batch = _batch(packets)
    for attempt in range(batch.attempts):
        answer = upload_packets(batch, attempt)
        if answer.outcome not in _AGAIN or answer.outcome in batch.suspected or attempt == batch.attempts - 1:
            break
        batch = batch._replace(unanswered=batch.unanswered or answer.outcome is Outcome.UNANSWERED)
        pinned = answer.outcome in _PERHAPS and time.monotonic() < _server.pinned_until
        delay = max(0 if pinned else RETRY_DELAY * 2 ** min(attempt, 20), answer.retry_after)
        logger.info("%sRetrying in %g seconds...", batch.label, round(delay, 1))
        if not _nap(delay * random.uniform(1, 1.1)):  # noqa: S311
            break
    return answer


# ---------------------------------------------------------------- one file


@dataclass
class Round:
    """One round of one file: sends what its record says is left, and finds out what a batch fails of.

    A batch that fails in a way that may be about it is searched. First it must be seen that the server works: until it
    has accepted something in this round, packets go alone. Then the batch goes in halves, and what fails in halves
    again, until all of it is accepted or a single packet that fails alone: that one is refused, and stays in the file.
    If every piece passes, it was the size. Too many refused in a row, or all of a file, are taken back: then it is not
    about packets, and the file goes the way of any trouble.
    """

    capture: Capture
    path: str
    record: Record
    size: int  # packets in the next batch
    attempts: int
    works: bool = False  # something has been accepted in this round
    in_vain: bool = False  # the search has shown that it is the server
    ends: list[int] = field(default_factory=list)  # of the pieces of the batch that is searched, the nearest last
    begin: int = 0  # its first packet
    passed: int = 0  # packets in its largest piece that was accepted
    told: bool = False  # of the size

    def __post_init__(self) -> None:
        self.label, self.on_disk, self.start = f"{_name(self.path)}: ", self._span(), self.record.uploaded
        if not self.record.rounds:
            self.record.accepted = _server.accepted
        self.heard = self.record.accepted != _server.accepted  # from the server, since this file last was in vain

    def _span(self) -> tuple[int, int]:
        start = self.record.uploaded
        return start, min(start + self.record.batch_size, self.record.packets)

    def send_rest(self) -> Answer:
        """Send what is left, in batches; returns the last answer."""
        while not self.record.sent:
            try:
                batch = self._next_batch()
                answer = upload_with_retry(batch) if not _stopping else Answer(Outcome.STOPPED)
            except MemoryError:
                batch = Batch(b"", self.on_disk[1] - self.on_disk[0], suspected=_PERHAPS)
                answer = Answer(Outcome.REJECTED, "not enough memory for so many packets at once")
            if answer:
                self._accepted(batch.packets)
            elif _stopping:
                return Answer(Outcome.STOPPED)
            elif answer.outcome not in batch.suspected:
                if answer.outcome is Outcome.UNANSWERED:
                    self.record.unanswered = [*self.on_disk]
                return answer
            elif batch.packets > 1:
                self._divide(batch.packets, answer)
            elif self._refuse(answer):
                return answer
            if self.ends and self.ends[0] <= self.record.uploaded:
                self._conclude()
            while self.ends and self.ends[-1] <= self.record.uploaded:
                self.ends.pop()
        self.record.row = 0
        if self.record.refused:  # once more: a lost answer, or a 500 now and then, need not wait an hour
            self.record.save(self.path)
        return self.send_refused()

    def send_refused(self) -> Answer:
        """Send the packets that were refused, each alone and once, under the key that it had."""
        record, row = self.record, 0
        for number in tuple(record.refused):
            batch = Batch(self.capture.cut(number, number + 1), 1, 1, self.label, "", _PERHAPS, searching=True)
            answer = upload_with_retry(batch) if not _stopping else Answer(Outcome.STOPPED)
            if answer:
                self.heard = True
                record.refused.remove(number)
                record.save(self.path)
            elif answer.outcome not in _PERHAPS:
                return answer
            else:
                row, record.last_error, record.accepted = row + 1, answer.reason, _server.accepted
                if row >= IN_A_ROW and not self.heard:
                    break  # it is the server
        return Answer(Outcome.REFUSED, record.last_error) if record.refused else Answer(Outcome.DELIVERED)

    def _next_batch(self) -> Batch:
        """Cut the next batch; the record on disk tells which it is before it goes out. So a crash repeats that one
        batch and no other, byte for byte and under its old key, whether or not the server got it."""
        record = self.record
        self._size_next()
        start, end = self._span()
        if self.on_disk != (start, end):
            record.save(self.path)
            self.on_disk = (start, end)
        progress = f" ({end:,}/{record.packets:,} packets)" if end - start < record.packets else ""
        # One without an answer is suspected after a round and a sweep: the server may have stored it, and one that
        # knows keys can then say so.
        body, in_doubt, searching = self.capture.cut(start, end), record.unanswered == [start, end], bool(self.ends)
        suspected = () if self.in_vain else _PERHAPS if searching or in_doubt else _PERHAPS[:2]
        return Batch(body, end - start, self.attempts, self.label, progress, suspected, in_doubt, searching)

    def _size_next(self) -> None:
        """The first batch of a round keeps its size, whatever BATCH_SIZE is: it may be on the wire, unanswered."""
        start, first = self.record.uploaded, self.record.uploaded == self.start
        piece = self.ends[-1] - start if self.ends else self.size
        self.record.batch_size = 1 if self.ends and not self.works else piece if first else min(piece, BATCH_SIZE)

    def _accepted(self, packets: int) -> None:
        self.works, self.heard, self.passed = True, True, max(self.passed, packets)
        self.record.uploaded, self.record.row = self.record.uploaded + packets, 0
        if not self.ends:
            _server.learn(packets)
            self.size = _server.size

    def _divide(self, packets: int, answer: Answer) -> None:
        if not self.ends:
            self.ends, self.begin, self.passed = [self.record.uploaded + packets], self.record.uploaded, 0
            what = f"{answer.reason}; these {_count(packets, 'packet')} are searched for what it is about"
            logger.log(logging.DEBUG if self.told else logging.WARNING, "%s%s", self.label, what)
        self.ends.append(self.record.uploaded + packets // 2)

    def _refuse(self, answer: Answer) -> bool:
        """Pass over a packet that failed alone. True where that ends the round: it is not about packets."""
        record = self.record
        if not self.ends:  # a batch of this packet alone
            self.ends, self.begin = [record.uploaded + 1], record.uploaded
        record.refused.append(record.uploaded)
        record.uploaded, record.row, record.last_error = record.uploaded + 1, record.row + 1, answer.reason
        if record.row < (record.in_a_row if self.heard else IN_A_ROW) and len(record.refused) < record.packets:
            return False
        record.uploaded -= record.row
        del record.refused[-record.row :]
        record.in_a_row += IN_A_ROW if self.heard else 0  # so no run of bad packets blocks its file for ever
        record.row, record.accepted, self.in_vain, self.ends = 0, _server.accepted, True, []
        _server.pinned_until = 0
        self._size_next()
        return answer.outcome is Outcome.REJECTED or self.attempts == 1

    def _conclude(self) -> None:
        """Say what the search has found."""
        _server.pinned_until = time.monotonic() + RETRY_FAILED_INTERVAL
        if refused := [number for number in self.record.refused if number >= self.begin]:
            what = f"the server refuses {_packets(refused)} alone, the others are delivered: {self.record.last_error}"
            logger.error("%s%s", self.label, what)
        else:
            lasting = self.ends[0] - self.begin > _server.limit  # it was tried once more
            _server.limit, _server.at_limit = (_server.limit, _server.at_limit + 1) if lasting else (self.passed, 0)
            slow = _server.took > REQUEST_TIMEOUT / 2
            self.size = _server.size = max(1, _server.limit // 2) if slow else _server.limit
            what = f"it was the size, {self.passed:,} packets pass; set BATCH_SIZE to that if it stays so"
            logger.log(logging.DEBUG if self.told else logging.WARNING, "%s%s", self.label, what)
            self.told = True


def _packets(numbers: list[int]) -> str:
    """Packets by their numbers, counted from 0."""
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{_count(len(numbers), 'packet')} (number {shown})"


def _upload(path: str, data: str, record: Record, size: int, attempts: int) -> Answer:
    """Send what is left of `data`. Raises OSError where a file operation fails."""
    try:
        with _open_regular(data) as file:
            capture = Capture(file)
            if not record.belongs_to(capture.status):
                raise _changed(data)
            if record.packets not in (-1, len(capture)):
                _rest(path + STATE, ValueError("it tells of another number of packets"), "this record is ignored")
                vars(record).update(vars(Record(record.size, record.mtime_ns)))
            record.packets = len(capture)
            this_round = Round(capture, path, record, size, attempts)
            return this_round.send_refused() if record.sent else this_round.send_rest()
    except NotACapture as error:
        record.unreadable = True
        return Answer(Outcome.UNREADABLE, f"Not a capture: {_one_line(str(error))}")
    except MemoryError:
        return Answer(Outcome.UNREADABLE, "Not enough memory to read it")


def _round(path: str, data: str, attempts: int, fresh: bool = False) -> Answer:
    """One round of X.json, then its move. `fresh`: it was taken just now. Raises OSError where a file operation fails.

    A taken file whose record tells of a failure needs only its move, and so does one whose packets are all delivered.
    """
    record = _load(path, data)
    if path in _unsaved:  # the disk may take it now
        record.save(path)
    if record.sent and not record.refused:
        answer = Answer(Outcome.DELIVERED)
    elif record.rounds and not fresh and os.path.dirname(path) != str(FAILED_DIR):
        left = Outcome.REFUSED if record.sent else Outcome.FAULT
        answer = Answer(Outcome.UNREADABLE if record.unreadable else left, record.last_error)
    else:
        size = min(_server.size, BATCH_SIZE) if fresh and record.packets < 0 else record.batch_size
        answer = _upload(path, data, record, size, attempts)
        if answer.outcome is Outcome.STOPPED:
            return answer
        if not answer:
            record.rounds, record.last_error = record.rounds + 1, answer.reason
            record.turn = _server.turn = _server.turn + 1
            record.time = datetime.now(timezone.utc).isoformat()
    try:
        _done(path, data, record) if answer else _failed(path, data, record, answer)
    except OSError:
        record.save(path)  # so that only the move is tried again, also after a restart
        raise
    return answer


def _done(path: str, data: str, record: Record) -> None:
    """Move a delivered file to processed/."""
    if not record.belongs_to(os.lstat(data)):
        raise _changed(data)  # its producer has gone on writing: it is read again
    target = _free_path(PROCESSED_DIR, os.path.basename(path))
    _move(data, target)
    _forget(path)  # last: a crash before this leaves a record without a file, and no file without its record
    kept = "" if _name(target) == _name(path) else f", kept as {_name(target)}"
    logger.info("✓ %s processed successfully (%d packets)%s", _name(path), record.packets, kept)


def _failed(path: str, data: str, record: Record, answer: Answer) -> None:
    """Move a file to failed_uploads/ where it is not there yet, and tell why."""
    where, target = "stays in failed_uploads/", path
    if os.path.dirname(path) != str(FAILED_DIR):
        target = _free_path(FAILED_DIR, os.path.basename(path))
        where = "moved to failed_uploads/" + ("" if _name(target) == _name(path) else f" as {_name(target)}")
        _server.sweep_when_back |= answer.outcome not in (Outcome.UNREADABLE, Outcome.REFUSED)
    # The record first: a crash between the two leaves the file taken, with its old record. The other way round it
    # would stand in failed_uploads/ without any, and all of it would be sent again.
    record.save(target)
    if target != path:
        _move(data, target)  # where that fails, the next sweep removes the record
        _forget(path)
    if answer.outcome in (Outcome.AWAY, Outcome.BUSY):
        _server.sweep_when_back = _server.early_sweeps = True
    why, then = answer.reason, f"next try within {RETRY_FAILED_INTERVAL:g} seconds"
    if record.unreadable:
        then = "nothing was sent; it is kept, and read again when it changes"
    elif answer.outcome is Outcome.REFUSED:
        why = f"the server refuses {_packets(record.refused)}: {why}"
        then = "all others are delivered; tried again at the next start, when the server is back, and once an hour"
    done = record.uploaded - len(record.refused)
    progress = f" ({done:,}/{record.packets:,} packets uploaded)" if done else ""
    level = logging.WARNING if answer.outcome in _AGAIN else logging.ERROR
    logger.log(level, "✗ %s %s%s: %s; %s", _name(path), where, progress, why, then)


def _take(path: str) -> Optional[bool]:
    """Claim a ready file: X.json becomes X.json.taken, then its marker goes. None where it is not ready.

    By rename, and before reading: what cannot be moved is never uploaded, hence never uploaded again and again. True
    for a file taken just now; False for one that a crash, or a round that was stopped, left taken.
    """
    marker, fresh = path + READY, not _exists(path + TAKEN)
    if fresh:
        try:
            _check(marker, os.lstat(marker))
            _check(path, os.lstat(path))
        except FileNotFoundError:
            return None
        _move(path, path + TAKEN)  # durable before the marker goes: X.json without a marker would wait for ever
    if not _exists(path):  # else the marker is that of a new file
        with contextlib.suppress(FileNotFoundError):
            os.unlink(marker)
        if _exists(path):  # written anew this very moment, and what has just been removed may have been its marker
            with contextlib.suppress(FileExistsError):
                os.close(_create(marker))
    return fresh


def process_json_file(json_path: AnyPath) -> bool:
    """The whole life of one ready file: take it, upload it, move it. True only when it has reached processed/."""
    check_settings()
    path = os.fspath(json_path)
    try:
        fresh = _take(path)
        answer = None if fresh is None else _round(path, path + TAKEN, MAX_RETRIES, fresh)
        _resting.pop(path, None)
        return bool(answer)
    except Exception as error:
        _rest(path, error)
        return False


# ---------------------------------------------------------------- the folders


def _names(folder: Path) -> set[str]:
    """The names in a folder. One that is missing is made; one that cannot be read is told and counts as empty."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries}
    except OSError as error:
        _rest(str(folder), error, "nothing in it is uploaded until that is mended")
        return set()
    _resting.pop(str(folder), None)
    return names


def _ready(names: set[str]) -> list[str]:
    """Of the names in pending_upload/: the X.json that are ready or taken, in chronological order (of their names)."""
    taken = {name[: -len(TAKEN)] for name in names if name.endswith(".json" + TAKEN)}
    marked = {name[: -len(READY)] for name in names if name.endswith(".json" + READY)}
    return sorted(taken | (marked & names))


def _failed_names(names: set[str]) -> set[str]:
    """The data files in failed_uploads/, whatever their names; X.json for an X.json.taken that was moved there."""
    taken = {name[: -len(TAKEN)] for name in names if name.endswith(TAKEN)}
    return taken | {name for name in names if not NO_DATA.fullmatch(name)}


def _waiting() -> int:
    """How many files are still to be delivered, in both folders; one for a folder that cannot be read."""
    waiting = len(_ready(_names(PENDING_DIR))) + len(_failed_names(_names(FAILED_DIR)))
    return waiting + len(_resting.keys() & {str(PENDING_DIR), str(FAILED_DIR)})


def _stuck(names: set[str]) -> list[str]:
    """The files in pending_upload/ that have had no marker for over a minute, or a name with which none counts."""
    unmarked = {name for name in names if name.endswith(".json") and name + READY not in names}
    misnamed = {name[: -len(READY)] for name in names if name.endswith(READY) and not name.endswith(".json" + READY)}
    stuck = []
    for name in unmarked | (misnamed & names):
        with contextlib.suppress(OSError):  # gone
            if os.lstat(PENDING_DIR / name).st_mtime < time.time() - 60:
                stuck.append(name)
    return sorted(stuck)


def _upload_ready() -> bool:
    """Process what is ready and does not rest. True if something has been delivered."""
    accepted = _server.accepted
    for path, record in [*_unsaved.items()]:
        if not _rests(path + STATE):  # the disk may have room again
            record.save(path)
    names = _names(PENDING_DIR)
    if time.monotonic() >= _server.next_hint:
        stuck, told, _server.next_hint = _stuck(names), _server.hinted, time.monotonic() + 60
        _server.hinted = len(stuck)
        if len(stuck) > told:
            others = f" (and {_count(len(stuck) - 1, 'other file')})" if len(stuck) > 1 else ""
            why = "it needs a name in .json, and the marker, that name with .ready behind it"
            logger.warning("%s%s in pending_upload/ is not uploaded: %s", _printable(stuck[-1]), others, why)
    for path in (os.path.join(PENDING_DIR, name) for name in _ready(names)):
        if _stopping:
            break
        if not _rests(path):
            process_json_file(path)
    return _server.accepted > accepted


def _remove_orphans(folder: Path, names: set[str]) -> None:
    """Remove the records that a crash left when their file had moved on, and what it left half-written."""
    if TEMPORARY in names:
        _remove(os.path.join(folder, TEMPORARY))
    for base in [name[: -len(STATE)] for name in names if name.endswith(STATE)]:
        if base not in names and base + TAKEN not in names:
            with contextlib.suppress(OSError, *_DAMAGED):  # not one of ours
                Record.read(os.path.join(folder, base + STATE))
                _forget(os.path.join(folder, base))


def _due(with_refused: bool) -> list[tuple[bool, int, str]]:
    """The failed files to try, least recently tried first: whether only refused packets are left, turn, name.

    Not one that is no capture and has not changed; those with only refused packets where asked for, and last, unless
    they had no turn the last time: else three files that always fail would hold them up for ever.
    """
    names, due = _names(FAILED_DIR), []
    _remove_orphans(FAILED_DIR, names)
    for name in _failed_names(names):
        path = os.path.join(FAILED_DIR, name)
        if _stopping or _rests(path):
            continue
        try:
            record = _load(path, path + TAKEN if name + TAKEN in names else path)
            only_refused = record.sent and bool(record.refused)
            if not record.unreadable and (with_refused or not only_refused):
                due.append((only_refused and _server.next_refused > 0, record.turn, name))
            _server.accepted = max(_server.accepted, record.accepted)
        except FileNotFoundError:
            pass  # gone since the scan
        except OSError as error:
            _rest(path, error)
    return sorted(due)


def retry_failed_uploads() -> None:
    """One sweep over failed_uploads/: one attempt a file, new files first. Ends early when it is the server's trouble:
    at once when it is away, busy or misconfigured, else after three files while it has accepted nothing at all."""
    check_settings()
    _server.early_sweeps |= _server.next_sweep > 0  # this one comes in its time
    _server.sweep_when_back, _server.next_sweep = False, time.monotonic() + RETRY_FAILED_INTERVAL
    _remove_orphans(PENDING_DIR, _names(PENDING_DIR))
    with_refused = time.monotonic() >= _server.next_refused
    due = _due(with_refused)
    if with_refused:
        _server.next_refused = time.monotonic() + REFUSED_INTERVAL
    if due:
        logger.info("Retrying %d failed uploads...", len(due))
    failed, in_vain, accepted = 0, False, _server.accepted
    while due:
        _upload_ready()
        if _stopping or (due[0][0] and not _server.next_sweep):  # the server is back: first what has failed meanwhile
            break
        path = os.path.join(FAILED_DIR, due.pop(0)[2])
        try:
            answer = _round(path, path + TAKEN if _exists(path + TAKEN) else path, 1)
            _resting.pop(path, None)
        except Exception as error:
            _rest(path, error)
            continue
        _server.early_sweeps |= bool(answer) or answer.outcome in _ENDS_SWEEP
        failed += not answer and answer.outcome is not Outcome.UNREADABLE
        in_vain = failed >= 3 and _server.accepted == accepted
        if in_vain or answer.outcome in _ENDS_SWEEP:
            if answer.retry_after and answer.outcome is Outcome.BUSY:
                _server.next_sweep = time.monotonic() + answer.retry_after
            if due and not _stopping:
                logger.info("The other %s can wait: it is the server's trouble", _count(len(due), "failed upload"))
            break
    if due and with_refused:
        _server.next_refused = 0 if in_vain else time.monotonic()


def _prune_processed() -> None:
    """Delete what was captured more than KEEP_PROCESSED_DAYS ago."""
    oldest, pruned, path = time.time() - KEEP_PROCESSED_DAYS * 86400, 0, str(PROCESSED_DIR)
    try:
        entries = os.scandir(path)
    except OSError as error:
        _rest(path, error, "nothing is deleted from it until that is mended")
        return
    with entries:
        for entry in entries:
            try:
                file = not _stopping and entry.name.endswith(".json") and entry.is_file(follow_symlinks=False)
                if file and entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)
                    pruned += 1
            except OSError as error:
                _rest(entry.path, error, "it stays until that is mended")
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
def _only_sender() -> Iterator[None]:
    """Hold LOGS_DIR's lock: the operating system's, so it dies with the process. Its file only names the holder."""
    global _stopping
    LOGS_DIR.mkdir(parents=True, exist_ok=True)
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | _OPEN_FLAGS, 0o600)
    _lock_fds.append(fd)
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
        yield
    finally:
        _lock_fds.remove(fd)
        os.close(fd)
        _stopping = _stopping and bool(_lock_fds)


def _check_folders() -> None:
    """Make the folders; try to write to them, and to move a file from one to the next. Tells what cannot be used.

    Raises OSError where they are on two filesystems.
    """
    last = ""
    for folder in (PROCESSED_DIR, FAILED_DIR, PENDING_DIR):
        probe = os.path.join(folder, TEMPORARY)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove(probe)  # a crash may have left it
            os.rename(last, probe) if last else os.close(_create(probe))
            last = probe
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise OSError(errno.EXDEV, "the three folders must be on one filesystem", str(folder)) from None
            full = error.errno == errno.ENOSPC
            _rest(str(folder), error, "uploads go on" if full else "files stay where they are until that is mended")
    _remove(last)


def monitor_and_upload(once: bool = False) -> None:
    """Upload what is ready every POLL_INTERVAL, sweep every RETRY_FAILED_INTERVAL, until stop_sender().

    Runs in any thread, and again after it has returned. With `once`, returns when nothing more can be done now.
    Raises ValueError for a bad setting, AlreadyRunning, and OSError where LOGS_DIR cannot be used.
    """
    check_settings()
    with _only_sender():
        _check_folders()
        for name in sorted(_env_file - _settings.keys()):
            for meant in difflib.get_close_matches(name, _settings, 1, 0.8):
                logger.warning(".env: %s is no setting and is ignored; %s is", _printable(name), meant)
        logger.info("Watching %s, uploading to %s", _printable(PENDING_DIR), _public_url())
        bytes(16 << 20)  # having freed one large block, glibc keeps each batch's memory: a fifth less CPU
        _server.next_sweep, _server.next_refused = time.monotonic(), 0
        while not _stopping:
            if sweep := time.monotonic() >= _server.next_sweep:
                retry_failed_uploads()
            at_once = _upload_ready() or not _server.next_sweep  # more may have come meanwhile
            if sweep and KEEP_PROCESSED_DAYS:
                _prune_processed()
            if once and not at_once:
                break
            _nap(0 if at_once else POLL_INTERVAL)
        logger.info("Stopped; %s waiting", _count(_waiting(), "file"))


# ---------------------------------------------------------------- --status


def _server_trouble() -> str:
    """Why the server gives no answer within five seconds; empty when it does, whatever it answers."""
    trouble = ["no answer within 5 seconds"]

    def ask() -> None:
        try:
            request = _session(SERVER_URL, API_TOKEN)[1].copy()
            request.method = "GET"
            _send(request, 5).raw.close()
            trouble[0] = ""
        except (OSError, HTTPError) as error:
            trouble[0] = _network_answer(error).reason

    asking = threading.Thread(target=ask, daemon=True)  # because no time-out bounds a name look-up
    asking.start()
    asking.join(5)
    return trouble[0]


def _summary(paths: Iterable[str]) -> dict[str, Any]:
    """How many files, their bytes, and the ages in seconds of the oldest and the newest (None where there is none)."""
    ages, size = [], 0
    for path in paths:
        with contextlib.suppress(OSError):  # gone since the scan
            status = os.lstat(path)
            ages.append(int(time.time() - status.st_mtime))
            size += status.st_size
    return {"files": len(ages), "bytes": size, "oldest": max(ages, default=None), "newest": min(ages, default=None)}


def _failures(names: set[str]) -> list[dict[str, Any]]:
    """What the records say of the failed files, latest first."""
    failures = []
    for name in _failed_names(names):
        path = os.path.join(FAILED_DIR, name)
        with contextlib.suppress(OSError):
            record = _load(path, path + TAKEN if name + TAKEN in names else path)
            reason = _one_line(record.last_error) or "not tried yet"
            known = {key: getattr(record, key) for key in ("packets", "uploaded", "refused", "rounds", "time")}
            failures.append({"file": name, "reason": reason, **known})
    return sorted(failures, key=lambda failure: (failure["time"], failure["file"]), reverse=True)


def _facts() -> dict[str, Any]:
    """How things stand; what --status --json prints. Ages are seconds, packets' numbers are counted from 0."""
    pid, trouble, names, problems = "", _server_trouble(), {}, {}
    with contextlib.suppress(OSError), _open_regular(str(LOCK)) as file:
        pid = _lock(file.fileno(), shared=True)  # closed at once, and a sender that starts just now is patient
    for folder in (PENDING_DIR, FAILED_DIR, PROCESSED_DIR):
        try:
            names[folder] = set(os.listdir(folder)) if _exists(str(folder)) else set()
        except OSError as error:
            names[folder] = set()
            problems[f"{folder.name} cannot be read ({error.strerror})"] = True
    waiting, failed = names[PENDING_DIR], _failed_names(names[FAILED_DIR])
    failures, stuck = _failures(names[FAILED_DIR]), _stuck(waiting)
    ready = [os.path.join(PENDING_DIR, n + TAKEN if n + TAKEN in waiting else n) for n in _ready(waiting)]
    refused = [len(failure["refused"]) for failure in failures if failure["refused"]]
    closed, oldest = sum(not os.access(path, os.R_OK) for path in ready), _summary(ready)["oldest"] or 0
    problems["no sender is running"] = not pid
    problems["the server is not reachable"] = bool(trouble)
    problems[_count(len(failed), "failed upload")] = bool(failed)
    problems[f"a ready file has waited for {timedelta(seconds=oldest)}"] = oldest > 600
    problems[f"{_count(closed, 'ready file')} may not be read"] = closed > 0
    problems[f"{_count(len(stuck), 'file')} without a marker, or without .json, for over a minute"] = bool(stuck)
    data = {f: [n for n in found if not NO_DATA.fullmatch(n) or n.endswith(TAKEN)] for f, found in names.items()}
    return {
        "version": __version__,
        "well": not any(problems.values()),
        "problems": [problem for problem, there in problems.items() if there],
        "running": bool(pid),
        "pid": pid,
        "server": _public_url(),
        "server_trouble": trouble,
        **{folder.name: _summary(os.path.join(folder, n) for n in found) for folder, found in data.items()},
        "refused_packets": sum(refused),
        "files_with_refused_packets": len(refused),
        "latest_failures": failures[:5],
        "without_marker": stuck,
    }


def print_status(as_json: bool = False) -> int:
    """Print how things stand, as a table or as one JSON object; returns the exit status. Nothing is changed."""
    logger.setLevel(logging.CRITICAL)  # what is amiss stands in the table
    facts = _facts()
    lines = [f"Sender  {'running (pid ' + facts['pid'] + ')' if facts['running'] else 'not running'}"]
    lines.append(f"Server  {facts['server_trouble'] or 'reachable'}, {facts['server']}")
    lines.append(f"\n{'':16}{'files':>9}{'kB':>14}   {'oldest':<20}newest")
    for name in ("pending_upload", "failed_uploads", "processed"):
        row = facts[name]
        ages = ["-" if row[age] is None else str(timedelta(seconds=row[age])) for age in ("oldest", "newest")]
        lines.append(f"{name:16}{row['files']:>9,}{row['bytes'] / 1000:>14,.1f}   {ages[0]:<20}{ages[1]}")
    lines += ["\nLatest failures"] if facts["latest_failures"] else []
    for failure in facts["latest_failures"]:
        refused = f"refused: {_packets(failure['refused'])}; " if failure["refused"] else ""
        lines.append(f"  {_printable(failure['file'])}\n      {refused}{failure['reason']}")
    lines += [f"\nNo marker: {_printable(name)}" for name in facts["without_marker"][:5]]
    lines.append(f"\nNot well: {', '.join(facts['problems'])}." if facts["problems"] else "\nAll is well.")
    fill = functools.partial(textwrap.fill, width=80, subsequent_indent=" " * 8, break_on_hyphens=False)
    table = "\n".join(fill(line) if len(line) > 80 else line for line in "\n".join(lines).split("\n"))
    try:
        print(json.dumps(facts, indent=1) if as_json else table, flush=True)
    except BrokenPipeError:  # the console has gone: --status | head -1
        with contextlib.suppress(AttributeError, OSError):  # what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if facts["well"] else 1


# ---------------------------------------------------------------- the command


class _QueueHandler(logging.handlers.QueueHandler):
    """Puts lines into a bounded queue: a console that stalls stops no upload. What is dropped is counted, and said."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                lost = f"the console stalled: {_count(self.dropped, 'line')} not shown"
                self.queue.put_nowait(logging.makeLogRecord({**vars(record), "msg": lost, "levelname": "WARNING"}))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


def _show_log() -> logging.handlers.QueueListener:
    """Send the log to standard error, in a thread of its own."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that cannot show ✓ shows \u2713, a file is UTF-8
            stream.reconfigure(errors="backslashreplace", encoding=None if stream.isatty() else "utf-8")
    logging.raiseExceptions = False  # a console that has gone (| head) stops no upload
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it shows whole URLs, and what is told here anyway
    lines: queue.Queue[Any] = queue.Queue(10_000)
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(message)s"))
    logger.addHandler(_QueueHandler(lines))
    logger.setLevel(LOG_LEVEL)
    listener = logging.handlers.QueueListener(lines, console)
    listener.start()
    return listener


def _run(once: bool) -> int:
    """Run the loop in a thread of its own: on Windows, a signal interrupts no socket call. Returns the exit status."""
    status, asked = [1], False

    def work() -> None:
        try:
            monitor_and_upload(once)
            status[0] = 1 if once and _waiting() else 0
        except (AlreadyRunning, OSError) as error:
            logger.error("%s", _printable(error))

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        for again in _STOP_SIGNALS:
            signal.signal(again, signal.SIG_DFL)  # the second one ends the program at once
        logger.info("Stopping when the current request is finished; once more (Ctrl-C) ends it at once")

    for number in _STOP_SIGNALS:
        signal.signal(number, on_signal)
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.2)
        if asked:  # said again as long as it takes: the loop may not have begun
            stop_sender()
    return status[0]


def main(arguments: Optional[list[str]] = None) -> int:
    """The command line; returns the exit status."""
    shown = {**_settings, "SERVER_URL": _public_url(), "API_TOKEN": "***" if API_TOKEN else ""}
    epilog = "settings in force, which .env.example explains:"
    epilog += "".join(f"\n  {name:22}{value}" for name, value in shown.items())
    parser = argparse.ArgumentParser(
        description="Upload the sniffer's captures until Ctrl-C.",
        epilog=epilog.replace("%", "%%") if "%(prog)" in epilog else epilog,  # only then argparse expands it
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = functools.partial(parser.add_mutually_exclusive_group().add_argument, action="store_true")
    flag("--once", help="upload what is there, then exit: 0 if nothing is left, else 1")
    flag("--status", help="tell how things stand, then exit: 0 if all is well, else 1")
    parser.add_argument("--json", action="store_true", help="with --status: as one JSON object, for monitoring")
    parser.add_argument("--version", action="version", version=f"sender.py {__version__}")
    options = parser.parse_args(arguments)
    if options.json and not options.status:
        parser.error("--json goes with --status")
    listener, status = _show_log(), 2
    for line in _bad_settings:
        logger.error("%s", line)
    if not _bad_settings:
        status = print_status(options.json) if options.status else _run(options.once)
    ending = threading.Thread(target=listener.stop, daemon=True)
    ending.start()
    ending.join(1)
    if ending.is_alive():  # the console has stalled, and the interpreter would wait for it
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
