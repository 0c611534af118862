"""What attacks on the whole program found: each of these once lost, repeated or held up data, misled, or hung."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Spool, console_lines, numbered, packet, wait_until
from ingest_server import IngestServer
from servers import Answer, Clock, Request, ScriptedServer, close, reply, say, too_late

TIMEOUT = 5.0  # seconds of the sender's clock


def load(spool: Spool, server: ScriptedServer, **settings: object) -> tuple[Any, Clock]:
    """The spool's sender.py as a fresh module, which is what a restart is, and its clock."""
    usual = {"SERVER_URL": server.url, "REQUEST_TIMEOUT": TIMEOUT, "MAX_RETRIES": 1, "POLL_INTERVAL": 0.5}
    sender = spool.load(**{**usual, **settings})
    return sender, Clock(sender)


def play(sender: Any, clock: Clock, *steps: Callable[[], object]) -> None:
    """Run monitor_and_upload(). Each time it would wait for its next poll, a step is done; in the end it is stopped."""
    left = iter(steps)
    clock.at_sleep = lambda: next(left, sender.stop_sender)()
    sender.monitor_and_upload()


def put(folder: Path, name: str, content: bytes | list[dict[str, Any]]) -> bytes:
    """A file that a person, or a crash, has put into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return (folder / name).read_bytes()


def first_numbers(server: ScriptedServer) -> list[int]:
    """The first packet of each request: which file, or which place, it came from."""
    return [request.numbers[0] for request in server.requests]


def no_space(path: Path, content: bytes) -> None:
    raise OSError(28, "No space left on device", str(path))


def nothing() -> None:
    pass


# ---------------------------------------------------------------- the loop and its lock


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


def test_a_lock_that_vanishes_with_its_folder_is_taken_anew(spool: Spool) -> None:
    spool.start(SERVER_URL="http://127.0.0.1:9/ingest")
    lock = spool.logs / ".sender.lock"
    wait_until(spool.processed.exists, "it runs")
    shutil.rmtree(spool.logs, ignore_errors=True)
    wait_until(lambda: lock.exists() and lock.read_text(), "the lock is back")
    second = spool.run("--once", SERVER_URL="http://127.0.0.1:9/ingest")
    assert second.returncode == 1
    assert f"pid {spool.processes[0].pid}" in second.stderr


# ---------------------------------------------------------------- what the server's answers lead to


@pytest.mark.parametrize("first", ["500", "time-out"])
def test_a_500_and_a_time_out_of_one_batch_do_not_add_up_to_a_smaller_one(spool: Spool, first: str) -> None:
    """Each has to come twice: neither is the other's first time."""
    answers: dict[str, Callable[[], Answer]] = {"500": lambda: reply(500), "time-out": lambda: too_late(clock, TIMEOUT)}
    with ScriptedServer(lambda request: answers[first]()) as server:
        spool.drop("a.json", numbered(10))
        sender, clock = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.script = lambda request: None
        spool.drop("b.json", [packet(100)])
        assert sender.process_json_file(spool.pending / "b.json")  # the server works for others
        server.script = lambda request: answers["time-out" if first == "500" else "500"]()
        sender.retry_failed_uploads()
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert server.sizes == [10, 1, 10, 10]
    assert len({request.key for request in server.requests}) == 2
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_a_timed_out_batch_is_resent_under_its_old_key_after_a_restart_with_a_smaller_batch_size(spool: Spool) -> None:
    with ScriptedServer(lambda request: too_late(clock, TIMEOUT) if 100 in request.numbers else None) as server:
        spool.drop("a.json", numbered(260))
        sender, clock = load(spool, server, BATCH_SIZE=100)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.script = lambda request: None
        load(spool, server, BATCH_SIZE=30)[0].retry_failed_uploads()
    assert server.sizes == [100, 100, 100, 30, 30]
    lost, again = server.requests[1:3]
    assert (lost.key, lost.body) == (again.key, again.body)
    assert server.stored == Counter(range(260))


