"""Batches: their size by the pace of the answers, and the same batch under the same key after any accident."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Spool, packet
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Answer, Clock, IngestApp, Request, Script, ScriptedServer, close, reply, reset, say, too_late

Said = Callable[..., list[str]]
Note = Callable[[str, object], None]
TIMEOUT = 5.0  # seconds of the sender's clock


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power cut happens here, and thousands of fsyncs take their time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def capture(count: int, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [packet(start + number, **fields) for number in range(count)]


def load(spool: Spool, server: ScriptedServer, **settings: object) -> tuple[Any, Clock]:
    """The spool's sender.py as a fresh module, which is what a restart is, and its clock."""
    sender = spool.load(**{"SERVER_URL": server.url, "REQUEST_TIMEOUT": TIMEOUT, "RETRY_DELAY": 1, **settings})
    return sender, Clock(sender)


def play(sender: Any, clock: Clock, *steps: Callable[[], object]) -> None:
    """Run monitor_and_upload(). Each time it would wait for its next poll, a step is done; in the end it is stopped."""
    left = iter(steps)

    def turn() -> None:
        step = next(left, sender.stop_sender)
        step()

    clock.at_sleep = turn
    sender.monitor_and_upload()


# ---------------------------------------------------------------- the pace


def test_batches_never_cross_files_and_are_never_merged(spool: Spool) -> None:
    counts = [3, 1, 8, 2, 9]
    with ScriptedServer() as server:
        sender, clock = load(spool, server, BATCH_SIZE=4)
        for number, count in enumerate(counts):
            spool.drop(f"{number}.json", capture(count, start=100 * number))
        play(sender, clock)
    assert server.sizes == [3, 1, 4, 4, 2, 4, 4, 1]
    assert all(len({number // 100 for number in request.numbers}) == 1 for request in server.requests)


def slow(clock: Callable[[], Clock], seconds_per_packet: float) -> Script:
    """A server with a pace, which stores a batch only if it can answer in time."""

    def script(request: Request) -> Answer:
        seconds = seconds_per_packet * len(request.packets)
        if seconds >= TIMEOUT:
            return too_late(clock(), TIMEOUT)
        clock().move(seconds)
        return None

    return script


@pytest.mark.parametrize(("share", "halved"), [(0.45, False), (0.55, True), (0.95, True)])
def test_an_answer_later_than_half_of_the_time_out_halves_the_next_batch_before_anything_times_out(
    spool: Spool, said: Said, share: float, halved: bool
) -> None:
    with ScriptedServer() as server:
        spool.drop("a.json", capture(1000))
        sender, clock = load(spool, server, BATCH_SIZE=100)
        server.script = slow(lambda: clock, share * TIMEOUT / 100)
        assert sender.process_json_file(spool.pending / "a.json")
    assert server.sizes[0] == 100
    assert server.sizes[1] == (50 if halved else 100)
    for size in server.sizes[1:]:
        assert size * share * TIMEOUT / 100 <= TIMEOUT / 2 + 1e-6, "at the pace known by then, never late again"
    assert server.stored == Counter(range(1000))
    assert said(logging.WARNING) == []


def test_the_size_grows_only_as_far_as_the_pace_allows_and_back_when_the_server_is_fast_again(spool: Spool) -> None:
    with ScriptedServer() as server:
        sender, clock = load(spool, server, BATCH_SIZE=100)
        server.script = slow(lambda: clock, 0.09)  # 100 packets would take 9 seconds, 27 take half of the time-out
        spool.drop("a.json", capture(500))
        answer = sender.process_json_file(spool.pending / "a.json")
        while not answer and "processed/a.json" not in spool.names():
            sender.retry_failed_uploads()
        accepted = [size for size in server.sizes if size * 0.09 < TIMEOUT]
        assert accepted[0] == 1, "the search begins with a packet alone, then come its halves"
        assert max(accepted[3:]) <= 27
        assert min(accepted[3:-1]) >= 20, "nor does it stay needlessly small"
        server.script = lambda request: None
        spool.drop("b.json", capture(500, start=1000))
        before = len(server.requests)
        assert sender.process_json_file(spool.pending / "b.json")
    assert max(server.sizes[before:]) == 100
    assert server.repeats == 0


def test_a_single_packet_that_takes_long_is_still_delivered(spool: Spool, said: Said) -> None:
    with ScriptedServer() as server:
        sender, clock = load(spool, server, BATCH_SIZE=8)
        server.script = slow(lambda: clock, 0.9 * TIMEOUT)
        spool.drop("a.json", capture(4))
        sender.process_json_file(spool.pending / "a.json")
        for _ in range(8):
            sender.retry_failed_uploads()
    assert server.stored == Counter(range(4))
    assert spool.names() == ["processed/a.json"]


# ---------------------------------------------------------------- after an accident


def crash_image(spool: Spool, folder: Path) -> Spool:
    """The spool as a crash at this moment would leave it, in a folder of its own."""
    folder.mkdir()
    image = Spool(folder)
    shutil.copytree(spool.logs, image.logs)
    return image


def halving_by_time_out(clock: Clock, request: Request) -> Answer:
    return too_late(clock, TIMEOUT) if len(request.packets) > 5 else None


def halving_by_413(clock: Clock, request: Request) -> Answer:
    return reply(413) if len(request.packets) > 5 else None


def halving_by_pace(clock: Clock, request: Request) -> Answer:
    clock.move(0.08 * TIMEOUT * len(request.packets))
    return None


def isolating(clock: Clock, request: Request) -> Answer:
    return reply(422, "no") if {3, 4, 15} & set(request.numbers) else None


@pytest.mark.parametrize("mood", [halving_by_time_out, halving_by_413, halving_by_pace, isolating])
@pytest.mark.parametrize("was_stored", [False, True], ids=["batch lost", "batch stored"])
def test_a_crash_during_any_request_sends_that_very_batch_again_and_loses_and_repeats_nothing(
    spool: Spool, tmp_path: Path, mood: Callable[[Clock, Request], Answer], was_stored: bool
) -> None:
    images: list[tuple[Spool, Counter[int], set[str]]] = []

    def script(request: Request) -> Answer:
        answer = mood(clock, request)
        images.append((crash_image(spool, tmp_path / f"crash{len(images)}"), server.stored.copy(), set(server.keys)))
        if was_stored and answer is None:
            images[-1][1].update(set(request.numbers) if request.key not in server.keys else ())
            images[-1][2].add(request.key)
        return answer

    with ScriptedServer(script) as server:
        for name, start in (("a.json", 0), ("b.json", 100)):
            spool.drop(name, capture(20, start=start))
        sender, clock = load(spool, server, BATCH_SIZE=10, MAX_RETRIES=1)
        for name in ("a.json", "b.json"):
            sender.process_json_file(spool.pending / name)
        for _ in range(20):
            if {"processed/a.json", "processed/b.json"} <= set(spool.names()):
                break
            sender.retry_failed_uploads()
    aside = [packet(number) for number in (3, 4, 15)] if mood is isolating else []
    expected = Counter(number for number in [*range(20), *range(100, 120)] if packet(number) not in aside)
    assert server.stored == expected
    assert len(images) == len(server.requests) >= 6
    alone = [request for request in server.requests if len(request.numbers) == 1]
    first = {request.numbers[0]: request.number for request in reversed(alone)}
    refused_before = {request.number for request in alone if request.number > first[request.numbers[0]]}
    for request, (image, stored, keys) in zip(server.requests, images):
        with ScriptedServer(lambda request: mood(clock, request)) as after:  # noqa: B023
            after.stored, after.keys = stored, keys
            for _ in range(20):
                sender, clock = load(image, after, BATCH_SIZE=10, MAX_RETRIES=1)
                play(sender, clock)
                if image.names() == spool.names():
                    break
        again = [other for other in after.requests if other.numbers[0] // 100 == request.numbers[0] // 100]
        if request.number in refused_before:  # it goes out again in its turn
            again = [other for other in again if other.numbers == request.numbers]
        assert (again[0].key, again[0].body) == (request.key, request.body), request.number
        assert after.stored == expected, request.number
        assert image.names() == spool.names()


STORED_BUT: dict[str, Answer] = {
    "resets": reset,
    "closes": close,
    "truncates": say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
    "talks nonsense": say(b"\r\n\r\n200 OK\r\n"),
    "fails behind a proxy": reply(502, "Bad Gateway"),
    "wants patience": reply(429, "", "Retry-After: 1"),
}


@settings(max_examples=15, deadline=None, database=None)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 20),
    moods=st.lists(st.sampled_from(["accepts", *sorted(STORED_BUT)]), max_size=40),
    restarts=st.sets(st.integers(0, 40)),
)
def test_batches_that_were_stored_but_not_acknowledged_are_never_stored_again_by_a_server_that_knows_their_keys(
    tmp_path_factory: pytest.TempPathFactory, count: int, size: int, moods: list[str], restarts: set[int]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("keys"))
    coming, lost = iter(moods), [0]

    def script(request: Request) -> Answer:
        """A batch that finds no answer in a whole round and one sweep is searched, under other keys: see README."""
        receipt = server.store(request)
        answer = STORED_BUT.get(next(coming, "accepts")) if lost[0] < 2 else None
        lost[0] = lost[0] + 1 if answer else 0
        return answer or receipt

    with ScriptedServer(script) as server:
        spool.drop("a.json", capture(count))
        sender, _ = load(spool, server, BATCH_SIZE=size, MAX_RETRIES=2)
        sender.process_json_file(spool.pending / "a.json")
        for number in range(60):
            if "processed/a.json" in spool.names():
                break
            if number in restarts:
                sender, _ = load(spool, server, BATCH_SIZE=size, MAX_RETRIES=2)
            sender.retry_failed_uploads()
    assert server.stored == Counter(range(count))
    assert spool.names() == ["processed/a.json"]


@pytest.mark.parametrize("keys", ["on", "off"])
def test_a_server_that_stores_a_batch_and_answers_too_late(
    spool: Spool, tmp_path: Path, record_property: Note, keys: str
) -> None:
    """40 packets take 0.36 s, longer than the time-out; 20 take more than half of it."""
    with IngestApp(tmp_path, KEYS=keys, DELAY_PER_PACKET=0.009) as app:
        content = spool.drop("a.json", capture(120))
        sender = spool.load(SERVER_URL=app.url, BATCH_SIZE=40, REQUEST_TIMEOUT=0.3, RETRY_DELAY=0)
        sender.process_json_file(spool.pending / "a.json")
        for _ in range(10):
            if "processed/a.json" in spool.names():
                break
            sender.retry_failed_uploads()
        duplicates = sum(app.stored().values()) - 120
        record_property(f"duplicates of 120 packets, answers too late, key support {keys}", duplicates)
        record_property(f"requests for them, key support {keys} (3 batches)", app.requests)
        assert set(app.stored()) == set(range(120))
        assert (spool.processed / "a.json").read_bytes() == content
        if keys == "on":
            assert duplicates == 0
        else:  # 160: three attempts, one sweep and the halves of the first batch; from then on nothing is late
            assert 0 < duplicates <= 240


def test_a_timed_out_batch_is_resent_under_its_old_key_after_a_restart_with_a_smaller_batch_size(spool: Spool) -> None:
    with ScriptedServer(lambda request: too_late(clock, TIMEOUT) if 100 in request.numbers else None) as server:
        spool.drop("a.json", capture(260))
        sender, clock = load(spool, server, BATCH_SIZE=100, MAX_RETRIES=1)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.script = lambda request: None
        load(spool, server, BATCH_SIZE=30)[0].retry_failed_uploads()
    assert server.sizes == [100, 100, 100, 30, 30]
    lost, again = server.requests[1:3]
    assert (lost.key, lost.body) == (again.key, again.body)
    assert server.stored == Counter(range(260))
