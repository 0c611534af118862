"""The next file is read while one is sent: what that must not change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Spool, packet, wait_until
from faults import MoodyServer

Packets = list[dict[str, Any]]
BIG = 2000  # packets: worth being read ahead


def packets_of(first: int) -> Packets:
    return [packet(number, http_path="/" * 600) for number in range(first, first + BIG)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MoodyServer]:
    with MoodyServer(tmp_path / "ingest.sqlite3") as server:
        yield server


@pytest.fixture
def sender(spool: Spool, server: MoodyServer) -> Any:
    return spool.load(SERVER_URL=server.url)


def during_the_first_request(server: MoodyServer, act: Callable[[], object]) -> None:
    """Let `act` happen after the first request has arrived and before it is answered."""
    acts = [act]

    def mood(packets: Packets) -> int:
        if acts:
            acts.pop()()
        return 200

    server.mood = mood


def read_ahead(sender: Any) -> Any:
    """The one file that has been read ahead by now, as a future."""
    wait_until(lambda: any(future.done() for future in sender._ahead.values()), "the next file is read")
    (future,) = sender._ahead.values()
    return future


def as_stored(*files: Packets) -> list[str]:
    return [json.dumps(packet) for packets in files for packet in packets]


def test_the_next_file_is_taken_and_read_while_one_is_being_sent(
    spool: Spool, server: MoodyServer, sender: Any
) -> None:
    for number, name in enumerate(("a.json", "b.json", "c.json")):
        spool.drop(name, packets_of(number * BIG))
    seen: list[object] = []
    during_the_first_request(server, lambda: seen.extend([len(read_ahead(sender).result()), *spool.names()]))
    sender.monitor_and_upload(once=True)
    pending = ["a.json.taken", "b.json.taken", "c.json", "c.json.ready"]
    assert seen == [BIG, *(f"pending_upload/{name}" for name in pending)]
    assert server.packets() == as_stored(packets_of(0), packets_of(BIG), packets_of(2 * BIG))
    assert spool.names() == ["processed/a.json", "processed/b.json", "processed/c.json"]


def rewritten(path: Path, content: str) -> None:
    path.write_text(content)


def replaced(path: Path, content: str) -> None:
    other = path.with_name("other")
    other.write_text(content)
    other.replace(path)


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_a_file_that_changes_after_it_was_read_ahead_is_sent_as_it_is_then(
    spool: Spool, server: MoodyServer, sender: Any, change: Callable[[Path, str], None]
) -> None:
    spool.drop("a.json", packets_of(0))
    spool.drop("b.json", packets_of(BIG))

    def change_it() -> None:
        read_ahead(sender)
        change(spool.pending / "b.json.taken", json.dumps(packets_of(5 * BIG)[:7]))

    during_the_first_request(server, change_it)
    sender.monitor_and_upload(once=True)
    sender.monitor_and_upload(once=True)
    assert server.packets() == as_stored(packets_of(0), packets_of(5 * BIG)[:7])
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_a_damaged_file_that_was_read_ahead_fails_alone(spool: Spool, server: MoodyServer, sender: Any) -> None:
    spool.drop("a.json", packets_of(0))
    damaged = spool.drop("b.json", json.dumps(packets_of(BIG))[:-9])
    spool.drop("c.json", packets_of(2 * BIG))
    during_the_first_request(server, lambda: read_ahead(sender))
    sender.monitor_and_upload(once=True)
    assert server.packets() == as_stored(packets_of(0), packets_of(2 * BIG))
    assert (spool.failed / "b.json").read_bytes() == damaged
    assert "b.json.taken" not in spool.names()


def test_a_stop_closes_what_was_read_ahead_and_the_next_run_delivers_it(
    spool: Spool, server: MoodyServer, sender: Any
) -> None:
    spool.drop("a.json", packets_of(0))
    spool.drop("b.json", packets_of(BIG))
    unused: list[Any] = []

    def stop() -> None:
        unused.append(read_ahead(sender).result())
        sender.stop_sender()

    during_the_first_request(server, stop)
    sender.monitor_and_upload()
    wait_until(lambda: unused[0]._file.closed, "what was read ahead is closed")
    assert not sender._ahead
    assert (spool.pending / "b.json.taken").exists()
    sender.monitor_and_upload(once=True)
    assert server.packets() == as_stored(packets_of(0), packets_of(BIG))
    assert server.repeats == 0
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_a_kill_with_a_file_read_ahead_loses_and_repeats_nothing_of_it(spool: Spool, server: MoodyServer) -> None:
    spool.drop("a.json", packets_of(0))
    spool.drop("b.json", packets_of(BIG))

    def kill() -> None:
        wait_until((spool.pending / "b.json.taken").exists, "the next file is taken")
        process.kill()
        process.wait()

    during_the_first_request(server, kill)
    process = spool.start(SERVER_URL=server.url)
    process.wait(60)
    assert spool.run("--once", SERVER_URL=server.url).returncode == 0
    assert server.packets() == as_stored(packets_of(0), packets_of(BIG))
    assert server.repeats == 1  # the batch that was on its way
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_without_another_thread_files_are_read_one_after_the_other(
    spool: Spool, server: MoodyServer, sender: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(sender, "threading", SimpleNamespace(Thread=refuse))
    spool.drop("a.json", packets_of(0))
    spool.drop("b.json", packets_of(BIG))
    sender.monitor_and_upload(once=True)
    assert server.packets() == as_stored(packets_of(0), packets_of(BIG))
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_files_that_need_only_their_move_are_not_read_at_each_poll(
    spool: Spool, server: MoodyServer, sender: Any
) -> None:
    """Reading them would cost a core, and a file descriptor for each."""
    for number, name in enumerate(("a.json", "b.json", "c.json")):
        spool.drop(name, packets_of(number * BIG))
    spool.processed.parent.mkdir(parents=True, exist_ok=True)
    spool.processed.write_text("a file in the folder's place, so that no move succeeds")
    sender.monitor_and_upload(once=True)
    captures: list[Path] = []

    class Noted(sender.Capture):  # type: ignore[misc]
        def __init__(self, path: Path) -> None:
            captures.append(path)
            super().__init__(path)

    sender.Capture = Noted
    for _ in range(3):
        sender.monitor_and_upload(once=True)
    assert captures == []
    spool.processed.unlink()
    sender.monitor_and_upload(once=True)
    assert spool.names() == ["processed/a.json", "processed/b.json", "processed/c.json"]
    assert server.packets() == as_stored(packets_of(0), packets_of(BIG), packets_of(2 * BIG))
    assert server.repeats == 0
