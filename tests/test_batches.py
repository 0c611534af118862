"""One batch size that shrinks and grows back, packets that are set aside, and the sweeps over failed_uploads/."""

from __future__ import annotations

import itertools
import json
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


def refusing(poison: set[int], status: int) -> Script:
    """A server that refuses any batch with one of these packets, and tells more about it than one wants to know."""

    def script(request: Request) -> Answer:
        culprits = sorted(poison & set(request.numbers))
        return reply(status, {"detail": f"value too long for packet {culprits[0]}\n[SQL: ...]"}) if culprits else None

    return script


def put(spool: Spool, name: str, packets: list[dict[str, Any]]) -> bytes:
    """A file that a person put into failed_uploads/."""
    spool.failed.mkdir(parents=True, exist_ok=True)
    (spool.failed / name).write_bytes(json.dumps(packets).encode())
    return (spool.failed / name).read_bytes()


def rejected(spool: Spool, name: str = "a") -> list[dict[str, Any]]:
    """The packets set aside for one file; none where there is no such file."""
    path = spool.failed / f"{name}.rejected.json"
    return json.loads(path.read_bytes()) if path.exists() else []


def beside_rejected(spool: Spool, name: str = "a") -> str:
    return "".join(
        path.read_text() for path in spool.failed.glob(f"{name}.rejected*") if path.name != f"{name}.rejected.json"
    )


def first_numbers(server: ScriptedServer, since: int = 0) -> list[int]:
    """The first packet of each request: which file, or which place, it came from."""
    return [request.numbers[0] for request in server.requests[since:]]


def play(sender: Any, clock: Clock, *steps: Callable[[], object]) -> None:
    """Run monitor_and_upload(). Each time it would wait for its next poll, a step is done; in the end it is stopped."""
    left = iter(steps)

    def turn() -> None:
        step = next(left, sender.stop_sender)
        step()

    clock.at_sleep = turn
    sender.monitor_and_upload()


# ---------------------------------------------------------------- shrinking and growing


def test_a_batch_that_is_too_large_is_halved_until_it_fits_and_everything_arrives_once(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(413) if len(request.packets) > 150 else None) as server:
        content = spool.drop("a.json", capture(1000))
        sender, clock = load(spool, server)
        assert sender.process_json_file(spool.pending / "a.json")
    assert server.sizes[:4] == [1000, 500, 250, 125]
    assert server.stored == Counter(range(1000))
    assert clock.slept == 0, "there is nothing to wait for"
    assert (spool.processed / "a.json").read_bytes() == content
    assert len(server.requests) <= 24
    assert spool.names() == ["processed/a.json"]


def test_the_size_doubles_back_to_batch_size_and_not_beyond(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(413) if request.number < 5 else None) as server:
        spool.drop("a.json", capture(400))
        sender, _ = load(spool, server, BATCH_SIZE=64)
        assert sender.process_json_file(spool.pending / "a.json")
    assert server.sizes[:5] == [64, 32, 16, 8, 4]
    assert server.sizes[5:-1] == [2, 4, 8, 16, 32] + [64] * (len(server.sizes) - 11)
    assert sum(server.sizes[5:]) == 400


def test_the_size_carries_over_to_the_next_file_and_after_that_grows_back(spool: Spool) -> None:
    limit = 100
    with ScriptedServer(lambda request: reply(413) if len(request.packets) > limit else None) as server:
        sender, _ = load(spool, server)
        for name in ("a.json", "b.json", "c.json"):
            spool.drop(name, capture(1000, start=1000 * (ord(name[0]) - ord("a"))))
        assert sender.process_json_file(spool.pending / "a.json")
        first_of_b = len(server.requests)
        assert sender.process_json_file(spool.pending / "b.json")
        limit = 1000
        first_of_c = len(server.requests)
        assert sender.process_json_file(spool.pending / "c.json")
    assert server.sizes[first_of_b] < 400
    assert server.sizes[first_of_c] < 400
    assert len(server.requests) - first_of_c <= 6
    assert server.stored == Counter(range(3000))


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
        assert max(accepted[1:]) <= 27
        assert min(accepted[2:-1]) >= 20, "nor does it stay needlessly small"
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


