"""What sender.py costs, measured side by side with others on this machine.

    python tests/bench.py                                    all of what follows, in some minutes
    python tests/bench.py --files 100000                     the last table with more files
    python tests/bench.py --sender OTHER                     another sender.py as well, in the same rounds
    python tests/bench.py --sizes 5000 --idle 0 --files 0    one table alone; `--sizes` without a figure: none

Start-up     `sender.py --version` beside `python -c "import requests, dotenv"`
Packets      files of 500, 5,000 and 50,000 packets, 500,000 in all, and one file of 1,000,000 (2 GB of memory, 3 GB of
             disk). Each contender is measured as a whole process, from its start to its end:
                 straightforward   json.load, then requests.post(url, json=batch) for every 1000 packets
                 sender.py         `sender.py --once`
                 floor             the same bodies, cut beforehand, posted over one requests.Session
                 syslog-ng         where installed: the same packets, one per line, through its http()
Waiting      the CPU of a sender that has nothing to do, and how soon it sends a file that is ready
Many files   N of them in any one folder: seconds to the first request, milliseconds for each of the next files, seconds
             until SIGTERM ends it (the longer of two: halfway to the first request, and while or after files are sent)

The contenders take turns, so that whatever else the machine does meets all of them alike. A ratio is that to the first
row in the same round: the median of the rounds, the lowest and the highest behind it. Packets have the sniffer's 33
fields and come from a fixed seed; all files lie in a temporary folder, and are removed. The server is a sink, a thread
of this process: it reads every byte, answers, then counts the packets. After every run its count must be what was
written, and every file in processed/; else the exit status is 1. CPU is user plus system time, 1 MB is 10^6 bytes; a
peak below the bench's own 20 MB does not show. What a platform cannot tell is "nan"; Windows lacks the last two parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Callable, NamedTuple

SENDER = Path(__file__).resolve().parent.parent / "sender.py"

SEED = 20261123
BATCH = 1000  # packets in one request, sender.py's own default
START_UPS = 15  # rounds
NOTICED = 10  # files
MORE = 100  # files, ready beside many others

# Anything of the caller's environment that would make the contenders do different work.
_SETTINGS = """
SERVER_URL API_TOKEN POLL_INTERVAL MAX_RETRIES RETRY_DELAY BATCH_SIZE REQUEST_TIMEOUT RETRY_FAILED_INTERVAL COMPRESS
KEEP_PROCESSED_DAYS LOGS_DIR LOG_LEVEL
"""
SENDER_SETTINGS = set(_SETTINGS.split())


# --- The packets -------------------------------------------------------------------------------

FIELDS = """
timestamp interface src_ip dst_ip protocol length src_port dst_port tcp_flags tcp_syn tcp_ack tcp_fin tcp_rst tcp_psh
seq ack icmp_type icmp_code arp_op arp_psrc arp_pdst arp_hwsrc arp_hwdst dns_query dns_qname dns_qtype dns_response
dns_answer_count dns_answer_size http_method http_path http_status_code http_host
"""
EMPTY_PACKET: dict[str, Any] = dict.fromkeys(FIELDS.split())
PACKET_MARK = b'"timestamp":'  # once in every packet, and nowhere else

KINDS = ("tcp", "http", "dns", "udp", "icmp", "arp", "other")
KIND_WEIGHTS = (76, 6, 12, 2, 2, 1, 1)
TCP_FLAGS = ("ACK", "PSH,ACK", "FIN,ACK", "SYN", "SYN,ACK", "RST")
TCP_FLAGS_WEIGHTS = (42, 25, 15, 8, 8, 1)


def generate_packets(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Packets without end, in the proportions of a capture of web traffic."""
    timestamp = 1795430266.5
    while True:
        timestamp += rng.expovariate(500)
        kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
        packet = {**EMPTY_PACKET, "timestamp": timestamp, "interface": "eth0"}
        if kind not in ("arp", "other"):
            ends = [f"192.168.1.{rng.randrange(2, 40)}", f"10.0.{rng.randrange(4)}.{rng.randrange(2, 250)}"]
            rng.shuffle(ends)
            packet.update(src_ip=ends[0], dst_ip=ends[1])
        fill_in(packet, rng, kind)
        yield packet


