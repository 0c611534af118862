"""The sweeps over failed_uploads/: when they come, in which order, and what ends them."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Note, Said, Spool, capture, packet
from servers import TIMEOUT, Answer, Clock, Request, ScriptedServer, close, load, play, reply, reset, too_late

pytestmark = pytest.mark.usefixtures("fast_disk")


def put(spool: Spool, name: str, packets: list[dict[str, Any]]) -> bytes:
    """A file that a person put into failed_uploads/."""
    spool.failed.mkdir(parents=True, exist_ok=True)
    (spool.failed / name).write_bytes(json.dumps(packets).encode())
    return (spool.failed / name).read_bytes()


def first_numbers(server: ScriptedServer, since: int = 0) -> list[int]:
    """The first packet of each request: which file, or which place, it came from."""
    return [request.numbers[0] for request in server.requests[since:]]


def fail_all(spool: Spool, server: ScriptedServer, sender: Any, *names: str) -> None:
    """Let the named files fail one after the other: file number n has the packets 100 n, 100 n + 1."""
    script, server.script = server.script, lambda request: reply(503)
    for number, name in enumerate(names):
        spool.drop(name, capture(2, start=100 * number))
        assert not sender.process_json_file(spool.pending / name)
    server.script = script
    server.requests.clear()


def tried(server: ScriptedServer) -> list[int]:
    """The files that were tried, by number, whatever each cost in requests."""
    files = [file for file, _ in itertools.groupby(number // 100 for number in first_numbers(server))]
    server.requests.clear()
    return files


@pytest.mark.parametrize("restarts", [False, True])
def test_the_least_recently_tried_file_comes_first(spool: Spool, restarts: bool) -> None:
    with ScriptedServer(lambda request: reply(500)) as server:
        sender, _ = load(spool, server, MAX_RETRIES=1)
        fail_all(spool, server, sender, "e.json", "a.json", "d.json", "b.json", "c.json")
        found = []
        for _ in range(4):
            if restarts:
                sender, _ = load(spool, server)
            sender.retry_failed_uploads()
            found.append(tried(server))
    assert found == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_a_file_that_was_never_tried_comes_before_all_others(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(500)) as server:
        sender, _ = load(spool, server, MAX_RETRIES=1)
        fail_all(spool, server, sender, "a.json", "b.json")
        put(spool, "z put here by hand", capture(2, start=900))
        sender.retry_failed_uploads()
        assert tried(server) == [9, 0, 1]


ENDS_AT_ONCE = (409, 425, 429, 503, 301, 307, 401)  # busy, or misconfigured


@pytest.mark.parametrize("status", ENDS_AT_ONCE)
def test_a_sweep_ends_at_once_where_the_server_is_the_trouble(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        for number in range(5):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server)
        sender.retry_failed_uploads()
        assert (tried(server), clock.slept) == ([0], 0)
        sender.retry_failed_uploads()
        assert tried(server) == [1]
    assert {f"failed_uploads/{number}.json" for number in range(5)} <= set(spool.names())


OTHER_TROUBLE: dict[str, Callable[[Clock], Answer]] = {
    **{str(status): lambda clock, status=status: reply(status) for status in (400, 403, 408, 413, 500, 502, 504)},  # type: ignore[misc]
    "time-out": lambda clock: too_late(clock, TIMEOUT),
    "closed": lambda clock: close,
    "reset": lambda clock: reset,
}


@pytest.mark.parametrize("answer", OTHER_TROUBLE.values(), ids=OTHER_TROUBLE.keys())
def test_other_trouble_ends_a_sweep_after_three_files(spool: Spool, answer: Callable[[Clock], Answer]) -> None:
    with ScriptedServer(lambda request: answer(clock)) as server:
        for number in range(8):
            put(spool, f"{number}.json", capture(20, start=100 * number))
        sender, clock = load(spool, server)
        for turn in ([0, 1, 2], [3, 4, 5], [6, 7, 0]):
            sender.retry_failed_uploads()
            assert len(server.requests) <= 15
            assert (tried(server), clock.slept) == (turn, 0)


@pytest.mark.parametrize("status", [400, 500])
def test_bad_files_hold_up_no_good_ones_while_the_server_accepts_anything(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status) if 0 < request.numbers[0] < 4000 else None) as server:
        for number in range(80):
            put(spool, f"{number:02}.json", capture(4, start=100 * number))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
    assert sum(name.startswith("processed/") for name in spool.names()) == 41


def test_a_busy_server_is_asked_again_when_its_retry_after_is_over(spool: Spool) -> None:
    """A rate limit: its backlog drains at its rate, also while new files keep coming."""
    last = [0.0]

    def limited(request: Request) -> Answer:
        if clock.now - last[0] < 0.5:
            return reply(429, "", "Retry-After: 1")
        last[0] = clock.now
        return None

    with ScriptedServer(limited) as server:
        for number in range(30):
            put(spool, f"{number:02}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server, POLL_INTERVAL=0.25)
        end = clock.now + 60

        def produce() -> None:
            if clock.now > end:
                sender.stop_sender()
            elif (number := int(clock.now - end + 60) // 5) < 12:
                name = f"n{number:02}.json"
                if not any(name in path for path in spool.names()):
                    spool.drop(name, capture(2, start=10_000 + 100 * number))

        clock.at_sleep = produce
        sender.monitor_and_upload()
    assert sum(name.startswith("processed/") for name in spool.names()) >= 30 + 11


@pytest.mark.parametrize("status", [302, 400, 500])
def test_a_retry_after_of_a_server_that_is_not_busy_brings_no_sweep_forward(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status, "", "Retry-After: 1")) as server:
        for number in range(4):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server, POLL_INTERVAL=1)
        play(sender, clock, *[lambda: None] * 40)
        assert len(server.requests) <= 15


@pytest.mark.parametrize("status", [400, 422])
def test_a_file_that_is_rejected_does_not_end_the_sweep(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status) if request.numbers[0] < 100 else None) as server:
        for number in range(4):
            put(spool, f"{number}.json", capture(5, start=100 * number))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
    assert [name for name in spool.names() if "processed" in name] == [
        f"processed/{number}.json" for number in (1, 2, 3)
    ]


def test_an_unreadable_file_does_not_end_the_sweep_and_is_not_counted(spool: Spool, said: Said) -> None:
    with ScriptedServer() as server:
        spool.drop("a.json", "[{]")
        sender, _ = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.json")
        put(spool, "b.json", capture(2))
        before = len(said())
        sender.retry_failed_uploads()
        assert any("Retrying 1 failed upload" in line for line in said()[before:])
        assert not any("a.json" in line for line in said()[before:])
        before = len(said())
        sender.retry_failed_uploads()
        assert said()[before:] == []
    assert server.stored == Counter(range(2))


def test_each_file_gets_one_attempt_per_sweep_and_no_wait(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(500)) as server:
        for number in range(2):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server, MAX_RETRIES=5)
        for _ in range(4):
            sender.retry_failed_uploads()
        assert tried(server) == [0, 1] * 4
        assert clock.slept == 0


def test_refused_packets_are_tried_at_the_start_when_it_is_back_and_once_an_hour(
    spool: Spool,
) -> None:
    with ScriptedServer(lambda request: reply(422) if 3 in request.numbers else None) as server:
        spool.drop("a.json", capture(10))
        sender, clock = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.requests.clear()

        def alone() -> int:
            """How often packet 3 has been asked for, always alone, since the last time."""
            asked = [request.numbers for request in server.requests if 3 in request.numbers]
            server.requests.clear()
            assert asked == [[3]] * len(asked)
            return len(asked)

        for hours in (0, 0.5, 1, 1.5, 2):
            clock.now = 1_800_000_000 + 3600 * hours
            sender.retry_failed_uploads()
            assert alone() == (hours in (0, 1, 2)), hours
        server.script = lambda request: reply(503) if request.number == 0 else reply(422)
        sender.upload_with_retry([packet(99)])
        server.script = lambda request: reply(422) if 3 in request.numbers else None
        assert sender.upload_packets([packet(100)])
        server.requests.clear()
        sender.retry_failed_uploads()
        assert alone() == 1, "the server is back"


def test_refused_packets_do_not_prolong_an_outage(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(422) if any(n % 100 == 3 for n in request.numbers) else None) as server:
        sender, _ = load(spool, server)
        for number in range(20):
            spool.drop(f"{number}.json", capture(5, start=100 * number))
            assert not sender.process_json_file(spool.pending / f"{number}.json")
        server.script = lambda request: reply(500)
        for _ in range(3):
            server.requests.clear()
            sender, _ = load(spool, server)
            sender.retry_failed_uploads()
            assert len(server.requests) == 3
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert server.stored == Counter(100 * number + packet for number in range(20) for packet in range(5))


def test_the_log_says_how_many_are_retried(spool: Spool, said: Said) -> None:
    with ScriptedServer() as server:
        for number in range(3):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
        assert any("Retrying 3 failed uploads..." in line for line in said(logging.INFO))
        before = len(said())
        sender.retry_failed_uploads()
    assert said()[before:] == [], "an empty sweep is silent"


@pytest.mark.parametrize(
    ("outage", "most"),
    [("refused", 1), ("reset", 3), ("503", 1), ("500", 15), ("400", 15), ("401", 1), ("time-out", 3)],
)
def test_200_failed_files_cost_a_few_requests_a_sweep(
    spool: Spool, said: Said, record_property: Note, outage: str, most: int
) -> None:
    with ScriptedServer(listening=outage != "refused") as server:
        for number in range(200):
            put(spool, f"{number:03}.json", capture(20, start=100 * number))
        sender, clock = load(spool, server)
        server.script = lambda request: (
            reset if outage == "reset" else too_late(clock, TIMEOUT) if outage == "time-out" else reply(int(outage))
        )
        costs = []
        for _ in range(5):
            before = len(said(logging.WARNING))
            sender.retry_failed_uploads()
            failures = [line for line in said(logging.WARNING)[before:] if "failed_uploads" in line]
            costs.append(len(server.requests) or len(failures))
            server.requests.clear()
    record_property(f"requests per sweep with 200 failed files, outage by {outage}", max(costs))
    assert 1 <= max(costs) <= most
    assert len([name for name in spool.names() if name.endswith(".json")]) == 200


BAD: dict[str, Callable[[Clock], Answer]] = {
    "times out": lambda clock: too_late(clock, TIMEOUT),
    "is answered 500": lambda clock: reply(500),
    "is answered 503": lambda clock: reply(503),
    "is answered 401": lambda clock: reply(401),
    "breaks the connection": lambda clock: reset,
}


def test_new_ready_files_are_taken_in_the_order_of_their_names(spool: Spool) -> None:
    with ScriptedServer() as server:
        for name in ("c.json", "a.json", "d.json", "b.json"):
            spool.drop(name, capture(2, start=100 * (ord(name[0]) - ord("a"))))
        sender, clock = load(spool, server)
        play(sender, clock)
        assert tried(server) == [0, 1, 2, 3]


def test_failed_files_are_swept_at_once_when_the_server_is_back(spool: Spool, said: Said) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        sender, clock = load(spool, server, MAX_RETRIES=1, POLL_INTERVAL=0.25, RETRY_FAILED_INTERVAL=100_000)

        def back() -> None:
            assert "failed_uploads/b.json" in spool.names()
            server.script = lambda request: None
            spool.drop("c.json", capture(2, start=200))

        def nothing() -> None:
            pass

        play(
            sender, clock,
            lambda: spool.drop("a.json", capture(2)),
            lambda: spool.drop("b.json", capture(2, start=100)),
            nothing,
            back,
            nothing,
            nothing,
        )  # fmt: skip
        assert clock.slept < 3
    assert spool.names() == ["processed/a.json", "processed/b.json", "processed/c.json"]
    assert first_numbers(server)[-3:] == [200, 0, 100]
    assert ["Retrying" in line and "failed upload" in line for line in said()].count(True) == 1


@pytest.mark.parametrize("what", ["time-out", "reset", "500"])
def test_a_bad_file_does_not_cost_a_sweep_beside_each_new_file(spool: Spool, what: str) -> None:
    """It would cost the time-out of a request each time, and the sensor would not keep pace."""
    with ScriptedServer() as server:
        sender, clock = load(spool, server, MAX_RETRIES=1, POLL_INTERVAL=0.25, RETRY_FAILED_INTERVAL=100_000)
        bad = too_late(clock, TIMEOUT) if what == "time-out" else reset if what == "reset" else reply(500)
        server.script = lambda request: bad if request.numbers[0] < 100 else None
        spool.drop("a.json", capture(1))
        new = [
            lambda number=number: spool.drop(f"n{number}.json", capture(2, start=100 * number))
            for number in range(1, 20)
        ]
        play(sender, clock, *new)
    assert sum(number < 100 for number in first_numbers(server)) <= 8
    assert len([number for number in server.stored if number >= 100]) >= 36


@pytest.mark.parametrize("answer", [reply(503), reply(429)], ids=["503", "429"])
def test_failed_files_are_swept_at_once_each_time_the_server_is_back(spool: Spool, answer: Answer) -> None:
    """It comes back, goes away again while the failed files are swept, and comes back for good."""
    with ScriptedServer(lambda request: answer) as server:
        sender, clock = load(spool, server, MAX_RETRIES=1, POLL_INTERVAL=0.25, RETRY_FAILED_INTERVAL=100_000)

        def back_for_one_request() -> None:
            server.script = lambda request: None if request.numbers[0] == 100 else answer
            spool.drop("b.json", capture(2, start=100))

        def back() -> None:
            assert "failed_uploads/a.json" in spool.names()
            server.script = lambda request: None
            spool.drop("c.json", capture(2, start=200))

        play(
            sender,
            clock,
            lambda: spool.drop("a.json", capture(2)),
            back_for_one_request,
            lambda: None,
            back,
            lambda: None,
        )
        assert clock.slept < 3
    assert tried(server) == [0, 1, 0, 2, 0]
    assert spool.names() == ["processed/a.json", "processed/b.json", "processed/c.json"]


def test_a_file_that_always_times_out_does_not_cost_a_time_out_beside_each_new_file(spool: Spool) -> None:
    with ScriptedServer() as server:
        sender, clock = load(spool, server, MAX_RETRIES=1, POLL_INTERVAL=0.5, RETRY_FAILED_INTERVAL=100_000)
        server.script = lambda request: too_late(clock, TIMEOUT) if request.numbers[0] == 0 else None
        spool.drop("bad.json", capture(2))
        numbers = iter(range(1, 31))
        drop_next = lambda: spool.drop(f"{(number := next(numbers))}.json", capture(2, start=100 * number))  # noqa: E731
        play(sender, clock, *[drop_next] * 30)
        files = tried(server)
    assert files.count(0) <= 3
    assert set(files) == set(range(31))


def test_a_sweep_runs_at_start_and_then_every_interval(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        put(spool, "a.json", capture(2))
        sender, clock = load(spool, server, POLL_INTERVAL=0.5, RETRY_FAILED_INTERVAL=30)
        moments: list[float] = []
        server.script = lambda request: moments.append(clock.slept) or reply(503)  # type: ignore[func-returns-value]
        play(sender, clock, *[lambda: None] * 300)
    assert moments[0] == 0
    assert len(moments) == 6
    for before, after in zip(moments, moments[1:]):
        assert 30 <= after - before <= 31


@pytest.mark.parametrize("name", ["x.json", "no suffix", "a.bak.json", "ü ✓.json", "a.rejected.txt", "%s.json"])
def test_every_data_file_in_failed_uploads_is_swept_whatever_its_name(spool: Spool, name: str) -> None:
    with ScriptedServer() as server:
        content = put(spool, name, capture(2))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
    assert server.stored == Counter(range(2))
    assert (spool.processed / name).read_bytes() == content


@pytest.mark.parametrize("name", ["a.json~", ".a.json.swp", "a.json.bak", "a.json.tmp", "a.json.ready", "a.json.state"])
def test_what_editors_and_the_program_itself_leave_is_no_data(spool: Spool, name: str) -> None:
    with ScriptedServer() as server:
        content = put(spool, name, capture(2))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
    assert not server.requests
    assert (spool.failed / name).read_bytes() == content


def test_without_pending_upload_failed_files_are_still_delivered(spool: Spool) -> None:
    spool.logs.mkdir()
    (spool.logs / "pending_upload").write_text("a file in the folder's place")
    with ScriptedServer() as server:
        put(spool, "a.json", capture(3))
        put(spool, "b.json", [packet(10)])
        load(spool, server)[0].monitor_and_upload(once=True)
    assert spool.names() == ["pending_upload", "processed/a.json", "processed/b.json"]
    assert server.stored == Counter([0, 1, 2, 10])
