"""sender.py as a module: loaded by path into a sniffer, a test or a REPL, which keep their console and logging."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import DATA, SENDER, Spool, capture, packet, wait_until
from servers import Answer, Request, ScriptedServer, reply

LONG = 600  # seconds: a wait that a test would not survive
SOON = 3.5  # seconds: "within a second of any wait" on a busy machine


@contextlib.contextmanager
def serving(module: ModuleType) -> Iterator[threading.Thread]:
    """monitor_and_upload() in a daemon thread, as the sniffer runs it; ended by stop_sender()."""
    thread = threading.Thread(target=module.monitor_and_upload, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        module.stop_sender()
        thread.join(60)
        assert not thread.is_alive(), "monitor_and_upload() did not return after stop_sender()"


def accept(request: Request) -> Answer:
    return None


# ---------------------------------------------------------------- loading

HOST = """
import importlib.util, json, logging, os, pathlib, signal, sys, threading

def state():
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "root handlers": [str(handler) for handler in logging.getLogger().handlers],
        "own handlers": [str(handler) for handler in logging.getLogger("sender").handlers],
        "levels": [logging.getLogger(name).level for name in (None, "sender", "urllib3")],
        "raiseExceptions": logging.raiseExceptions,
        "excepthook": str(sys.excepthook),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": threading.active_count(),
        "files": sorted(map(str, pathlib.Path(sys.argv[1]).parent.rglob("*"))),
    }