def fill_in(packet: dict[str, Any], rng: random.Random, kind: str) -> None:
    """What depends on the protocol."""
    if kind in ("tcp", "http"):
        fill_in_tcp(packet, rng, kind == "http")
    elif kind == "dns":
        fill_in_dns(packet, rng)
    elif kind == "udp":
        packet.update(protocol="UDP", length=rng.randrange(60, 1400))
        packet.update(src_port=rng.randrange(32768, 60999), dst_port=rng.choice((123, 443, 5353)))
    elif kind == "icmp":
        packet.update(protocol="ICMP", length=98, icmp_type=rng.choice((0, 8)), icmp_code=0)
    elif kind == "arp":
        packet.update(protocol="ARP", length=42, arp_op=rng.choice((1, 2)), arp_psrc="192.168.1.1")
        packet.update(arp_pdst=f"192.168.1.{rng.randrange(2, 40)}")
        packet.update(arp_hwsrc="02:42:ac:11:00:02", arp_hwdst="00:00:00:00:00:00")
    else:
        packet.update(protocol="OTHER", length=rng.randrange(16, 60))


def fill_in_tcp(packet: dict[str, Any], rng: random.Random, http: bool) -> None:
    flags = "PSH,ACK" if http else rng.choices(TCP_FLAGS, TCP_FLAGS_WEIGHTS)[0]
    packet.update(protocol="TCP", length=rng.choice((66, 74, 179, 666, 1514)))
    packet.update(src_port=rng.randrange(32768, 60999), dst_port=rng.choice((80, 443, 8080)), tcp_flags=flags)
    packet.update({f"tcp_{flag.lower()}": flag in flags for flag in ("SYN", "ACK", "FIN", "RST", "PSH")})
    packet.update(seq=rng.getrandbits(32), ack=rng.getrandbits(32) if "ACK" in flags else 0)
    if http:
        packet.update(http_method="GET", http_path=f"/p/{rng.randrange(1000)}?q=%C3%A9", http_host="192.168.1.10:8080")


def fill_in_dns(packet: dict[str, Any], rng: random.Random) -> None:
    port = rng.randrange(32768, 60999)
    packet.update(protocol="UDP", length=75, src_port=port, dst_port=53, dns_query=True, dns_response=False)
    packet.update(dns_qname=f"h{rng.randrange(300)}.example.test", dns_qtype=rng.choice((1, 16, 28)))
    if rng.random() < 0.5:
        packet.update(length=106, src_port=53, dst_port=port, dns_query=False, dns_response=True)
        packet.update(dns_answer_count=1, dns_answer_size=9)


# --- The work on disk --------------------------------------------------------------------------
# Written line by line: on Linux the peak memory of a child begins at that of the process it was started from.


class Work(NamedTuple):
    """The same packets in the shape that each contender takes; logs/ and bodies/ are in its folder."""

    folder: Path
    lines: Path  # one packet a line
    packets: int
    size: int  # packets in each file
    files: list[str]  # their names, in processed/ between two runs


def write_arrays(lines: Path, folder: Path, size: int) -> list[str]:
    """Write files of `size` packets, with the bytes that json.dump gives an array; their names follow the time."""
    names: list[str] = []
    with open(lines, encoding="utf-8") as packets:
        for first in packets:
            moment = time.gmtime(1795430266 + 5 * len(names))
            names.append(time.strftime("packets_%Y%m%d_%H%M%S.json", moment))
            with open(folder / names[-1], "w", encoding="utf-8") as file:
                file.write("[" + first.rstrip("\n"))
                file.writelines(", " + line.rstrip("\n") for line in islice(packets, size - 1))
                file.write("]")
    return names


@contextlib.contextmanager
def prepared(folder: Path, packets: int, size: int) -> Iterator[Work]:
    """`packets` in files of `size`; only the lines outlive the block, for the next work."""
    show_progress("writing files")
    lines = folder / f"{packets}.lines"
    if not lines.exists():
        with open(lines, "w", encoding="utf-8", newline="\n") as file:
            for packet in islice(generate_packets(random.Random(SEED)), packets):
                file.write(json.dumps(packet) + "\n")
    with tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        (own / "bodies").mkdir()
        write_arrays(lines, own / "bodies", min(size, BATCH))
        files = write_arrays(lines, make_spool(own) / "processed", size)
        yield Work(own, lines, packets, size, files)


