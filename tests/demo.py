"""The main job in one command: `python tests/demo.py`, less than 20 seconds.

Starts the receiver (tests/ingest_server.py) and a copy of sender.py as two processes in a scratch folder, and replays
the real captures of tests/data the way the sniffer writes them, one file per second. In the middle the receiver is
away for four seconds. The console shows sender.py's own log; lines that begin with `---` are the demo's.

At the end the books must balance: every packet captured is stored exactly once, and every file lies in the folder
where it belongs, byte for byte as it was written. Exit status 0 if so, 1 with the reasons if not. The scratch folder
is removed, unless the books do not balance.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

TESTS = Path(__file__).resolve().parent
SENDER = TESTS.parent / "sender.py"
CAPTURES = TESTS / "data"

# A usual file, a short one, one that takes two requests, a quiet moment, and so on until the captures are used up.
PACKETS_PER_FILE = (350, 40, 1300, 5, 200, 120)
SECONDS_PER_FILE = 1.0
CORRUPT_FILE_AT = 3  # a place in the sequence of files, counted from 0, as are the next two
RECEIVER_STOPS_AT = 6
RECEIVER_RETURNS_AT = 10
DRAIN_LIMIT = 12.0  # seconds the sender may need for what is left after the last file
STOP_LIMIT = 5.0  # seconds a process may need to end when it is asked to

SENDER_SETTINGS = {"RETRY_DELAY": "1", "RETRY_FAILED_INTERVAL": "5", "POLL_INTERVAL": "1"}

if sys.platform == "win32":
    # Ctrl-Break is the only polite request there, and it goes to a whole process group: not to be the demo's own.
    STOP_SIGNAL = signal.CTRL_BREAK_EVENT
    PROCESS_FLAGS = subprocess.CREATE_NEW_PROCESS_GROUP
else:
    STOP_SIGNAL = signal.SIGTERM
    PROCESS_FLAGS = 0


class CaptureFile(NamedTuple):
    """One file as the sniffer writes it."""

    name: str
    content: bytes
    packets: list[str]  # the JSON text of each packet; none where the file is corrupt


class Spool(NamedTuple):
    """The folders between the sniffer and sender.py."""

    logs: Path

    @property
    def pending(self) -> Path:
        return self.logs / "pending_upload"

    @property
    def failed(self) -> Path:
        return self.logs / "failed_uploads"

    @property
    def processed(self) -> Path:
        return self.logs / "processed"

    def destination(self, file: CaptureFile) -> Path:
        """Where a file belongs once it is dealt with."""
        return (self.processed if file.packets else self.failed) / file.name


class Books(NamedTuple):
    """What went in and what came out, and a sentence for each respect in which they do not balance."""

    table: dict[str, int]
    complaints: list[str]


def say(remark: str) -> None:
    print(f"--- {remark}", file=sys.stderr)  # where the sender's log goes too, so that both stay in order


# The sniffer


def packet_texts(capture: Path) -> list[str]:
    """The packets of one real capture, `[{...}, {...}]`, each as the exact text that the sniffer wrote."""
    text = capture.read_bytes().decode()
    texts = ["{" + cut + "}" for cut in text[2:-2].split("}, {")]
    if [json.loads(packet) for packet in texts] != json.loads(text):
        raise ValueError(f"{capture.name} is not laid out as the sniffer does it")
    return texts


def capture_files(first_second: datetime) -> list[CaptureFile]:
    """The real captures, cut into files so that no packet is used twice, with the real corrupt file among them."""
    packets = iter([packet for path in sorted(CAPTURES.glob("packets_*.json")) for packet in packet_texts(path)])
    cuts = (list(itertools.islice(packets, size)) for size in itertools.cycle(PACKETS_PER_FILE))
    contents = [(f"[{', '.join(cut)}]".encode(), cut) for cut in itertools.takewhile(bool, cuts)]
    (corrupt,) = CAPTURES.glob("corrupt_*.json")
    contents.insert(CORRUPT_FILE_AT, (corrupt.read_bytes(), []))
    return [
        CaptureFile(f"packets_{first_second + timedelta(seconds=second):%Y%m%d_%H%M%S}.json", content, cut)
        for second, (content, cut) in enumerate(contents)
    ]


def write_as_sniffer(folder: Path, file: CaptureFile) -> None:
    """The name appears once the content is complete, the marker once the name is there."""
    unfinished = folder / f"{file.name}.tmp"
    unfinished.write_bytes(file.content)
    unfinished.rename(folder / file.name)
    (folder / f"{file.name}.ready").touch()
    if not file.packets:
        say(f"{file.name} is corrupt: its sniffer was killed while writing it")


# The processes


def start(
    cleanup: contextlib.ExitStack, command: list[str], settings: dict[str, str], stdout: int | None = None
) -> subprocess.Popen[str]:
    """A Python process of its own that does not outlive `cleanup`."""
    # A proxy that this machine is set to use must not be asked for a loopback address.
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**inherited, **settings},
        stdout=stdout,
        text=True,
        creationflags=PROCESS_FLAGS,
    )
    cleanup.enter_context(process)
    cleanup.callback(process.kill)
    return process


def stop(process: subprocess.Popen[str]) -> int:
    """Ask a process to end and return its exit status; not 0 if it had to be killed."""
    process.send_signal(STOP_SIGNAL)
    try:
        return process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def start_receiver(cleanup: contextlib.ExitStack, database: Path, port: int = 0) -> tuple[subprocess.Popen[str], str]:
    """The receiver and its URL, once it listens."""
    command = [str(TESTS / "ingest_server.py"), "--quiet", "--port", str(port), "--db", str(database)]
    receiver = start(cleanup, command, {}, stdout=subprocess.PIPE)
    announcement = receiver.stdout.readline() if receiver.stdout else ""
    if not announcement:
        sys.exit("The receiver did not start.")
    url = announcement.split()[-1]
    say(f"receiver started: {url}")
    return receiver, url


def start_sender(cleanup: contextlib.ExitStack, spool: Spool, url: str) -> subprocess.Popen[str]:
    """A copy of sender.py, alone in a folder as on a sensor; its log goes to this console."""
    scratch = spool.logs.parent
    shutil.copy(SENDER, scratch)
    settings = {"SERVER_URL": url, "LOGS_DIR": str(spool.logs), **SENDER_SETTINGS}
    return start(cleanup, [str(scratch / SENDER.name)], settings)


# The run


def run(files: list[CaptureFile], spool: Spool, database: Path) -> int:
    """Replay the files, with the receiver away for a while, and wait for them; the sender's exit status."""
    spool.pending.mkdir(parents=True)
    with contextlib.ExitStack() as cleanup:
        receiver, url = start_receiver(cleanup, database)
        sender = start_sender(cleanup, spool, url)
        for place, file in enumerate(files):
            if place == RECEIVER_STOPS_AT:
                stop(receiver)
                say("receiver stopped")
            if place == RECEIVER_RETURNS_AT:
                receiver, url = start_receiver(cleanup, database, urlsplit(url).port or 0)
            if sender.poll() is not None:
                sys.exit(f"sender.py ended of itself, with exit status {sender.returncode}.")
            write_as_sniffer(spool.pending, file)
            time.sleep(SECONDS_PER_FILE)
        say("last file written")
        wait_until_drained(sender, files, spool)
        status = stop(sender)
        stop(receiver)
        return status


