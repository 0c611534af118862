"""What the tests share: a scratch folder with its own copy of sender.py, used as a module or as a process."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from bench import SENDER_SETTINGS

SENDER = Path(__file__).parent.parent / "sender.py"
DATA = Path(__file__).parent / "data"
SETTINGS = sorted(SENDER_SETTINGS)
Said = Callable[..., list[str]]
Note = Callable[[str, object], None]
FAST = {"RETRY_DELAY": "0.01", "POLL_INTERVAL": "0.05"}
_numbers = itertools.count()


def wait_until(condition: Callable[[], object], what: str, limit: float = 60) -> None:
    """Wait for a condition, never for a time; fail with `what` was waited for."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited {limit} s in vain: {what}"
        time.sleep(0.01)


def packet(number: int, **fields: Any) -> dict[str, Any]:
    """A small packet that can be told from all others."""
    return {"timestamp": 1_700_000_000 + number, "src_ip": "10.0.0.1", "length": number, "http_path": None, **fields}


class Spool:
    """A scratch folder as a user has it: sender.py alone in it, and logs/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sender_py = folder / "sender.py"
        shutil.copy(SENDER, self.sender_py)
        self.logs = folder / "logs"
        self.pending = self.logs / "pending_upload"
        self.failed = self.logs / "failed_uploads"
        self.processed = self.logs / "processed"
        self.processes: list[subprocess.Popen[str]] = []

    def drop(self, name: str, packets: list[dict[str, Any]] | bytes | str) -> bytes:
        """Write a capture as the sniffer does: a temporary file, a rename, the marker. Returns the bytes."""
        content = (
            packets
            if isinstance(packets, bytes)
            else (packets.encode() if isinstance(packets, str) else json.dumps(packets).encode())
        )
        self.pending.mkdir(parents=True, exist_ok=True)
        temporary = self.pending / (name[:100] + ".tmp")
        temporary.write_bytes(content)
        temporary.replace(self.pending / name)
        (self.pending / (name + ".ready")).touch()
        return content

    def environment(self, **settings: object) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        return {**clean, **FAST, **{key: str(value) for key, value in settings.items()}}

    def load(self, **settings: object) -> ModuleType:
        """This folder's sender.py as a fresh module, as an embedding program would load it."""
        before, environment = dict(os.environ), self.environment(**settings)
        os.environ.clear()
        os.environ.update(environment)
        try:
            spec = importlib.util.spec_from_file_location(f"sender_{next(_numbers)}", self.sender_py)
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(self, *arguments: str, **settings: object) -> subprocess.Popen[str]:
        """sender.py as a process of its own; its console goes to the file console.log (all runs, appended)."""
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows: Ctrl-Break for this process alone
        with open(self.folder / "console.log", "a", encoding="utf-8") as console:
            process = subprocess.Popen(
                [sys.executable, str(self.sender_py), *arguments],
                cwd=self.folder,
                env=self.environment(**settings),
                stdout=subprocess.PIPE,
                stderr=console,
                text=True,
                creationflags=flags,
            )
        self.processes.append(process)
        return process

    def run(self, *arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
        """sender.py to its end, with its output captured (stderr also in .stderr)."""
        return subprocess.run(
            [sys.executable, str(self.sender_py), *arguments],
            cwd=self.folder,
            env=self.environment(**settings),
            capture_output=True,
            encoding="utf-8",
            timeout=100,
        )

    def console(self) -> str:
        path = self.folder / "console.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def tree(self) -> dict[str, int]:
        """Every file under logs/ but the lock and placeholders, with its size: what assertions compare and print."""
        sizes = {}
        for path in sorted(self.logs.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # a sender is at work
                if not path.is_dir() and path.name not in (".sender.lock", ".gitkeep"):
                    sizes[path.relative_to(self.logs).as_posix()] = path.lstat().st_size
        return sizes

    def names(self) -> list[str]:
        return list(self.tree())


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path)
    yield spool
    for process in spool.processes:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, CA bundle or .netrc of this machine gets into a test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power cut happens here, and thousands of fsyncs take their time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What the loaded sender.py has logged so far, from a level upwards: said(logging.WARNING)."""
    caplog.set_level(logging.DEBUG, "sender")
    return lambda level=logging.DEBUG: [
        record.getMessage() for record in caplog.records if record.name == "sender" and record.levelno >= level
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests noted with record_property()."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    figures = [line for report in reports if getattr(report, "when", "") == "call" for line in report.user_properties]
    if figures:
        terminalreporter.section("measured")
        for name, value in figures:
            terminalreporter.write_line(f"{name}: {value}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-points", action="store_true", help="every crash and error point (minutes), not a fixed spread"
    )


@pytest.fixture
def all_points(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--all-points"))


def capture(count: int, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [packet(start + number, **fields) for number in range(count)]


def console_lines(console: str) -> list[str]:
    """The console's lines as "LEVEL - message". Fails on one that has not the form of SPEC section 7: a traceback's."""
    form = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - (?:DEBUG|INFO|WARNING|ERROR) - \S.*")
    odd = [line for line in console.splitlines() if not form.fullmatch(line)]
    assert not odd, f"not log lines: {odd} in\n{console}"
    return [line.split(" - ", 1)[1] for line in console.splitlines()]


@pytest.fixture(scope="session", autouse=True)
def compiled_once() -> Iterator[None]:
    """Tests load hundreds of copies of one sender.py. To compile it once takes a third off their time."""
    loader = importlib.machinery.SourceFileLoader
    compile_anew: Any = loader.source_to_code
    compile_sender = functools.lru_cache(lambda text: compile(text, SENDER, "exec", dont_inherit=True))

    def source_to_code(self: Any, data: bytes, path: str, **options: Any) -> Any:
        return compile_sender(data) if Path(path).name == SENDER.name else compile_anew(self, data, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "source_to_code", source_to_code)
        yield
