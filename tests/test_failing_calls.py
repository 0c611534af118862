"""Calls that fail: every file and network operation of a running sender, once and for a while, with likely errors."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Spool, wait_until
from faults import AFTER, BEFORE, HALF, NETWORK, MoodyServer, Operation, watched
from scenarios import SCENARIOS, B, Play, Stage, report, spread, stage_for

pytestmark = pytest.mark.slow

ERRORS = {
    "open": (errno.EACCES, errno.EIO, errno.EMFILE, errno.EINTR),
    "create": (errno.ENOSPC, errno.EACCES, errno.EINTR),
    "write": (errno.ENOSPC, errno.EIO, errno.EINTR),
    "read": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINTR),
    "rename": (errno.EACCES, errno.ENOSPC, errno.EINTR),
    "unlink": (errno.EACCES, errno.EIO),
    "scandir": (errno.EACCES, errno.EIO, errno.EINTR),
    "utime": (errno.EACCES, errno.EIO),
    "mkdir": (errno.EACCES, errno.ENOSPC),
    "lstat": (errno.EACCES, errno.EIO, errno.EINTR),
    "fstat": (errno.EIO,),
    "truncate": (errno.ENOSPC,),
    "connect": (errno.ECONNREFUSED, errno.ENETUNREACH, errno.ETIMEDOUT, errno.EINTR),
    "send": (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT),
    "recv": (errno.ECONNRESET, errno.ETIMEDOUT),
}
OFTEN = {"POLL_INTERVAL": 0.01, "RETRY_FAILED_INTERVAL": 0.05}
FOLDERS = ("pending_upload", "failed_uploads", "processed")
AT_START = (".", ".sender.lock")  # what monitor_and_upload() refuses to start without


def injected(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path) if path else OSError(number, os.strerror(number))


class Said(logging.Handler):
    """What one sender logged, WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Daemon:
    """monitor_and_upload() in a thread, on a play's spool, with somebody who watches its calls."""

    def __init__(self, play: Play, observer: Callable[[Operation, str], None], **settings: object) -> None:
        self.play, self.observer = play, observer
        self.module = play.spool.load(**{**play.settings, **OFTEN, **settings})
        self.said = Said()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        try:
            with watched(self.play.spool.logs, self.observer):
                self.module.monitor_and_upload()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Daemon:
        logging.getLogger("sender").addHandler(self.said)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while self.thread.is_alive():  # a stop that comes before the loop has begun is for nobody
            self.module.stop_sender()
            self.thread.join(0.05)
        logging.getLogger("sender").removeHandler(self.said)

    def settle(self) -> None:
        """Wait until every file is in its place, or the thread has ended."""
        goal = {*self.play.scenario.after, *self.play.scenario.records}
        left = "failed_uploads/b.json" in goal
        self.wait_for(lambda: self.names() == goal and (not left or self.play.refused() == (len(B), [4])))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition or the end of the thread, with a limit; the assertions after it say what is wrong."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: condition() or not self.thread.is_alive(), "it", limit=8)

    def names(self) -> set[str]:
        """What is in the folders just now."""
        return {
            f"{folder.name}/{name}"
            for folder in (self.play.spool.pending, self.play.spool.failed, self.play.spool.processed)
            if folder.exists()
            for name in os.listdir(folder)
        }