@pytest.mark.parametrize("restarts", [False, True])
def test_a_timed_out_batch_is_resent_unchanged_through_its_attempts_and_one_sweep_then_halved_each_time(
    spool: Spool, restarts: bool
) -> None:
    with ScriptedServer() as server:
        content = spool.drop("a.json", capture(1000))
        sender, clock = load(spool, server)
        server.script = slow(lambda: clock, TIMEOUT / 100)  # up to 99 packets are answered in time
        assert not sender.process_json_file(spool.pending / "a.json")
        assert server.sizes == [1000] * 3
        for expected in ([1000], [500], [250], [125]):
            if restarts:
                sender, clock = load(spool, server)
            before = len(server.requests)
            sender.retry_failed_uploads()
            assert server.sizes[before:] == expected
        sender.retry_failed_uploads()
    assert len({(request.key, request.body) for request in server.requests[:4]}) == 1
    assert server.sizes[7] == 62
    assert max(server.sizes[8:]) <= 50, "at the pace known by then, never late again"
    assert server.stored == Counter(range(1000))
    assert (spool.processed / "a.json").read_bytes() == content


def test_only_the_batch_that_timed_out_is_halved_and_those_before_it_are_not_sent_again(spool: Spool) -> None:
    def script(request: Request) -> Answer:
        return too_late(clock, TIMEOUT) if len(request.packets) > 50 and 100 in request.numbers else None

    with ScriptedServer(script) as server:
        spool.drop("a.json", capture(300))
        sender, clock = load(spool, server, BATCH_SIZE=100)
        assert not sender.process_json_file(spool.pending / "a.json")
        sender.retry_failed_uploads()
        sender.retry_failed_uploads()
    assert first_numbers(server)[:7] == [0, 100, 100, 100, 100, 100, 150]
    assert server.sizes[:6] == [100] * 5 + [50]
    assert server.stored == Counter(range(300))
    assert spool.names() == ["processed/a.json"]