def make_spool(folder: Path) -> Path:
    """An empty logs/ in a folder that may not exist yet."""
    for name in ("pending_upload", "failed_uploads", "processed"):
        (folder / "logs" / name).mkdir(parents=True)
    return folder / "logs"


def make_ready(logs: Path, name: str, text: str = "") -> None:
    """Put a capture, which holds `text` or is in processed/, where the sniffer puts it."""
    path = logs / "pending_upload" / name
    if text:
        path.write_text(text)
    else:
        os.replace(logs / "processed" / name, path)
    path.with_name(name + ".ready").touch()


# --- The sink ----------------------------------------------------------------------------------

REPLY = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{"status": "success"}'


class Sink:
    """A server that counts packets."""

    def __init__(self) -> None:
        self._packets, self._lock = 0, threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/ingest"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def packets(self) -> int:
        """How many have arrived since forget(): whoever has its answer is counted when the lock is free."""
        with self._lock:
            return self._packets

    def forget(self) -> None:
        with self._lock:
            self._packets = 0

    def _accept(self) -> None:
        while True:
            connection, _address = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        length = 0
        with connection, connection.makefile("rb") as stream, contextlib.suppress(ConnectionError):
            for line in stream:
                if line.lower().startswith(b"content-length:"):
                    length = int(line[15:])
                elif line == b"\r\n":
                    body = stream.read(length)
                    with self._lock:
                        connection.sendall(REPLY)
                        self._packets += body.count(PACKET_MARK)  # now: this is not to be waited for


# --- One process -------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a process cost; `nan` is what this platform cannot tell."""

    seconds: float
    cpu: float  # seconds
    peak: float  # MB


class Process:
    """A running command. Its messages go to a file, as a service's would; it does not outlive its block."""

    def __init__(self, command: list[str], logs: Path, url: str, **settings: str) -> None:
        kept = {k: v for k, v in os.environ.items() if k not in SENDER_SETTINGS and not k.lower().endswith("_proxy")}
        environment = {**kept, "SERVER_URL": url, "LOGS_DIR": str(logs), **settings}
        self._command, self._messages = command, logs.with_name("messages.txt")
        if sys.platform != "win32":
            os.sync()  # or the kernel writes back during the run what was prepared for it
        self._started = time.perf_counter()
        with open(self._messages, "wb") as log:
            null = subprocess.DEVNULL
            self._popen = subprocess.Popen(command, env=environment, stdin=null, stdout=log, stderr=log)
        self.pid = self._popen.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.returncode is None:
            self._popen.kill()
            self._popen.wait()

    def wait_until(self, condition: Callable[[], bool]) -> float:
        """Seconds from the start of the process until `condition` held."""
        while not condition():
            if self._popen.poll() is not None:
                self._give_up()
            time.sleep(0.005)
        return time.perf_counter() - self._started

    def end(self, *fine: int) -> Run:
        """Wait for its end, which must have one of the statuses `fine`."""
        cpu = peak = math.nan
        if sys.platform == "win32":
            self._popen.wait()
        else:
            _pid, status, usage = os.wait4(self.pid, 0)
            self._popen.returncode = os.waitstatus_to_exitcode(status)  # it could not learn it any more
            cpu = usage.ru_utime + usage.ru_stime
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        seconds = time.perf_counter() - self._started
        if self._popen.returncode not in fine:
            self._give_up()
        return Run(seconds, cpu, peak)

    def stop(self, *fine: int) -> Run:
        """The same after SIGTERM, with the seconds from there."""
        asked = time.perf_counter()
        self._popen.terminate()
        return self.end(*fine)._replace(seconds=time.perf_counter() - asked)

    def _give_up(self) -> None:
        last = self._messages.read_text("utf-8", "replace").splitlines()[-5:]
        name = " ".join(part for part in self._command if "\n" not in part)
        sys.exit("\n".join([f"bench: {name} ended with status {self._popen.returncode}", *last]))


# --- Start-up and packets ----------------------------------------------------------------------


