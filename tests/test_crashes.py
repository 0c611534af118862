"""The end at any moment: kill -9 and power cuts, by exhaustion, and the books balanced after each."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Spool
from faults import AFTER, BEFORE, CRASHED, MoodyServer, Operation, watched
from ingest_server import PacketStore
from scenarios import SCENARIOS, Play, Stage, report, spread, stage_for

pytestmark = pytest.mark.slow

FAULTS = Path(__file__).with_name("faults.py")


@pytest.fixture
def stage(spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(logging.getLogger("sender"), "disabled", True)  # it would be thousands of lines
    with stage_for(spool, tmp_path) as stage:
        yield stage


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_the_end_at_any_point_loses_nothing_and_repeats_at_most_one_batch(
    scenario: str, stage: Stage, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    there_are = stage(scenario, "count").run_until(0).count
    points = spread(there_are, 7, all_points)
    failures = []
    for point in points:
        play = stage(scenario, point)
        ended = play.run_until(point)
        try:
            play.balance(play.run)
        except Exception as error:
            failures.append(f"{point}, {ended.where}: {error}")
            if len(failures) == 5:
                break
    record_property(f"crash points in '{scenario}'", f"{len(points)} of {there_are} tried")
    assert there_are > 200
    report(failures, len(points))


def test_the_end_of_the_run_that_repairs_another_end_loses_nothing_either(
    stage: Stage, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    there_are = stage("deliveries", "count").run_until(0).count
    chance = random.Random(1)
    pairs = [(chance.randint(1, there_are), chance.randint(1, there_are)) for _ in range(400 if all_points else 30)]
    failures = []
    for number, pair in enumerate(pairs):
        play = stage("deliveries", number)
        ended = [play.run_until(point).where for point in pair]
        try:
            play.balance(play.run, crashes=2)
        except Exception as error:
            failures.append(f"{ended}: {error}")
            if len(failures) == 5:
                break
    record_property("pairs of crash points, the second in the repairing run", len(pairs))
    report(failures, len(pairs))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_a_process_that_ends_hard_at_any_point_is_repaired_by_the_next(
    scenario: str, spool: Spool, tmp_path: Path, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    failures: list[str] = []
    crashed: list[int] = []

    def sender(play: Play, *wrapper: str) -> int:
        command = [sys.executable, *wrapper, str(play.spool.sender_py), "--once"]
        environment = play.spool.environment(**play.settings)
        return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=100).returncode

    def try_points(points: list[int], worker: int) -> None:
        with MoodyServer(tmp_path / f"unused{worker}.sqlite3") as server:
            for point in points:
                play = Play(SCENARIOS[scenario], spool, server, tmp_path / str(point))
                crashed.append(sender(play, str(FAULTS), str(play.spool.logs), str(point)))
                statuses: list[int] = []
                try:
                    play.balance(functools.partial(lambda play, to: to.append(sender(play)), play, statuses))
                    assert statuses[-1] == play.scenario.status, statuses
                except Exception as error:
                    failures.append(f"{point}: {error}")

    with MoodyServer(tmp_path / "unused.sqlite3") as server:
        there_are = Play(SCENARIOS[scenario], spool, server, tmp_path / "count").run_until(0).count
    points = spread(there_are, 40, all_points)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(try_points, (points[::2], points[1::2]), (1, 2)))
    record_property(f"crash points in '{scenario}', real processes", f"{len(points)} of {there_are} tried")
    assert crashed == [CRASHED] * len(points)
    report(failures, len(points))


# ---------------------------------------------------------------- power cuts


class Inode:
    """A file on the simulated disk: what was written, and how much of it an fsync has made last."""

    def __init__(self, content: bytes = b"", mtime_ns: int | None = None) -> None:
        self.content, self.lasting, self.mtime_ns = content, content, mtime_ns


def record(play: Play) -> tuple[dict[str, Inode], list[Operation]]:
    """Perform a scenario; the files before it, and everything that happened to them, to the last system call."""
    logs = play.spool.logs
    events: list[Operation] = []

    def inode(path: str) -> Inode:
        return Inode((logs / path).read_bytes(), (logs / path).stat().st_mtime_ns)

    def note(operation: Operation, phase: str) -> None:
        if phase == (BEFORE if operation.call == "create" else AFTER) and operation.call in CHANGES:
            events.append(operation)

    def produced(name: str, content: bytes) -> None:
        events.extend(
            Operation("produce", f"pending_upload/{path}", data=data)
            for path, data in ((name, content), (f"{name}.ready", b""))
        )

    before = {path: inode(path) for path in play.spool.names()}
    play.on_rewrite = produced
    play.on_request = lambda packets: events.append(Operation("request", data=json.dumps(packets).encode()))
    play.server.on_stored = lambda key, packets: events.append(Operation("post", key, data="\n".join(packets).encode()))
    with watched(logs, note):
        play.run()
    play.server.on_stored = lambda key, packets: None
    return before, [event for event in events if event.path != ".sender.lock"]


CHANGES = ("create", "write", "fsync", "rename", "unlink")
NAMES = ("create", "rename", "unlink")  # what changes a folder


def folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def lasting(events: list[Operation]) -> set[int]:
    """The changes of names that a power cut after all these events cannot undo: their folder was fsynced since.

    Windows has no such call; NTFS keeps the order of its renames.
    """
    if os.name == "nt":
        return set(range(len(events)))
    kept, synced, needed = set(), set(), set()
    for number, event in reversed(list(enumerate(events))):
        if event.call == "fsync":
            synced.add(event.path)
        elif event.call in NAMES and (
            {folder_of(event.path), folder_of(event.target)} & synced or (event.target or event.path) in needed
        ):
            kept.add(number)
            if event.call == "rename":  # cannot last without that which made the name it renames
                needed.add(event.path)
    return kept


def survivors(before: dict[str, Inode], events: list[Operation], kept: set[int], written: float) -> dict[str, Inode]:
    """The files after a power cut that kept these changes of names, and such a share of what was not fsynced."""
    names = {path: Inode(inode.content, inode.mtime_ns) for path, inode in before.items()}
    opened: dict[str, Inode] = {}
    for number, event in enumerate(events):
        if event.call == "produce":  # the producer's own durability is not on trial
            names[event.path] = Inode(event.data)
        elif event.call == "create":
            opened[event.path] = inode = names.get(event.path, Inode())
            inode.content = b""
            if number in kept:
                names[event.path] = inode
        elif event.call == "write":
            opened[event.path].content += event.data
        elif event.call == "fsync" and event.path in opened:
            opened[event.path].lasting = opened[event.path].content
        elif event.call == "rename" and number in kept and event.path in names:
            names[event.target] = names.pop(event.path)
        elif event.call == "unlink" and number in kept:
            names.pop(event.path, None)
    for inode in names.values():
        if inode.content != inode.lasting:
            inode.content = inode.content[: int(written * len(inode.content))]
    return names


def power_cuts(
    before: dict[str, Inode], events: list[Operation]
) -> Iterator[tuple[str, dict[str, Inode], list[Operation]]]:
    """Every different state of the disk that a power cut can leave, with what had happened until then."""
    known = set()
    for end in range(len(events) + 1):
        past = events[:end]
        if past and past[-1].call == "produce" and not past[-1].path.endswith(".ready"):
            continue  # the producer's own steps are not on trial
        sure = lasting(past)
        unsure = [number for number, event in enumerate(past) if event.call in NAMES and number not in sure]
        for some in {
            (),
            tuple(unsure),
            *itertools.combinations(unsure, 1),
            *itertools.combinations(unsure, max(0, len(unsure) - 1)),
        }:
            for written in (0, 0.5, 1):
                names = survivors(before, past, sure | set(some), written)
                posts = sum(event.call == "post" for event in past)
                state = (posts, frozenset((path, inode.content) for path, inode in names.items()))
                if state not in known:
                    known.add(state)
                    lost = ", ".join(str(past[number]) for number in unsure if number not in some)
                    yield (
                        f"after {past[-1] if past else 'nothing'}; lost: {lost or 'nothing'}; written: {written}",
                        names,
                        past,
                    )


def restore(play: Play, names: dict[str, Inode], past: list[Operation]) -> None:
    """Put the play into the state that a power cut left."""
    for path in play.spool.names():
        (play.spool.logs / path).unlink()
    for path, inode in names.items():
        file = play.spool.logs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(inode.content)
        if inode.mtime_ns is not None:
            os.utime(file, ns=(inode.mtime_ns, inode.mtime_ns))
    if any(event.call == "produce" for event in past):
        play.seen.add("rewrite")
    with PacketStore(play.server.db_path) as store:
        for event in past:
            if event.call == "post":
                store.add(event.data.decode().split("\n"), event.path)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_a_power_cut_that_keeps_only_what_was_fsynced_loses_nothing_and_repeats_at_most_one_batch(
    scenario: str, stage: Stage, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    before, events = record(stage(scenario, "recorded"))
    states = list(power_cuts(before, events))
    failures = []
    chosen = spread(len(states), 5, all_points)
    for number in chosen:
        when, names, past = states[number - 1]
        play = stage(scenario, number)
        restore(play, names, past)
        try:
            # A marker's unlink is not worth an fsync of its own: alone it means nothing until its JSON appears.
            play.balance(play.run, bare_markers=True)
        except Exception as error:
            failures.append(f"{number}, {when}: {error}")
            if len(failures) == 5:
                break
    record_property(f"states after a power cut in '{scenario}'", f"{len(chosen)} of {len(states)} tried")
    report(failures, len(chosen))


@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_what_a_rename_publishes_was_fsynced_before_and_its_folder_is_before_anything_relies_on_it(
    scenario: str, stage: Stage
) -> None:
    _, events = record(stage(scenario, "recorded"))
    dirty: set[str] = set()  # files with content that no fsync has made last
    unsynced: set[str] = set()  # folders with a rename that no fsync has made last
    renames = 0
    for event in events:
        if event.call == "write":
            dirty.add(event.path)
        elif event.call == "fsync":
            dirty.discard(event.path)
            unsynced.discard(event.path)
        elif event.call == "rename" and not event.target.endswith(".sender.tmp"):  # that is tried out at the start
            assert event.path not in dirty, f"{event} before its fsync"
            unsynced |= {folder_of(event.target)} if os.name != "nt" else set()
            renames += 1
        elif event.call in ("unlink", "request"):
            assert not unsynced, f"{event} while a rename in {unsynced} may be undone"
    assert renames > 8
    assert not dirty | unsynced


@pytest.mark.parametrize("scenario", ["deliveries", "refusals"])
def test_before_a_batch_goes_out_a_record_that_lasts_tells_where_it_begins(scenario: str, stage: Stage) -> None:
    play = stage(scenario, "recorded")
    before, events = record(play)
    files = {**play.scenario.before, **play.scenario.after}
    requests = 0
    for number, event in enumerate(events):
        if event.call != "request":
            continue
        first, *_ = json.loads(event.data)
        (name, offset), *_ = (
            (Path(path).name, content.index(first))
            for path, content in files.items()
            if not isinstance(content, bytes) and ".rejected" not in path and first in content
        )
        if offset:
            lasting_files = survivors(before, events[:number], lasting(events[:number]), 0)
            records = [inode.content for path, inode in lasting_files.items() if path.endswith(f"/{name}.state")]
            told = json.loads(records[0])
            assert offset == told["uploaded"] or offset in told["refused"], f"packet {offset} of {name}, {records}"
            requests += 1
    assert requests > 2
