"""What the console says (SPEC section 7), read as its reader does, and what `--status` says (section 8)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Spool, capture, console_lines, packet, wait_until
from ingest_server import IngestServer
from servers import Answer, Request, ScriptedServer, reply

pytestmark = pytest.mark.slow

LONG = 600  # seconds: a wait that a test would not survive
HOUR, DAY = 3600, 86400  # seconds


FOLDERS = ("pending_upload", "failed_uploads", "processed")


def refuse_poison(request: Request) -> Answer:
    return reply(422) if any(packet.get("poison") for packet in request.packets) else None


def greet(request: Request) -> Answer:
    """The answer to the question of --status whether anybody is there."""
    return reply(200) if request.line.startswith("GET ") else None


def one(lines: list[str], pattern: str) -> str:
    """The only line in which the pattern occurs."""
    found = [line for line in lines if re.search(pattern, line)]
    assert len(found) == 1, f"{len(found)} lines with {pattern!r} in\n" + "\n".join(lines)
    return found[0]


def count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


# ---------------------------------------------------------------- the life of one file, line by line


def test_a_success_is_told_in_the_words_of_the_documentation(spool: Spool) -> None:
    spool.drop("a.json", capture(150))
    with ScriptedServer() as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
    assert "a.json" in one(lines, r"^INFO - .*✓ Successfully uploaded 150 packets\b")
    one(lines, r"^INFO - ✓ a\.json processed successfully \(150 packets\)")
    assert count(lines, "^(WARNING|ERROR)") == 0


def test_a_file_of_many_batches_shows_how_far_it_got(spool: Spool) -> None:
    spool.drop("a.json", capture(20_000))
    with ScriptedServer() as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
    for done in range(1000, 20_001, 1000):
        assert "a.json" in one(lines, rf"\b{done:,}/20,000 packets")
    assert count(lines, "a.json") <= 2 * 20 + 2


def test_an_unreachable_server_is_told_with_its_address_and_the_attempt(spool: Spool) -> None:
    spool.drop("a.json", capture(3))
    with ScriptedServer(listening=False) as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
        for attempt in (1, 2, 3):
            line = one(lines, rf"Cannot connect to server .*\(attempt {attempt}/3\)")
            assert line.startswith("WARNING - ")
            assert "a.json" in line
            assert f"127.0.0.1:{server.port}" in line
    assert one(lines, r"✗ a\.json moved to failed_uploads/").startswith("WARNING - ")


def test_a_silent_server_is_told_as_a_time_out(spool: Spool) -> None:
    spool.drop("a.json", capture(3))
    ending = threading.Event()

    def say_nothing(request: Request) -> Answer:
        ending.wait(60)
        return None

    with ScriptedServer(say_nothing) as server:
        run = spool.run("--once", SERVER_URL=server.url, MAX_RETRIES=1, REQUEST_TIMEOUT=0.2)
        ending.set()
    lines = console_lines(run.stderr)
    assert count(lines, r"^WARNING - .*a\.json.*Request timed out") >= 1, run.stderr
    one(lines, r"✗ a\.json moved to failed_uploads/")


def test_a_server_error_is_told_with_its_status_and_the_delay_that_follows(spool: Spool) -> None:
    spool.drop("a.json", capture(3))
    with ScriptedServer(lambda request: reply(503, "down for maintenance")) as server:
        sender = spool.start(SERVER_URL=server.url, RETRY_DELAY=5)
        wait_until(lambda: re.search(r" - INFO - .*Retrying in 5 seconds\.\.\.", spool.console()), "the announcement")
        sender.kill()
        sender.wait()
    line = one(console_lines(spool.console()), r"Server error: 503 ")
    assert line.startswith("WARNING - ")
    assert "a.json" in line
    assert "(attempt 1/3)" in line
    assert "down for maintenance" in line


def test_a_refusal_is_an_error_that_says_what_to_mend(spool: Spool) -> None:
    mended_by = {401: "API_TOKEN", 403: "API_TOKEN", 404: "SERVER_URL", 405: "SERVER_URL", 302: "SERVER_URL"}
    for status in mended_by:
        spool.drop(f"for{status}.json", [packet(status)])
    script = lambda request: reply(request.numbers[0], "", "Location: https://login.example/")  # noqa: E731
    with ScriptedServer(script) as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
    for status, words in mended_by.items():
        refusals = [line for line in lines if re.search(rf"^ERROR - .*for{status}\.json.* {status} ", line)]
        assert refusals, lines
        assert all(words in line for line in refusals)
        assert status != 302 or "https://login.example/" in refusals[0]


def test_a_file_that_has_just_failed_is_left_to_a_later_sweep_and_not_tried_again_at_once(spool: Spool) -> None:
    spool.drop("a.json", capture(3))
    with ScriptedServer(lambda request: reply(401)) as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert len(server.requests) == 1, run.stderr


def test_a_bad_file_is_an_error_with_reason_and_place_and_a_sweep_costs_it_no_further_line(spool: Spool) -> None:
    spool.drop("bad.json", json.dumps(capture(2))[:-1] + ", 7]")
    with ScriptedServer() as server:
        sender = spool.start(SERVER_URL=server.url, RETRY_FAILED_INTERVAL=0.05)
        wait_until(lambda: (spool.failed / "bad.json").exists(), "the refusal")
        for number in range(3):  # so that polls and sweeps have passed
            spool.drop(f"{number}.json", capture(1))
            wait_until(lambda: (spool.processed / f"{number}.json").exists(), "an upload")  # noqa: B023
        sender.kill()
        sender.wait()
    lines = console_lines(spool.console())
    line = one(lines, "bad.json")
    assert line.startswith("ERROR - ✗ bad.json moved to failed_uploads/")
    assert re.search(r"object.*\b3\b", line)


def test_a_sweep_is_announced_with_the_number_of_files(spool: Spool) -> None:
    spool.failed.mkdir(parents=True)
    for number in range(4):
        (spool.failed / f"{number}.json").write_text(json.dumps([packet(number)]))
    with ScriptedServer() as server:
        lines = console_lines(spool.run("--once", SERVER_URL=server.url).stderr)
    assert one(lines, "Retrying") == "INFO - Retrying 4 failed uploads..."
    assert count(lines, r"✓ \d\.json processed successfully \(1 packets?\)") == 4


def test_every_line_of_a_files_life_names_the_file(spool: Spool) -> None:
    spool.drop("a.json", capture(4))
    with ScriptedServer(lambda request: reply(503) if request.number in (1, 2, 3) else None) as server:
        run = spool.run("--once", SERVER_URL=server.url, BATCH_SIZE=2)
    lines = console_lines(run.stderr)
    first, *_, last = (number for number, line in enumerate(lines) if "a.json" in line)
    nameless = [line for line in lines[first:last] if "a.json" not in line]
    about_all = r"Retrying \d+ failed uploads|\b(back|again) after\b"
    assert [line for line in nameless if not re.search(about_all, line)] == [], run.stderr


def test_a_line_tells_which_copy_was_kept_where_a_name_came_twice(spool: Spool) -> None:
    with ScriptedServer() as server:
        for _ in range(2):
            spool.drop("a.json", capture(2))
            run = spool.run("--once", SERVER_URL=server.url)
    assert spool.names() == ["processed/a.1.json", "processed/a.json"]
    one(console_lines(run.stderr), r"✓ a\.json processed successfully.*a\.1\.json")


# ---------------------------------------------------------------- quiet where nothing happens


def test_idle_polls_are_silent(spool: Spool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = 0
    scandir = os.scandir

    def counted(path: str = ".") -> object:
        nonlocal scans
        scans += str(path) == str(spool.pending)
        return scandir(path)

    caplog.set_level(logging.DEBUG)
    module = spool.load(POLL_INTERVAL=0.001, LOG_LEVEL="DEBUG")
    monkeypatch.setattr(os, "scandir", counted)
    thread = threading.Thread(target=module.monitor_and_upload, daemon=True)
    thread.start()
    wait_until(lambda: scans > 3, "the first polls")
    told = len(caplog.records)
    wait_until(lambda: scans > 100, "a hundred polls")
    assert caplog.records[told:] == []
    module.stop_sender()
    thread.join(60)


def test_lasting_trouble_in_the_folders_is_told_once_and_not_at_every_poll(spool: Spool) -> None:
    for folder in (spool.pending, spool.failed):
        (folder / "folder.json").mkdir(parents=True)
        (folder / "folder.json.ready").touch()
    (spool.failed / "folder.json.ready").unlink()
    with ScriptedServer() as server:
        sender = spool.start(SERVER_URL=server.url, RETRY_FAILED_INTERVAL=0.01, POLL_INTERVAL=0.01)
        for number in range(5):  # so that many polls and sweeps have passed
            spool.drop(f"{number}.json", capture(1))
            wait_until(lambda: (spool.processed / f"{number}.json").exists(), "an upload")  # noqa: B023
        sender.kill()
        sender.wait()
    lines = console_lines(spool.console())
    assert 1 <= count(lines, r"^ERROR - .*folder\.json") <= 2, "\n".join(lines)
    assert count(lines, r"folder\.json") <= 2, "\n".join(lines)


# ---------------------------------------------------------------- an outage, told as a story


def test_an_outage_ends_with_how_long_the_server_was_away_and_how_many_files_are_waiting(spool: Spool) -> None:
    with ScriptedServer(listening=False) as server:
        sender = spool.start(SERVER_URL=server.url, MAX_RETRIES=2, RETRY_FAILED_INTERVAL=LONG)
        for number in range(6):
            spool.drop(f"{number}.json", [packet(number)])
            wait_until(lambda: (spool.failed / f"{number}.json").exists(), "a failure")  # noqa: B023
        server.listen()
        spool.drop("new.json", [packet(6)])
        wait_until(lambda: len([*spool.processed.glob("*.json")]) == 7, "the recovery")
        sender.kill()
        sender.wait()
    lines = console_lines(spool.console())
    back = one(lines, r"^INFO - .*\b(again|back)\b")
    assert re.search(r"after \d+:\d\d:\d\d;", back), back
    assert re.search(r"waiting\D*[67]\b|\b[67]\b[^.]*waiting", back), back
    for number in range(1, 6):
        assert count(lines, rf"\b{number}\.json.*Cannot connect to server .*\(attempt") == 2
    one(lines, r"Retrying 6 failed uploads\.\.\.")
    assert server.requests[0].numbers == [6]
    assert server.stored == Counter(range(7))


def test_an_outage_costs_each_new_file_a_few_lines_and_each_sweep_a_few_however_many_files_wait(spool: Spool) -> None:
    names = [f"{number:02}.json" for number in range(30)]
    sweeps = 4
    with ScriptedServer(listening=False) as server:
        sender = spool.start(SERVER_URL=server.url, RETRY_DELAY=0, RETRY_FAILED_INTERVAL=LONG)
        for name in names:
            spool.drop(name, capture(1))
        wait_until(lambda: len([*spool.failed.glob("*.json")]) == len(names), "the failures")
        sender.kill()
        sender.wait()
        lines = console_lines(spool.console())
        assert max(count(lines, re.escape(name)) for name in names[1:]) <= 3 + 2 + 1, "\n".join(lines)
        assert len(lines) <= 7 * len(names) + 5
        (spool.folder / "console.log").unlink()
        sender = spool.start(SERVER_URL=server.url, RETRY_DELAY=0, RETRY_FAILED_INTERVAL=0.1)
        wait_until(lambda: spool.console().count("Retrying 30 failed uploads...") > sweeps, "several sweeps")
        sender.kill()
        sender.wait()
    lines = console_lines(spool.console())
    announced = [number for number, line in enumerate(lines) if "Retrying 30 failed" in line]
    assert max(later - earlier for earlier, later in zip(announced, announced[1:])) <= 6, "\n".join(lines)


# ---------------------------------------------------------------- what never appears


def everything_said(spool: Spool, run: subprocess.CompletedProcess[str]) -> str:
    """Console, state files and --status: all that this program writes for people."""
    states = [path.read_text() for path in spool.logs.rglob("*.state")]
    return "\n".join([run.stderr, run.stdout, spool.console(), *states])


def test_packet_contents_never_appear_whatever_is_wrong_with_a_file(spool: Spool) -> None:
    broken = ["{}", "[{}", "[{}, 7]", "[{}] junk", "[{}, NaN]", "[{}}}]", "[{}\0]", "[{}\udcff]", '[{"Kronjuwelen}]']
    for number, text in enumerate(broken):
        text = text.replace("{}", json.dumps(packet(1, payload="Kronjuwelen")))
        spool.drop(f"bad{number}.json", text.encode(errors="surrogateescape"))
    spool.drop("good.json", [packet(1, payload="Kronjuwelen")])
    with ScriptedServer() as server:
        run = spool.run("--once", SERVER_URL=server.url, LOG_LEVEL="DEBUG")
    assert count(console_lines(run.stderr), r"^ERROR - ✗ bad\d\.json moved to failed_uploads/") == len(broken)
    assert "Kronjuwelen" not in everything_said(spool, run)


SECRETS = ["sword fish", "sword%20fish", "Kronjuwel", "s3kr1t"]


HOSTILE = "\x1b[2J\x1b]0;x\x07\r\n2026-11-23 10:20:00,123 - INFO - ✓ forged.json processed\x9b1m\u202e\u2028\x85\x00end"


def test_no_control_character_of_a_servers_words_reaches_the_console(spool: Spool) -> None:
    def hostile(request: Request) -> Answer:
        words = reply(request.numbers[0], HOSTILE, "Location: http://x/\x1b[2J\x9b1m", "Retry-After: \x1b[2J")
        return words[:13] + b"Oh\x1b[2J no\x9b\r\n" + words.partition(b"\r\n")[2]

    for status in (200, 302, 400, 401, 413, 500, 503):
        spool.drop(f"for{status}.json", [packet(status), packet(status)])
    with ScriptedServer(hostile, early=greet) as server:
        run = spool.run("--once", SERVER_URL=server.url, MAX_RETRIES=1)
        told = spool.run("--status", SERVER_URL=server.url)
    lines = console_lines(run.stderr)
    for status in (302, 400, 401, 413, 500, 503):
        assert count(lines, rf"for{status}\.json.*\b{status}\b") >= 1, run.stderr
    assert count(lines, "^INFO - ✓ forged") == 0
    assert all(line.isprintable() for line in [*lines, *told.stdout.split("\n")]), (run.stderr, told.stdout)
    assert max(map(len, lines)) < 500


if sys.platform != "win32":
    NAMES = [
        "with space.json",
        "%s%d%(name)s.json",
        "new\nline.json",
        "\x1b[31mred\x1b[0m.json",
        "quote'\"`$(touch x).json",
        "\N{RIGHT-TO-LEFT OVERRIDE}nosj.json",
        "\x9b31m.json",
        "undecodable\udcff.json",
        "\N{SNOWMAN}\N{GRINNING FACE}.json",
        "x" * 240 + ".json",
        *("two\nlines.json", "cr\rlf\r\n.json", "tab\t.json", "\u2028.json", "\x7f\x9b.json"),
        *("*?<>|:.json", "x: y\r\nInjected-Header: z.json", "n" * 244 + ".json", "é" * 122 + ".json"),
        "2026-11-23 10:20:00,123 - ERROR - forged\n2026-11-23 10:20:00,123 - INFO - x.json",
    ]
    if sys.platform == "linux":  # macOS has names in UTF-8 only
        NAMES += map(os.fsdecode, (b"\xff\xfe.json", b"caf\xe9 \xed\xa0\x80.json", b"\x80" * 244 + b".json"))

    @pytest.mark.parametrize("status", [200, 503])
    def test_file_names_are_data_on_disk_and_harmless_on_the_console(spool: Spool, status: int) -> None:
        for name in NAMES:
            spool.drop(name, capture(1))
        with ScriptedServer(lambda request: reply(status), early=greet) as server:
            run = spool.run("--once", SERVER_URL=server.url, MAX_RETRIES=1)
            told = spool.run("--status", SERVER_URL=server.url)
        folder = spool.processed if status == 200 else spool.failed
        assert {path.name for path in folder.glob("*.json")} == set(NAMES), spool.tree()
        lines = console_lines(run.stderr)
        assert "Traceback" not in told.stderr
        assert all(line.isprintable() for line in [*lines, *told.stdout.split("\n")]), (run.stderr, told.stdout)
        assert count(lines, "line.json") >= 2
        assert count(lines, re.escape("%s%d%(name)s.json")) >= 2


# ---------------------------------------------------------------- --status


@contextlib.contextmanager
def running(spool: Spool, url: str) -> Iterator[subprocess.Popen[str]]:
    """A sender that has just uploaded warm-up.json, so that it is known to be at work."""
    sender = spool.start(SERVER_URL=url)
    spool.drop("warm-up.json", capture(1))
    wait_until(lambda: (spool.processed / "warm-up.json").exists(), "the sender at work")
    yield sender
    sender.kill()
    sender.wait()


def status(spool: Spool, exit_status: int | None = None, **settings: object) -> str:
    """The output of --status, which is narrow, free of errors and in good English."""
    run = spool.run("--status", **settings)
    assert run.stderr == ""
    assert exit_status is None or run.returncode == exit_status, run.stdout
    wide = [line for line in run.stdout.splitlines() if len(line) > 80]
    assert not wide, f"wider than 80 columns: {wide}"
    nouns = "file|byte|second|minute|hour|day|week|packet|upload|failure|marker"
    assert not re.search(rf"(?<![\d.,])1 ({nouns})s\b", run.stdout), run.stdout
    assert not re.search(rf"(?<![\d.,])([02-9]|\d[\d,]*\d) ({nouns})\b", run.stdout), run.stdout
    return run.stdout


def about(output: str, words: str) -> str:
    """The first line with these words, and the one after it where the output puts figures there."""
    lines = output.splitlines()
    found = [number for number, line in enumerate(lines) if re.search(words, line, re.IGNORECASE)]
    assert found, f"no {words!r} in\n{output}"
    return "\n".join(lines[found[0] : found[0] + 2])


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """All that changes when something is written, renamed or made again."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        state = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (state.st_mtime_ns, state.st_ctime_ns, state.st_ino, content)
    return found