def take_turns(names: Iterable[str], rounds: int, run: Callable[[str], Run]) -> dict[str, list[Run]]:
    """Rounds in which everyone has one run, each time with another one first."""
    order = list(names)
    runs: dict[str, list[Run]] = {name: [] for name in order}
    for number in range(rounds):
        for name in order:
            show_progress(f"round {number + 1} of {rounds}: {name}")
            runs[name].append(run(name))
        order = order[1:] + order[:1]
    show_progress("")
    return runs


def print_table(title: str, runs: dict[str, list[Run]]) -> None:
    """Each row beside the first."""
    base = next(iter(runs.values()))
    print(f"\n{title}; rounds: {len(base)}\n")
    print(f"{'':<17}{'CPU':<20}{'throughput':<20}{'peak MB':>8}{'CPU s':>9}{'seconds':>10}")
    for name, own in runs.items():
        cpu_ratio = spread([run.cpu / other.cpu for run, other in zip(own, base)])
        throughput = spread([other.seconds / run.seconds for run, other in zip(own, base)])
        seconds, cpu, peak = (statistics.median(figures) for figures in zip(*own))
        print(f"{name:<17}{cpu_ratio:<20}{throughput:<20}{peak:>8,.0f}{cpu:>9.2f}{seconds:>10.2f}", flush=True)


def spread(values: list[float]) -> str:
    """The median, and the lowest and the highest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f}-{high:.2f})"


def show_progress(text: str) -> None:
    """One line that replaces itself, for a person who waits; nothing in a redirected output."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


def measure_start_up(folder: Path, sink: Sink, senders: dict[str, list[str]]) -> None:
    commands = {"imports alone": [sys.executable, "-c", "import requests, dotenv"]}
    commands.update({name: [*sender, "--version"] for name, sender in senders.items()})

    def run(name: str) -> Run:
        with Process(commands[name], folder / "logs", sink.url) as process:
            return process.end(0)

    print_table("Start-up", take_turns(commands, START_UPS, run))


STRAIGHTFORWARD = """
import json, sys
from pathlib import Path
import requests

url, logs, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
for marker in sorted((logs / "pending_upload").glob("*.json.ready")):
    path = marker.with_suffix("")
    with open(path, encoding="utf-8") as file:
        packets = json.load(file)
    for start in range(0, len(packets), size):
        requests.post(url, json=packets[start : start + size], timeout=30).raise_for_status()
    path.rename(logs / "processed" / path.name)
    marker.unlink()
"""

FLOOR = """
import sys
from pathlib import Path
import requests

session = requests.Session()
for path in sorted(Path(sys.argv[2]).iterdir()):
    headers = {"Content-Type": "application/json"}
    session.post(sys.argv[1], data=path.read_bytes(), headers=headers, timeout=30).raise_for_status()
"""

SYSLOG_NG = """\
@version: {version}
options {{ stats-freq(0); log-msg-size(65536); }};
source packets {{ file("{lines}" flags(no-parse) log-fetch-limit(1000) log-iw-size(10000)); }};
destination sink {{
    http(url("{url}") headers("Content-Type: application/json") body("$MSG") batch-lines({batch})
         batch-timeout(1000) body-prefix("[") delimiter(", ") body-suffix("]"));
}};
log {{ source(packets); destination(sink); flags(flow-control); }};
"""


def contenders(work: Work, sink: Sink, senders: dict[str, list[str]]) -> dict[str, list[str]]:
    """The command of each."""
    script = [sys.executable, "-c"]
    commands = {
        "straightforward": [*script, STRAIGHTFORWARD, sink.url, str(work.folder / "logs"), str(BATCH)],
        **{name: [*sender, "--once"] for name, sender in senders.items()},
        "floor": [*script, FLOOR, sink.url, str(work.folder / "bodies")],
    }
    if shutil.which("syslog-ng"):
        about = subprocess.run(["syslog-ng", "--version"], capture_output=True, text=True, check=True).stdout
        version = (re.findall(r"Config version: (\S+)", about) or ["3.35"])[0]
        text = SYSLOG_NG.format(version=version, lines=work.lines, url=sink.url, batch=min(work.size, BATCH))
        (work.folder / "cfgfile").write_text(text)
        files = [f"--{name}={work.folder / name}" for name in ("cfgfile", "persist-file", "pidfile", "control")]
        commands["syslog-ng"] = ["syslog-ng", "--foreground", *files]
    return commands