def test_a_new_file_that_fails_brings_back_the_sweeps_ahead_of_their_time(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503) if request.numbers[0] < 2 else None) as server:
        sender, clock = load(spool, server, RETRY_FAILED_INTERVAL=100_000)
        coming = iter(range(2, 100))

        def drop_good() -> None:
            spool.drop("good.json", [packet(next(coming))])

        bad = [functools.partial(spool.drop, f"bad{number}.json", [packet(number)]) for number in range(2)]
        counts: list[int] = []
        note = lambda: counts.append(sum(number < 2 for number in first_numbers(server)))  # noqa: E731
        play(sender, clock, bad[0], *[drop_good] * 20, note, bad[1], drop_good, note)
    assert counts == [1 + sender.EARLY_SWEEPS, 1 + sender.EARLY_SWEEPS + 2]


UNANSWERED = {
    "closes after each answer": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", 1),
    "speaks HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", 1),
    "keeps connections": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", 2),
}


@pytest.mark.parametrize(("words", "posts"), UNANSWERED.values(), ids=UNANSWERED)
def test_only_a_batch_lost_on_a_kept_connection_is_sent_again_without_counting(
    spool: Spool, said: Callable[..., list[str]], words: bytes, posts: int
) -> None:
    """A connection that was idle may have been closed meanwhile; a new one has not, and its batch may have arrived."""

    def script(request: Request) -> Answer:
        return close if request.number == 1 else words if posts == 2 else say(words)

    with ScriptedServer(script) as server:
        sender, _ = load(spool, server)
        assert sender.upload_packets(numbered(3))
        assert bool(sender.upload_packets([packet(10)])) == (posts == 2)
        assert first_numbers(server) == [0] + [10] * posts
        assert sender.upload_packets([packet(20)])
    assert first_numbers(server) == [0] + [10] * posts + [20]
    assert sum("attempt" in line for line in said()) == 2 - posts


# ---------------------------------------------------------------- files and their records


def test_a_data_file_that_is_named_like_a_marker_is_never_removed_as_one(spool: Spool, tmp_path: Path) -> None:
    spool.failed.mkdir(parents=True)
    (spool.failed / "a.ready").write_text(json.dumps(numbered(3)))
    spool.processed.write_text("a file in the folder's place, so that the move fails")
    with IngestServer(tmp_path / "db") as server:
        for _ in range(2):
            assert spool.run("--once", SERVER_URL=server.url).returncode == 1
        assert json.loads((spool.failed / "a.ready").read_text()) == numbered(3)
        spool.processed.unlink()
        spool.run("--once", SERVER_URL=server.url)
        assert spool.names() == ["processed/a.ready"]
        assert len(server.packets()) == 3
        assert server.repeats == 0


def test_a_failure_that_failed_uploads_does_not_take_costs_no_post_per_poll_and_keeps_its_progress(
    spool: Spool,
) -> None:
    spool.drop("a.json", numbered(50))
    spool.failed.write_text("a file in the folder's place")
    with ScriptedServer(lambda request: reply(503) if request.numbers[0] >= 20 else None) as server:
        sender, clock = load(spool, server, BATCH_SIZE=10, RETRY_FAILED_INTERVAL=30)
        play(sender, clock, *[nothing] * 80, spool.failed.unlink, nothing)
        assert first_numbers(server) == [0, 10, 20, 20], "once at first, once with the sweep after 30 of 40 seconds"
        assert spool.names() == ["failed_uploads/a.json", "failed_uploads/a.json.state"]
        record = json.loads((spool.failed / "a.json.state").read_bytes())
        assert (record["uploaded"], record["attempts"], record["last_error"][:17]) == (20, 2, "Server error: 503")
        server.script = lambda request: None
        load(spool, server, BATCH_SIZE=10)[0].retry_failed_uploads()
    assert first_numbers(server)[4:] == [20, 30, 40]
    assert spool.names() == ["processed/a.json"]


def test_a_producer_that_is_just_writing_a_taken_files_name_again_gets_no_marker_from_us(
    spool: Spool, tmp_path: Path
) -> None:
    put(spool.pending, "a.json.taken", numbered(3))
    put(spool.pending, "a.json", b'[{"half": "wri')
    with IngestServer(tmp_path / "db") as server:
        sender = spool.load(SERVER_URL=server.url)
        sender.monitor_and_upload(once=True)
        assert spool.names() == ["pending_upload/a.json", "processed/a.json"]
        spool.drop("a.json", numbered(5))
        sender.monitor_and_upload(once=True)
        assert spool.names() == ["processed/a.1.json", "processed/a.json"]
        assert len(server.packets()) == 8


