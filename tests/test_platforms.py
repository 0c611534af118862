"""Windows and macOS: their behaviour injected where the tests run elsewhere, and the one place where it is met."""

from __future__ import annotations

import ast
import errno
import functools
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from conftest import DATA, SENDER, SETTINGS, Spool, capture, console_lines, packet, wait_until
from ingest_server import split_packets
from servers import Answer, Clock, Request, ScriptedServer, reply


def accept(request: Request) -> Answer:
    return None


def greet(request: Request) -> Answer:
    """The answer to the question of --status whether anybody is there."""
    return reply(200) if request.line.startswith("GET ") else None


def life_of_files(spool: Spool, module: ModuleType, server: ScriptedServer) -> None:
    """All the steps a file can take: batches, a name twice, bad JSON, a failure and its sweep, a refused packet."""
    first = spool.drop("a.json", capture(5))
    assert module.process_json_file(spool.pending / "a.json")
    second = spool.drop("a.json", [packet(9)])
    assert module.process_json_file(spool.pending / "a.json")
    bad = spool.drop("bad.json", "[7]")
    assert not module.process_json_file(spool.pending / "bad.json")
    server.script = lambda request: reply(503) if 12 in request.numbers else None
    failing = spool.drop("failing.json", [packet(number) for number in range(10, 14)])
    assert not module.process_json_file(spool.pending / "failing.json")
    server.script = accept
    module.retry_failed_uploads()
    server.script = lambda request: reply(422) if b"poison" in request.body else None
    refused = spool.drop("refused.json", [packet(20), packet(21, dns_qname="poison"), packet(22), packet(23)])
    assert not module.process_json_file(spool.pending / "refused.json")
    assert json.loads((spool.failed / "refused.json.state").read_bytes())["refused"] == [1]
    assert server.stored == Counter([0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 20, 22, 23])
    server.script = accept
    module._server.next_refused = 0  # an hour later
    module.retry_failed_uploads()
    contents = {path.name: path.read_bytes() for path in spool.processed.iterdir()}
    expected = {"a.json": first, "a.1.json": second, "failing.json": failing, "refused.json": refused}
    assert contents == expected, spool.tree()
    assert (spool.failed / "bad.json").read_bytes() == bad
    assert list(spool.pending.iterdir()) == []
    assert server.stored == Counter([0, 1, 2, 3, 4, 9, 10, 11, 12, 13, 20, 21, 22, 23])


# ---------------------------------------------------------------- Windows