def measure_packets(work: Work, sink: Sink, senders: dict[str, list[str]], rounds: int) -> None:
    commands = contenders(work, sink, senders)
    logs = work.folder / "logs"

    def run(name: str) -> Run:
        """One contender, from its start to its end, with nothing else of the bench under way."""
        if name == "straightforward" or name in senders:
            for file in work.files:
                make_ready(logs, file)
        (work.folder / "persist-file").unlink(missing_ok=True)
        sink.forget()
        with Process(commands[name], logs, sink.url) as process:
            if name == "syslog-ng":  # it follows its file for ever: its time ends when the last packet has arrived
                seconds = process.wait_until(lambda: sink.packets >= work.packets)
                run = process.stop(0)._replace(seconds=seconds)
            else:
                run = process.end(0)
        if sink.packets != work.packets or sorted(os.listdir(logs / "processed")) != work.files:
            sys.exit(f"bench: {name} delivered {sink.packets:,} packets of {work.packets:,}, or kept a file")
        return run

    files = f"{len(work.files):,} files" if len(work.files) > 1 else "One file"
    print_table(f"{files} of {work.size:,} packets", take_turns(commands, rounds, run))


# --- Waiting -----------------------------------------------------------------------------------

SMALL = '[{"timestamp": 1795430266.5}]'


def measure_waiting(folder: Path, sink: Sink, senders: dict[str, list[str]], seconds: float) -> None:
    """The CPU of each after its first seconds; then the time from a marker to its packet's arrival."""
    print(f"\nWaiting for {seconds:g} s, then for {NOTICED} files, one at a time\n")
    for name, sender in senders.items():
        show_progress(f"waiting: {name}")
        logs = make_spool(folder / f"waiting-{name}")
        with Process(sender, logs, sink.url) as process:
            send_one(logs, "first", process, sink)
            time.sleep(3)
            before = cpu_clock(process.pid)
            time.sleep(seconds)
            share = (cpu_clock(process.pid) - before) / seconds
            delays = []
            for number in range(NOTICED):
                time.sleep(random.random())  # polls are to be met at any moment
                delays.append(send_one(logs, str(number), process, sink))
            process.stop(0)
        show_progress("")
        print(f"{name:<17}{share:.3%} of one core; a file arrives {spread(delays)} s after its marker")


def send_one(logs: Path, name: str, process: Process, sink: Sink) -> float:
    """Seconds from the marker to the arrival."""
    sink.forget()
    make_ready(logs, name + ".json", SMALL)
    started = time.perf_counter()
    process.wait_until(lambda: sink.packets > 0)
    return time.perf_counter() - started


def cpu_clock(pid: int) -> float:
    """CPU seconds that a running process has used; /proc/PID/stat counts steps of 10 ms, too coarse for an idle one."""
    if sys.platform != "linux":
        return math.nan
    return time.clock_gettime((~pid << 3) | 2)  # its clock by the kernel's formula


# --- Many files --------------------------------------------------------------------------------

CASES = {  # folder; STEM of STEM.json, STEM.1.json ...; the ending of what is beside each of them; their age in days
    "none": ("", "", "", 0),
    "waiting": ("pending_upload", "old", ".ready", 0),
    "unmarked": ("pending_upload", "old", "", 1),
    "failed": ("failed_uploads", "old", "", 0),
    "failed, with records": ("failed_uploads", "old", ".state", 0),
    "processed, to be kept": ("processed", "old", "", 1),
    "processed, too old": ("processed", "old", "", 60),
    "all of one name": ("processed", "packets", "", 0),
}


def measure_files(folder: Path, sink: Sink, senders: dict[str, list[str]], count: int) -> None:
    print(f"\n{count:,} small files in one folder, and {MORE} that are ready; KEEP_PROCESSED_DAYS=30\n")
    print(f"{'':<24}{'first request':>14}{'each of the next':>18}{'SIGTERM':>11}{'peak':>10}")
    for case in CASES:
        for name, sender in senders.items():
            first, each, stop, peak = measure_case(case, folder, sink, sender, count)
            label = case if name == "sender.py" else f"  {name}"
            print(f"{label:<24}{first:>12.2f} s{each * 1000:>15.2f} ms{stop:>9.2f} s{peak:>7,.0f} MB", flush=True)


