"""The spool: every state that a file can be in, who may be in its place, and that nothing is lost or overwritten."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Said, Spool, packet, wait_until
from ingest_server import IngestServer, split_packets

X = "X.json"
sentinels = itertools.count()


# ---------------------------------------------------------------- helpers


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[IngestServer]:
    with IngestServer(tmp_path / "ingest.sqlite3") as server:
        yield server


def capture(first: int = 0, count: int = 12) -> bytes:
    """A capture's content; with other `first`, of other packets but of the same size."""
    return json.dumps([packet(10_000 + first + number) for number in range(count)]).encode()


def texts(*contents: bytes) -> list[str]:
    """The packets of these captures, as the exact text that a receiver should store."""
    return [text for content in contents for text in split_packets(content.decode("utf-8-sig"))]


def batch_sizes(server: IngestServer) -> list[int]:
    """How many packets each batch held, in the order of arrival; a batch that came again counts once."""
    with contextlib.closing(sqlite3.connect(server.db_path)) as db:
        return [size for (size,) in db.execute("SELECT packets_received FROM idempotency_keys ORDER BY rowid")]


def again(server: IngestServer) -> IngestServer:
    """A receiver that was closed, started again."""
    return IngestServer(server.db_path, port=server.port)


def load(spool: Spool, receiver: IngestServer, **settings: object) -> ModuleType:
    usual = {"SERVER_URL": receiver.url, "BATCH_SIZE": 5, "POLL_INTERVAL": 0.01, "MAX_RETRIES": 1}
    return spool.load(**{**usual, **settings})


@contextlib.contextmanager
def serving(module: ModuleType) -> Iterator[threading.Thread]:
    """monitor_and_upload() in a thread, as a host program runs it; what it raises fails the test."""
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            module.monitor_and_upload()
        except BaseException as error:
            raised.append(error)

    def stopped() -> bool:
        module.stop_sender()
        return not thread.is_alive()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        wait_until(stopped, "the sender stops", 20)
    assert not raised, raised


def poll(spool: Spool, times: int = 3) -> None:
    """Wait until a running sender has looked at its folders so many times: each time it takes an empty capture."""
    for _ in range(times):
        name = f"zz{next(sentinels)}.json"
        spool.drop(name, "[]")
        wait_until((spool.processed / name).exists, f"{name} is processed", 20)
        (spool.processed / name).unlink()


def wait_for(spool: Spool, *names: str) -> None:
    """Wait until these are all the files there are."""

    def there() -> bool:
        with contextlib.suppress(FileNotFoundError):  # moved between being listed and being looked at
            return spool.names() == sorted(names)
        return False

    with contextlib.suppress(AssertionError):
        wait_until(there, "", 20)
    assert spool.names() == sorted(names), spool.tree()


