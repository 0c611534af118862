"""A model of the spool against the real one: whatever a producer, a server and an operator do, the books balance."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from conftest import Spool, packet
from faults import STORED_BUT_CUT_OFF, Countdown, Killed, MoodyServer, kill, watched
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from scenarios import beside

NAMES = st.sampled_from(["a.json", "b.json", "c.json"])
LAYOUTS: dict[str, dict[str, Any]] = {"spaced": {}, "compact": {"separators": (",", ":")}, "indented": {"indent": 2}}
MOODS = ["ok", "marked", "too large", "500", "500 marked", "503", "401", "cut off"]


class SpoolMachine(RuleBasedStateMachine):
    """The spool, with a producer that reuses names, a server with moods, stops, kills and restarts of the sender."""

    home: Spool
    server: MoodyServer
    lives = 0

    def __init__(self) -> None:
        super().__init__()
        SpoolMachine.lives += 1
        self.spool = beside(self.home, self.home.folder / str(self.lives))
        self.server.start_afresh(self.spool.logs.parent / "ingest.sqlite3")
        self.server.mood = self.answer
        self.numbers = 0  # packets are numbered, so that none is like another
        self.dropped: dict[bytes, str] = {}  # every capture that must be kept, and its name
        self.corrupt: set[bytes] = set()
        self.lost_answers = 0
        self.refused: set[int] = set()  # packets that the server has refused alone
        self.mood = "ok"
        self.at_request: Callable[[], object] = lambda: None  # called once, at the next request
        self.sender: ModuleType

    @initialize(batch_size=st.integers(1, 4))
    def begin(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart()

    # -------- the producer

    @rule(name=NAMES, marked=st.lists(st.booleans(), max_size=7), layout=st.sampled_from(sorted(LAYOUTS)))
    def drop(self, name: str, marked: list[bool], layout: str) -> None:
        packets = [packet(self.numbers + index, marked=mark) for index, mark in enumerate(marked)]
        self.numbers += max(1, len(packets))
        told_apart = b"" if packets else b" " * self.numbers
        self.put(name, json.dumps(packets, **LAYOUTS[layout]).encode() + told_apart)

    @rule(name=NAMES)
    def drop_a_corrupt_file(self, name: str) -> None:
        self.numbers += 1
        content = json.dumps([packet(self.numbers)]).encode()[:-1] + b"\0\0]"
        self.corrupt.add(content)
        self.put(name, content)

    def put(self, name: str, content: bytes) -> None:
        if (self.spool.pending / name).exists():  # the producer's own loss: nobody had taken it yet
            self.dropped.pop((self.spool.pending / name).read_bytes(), None)
        self.spool.drop(name, content)
        self.dropped[content] = name

    @rule(name=NAMES, marked=st.lists(st.booleans(), max_size=4))
    def drop_at_the_next_request(self, name: str, marked: list[bool]) -> None:
        self.at_request = lambda: self.drop(name, marked, "compact")

    # -------- the server

    @rule(mood=st.sampled_from(MOODS))
    def turn(self, mood: str) -> None:
        self.mood = mood

    def answer(self, packets: list[dict[str, Any]]) -> int:
        action, self.at_request = self.at_request, lambda: None
        action()
        status = {"500": 500, "503": 503, "401": 401, "cut off": STORED_BUT_CUT_OFF}.get(self.mood, 200)
        if self.mood == "too large" and len(packets) > 1:
            status = 413
        if self.mood in ("marked", "500 marked") and any(p["marked"] for p in packets):
            status = 422 if self.mood == "marked" else 500
        self.lost_answers += status == STORED_BUT_CUT_OFF
        if status in (422, 500) and len(packets) == 1:
            self.refused.add(packets[0]["length"])
        return status

    # -------- the operator

    @rule()
    def work(self) -> None:
        self.sender.monitor_and_upload(once=True)

    @rule()
    def sweep(self) -> None:
        self.sender.retry_failed_uploads()

    @rule()
    def restart(self) -> None:
        settings = {"BATCH_SIZE": self.batch_size, "MAX_RETRIES": 2, "RETRY_DELAY": 0}
        self.sender = self.spool.load(SERVER_URL=self.server.url, LOGS_DIR=self.spool.logs, **settings)

    @rule()
    def stop_at_the_next_request(self) -> None:
        self.at_request = lambda: self.sender.stop_sender()

    @rule(point=st.integers(1, 250))
    def work_and_be_killed(self, point: int) -> None:
        with contextlib.suppress(Killed), watched(self.spool.logs, Countdown(point, kill)):
            self.work()
        self.server.sever_connections()  # as the end of the process does; waits for what was on its way
        self.lost_answers += 1
        self.restart()

    # -------- the books

    def teardown(self) -> None:
        if not hasattr(self, "sender"):
            return
        self.mood = "ok"
        for _ in range(4):
            self.work()
        tree = self.spool.tree()
        files = {name: (self.spool.logs / name).read_bytes() for name in tree}
        set_aside = {name for name in files if name.endswith(".rejected.json")}
        data = {name for name in files if not name.endswith(".state")} - set_aside

        def family(name: str) -> str:
            return name.rpartition("/")[2].partition(".")[0]

        assert Counter((family(name), files[name]) for name in data) == Counter(
            (family(name), content) for content, name in self.dropped.items()
        ), tree
        for name in data:
            folder = "failed_uploads" if files[name] in self.corrupt else "processed"
            assert name.startswith(f"{folder}/"), tree
        states = {name for name in files if name.endswith(".state")}
        assert states == {f"{name}.state" for name in set_aside | {n for n in data if n.startswith("failed")}}, tree

        sent = [json.loads(text)["length"] for text in self.server.packets()]
        kept = [p["length"] for name in set_aside for p in json.loads(files[name])]
        expected = [p["length"] for content in self.dropped if content not in self.corrupt for p in json.loads(content)]
        assert sorted(sent + kept) == sorted(expected), tree
        assert set(kept) <= self.refused
        assert self.server.repeats <= self.lost_answers


@pytest.mark.timeout(1800)
def test_whatever_producer_server_and_operator_do_the_books_balance_in_the_end(
    spool: Spool, tmp_path: Path, all_points: bool, monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # or each restart would compile sender.py anew
    with MoodyServer(tmp_path / "unused.sqlite3") as server:
        SpoolMachine.home, SpoolMachine.server, SpoolMachine.lives = spool, server, 0
        run_state_machine_as_test(
            SpoolMachine,
            settings=hypothesis.settings(
                max_examples=1000 if all_points else 40,
                stateful_step_count=20,
                derandomize=not all_points,
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                suppress_health_check=list(hypothesis.HealthCheck),
                phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
            ),
        )
    record_property("lives of a spool, of up to 20 events each", SpoolMachine.lives)