def test_status_of_a_running_sender_with_nothing_amiss_exits_0_and_names_its_pid(spool: Spool) -> None:
    with ScriptedServer(early=greet) as server, running(spool, server.url) as sender:
        output = status(spool, 0, SERVER_URL=server.url)
    assert re.search(r"(?<!not )\brunning\b", output), output
    assert re.search(rf"\b{sender.pid}\b", output), output
    assert re.search(r"(?<!not )(?<!un)\breachable\b", output), output
    assert f"127.0.0.1:{server.port}" in output


def test_status_after_a_kill_says_not_running(spool: Spool) -> None:
    with ScriptedServer(early=greet) as server:
        with running(spool, server.url) as sender:
            pass
        output = status(spool, 1, SERVER_URL=server.url)
    assert "not running" in output
    assert not re.search(rf"\b{sender.pid}\b", output)


def test_status_of_a_server_that_is_away_says_so_with_the_reason_and_exits_1(spool: Spool, tmp_path: Path) -> None:
    with IngestServer(tmp_path / "ingest.sqlite3") as server, running(spool, server.url):
        server.close()
        output = status(spool, 1, SERVER_URL=server.url)
    assert re.search(r"not reachable|unreachable", output), output
    assert re.search(r"refused", output, re.IGNORECASE), output


