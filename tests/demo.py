"""The main job in one command: `python tests/demo.py`, about 20 seconds.

Starts a receiver (tests/ingest_server.py) in this process and a copy of sender.py as another, in a scratch folder, and
replays the real captures of tests/data the way the sniffer writes them, one file per second. In the middle the receiver
is away for four seconds. The console shows sender.py's own log; lines that begin with `---` are the demo's.

At the end the books must balance: every packet captured is stored exactly once, and every file lies in the folder
where it belongs, byte for byte as it was written. Exit status 0 if so, 1 with the reasons if not. The scratch folder
is removed, unless the books do not balance.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from ingest_server import IngestServer, split_packets

TESTS = Path(__file__).resolve().parent
SENDER = TESTS.parent / "sender.py"
CAPTURES = TESTS / "data"

# A usual file, a short one, one that takes two requests, a quiet moment, and so on until the captures are used up.
PACKETS_PER_FILE = (350, 40, 1300, 5, 200, 120)
CORRUPT_FILE_AT = 3  # a place in the sequence of files, counted from 0, as are the next two
RECEIVER_STOPS_AT, RECEIVER_RETURNS_AT = 6, 10
DRAIN_LIMIT = 12.0  # seconds the sender may need for what is left after the last file
SETTINGS = {"RETRY_DELAY": "1", "RETRY_FAILED_INTERVAL": "5", "POLL_INTERVAL": "1"}

if sys.platform == "win32":
    # Ctrl-Break is the only polite request there, and it goes to a whole process group: not to be the demo's own.
    STOP_SIGNAL, PROCESS_FLAGS = signal.CTRL_BREAK_EVENT, subprocess.CREATE_NEW_PROCESS_GROUP
else:
    STOP_SIGNAL, PROCESS_FLAGS = signal.SIGTERM, 0


class Capture(NamedTuple):
    """One file as the sniffer writes it."""

    name: str
    content: bytes
    packets: list[str]  # the JSON text of each packet; none where the file is corrupt

    @property
    def destination(self) -> str:
        return f"{'processed' if self.packets else 'failed_uploads'}/{self.name}"


def say(remark: str) -> None:
    print(f"--- {remark}", file=sys.stderr)  # where the sender's log goes too, so that both stay in order


def captures(first_second: datetime) -> list[Capture]:
    """The real captures, cut into files so that no packet is used twice, with the real corrupt file among them."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(CAPTURES.glob("packets_*.json")))
    packets = itertools.chain.from_iterable(map(split_packets, texts))
    cuts = (list(itertools.islice(packets, size)) for size in itertools.cycle(PACKETS_PER_FILE))
    contents = [(f"[{', '.join(cut)}]".encode(), cut) for cut in itertools.takewhile(bool, cuts)]
    (corrupt,) = CAPTURES.glob("corrupt_*.json")
    contents.insert(CORRUPT_FILE_AT, (corrupt.read_bytes(), []))
    return [
        Capture(f"packets_{first_second + timedelta(seconds=second):%Y%m%d_%H%M%S}.json", content, cut)
        for second, (content, cut) in enumerate(contents)
    ]


def write_as_sniffer(folder: Path, capture: Capture) -> None:
    """The name appears once the content is complete, the marker once the name is there."""
    unfinished = folder / f"{capture.name}.tmp"
    unfinished.write_bytes(capture.content)
    unfinished.rename(folder / capture.name)
    (folder / f"{capture.name}.ready").touch()
    if not capture.packets:
        say(f"{capture.name} is corrupt: its sniffer was killed while writing it")


def start_sender(scratch: Path, url: str) -> subprocess.Popen[bytes]:
    """A copy of sender.py, alone in a folder as on a sensor; its log goes to this console."""
    shutil.copy(SENDER, scratch)
    # A proxy that this machine is set to use must not be asked for a loopback address.
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment = {**inherited, **SETTINGS, "SERVER_URL": url, "LOGS_DIR": str(scratch / "logs")}
    return subprocess.Popen([sys.executable, scratch / SENDER.name], env=environment, creationflags=PROCESS_FLAGS)


def replay(files: list[Capture], logs: Path, database: Path) -> int:
    """Write the files, with the receiver away for a while, and wait for them; the sender's exit status."""
    pending = logs / "pending_upload"
    pending.mkdir(parents=True)
    server = IngestServer(database)
    say(f"receiver started: {server.url}")
    sender = start_sender(logs.parent, server.url)
    try:
        for place, capture in enumerate(files):
            if place == RECEIVER_STOPS_AT:
                server.close()
                say("receiver stopped")
            if place == RECEIVER_RETURNS_AT:
                server = IngestServer(database, port=server.port)
                say(f"receiver started: {server.url}")
            if sender.poll() is not None:
                sys.exit(f"sender.py ended of itself, with exit status {sender.returncode}.")
            write_as_sniffer(pending, capture)
            time.sleep(1)
        say("last file written")
        deadline = time.monotonic() + DRAIN_LIMIT
        while left_over(files, logs) and sender.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        sender.send_signal(STOP_SIGNAL)
        return sender.wait(10)
    finally:
        sender.kill()
        sender.wait()
        server.close()


def left_over(files: list[Capture], logs: Path) -> list[str]:
    """Every file in the three folders that should not be there once all is delivered."""
    expected = {capture.destination for capture in files}
    expected |= {f"{capture.destination}.state" for capture in files if not capture.packets}  # the reason
    found = {path.relative_to(logs).as_posix() for path in logs.glob("*/*")}
    return sorted(found - expected)


def balance(files: list[Capture], logs: Path, database: Path) -> tuple[dict[str, int], list[str]]:
    """What went in and what came out, and a sentence for each respect in which they do not balance."""
    with IngestServer(database) as server:
        stored, repeats = Counter(server.packets()), server.repeats
    captured = Counter(packet for capture in files for packet in capture.packets)  # two may well be equal
    lost, surplus, strays = captured - stored, stored - captured, left_over(files, logs)
    whole = [c for c in files if (logs / c.destination).is_file() and (logs / c.destination).read_bytes() == c.content]
    table = {
        "files written": len(files),
        "packets captured": sum(captured.values()),
        "packets stored": sum(stored.values()),
        "duplicates stored": sum(surplus.values()),
        "repeats the receiver dropped": repeats,
        "corrupt files kept unchanged": sum(not capture.packets for capture in whole),
        "files left over": len(strays),
    }
    complaints = {
        f"Packets captured but not stored: {sum(lost.values())}.": lost,
        f"Packets stored more often than captured: {sum(surplus.values())}.": surplus,
        f"Files missing, or not as written: {len(files) - len(whole)}.": len(files) > len(whole),
        f"Left over: {', '.join(strays[:3])} …": strays,
    }
    return table, [sentence for sentence, wrong in complaints.items() if wrong]


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no process and no folder stays behind
    scratch = Path(tempfile.mkdtemp(prefix="sender-demo-"))
    logs, database, files = scratch / "logs", scratch / "received.sqlite3", captures(datetime.now())
    try:
        status = replay(files, logs, database)
    except KeyboardInterrupt:
        shutil.rmtree(scratch)
        return 130
    table, complaints = balance(files, logs, database)
    complaints += [f"sender.py ended with exit status {status}."] if status else []
    print()
    for label, figure in table.items():
        print(f"  {label:<30}{figure:>7,}")
    print("\n  " + "\n  ".join(complaints or ["The books balance: every packet is stored exactly once."]), flush=True)
    if complaints:
        say(f"kept for inspection: {scratch}")
    else:
        shutil.rmtree(scratch)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
