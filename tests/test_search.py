"""One question: is it this batch, or the server? What the search for the answer finds, leaves alone and costs."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Said, Spool, capture
from servers import Answer, Clock, IngestApp, Request, ScriptedServer, close, reply, reset, too_late

TIMEOUT = 5.0  # seconds of the sender's clock
ANSWERED = (400, 403, 404, 406, 413, 415, 422, 500, 501)
UNANSWERED = (408, 502, 504, "reset", "closed", "time-out")


pytestmark = pytest.mark.usefixtures("fast_disk")


def then_lost(*answers: Answer) -> Callable[[Request], Answer]:
    """A server that gives these answers to the first requests, and takes what comes after."""
    return lambda request: answers[request.number] if request.number < len(answers) else None


class Sensor:
    """A spool, its sender.py as a fresh module (which is what a restart is), its clock, and a server with a script."""

    def __init__(self, spool: Spool, server: ScriptedServer, **settings: object) -> None:
        self.spool, self.server = spool, server
        self.settings = {"SERVER_URL": server.url, "REQUEST_TIMEOUT": TIMEOUT, "RETRY_DELAY": 1, **settings}
        self.restart()

    def restart(self) -> None:
        self.sender = self.spool.load(**self.settings)
        self.clock = Clock(self.sender)

    def answer(self, what: int | str) -> Answer:
        words = {"reset": reset, "closed": close}
        if what == "time-out":
            return too_late(self.clock, TIMEOUT)
        return words[what] if isinstance(what, str) else reply(what, {"detail": f"no\nsuch luck: {what}"})

    def refuse(self, what: int | str, bad: set[int]) -> None:
        """From now on the server answers so to every batch with one of these packets."""
        self.server.script = lambda request: self.answer(what) if bad & set(request.numbers) else None

    def new(self, name: str, packets: list[dict[str, Any]]) -> bool:
        self.spool.drop(name, packets)
        return bool(self.sender.process_json_file(self.spool.pending / name))

    def sweep(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.move(300)
            self.sender.retry_failed_uploads()

    def record(self, name: str = "a.json") -> dict[str, Any]:
        record = json.loads((self.spool.failed / f"{name}.state").read_bytes())
        assert isinstance(record, dict)
        return record


@pytest.mark.parametrize("where", [0, 1, 499, 777, 999])
@pytest.mark.parametrize("what", [*ANSWERED, *UNANSWERED])
def test_one_bad_packet_among_1000_costs_40_requests_at_most(spool: Spool, what: int | str, where: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        sensor.refuse(what, {where})
        content = json.dumps(capture(1000)).encode()
        assert not sensor.new("a.json", capture(1000))
        sensor.sweep(2)
        assert len(server.requests) <= 40
        assert server.stored == Counter(set(range(1000)) - {where})
    assert sensor.record()["refused"] == [where]
    assert (spool.failed / "a.json").read_bytes() == content


@pytest.mark.parametrize("what", ANSWERED)
def test_an_answered_failure_is_searched_at_once_and_without_waiting(spool: Spool, what: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        sensor.refuse(what, {5})
        assert not sensor.new("a.json", capture(20))
    assert sensor.clock.slept == 0
    assert server.stored == Counter(set(range(20)) - {5})


@pytest.mark.parametrize("what", UNANSWERED)
def test_an_unanswered_batch_is_searched_after_a_round_and_a_sweep(spool: Spool, what: int | str) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        sensor.refuse(what, {5})
        assert not sensor.new("a.json", capture(20))
        assert [len(request.packets) for request in server.requests] == [20] * 3
        sensor.restart()
        sensor.refuse(what, {5})
        sensor.sweep()
        sizes = [len(request.packets) for request in server.requests]
        assert sizes[:5] == [20] * 4 + [1]
        assert len({request.key for request in server.requests[:4]}) == 1
    assert server.stored == Counter(set(range(20)) - {5})


def test_a_batch_that_was_stored_but_not_answered_is_not_stored_again_by_a_server_that_knows_keys(spool: Spool) -> None:
    """Each time-out but the last attempt's is forgiven: the repeat has the same bytes and the same key."""
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        lost = iter([True, True, True])

        def script(request: Request) -> Answer:
            if next(lost, False):
                server.stored.update(request.numbers if request.key not in keys else ())
                keys.add(request.key)
                return close
            return reply(200) if request.key in keys else None

        keys: set[str] = set()
        server.script = script
        assert not sensor.new("a.json", capture(20))
        sensor.restart()
        sensor.sweep()
        assert server.stored == Counter(range(20))
    assert "processed/a.json" in spool.names()


