"""sender.py as a real process: killed, stopped, started twice, misconfigured, and with every kind of console."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, SETTINGS, Spool, capture, console_lines, packet, wait_until
from ingest_server import IngestServer, split_packets
from servers import Answer, Request, ScriptedServer, reply

pytestmark = pytest.mark.slow

LONG = 600  # seconds: a wait that a test would not survive
SOON = 3.5  # seconds: "about a second" of SPEC section 8 on a busy machine, the process's own end included

if sys.platform == "win32":
    STOP_SIGNALS = [signal.CTRL_BREAK_EVENT]
else:
    STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]


def stop(process: subprocess.Popen[Any], number: int = STOP_SIGNALS[-1]) -> float:
    """Send a stop signal and wait for the end: exit status 0. Returns the seconds it took."""
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == 0
    return time.monotonic() - started


@contextlib.contextmanager
def launched(spool: Spool, *arguments: str, settings: dict[str, object], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """sender.py as a process with a console, a folder or a path of the test's own choice."""
    options: dict[str, Any] = {"cwd": spool.folder, "env": spool.environment(**settings), "encoding": "utf-8", **how}
    if sys.platform == "win32":
        options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    process = subprocess.Popen([sys.executable, str(spool.sender_py), *arguments], **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def everything_under(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def accept(request: Request) -> Answer:
    return None


def keys(server: ScriptedServer) -> list[str]:
    return [request.key for request in server.requests]


def batches(server: ScriptedServer) -> list[list[int]]:
    """The numbers of the packets in each request, in the order of arrival."""
    return [request.numbers for request in server.requests]


def once(count: int) -> Counter[int]:
    """What a server's `stored` is when each packet of capture(count) was stored exactly once."""
    return Counter(range(count))


# ---------------------------------------------------------------- the main job


def test_real_captures_arrive_exactly_as_written_and_only_the_data_files_remain(spool: Spool, tmp_path: Path) -> None:
    contents = {path.name: spool.drop(path.name, path.read_bytes()) for path in sorted(DATA.glob("packets_*.json"))}
    with IngestServer(tmp_path / "ingest.sqlite3") as server:
        sender = spool.start(SERVER_URL=server.url)
        wait_until(lambda: len([*spool.processed.glob("*.json")]) == len(contents), "the drain")
        stop(sender)
    assert {path.name: path.read_bytes() for path in spool.processed.iterdir()} == contents
    assert spool.names() == [f"processed/{name}" for name in contents]
    assert server.packets() == [text for content in contents.values() for text in split_packets(content.decode())]
    assert server.repeats == 0


def test_the_corrupt_real_capture_is_kept_whole_and_told_and_not_a_byte_of_it_is_sent(spool: Spool) -> None:
    (corrupt,) = DATA.glob("corrupt_*.json")
    spool.drop(corrupt.name, corrupt.read_bytes())
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 1, run.stderr
    assert server.requests == []
    assert (spool.failed / corrupt.name).read_bytes() == corrupt.read_bytes(), spool.tree()
    assert re.search(rf"ERROR - .*{re.escape(corrupt.name)} moved to failed_uploads/", run.stderr)


# ---------------------------------------------------------------- killed and restarted


def test_killed_while_a_batch_is_unanswered_it_sends_only_that_batch_again_under_its_old_key(spool: Spool) -> None:
    packets = capture(6)
    content = spool.drop("a.json", packets)

    def kill_at_first_sight(request: Request) -> Answer:
        if keys(server).count(request.key) == 1:
            sender.kill()
            sender.wait()
        return None  # stored, and the sender will never know
        return None

    with ScriptedServer(kill_at_first_sight) as server:
        for _ in packets:
            sender = spool.start(SERVER_URL=server.url, BATCH_SIZE=1)
            wait_until(lambda: sender.poll() is not None, "the kill")  # noqa: B023
            assert (spool.pending / "a.json.taken").read_bytes() == content, spool.tree()
        run = spool.run("--once", SERVER_URL=server.url, BATCH_SIZE=1)
    assert run.returncode == 0, run.stderr
    assert batches(server) == [[number] for number in range(6) for _ in range(2)]
    assert keys(server)[::2] == keys(server)[1::2]
    assert len(set(keys(server))) == 6
    assert server.stored == once(6)
    assert spool.tree() == {"processed/a.json": len(content)}


# ---------------------------------------------------------------- one sender per LOGS_DIR


def test_a_second_sender_exits_1_and_names_the_pid_of_the_first_which_goes_on(spool: Spool) -> None:
    with ScriptedServer() as server:
        first = spool.start(SERVER_URL=server.url)
        spool.drop("a.json", [packet(0)])
        wait_until(lambda: (spool.processed / "a.json").exists(), "the first sender at work")
        second = spool.run(SERVER_URL=server.url)
        assert second.returncode == 1, second.stderr
        (line,) = console_lines(second.stderr)
        assert line.startswith("ERROR - ")
        assert re.search(rf"\b{first.pid}\b", line)
        spool.drop("b.json", [packet(1)])
        wait_until(lambda: (spool.processed / "b.json").exists(), "the first sender still at work")
        stop(first)
    assert server.stored == once(2)


def test_the_lock_dies_with_a_killed_sender(spool: Spool) -> None:
    with ScriptedServer() as server:
        first = spool.start(SERVER_URL=server.url)
        spool.drop("a.json", [packet(1)])
        wait_until(lambda: (spool.processed / "a.json").exists(), "the first sender at work")
        first.kill()
        first.wait()
        spool.drop("b.json", [packet(2)])
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 0, run.stderr
    assert spool.names() == ["processed/a.json", "processed/b.json"]


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_while_idle_ends_it_within_about_a_second_with_status_0(spool: Spool, number: int) -> None:
    with ScriptedServer() as server:
        spool.drop("a.json", [packet(1)])
        sender = spool.start(SERVER_URL=server.url, POLL_INTERVAL=LONG)
        wait_until(lambda: (spool.processed / "a.json").exists(), "the first poll")
        assert stop(sender, number) < SOON
    console_lines(spool.console())


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_in_a_backoff_ends_it_soon_and_keeps_progress(spool: Spool, number: int) -> None:
    content = spool.drop("a.json", capture(6))
    with ScriptedServer(lambda request: None if request.number == 0 else reply(503)) as server:
        sender = spool.start(SERVER_URL=server.url, BATCH_SIZE=2, RETRY_DELAY=LONG)
        wait_until(lambda: "Retrying in" in spool.console(), "the backoff")
        assert stop(sender, number) < SOON
        assert set(spool.names()) == {"pending_upload/a.json.taken", "pending_upload/a.json.state"}
        assert (spool.pending / "a.json.taken").read_bytes() == content
        server.script = accept
        assert spool.run("--once", SERVER_URL=server.url, BATCH_SIZE=2).returncode == 0
    assert batches(server) == [[0, 1], [2, 3], [2, 3], [4, 5]]
    assert spool.names() == ["processed/a.json"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_lets_the_request_finish_and_starts_no_other(spool: Spool, number: int) -> None:
    content = spool.drop("a.json", capture(6))
    answering = threading.Event()

    def hold_the_second(request: Request) -> Answer:
        assert request.number != 1 or answering.wait(60)
        return None

    with ScriptedServer(hold_the_second) as server:
        sender = spool.start(SERVER_URL=server.url, BATCH_SIZE=2)
        wait_until(lambda: len(server.requests) == 2, "the second request")
        sender.send_signal(number)
        threading.Timer(0.3, answering.set).start()  # the signal comes first; either order must do
        assert sender.wait(30) == 0
        assert len(server.requests) == 2
        assert "Stopping when the current request is finished; once more (Ctrl-C) ends it at once" in spool.console()
        assert (spool.pending / "a.json.taken").read_bytes() == content, spool.tree()
        assert spool.run("--once", SERVER_URL=server.url, BATCH_SIZE=2).returncode == 0
    assert batches(server) in ([[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 3], [2, 3], [4, 5]])
    assert server.stored == once(6)
    assert len(set(keys(server))) == 3
    assert spool.names() == ["processed/a.json"]
    console_lines(spool.console())


def test_a_stop_signal_without_an_answer_takes_the_requests_timeout_at_most(
    spool: Spool,
) -> None:
    spool.drop("a.json", capture(2))
    answering = threading.Event()

    def hold(request: Request) -> Answer:
        answering.wait(60)
        return None

    with ScriptedServer(hold) as server:
        sender = spool.start(SERVER_URL=server.url, REQUEST_TIMEOUT=1, RETRY_DELAY=LONG)
        wait_until(lambda: server.requests, "the request")
        assert stop(sender) < 1 + SOON
        answering.set()
    assert len(server.requests) == 1
    assert (spool.pending / "a.json.taken").exists(), spool.tree()


if sys.platform != "win32":

    def test_a_stop_signal_that_arrives_while_it_starts_is_not_lost(spool: Spool) -> None:
        """Right after the handler has been installed is when a supervisor that changed its mind may send it."""
        program = """
import os, runpy, signal, sys
install = signal.signal
def install_and_receive(number, handler):
    before = install(number, handler)
    if number == signal.SIGTERM and callable(handler):
        os.kill(os.getpid(), number)
    return before
signal.signal = install_and_receive
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
        with ScriptedServer() as server:
            command = [sys.executable, "-c", program, str(spool.sender_py)]
            run = subprocess.run(command, env=spool.environment(SERVER_URL=server.url), timeout=15)
        assert run.returncode in (0, -signal.SIGTERM)

    @pytest.mark.parametrize("number", STOP_SIGNALS)
    def test_a_second_stop_signal_ends_it_at_once_without_loss(spool: Spool, number: int) -> None:
        spool.drop("a.json", capture(4))
        answering = threading.Event()

        def hold_the_second(request: Request) -> Answer:
            if request.number == 1:
                answering.wait(60)
            return None

        def press_again() -> bool:
            sender.send_signal(number)
            return sender.poll() is not None

        with ScriptedServer(hold_the_second) as server:
            sender = spool.start(SERVER_URL=server.url, BATCH_SIZE=2, REQUEST_TIMEOUT=LONG)
            wait_until(lambda: len(server.requests) == 2, "the second request")
            sender.send_signal(number)
            wait_until(press_again, "the end at a further Ctrl-C", limit=10)
            assert sender.returncode != 0
            answering.set()
            assert spool.run("--once", SERVER_URL=server.url, BATCH_SIZE=2).returncode == 0
        assert batches(server) == [[0, 1], [2, 3], [2, 3]]
        assert keys(server)[1] == keys(server)[2]
        assert server.stored == once(4)
        assert spool.names() == ["processed/a.json"]


# ---------------------------------------------------------------- --once, --help, --version


def test_once_sweeps_and_drains_and_exits_0_when_nothing_is_left(spool: Spool) -> None:
    spool.drop("b.json", [packet(1)])
    spool.failed.mkdir(parents=True)
    (spool.failed / "a.json").write_bytes(json.dumps([packet(0)]).encode())
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url, RETRY_FAILED_INTERVAL=LONG)
    assert run.returncode == 0, run.stderr
    assert server.stored == once(2)
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_once_with_nothing_to_do_exits_0(spool: Spool) -> None:
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 0, run.stderr
    assert server.requests == []


@pytest.mark.parametrize("status", [503, 401])
def test_once_exits_1_when_a_file_is_left(spool: Spool, status: int) -> None:
    content = spool.drop("a.json", [packet(1)])
    with ScriptedServer(lambda request: reply(status)) as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 1, run.stderr
    assert (spool.failed / "a.json").read_bytes() == content, spool.tree()


def test_json_without_status_exits_2_and_starts_nothing(spool: Spool) -> None:
    run = spool.run("--json")
    assert (run.returncode, spool.tree()) == (2, {})
    assert "--json goes with --status" in run.stderr


def test_help_shows_each_setting_with_its_value_in_force_and_hides_the_token(spool: Spool) -> None:
    run = spool.run("--help", API_TOKEN="s3cret-token", BATCH_SIZE=7, SERVER_URL="http://u:pa55word@127.0.0.1/x")
    shown = dict(
        line.split(maxsplit=1) for line in run.stdout.partition("settings in force")[2].splitlines()[1:] if line
    )
    assert shown.keys() == set(SETTINGS)
    assert (shown["BATCH_SIZE"], shown["API_TOKEN"], shown["SERVER_URL"]) == ("7", "***", "http://127.0.0.1/x")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_print_to_standard_output_and_touch_nothing(spool: Spool, option: str) -> None:
    before = everything_under(spool.folder)
    run = spool.run(option)
    assert (run.returncode, run.stderr) == (0, "")
    told = ["--once", "--status", "--help", "--version"] if option == "--help" else [r"\d+\.\d+"]
    assert all(re.search(word, run.stdout) for word in told), run.stdout
    assert everything_under(spool.folder) == before


def test_an_unknown_option_exits_2_and_touches_nothing(spool: Spool) -> None:
    before = everything_under(spool.folder)
    run = spool.run("--wonce")
    assert run.returncode == 2
    assert "--wonce" in run.stderr
    assert everything_under(spool.folder) == before


# ---------------------------------------------------------------- consoles


@pytest.mark.parametrize("both", [False, True], ids=["2|", "2>&1|"])
def test_a_console_whose_reader_goes_away_stops_no_upload_and_no_orderly_end(spool: Spool, both: bool) -> None:
    reading, writing = os.pipe()
    with ScriptedServer() as server:
        output = writing if both else subprocess.DEVNULL
        with launched(spool, settings={"SERVER_URL": server.url}, stdout=output, stderr=writing) as sender:
            os.close(writing)
            with open(reading, encoding="utf-8") as console:  # as `| head -1` does
                assert console.readline()
            for number in range(3):
                spool.drop(f"{number}.json", [packet(number)])
                wait_until(lambda: (spool.processed / f"{number}.json").exists(), "an upload")  # noqa: B023
            stop(sender)
    assert server.stored == once(3)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252:strict"])
def test_a_console_without_a_check_mark_gets_its_lines_and_stops_no_upload(spool: Spool, encoding: str) -> None:
    spool.drop("a.json", capture(3))
    spool.drop("b.json", "[")
    with ScriptedServer() as server:
        environment = spool.environment(SERVER_URL=server.url, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        command = [sys.executable, str(spool.sender_py), "--once"]
        run = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    console = run.stderr.decode("utf-8")  # where it is no terminal, whatever the code page
    assert "✓" in console
    assert run.returncode == 1, console
    assert re.search("Successfully uploaded 3 packets", console), console
    assert re.search("a.json processed successfully", console), console
    assert re.search("b.json moved to failed_uploads/", console), console
    console_lines(console)
    assert server.stored == once(3)


if sys.platform != "win32":

    @pytest.mark.parametrize("closing", ["2>&-", "0<&- 1>&- 2>&-"])
    def test_without_any_console_it_uploads_and_harms_no_file(spool: Spool, closing: str) -> None:
        content = spool.drop("a.json", capture(3))
        spool.drop("b.json", "[")
        with ScriptedServer() as server:
            command = ["sh", "-c", f'exec "$0" "$@" {closing}', sys.executable, str(spool.sender_py), "--once"]
            run = subprocess.run(command, env=spool.environment(SERVER_URL=server.url, BATCH_SIZE=2), timeout=60)
        assert run.returncode == 1
        assert server.stored == once(3)
        assert (spool.processed / "a.json").read_bytes() == content
        assert (spool.failed / "b.json").read_bytes() == b"["
        assert not any("INFO" in path.read_text() for path in spool.logs.rglob("*") if path.is_file())

    @pytest.mark.parametrize(("arguments", "exit_status"), [([], 0), (["--once"], 0), (["--once"], 2)])
    def test_a_stalled_console_stops_neither_upload_nor_end(
        spool: Spool, arguments: list[str], exit_status: int
    ) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x")
        os.set_blocking(write, True)
        spool.drop("a.json", capture(3))
        with ScriptedServer() as server:
            settings = {"SERVER_URL": server.url, "BATCH_SIZE": 0 if exit_status else 1, "LOG_LEVEL": "DEBUG"}
            command = [sys.executable, str(spool.sender_py), *arguments]
            process = subprocess.Popen(command, env=spool.environment(**settings), stderr=write, text=True)
            spool.processes.append(process)
            if not exit_status:
                wait_until((spool.processed / "a.json").exists, "the upload")
            if not arguments:
                process.terminate()
            assert process.wait(30) == exit_status
        os.close(read)
        os.close(write)

    def test_lines_that_a_stalled_console_has_no_room_for_are_counted_and_that_is_said_later(spool: Spool) -> None:
        sender, lines = spool.load(), queue.Queue[logging.LogRecord](2)
        handler = sender._QueueHandler(lines)
        for number in range(5):
            handler.handle(logging.makeLogRecord({"msg": str(number)}))
        shown = [lines.get().getMessage() for _ in range(2)]
        handler.handle(logging.makeLogRecord({"msg": "5"}))
        assert [*shown, *(lines.get().getMessage() for _ in range(2))] == [
            "0", "1", "the console stalled: 3 lines not shown", "5"
        ]  # fmt: skip

    def test_a_bad_setting_without_any_console_still_exits_2(spool: Spool) -> None:
        command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, str(spool.sender_py)]
        assert subprocess.run(command, env=spool.environment(BATCH_SIZE=0), timeout=60).returncode == 2


# ---------------------------------------------------------------- settings

SECONDS = ["soon", "-1", "nan", "inf", "-inf", "1e400", "1,5", "0x10", "9" * 400, "5 s"]
WHOLE = ["three", "-1", "nan", "inf", "0", "1e3", "2.5", "9" * 5000, "1,000", "0x10"]
WRONG: dict[str, list[str]] = {
    "SERVER_URL": [
        "nonsense",
        "http://",
        "ftp://127.0.0.1/ingest",
        "http://127.0.0.1:70000/ingest",
        "http://127.0.0.1:port/ingest",
        "http://a..example/ingest",  # no name has an empty label: the look-up raises UnicodeError
        "http://\N{LATIN SMALL LETTER U WITH DIAERESIS}" + "x" * 70 + ".example/",
        "http://[::1/ingest",
        "http:///ingest",
        "http://[fe80::1%25eth0]:8000/ingest",  # a zone: libraries spell it differently
        "127.0.0.1:8000/ingest",
    ],
    "API_TOKEN": ["to\nken", "to\r\nX-Evil: 1"],
    "POLL_INTERVAL": [*SECONDS, "0"],
    "MAX_RETRIES": WHOLE,
    "RETRY_DELAY": SECONDS,
    "BATCH_SIZE": WHOLE,
    "REQUEST_TIMEOUT": [*SECONDS, "0"],
    "RETRY_FAILED_INTERVAL": SECONDS,
    "COMPRESS": ["zip", "1", "gzip,br", "nan", "-", "gz ip"],
    "KEEP_PROCESSED_DAYS": SECONDS,
    "LOG_LEVEL": ["LOUD", "10", "nan", "-1", "INFO,DEBUG", "TRACE"],
}
ALLOWED = {
    "SERVER_URL": "http.*host",
    "API_TOKEN": "ASCII|printable",
    "MAX_RETRIES": "whole number",
    "BATCH_SIZE": "whole number",
    "COMPRESS": "gzip.*none|none.*gzip",
    "LOG_LEVEL": "DEBUG.*INFO.*WARNING.*ERROR",
}
ROUNDS = [
    {name: value for name, value in zip(WRONG, values) if value is not None}
    for values in itertools.zip_longest(*WRONG.values())
]


def test_the_table_of_wrong_settings_knows_every_setting() -> None:
    assert sorted([*WRONG, "LOGS_DIR"]) == sorted(SETTINGS)


@pytest.mark.parametrize("mistakes", ROUNDS, ids=range(len(ROUNDS)))
def test_each_bad_setting_is_one_line_and_nothing_is_touched(spool: Spool, mistakes: dict[str, str]) -> None:
    before = everything_under(spool.folder)
    run = spool.run("--once", **mistakes)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert everything_under(spool.folder) == before
    lines = run.stderr.splitlines()
    assert len(lines) == len(mistakes), run.stderr
    for name, value in mistakes.items():
        (line,) = (line for line in lines if name in line)
        assert name == "API_TOKEN" or len(value) > 100 or value in line, line
        assert re.search(ALLOWED.get(name, "number"), line.partition(value)[2] or line), line


def test_every_line_about_a_bad_setting_has_the_form_of_a_log_line(spool: Spool) -> None:
    run = spool.run(BATCH_SIZE="many", POLL_INTERVAL="soon", LOG_LEVEL="LOUD")
    lines = console_lines(run.stderr)
    assert [line.split(" - ")[0] for line in lines] == ["ERROR"] * 3


def test_the_home_of_somebody_unknown_is_a_bad_logs_dir_like_any_other_bad_setting(spool: Spool) -> None:
    run = spool.run("--once", LOGS_DIR="~no-such-user-here/logs")
    assert run.returncode == 2, run.stderr
    (line,) = console_lines(run.stderr)
    assert "LOGS_DIR" in line
    assert "~no-such-user-here/logs" in line


def test_the_lines_about_bad_settings_hide_tokens_and_passwords(spool: Spool) -> None:
    for settings in (
        {"SERVER_URL": "ftp://user:hunter2@127.0.0.1/ingest?key=hunter2", "API_TOKEN": "swordfish"},
        {"SERVER_URL": "user:hunter2@127.0.0.1/ingest", "API_TOKEN": "sword\nfish"},
    ):
        run = spool.run(**settings)
        assert run.returncode == 2, run.stderr
        assert "SERVER_URL" in run.stderr
        assert "hunter2" not in run.stderr
        assert "sword" not in run.stderr
        assert "fish" not in run.stderr


def test_an_empty_setting_is_its_default(spool: Spool) -> None:
    spool.drop("a.json", capture(3))
    with ScriptedServer() as server:
        run = spool.run("--once", **{**dict.fromkeys(SETTINGS, ""), "SERVER_URL": server.url})
    assert run.returncode == 0, run.stderr
    assert server.sizes == [3]
    assert "authorization" not in server.requests[0].headers
    assert spool.names() == ["processed/a.json"]


def test_a_dotenv_beside_the_program_is_read_and_the_environment_wins(spool: Spool) -> None:
    spool.drop("a.json", capture(4))
    with ScriptedServer() as server:
        dotenv = f"# comment\n\nSERVER_URL={server.url}\nexport API_TOKEN='from file'\nBATCH_SIZE=1\nLOG_LEVEL=\n"
        (spool.folder / ".env").write_text(dotenv)
        run = spool.run("--once", BATCH_SIZE=2)
    assert run.returncode == 0, run.stderr
    assert server.sizes == [2, 2]
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer from file"}


@pytest.mark.parametrize("layout", ["{}", "\ufeff{}\r\n"], ids=ascii)
def test_a_dotenv_as_windows_editors_write_it_is_read(spool: Spool, layout: str) -> None:
    spool.drop("a.json", capture(3))
    (spool.folder / ".env").write_bytes(layout.format("BATCH_SIZE=2").encode())
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 0, run.stderr
    assert server.sizes == [2, 1]


DOTENVS = {
    "UTF-16": "BATCH_SIZE=2\n".encode("utf-16"),
    "UTF-16 behind ASCII": b"BATCH_SIZE=2\n" + "API_TOKEN=x\n".encode("utf-16-le"),  # PowerShell 5: ... >> .env
    "binary": b"BATCH_SIZE=\xff\xfe\n",
}


@pytest.mark.parametrize("kind", [*DOTENVS, "a directory"])
def test_a_dotenv_that_cannot_be_read_is_one_clear_line_and_nothing_is_touched(spool: Spool, kind: str) -> None:
    dotenv = spool.folder / ".env"
    if kind == "a directory":
        dotenv.mkdir()
    else:
        dotenv.write_bytes(DOTENVS[kind])
    before = everything_under(spool.folder)
    run = spool.run("--once")
    assert run.returncode == 2, run.stderr
    (line,) = console_lines(run.stderr)
    assert line.startswith("ERROR - ")
    assert ".env" in line
    assert everything_under(spool.folder) == before


def test_a_dotenv_line_that_is_no_setting_is_told_in_the_form_of_a_log_line(spool: Spool) -> None:
    (spool.folder / ".env").write_text("BATCH_SIZE 2\n")
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert any(".env" in line for line in console_lines(run.stderr)), run.stderr


def test_a_name_in_a_dotenv_that_nearly_is_a_setting_is_a_warning_with_the_right_one(spool: Spool) -> None:
    (spool.folder / ".env").write_text("SERVER_ULR=http://127.0.0.1:9/\nPATH_TO_MY_SNIFFER=x\n")
    with ScriptedServer() as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
    assert [line for line in lines if not line.startswith("INFO")] == [
        "WARNING - .env: SERVER_ULR is no setting and is ignored; SERVER_URL is"
    ]


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("value", ["%USERPROFILE%/logs", "C:\temp\new"])  # the latter with a tab and a newline in it
def test_a_misspelt_windows_folder_is_one_line_and_makes_nothing(spool: Spool, value: str) -> None:
    run = spool.run("--once", LOGS_DIR=value)
    (line,) = console_lines(run.stderr)
    assert (run.returncode, "LOGS_DIR=" in line, spool.tree()) == (2, True, {})


@pytest.mark.parametrize("where", ["a file", "below a file", "a name too long"])
def test_an_unusable_logs_dir_is_one_line_and_no_traceback(spool: Spool, where: str) -> None:
    occupied = spool.folder / "occupied"
    occupied.write_text("mine")
    logs = {"a file": occupied, "below a file": occupied / "logs"}.get(where, spool.folder / ("x" * 300))
    run = spool.run("--once", LOGS_DIR=logs)
    assert run.returncode == (1 if where == "below a file" else 2), run.stderr
    (line,) = console_lines(run.stderr)
    assert line.startswith("ERROR - ")
    assert str(logs) in line
    assert occupied.read_text() == "mine"


@pytest.mark.parametrize("name", ["pending_upload", "failed_uploads", "processed"])
def test_a_file_in_the_place_of_a_folder_is_told_without_a_traceback_and_is_left_alone(spool: Spool, name: str) -> None:
    spool.logs.mkdir()
    (spool.logs / name).write_text("mine")
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url)
    lines = console_lines(run.stderr)
    assert [line for line in lines if line.startswith("ERROR - ") and name in line], run.stderr
    assert (spool.logs / name).read_text() == "mine"


def test_it_works_from_any_directory_and_takes_no_dotenv_from_there(spool: Spool, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / ".env").write_text("BATCH_SIZE=0\n")
    spool.drop("a.json", [packet(1)])
    with ScriptedServer() as server:
        program = os.path.relpath(spool.sender_py, elsewhere)
        command = [sys.executable, program, "--once"]
        run = subprocess.run(command, cwd=elsewhere, env=spool.environment(SERVER_URL=server.url), timeout=60)
    assert run.returncode == 0
    assert spool.names() == ["processed/a.json"]
    assert os.listdir(elsewhere) == [".env"]


def test_with_logs_elsewhere_it_writes_nothing_beside_itself(spool: Spool, tmp_path_factory: Any) -> None:
    spool.logs = tmp_path_factory.mktemp("spool") / "deep" / "logs"
    spool.pending, spool.processed = spool.logs / "pending_upload", spool.logs / "processed"
    spool.drop("a.json", capture(3))
    before = everything_under(spool.folder)
    spool.folder.chmod(0o555)
    try:
        with ScriptedServer() as server:
            run = spool.run("--once", SERVER_URL=server.url, LOGS_DIR=spool.logs, BATCH_SIZE=2)
    finally:
        spool.folder.chmod(0o755)
    assert run.returncode == 0, run.stderr
    assert everything_under(spool.folder) == before
    assert spool.names() == ["processed/a.json"]


@pytest.mark.parametrize("name", ["pending_upload", "failed_uploads"])
def test_once_exits_1_where_it_cannot_tell_what_is_left(spool: Spool, tmp_path: Path, name: str) -> None:
    spool.logs.mkdir()
    (spool.logs / name).write_text("a file in the folder's place")
    with IngestServer(tmp_path / "db") as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 1, run.stderr