def measure_case(case: str, folder: Path, sink: Sink, sender: list[str], count: int) -> tuple[float, ...]:
    """Seconds to the first request, for each of the next files, and from SIGTERM to the end; the peak in MB."""
    with among_many(case, folder, sink, sender, count) as process:
        first = process.wait_until(lambda: sink.packets > 0)
        arrived = sink.packets
        each = (process.wait_until(lambda: sink.packets >= MORE) - first) / max(1, MORE - arrived)
        stop = process.stop(0)
    with among_many(case, folder, sink, sender, count) as process:
        time.sleep(first / 2)
        early = process.stop(0, -signal.SIGTERM)  # the latter before it has a handler
    return first, each, max(stop.seconds, early.seconds), max(stop.peak, early.peak)


@contextlib.contextmanager
def among_many(case: str, folder: Path, sink: Sink, sender: list[str], count: int) -> Iterator[Process]:
    """A sender that has just been started on `count` files and those that are ready."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        show_progress(f"{case}: writing files")
        logs = make_spool(Path(name))
        write_case(case, logs, count, sender)
        show_progress(f"{case}: measuring")
        sink.forget()
        with Process(sender, logs, sink.url, KEEP_PROCESSED_DAYS="30") as process:
            yield process
        show_progress("")


def write_case(case: str, logs: Path, count: int, sender: list[str]) -> None:
    where, stem, ending, days = CASES[case]
    moment = (int(time.time()) - days * 86400) * 10**9
    beside = failed_record(logs.with_name("record"), moment, sender) if ending == ".state" else b""
    for number in range(count if where else 0):
        path = f"{logs}/{where}/{stem}{f'.{number}' if number else ''}.json"
        Path(path).write_text(SMALL)
        os.utime(path, ns=(moment, moment))
        if ending:
            Path(path + ending).write_bytes(beside)
    for number in range(MORE):
        make_ready(logs, f"packets{f'_{number:03}' if number else ''}.json", SMALL)


def failed_record(folder: Path, moment: int, sender: list[str]) -> bytes:
    """What the sender itself records of such a file without a server; it holds for all of the same size and time."""
    logs = make_spool(folder)
    make_ready(logs, "old.json", SMALL)
    os.utime(logs / "pending_upload" / "old.json", ns=(moment, moment))
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        with Process([*sender, "--once"], logs, url, MAX_RETRIES="1") as process:
            process.end(1)
    return (logs / "failed_uploads" / "old.json.state").read_bytes()


# --- The command -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, sizes = parser.add_argument, [500, 5_000, 50_000, 1_000_000]
    option("--sizes", type=int, nargs="*", default=sizes, metavar="N", help="packets in one file, a table for each")
    option("--packets", type=int, default=500_000, metavar="N", help="in a run (500,000), but at least one file")
    option("--rounds", type=int, default=3, metavar="N", help="runs of each contender (3)")
    option("--idle", type=float, default=30, metavar="SECONDS", help="of waiting (30; 0: not measured)")
    option("--files", type=int, default=5_000, metavar="N", help="in any one folder (5,000; 0: not measured)")
    option("--sender", type=Path, metavar="OTHER", help="another sender.py, to compare")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the temporary folder goes
    print(f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        measure(Path(name), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    senders, sink = {}, Sink()
    for name, path in {"sender.py": SENDER, "the other one": options.sender}.items():
        if path:  # a copy, where no .env changes what it does
            (folder / name).mkdir()
            senders[name] = [sys.executable, str(shutil.copy(path, folder / name / "sender.py"))]
    measure_start_up(folder, sink, senders)
    for size in options.sizes:
        with prepared(folder, max(options.packets, size), size) as work:
            measure_packets(work, sink, senders, options.rounds)
    if os.name == "posix" and options.idle:
        measure_waiting(folder, sink, senders, options.idle)
    if os.name == "posix" and options.files:
        measure_files(folder, sink, senders, options.files)


if __name__ == "__main__":
    main()