@pytest.mark.slow
@pytest.mark.parametrize("what", ANSWERED)
def test_a_bad_packet_in_every_file_from_the_first_day_holds_up_no_other(spool: Spool, what: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        bad = {100 * file + 17 for file in range(12)}
        sensor.refuse(what, bad)
        for file in range(12):
            assert not sensor.new(f"{file:02}.json", capture(100, start=100 * file))
        assert server.stored == Counter(set(range(1200)) - bad)
        assert len(server.requests) <= 12 * 40
    assert sensor.clock.slept == 0


def test_a_reset_in_every_file_is_waited_for_no_more_once_a_search_has_found_a_packet(spool: Spool) -> None:
    """It may be the server at first; after that, a sniffer that writes on must be kept pace with."""
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        bad = {100 * file + 17 for file in range(8)}
        sensor.refuse("reset", bad)
        assert not sensor.new("0.json", capture(100))
        assert sensor.clock.slept > 2
        sensor.sweep()
        slept = sensor.clock.slept
        for file in range(1, 8):
            assert not sensor.new(f"{file}.json", capture(100, start=100 * file))
        assert sensor.clock.slept == slept
        sensor.sweep()
        assert server.stored == Counter(set(range(800)) - bad)


@pytest.mark.parametrize("then", [400, 500])
def test_an_error_after_a_lost_answer_cuts_no_batch_anew(spool: Spool, then: int) -> None:
    """The server has stored the batch; only under its old key can it tell."""
    with ScriptedServer(then_lost(reset, reply(then))) as server:
        assert Sensor(spool, server).new("a.json", capture(10))
    assert len({request.key for request in server.requests}) == 1
    assert server.stored == Counter(range(10))


@pytest.mark.parametrize("what", [400, 413, 422])
def test_everything_refused_costs_five_requests_a_file_and_round(spool: Spool, what: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        sensor.refuse(what, set(range(100)))
        assert not sensor.new("a.json", capture(100))
        for _ in range(4):
            assert len(server.requests) <= 5
            assert sensor.record()["refused"] == []
            server.requests.clear()
            sensor.sweep()
        server.script = lambda request: None
        sensor.sweep()
        assert server.stored == Counter(range(100))
    assert spool.names() == ["processed/a.json"]


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_an_outage_of_500_costs_a_new_file_max_retries_and_4_a_sweep_15(spool: Spool, attempts: int) -> None:
    with ScriptedServer(lambda request: reply(500)) as server:
        sensor = Sensor(spool, server, MAX_RETRIES=attempts)
        for file in range(6):
            assert not sensor.new(f"{file}.json", capture(100, start=100 * file))
            assert len(server.requests) <= attempts + 4
            server.requests.clear()
        sensor.sweep()
        assert len(server.requests) <= 15
        server.script = lambda request: None
        sensor.sweep()
        assert server.stored == Counter(range(600))


def test_a_wrong_token_costs_one_request_a_file(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(401)) as server:
        sensor = Sensor(spool, server)
        assert not sensor.new("a.json", capture(100))
    assert (len(server.requests), sensor.clock.slept) == (1, 0)


@pytest.mark.parametrize("run", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("what", [400, 500, "reset"])
def test_no_run_of_bad_packets_blocks_its_file_for_ever(spool: Spool, run: int, what: int | str) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        bad = set(range(10, 10 + run))
        sensor.refuse(what, bad)
        assert not sensor.new("a.json", capture(40))
        for file in range(14):
            sensor.new(f"new{file}.json", capture(2, start=1000 + 2 * file))
            sensor.sweep()
        assert set(server.stored) >= set(range(40)) - bad
        assert max(server.stored.values()) == 1
    assert sensor.record()["refused"] == sorted(bad)


@pytest.mark.parametrize("what", [400, 500])
def test_a_mended_server_gets_just_the_refused_packets_under_their_keys(spool: Spool, said: Said, what: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server, BATCH_SIZE=30)
        sensor.refuse(what, {7, 55, 56})
        assert not sensor.new("a.json", capture(100))
        content = (spool.failed / "a.json").read_bytes()
        record = sensor.record()
        assert (record["uploaded"], record["packets"], record["refused"]) == (100, 100, [7, 55, 56])
        assert str(what) in record["last_error"]
        keys = {request.numbers[0]: request.key for request in server.requests if len(request.numbers) == 1}
        waiting: set[int] = {7, 55, 56}
        for still in ({55, 56}, {56}, set[int]()):
            sensor.restart()
            server.requests.clear()
            sensor.refuse(what, still)
            sensor.sweep()
            assert [request.numbers for request in server.requests] == [[number] for number in sorted(waiting)]
            assert all(request.key == keys[request.numbers[0]] for request in server.requests)
            waiting = still
        assert server.stored == Counter(range(100))
    assert spool.names() == ["processed/a.json"]
    assert (spool.processed / "a.json").read_bytes() == content


# ---------------------------------------------------------------- the size


@pytest.mark.parametrize("what", [413, 500, 504, "reset"])
def test_where_every_piece_passes_later_files_keep_the_size(spool: Spool, said: Said, what: int | str) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        server.script = lambda request: sensor.answer(what) if len(request.packets) > 300 else None
        sensor.new("a.json", capture(2000))
        sensor.sweep(4)  # where there was no answer, each larger size that is tried takes a round and a sweep
        assert "processed/a.json" in spool.names()
        assert any("BATCH_SIZE" in line for line in said(logging.WARNING))
        first = len(server.requests)
        assert sensor.new("b.json", capture(200, start=5000))
        assert len(server.requests) == first + 1
        assert set(server.stored.values()) == {1}
    assert 150 <= sensor.sender._server.limit <= 300


def test_a_permanent_limit_once_found_costs_one_refused_request_in_fifty(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(413) if len(request.packets) > 10 else None) as server:
        sensor = Sensor(spool, server, BATCH_SIZE=16)
        assert sensor.new("a.json", capture(100))
        found = len(server.requests)
        for file in range(10):
            assert sensor.new(f"b{file}.json", capture(160, start=1000 + 160 * file))
        refused = [request for request in server.requests[found:] if len(request.packets) > 10]
        assert 2 <= len(refused) <= (len(server.requests) - found) / 50 + 1
        assert set(server.stored.values()) == {1}


def test_a_limit_is_told_once_a_file(spool: Spool, said: Said) -> None:
    with ScriptedServer(lambda request: reply(413) if len(request.packets) > 10 else None) as server:
        sensor = Sensor(spool, server, BATCH_SIZE=16)
        assert sensor.new("a.json", capture(2000))
    assert sum("BATCH_SIZE" in line for line in said(logging.WARNING)) == 1


def test_one_transient_500_on_a_tiny_file_makes_no_large_file_slow(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(500) if request.number == 0 else None) as server:
        sensor = Sensor(spool, server)
        assert sensor.new("a.json", capture(3))
        before = len(server.requests)
        assert sensor.new("b.json", capture(10_000, start=100))
        assert len(server.requests) - before <= 25


def test_the_size_carries_over_to_files_that_are_taken_afresh_and_not_to_one_found_taken(spool: Spool) -> None:
    """The batch of the latter may have been stored, and must go out again as it was."""
    with ScriptedServer() as server:
        sensor = Sensor(spool, server, BATCH_SIZE=40)
        spool.drop("b.json", capture(100, start=1000))
        (spool.pending / "b.json").rename(spool.pending / "b.json.taken")
        (spool.pending / "b.json.ready").unlink()
        server.script = lambda request: reply(413) if len(request.packets) > 10 else None
        assert sensor.new("a.json", capture(100))
        server.script = lambda request: None
        server.requests.clear()
        assert sensor.sender.process_json_file(spool.pending / "b.json")
        assert len(server.requests[0].packets) == 40
        server.requests.clear()
        assert sensor.new("c.json", capture(15, start=3000))
        assert len(server.requests) >= 1


def test_half_of_the_requests_answered_500_loses_and_refuses_no_packet_for_good(spool: Spool) -> None:
    chance = random.Random(4711)
    with ScriptedServer(lambda request: reply(500) if chance.random() < 0.5 else None) as server:
        sensor = Sensor(spool, server)
        for file in range(60):
            sensor.new(f"{file:02}.json", capture(4, start=10 * file))
        server.script = lambda request: None
        for _ in range(4):
            sensor.clock.move(3600)
            sensor.sweep()
        assert len(server.stored) == 240
        assert max(server.stored.values()) == 1
    assert all(name.startswith("processed/") for name in spool.names())


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize("what", [422, 500])
def test_a_search_is_told_in_three_lines(spool: Spool, said: Said, what: int) -> None:
    with ScriptedServer() as server:
        sensor = Sensor(spool, server)
        sensor.refuse(what, {777})
        assert not sensor.new("a.json", capture(1000))
    lines = [line for line in said(logging.INFO) if "a.json" in line]
    assert len(lines) == 3, lines
    searched, found, moved = lines
    assert f"Server error: {what}" in searched
    assert "777" in found
    assert "moved to failed_uploads/" in moved
    assert not any("The server is back after" in line for line in said()), "that line is for a server that was away"


def test_a_bad_packet_in_front_of_the_real_stack_is_found(spool: Spool, tmp_path: Path) -> None:
    with IngestApp(tmp_path, poison=500) as app:
        packets = capture(100)
        packets[42]["http_path"] = "/poison"
        spool.drop("a.json", packets)
        sender = spool.load(SERVER_URL=app.url)
        assert not sender.process_json_file(spool.pending / "a.json")
        assert app.stored() == Counter(set(range(100)) - {42})
    assert json.loads((spool.failed / "a.json.state").read_bytes())["refused"] == [42]