@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 200 OK\r\nX-Drip: "], ids=["silent", "dripping"])
def test_status_of_a_server_that_accepts_and_never_answers_takes_about_five_seconds(spool: Spool, words: bytes) -> None:
    """With some words, one more byte every tenth of a second: such an answer never ends either."""
    ending = threading.Event()

    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(words)
            while not ending.wait(0.1):
                connection.sendall(b"x" if words else b"")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=drip, args=(connections[-1],), daemon=True).start()

    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        output = status(spool, 1, SERVER_URL=f"http://127.0.0.1:{listener.getsockname()[1]}/ingest")
        took = time.monotonic() - started
        ending.set()
    for connection in connections:
        connection.close()
    assert re.search(r"not reachable|unreachable|no answer", output), output
    assert took < 9, f"{took:.1f} seconds"


def test_status_does_not_wait_for_a_name_look_up_that_hangs(spool: Spool) -> None:
    program = """
import runpy, socket, sys, time
socket.getaddrinfo = lambda *arguments, **more: time.sleep(60)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", program, str(spool.sender_py), "--status"]
    started = time.monotonic()
    run = subprocess.run(command, env=spool.environment(), capture_output=True, encoding="utf-8", timeout=60)
    took = time.monotonic() - started
    assert (run.returncode, run.stderr) == (1, "")
    assert re.search(r"not reachable|unreachable|no answer", run.stdout), run.stdout
    assert took < 9, f"{took:.1f} seconds"


def test_status_gives_count_bytes_and_age_of_the_oldest_for_each_folder(spool: Spool) -> None:
    layout = {  # folder: sizes of its files, age of the oldest, how that reads
        "pending_upload": ([700, 800], 3 * HOUR + 60, r"\b3:01:"),
        "failed_uploads": ([2_000_000, 500_000, 100], 5 * DAY + 60, r"\b5 days"),
        "processed": ([40_000] * 12, 17 * 60 + 5, r"\b0:17:"),
    }
    totals = {"pending_upload": r"\b1\.5\b", "failed_uploads": r"\b2[.,]5", "processed": r"\b480"}
    now = time.time()
    for folder, (sizes, age, _) in layout.items():
        (spool.logs / folder).mkdir(parents=True)
        for number, size in enumerate(sizes):
            path = spool.logs / folder / f"{number}.json"
            path.write_bytes(b" " * size)
            os.utime(path, (now - age + number, now - age + number))
            if folder == "pending_upload":
                path.with_name(path.name + ".ready").touch()
    output = status(spool, 1, SERVER_URL="http://127.0.0.1:9/")
    for folder, (sizes, _, age_reads) in layout.items():
        line = about(output, folder)
        assert re.search(rf"\b{len(sizes)}\b", line), output
        assert re.search(totals[folder], line), output
        assert re.search(age_reads, line), output


def test_status_shows_the_latest_of_many_failures_and_stays_one_screen(spool: Spool) -> None:
    with ScriptedServer(early=greet) as server:
        for number in range(60):
            spool.drop(f"{number:02}.json", "[7]")
        spool.run("--once", SERVER_URL=server.url)
        output = status(spool, 1, SERVER_URL=server.url)
    assert "59.json" in output, output
    assert "00.json" not in output, output
    assert len(output.splitlines()) <= 40, output


def test_status_as_json_is_the_table_as_one_object(spool: Spool) -> None:
    spool.drop("bad.json", [packet(n, poison=n in (3, 5)) for n in range(8)])
    spool.drop("broken.json", "[")
    with ScriptedServer(lambda request: refuse_poison(request)) as server:
        spool.run("--once", SERVER_URL=server.url)
    spool.drop("ready.json", capture(1))
    os.utime(spool.pending / "ready.json", (time.time() - 700,) * 2)
    run = spool.run("--status", "--json", SERVER_URL="http://127.0.0.1:9/")
    facts, table = json.loads(run.stdout), status(spool, 1, SERVER_URL="http://127.0.0.1:9/")
    assert (run.returncode, facts["well"], facts["running"], facts["pid"]) == (1, False, False, "")
    assert facts["server_trouble"] in table.replace("\n        ", " ")
    assert {folder: facts[folder]["files"] for folder in FOLDERS} == dict(zip(FOLDERS, (1, 2, 0)))
    assert (facts["refused_packets"], facts["files_with_refused_packets"]) == (2, 1)
    bad, broken = sorted(facts["latest_failures"], key=lambda failure: failure["file"])
    assert (bad["file"], bad["packets"], bad["uploaded"], bad["refused"]) == ("bad.json", 8, 8, [3, 5])
    assert "2 packets (number 3, 5)" in table
    assert broken["reason"] in table.replace("\n        ", " ")
    assert facts["pending_upload"]["oldest"] == facts["pending_upload"]["newest"] >= 700
    assert re.search(r"pending_upload +1 +0\.1 +0:11:4\d +0:11:4\d", table), table
    assert all(problem.split("for 0:11")[0] in " ".join(table.split()) for problem in facts["problems"])
    assert any(problem.startswith("a ready file has waited for 0:11") for problem in facts["problems"])


@pytest.mark.skipif(sys.platform == "win32", reason="there os.access() knows no access lists")
def test_status_is_not_well_where_a_ready_file_may_not_be_read(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.drop("a.json", capture(1))
    sender = spool.load(SERVER_URL="http://127.0.0.1:9/")
    assert "1 ready file may not be read" not in sender._facts()["problems"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert "1 ready file may not be read" in sender._facts()["problems"]


def test_status_is_not_well_where_a_failed_files_record_cannot_be_read(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.failed.mkdir(parents=True)
    (spool.failed / "a.json").write_text("[]")
    sender = spool.load(SERVER_URL="http://127.0.0.1:9/")
    monkeypatch.setattr(sender.Record, "read", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied", path)))
    assert "1 failed upload" in sender._facts()["problems"]


def test_what_a_new_user_gets_wrong_is_told_once_and_by_status(spool: Spool) -> None:
    spool.pending.mkdir(parents=True)
    for name in ("unmarked.json", "marked.jsonl", "marked.jsonl.ready", "fresh.json"):
        (spool.pending / name).write_text("[]")
        if name != "fresh.json":
            os.utime(spool.pending / name, (1, 1))
    with ScriptedServer(early=greet) as server:
        spool.start(SERVER_URL=server.url)
        wait_until(lambda: "is not uploaded" in spool.console(), "the hint")
        spool.drop("later.json", capture(1))
        wait_until(lambda: "later.json processed" in spool.console(), "a later poll")
        output = status(spool, 1, SERVER_URL=server.url)
    hint = one(console_lines(spool.console()), "is not uploaded")
    assert hint.startswith(
        "WARNING - unmarked.json (and 1 other file) in pending_upload/ is not uploaded: it needs a name"
    )
    assert re.findall("No marker: (.*)", output) == ["marked.jsonl", "unmarked.json"]


def test_status_of_long_names_reasons_addresses_and_folders_stays_within_80_columns(spool: Spool) -> None:
    spool.logs = spool.folder / ("deep" * 30) / ("folder" * 20) / "logs"
    spool.pending = spool.logs / "pending_upload"
    spool.drop("x" * 200 + ".json", "[7]")
    spool.drop("y" * 200 + ".json", capture(1))
    spool.drop("z" * 200 + ".json", capture(1))
    (spool.pending / ("z" * 200 + ".json.ready")).unlink()
    with ScriptedServer(lambda request: reply(400, "because " * 100), early=greet) as server:
        settings = {"SERVER_URL": server.url + "/long" * 40, "LOGS_DIR": spool.logs}
        spool.run("--once", **settings)
        status(spool, 1, **settings)


def test_status_changes_nothing_on_disk(spool: Spool) -> None:
    spool.drop("bad.json", "[7]")
    with ScriptedServer(early=greet) as server:
        spool.run("--once", SERVER_URL=server.url)
        spool.drop("ready.json", capture(1))
        spool.drop("orphan.json", capture(1))
        (spool.pending / "orphan.json.ready").unlink()
        (spool.pending / "taken.json.taken").write_text("[]")
        (spool.pending / ".sender.tmp").write_text("half a rec")
        (spool.failed / "gone.json.state").write_text("{}")
        before = snapshot(spool.folder)
        status(spool, 1, SERVER_URL=server.url)
        assert snapshot(spool.folder) == before
    assert len(server.requests) == 0


@pytest.mark.parametrize("folders", [False, True])
def test_status_makes_neither_folders_nor_a_lock_where_no_sender_has_ever_run(spool: Spool, folders: bool) -> None:
    if folders:
        spool.drop("a.json", capture(1))
    before = snapshot(spool.folder)
    status(spool, 1, SERVER_URL="http://127.0.0.1:9/")
    assert snapshot(spool.folder) == before


def test_status_copes_with_damaged_records_and_odd_things_in_the_folders(spool: Spool) -> None:
    for folder in (spool.pending, spool.failed, spool.processed):
        (folder / "folder.json").mkdir(parents=True)
        for number, garbage in enumerate([b"", b"{", b"[]", b'{"last_error": 7}', b"\xff", b"[" * 100_000, b"null"]):
            (folder / f"{number}.json").write_bytes(garbage)
            (folder / f"{number}.json.state").write_bytes(garbage)
    status(spool, 1, SERVER_URL="http://127.0.0.1:9/")


def test_status_of_logs_dir_that_is_a_file_is_no_traceback(spool: Spool) -> None:
    spool.logs.write_text("mine")
    run = spool.run("--status", SERVER_URL="http://127.0.0.1:9/")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "not running" in run.stdout + run.stderr


def test_status_with_a_bad_setting_exits_2_and_says_which(spool: Spool) -> None:
    run = spool.run("--status", BATCH_SIZE=0)
    assert run.returncode == 2
    (line,) = console_lines(run.stderr)
    assert "BATCH_SIZE" in line


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_status_on_a_console_without_unicode_is_whole(spool: Spool, encoding: str) -> None:
    spool.drop("\N{SNOWMAN}.json", "[7]")
    with ScriptedServer(lambda request: reply(400, "\N{SNOWMAN} " * 200), early=greet) as server:
        spool.run("--once", SERVER_URL=server.url)
        whole = status(spool, 1, SERVER_URL=server.url)
        environment = spool.environment(SERVER_URL=server.url, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        command = [sys.executable, str(spool.sender_py), "--status"]
        run = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (1, b"")
    assert len(run.stdout.splitlines()) == len(whole.splitlines())


def test_status_into_a_reader_that_has_gone_is_no_traceback(spool: Spool) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(spool.sender_py), "--status"]
    environment = spool.environment(SERVER_URL="http://127.0.0.1:9/")
    run = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
    os.close(writing)
    assert run.stderr == ""


def test_status_of_20_000_files_is_quick_and_exact(spool: Spool) -> None:
    spool.failed.mkdir(parents=True)
    spool.processed.mkdir()
    for folder, files in ((spool.processed, 20_000), (spool.failed, 2_000)):
        for number in range(files):  # links, because they are made ten times faster; NTFS allows a thousand
            if number % 1000 == 0:
                first = folder / f"{number:05}.json"
                first.write_text("[]")
            else:
                os.link(first, folder / f"{number:05}.json")
    started = time.monotonic()
    output = status(spool, 1, SERVER_URL="http://127.0.0.1:9/")
    took = time.monotonic() - started
    assert re.search(r"\b20,?000\b", about(output, "processed")), output
    assert re.search(r"\b2,?000\b", about(output, "failed_uploads")), output
    assert re.search(r"\b40\.0\b", about(output, "processed")), output
    assert took < 10, f"{took:.1f} seconds"


LOOP = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("sender", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
while True:
    module.main(["--status"])
    sys.stdout.flush()
"""


