"""Two producers and a sender at full speed, while the sender is killed and the receiver restarted, again and again."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Spool, packet, wait_until
from ingest_server import IngestServer, PacketStore

BACKLOG = 40  # files in the spool at which the producers wait for the sender


class Producer(threading.Thread):
    """Writes captures until it is stopped; uses each of its names again and again, as soon as it is free."""

    def __init__(self, spool: Spool, number: int, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.spool, self.number, self.chance = spool, number, chance
        self.written: list[bytes] = []
        self.packets = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            name = f"{self.number}-{self.chance.randrange(30):02}.json"
            if (self.spool.pending / name).exists() or len(os.listdir(self.spool.pending)) > BACKLOG:
                self.done.wait(0.005)  # for the sender to take something
                continue
            first = self.number * 10_000_000 + self.packets
            packets = [packet(first + index) for index in range(self.chance.randrange(1, 40))]
            self.packets += len(packets)
            self.written.append(self.spool.drop(name, packets))


def reaches(store: PacketStore, count: int) -> Callable[[], bool]:
    return lambda: store.count() >= count


@pytest.mark.timeout(300)
def test_two_producers_and_a_sender_at_full_speed_with_kills_and_restarts_lose_nothing_and_store_nothing_twice(
    spool: Spool, tmp_path: Path, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(2)
    server = IngestServer(tmp_path / "ingest.sqlite3")
    settings = {
        "SERVER_URL": server.url,
        "BATCH_SIZE": 7,
        "POLL_INTERVAL": 0.01,
        "RETRY_DELAY": 0.02,
        "RETRY_FAILED_INTERVAL": 0.2,
        "LOG_LEVEL": "WARNING",
    }
    spool.pending.mkdir(parents=True)
    producers = [Producer(spool, number, random.Random(number)) for number in (1, 2)]
    for producer in producers:
        producer.start()
    sender = spool.start(**settings)
    kills = restarts = 0
    end = time.monotonic() + (60 if all_points else 8)
    try:
        while time.monotonic() < end:
            with PacketStore(server.db_path) as store:
                wait_until(reaches(store, store.count() + chance.randrange(1, 150)), "more packets stored")
            if chance.random() < 0.6:
                sender.kill()
                sender.wait()
                sender = spool.start(**settings)
                kills += 1
            else:
                server.close()
                server = IngestServer(server.db_path, port=server.port)
                restarts += 1
        for producer in producers:
            producer.done.set()
            producer.join()
        written = [content for producer in producers for content in producer.written]
        wait_until(lambda: len(os.listdir(spool.processed)) == len(written), "every file in processed/")
        sender.kill()
        sender.wait()
        last = spool.run("--once", **settings)
        assert last.returncode == 0, last.stderr
    finally:
        server.close()

    assert spool.names() == [f"processed/{name}" for name in sorted(os.listdir(spool.processed))], spool.tree()
    assert Counter(path.read_bytes() for path in spool.processed.iterdir()) == Counter(written)
    sent = [json.dumps(packet) for content in written for packet in json.loads(content)]
    stored = server.packets()
    assert len(stored) == len(sent)
    assert sorted(stored) == sorted(sent)
    assert server.repeats <= kills + restarts
    interference = f"{kills} kills of the sender and {restarts} restarts of the receiver"
    record_property("endurance", f"{len(written)} files, {len(sent)} packets, {interference}, {server.repeats} repeats")
    assert kills
    assert restarts