# ---------------------------------------------------------------- after a crash


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
    assert rejected(spool) == aside
    assert len(images) == len(server.requests) >= 6
    for request, (image, stored, keys) in zip(server.requests, images):
        with ScriptedServer(lambda request: mood(clock, request)) as after:  # noqa: B023
            after.stored, after.keys = stored, keys
            for _ in range(20):
                sender, clock = load(image, after, BATCH_SIZE=10, MAX_RETRIES=1)
                play(sender, clock)
                if all(name.startswith("processed/") or ".rejected." in name for name in image.names()):
                    break
        tried_again = next(other for other in after.requests if other.numbers[0] // 100 == request.numbers[0] // 100)
        assert (tried_again.key, tried_again.body) == (request.key, request.body), request.number
        assert after.stored == expected, request.number
        assert rejected(image) == aside
        assert [name for name in image.names() if "rejected" not in name] == ["processed/a.json", "processed/b.json"]


# ---------------------------------------------------------------- rejected packets


POISON = {
    "one": {23},
    "three": {5, 30, 50},
    "the first": {0},
    "the last": {63},
    "first and last": {0, 63},
    "two adjacent": {20, 21},
    "two adjacent in two batches": {15, 16},
    "two pairs": {9, 10, 12, 13},
    "the last two": {62, 63},
    "every third": set(range(0, 64, 3)),
    "two of three": {number for number in range(64) if number % 3},
}


def assert_isolated(spool: Spool, server: ScriptedServer, poison: set[int], count: int, content: bytes) -> None:
    assert server.stored == Counter(number for number in range(count) if number not in poison)
    assert rejected(spool) == [packet(number) for number in sorted(poison)]
    for number in poison:
        assert f"value too long for packet {number}" in beside_rejected(spool), "the server's reason is beside it"
    assert (spool.processed / "a.json").read_bytes() == content
    left = [name for name in spool.names() if not name.startswith("failed_uploads/a.rejected.json")]
    assert [name for name in left if not name.startswith("processed/")] == []


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
@pytest.mark.parametrize("status", [400, 422])
def test_rejected_packets_are_set_aside_with_the_reason_and_all_others_arrive_once(
    spool: Spool, said: Said, poison: set[int], status: int
) -> None:
    with ScriptedServer(refusing(poison, status)) as server:
        content = spool.drop("a.json", capture(64))
        sender, clock = load(spool, server, BATCH_SIZE=16)
        assert sender.process_json_file(spool.pending / "a.json")
        assert clock.slept == 0
        assert_isolated(spool, server, poison, 64, content)
        requests = len(server.requests)
        sender.retry_failed_uploads()
        load(spool, server)[0].retry_failed_uploads()
        assert len(server.requests) == requests, "what was set aside is never swept"
    assert any("a.rejected.json" in line and "a.json" in line for line in said(logging.ERROR))


def test_all_packets_but_one_may_be_rejected(spool: Spool) -> None:
    with ScriptedServer(refusing({0, 1, 3, 4}, 422)) as server:
        content = spool.drop("a.json", capture(5))
        sender, _ = load(spool, server)
        assert sender.process_json_file(spool.pending / "a.json")
    assert_isolated(spool, server, {0, 1, 3, 4}, 5, content)


@pytest.mark.parametrize("poison", [{23}, {5, 30, 50}, {0}, {63}, {20, 21}, {15, 16}], ids=sorted)
@pytest.mark.parametrize("restarts", [False, True])
def test_packets_that_make_the_server_answer_500_are_set_aside_once_it_has_accepted_other_uploads(
    spool: Spool, poison: set[int], restarts: bool
) -> None:
    with ScriptedServer(refusing(poison, 500)) as server:
        content = spool.drop("a.json", capture(64))
        sender, _ = load(spool, server, BATCH_SIZE=16)
        assert not sender.process_json_file(spool.pending / "a.json")
        first = [request for request in server.requests if poison & set(request.numbers)]
        sender.retry_failed_uploads()
        sender.retry_failed_uploads()
        again = [request for request in server.requests if poison & set(request.numbers)]
        assert len({request.key for request in again}) == 1, "the server may be broken: nothing is halved"
        assert (len(first), len(again)) == (3, 5)
        assert not rejected(spool)
        for number in range(8):
            if restarts:
                sender, _ = load(spool, server, BATCH_SIZE=16)
            spool.drop(f"other{number}.json", capture(1, start=1000 + number))
            assert sender.process_json_file(spool.pending / f"other{number}.json")
            sender.retry_failed_uploads()
            if "processed/a.json" in spool.names():
                break
        for number in range(1000, 1008):
            server.stored.pop(number, None)
    assert_isolated(spool, server, poison, 64, content)


def test_the_first_500_of_a_batch_is_no_rejection_though_the_file_failed_before_and_others_were_accepted(
    spool: Spool,
) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        spool.drop("a.json", capture(64))
        sender, _ = load(spool, server, BATCH_SIZE=16)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.script = lambda request: None
        spool.drop("b.json", capture(1, start=1000))
        assert sender.process_json_file(spool.pending / "b.json")
        server.script = refusing({20, 21, 22}, 500)
        sender.retry_failed_uploads()
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert [size for size in server.sizes if size not in (1, 16)] == []
    assert first_numbers(server)[-5:] == [0, 16, 16, 32, 48]
    assert spool.names() == ["processed/a.json", "processed/b.json"]


def test_a_server_that_answers_500_to_everything_gets_nothing_set_aside(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(500, "Internal Server Error")) as server:
        files = ["a.json", "b.json", "c.json"]
        for number, name in enumerate(files):
            spool.drop(name, capture(30, start=100 * number))
        sender, _ = load(spool, server, BATCH_SIZE=10)
        for name in files:
            assert not sender.process_json_file(spool.pending / name)
        for _ in range(5):
            sender.retry_failed_uploads()
        assert set(server.sizes) == {10}
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert spool.names() == ["processed/a.json", "processed/b.json", "processed/c.json"]
    assert (len(server.stored), server.repeats) == (90, 0)


def test_one_packet_alone_that_is_too_large_is_set_aside(spool: Spool) -> None:
    packets = capture(20)
    packets[7]["payload"] = "x" * 20_000
    with ScriptedServer(lambda request: reply(413, "body too long") if len(request.body) > 10_000 else None) as server:
        spool.drop("a.json", packets)
        sender, _ = load(spool, server, BATCH_SIZE=10)
        assert sender.process_json_file(spool.pending / "a.json")
    assert rejected(spool) == [packets[7]]
    assert "413" in beside_rejected(spool)
    assert server.stored == Counter(number for number in range(20) if number != 7)


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("accepted_before", [0, 5, 50])
def test_three_single_refusals_in_a_row_set_nothing_aside_and_the_file_is_delivered_whole_once_the_server_is_mended(
    spool: Spool, said: Said, status: int, accepted_before: int
) -> None:
    def script(request: Request) -> Answer:
        return reply(status, {"detail": "Field required: foo"}) if max(request.numbers) >= accepted_before else None

    with ScriptedServer(script) as server:
        content = spool.drop("a.json", capture(100))
        sender, _ = load(spool, server, BATCH_SIZE=40)
        assert not sender.process_json_file(spool.pending / "a.json")
        assert [request.numbers for request in server.requests[-3:]] == [
            [accepted_before], [accepted_before + 1], [accepted_before + 2]
        ]  # fmt: skip
        assert [name for name in spool.names() if "rejected" in name] == []
        assert (spool.failed / "a.json").read_bytes() == content
        assert any("a.json" in line and "Field required: foo" in line for line in said(logging.ERROR))
        sender.retry_failed_uploads()
        server.script = lambda request: None
        before = len(server.requests)
        load(spool, server, BATCH_SIZE=40)[0].retry_failed_uploads()
        assert first_numbers(server, before)[0] == accepted_before, "progress is at the first of the three"
    assert server.stored == Counter(range(100))
    assert spool.names() == ["processed/a.json"]
    assert (spool.processed / "a.json").read_bytes() == content


def test_a_poison_packet_before_a_schema_change_is_the_only_one_set_aside(spool: Spool) -> None:
    broken = True
    with ScriptedServer() as server:
        server.script = lambda request: (
            reply(422, "value too long for packet 4") if 4 in request.numbers or (broken and max(request.numbers) >= 40)
            else None
        )  # fmt: skip
        content = spool.drop("a.json", capture(100))
        sender, _ = load(spool, server, BATCH_SIZE=30)
        assert not sender.process_json_file(spool.pending / "a.json")
        broken = False
        load(spool, server, BATCH_SIZE=30)[0].retry_failed_uploads()
    assert_isolated(spool, server, {4}, 100, content)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_tiny_file_refused_whole_is_failed_and_set_aside_only_if_the_server_accepts_others_meanwhile(
    spool: Spool, count: int, status: int
) -> None:
    refuse_all = True

    def script(request: Request) -> Answer:
        return reply(status, "value too long") if refuse_all or request.numbers[0] < 2 else None

    with ScriptedServer(script) as server:
        content = spool.drop("a.json", capture(count))
        sender, _ = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.json")
        for _ in range(3):
            sender.retry_failed_uploads()
        assert not rejected(spool)
        assert (spool.failed / "a.json").read_bytes() == content
        refuse_all = False
        sender.retry_failed_uploads()
        assert not rejected(spool), "nothing was accepted in between"
        spool.drop("b.json", capture(1, start=100))
        assert sender.process_json_file(spool.pending / "b.json")
        sender.retry_failed_uploads()
    assert rejected(spool) == capture(count)
    assert "value too long" in beside_rejected(spool)
    assert (spool.processed / "a.json").read_bytes() == content
    assert server.stored == {100: 1}


def test_a_tiny_file_that_the_server_can_take_later_is_delivered_whole(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(422, "schema")) as server:
        spool.drop("a.json", capture(2))
        sender, _ = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.json")
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert server.stored == Counter(range(2))
    assert spool.names() == ["processed/a.json"]


def test_what_is_set_aside_overwrites_nothing(spool: Spool) -> None:
    spool.failed.mkdir(parents=True)
    (spool.failed / "a.rejected.json").write_text("[]")
    with ScriptedServer(refusing({3}, 422)) as server:
        spool.drop("a.json", capture(8))
        sender, _ = load(spool, server)
        assert sender.process_json_file(spool.pending / "a.json")
    assert (spool.failed / "a.rejected.json").read_text() == "[]"
    others = [path for path in spool.failed.glob("a.*json") if path.name != "a.rejected.json"]
    assert [json.loads(path.read_bytes()) for path in others] == [[packet(3)]]
    requests = len(server.requests)
    sender.retry_failed_uploads()
    assert len(server.requests) == requests


def test_a_failed_capture_whose_name_looks_like_set_aside_packets_is_swept_all_the_same(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        content = spool.drop("a.rejected.json", capture(2))
        sender, _ = load(spool, server)
        assert not sender.process_json_file(spool.pending / "a.rejected.json")
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert server.stored == Counter(range(2))
    assert [path.read_bytes() for path in spool.processed.iterdir()] == [content]


@pytest.mark.parametrize("name", ["no suffix", "a.txt", "%s ü.json"])
def test_packets_are_set_aside_from_files_of_any_name(spool: Spool, name: str) -> None:
    with ScriptedServer(refusing({3}, 422)) as server:
        content = put(spool, name, capture(8))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
        requests = len(server.requests)
        sender.retry_failed_uploads()
    assert len(server.requests) == requests
    assert (spool.processed / name).read_bytes() == content
    (aside,) = spool.failed.glob("*.rejected.json")
    assert json.loads(aside.read_bytes()) == [packet(3)]


def test_packets_set_aside_keep_their_own_bytes(spool: Spool) -> None:
    packets = ['{"length": 0}', '{ "length" :1, "x": 1.10, "dns": "\\u00fc }, {" }', '{"length": 2}']
    with ScriptedServer(refusing({1}, 422)) as server:
        spool.drop("a.json", "[" + ",\n".join(packets) + "]")
        sender, _ = load(spool, server)
        assert sender.process_json_file(spool.pending / "a.json")
    assert packets[1] in (spool.failed / "a.rejected.json").read_text()


@pytest.mark.parametrize(("poison", "most"), [({1234}, 40), ({7, 1500, 2999}, 100)], ids=["one", "three"])
@pytest.mark.parametrize("status", [422, 500])
def test_isolating_poison_packets_in_3000_takes_few_requests(
    spool: Spool, record_property: Note, poison: set[int], most: int, status: int
) -> None:
    with ScriptedServer(refusing(poison, status)) as server:
        content = spool.drop("a.json", capture(3000))
        sender, _ = load(spool, server)
        sender.process_json_file(spool.pending / "a.json")
        rounds = 0
        while "processed/a.json" not in spool.names():
            rounds += 1
            spool.drop(f"other{rounds}.json", capture(1, start=9000 + rounds))
            assert sender.process_json_file(spool.pending / f"other{rounds}.json")
            sender.retry_failed_uploads()
            assert rounds < 10
        for number in range(9000, 9010):
            server.stored.pop(number, None)
    assert_isolated(spool, server, poison, 3000, content)
    requests = len(server.requests) - rounds
    record_property(
        f"requests for 3,000 packets, {len(poison)} of them poison answered {status} (3 with none)", requests
    )
    assert requests <= most


def test_a_schema_change_costs_about_a_dozen_requests_per_file_and_is_delivered_whole_once_mended(
    spool: Spool, record_property: Note
) -> None:
    files = [f"{number:02}.json" for number in range(20)]
    with ScriptedServer(lambda request: reply(422, "Field required")) as server:
        sender, _ = load(spool, server)
        costs, sweeps = [], []
        for number, name in enumerate(files):
            spool.drop(name, capture(2 if number % 4 == 3 else 3000, start=3000 * number))
            before = len(server.requests)
            assert not sender.process_json_file(spool.pending / name)
            costs.append(len(server.requests) - before)
        for _ in range(3):
            before = len(server.requests)
            sender.retry_failed_uploads()
            sweeps.append(len(server.requests) - before)
        assert [name for name in spool.names() if "rejected" in name] == []
        server.script = lambda request: None
        before = len(server.requests)
        sender.retry_failed_uploads()
        mended = len(server.requests) - before
    record_property("requests per file in a schema change: first file", costs[0])
    record_property("requests per file in a schema change: most", max(costs))
    record_property("requests per file and sweep in a schema change", max(sweeps) / len(files))
    record_property(f"requests to deliver these {len(files)} files once the server is mended", mended)
    assert max(costs) <= 14
    assert max(sweeps) <= 3 * len(files)
    assert server.repeats == 0
    assert len(server.stored) == 15 * 3000 + 5 * 2
    assert spool.names() == [f"processed/{name}" for name in files]


def test_poison_in_front_of_the_real_stack_is_isolated(spool: Spool, said: Said, tmp_path: Path) -> None:
    packets = capture(300)
    packets[123]["http_path"] = "/poison"
    with IngestApp(tmp_path) as app:
        spool.drop("a.json", packets)
        sender = spool.load(SERVER_URL=app.url, BATCH_SIZE=100)
        assert sender.process_json_file(spool.pending / "a.json")
    assert app.stored() == Counter(number for number in range(300) if number != 123)
    assert rejected(spool) == [packets[123]]
    assert "value too long" in beside_rejected(spool)
    assert all(line.isprintable() for line in said())


def test_a_schema_change_in_front_of_the_real_stack_sets_nothing_aside(spool: Spool, tmp_path: Path) -> None:
    with IngestApp(tmp_path, REQUIRE="sensor") as app:
        spool.drop("a.json", capture(3000))
        sender: Any = spool.load(SERVER_URL=app.url)
        assert not sender.process_json_file(spool.pending / "a.json")
        assert app.requests <= 14
    assert [name for name in spool.names() if "rejected" in name] == []
    with IngestApp(tmp_path) as app:
        sender.SERVER_URL = app.url
        sender.retry_failed_uploads()
    assert app.stored() == Counter(range(3000))


# ---------------------------------------------------------------- any mixture


MOODS: dict[str, Callable[[Clock, Request], Answer]] = {
    "accepts": lambda clock, request: None,
    "is busy": lambda clock, request: reply(503),
    "breaks": lambda clock, request: reset,
    "truncates": lambda clock, request: say(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"),
    "faults": lambda clock, request: reply(500) if len(request.packets) > 1 else None,
    "finds it too long": lambda clock, request: reply(413) if len(request.packets) > 2 else None,
    "is late": lambda clock, request: too_late(clock, TIMEOUT),
    "is slow": lambda clock, request: clock.move(0.7 * TIMEOUT),
    "wants a token": lambda clock, request: reply(401),
}


@settings(max_examples=25, deadline=None, database=None)
@given(
    count=st.integers(1, 60),
    size=st.integers(1, 20),
    poison=st.sets(st.integers(0, 59), max_size=6),
    moods=st.lists(st.sampled_from(sorted(MOODS)), max_size=25),
    restarts=st.sets(st.integers(0, 40)),
)
def test_under_any_mixture_of_moods_each_packet_is_stored_once_or_set_aside_if_it_is_poison(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    size: int,
    poison: set[int],
    moods: list[str],
    restarts: set[int],
) -> None:
    poison = {number for number in poison if number < count and not {number - 1, number - 2} <= poison}
    spool = Spool(tmp_path_factory.mktemp("moods"))
    coming = iter(moods)

    def script(request: Request) -> Answer:
        if request.numbers[0] >= 1000:
            return None
        answer = MOODS[next(coming, "accepts")](clock, request)
        return answer or refusing(poison, 422)(request)

    with ScriptedServer(script) as server:
        content = spool.drop("a.json", capture(count))
        sender, clock = load(spool, server, BATCH_SIZE=size, MAX_RETRIES=2)
        sender.process_json_file(spool.pending / "a.json")
        for number in range(60):
            if "processed/a.json" in spool.names():
                break
            if number in restarts:
                sender, clock = load(spool, server, BATCH_SIZE=size, MAX_RETRIES=2)
            spool.drop(f"other{number}.json", capture(1, start=1000 + number))
            assert sender.process_json_file(spool.pending / f"other{number}.json")
            sender.retry_failed_uploads()
    stored = Counter({number: times for number, times in server.stored.items() if number < 1000})
    assert stored == Counter(number for number in range(count) if number not in poison), spool.tree()
    assert rejected(spool) == [packet(number) for number in sorted(poison)]
    assert (spool.processed / "a.json").read_bytes() == content


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
    coming = iter(moods)

    def script(request: Request) -> Answer:
        receipt = server.store(request)
        return STORED_BUT.get(next(coming, "accepts"), receipt)

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


# ---------------------------------------------------------------- servers that answer too late


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


# ---------------------------------------------------------------- sweeps


def fail_all(spool: Spool, server: ScriptedServer, sender: Any, *names: str) -> None:
    """Let the named files fail one after the other: file number n has the packets 100 n, 100 n + 1."""
    script, server.script = server.script, lambda request: reply(503)
    for number, name in enumerate(names):
        spool.drop(name, capture(2, start=100 * number))
        assert not sender.process_json_file(spool.pending / name)
    server.script = script
    server.requests.clear()


def tried(server: ScriptedServer) -> list[int]:
    """The files that were tried, by number, each request once."""
    files = [number // 100 for number in first_numbers(server)]
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


ENDS_AT_ONCE: dict[str, Callable[[Clock], Answer]] = {
    **{str(status): lambda clock, status=status: reply(status) for status in (429, 502, 503, 504)},  # type: ignore[misc]
    **{str(status): lambda clock, status=status: reply(status) for status in (301, 307, 401, 403, 404, 405, 418)},  # type: ignore[misc]
    "time-out": lambda clock: too_late(clock, TIMEOUT),
    "closed": lambda clock: close,
    "reset": lambda clock: reset,
}


@pytest.mark.parametrize("answer", ENDS_AT_ONCE.values(), ids=ENDS_AT_ONCE.keys())
def test_a_sweep_ends_at_once_where_the_server_is_the_trouble(spool: Spool, answer: Callable[[Clock], Answer]) -> None:
    with ScriptedServer(lambda request: answer(clock)) as server:
        for number in range(5):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server)
        sender.retry_failed_uploads()
        assert (tried(server), clock.slept) == ([0], 0)
        sender.retry_failed_uploads()
        assert tried(server) == [1]
    assert {f"failed_uploads/{number}.json" for number in range(5)} <= set(spool.names())


def test_a_sweep_ends_after_500s_from_three_files_in_a_row(spool: Spool) -> None:
    moods = {0: 500, 1: 500, 3: 500, 4: 500, 5: 500, 6: 500}
    with ScriptedServer() as server:
        server.script = lambda request: (
            reply(moods[request.numbers[0] // 100]) if request.numbers[0] // 100 in moods else None
        )
        for number in range(8):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, clock = load(spool, server)
        sender.retry_failed_uploads()
        assert (tried(server), clock.slept) == ([0, 1, 2, 3, 4, 5], 0)
        sender.retry_failed_uploads()
        assert tried(server)[:2] == [6, 7]


@pytest.mark.parametrize("status", [408, 409, 425, 501, 507, 520, 599])
def test_no_outage_costs_more_than_three_requests_per_sweep(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        for number in range(9):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, _ = load(spool, server)
        for _ in range(3):
            sender.retry_failed_uploads()
            assert len(tried(server)) <= 3


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


@pytest.mark.parametrize("outage", ["refused", "reset", "503", "500", "401", "time-out"])
def test_200_failed_files_in_a_total_outage_cost_three_requests_per_sweep_at_most(
    spool: Spool, said: Said, record_property: Note, outage: str
) -> None:
    with ScriptedServer(listening=outage != "refused") as server:
        for number in range(200):
            put(spool, f"{number:03}.json", capture(2, start=100 * number))
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
    assert 1 <= max(costs) <= (3 if outage == "500" else 1)
    assert len([name for name in spool.names() if name.endswith(".json")]) == 200


BAD: dict[str, Callable[[Clock], Answer]] = {
    "times out": lambda clock: too_late(clock, TIMEOUT),
    "is answered 500": lambda clock: reply(500),
    "is answered 503": lambda clock: reply(503),
    "is answered 401": lambda clock: reply(401),
    "breaks the connection": lambda clock: reset,
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("bad", [{0}, {0, 1, 2}, {2, 5}], ids=sorted)
def test_files_that_always_fail_do_not_keep_the_others_from_their_turn(
    spool: Spool, bad: set[int], answer: Callable[[Clock], Answer]
) -> None:
    with ScriptedServer() as server:
        sender, clock = load(spool, server, MAX_RETRIES=1)
        names = [f"{number}.json" for number in range(8)]
        fail_all(spool, server, sender, *names)
        server.script = lambda request: answer(clock) if request.numbers[0] // 100 in bad else None
        for _ in range(len(bad) + 1):
            sender.retry_failed_uploads()
    good = {f"processed/{name}" for number, name in enumerate(names) if number not in bad}
    assert good <= set(spool.names())


def test_new_ready_files_go_first_between_two_failed_ones(spool: Spool) -> None:
    coming = iter(["n1.json", "n2.json"])

    def script(request: Request) -> Answer:
        if request.numbers[0] < 800 and (name := next(coming, "")):
            spool.drop(name, capture(2, start=800 if name == "n1.json" else 900))
        return None

    with ScriptedServer(script) as server:
        for number in range(3):
            put(spool, f"{number}.json", capture(2, start=100 * number))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
        assert tried(server) == [0, 8, 1, 9, 2]


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


@pytest.mark.parametrize("answer", [reply(503), reply(429), reset, close], ids=["503", "429", "reset", "closed"])
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
    assert [number for number, _ in itertools.groupby(first_numbers(server))] == [0, 100, 0, 200, 0]
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


def test_acknowledged_batches_are_not_repeated_by_a_sweep(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503) if request.numbers[0] >= 20 else None) as server:
        spool.drop("a.json", capture(50))
        sender, _ = load(spool, server, BATCH_SIZE=10, MAX_RETRIES=2)
        assert not sender.process_json_file(spool.pending / "a.json")
        load(spool, server, BATCH_SIZE=10)[0].retry_failed_uploads()
        server.script = lambda request: None
        load(spool, server, BATCH_SIZE=10)[0].retry_failed_uploads()
    assert first_numbers(server) == [0, 10, 20, 20, 20, 20, 30, 40]
    assert server.stored == Counter(range(50))


@pytest.mark.parametrize("name", ["x.json", "no suffix", "a.json.bak", "ü ✓.json", "a.rejected.txt", "%s.json"])
def test_every_data_file_in_failed_uploads_is_swept_whatever_its_name(spool: Spool, name: str) -> None:
    with ScriptedServer() as server:
        content = put(spool, name, capture(2))
        sender, _ = load(spool, server)
        sender.retry_failed_uploads()
    assert server.stored == Counter(range(2))
    assert (spool.processed / name).read_bytes() == content