def wait_until_drained(sender: subprocess.Popen[str], files: list[CaptureFile], spool: Spool) -> None:
    """Until nothing is left over, or there is no more hope for it."""
    deadline = time.monotonic() + DRAIN_LIMIT
    while left_over(files, spool) and sender.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


# The books


def audit_packets(files: list[CaptureFile], database: Path) -> Books:
    """Compare what was captured with what was stored, text by text; two captured packets may well be equal."""
    captured = Counter(packet for file in files for packet in file.packets)
    stored, repeats = stored_packets(database)
    lost = sum((captured - stored).values())
    surplus = stored - captured
    duplicates = sum(count for packet, count in surplus.items() if packet in captured)
    foreign = sum(surplus.values()) - duplicates
    table = {
        "packets captured": sum(captured.values()),
        "packets stored": sum(stored.values()),
        "duplicates stored": duplicates,
        "repeats the receiver dropped": repeats,
    }
    complaints = {
        f"Packets captured but not stored: {lost}.": lost,
        f"Packets stored more often than captured: {duplicates}.": duplicates,
        f"Packets stored but never captured: {foreign}.": foreign,
    }
    return Books(table, [sentence for sentence, wrong in complaints.items() if wrong])


def stored_packets(database: Path) -> tuple[Counter[str], int]:
    """How often each packet text is stored, and how many repeats the receiver dropped."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        packets = Counter(packet for (packet,) in db.execute("SELECT packet FROM packets"))
        (repeats,) = db.execute("SELECT coalesce(sum(repeats), 0) FROM idempotency_keys").fetchone()
    return packets, repeats


def audit_folders(files: list[CaptureFile], spool: Spool) -> Books:
    """Check that every file lies where it belongs, byte for byte as it was written, and nothing else."""
    destinations = {spool.destination(file): file for file in files}
    changed = [path for path, file in destinations.items() if not path.is_file() or path.read_bytes() != file.content]
    corrupt = [path for path, file in destinations.items() if not file.packets]
    strays = left_over(files, spool)
    table = {
        "corrupt files kept unchanged": len(set(corrupt) - set(changed)),
        "files left over": len(strays),
    }
    complaints = {"Missing, or not as written": changed, "Left over": strays}
    return Books(table, [f"{what}: {listing(paths, spool)}." for what, paths in complaints.items() if paths])


def listing(paths: list[Path], spool: Spool) -> str:
    """`failed_uploads/a.json, processed/b.json and 12 more`"""
    names = ", ".join(path.relative_to(spool.logs).as_posix() for path in paths[:3])
    return names if len(paths) <= 3 else f"{names} and {len(paths) - 3} more"


def left_over(files: list[CaptureFile], spool: Spool) -> list[Path]:
    """Every file in the three folders that should not be there once all is delivered."""
    expected = {spool.destination(file) for file in files}
    expected |= {path.with_name(f"{path.name}.state") for path in expected if path.parent == spool.failed}  # the reason
    folders = [folder for folder in (spool.pending, spool.failed, spool.processed) if folder.is_dir()]
    return sorted(path for folder in folders for path in folder.iterdir() if path not in expected)


def demonstrate(scratch: Path) -> bool:
    """Run and report; whether the books balance."""
    spool, database = Spool(scratch / "logs"), scratch / "received.sqlite3"
    files = capture_files(first_second=datetime.now())
    status = run(files, spool, database)
    packets, folders = audit_packets(files, database), audit_folders(files, spool)
    complaints = packets.complaints + folders.complaints
    if status:
        complaints.append(f"sender.py ended with exit status {status}.")
    report({"files written": len(files), **packets.table, **folders.table}, complaints)
    return not complaints


def report(table: dict[str, int], complaints: list[str]) -> None:
    print()
    for label, figure in table.items():
        print(f"  {label:<30}{figure:>7,}")
    print()
    for complaint in complaints or ["The books balance: every packet is stored exactly once."]:
        print(f"  {complaint}", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process and no folder stays behind
    scratch = Path(tempfile.mkdtemp(prefix="sender-demo-"))
    keep = True
    try:
        keep = not demonstrate(scratch)
    except KeyboardInterrupt:
        keep = False
        return 130
    finally:
        if keep:
            say(f"kept for inspection: {scratch}")
        else:
            shutil.rmtree(scratch)
    return 1 if keep else 0


if __name__ == "__main__":
    sys.exit(main())
