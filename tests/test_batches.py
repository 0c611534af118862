"""Batches: their size by the pace of the answers, and the same batch under the same key after any accident."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Note, Said, Spool, capture
from servers import (
    TIMEOUT,
    Answer,
    Clock,
    IngestApp,
    Request,
    Script,
    ScriptedServer,
    close,
    load,
    play,
    reply,
    reset,
    say,
    too_late,
)

pytestmark = pytest.mark.usefixtures("fast_disk")


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
def test_an_answer_after_half_of_the_time_out_halves_the_next_batch(
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


STORED_BUT: dict[str, Answer] = {
    "resets": reset,
    "closes": close,
    "truncates": say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
    "talks nonsense": say(b"\r\n\r\n200 OK\r\n"),
    "fails behind a proxy": reply(502, "Bad Gateway"),
    "wants patience": reply(429, "", "Retry-After: 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["on", "off"])
def test_a_server_that_stores_and_answers_too_late(
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