def load():
    spec = importlib.util.spec_from_file_location("sender", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

sys.dont_write_bytecode = True
before = state()
module = load()
assert state() == before, (before, state())
"""


def host(spool: Spool, program: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """A program that has loaded sender.py and found nothing changed by that, to its end."""
    command = [sys.executable, "-c", HOST + program, str(spool.sender_py)]
    environment = spool.environment(**settings)
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=60)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"BATCH_SIZE": "0", "SERVER_URL": "ftp://x", "LOG_LEVEL": "LOUD", "POLL_INTERVAL": "nan"},
        {"LOGS_DIR": "~no-such-user-here/logs"},
    ],
    ids=["good settings", "bad settings", "a home nobody has"],
)
def test_loading_prints_nothing_configures_nothing_and_touches_nothing(spool: Spool, settings: dict[str, str]) -> None:
    run = host(spool, "", **settings)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "content",
    [b"SERVER_URL=http://127.0.0.1:1/\n", b"no setting\nBATCH_SIZE=0\n", "BATCH_SIZE=2\n".encode("utf-16")],
    ids=["good", "bad lines", "UTF-16"],
)
def test_loading_with_a_dotenv_prints_nothing_and_leaves_the_environment_alone(spool: Spool, content: bytes) -> None:
    (spool.folder / ".env").write_bytes(content)
    run = host(spool, "")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_mistake_that_loading_swallowed_raises_value_error_from_monitor_and_upload(spool: Spool) -> None:
    module = spool.load(BATCH_SIZE="0", LOG_LEVEL="LOUD", API_TOKEN="sword\nfish", LOGS_DIR=spool.logs)
    with pytest.raises(ValueError, match="BATCH_SIZE") as raised:
        module.monitor_and_upload()
    assert "LOG_LEVEL" in str(raised.value)
    assert "API_TOKEN" in str(raised.value)
    assert "sword" not in str(raised.value)
    assert spool.tree() == {}
    assert not spool.logs.exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@",
        "ftp://user:hunter2@127.0.0.1/ingest",
        "http://user:hunter2@127.0.0.1:70000/ingest",
        "http://user:hun/ter2:hunter2@127.0.0.1:port/ingest",
        "http://127.0.0.1:port/ingest?key=hunter2",
        "http:///ingest?key=hunter2",
        "user:hunter2@127.0.0.1/ingest",
        "http:/user:hunter2@127.0.0.1/ingest",
        "htp:user:hunter2@127.0.0.1",
        "user:hunter2@127.0.0.1/in@gest",
    ],
)
def test_what_is_said_of_a_bad_url_hides_its_password(spool: Spool, url: str) -> None:
    module = spool.load(SERVER_URL=url)
    with pytest.raises(ValueError, match="SERVER_URL") as raised:
        module.monitor_and_upload()
    assert "hunter2" not in str(raised.value)


def test_a_copy_of_the_file_alone_is_the_whole_product(spool: Spool) -> None:
    assert spool.sender_py.read_bytes() == SENDER.read_bytes()
    assert [path.name for path in spool.folder.iterdir()] == ["sender.py"]
    run = host(spool, "assert callable(module.main) and callable(module.stop_sender)")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_host_that_ends_is_not_held_up_by_the_senders_daemon_thread(spool: Spool) -> None:
    program = """
threading.Thread(target=module.monitor_and_upload, daemon=True).start()
while not (module.PROCESSED_DIR / "a.json").exists():
    pass
"""
    spool.drop("a.json", capture(1))
    with ScriptedServer() as server:
        run = host(spool, program, SERVER_URL=server.url, POLL_INTERVAL=LONG)
    assert (run.returncode, run.stdout) == (0, "")
    assert spool.names() == ["processed/a.json"]


# ---------------------------------------------------------------- in a thread of the host


def test_in_a_thread_its_records_reach_the_hosts_handlers(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    spool.drop("a.json", capture(3))
    caplog.set_level(logging.INFO)
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        with serving(module):
            wait_until(lambda: (spool.processed / "a.json").exists(), "the upload")
            spool.drop("b.json", "[")
            wait_until(lambda: (spool.failed / "b.json").exists(), "the refusal")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert any(level == "INFO" and "a.json processed successfully" in message for level, message in told), told
    assert any(level == "ERROR" and "b.json moved to failed_uploads/" in message for level, message in told), told
    assert {record.name for record in caplog.records} == {module.logger.name}
    assert module.logger.handlers == []
    assert module.logger.propagate
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_the_hosts_log_level_decides(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    spool.drop("a.json", capture(3))
    spool.drop("b.json", "[")
    caplog.set_level(logging.ERROR)
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url, LOG_LEVEL="DEBUG")
        with serving(module):
            wait_until(lambda: (spool.failed / "b.json").exists(), "the refusal")
    assert {record.levelname for record in caplog.records} == {"ERROR"}


def test_it_runs_stops_and_runs_again_in_one_process(spool: Spool) -> None:
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        for number in range(3):
            with serving(module):
                spool.drop(f"{number}.json", [packet(number)])
                wait_until(lambda: (spool.processed / f"{number}.json").exists(), "the upload")  # noqa: B023
            spool.drop("later.json", [packet(9)])  # nobody is there to take it
            assert (spool.pending / "later.json").exists()
            (spool.pending / "later.json.ready").unlink()
            (spool.pending / "later.json").unlink()
    assert server.stored == Counter(range(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows knows no fork")
def test_a_child_that_the_host_forked_does_not_keep_the_lock(spool: Spool) -> None:
    program = """
import time
thread = threading.Thread(target=module.monitor_and_upload)
thread.start()
while not module._lock_fds:
    time.sleep(0.01)
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
try:
    module.stop_sender()
    thread.join()
    module.monitor_and_upload(once=True)  # raises where the child still has the lock
finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""
    with ScriptedServer(accept) as server:
        run = host(spool, program, SERVER_URL=server.url)
    assert run.returncode == 0, run.stderr


def test_stop_sender_without_a_loop_is_harmless_before_and_after_one(spool: Spool) -> None:
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url, BATCH_SIZE=1)
        module.stop_sender()
        spool.drop("a.json", capture(2))
        assert module.process_json_file(spool.pending / "a.json")
        with serving(module):
            spool.drop("b.json", capture(2))
            wait_until(lambda: (spool.processed / "b.json").exists(), "the loop at work")
        spool.drop("c.json", capture(2))
        assert module.process_json_file(spool.pending / "c.json")
        module.stop_sender()
        module.stop_sender()
        spool.drop("d.json", capture(2))
        assert module.process_json_file(spool.pending / "d.json")
        assert module.upload_with_retry(capture(1))