def lines(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [message for message in caplog.messages if name in message]


def after_batch(module: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Do `action` when the server has answered the batch of this number."""
    upload, numbers = module.upload_packets, itertools.count(1)

    def counting(*arguments: Any, **named: Any) -> Any:
        answer = upload(*arguments, **named)
        if next(numbers) == number:
            action()
        return answer

    monkeypatch.setattr(module, "upload_packets", counting)


def at_call(
    monkeypatch: pytest.MonkeyPatch, functions: str, path: Path, action: Callable[[], object], after: bool = False
) -> list[str]:
    """Do `action` once, just before (or after) one of these functions of os is first called for `path`.

    The list that is returned holds the function's name as soon as that has happened.
    """
    happened: list[str] = []

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*arguments: Any, **named: Any) -> Any:
            hit = not happened and isinstance(arguments[0], (str, os.PathLike)) and os.fspath(arguments[0]) == str(path)
            if hit:
                happened.append(name)
                if not after:
                    action()
            result = real(*arguments, **named)
            if hit and after:
                action()
            return result

        return call

    for name in functions.split():
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return happened


def fail_moves_to(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Let renames into `folder` fail; the list that is returned holds the names that were tried."""
    tried: list[str] = []

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(source: Any, target: Any, *rest: Any, **named: Any) -> Any:
            if Path(os.fspath(target)).parent == folder:
                tried.append(Path(os.fspath(target)).name)
                raise PermissionError(13, "Permission denied", os.fspath(target))
            return real(source, target, *rest, **named)

        return refuse

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return tried


class Crash(BaseException):
    """The end of the process, for a test that goes on."""


def taken_half_way(spool: Spool, receiver: IngestServer, content: bytes, name: str = X, batches: int = 1) -> None:
    """Leave `name` as a crash after its first batches leaves it: taken, with its record."""
    spool.drop(name, content)
    module = load(spool, receiver)
    upload, left = module.upload_packets, iter(range(batches))

    def upload_or_crash(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise Crash
        return upload(*arguments, **named)

    module.__dict__["upload_packets"] = upload_or_crash
    with pytest.raises(Crash):
        module.process_json_file(spool.pending / name)
    assert (spool.pending / (name + ".taken")).read_bytes() == content, spool.tree()
    assert (spool.pending / (name + ".state")).is_file(), spool.tree()
    assert len(batch_sizes(receiver)) == batches


def failed_half_way(spool: Spool, receiver: IngestServer, content: bytes, name: str = X) -> IngestServer:
    """Leave `name` as an outage after its first batch leaves it: failed, with its record. Returns the server, back."""
    spool.drop(name, content)
    module = load(spool, receiver)
    with pytest.MonkeyPatch.context() as patch:
        after_batch(module, patch, 1, receiver.close)
        assert not module.process_json_file(spool.pending / name)
    assert (spool.failed / name).read_bytes() == content, spool.tree()
    assert (spool.failed / (name + ".state")).is_file(), spool.tree()
    return again(receiver)


def record_of(spool: Spool, folder: str, name: str = X) -> dict[str, Any]:
    record = json.loads((spool.logs / folder / (name + ".state")).read_bytes())
    assert isinstance(record, dict)
    return record


# ---------------------------------------------------------------- every row of the state table

PENDING, FAILED = "pending_upload/", "failed_uploads/"
ROWS = {
    "ready": [PENDING + "X.json", PENDING + "X.json.ready"],
    "taken, its marker still there": [PENDING + "X.json.taken", PENDING + "X.json.ready"],
    "taken": [PENDING + "X.json.taken"],
    "failed": [FAILED + "X.json"],
}


def put(spool: Spool, files: list[str], content: bytes, name: str = X) -> None:
    for file in files:
        path = spool.logs / file.replace(X, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if file.endswith(".ready") else content)


@pytest.mark.parametrize("files", ROWS.values(), ids=ROWS)
def test_a_start_uploads_a_file_in_any_state(spool: Spool, receiver: IngestServer, files: list[str]) -> None:
    content = capture()
    put(spool, files, content)
    with serving(load(spool, receiver)):
        wait_for(spool, "processed/X.json")
        poll(spool)
    assert spool.names() == ["processed/X.json"], spool.tree()
    assert (spool.processed / X).read_bytes() == content
    assert receiver.packets() == texts(content)
    assert batch_sizes(receiver) == [5, 5, 2]
    assert receiver.repeats == 0


def test_the_record_tells_a_person_how_far_a_file_is_and_why(spool: Spool, receiver: IngestServer) -> None:
    failed_half_way(spool, receiver, capture()).close()
    told = record_of(spool, "failed_uploads").values()
    assert {5, 12} <= {value for value in told if isinstance(value, int)}, told
    assert any("Cannot connect to server" in value for value in told if isinstance(value, str)), told


def test_a_file_without_its_marker_is_not_ours(spool: Spool, receiver: IngestServer) -> None:
    spool.pending.mkdir(parents=True)
    (spool.pending / X).write_bytes(capture()[:100])
    (spool.pending / "Y.json.tmp").write_bytes(capture()[:100])
    (spool.pending / "notes.txt").write_text("mine")
    before = spool.tree()
    with serving(load(spool, receiver)):
        poll(spool)
        assert spool.tree() == before
        (spool.pending / X).write_bytes(capture())
        (spool.pending / "X.json.ready").touch()
        wait_until((spool.processed / X).exists, "X.json is processed", 20)
    assert receiver.packets() == texts(capture())


def test_a_bare_marker_waits_for_its_file(
    spool: Spool, receiver: IngestServer, caplog: pytest.LogCaptureFixture
) -> None:
    spool.pending.mkdir(parents=True)
    (spool.pending / "X.json.ready").touch()
    with serving(load(spool, receiver)):
        poll(spool)
        assert spool.names() == ["pending_upload/X.json.ready"], spool.tree()
        assert lines(caplog, X) == []
        (spool.folder / X).write_bytes(capture())
        (spool.folder / X).rename(spool.pending / X)
        wait_for(spool, "processed/X.json")
    assert receiver.packets() == texts(capture())


def test_what_is_named_like_a_record_without_a_file_is_kept_if_it_is_none(spool: Spool, receiver: IngestServer) -> None:
    spool.pending.mkdir(parents=True)
    for number, content in enumerate((b"", b"{", b"[" * 200_000, b"\xff", b"9" * 5000, capture())):
        (spool.pending / f"{number}.json.state").write_bytes(content)
    before = spool.tree()
    put(spool, ["failed_uploads/X.json"], capture(100))
    with serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        wait_for(spool, *before, "processed/X.json")
        poll(spool)
    assert spool.tree() == {**before, "processed/X.json": len(capture(100))}
    assert receiver.packets() == texts(capture(100))


def test_files_go_in_the_order_of_their_names(spool: Spool, receiver: IngestServer) -> None:
    names = [f"packets_2026112{number}_114453.json" for number in range(8)]
    for name in (names[3], names[7], names[0], names[5], names[1], names[6], names[2], names[4]):
        spool.drop(name, capture(100 * names.index(name), 6))
    os.rename(spool.pending / names[4], spool.pending / (names[4] + ".taken"))  # a taken one has no precedence
    with serving(load(spool, receiver)):
        wait_for(spool, *(f"processed/{name}" for name in names))
    assert receiver.packets() == texts(*(capture(100 * number, 6) for number in range(8)))


def test_an_empty_array_is_a_success_without_a_request(spool: Spool, receiver: IngestServer) -> None:
    spool.drop(X, " [\n] ")
    module = load(spool, receiver)
    receiver.close()
    assert module.process_json_file(spool.pending / X)
    assert batch_sizes(receiver) == []
    assert spool.names() == ["processed/X.json"]


# ---------------------------------------------------------------- names that exist already, and names written again


# ---------------------------------------------------------------- records that are not this file's


Damage = Callable[[Path], object]


def content_of(content: bytes) -> Damage:
    return lambda record: record.write_bytes(content)


def cut_short(record: Path) -> None:
    record.write_bytes(record.read_bytes()[:-20])


def as_a_list(record: Path) -> None:
    record.write_bytes(b"[" + record.read_bytes() + b"]")


def with_a_name_more(record: Path) -> None:
    record.write_text(json.dumps({**json.loads(record.read_bytes()), "no such field": 1}))


def replaced_by_folder(record: Path) -> None:
    record.unlink()
    record.mkdir()


DAMAGES: dict[str, Damage] = {
    "empty": content_of(b""),
    "cut short": cut_short,
    "a list": as_a_list,
    "a number": content_of(b"5"),
    "null": content_of(b"null"),
    "an empty object": content_of(b"{}"),
    "an unknown field": with_a_name_more,
    "zeros": content_of(b"\0" * 4096),
    "not UTF-8": content_of(b'{"a": "\xff\xfe"}'),
    "absurd nesting": content_of(b"[" * 200_000),
    "an absurd number": content_of(b'{"uploaded": ' + b"9" * 5000 + b"}"),
    "a capture": content_of(capture()),
    "a folder": replaced_by_folder,
}

if sys.platform != "win32":  # which has no FIFOs, and symlinks only for administrators

    def replaced_by_fifo(record: Path) -> None:
        record.unlink()
        os.mkfifo(record)

    def replaced_by_symlink(record: Path) -> None:
        """To a record that would apply: not followed all the same."""
        elsewhere = record.parent.parent.parent / "elsewhere"
        record.rename(elsewhere)
        record.symlink_to(elsewhere)

    def replaced_by_dangling_symlink(record: Path) -> None:
        record.unlink()
        record.symlink_to(record.parent.parent.parent / "nowhere")

    DAMAGES["a FIFO"] = replaced_by_fifo
    DAMAGES["a symlink"] = replaced_by_symlink
    DAMAGES["a dangling symlink"] = replaced_by_dangling_symlink


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["pending_upload", "failed_uploads"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_told_once_and_ignored(
    spool: Spool, receiver: IngestServer, caplog: pytest.LogCaptureFixture, damage: Damage, folder: str
) -> None:
    content = capture()
    server = receiver
    if folder == "pending_upload":
        taken_half_way(spool, receiver, content)
    else:
        server = failed_half_way(spool, receiver, content)
    damage(spool.logs / folder / "X.json.state")
    elsewhere = {path: path.read_bytes() for path in spool.folder.glob("elsewhere")}
    caplog.clear()
    with server, serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        wait_for(spool, "processed/X.json")
    about = [record for record in caplog.records if "X.json.state" in record.getMessage()]
    told = [record.levelname for record in about if "left alone" not in record.getMessage()]  # a later sweep's word
    if damage is replaced_by_folder:
        told.pop()  # the second line: no new record can be written there
    assert told in (["WARNING"], ["ERROR"]), caplog.text
    assert receiver.packets() == texts(content)
    assert batch_sizes(receiver) == [5, 5, 2]
    assert receiver.repeats == 1  # the batch that the record had known of
    assert not (spool.folder / "nowhere").exists()
    assert {path: path.read_bytes() for path in elsewhere} == elsewhere


@pytest.mark.slow
def test_no_lie_in_a_record_loses_a_packet_or_stops_the_sender(spool: Spool, receiver: IngestServer) -> None:
    """Each field, one by one, missing, of a wrong type or of an impossible value; and the two counts together."""
    taken_half_way(spool, receiver, capture(), batches=2)
    truth = record_of(spool, "pending_upload")
    (uploaded,) = (field for field, value in truth.items() if value == 10)
    (packets,) = (field for field, value in truth.items() if value == 12)
    time_of = (spool.pending / "X.json.taken").stat().st_mtime_ns
    for path in spool.pending.iterdir():
        path.unlink()

    impossible: list[Any] = [
        None,
        "ten",
        10.5,
        float("nan"),
        -1,
        -(10**30),
        10**30,
        [],
        [[]],
        [[99, "x"]],
        [1.0],
        [True],
        {},
    ]
    lies: list[Any] = [{field: value} for field in truth for value in impossible]
    lies += [{field: True} for field, value in truth.items() if not isinstance(value, bool)]
    lies += [{uploaded: 10**30, packets: 10**30}, {uploaded: 10**30 - 1, packets: 10**30}, {uploaded: 13, packets: 14}]
    module = load(spool, receiver)
    found_out = []
    for number, lie in enumerate([*lies, *truth], 1):
        record = {**truth, **lie} if isinstance(lie, dict) else {field: truth[field] for field in truth if field != lie}
        content = capture(100 * number)
        put(spool, ["failed_uploads/X.json"], content)
        os.utime(spool.failed / X, ns=(time_of, time_of))
        (spool.failed / "X.json.state").write_text(json.dumps(record))
        module.retry_failed_uploads()
        arrived = set(texts(content)[10:]) <= set(receiver.packets()[-12:])
        if not arrived or spool.names() != ["processed/X.json"] or (spool.processed / X).read_bytes() != content:
            found_out.append((lie, spool.names()))
        for name in spool.names():
            (spool.logs / name).unlink()
    assert not found_out, "\n".join(map(str, found_out))


# ---------------------------------------------------------------- names are data


if sys.platform != "win32":  # where a path has at most 260 characters

    @pytest.mark.parametrize("length", [250, 255])
    def test_a_name_without_room_for_a_record_is_delivered(spool: Spool, receiver: IngestServer, length: int) -> None:
        spool.failed.mkdir(parents=True)
        name = "n" * (length - 5) + ".json"
        (spool.failed / name).write_bytes(capture())
        with serving(load(spool, receiver)):
            wait_for(spool, f"processed/{name}")
        assert receiver.packets() == texts(capture())


ANY_NAMES = ["a.b", "x", "t.txt", "s.JSON", "r.", "m m", "%s", "q.rejected", "p.1.json", "foo.rejected.json", ".o.json"]


def test_every_data_file_in_failed_uploads_is_swept_whatever_its_name(spool: Spool, receiver: IngestServer) -> None:
    names = [name for name in ANY_NAMES if sys.platform != "win32" or not name.endswith(".")]
    contents = {name: capture(100 * number) for number, name in enumerate(names)}
    spool.failed.mkdir(parents=True)
    for name, content in contents.items():
        (spool.failed / name).write_bytes(content)
    (spool.failed / ".gitkeep").touch()
    with serving(load(spool, receiver)):
        wait_for(spool, *(f"processed/{name}" for name in names))
    assert {name: (spool.processed / name).read_bytes() for name in names} == contents
    assert sorted(receiver.packets()) == sorted(texts(*contents.values()))
    assert (spool.failed / ".gitkeep").exists()


def test_100_000_files_of_one_name_cost_a_few_looks(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.processed.mkdir(parents=True)
    (spool.processed / X).write_bytes(b"old")
    real, looks = os.lstat, []

    def crowded(path: Any, **options: Any) -> os.stat_result:
        name = Path(os.fspath(path)).name
        if number := re.fullmatch(r"X\.(\d+)\.json", name):
            looks.append(name)
            if int(number[1]) < 100_000:
                return real(spool.processed / X)
        return real(path, **options)

    module = load(spool, receiver)
    spool.drop(X, capture())
    monkeypatch.setattr(os, "lstat", crowded)
    assert module.process_json_file(spool.pending / X)
    assert "processed/X.100000.json" in spool.names()
    assert len(looks) <= 40


def test_a_file_that_needs_more_memory_than_there_is_fails_alone(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = load(spool, receiver)
    cut = module.Capture.cut

    def greedy(self: Any, start: int, stop: int) -> bytes:
        if self.status.st_size > 2000:
            raise MemoryError
        return bytes(cut(self, start, stop))

    monkeypatch.setattr(module.Capture, "cut", greedy)
    spool.drop(X, capture(count=100))
    spool.drop("Y.json", capture(1000))
    with serving(module):
        wait_until(lambda: {"processed/Y.json", "failed_uploads/X.json"} <= set(spool.names()), "the other goes on", 20)
    assert "memory" in caplog.text
    with serving(load(spool, receiver)):
        wait_for(spool, "processed/X.json", "processed/Y.json")


def test_a_file_that_another_program_keeps_open_rests_and_holds_up_no_other(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On Windows that is ordinary."""
    for name in ("a.json", "b.json", "z.json"):
        spool.drop(name, capture(100 * ord(name[0])))
    rename, tried = os.rename, []

    def held(source: Any, target: Any) -> None:
        if Path(source).name in ("a.json", "b.json"):
            tried.append(Path(source).name)
            raise PermissionError(13, "The process cannot access the file", os.fspath(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", held)
    module = load(spool, receiver)
    with serving(module):
        wait_until(lambda: "processed/z.json" in spool.names(), "the third goes on", 20)
        for _ in range(5):
            poll(spool)
        assert tried == ["a.json", "b.json"], "they rest"
    assert len(lines(caplog, "a.json")) == 1
    monkeypatch.undo()
    with serving(load(spool, receiver)):
        wait_for(spool, "processed/a.json", "processed/b.json", "processed/z.json")


if sys.platform != "win32":

    def test_a_record_and_the_lock_are_the_owners_alone(spool: Spool, receiver: IngestServer) -> None:
        taken_half_way(spool, receiver, capture())
        with serving(load(spool, receiver)):
            wait_for(spool, "processed/X.json")
        spool.drop(X, b"[")
        load(spool, receiver).process_json_file(spool.pending / X)
        for path in (spool.failed / "X.json.state", spool.logs / ".sender.lock"):
            assert path.stat().st_mode & 0o777 == 0o600

    def test_a_record_of_another_user_is_not_believed(
        spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """He who may write to pending_upload/ could else have files pass for delivered."""
        content = spool.drop(X, capture())
        status = (spool.pending / X).stat()
        record = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "packets": 12, "uploaded": 12}
        (spool.pending / "X.json.state").write_text(json.dumps(record))
        module = load(spool, receiver)
        monkeypatch.setattr(module, "_UID", os.geteuid() + 1)
        assert module.process_json_file(spool.pending / X)
        assert receiver.packets() == texts(content)
        assert "another user" in caplog.text

    def test_no_link_gets_a_marker(
        spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        spool.drop(X, capture())
        marker = spool.pending / "X.json.ready"

        def race() -> None:
            (spool.pending / X).write_bytes(capture(100))
            marker.symlink_to(outside)

        at_call(monkeypatch, "unlink remove", marker, race, True)
        load(spool, receiver).process_json_file(spool.pending / X)
        assert not outside.exists()


@pytest.mark.parametrize("odd", ["X.json.taken", "X.json.ready"])
def test_a_folder_where_a_taken_file_or_a_marker_belongs_is_told_once(
    spool: Spool, receiver: IngestServer, caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    spool.pending.mkdir(parents=True)
    (spool.pending / X).write_bytes(capture())
    (spool.pending / "X.json.ready").touch() if "taken" in odd else None
    (spool.pending / odd).mkdir()
    with serving(load(spool, receiver)):
        for _ in range(4):
            poll(spool)
    assert (spool.pending / X).is_file()
    assert batch_sizes(receiver).count(12) == 0
    assert len([line for line in lines(caplog, "X.json") if "not a regular file" in line]) == 1


# ---------------------------------------------------------------- what is not a regular file

Impostor = Callable[[Path, Path], object]  # makes something at the first path; the second is a capture elsewhere


def a_folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()
    (path / "inside.json").write_bytes(elsewhere.read_bytes())


IMPOSTORS: dict[str, Impostor] = {"a folder": a_folder}

if sys.platform != "win32":

    def a_socket(path: Path, elsewhere: Path) -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has at most 104 bytes
        try:
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(path.name)
        finally:
            os.chdir(here)

    IMPOSTORS.update(
        {
            "a symlink to a capture": lambda path, elsewhere: path.symlink_to(elsewhere),
            "a symlink to nothing": lambda path, elsewhere: path.symlink_to(path.with_name("nothing")),
            "a symlink to itself": lambda path, elsewhere: path.symlink_to(path.name),
            "a symlink to a device": lambda path, elsewhere: path.symlink_to("/dev/null"),
            "a symlink to an endless device": lambda path, elsewhere: path.symlink_to("/dev/zero"),
            "a symlink to a folder": lambda path, elsewhere: path.symlink_to(elsewhere.parent),
            "a FIFO": lambda path, elsewhere: os.mkfifo(path),
            "a socket": a_socket,
        }
    )


@pytest.fixture
def elsewhere(spool: Spool) -> Path:
    """A capture outside the spool: whoever follows a symlink would send it, or move it."""
    path = spool.folder / "elsewhere" / "private.json"
    path.parent.mkdir()
    path.write_bytes(capture(5000))
    return path


PLACES = ["pending_upload/X.json", "pending_upload/X.json.taken", "failed_uploads/X.json", "failed_uploads/X"]


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file_is_told_once_and_left_alone(
    spool: Spool, receiver: IngestServer, elsewhere: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    paths = [spool.logs / place.replace("X", f"({number})") for number in range(len(IMPOSTORS))]
    paths[0].parent.mkdir(parents=True)
    for path, impostor in zip(paths, IMPOSTORS.values()):
        impostor(path, elsewhere)
        if place == PLACES[0]:
            path.with_name(path.name + ".ready").touch()
    before = [(path.lstat().st_ino, path.lstat().st_mode) for path in paths]
    with serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        poll(spool)
        spool.drop("Y.json", capture())
        wait_until((spool.processed / "Y.json").exists, "others are not held up", 20)
    assert [(path.lstat().st_ino, path.lstat().st_mode) for path in paths] == before
    assert elsewhere.read_bytes() == capture(5000)
    assert receiver.packets() == texts(capture())
    for number in range(len(IMPOSTORS)):
        told = lines(caplog, f"({number})")
        assert len(told) == 1, told
        assert "not a regular file" in told[0]
    assert os.listdir(spool.processed) == ["Y.json"]


@pytest.mark.slow
@pytest.mark.parametrize("functions", ["open", "rename replace"])
@pytest.mark.parametrize("impostor", IMPOSTORS.values(), ids=IMPOSTORS)
def test_what_is_swapped_in_after_the_check_is_not_opened_followed_or_waited_for(
    spool: Spool,
    receiver: IngestServer,
    elsewhere: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    impostor: Impostor,
    functions: str,
) -> None:
    """The swap comes at the last moment: just before the rename that takes the file, or just before it is opened."""
    path = spool.pending / ("X.json.taken" if functions == "open" else X)
    spool.drop(X, capture(100))

    def swap() -> None:
        os.utime(elsewhere, ns=(path.stat().st_mtime_ns,) * 2)  # nothing but its place tells it from the capture
        path.unlink()
        impostor(path, elsewhere)

    moment = at_call(monkeypatch, functions, path, swap)
    with serving(load(spool, receiver)):
        wait_until(lambda: moment, "the swap", 20)
        poll(spool)
    assert receiver.packets() == []
    assert elsewhere.read_bytes() == capture(5000)
    assert os.listdir(spool.processed) == []
    (impostor_left,) = (entry for entry in spool.pending.iterdir() if not entry.name.endswith(".ready"))
    assert not stat.S_ISREG(impostor_left.lstat().st_mode)
    assert 1 <= len(lines(caplog, X)) <= 2, caplog.text  # of the swap, and of what is there since


# ---------------------------------------------------------------- files that change while they are read


@pytest.mark.slow
def test_a_file_that_is_cut_short_while_it_is_uploaded_is_kept_and_told(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = spool.drop(X, capture(count=40))
    module = load(spool, receiver)
    after_batch(module, monkeypatch, 1, lambda: os.truncate(spool.pending / "X.json.taken", 700))
    with serving(module):
        wait_for(spool, "failed_uploads/X.json", "failed_uploads/X.json.state")
        poll(spool)
    assert (spool.failed / X).read_bytes() == content[:700]
    assert receiver.packets() == texts(content)[:5]
    assert any("byte" in line for line in lines(caplog, X)), caplog.text


@pytest.mark.parametrize("folder", ["pending_upload", "failed_uploads"])
def test_a_file_that_vanishes_while_it_is_uploaded_stops_nobody(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, folder: str
) -> None:
    put(spool, [f"{folder}/X.json" + (".taken" if folder == "pending_upload" else "")], capture())
    module = load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)
    after_batch(module, monkeypatch, 1, next((spool.logs / folder).iterdir()).unlink)
    with serving(module):
        wait_until(lambda: lines(caplog, X), "it is told", 20)
        poll(spool)
    assert spool.names() == [], spool.tree()
    told = [record for record in caplog.records if X in record.getMessage() and record.levelno > logging.INFO]
    assert len(told) == 1, caplog.text


@pytest.mark.parametrize("change", [b" ", b"x", None], ids=["grows harmlessly", "grows", "shrinks"])
def test_a_file_that_changes_between_being_opened_and_read_is_judged_by_what_it_becomes(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, change: bytes | None
) -> None:
    content = spool.drop(X, capture())
    path = spool.pending / "X.json.taken"

    def write() -> None:
        with open(path, "r+b") as file:
            if change:
                file.seek(0, os.SEEK_END)
                file.write(change)
            else:
                file.truncate(100)

    moment = at_call(monkeypatch, "open", path, write, after=True)
    with serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        wait_until(lambda: moment, "the change", 20)
        if change == b" ":
            wait_for(spool, "processed/X.json")
        else:
            wait_for(spool, "failed_uploads/X.json", "failed_uploads/X.json.state")
            poll(spool)
    assert receiver.packets() == (texts(content) if change == b" " else [])
    (kept,) = (spool.logs / name for name in spool.names() if name.endswith(X))
    assert kept.read_bytes() == (content + change if change else content[:100])


if sys.platform != "win32":
    HUGE = 10 * 1024**3
    PROBE = """
import json, resource, subprocess, sys
if sys.platform == "linux":  # a reader that took it all would take this machine's memory with it
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
code = subprocess.call([sys.executable, *sys.argv[1:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""

    def cost(spool: Spool, receiver: IngestServer) -> tuple[float, int]:
        """CPU seconds and peak memory (bytes) of one `sender.py --once`."""
        done = subprocess.run(
            [sys.executable, "-c", PROBE, str(spool.sender_py), "--once"],
            env=spool.environment(SERVER_URL=receiver.url),
            capture_output=True,
            check=True,
            timeout=100,
        )
        _, seconds, peak = json.loads(done.stdout)
        return seconds, peak * (1 if sys.platform == "darwin" else 1024)

    BEGINNINGS = (b"", b"[", b'[{"t": 1}', b'[{"t": 1}, {"t": 2}]', b'[{"t": 1}, ', b'[{"t": "', capture(count=9999))

    @pytest.mark.slow
    def test_gigabytes_of_zeros_are_refused_at_little_cost(spool: Spool, receiver: IngestServer) -> None:
        spool.drop("small.json", capture(count=10_000))
        seconds, memory = cost(spool, receiver)
        names = [f"{number}.json" for number in range(len(BEGINNINGS))]
        try:
            for name, beginning in zip(names, BEGINNINGS):
                spool.drop(name, beginning)
                os.truncate(spool.pending / name, HUGE)
            huge_seconds, huge_memory = cost(spool, receiver)
            for name in names:
                assert (spool.failed / name).stat().st_size == HUGE, spool.tree()
            assert huge_seconds < seconds + 0.5 * len(names)
            assert huge_memory < memory + 150_000_000
            assert len(receiver.packets()) == 10_000
        finally:
            for path in (folder / name for folder in (spool.pending, spool.failed) for name in names):
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------- folders


def test_folders_that_vanish_are_made_again(spool: Spool, receiver: IngestServer) -> None:
    with serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        poll(spool)
        for number, folders in enumerate(
            ([spool.pending], [spool.failed], [spool.processed], [spool.pending, spool.failed, spool.processed])
        ):
            for folder in folders:
                shutil.rmtree(folder)
            wait_until(lambda: spool.pending.exists() and spool.failed.exists(), "the folders are back", 20)
            content = spool.drop(f"{number}.json", capture(100 * number))
            wait_until((spool.processed / f"{number}.json").exists, "a file is processed again", 20)
            assert (spool.processed / f"{number}.json").read_bytes() == content
    assert receiver.packets() == texts(*(capture(100 * number) for number in range(4)))


def test_a_destination_that_vanishes_is_made_again(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.drop(X, capture())
    spool.drop("Y.json", capture(100))
    spool.processed.mkdir()
    spool.failed.mkdir()
    module = load(spool, receiver)
    after_batch(module, monkeypatch, 3, lambda: spool.processed.rmdir())
    assert module.process_json_file(spool.pending / X)

    def outage() -> None:
        receiver.close()
        spool.failed.rmdir()

    module = load(spool, receiver)
    after_batch(module, monkeypatch, 1, outage)
    assert not module.process_json_file(spool.pending / "Y.json")
    assert spool.names() == ["failed_uploads/Y.json", "failed_uploads/Y.json.state", "processed/X.json"], spool.tree()


def test_a_file_that_cannot_be_taken_is_never_uploaded_and_told_once(
    spool: Spool, receiver: IngestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder without write permission must not become a storm of duplicates."""
    content = spool.drop(X, capture())
    module = load(spool, receiver, RETRY_FAILED_INTERVAL=0.1)
    with monkeypatch.context() as patch:
        tried = fail_moves_to(patch, spool.pending)
        with serving(module):
            wait_until(lambda: len(tried) >= 5, "it is tried again", 20)
        assert batch_sizes(receiver) == []
        assert len(lines(caplog, X)) == 1, caplog.text
        assert (spool.pending / X).read_bytes() == content
    with serving(module):
        wait_for(spool, "processed/X.json")
    assert receiver.packets() == texts(content)


# ---------------------------------------------------------------- KEEP_PROCESSED_DAYS

DAY = 86400


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def test_days_of_keeping_count_from_the_capture(spool: Spool, receiver: IngestServer) -> None:
    for name, days in ((X, 100), ("Y.json", 0.5)):
        spool.drop(name, capture(ord(name[0]) * 100))
        age(spool.pending / name, days)
    with serving(load(spool, receiver, KEEP_PROCESSED_DAYS=1, RETRY_FAILED_INTERVAL=0.01)):
        wait_until(lambda: len(receiver.packets()) == 24, "both are uploaded", 20)
        wait_until(lambda: spool.names() == ["processed/Y.json"], "X.json is deleted", 20)
        shutil.rmtree(spool.processed)
        spool.drop("Z.json", capture(900))
        wait_for(spool, "processed/Z.json")


def test_only_uploaded_captures_are_deleted_and_only_when_they_are_old(spool: Spool, receiver: IngestServer) -> None:
    spool.processed.mkdir(parents=True)
    outside = spool.folder / "outside.json"
    names = ("old.json", "old.1.json", "young.json", "notes.txt", ".gitkeep")
    for path in (outside, *(spool.processed / name for name in names)):
        path.write_bytes(capture())
        age(path, 0.9 if path.name == "young.json" else 1.1)
    (spool.processed / "folder.json").mkdir()
    (spool.processed / "folder.json" / "inside.json").write_bytes(capture())
    age(spool.processed / "folder.json" / "inside.json", 2)
    age(spool.processed / "folder.json", 2)
    kept = ["folder.json", "young.json", "notes.txt", ".gitkeep"]
    if sys.platform != "win32":
        (spool.processed / "link.json").symlink_to(outside)
        os.utime(spool.processed / "link.json", (1, 1), follow_symlinks=False)
        kept.append("link.json")
    for folder in (spool.pending, spool.failed):
        folder.mkdir()
    (spool.pending / "unready.json").write_bytes(capture())
    age(spool.pending / "unready.json", 100)
    with serving(load(spool, receiver, KEEP_PROCESSED_DAYS=1, RETRY_FAILED_INTERVAL=0.01)):
        wait_until(lambda: not (spool.processed / "old.json").exists(), "old.json is deleted", 20)
        poll(spool)
    assert sorted(os.listdir(spool.processed)) == sorted(kept)
    assert (spool.processed / "folder.json" / "inside.json").exists()
    assert outside.exists()
    assert os.listdir(spool.pending) == ["unready.json"]


def test_without_days_of_keeping_nothing_is_ever_deleted(spool: Spool, receiver: IngestServer) -> None:
    put(spool, ["processed/X.json"], capture())
    os.utime(spool.processed / X, (0, 0))
    with serving(load(spool, receiver, RETRY_FAILED_INTERVAL=0.01)):
        poll(spool)
    assert spool.names() == ["processed/X.json"]


def test_a_producer_that_writes_a_taken_name_again_gets_no_marker(spool: Spool, tmp_path: Path) -> None:
    spool.drop("a.json", [packet(n) for n in range(3)])
    (spool.pending / "a.json").rename(spool.pending / "a.json.taken")
    (spool.pending / "a.json.ready").unlink()
    (spool.pending / "a.json").write_bytes(b'[{"half": "wri')
    with IngestServer(tmp_path / "db") as server:
        sender = spool.load(SERVER_URL=server.url)
        sender.monitor_and_upload(once=True)
        assert spool.names() == ["pending_upload/a.json", "processed/a.json"]
        spool.drop("a.json", [packet(n) for n in range(5)])
        sender.monitor_and_upload(once=True)
        assert spool.names() == ["processed/a.1.json", "processed/a.json"]
        assert len(server.packets()) == 8


def test_an_old_file_that_stays_keeps_no_other(spool: Spool, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    unlink = os.unlink

    def refuse(path: Any, *arguments: Any) -> None:
        if Path(path).name == "b.json":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *arguments)

    for name in ("a.json", "b.json", "c.json"):
        spool.processed.mkdir(parents=True, exist_ok=True)
        (spool.processed / name).write_text("[]")
        os.utime(spool.processed / name, (1, 1))
    sender = spool.load(SERVER_URL="http://127.0.0.1:9/ingest", KEEP_PROCESSED_DAYS=1)
    monkeypatch.setattr(sender.os, "unlink", refuse)
    for _ in range(2):
        sender._prune_processed()
    assert spool.names() == ["processed/b.json"]
    assert len(said(logging.WARNING)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_nothing_is_written_through_a_link_at_the_temporary_name(spool: Spool, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    spool.drop("a.json", [packet(n) for n in range(4)])
    (spool.pending / ".sender.tmp").symlink_to(precious)
    with IngestServer(tmp_path / "db") as server:
        assert spool.load(SERVER_URL=server.url, BATCH_SIZE=2).process_json_file(spool.pending / "a.json")
    assert precious.read_text() == "mine"
    assert spool.names() == ["processed/a.json"]
