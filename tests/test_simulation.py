"""Whole lives of a sensor (simulation.py): some hundred; with --all-points, also mutations, which lives must find."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from simulation import SCREEN, SENDER, compiled, play, play_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="lives have file names that other systems refuse"),
]

FOUND = {  # what each has found in a sender.py of its time
    39: "a search in vain left its size, and the next round cut the same batch anew",
    90: "after a restart with a smaller BATCH_SIZE, a file went on in larger batches",
    113: "of many refused packets in one file, only some were tried again",
    290: "one bad file cost a sweep beside each new file, without a pause",
    342: "a file that was moved by hand and a newcomer of its name shared one record",
    1191: "so a file that was moved by hand was sent again in other batches",
    1733: "refused packets were tried again at each sweep, while others passed",
    5321: "refusals of an earlier round were taken back, and another batch passed for the unanswered one",
    9317: "turns went on from the records in failed_uploads/ alone, and a file that came later waited for long",
    27943: "three files that always failed came first in each sweep, and a refused packet had no turn",
    58785: "a search was cut off, and in the next round a piece of it passed for the batch without an answer",
}
LIVES = 2000  # within so many each mutation must be found

# name, old text (which must be in sender.py once), new text
MUTATIONS = [
    ("a record is renamed before it is flushed", "os.fsync(file.fileno())", "file.fileno()"),
    (
        "a record's rename is not flushed before the POST",
        "os.replace(temporary, path + STATE)\n            _sync_folder(folder)",
        "os.replace(temporary, path + STATE)",
    ),
    ("no record goes before a POST", "if self.on_disk != (start, end):", "if False:"),
    ("what the disk refused is forgotten", "record = record or Record.read(path", "record = Record.read(path"),
    ("a record is applied to another file", "if record and record.belongs_to(status) else", "if record else"),
    (
        "a record goes before its file",
        "_move(data, target)\n    _forget(path)",
        "_forget(path)\n    _move(data, target)",
    ),
    (
        "a record follows its file to failed_uploads/",
        "_move(data, target)  # where",
        "_remove(target + STATE), _move(data, target), record.save(target)  # where",
    ),
    (
        "a taken file's record is removed",
        "if base not in names and base + TAKEN not in names:",
        "if base not in names:",
    ),
    ("a move that failed is not recorded", "record.save(path)  # so that", "pass  # so that"),
    ("a file is taken without a rename", "_move(path, path + TAKEN)", "os.link(path, path + TAKEN)"),
    ("the marker goes before the rename", "_move(path, path + TAKEN)", "os.unlink(marker), _move(path, path + TAKEN)"),
    ("a new file's marker is not put back", "os.close(_create(marker))", "pass"),
    ("a file that has changed is done", "raise _changed(data)  # its", "pass  # its"),
    (
        "a file is overwritten",
        "_free_path(PROCESSED_DIR, os.path.basename(path))",
        "os.path.join(PROCESSED_DIR, os.path.basename(path))",
    ),
    ("the name of a file moved by hand is free", " or _exists(numbered(free) + TAKEN)", ""),
    ("the key is the file's", "sha256(batch.body)", "sha256(batch.label.encode())"),
    ("a 2xx is believed before its end", "if success:  #", "if False:  #"),
    ("a web page is believed", "Outcome.MISCONFIGURED if page else", "Outcome.DELIVERED if page else"),
    ("a wrong token is the batch's fault", "in (401, 407)", "in (407,)"),
    ("an unanswered batch is searched at once", "searching or in_doubt else", "True else"),
    ("the size is carried into a taken file", " if fresh and record.packets < 0 else record.batch_size", ""),
    ("BATCH_SIZE cuts a first batch anew", "piece if first else min(piece, BATCH_SIZE)", "min(piece, BATCH_SIZE)"),
    ("a search in vain leaves its size", "        self._size_next()\n        return", "        return"),
    ("no more are refused in a row each round", "IN_A_ROW if self.heard else 0", "0"),
    ("an error after a lost answer hides it", "if batch.unanswered and answer", "if False and answer"),
    ("refused packets are dropped", "record.refused.append(record.uploaded)", "pass"),
    ("refused packets are not tried again", "time.monotonic() >= _server.next_refused", "False"),
    ("a sweep ends at its first failure", "failed >= 3 and", "failed >= 1 and"),
    ("a sweep ends although files pass", "failed >= 3 and _server.accepted == accepted", "failed >= 3"),
    ("a sweep holds up new files", "        _upload_ready()\n        if _stopping", "        if _stopping"),
    ("the latest failure is tried first", "return sorted(due)", "return sorted(due, reverse=True)"),
]


def mutated(folder: Path, old: str, new: str) -> Path:
    text = SENDER.read_text(encoding="utf-8")
    assert text.count(old) == 1, (
        f"sender.py holds this {text.count(old)} times, and not once; change the table: {old!r}"
    )
    (folder / "sender.py").write_text(text.replace(old, new), encoding="utf-8")
    return folder / "sender.py"


def test_in_some_hundred_lives_all_is_as_it_must_be() -> None:
    wrong = [f"--seed {seed}: {what}" for _, some in play_all(SENDER, [*FOUND, *range(300)]) for seed, what in some]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_is_one_life(seed: int) -> None:
    lives = [play(seed, compiled(SENDER))[0] for _ in "12"]
    assert [line[:2] for line in lives[0].story] == [line[:2] for line in lives[1].story]
    assert lives[0].disk.points == lives[1].disk.points


def tell(seed: int, sender: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("simulation.py")), "--seed", str(seed)]
    command += ["--sender", str(sender)]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=100
    )


def test_a_life_is_told_on_a_screen_and_told_the_same_by_each_process() -> None:
    stories = {tell(113, SENDER, PYTHONHASHSEED=number).stdout for number in "12"}
    assert len(stories) == 1
    assert len(stories.pop().splitlines()) <= SCREEN + 2


def test_a_life_that_goes_wrong_says_what_is_wrong(tmp_path: Path) -> None:
    told = tell(0, mutated(tmp_path, "sha256(batch.body)", "sha256(batch.label.encode())"))
    assert told.returncode == 1
    assert " is sent under the key " in told.stdout.splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS, ids=[row[0] for row in MUTATIONS])
def test_lives_find_a_mutation(
    name: str, old: str, new: str, tmp_path: Path, all_points: bool, record_property: Callable[[str, object], None]
) -> None:
    sender = mutated(tmp_path, old, new)
    if not all_points:
        pytest.skip("with --all-points")
    found = next((some for _, some in play_all(sender, range(LIVES)) if some), [])
    assert found, f"not found within {LIVES} lives"
    seed, what = found[0]
    assert not play(seed, compiled(SENDER))[1], "this life goes wrong without the change, too"
    record_property(f"{name}: lives until it is found", f"{seed + 1:,}, {what}")