def test_stop_sender_while_idle_returns_within_about_a_second(spool: Spool) -> None:
    spool.drop("a.json", capture(1))
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url, POLL_INTERVAL=LONG)
        with serving(module) as thread:
            wait_until(lambda: (spool.processed / "a.json").exists(), "the first poll")
            asked = time.monotonic()
            module.stop_sender()
            thread.join(60)
            assert time.monotonic() - asked < SOON


def test_two_copies_serve_two_folders_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spools = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        spools.append(Spool(tmp_path / name))
    one, two = spools
    with ScriptedServer() as server_one, ScriptedServer() as server_two:
        module_one, module_two = one.load(SERVER_URL=server_one.url), two.load(SERVER_URL=server_two.url)
        with serving(module_two):
            with serving(module_one):
                for number in range(20):
                    one.drop(f"{number:02}.json", [packet(number)])
                    two.drop(f"{number:02}.json", [packet(100 + number)])
                for spool in spools:
                    wait_until(lambda: len([*spool.processed.glob("*.json")]) == 20, "both drains")  # noqa: B023
            two.drop("last.json", [packet(200)])
            wait_until(lambda: (two.processed / "last.json").exists(), "the second copy after the first has ended")
    assert server_one.stored == Counter(range(20))
    assert server_two.stored == Counter([*range(100, 120), 200])


@pytest.mark.slow
def test_a_second_loop_on_the_same_folder_raises_and_names_the_pid_and_the_first_goes_on(spool: Spool) -> None:
    with ScriptedServer() as server:
        first, second = spool.load(SERVER_URL=server.url), spool.load(SERVER_URL=server.url)
        with serving(first):
            spool.drop("a.json", [packet(1)])
            wait_until(lambda: (spool.processed / "a.json").exists(), "the first loop at work")
            with pytest.raises(Exception, match=rf"\b{os.getpid()}\b"):
                second.monitor_and_upload()
            spool.drop("b.json", [packet(2)])
            wait_until(lambda: (spool.processed / "b.json").exists(), "the first loop still at work")
        with serving(second):
            spool.drop("c.json", [packet(3)])
            wait_until(lambda: (spool.processed / "c.json").exists(), "the second, now that the folder is free")


# ---------------------------------------------------------------- single calls, as in a REPL


def test_process_json_file_alone_makes_the_folders_it_needs(spool: Spool) -> None:
    content = spool.drop("a.json", capture(3))
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        assert module.process_json_file(str(spool.pending / "a.json"))
    assert server.stored == Counter(range(3))
    assert spool.tree() == {"processed/a.json": len(content)}


def test_process_json_file_alone_is_falsy_for_a_failure_and_keeps_the_file_in_failed_uploads(spool: Spool) -> None:
    content = spool.drop("a.json", capture(3))
    with ScriptedServer(lambda request: reply(503)) as server:
        module = spool.load(SERVER_URL=server.url, MAX_RETRIES=2)
        assert not module.process_json_file(spool.pending / "a.json")
    assert len(server.requests) == 2
    assert (spool.failed / "a.json").read_bytes() == content, spool.tree()


def test_process_json_file_alone_leaves_a_file_without_its_marker_and_is_falsy(spool: Spool) -> None:
    content = spool.drop("a.json", capture(3))
    (spool.pending / "a.json.ready").unlink()
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        assert not module.process_json_file(spool.pending / "a.json")
    assert server.requests == []
    assert spool.tree() == {"pending_upload/a.json": len(content)}


@pytest.mark.parametrize("marker", [False, True])
def test_process_json_file_of_nothing_is_falsy_and_raises_nothing(spool: Spool, marker: bool) -> None:
    module = spool.load(SERVER_URL="http://127.0.0.1:1/")
    if marker:
        spool.pending.mkdir(parents=True)
        (spool.pending / "a.json.ready").touch()
    assert not module.process_json_file(spool.pending / "a.json")
    assert spool.names() == (["pending_upload/a.json.ready"] if marker else [])