def test_a_record_of_many_megabytes_is_read_back_and_honoured(spool: Spool, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        put(spool.failed, "a.json", numbered(18_010))
        status = (spool.failed / "a.json").stat()
        sender, _ = load(spool, server)
        rejected = [(number, "\N{GRINNING FACE}" * 200) for number in range(18_000) if number % 3]
        progress = sender.Progress(
            status.st_size, status.st_mtime_ns, packets=18_010, uploaded=18_000, batch_size=1000, rejected=rejected
        )
        assert len(put(spool.failed, "a.json.state", progress.to_json())) > 9_000_000
        sender.retry_failed_uploads()
        load(spool, server)[0].retry_failed_uploads()
        sender.print_status()
    assert [request.numbers for request in server.requests[:2]] == [[*range(18_000, 18_010)]] * 2
    assert json.loads((spool.failed / "a.json.state").read_bytes())["rejected"] == [[*pair] for pair in rejected]
    assert "18,000/18,010 packets uploaded; failed 2 times" in capsys.readouterr().out


def test_a_failure_dated_in_the_future_does_not_keep_its_file_from_its_turn(spool: Spool) -> None:
    names = ["a.json", "b.json", "c.json", "d.json"]
    with ScriptedServer(lambda request: reply(503)) as server:
        for number, name in enumerate(names):
            put(spool.failed, name, [packet(number)])
            load(spool, server)[0].retry_failed_uploads()
        record = json.loads((spool.failed / "d.json.state").read_bytes())
        put(spool.failed, "d.json.state", json.dumps({**record, "time": "2999" + record["time"][4:]}).encode())
        server.requests.clear()
        for _ in range(5):
            load(spool, server)[0].retry_failed_uploads()
    assert first_numbers(server) == [3, 0, 1, 2, 3]


@pytest.mark.parametrize("name", ["foreign.state", "foreign.json.state"])
def test_only_our_own_records_are_ever_cleared_away(spool: Spool, name: str) -> None:
    contents = [b"{}", b'{"uploaded": 3, "packets": 5}', b'{"captured": 9, "rejected": 1}', b'["file", "rejected"]']
    sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest", MAX_RETRIES=1)
    for folder in (spool.pending, spool.failed):
        for number, content in enumerate(contents):
            put(folder, f"{number}{name}", content)
        put(folder, "ours.json.state", sender.Progress(10, 10).to_json())
        put(folder, "ours.rejected.json.state", b'{"file": "ours.json", "rejected": []}')
    for _ in range(3):
        sender.retry_failed_uploads()
    for folder in (spool.pending, spool.failed):
        assert [(folder / f"{number}{name}").read_bytes() for number in range(len(contents))] == contents
        assert not list(folder.glob("ours*"))


@pytest.mark.parametrize("content", [b"[1, 2]", b"not JSON", b'{"mine": 1}'])
def test_a_failed_file_does_not_write_its_record_over_a_file_that_is_not_ours(spool: Spool, content: bytes) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        put(spool.failed, "a.json.state", content)
        spool.drop("a.json", numbered(3))
        assert not load(spool, server)[0].process_json_file(spool.pending / "a.json")
    assert (spool.failed / "a.json.state").read_bytes() == content
    assert json.loads((spool.failed / "a.1.json").read_bytes()) == numbered(3)
    assert json.loads((spool.failed / "a.1.json.state").read_bytes())["attempts"] == 1


# ---------------------------------------------------------------- what a host and its surroundings do


def test_a_stop_right_after_the_start_is_heard(spool: Spool) -> None:
    for _ in range(5):
        sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest")
        thread = threading.Thread(target=sender.monitor_and_upload, daemon=True)
        thread.start()
        wait_until(lambda: sender._serving, "it has begun")  # noqa: B023
        sender.stop_sender()
        thread.join(30)
        assert not thread.is_alive()
        assert sender._stopping is False


@pytest.mark.parametrize("setting", [{"SERVER_URL": "htp://127.0.0.1/ingest"}, {"API_TOKEN": "ä"}, {"MAX_RETRIES": 0}])
def test_with_a_bad_setting_no_function_touches_a_file_or_sends_one(spool: Spool, setting: dict[str, object]) -> None:
    with ScriptedServer() as server:
        sender = spool.load(**{"SERVER_URL": server.url, **setting})
        spool.drop("a.json", numbered(3))
        before = spool.tree()
        for call in (
            lambda: sender.process_json_file(spool.pending / "a.json"),
            sender.retry_failed_uploads,
            lambda: sender.upload_packets(numbered(1)),
            lambda: sender.upload_with_retry(numbered(1)),
            sender.monitor_and_upload,
        ):
            with pytest.raises(ValueError, match=next(iter(setting))):
                call()
    assert spool.tree() == before
    assert not server.requests


def test_a_host_may_upload_files_and_sweep_beside_the_loop(
    spool: Spool, tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    refused = [packet(n) for n in range(100, 104)]
    with ScriptedServer(lambda request: reply(422) if 102 in request.numbers else None) as server:
        sender = spool.load(SERVER_URL=server.url, POLL_INTERVAL=0.01, BATCH_SIZE=2)
        loop = threading.Thread(target=sender.monitor_and_upload, daemon=True)
        loop.start()
        wait_until(lambda: sender._serving, "it has begun")
        for number in range(40):
            name = f"{number}.json"
            spool.drop(name, [packet(1000 * number + n) for n in range(5)] if number % 4 else refused)
            sender.process_json_file(spool.pending / name)
            sender.retry_failed_uploads()
        wait_until(lambda: not any(spool.pending.iterdir()), "all are delivered")
        sender.stop_sender()
        loop.join(30)
    good = {1000 * number + n for number in range(40) if number % 4 for n in range(5)}
    assert set(server.stored) == good | {100, 101, 103}
    assert set(server.stored.values()) == {1}
    assert {path.read_bytes() for path in spool.failed.glob("*.rejected.json")} == {
        b"[" + json.dumps(refused[2]).encode() + b"]\n"
    }
    assert not [line for line in said(logging.ERROR) if "rejects 1 packet" not in line]


def test_a_lock_that_cannot_be_looked_at_is_not_taken_for_gone(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]]
) -> None:
    stat, refused = os.stat, []

    def refuse(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(".sender.lock"):
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest", POLL_INTERVAL=0.01)
    monkeypatch.setattr(os, "stat", refuse)
    loop = threading.Thread(target=sender.monitor_and_upload, daemon=True)
    loop.start()
    wait_until(lambda: len(refused) > 5, "it runs")
    sender.stop_sender()
    loop.join(30)
    assert [line.split(" ")[0] for line in said()] == ["Watching", "Stopped;"]


ODD_NETRCS = {"not UTF-8": b"machine elsewhere login \xfc password x"}
if sys.version_info >= (3, 11):  # earlier ones take such a password for damage, and requests then goes without
    ODD_NETRCS["a password that cannot be sent"] = "machine 127.0.0.1 login u password p€ss".encode()


@pytest.mark.parametrize("netrc", ODD_NETRCS.values(), ids=ODD_NETRCS)
def test_a_netrc_with_an_odd_byte_is_told_and_ends_nothing(spool: Spool, netrc: bytes) -> None:
    (spool.folder / "netrc").write_bytes(netrc)
    spool.drop("a.json", numbered(3))
    with ScriptedServer() as server:
        settings = {"SERVER_URL": server.url, "NETRC": spool.folder / "netrc", "PYTHONUTF8": 1}
        first = spool.run("--once", **settings)
        (spool.folder / "netrc").write_text("machine 127.0.0.1 login u password p")
        second = spool.run("--once", **settings)
    assert (first.returncode, second.returncode) == (1, 0)
    assert any(".netrc" in line and "moved to failed_uploads" in line for line in console_lines(first.stderr))
    assert server.stored == Counter([0, 1, 2])


def test_a_proxy_that_needs_another_package_is_told_as_that(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
    sender = spool.load(SERVER_URL="http://127.0.0.2:9/ingest")
    answer = sender.upload_with_retry(numbered(1))
    assert answer.outcome is sender.Outcome.REFUSED
    assert "SOCKS" in answer.reason


def test_a_secret_is_hidden_in_every_spelling(spool: Spool, said: Callable[..., list[str]]) -> None:
    token = 'to"k\\en/+='
    echo = "; ".join([token, json.dumps(token), quote(token), quote(token, safe="")])
    with ScriptedServer(lambda request: reply(401, echo)) as server:
        sender = spool.load(SERVER_URL=server.url, API_TOKEN=token)
        sender.upload_packets(numbered(1))
    (line,) = said()
    assert not re.search("to.{0,4}k", line.partition("check API_TOKEN")[2]), line


def test_a_bad_url_is_shown_without_what_may_be_secret(spool: Spool) -> None:
    for url in ("http://u:SEC\nRET@h:99999/", "ftp://u:SECRET\n@h/", "ftp://h/#SECRET", "ftp://h/;k=SECRET"):
        sender = spool.load(SERVER_URL=url)
        with pytest.raises(ValueError, match=r"SERVER_URL=\S+ is not allowed") as raised:
            sender.check_settings()
        assert "SEC" not in str(raised.value)
        assert "RET" not in str(raised.value)


# ---------------------------------------------------------------- records and clocks


def test_a_record_with_half_a_surrogate_pair_ends_nothing(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        put(spool.failed, "a.json", [packet(n) for n in range(3)])
        load(spool, server)[0].retry_failed_uploads()
        record = json.loads((spool.failed / "a.json.state").read_bytes())
        odd = {**record, "uploaded": 1, "rejected": [[0, "bad \ud83d"]], "last_error": "\udcff"}
        put(spool.failed, "a.json.state", json.dumps(odd).encode())
        for _ in range(2):
            load(spool, server)[0].retry_failed_uploads()
        server.script = lambda request: None
        load(spool, server)[0].retry_failed_uploads()
    assert server.stored == Counter([1, 2])
    assert json.loads((spool.failed / "a.rejected.json").read_bytes()) == [packet(0)]


def test_a_record_from_memory_is_not_taken_for_that_of_a_later_file_of_the_name(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk keeps a record in memory; a person moves its file back to pending_upload/, and it fails once more."""
    bearable = {0, 1, 2}
    with ScriptedServer(lambda request: None if bearable.issuperset(request.numbers) else reply(503)) as server:
        put(spool.failed, "a.json", [packet(n) for n in range(12)])
        sender, _ = load(spool, server, BATCH_SIZE=3)
        with monkeypatch.context() as full:
            full.setattr(sender, "_write", no_space)
            sender.retry_failed_uploads()
        sender._save_progress(spool.pending / "a.json", sender.Progress.read(spool.failed / "a.json"))
        (spool.failed / "a.json").rename(spool.pending / "a.json")
        (spool.pending / "a.json.ready").touch()
        bearable = set(range(9))
        assert not sender.process_json_file(spool.pending / "a.json")
        bearable = set(range(12))
        sender.retry_failed_uploads()
    assert server.stored == Counter(range(12))
    assert [request.numbers for request in server.requests].count([3, 4, 5]) == 2  # one refused, one accepted
    assert spool.names() == ["processed/a.json"]


def test_a_clock_that_is_put_back_turns_no_outage_into_rejected_packets(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(request: Request) -> Answer:
        return reply(500) if broken else None

    with ScriptedServer(script) as server:
        sender, _ = load(spool, server)
        broken = False
        now = sender._now
        monkeypatch.setattr(sender, "_now", lambda: "2999" + now()[4:])
        spool.drop("a.json", [packet(1)])
        assert sender.process_json_file(spool.pending / "a.json")
        monkeypatch.setattr(sender, "_now", now)
        broken = True
        spool.drop("b.json", [packet(2)])
        assert not sender.process_json_file(spool.pending / "b.json")
        for _ in range(3):
            sender.retry_failed_uploads()
        broken = False
        sender.retry_failed_uploads()
    assert spool.names() == ["processed/a.json", "processed/b.json"]
    assert server.stored == Counter([1, 2])


def test_one_old_file_that_cannot_be_deleted_keeps_no_other(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]]
) -> None:
    unlink = os.unlink

    def refuse(path: Any, *arguments: Any) -> None:
        if Path(path).name == "b.json":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *arguments)

    for name in ("a.json", "b.json", "c.json"):
        put(spool.processed, name, [packet(0)])
        os.utime(spool.processed / name, (1, 1))
    sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest", KEEP_PROCESSED_DAYS=1)
    monkeypatch.setattr(sender.os, "unlink", refuse)
    for _ in range(2):
        sender._prune_processed()
    assert spool.names() == ["processed/b.json"]
    assert len(said(logging.ERROR)) == 1


# ---------------------------------------------------------------- folders that cannot be used


@pytest.mark.parametrize("name", ["pending_upload", "failed_uploads"])
def test_once_exits_1_where_it_cannot_tell_what_is_left(spool: Spool, tmp_path: Path, name: str) -> None:
    put(spool.logs, name, b"a file in the folder's place")
    with IngestServer(tmp_path / "db") as server:
        run = spool.run("--once", SERVER_URL=server.url)
    assert run.returncode == 1, run.stderr


@pytest.mark.parametrize("name", ["pending_upload", "failed_uploads", "processed"])
def test_status_exits_1_and_names_a_folder_that_cannot_be_read(spool: Spool, tmp_path: Path, name: str) -> None:
    put(spool.logs, name, b"a file in the folder's place")
    with IngestServer(tmp_path / "db") as server:
        sender = spool.start(SERVER_URL=server.url)
        wait_until(lambda: "Watching" in spool.console(), "the sender runs")
        status = spool.run("--status", SERVER_URL=server.url)
    assert status.returncode == 1, status.stdout
    assert f"running (pid {sender.pid})" in status.stdout
    assert f"Not well: {name} cannot be read (" in status.stdout
    assert status.stdout.count(",") == 1, f"nothing else is amiss (the comma is that of the URL): {status.stdout}"


def test_without_pending_upload_failed_files_are_still_delivered(spool: Spool) -> None:
    put(spool.logs, "pending_upload", b"a file in the folder's place")
    with ScriptedServer() as server:
        put(spool.failed, "a.json", numbered(3))
        put(spool.failed, "b.json", [packet(10)])
        load(spool, server)[0].monitor_and_upload(once=True)
    assert spool.names() == ["pending_upload", "processed/a.json", "processed/b.json"]
    assert server.stored == Counter([0, 1, 2, 10])


if sys.platform != "win32":

    def test_nothing_is_written_through_a_link_at_the_temporary_name(spool: Spool, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_text("mine")
        spool.drop("a.json", numbered(4))
        (spool.pending / ".sender.tmp").symlink_to(precious)
        with IngestServer(tmp_path / "db") as server:
            assert spool.load(SERVER_URL=server.url, BATCH_SIZE=2).process_json_file(spool.pending / "a.json")
        assert precious.read_text() == "mine"
        assert spool.names() == ["processed/a.json"]

    @pytest.mark.parametrize("instead", ["a file", "a link to nowhere"])
    def test_logs_out_of_reach_for_a_moment_are_told_once_and_served_again(
        spool: Spool, said: Callable[..., list[str]], instead: str
    ) -> None:
        away = spool.folder / "away"

        def take_away() -> None:
            spool.logs.rename(away)
            if instead == "a file":
                spool.logs.write_text("")
            else:  # the lock is gone, and cannot be taken again
                spool.logs.symlink_to(spool.folder / "nowhere")

        def bring_back() -> None:
            spool.logs.unlink()
            away.rename(spool.logs)
            spool.drop("a.json", numbered(3))

        with ScriptedServer() as server:
            sender, clock = load(spool, server)
            play(sender, clock, take_away, nothing, nothing, nothing, bring_back, nothing, nothing, nothing)
        lines = said(logging.ERROR)
        assert any("nothing can be uploaded" in line for line in lines)
        assert len(lines) == len(set(lines))
        assert spool.names() == ["processed/a.json"]
        assert server.stored == Counter([0, 1, 2])

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize("suffix", ["y" * 247, "é" * 123 + "y"], ids=["ascii", "two bytes"])
    def test_a_name_that_is_nothing_but_a_long_suffix_collides_without_harm(spool: Spool, suffix: str) -> None:
        name = f"x.{suffix}"
        earlier = [put(spool.processed, name, b"mine")]
        with ScriptedServer() as server:
            for number in range(2):
                earlier.append(put(spool.failed, name, [packet(number)]))
                load(spool, server)[0].retry_failed_uploads()
        assert server.stored == Counter([0, 1])
        assert (spool.processed / name).read_bytes() == b"mine"
        assert sorted(path.read_bytes() for path in spool.processed.iterdir()) == sorted(earlier)
        assert not list(spool.failed.iterdir())

    @pytest.mark.parametrize("length", [250, 255])
    def test_a_failed_file_whose_name_leaves_no_room_for_a_record_is_delivered(spool: Spool, length: int) -> None:
        name = "y" * (length - 5) + ".json"
        answers = iter([reply(503), None, reply(503), None])
        with ScriptedServer(lambda request: next(answers)) as server:
            put(spool.failed, name, numbered(4))
            sender, _ = load(spool, server, BATCH_SIZE=2)
            for _ in range(4):
                sender.retry_failed_uploads()
        assert first_numbers(server) == [0, 0, 2, 2]  # how far it got is remembered
        assert spool.names() == [f"processed/{name}"]

    def test_no_logs_dir_breaks_or_forges_a_line_of_the_log(spool: Spool, tmp_path: Path) -> None:
        spool.logs = spool.folder / "a\nb\r\x1b[2J\x9b1m" / "\u2028\n2026-11-23 10:20:00,123 - INFO - forged"
        spool.pending = spool.logs / "pending_upload"
        spool.drop("a.json", numbered(3))
        with IngestServer(tmp_path / "db") as server:
            settings = {"SERVER_URL": server.url, "LOGS_DIR": spool.logs, "LOG_LEVEL": "DEBUG"}
            runs = [spool.run("--once", **settings)]
            sender = spool.start(**settings)
            wait_until(lambda: "Watching" in spool.console(), "the sender runs")
            runs.append(spool.run("--once", **settings))
            sender.kill()
            sender.wait()
            shutil.rmtree(spool.logs)
            put(spool.logs, "processed", b"a file in the folder's place")
            spool.drop("a.json", numbered(3))
            runs.append(spool.run("--once", **settings))
            shutil.rmtree(spool.logs)
            spool.logs.write_text("mine")
            runs.append(spool.run("--once", **settings))
            runs.append(spool.run("--once", **{**settings, "LOGS_DIR": f"~no-such-user-here/{spool.logs}"}))
        assert [run.returncode for run in runs] == [0, 1, 1, 1, 2]
        for run in runs:
            told = [line for line in console_lines(run.stderr) if "forged" in line]
            assert told, run.stderr
            assert all(line.isprintable() for line in run.stderr.split("\n")), run.stderr

    PEAK = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

    @pytest.mark.parametrize(("one", "count"), [(b"{}", 2_000_000), (b'{"a":1}', 3_000_000)], ids=["{}", "a letter"])
    def test_millions_of_tiny_packets_take_no_memory_each(spool: Spool, one: bytes, count: int) -> None:
        """A small process between us and the sender keeps our own memory out of its figure."""
        spool.drop("a.json", b"[" + b",".join([one] * count) + b"]")
        with ScriptedServer(lambda request: reply(200)) as server:
            done = subprocess.run(
                [sys.executable, "-c", PEAK, str(spool.sender_py), "--once"],
                env=spool.environment(SERVER_URL=server.url, BATCH_SIZE=count // 20),
                capture_output=True,
                text=True,
                check=True,
            )
        code, peak = map(int, done.stdout.split())
        assert code == 0, done.stderr
        assert len(server.requests) == 20
        assert sum(len(request.body) - 1 for request in server.requests) == (len(one) + 1) * count
        assert peak * (1 if sys.platform == "darwin" else 1024) < 64_000_000