if sys.platform != "win32":
    # What a Windows process is like, as far as sender.py can tell: the source of sender.py's start in one, and what
    # the tests use in this process. Locks are real ones, held between processes and let go by the close.
    WINDOWS = """
import errno, os, signal, sys, types
import fcntl as _fcntl
import dotenv, requests  # not to be told that this is Windows

_real_open, _real_rename, _real_replace, _real_unlink = os.open, os.rename, os.replace, os.unlink

def _open(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # a folder cannot be opened
    return _real_open(path, flags, *rest, **more)

def _refuse_open_file(path):
    try:
        status = os.lstat(path)
    except OSError:
        return
    for fd in map(int, os.listdir("/dev/fd")):
        try:
            if os.path.samestat(os.fstat(fd), status):
                raise PermissionError(errno.EACCES, "The process cannot access the file, it is being used", str(path))
        except PermissionError:
            raise
        except OSError:
            pass  # closed since

def _rename(source, target):
    _refuse_open_file(source)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(source))
    _real_rename(source, target)

def _replace(source, target):
    _refuse_open_file(source)
    _refuse_open_file(target)
    _real_replace(source, target)

def _unlink(path, *rest, **more):
    _refuse_open_file(path)
    _real_unlink(path, *rest, **more)

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_UNLCK, msvcrt.LK_LOCK, msvcrt.LK_NBLCK, msvcrt.LK_RLCK, msvcrt.LK_NBRLCK = range(5)

def _locking(fd, mode, size):
    if os.lseek(fd, 0, os.SEEK_CUR) < 20:
        raise AssertionError("nobody else could read the pid: a locked byte cannot be read")
    try:
        _fcntl.flock(fd, _fcntl.LOCK_UN if mode == msvcrt.LK_UNLCK else _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

msvcrt.locking = _locking
LACKING = (
    "O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_SYNC pread pwrite fork getuid chown mkfifo statvfs sync "
    "posix_fadvise sendfile fchown fchmod uname killpg setsid nice"
).split()

def become_windows(set_attribute, delete_attribute, modules):
    set_attribute(sys, "platform", "win32")
    set_attribute(signal, "SIGBREAK", signal.SIGUSR1)
    for name, function in (("open", _open), ("rename", _rename), ("replace", _replace), ("unlink", _unlink)):
        set_attribute(os, name, function)
    set_attribute(os, "remove", _unlink)
    for name in LACKING:
        if hasattr(os, name):
            delete_attribute(os, name)
    modules(sys.modules, "msvcrt", msvcrt)
    modules(sys.modules, "fcntl", None)
"""
    START = """
import runpy
become_windows(setattr, delattr, lambda modules, name, module: modules.__setitem__(name, module))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

    @pytest.fixture
    def windows(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
        """This process as a Windows one, once the spool's folder has been made in it."""
        names: dict[str, Any] = {}
        exec(WINDOWS, names)
        names["become_windows"](
            functools.partial(monkeypatch.setattr, raising=False), monkeypatch.delattr, monkeypatch.setitem
        )

    def on_windows(spool: Spool, *arguments: str, **settings: object) -> subprocess.Popen[str]:
        """sender.py as a process that takes its machine for Windows, its console in .stderr."""
        process = subprocess.Popen(
            [sys.executable, "-c", WINDOWS + START, str(spool.sender_py), *arguments],
            env=spool.environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        spool.processes.append(process)
        return process

    @pytest.mark.usefixtures("windows")
    def test_on_windows_nothing_open_is_renamed_and_no_folder_synced(
        spool: Spool,
    ) -> None:
        with ScriptedServer() as server:
            module = spool.load(SERVER_URL=server.url, BATCH_SIZE=2, MAX_RETRIES=1)
            life_of_files(spool, module, server)

    def test_on_windows_the_program_drains_real_captures_and_exits_0(spool: Spool) -> None:
        contents = {path.name: spool.drop(path.name, path.read_bytes()) for path in DATA.glob("packets_*.json")}
        with ScriptedServer() as server:
            process = on_windows(spool, "--once", SERVER_URL=server.url)
            console = process.communicate(timeout=60)[1]
        assert process.returncode == 0, console
        console_lines(console)
        assert {path.name: path.read_bytes() for path in spool.processed.iterdir()} == contents
        assert spool.names() == [f"processed/{name}" for name in sorted(contents)]

    @pytest.mark.slow
    def test_on_windows_a_second_sender_exits_1_and_names_the_pid_and_status_knows_it_too(spool: Spool) -> None:
        with ScriptedServer(early=greet) as server:
            first = on_windows(spool, SERVER_URL=server.url)
            spool.drop("a.json", [packet(1)])
            wait_until(lambda: (spool.processed / "a.json").exists(), "the first sender at work")
            second = on_windows(spool, SERVER_URL=server.url)
            console = second.communicate(timeout=60)[1]
            assert second.returncode == 1, console
            assert f"{first.pid}" in console
            told = on_windows(spool, "--status", SERVER_URL=server.url).communicate(timeout=60)
            assert f"{first.pid}" in told[0], told
            first.kill()
            first.wait()
            told = on_windows(spool, "--status", SERVER_URL=server.url).communicate(timeout=60)
            assert "not running" in told[0], told
            third = on_windows(spool, "--once", SERVER_URL=server.url)
            assert third.wait(60) == 0

    def test_on_windows_ctrl_break_ends_it_with_status_0(spool: Spool) -> None:
        import signal

        spool.drop("a.json", [packet(1)])
        with ScriptedServer() as server:
            process = on_windows(spool, SERVER_URL=server.url, POLL_INTERVAL=600)
            wait_until(lambda: (spool.processed / "a.json").exists(), "the first poll")
            process.send_signal(signal.SIGUSR1)  # which it takes for SIGBREAK
            assert process.wait(60) == 0

    class Scanner:
        """A virus scanner that refuses the first renames of every file, as many as its `patience` says."""

        def __init__(self, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
            self.patience = patience
            self.refused: Counter[str] = Counter()
            monkeypatch.setattr(os, "rename", self._hold(os.rename))
            monkeypatch.setattr(os, "replace", self._hold(os.replace))

        def _hold(self, step: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
            def refuse_first(source: Any, target: Any) -> None:
                if self.refused[str(source)] < self.patience:
                    self.refused[str(source)] += 1
                    raise PermissionError(errno.EACCES, "Access is denied", str(source))
                step(source, target)

            return refuse_first

    @pytest.mark.usefixtures("windows")
    def test_on_windows_a_file_that_a_virus_scanner_holds_for_a_moment_rests_and_is_delivered_once(
        spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        spool.drop("a.json", capture(5))
        with ScriptedServer() as server:
            module = spool.load(SERVER_URL=server.url, BATCH_SIZE=2)
            clock, scanner = Clock(module), Scanner(monkeypatch, patience=2)
            asked = []
            while "processed/a.json" not in spool.names():
                asked.append(bool(module.process_json_file(spool.pending / "a.json")))
                assert len(asked) < 10
        assert clock.slept == 0, "no other file is held up"
        assert len(scanner.refused) >= 3  # the take, the progress, the move
        assert server.stored == Counter(range(5))
        assert len(server.requests) == 3
        assert {record.levelname for record in caplog.records} <= {"INFO", "WARNING"}, "it heals by itself"

    @pytest.mark.usefixtures("windows")
    def test_on_windows_a_refused_last_move_is_made_later(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
        spool.drop("a.json", capture(3))
        with ScriptedServer() as server:
            module = spool.load(SERVER_URL=server.url)
            Clock(module)
            scanner = Scanner(monkeypatch, patience=0)

            def hold_from_now_on(request: Request) -> Answer:
                scanner.patience = float("inf")
                return None

            server.script = hold_from_now_on
            assert not module.process_json_file(spool.pending / "a.json")
            assert not module.process_json_file(spool.pending / "a.json")
            scanner.patience = 0
            assert module.process_json_file(spool.pending / "a.json")
        assert len(server.requests) == 1
        assert spool.names() == ["processed/a.json"]


# ---------------------------------------------------------------- macOS, and a Python without sqlite3

if sys.platform != "win32":

    def test_on_macos_files_live_their_whole_lives(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        for name in ("posix_fadvise", "posix_fallocate", "sendfile", "fdatasync", "O_DIRECT", "O_TMPFILE"):
            monkeypatch.delattr(os, name, raising=False)
        with ScriptedServer() as server:
            module = spool.load(SERVER_URL=server.url, BATCH_SIZE=2, MAX_RETRIES=1)
            life_of_files(spool, module, server)


def captures_arrive_and_the_corrupt_one_does_not(spool: Spool) -> None:
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        texts: list[str] = []
        for path in sorted(DATA.glob("*.json")):
            content = spool.drop(path.name, path.read_bytes())
            corrupt = path.name.startswith("corrupt")
            assert bool(module.process_json_file(spool.pending / path.name)) is not corrupt
            texts += [] if corrupt else split_packets(content.decode())
    assert [text for request in server.requests for text in split_packets(request.body.decode())] == texts


def test_a_python_without_sqlite3_reads_as_exactly(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    captures_arrive_and_the_corrupt_one_does_not(spool)


def test_an_sqlite3_without_json_functions_reads_as_exactly(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Old(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            asked.append(arguments)
            raise sqlite3.OperationalError("no such function: json_valid")

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *arguments, **more: connect(*arguments, **more, factory=Old))
    captures_arrive_and_the_corrupt_one_does_not(spool)


# ---------------------------------------------------------------- the source

SOURCE = SENDER.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
PLATFORM_MODULES = "fcntl msvcrt winreg ctypes pwd grp resource termios _winapi posix nt"
NOT_EVERYWHERE = {
    "os": "O_NOFOLLOW O_NONBLOCK O_CLOEXEC O_DIRECTORY O_BINARY O_SYNC pread pwrite preadv fork getuid geteuid getpgid "
    "chown fchown fchmod lchown mkfifo mknod statvfs fstatvfs sync fdatasync posix_fadvise sendfile uname getloadavg "
    "killpg setsid nice startfile name",
    "signal": "SIGBREAK CTRL_BREAK_EVENT CTRL_C_EVENT SIGHUP SIGKILL SIGUSR1 SIGUSR2 SIGALRM SIGQUIT SIGPIPE SIGCHLD "
    "alarm setitimer pause sigwait pthread_sigmask set_wakeup_fd siginterrupt",
    "sys": "platform getwindowsversion",
    "socket": "AF_UNIX SO_REUSEPORT MSG_DONTWAIT",
    "time": "tzset clock_gettime",
}


def platform_block() -> ast.If:
    blocks = [node for node in TREE.body if isinstance(node, ast.If) and "sys.platform" in ast.unparse(node.test)]
    assert len(blocks) == 1, [block.lineno for block in blocks]
    return blocks[0]


def test_what_only_one_platform_has_is_named_in_the_one_platform_block_only() -> None:
    block = platform_block()
    inside = range(block.lineno, (block.end_lineno or 0) + 1)
    found = []
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in PLATFORM_MODULES.split()]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.module in PLATFORM_MODULES.split() else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = f"{node.value.id}.{node.attr}"
            names = [named] if node.attr in NOT_EVERYWHERE.get(node.value.id, "").split() else []
        else:
            continue
        found += [f"line {node.lineno}: {name}" for name in names if node.lineno not in inside]
    assert found == []


def test_the_platform_block_has_both_sides_and_fits_a_screen() -> None:
    block = platform_block()
    assert (block.end_lineno or 0) - block.lineno < 60
    sides = [{node.name for node in side if isinstance(node, ast.FunctionDef)} for side in (block.body, block.orelse)]
    assert sides[0] == sides[1] != set()


def test_no_function_is_longer_than_50_lines() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(functions) > 20
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def test_the_environment_is_read_in_the_settings_and_nowhere_below() -> None:
    assigned = [
        node
        for node in TREE.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        and any(isinstance(name, ast.Name) and name.id in SETTINGS for name in ast.walk(node))
    ]
    last = max(node.end_lineno or 0 for node in assigned)
    reads = [
        node.lineno
        for node in ast.walk(TREE)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("environ", "getenv") for alias in node.names))
    ]
    assert reads, "the settings read no environment"
    assert [line for line in reads if line > last] == []


def test_only_requests_and_dotenv_are_needed_beside_the_standard_library() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(TREE)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    if sys.version_info >= (3, 10):
        known = set(sys.stdlib_module_names)
        assert imported - known == {"requests", "dotenv", "urllib3"}  # urllib3 is what requests stands on
    assert {"requests", "dotenv"} <= imported