@pytest.mark.parametrize("capture", sorted(DATA.glob("packets_*.json")), ids=lambda path: path.name)
def test_one_file_is_sent_by_hand_with_upload_packets_of_read_json_file(spool: Spool, capture: Path) -> None:
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url, BATCH_SIZE=10, LOGS_DIR=spool.logs)
        assert module.upload_packets(module.read_json_file(str(capture)))
    (request,) = server.requests
    assert request.packets == json.loads(capture.read_bytes())
    assert request.headers["content-type"] == "application/json"
    assert not spool.logs.exists()


def test_upload_packets_of_no_packets_is_a_success_without_a_request(spool: Spool) -> None:
    with ScriptedServer() as server:
        module = spool.load(SERVER_URL=server.url)
        assert module.upload_packets([])
        assert module.upload_with_retry([])
    assert server.requests == []


@pytest.mark.parametrize("status", [503, 500, 400, 413, 302, 401, 404])
def test_upload_packets_is_one_post_and_falsy_where_the_server_says_no(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        module = spool.load(SERVER_URL=server.url)
        assert not module.upload_packets(capture(2), retry_count=1)
    assert len(server.requests) == 1


def test_upload_packets_is_falsy_and_raises_nothing_where_no_server_is(spool: Spool) -> None:
    with ScriptedServer(listening=False) as server:
        module = spool.load(SERVER_URL=server.url)
        assert not module.upload_packets(capture(2))


def test_upload_with_retry_takes_a_list_and_tries_it_max_retries_times_under_one_key(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        module = spool.load(SERVER_URL=server.url, MAX_RETRIES=4)
        assert not module.upload_with_retry(capture(2))
        assert len(server.requests) == 4
        assert len({request.key for request in server.requests}) == 1
        server.script = lambda request: reply(503) if request.number < 6 else None
        assert module.upload_with_retry(capture(2))
    assert len(server.requests) == 7


@pytest.mark.slow
def test_a_second_loop_in_one_module_is_refused_and_leaves_the_first_one_stoppable(spool: Spool) -> None:
    module = spool.load(SERVER_URL="http://127.0.0.1:9/ingest")
    first = threading.Thread(target=module.monitor_and_upload, daemon=True)
    first.start()
    wait_until(spool.processed.exists, "the first loop runs")
    with pytest.raises(module.AlreadyRunning, match=str(os.getpid())):
        module.monitor_and_upload()
    module.stop_sender()
    first.join(30)
    assert not first.is_alive()


def test_a_stop_right_after_the_start_is_heard(spool: Spool) -> None:
    for _ in range(5):
        sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest")
        thread = threading.Thread(target=sender.monitor_and_upload, daemon=True)
        thread.start()
        wait_until(lambda: sender._lock_fds, "it has begun")  # noqa: B023
        sender.stop_sender()
        thread.join(30)
        assert not thread.is_alive()
        assert sender._stopping is False


@pytest.mark.parametrize("setting", [{"SERVER_URL": "htp://127.0.0.1/ingest"}, {"API_TOKEN": "ä"}, {"MAX_RETRIES": 0}])
def test_with_a_bad_setting_no_function_touches_a_file_or_sends_one(spool: Spool, setting: dict[str, object]) -> None:
    with ScriptedServer() as server:
        sender = spool.load(**{"SERVER_URL": server.url, **setting})
        spool.drop("a.json", capture(3))
        before = spool.tree()
        for call in (
            lambda: sender.process_json_file(spool.pending / "a.json"),
            sender.retry_failed_uploads,
            lambda: sender.upload_packets(capture(1)),
            lambda: sender.upload_with_retry(capture(1)),
            sender.monitor_and_upload,
        ):
            with pytest.raises(ValueError, match=next(iter(setting))):
                call()
    assert spool.tree() == before
    assert not server.requests