@pytest.fixture
def stage(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(logging.getLogger("sender"), "propagate", False)  # it would be thousands of lines
    with stage_for(spool, tmp_path) as stage:
        yield stage


def too_often(told: Counter[str]) -> list[str]:
    """The lines that were repeated. There are two files by the name of e.json."""
    return [line for line, number in told.items() if number > 1 + ("e.json" in line)]


class Fault(NamedTuple):
    """What fails: a kind of call, in which phase, for the how manieth time, and with what."""

    call: str
    phase: str
    occurrence: int
    code: int
    path: str

    def __str__(self) -> str:
        return f"{errno.errorcode[self.code]} {self.phase} {self.call} {self.path}, number {self.occurrence}"


def faults_of(play: Play) -> list[Fault]:
    """Every single fault that can be put into a run."""
    faults: list[Fault] = []
    seen: Counter[tuple[str, str]] = Counter()

    def note(operation: Operation, phase: str) -> None:
        call = operation.call
        seen[call, phase] += 1
        if phase == BEFORE or (phase == HALF and call in ("write", "send")) or (phase == AFTER and call == "send"):
            codes = [code for code in ERRORS.get(call, ()) if phase == BEFORE or code != errno.EINTR]
            faults.extend(Fault(call, phase, seen[call, phase], code, operation.path) for code in codes)

    with watched(play.spool.logs, note):
        play.run()
    return faults


class FailOnce:
    """An observer that makes one call fail."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.seen = fault, 0

    @property
    def must_be_told(self) -> bool:
        """Whether a step failed. (A folder's fsync may: some filesystems have none. Python repeats what was EINTR.)"""
        return (
            self.seen >= self.fault.occurrence  # else the daemon was done before
            and self.fault.call in ("read", "create", "write", "fsync", "rename")
            and not (self.fault.call == "fsync" and self.fault.path in FOLDERS)
            and self.fault.code != errno.EINTR
            and self.fault.path not in AT_START
        )

    def __call__(self, operation: Operation, phase: str) -> None:
        if (operation.call, phase) == (self.fault.call, self.fault.phase):
            self.seen += 1
            if self.seen == self.fault.occurrence:
                raise injected(self.fault.code, operation.path)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_one_call_that_fails_at_any_point_costs_no_packet_and_no_repeat_and_is_told(
    scenario: str, stage: Stage, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    faults = faults_of(stage(scenario, "count"))
    failures = []
    chosen = spread(len(faults), 18, all_points)
    for number in chosen:
        fault = faults[number - 1]
        play = stage(scenario, number)
        observer = FailOnce(fault)
        with Daemon(play, observer) as daemon:
            daemon.settle()
        try:
            if fault.path in AT_START:
                assert daemon.error is None or isinstance(daemon.error, OSError), repr(daemon.error)
                play.balance(play.run, crashes=0)
            else:
                assert daemon.error is None, repr(daemon.error)
                play.balance(lambda: None, crashes=fault.call in NETWORK)
            told = [line for line in daemon.said.lines if os.strerror(fault.code) in line]
            assert len(told) == len(set(told)), told
            assert told or not observer.must_be_told, daemon.said.lines
        except Exception as error:
            failures.append(f"{number}: {fault}: {error}")
            if len(failures) == 5:
                break
    record_property(f"single errors in '{scenario}'", f"{len(chosen)} of {len(faults)} tried")
    report(failures, len(chosen))


class FailForAWhile:
    """An observer that makes one kind of call in one folder fail, from an occurrence on, until it is over."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.folder = fault, folder_of(fault.path)
        self.seen = self.polls = 0
        self.over = False

    def lasted(self, polls: int) -> bool:
        return self.polls > polls

    def __call__(self, operation: Operation, phase: str) -> None:
        begun = self.seen >= self.fault.occurrence
        if begun and phase == BEFORE and operation.call == "scandir" and operation.path == "pending_upload":
            self.polls += 1
        if (operation.call, phase, folder_of(operation.path)) == (self.fault.call, BEFORE, self.folder):
            self.seen += 1
            if self.seen >= self.fault.occurrence and not self.over:
                raise injected(self.fault.code, operation.path)


def folder_of(path: str) -> str:
    return path if path in FOLDERS else path.rpartition("/")[0]


@pytest.mark.timeout(1800)
def test_a_fault_that_lasts_is_told_once_and_when_it_is_over_everything_goes_on_by_itself(
    stage: Stage, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for fault in faults_of(stage("deliveries", "count")):
        if fault.path not in AT_START and fault.phase == BEFORE and fault.code == ERRORS[fault.call][0]:
            counts[fault.call, folder_of(fault.path)] += 1
    faults = [
        Fault(call, BEFORE, occurrence, code, f"{folder}/" if folder else "")
        for (call, folder), number in sorted(counts.items())
        for code in ERRORS[call]
        if code != errno.EINTR  # it never lasts, and Python itself tries again
        # Answers that never come have batches searched, under new keys: what the receiver got it gets again (README).
        if call != "recv" and not (code == errno.ETIMEDOUT and call == "send")
        for occurrence in sorted({1 + number // 5, 1 + number // 2})
    ]
    failures = []
    chosen = spread(len(faults), 4, all_points)
    for number in chosen:
        fault = faults[number - 1]
        observer = FailForAWhile(fault)
        play = stage("deliveries", number)
        with Daemon(play, observer) as daemon:
            daemon.wait_for(functools.partial(observer.lasted, 8))
            observer.over = True
            daemon.settle()
        try:
            assert daemon.error is None, repr(daemon.error)
            assert observer.lasted(8)
            next_start = play.run if fault.call == "unlink" else lambda: None  # clears away what the start tried out
            play.balance(next_start, crashes=100 if fault.call == "send" else 0)
            told = Counter(line for line in daemon.said.lines if os.strerror(fault.code) in line)
            assert fault.call in NETWORK or not too_often(told), told
            assert told or fault.call not in ("read", "create", "write", "rename", "scandir"), daemon.said.lines
        except Exception as error:
            failures.append(f"{number}: {fault}: {error}")
            if len(failures) == 5:
                break
    record_property("lasting errors", f"{len(chosen)} of {len(faults)} tried")
    report(failures, len(chosen))


class Trouble:
    """An observer that makes whatever `affects` says fail, until it is over."""

    def __init__(self, code: int, affects: Callable[[Operation], bool]) -> None:
        self.code, self.affects = code, affects
        self.polls = 0
        self.over = False

    def __call__(self, operation: Operation, phase: str) -> None:
        if phase == BEFORE:
            self.polls += (operation.call, operation.path) == ("scandir", "pending_upload")
            if not self.over and self.affects(operation):
                raise injected(self.code, operation.target or operation.path)

    def lasted(self) -> bool:
        return self.polls > 8


def count_requests(play: Play) -> list[int]:
    """The sizes of the batches that have arrived so far."""
    sizes: list[int] = []
    play.on_request = lambda packets: sizes.append(len(packets))
    return sizes


def told_once(daemon: Daemon, *words: str) -> bool:
    """Whether for each file exactly one line has been said that holds these words."""
    told = [line for line in daemon.said.lines if all(word in line for word in words)]
    files = [line.partition(":")[0] for line in told]
    return bool(told) and len(files) == len(set(files))


def test_without_permission_for_processed_only_the_moves_are_tried_again(
    stage: Stage,
) -> None:
    play = stage("plain", "play")
    sizes = count_requests(play)
    for _ in ("a first sender", "and one that finds what the first has left"):
        trouble = Trouble(errno.EACCES, lambda operation: operation.target.startswith("processed/"))
        with Daemon(play, trouble) as daemon:
            daemon.wait_for(trouble.lasted)
        assert daemon.error is None
        assert sizes == [3, 1, 3, 1]
        assert told_once(daemon, "Permission denied", "processed"), daemon.said.lines
    trouble = Trouble(errno.EACCES, lambda operation: operation.target.startswith("processed/"))
    with Daemon(play, trouble) as daemon:
        daemon.wait_for(trouble.lasted)
        trouble.over = True
        daemon.settle()
    assert sizes == [3, 1, 3, 1]
    play.balance(lambda: None, crashes=0)


def test_what_cannot_be_taken_out_of_a_read_only_folder_is_not_sent_at_all_until_it_can(stage: Stage) -> None:
    play = stage("plain", "play")
    sizes = count_requests(play)
    changes = ("rename", "create", "unlink", "mkdir")
    trouble = Trouble(errno.EACCES, lambda o: o.call in changes and o.path.startswith("pending_upload"))
    with Daemon(play, trouble) as daemon:
        daemon.wait_for(trouble.lasted)
        assert sizes == []
        assert told_once(daemon, "Permission denied"), daemon.said.lines
        trouble.over = True
        daemon.settle()
    assert daemon.error is None
    play.balance(lambda: None, crashes=0)


@pytest.mark.parametrize("scenario", ["plain", "deliveries", "refusals"])
def test_a_full_disk_stops_no_upload_and_all_is_in_its_place_in_the_end(scenario: str, stage: Stage) -> None:
    play = stage(scenario, "play")
    disk = Trouble(
        errno.ENOSPC, lambda o: o.call in ("create", "write", "mkdir", "fsync", "truncate") and o.path not in AT_START
    )
    with Daemon(play, disk) as daemon:
        daemon.wait_for(disk.lasted)
        delivered = set(play.server.packets())
        disk.over = True
        daemon.settle()
    assert daemon.error is None
    play.balance(lambda: None, crashes=0)
    assert delivered
    told = Counter(line for line in daemon.said.lines if os.strerror(errno.ENOSPC) in line)
    assert told
    assert not too_often(told)


# ---------------------------------------------------------------- real permissions

UNPRIVILEGED = """
import os, runpy, sys
import requests
requests.get(sys.argv[1])  # what it and the sender import late is in memory then: the interpreter's own folder may be
runpy.run_path(sys.argv[2])  # out of reach for nobody
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Guest:
    """sender.py run by a user who is not root, in a folder of that user's own."""

    def __init__(self, folder: Path, server: MoodyServer) -> None:
        self.play = Play(SCENARIOS["plain"], Spool(folder), server, folder)
        self.play.spool.processed.mkdir()
        self.url = server.url.replace("ingest", "health")
        if sys.platform != "win32" and os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)

    def run(self) -> subprocess.CompletedProcess[str]:
        """`--once`, with its console in .stderr."""
        command = [sys.executable, "-c", UNPRIVILEGED, self.url, str(self.play.spool.sender_py), "--once"]
        environment = self.play.spool.environment(**self.play.settings)
        return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=100)


if sys.platform != "win32":  # where chmod takes no permission from a folder's owner

    @pytest.fixture
    def guest() -> Iterator[Guest]:
        with tempfile.TemporaryDirectory() as folder, MoodyServer(Path(folder) / "unused.sqlite3") as server:
            yield Guest(Path(folder), server)

    def test_a_user_without_permission_for_processed_sends_every_batch_once_and_is_told(guest: Guest) -> None:
        sizes = count_requests(guest.play)
        guest.play.spool.processed.chmod(0o555)
        for _ in range(2):
            run = guest.run()
            assert run.returncode == 1, run.stderr
            assert sizes == [3, 1, 3, 1]
            assert "processed" in run.stderr
            assert run.stderr.lower().count("permission") <= 3, run.stderr  # at start, and for each file
        guest.play.spool.processed.chmod(0o755)
        assert guest.run().returncode == 0
        assert sizes == [3, 1, 3, 1]
        guest.play.balance(lambda: None, crashes=0)

    def test_a_user_with_a_read_only_pending_upload_sends_nothing_and_is_told(guest: Guest) -> None:
        sizes = count_requests(guest.play)
        guest.play.spool.pending.chmod(0o555)
        run = guest.run()
        assert run.returncode == 1, run.stderr
        assert sizes == []
        assert run.stderr.lower().count("permission") <= 3, run.stderr
        assert "pending_upload" in run.stderr
        guest.play.spool.pending.chmod(0o755)
        assert guest.run().returncode == 0
        guest.play.balance(lambda: None, crashes=0)

    def test_a_user_who_may_not_write_in_logs_gets_one_line_and_status_1(guest: Guest) -> None:
        guest.play.spool.logs.chmod(0o555)
        run = guest.run()
        assert run.returncode == 1, run.stderr
        assert run.stderr.count("\n") == 1, run.stderr
        assert str(guest.play.spool.logs) in run.stderr
        assert "permission" in run.stderr.lower()
        guest.play.spool.logs.chmod(0o755)
        assert guest.run().returncode == 0
        guest.play.balance(lambda: None, crashes=0)
