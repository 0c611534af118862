"""Scenarios: what lies in the spool, what must become of it, and the receiver that knows whether the books balance."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Spool, packet
from faults import Countdown, Killed, MoodyServer, kill, watched

Packets = list[dict[str, Any]]
SETTINGS = {"BATCH_SIZE": 3, "MAX_RETRIES": 1, "RETRY_FAILED_INTERVAL": 1000}


class Scenario(NamedTuple):
    """What lies in the spool and what must become of it."""

    before: dict[str, Packets | bytes]  # by path below logs/; a file in pending_upload/ has its marker
    after: dict[str, Packets | bytes]  # every file there is in the end, but for records
    records: set[str]
    status: int  # of the last --once
    rewritten: tuple[str, Packets] | None = None  # what the producer writes while the first version is being sent


A = [packet(n, once=n == 7) for n in range(8)]  # the server answers 503 to number 7, the first time
B = [packet(n, poison=n == 14) for n in range(10, 17)]
C, D = [packet(n) for n in range(20, 24)], [packet(n) for n in range(30, 34)]
E, E2 = [packet(n, rewrite=True) for n in range(40, 45)], [packet(n) for n in range(50, 52)]
G, H = [packet(n, poison=True) for n in range(60, 65)], [packet(n) for n in range(70, 74)]
CORRUPT = json.dumps(H).encode()[:-1] + b"\0\0]"

SCENARIOS = {
    "plain": Scenario(
        before={"pending_upload/c.json": C, "pending_upload/h.json": H},
        after={"processed/c.json": C, "processed/h.json": H},
        records=set(),
        status=0,
    ),
    "deliveries": Scenario(
        before={
            "failed_uploads/d.json": D,
            "pending_upload/a.json": A,
            "pending_upload/b.json": B,
            "pending_upload/c.json": C,
            "pending_upload/e.json": E,
            "processed/c.json": b"an older file of this name",
        },
        after={
            "failed_uploads/b.json": B,  # the server refuses one of its packets
            "processed/a.json": A,
            "processed/c.1.json": C,
            "processed/c.json": b"an older file of this name",
            "processed/d.json": D,
            "processed/e.1.json": E2,
            "processed/e.json": E,
        },
        records={"failed_uploads/b.json.state"},
        status=1,
        rewritten=("e.json", E2),
    ),
    "refusals": Scenario(
        before={"pending_upload/f.json": CORRUPT, "pending_upload/g.json": G, "pending_upload/h.json": H},
        after={"failed_uploads/f.json": CORRUPT, "failed_uploads/g.json": G, "processed/h.json": H},
        records={"failed_uploads/f.json.state", "failed_uploads/g.json.state"},
        status=1,
    ),
}


def as_bytes(content: Packets | bytes) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()


def beside(spool: Spool, folder: Path) -> Spool:
    """Another logs/, in `folder`, for the same sender.py."""
    other = copy.copy(spool)
    other.logs = folder / "logs"
    other.pending, other.failed, other.processed = (
        other.logs / name for name in ("pending_upload", "failed_uploads", "processed")
    )
    other.logs.mkdir(parents=True)
    return other


class Play:
    """One performance of a scenario: an own logs/ folder, an own database at the receiver."""

    def __init__(self, scenario: Scenario, spool: Spool, server: MoodyServer, folder: Path) -> None:
        self.scenario, self.server = scenario, server
        self.spool = beside(spool, folder)
        for path, content in scenario.before.items():
            if path.startswith("pending_upload/"):
                self.spool.drop(path.partition("/")[2], as_bytes(content))
            else:
                (self.spool.logs / path).parent.mkdir(parents=True, exist_ok=True)
                (self.spool.logs / path).write_bytes(as_bytes(content))
        self.settings = {**SETTINGS, "SERVER_URL": server.url, "LOGS_DIR": self.spool.logs}
        self.seen: set[str] = set()
        self.one_at_a_time = threading.Lock()
        server.start_afresh(folder / "ingest.sqlite3")
        server.mood = self.mood
        self.on_rewrite: Callable[[str, bytes], None] = lambda name, content: None
        self.on_request: Callable[[Packets], None] = lambda packets: None

    def mood(self, packets: Packets) -> int:
        with self.one_at_a_time:  # the request of a dead sender may still be at it
            self.on_request(packets)
            if self.scenario.rewritten and any(p.get("rewrite") for p in packets) and "rewrite" not in self.seen:
                self.seen.add("rewrite")
                name, content = self.scenario.rewritten
                self.spool.drop(name, content)
                self.on_rewrite(name, as_bytes(content))
            if any(p.get("once") for p in packets) and "once" not in self.seen:
                self.seen.add("once")
                return 503
            return 422 if any(p.get("poison") for p in packets) else 200

    def run(self) -> None:
        """sender.py --once in this process, as fresh as a new one."""
        self.spool.load(**self.settings).monitor_and_upload(once=True)

    def run_until(self, point: int) -> Countdown:
        """The same, killed at a point."""
        countdown = Countdown(point, kill)
        with contextlib.suppress(Killed), watched(self.spool.logs, countdown):
            self.run()
        return countdown

    def refused(self) -> tuple[int, list[int]]:
        """How many packets of b.json are done with, and which of them the server refused."""
        record = json.loads((self.spool.logs / "failed_uploads/b.json.state").read_bytes())
        return record["uploaded"], record["refused"]

    @staticmethod
    def family(path: str) -> str:
        """X of X.json, X.1.json, …: which of two versions of a file gets which name is not promised."""
        return path.partition(".")[0]

    def balance(self, run: Callable[[], object], crashes: int = 1, bare_markers: bool = False) -> None:
        """Run to the end; then every packet is stored, none twice, and every file in its place; else AssertionError."""
        expected = {*self.scenario.after, *self.scenario.records}
        for _ in range(3):
            run()
            found = {name for name in self.spool.names() if not (bare_markers and name.endswith(".ready"))}
            if found == expected:
                break
        assert found == expected, self.spool.tree()
        there = Counter((self.family(path), (self.spool.logs / path).read_bytes()) for path in self.scenario.after)
        meant = Counter((self.family(path), as_bytes(content)) for path, content in self.scenario.after.items())
        assert there == meant, f"not as it was written: {[path for path, _ in there - meant]}"
        sent = [
            json.dumps(packet)
            for content in self.scenario.after.values()
            if not isinstance(content, bytes)
            for packet in content
            if not packet.get("poison")
        ]
        if "failed_uploads/b.json" in expected:
            assert self.refused() == (len(B), [4]), self.refused()
        stored, due = Counter(self.server.packets()), Counter(sent)
        assert stored == due, f"lost: {[*(due - stored)]}, twice or never to be stored: {[*(stored - due)]}"
        assert self.server.repeats <= crashes, f"{self.server.repeats} batches were sent twice"


Stage = Callable[[str, object], Play]


@contextlib.contextmanager
def stage_for(spool: Spool, folder: Path) -> Iterator[Stage]:
    """stage(scenario, name) is a fresh play; all plays share one receiver and one sender.py."""
    with MoodyServer(folder / "unused.sqlite3") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)  # or each play would compile sender.py anew
        yield lambda scenario, name: Play(SCENARIOS[scenario], spool, server, folder / str(name))


def spread(points: int, share: int, all_points: bool) -> list[int]:
    """One in `share` of the points 1 to `points`, always the same ones; or all."""
    return sorted(random.Random(0).sample(range(1, points + 1), points if all_points else points // share))


def report(failures: list[str], tried: int) -> None:
    assert not failures, f"{len(failures)} of {tried} tried:\n" + "\n".join(text[:600] for text in failures)
