"""What an attack on the whole program found: each of these once lost data, wrote where it must not, or hung."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from conftest import Spool, numbered, wait_until
from ingest_server import IngestServer


def test_a_second_loop_in_one_module_is_refused_and_leaves_the_first_one_stoppable(spool: Spool) -> None:
    module = spool.load(SERVER_URL="http://127.0.0.1:9/ingest")
    first = threading.Thread(target=module.monitor_and_upload, daemon=True)
    first.start()
    wait_until(spool.processed.exists, "the first loop runs")
    with pytest.raises(module.AlreadyRunning, match=str(os.getpid())):
        module.monitor_and_upload()
    module.stop_sender()
    first.join(30)
    assert not first.is_alive()


def test_a_data_file_that_is_named_like_a_marker_is_never_removed_as_one(spool: Spool, tmp_path: Path) -> None:
    spool.failed.mkdir(parents=True)
    (spool.failed / "a.ready").write_text(json.dumps(numbered(3)))
    spool.processed.write_text("a file in the folder's place, so that the move fails")
    with IngestServer(tmp_path / "db") as server:
        for _ in range(2):
            assert spool.run("--once", SERVER_URL=server.url).returncode == 1
        assert json.loads((spool.failed / "a.ready").read_text()) == numbered(3)
        spool.processed.unlink()
        spool.run("--once", SERVER_URL=server.url)
        assert spool.names() == ["processed/a.ready"]
        assert len(server.packets()) == 3
        assert server.repeats == 0


def test_a_lock_that_vanishes_with_its_folder_is_taken_anew(spool: Spool) -> None:
    spool.start(SERVER_URL="http://127.0.0.1:9/ingest")
    lock = spool.logs / ".sender.lock"
    wait_until(spool.processed.exists, "it runs")
    shutil.rmtree(spool.logs, ignore_errors=True)
    wait_until(lambda: lock.exists() and lock.read_text(), "the lock is back")
    second = spool.run("--once", SERVER_URL="http://127.0.0.1:9/ingest")
    assert second.returncode == 1
    assert f"pid {spool.processes[0].pid}" in second.stderr


if sys.platform != "win32":

    def test_nothing_is_written_through_a_link_at_the_temporary_name(spool: Spool, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_text("mine")
        spool.drop("a.json", numbered(4))
        (spool.pending / ".sender.tmp").symlink_to(precious)
        with IngestServer(tmp_path / "db") as server:
            assert spool.load(SERVER_URL=server.url, BATCH_SIZE=2).process_json_file(spool.pending / "a.json")
        assert precious.read_text() == "mine"
        assert spool.names() == ["processed/a.json"]