@contextlib.contextmanager
def status_again_and_again(spool: Spool, url: str) -> Iterator[Path]:
    """Two processes that do nothing but --status; their output grows in the file."""
    output = spool.folder / "statuses.txt"
    command = [sys.executable, "-c", LOOP, str(spool.sender_py)]
    with open(output, "w") as file:
        loops = [subprocess.Popen(command, env=spool.environment(SERVER_URL=url), stdout=file) for _ in range(2)]
    try:
        wait_until(lambda: output.read_text(errors="replace").count("unning") > 10, "the first statuses")
        yield output
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


if sys.platform != "win32":
    import fcntl

    def test_a_sender_that_starts_while_status_looks_at_the_lock_waits_for_it(spool: Spool) -> None:
        with ScriptedServer() as server:
            assert spool.run("--once", SERVER_URL=server.url).returncode == 0
            with open(spool.logs / ".sender.lock") as looking:
                fcntl.flock(looking, fcntl.LOCK_SH)  # what --status does for an instant
                threading.Timer(0.6, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
                run = spool.run("--once", SERVER_URL=server.url)
        assert run.returncode == 0, run.stderr

    def test_one_status_does_not_take_another_for_a_sender(spool: Spool) -> None:
        with ScriptedServer(early=greet) as server:
            spool.run("--once", SERVER_URL=server.url)
            with open(spool.logs / ".sender.lock") as looking:
                fcntl.flock(looking, fcntl.LOCK_SH)
                output = status(spool, 1, SERVER_URL=server.url)
        assert "not running" in output


def test_status_disturbs_no_running_sender_and_never_takes_it_for_stopped(spool: Spool) -> None:
    with ScriptedServer(early=greet) as server, running(spool, server.url) as sender:
        with status_again_and_again(spool, server.url) as output:
            for number in range(20):
                spool.drop(f"{number}.json", [packet(number)])
                wait_until(lambda: (spool.processed / f"{number}.json").exists(), "an upload")  # noqa: B023
        told = output.read_text(errors="replace")
        assert sender.poll() is None
    assert "not running" not in told
    assert str(sender.pid) in told
    assert count(console_lines(spool.console()), "^(WARNING|ERROR)") == 0


@pytest.mark.parametrize("name", ["pending_upload", "failed_uploads", "processed"])
def test_status_exits_1_and_names_a_folder_that_cannot_be_read(spool: Spool, tmp_path: Path, name: str) -> None:
    spool.logs.mkdir()
    (spool.logs / name).write_text("a file in the folder's place")
    with IngestServer(tmp_path / "db") as server:
        sender = spool.start(SERVER_URL=server.url)
        wait_until(lambda: "Watching" in spool.console(), "the sender runs")
        status = spool.run("--status", SERVER_URL=server.url)
    assert status.returncode == 1, status.stdout
    assert f"running (pid {sender.pid})" in status.stdout
    assert f"Not well: {name} cannot be read (" in status.stdout
    assert status.stdout.count(",") == 1, f"nothing else is amiss (the comma is that of the URL): {status.stdout}"
