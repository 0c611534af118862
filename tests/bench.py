"""How much the upload of captured packets costs, measured side by side on this machine.

    python tests/bench.py              files of 500, 5,000 and 50,000 packets; then 20 ms of latency
    python tests/bench.py --full       also one file of 1,000,000 packets (2 GB of memory)
    python tests/bench.py --idle       instead: the CPU that a waiting sender.py uses, over 60 s
    python tests/bench.py --backlog    instead: 5,000 small files beside 10,000 uploaded ones
    python tests/bench.py --help       the rest

The packets have the sniffer's 33 fields, are generated from a fixed seed and lie in a temporary
folder (2 GB). The server is a sink: a process of its own that reads every byte, answers, and then
counts the packets. After every run its count is compared with what was written, and every file has
to be in processed/; otherwise the benchmark stops with exit status 1.

The contenders take turns, so that whatever else the machine does meets all of them alike. Each is
measured as a whole process, from its start to its end:

    straightforward   json.load, then requests.post(url, json=batch) for every 1000 packets
    sender.py         `sender.py --once`, copied to a folder without an .env
    floor             the same bodies, cut beforehand, posted over one requests.Session
    syslog-ng         where installed: the same packets one per line, its http() destination

CPU is user plus system time. Figures are medians of the rounds; a ratio is the median of the
ratios to the straightforward version within each round, with the lowest and the highest behind
it. CPU and peak memory come from os.wait4(); on Windows, which lacks it, neither is measured and
both are shown as "-". 1 MB is 10^6 bytes; a peak below the bench's own, some 20 MB, does not show.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SENDER = Path(__file__).resolve().parent.parent / "sender.py"

SEED = 20261123
BATCH = 1000  # packets in one request, sender.py's own default
ROUND_PACKETS = 1_000_000  # in one run, so that start-up (0.1 s) does not decide the result
SLOW_PACKETS = 100_000  # the same where each batch has to wait
FILE_SIZES = (500, 5_000, 50_000)
HEADLINE_SIZE = 5_000  # a few seconds of a busy interface
HUGE_SIZE = 1_000_000
LATENCY = 0.02  # seconds: a server in the same country

BACKLOG_FILES, FEW_FILES, OLD_FILES, SMALL_FILE = 5_000, 500, 10_000, 10
IDLE_SETTLE, IDLE_SECONDS = 5, 60

RUN_LIMIT = 900  # seconds after which a run is taken to hang
BAR_WIDTH = 48

# Anything of the caller's environment that would make the contenders do different work.
SENDER_SETTINGS = {
    "SERVER_URL",
    "API_TOKEN",
    "POLL_INTERVAL",
    "MAX_RETRIES",
    "RETRY_DELAY",
    "BATCH_SIZE",
    "REQUEST_TIMEOUT",
    "RETRY_FAILED_INTERVAL",
    "COMPRESS",
    "KEEP_PROCESSED_DAYS",
    "LOGS_DIR",
    "LOG_LEVEL",
}


# --- The packets -------------------------------------------------------------------------------

FIELDS = (
    "timestamp",
    "interface",
    "src_ip",
    "dst_ip",
    "protocol",
    "length",
    "src_port",
    "dst_port",
    "tcp_flags",
    "tcp_syn",
    "tcp_ack",
    "tcp_fin",
    "tcp_rst",
    "tcp_psh",
    "seq",
    "ack",
    "icmp_type",
    "icmp_code",
    "arp_op",
    "arp_psrc",
    "arp_pdst",
    "arp_hwsrc",
    "arp_hwdst",
    "dns_query",
    "dns_qname",
    "dns_qtype",
    "dns_response",
    "dns_answer_count",
    "dns_answer_size",
    "http_method",
    "http_path",
    "http_status_code",
    "http_host",
)
EMPTY_PACKET: dict[str, Any] = dict.fromkeys(FIELDS)
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
        yield {
            **EMPTY_PACKET,
            "timestamp": timestamp,
            "interface": "eth0",
            **addresses(rng, kind),
            **protocol_fields(rng, kind),
        }


def addresses(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind in ("arp", "other"):
        return {}
    ends = [f"192.168.1.{rng.randrange(2, 40)}", f"10.0.{rng.randrange(4)}.{rng.randrange(2, 250)}"]
    rng.shuffle(ends)
    return {"src_ip": ends[0], "dst_ip": ends[1]}


def protocol_fields(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind in ("tcp", "http"):
        return tcp_fields(rng, http=kind == "http")
    if kind == "dns":
        return dns_fields(rng)
    if kind == "udp":
        return {
            "protocol": "UDP",
            "length": rng.randrange(60, 1400),
            "src_port": rng.randrange(32768, 60999),
            "dst_port": rng.choice((123, 443, 5353)),
        }
    if kind == "icmp":
        return {"protocol": "ICMP", "length": 98, "icmp_type": rng.choice((0, 8)), "icmp_code": 0}
    if kind == "arp":
        return {
            "protocol": "ARP",
            "length": 42,
            "arp_op": rng.choice((1, 2)),
            "arp_psrc": "192.168.1.1",
            "arp_pdst": f"192.168.1.{rng.randrange(2, 40)}",
            "arp_hwsrc": "02:42:ac:11:00:02",
            "arp_hwdst": "00:00:00:00:00:00",
        }
    return {"protocol": "OTHER", "length": rng.randrange(16, 60)}


def tcp_fields(rng: random.Random, http: bool) -> dict[str, Any]:
    flags = "PSH,ACK" if http else rng.choices(TCP_FLAGS, TCP_FLAGS_WEIGHTS)[0]
    fields: dict[str, Any] = {
        "protocol": "TCP",
        "length": rng.choice((66, 74, 179, 666, 1514)),
        "src_port": rng.randrange(32768, 60999),
        "dst_port": rng.choice((80, 443, 8080)),
        "tcp_flags": flags,
        **{f"tcp_{flag.lower()}": flag in flags for flag in ("SYN", "ACK", "FIN", "RST", "PSH")},
        "seq": rng.getrandbits(32),
        "ack": rng.getrandbits(32) if "ACK" in flags else 0,
    }
    if http:
        fields.update(http_method="GET", http_path=f"/p/{rng.randrange(1000)}?q=%C3%A9", http_host="192.168.1.10:8080")
    return fields


def dns_fields(rng: random.Random) -> dict[str, Any]:
    fields = {
        "protocol": "UDP",
        "length": 75,
        "src_port": rng.randrange(32768, 60999),
        "dst_port": 53,
        "dns_query": True,
        "dns_qname": f"h{rng.randrange(300)}.example.test",
        "dns_qtype": rng.choice((1, 16, 28)),
        "dns_response": False,
    }
    if rng.random() < 0.5:
        fields.update(
            length=106,
            src_port=53,
            dst_port=fields["src_port"],
            dns_query=False,
            dns_response=True,
            dns_answer_count=1,
            dns_answer_size=9,
        )
    return fields


# --- The work on disk --------------------------------------------------------------------------
# The bench itself never holds more than a few packets: on Linux the peak memory of a child
# begins at that of the process it was started from.


class Work(NamedTuple):
    """The same packets in the shape that each contender takes, in a folder of their own."""

    logs: Path  # LOGS_DIR of sender.py and of the straightforward version
    names: list[str]  # of the files that go through it
    packets: int
    bodies: Path  # the requests of the floor, one file each
    lines: Path  # one packet per line


def packet_lines(count: int) -> Iterator[str]:
    """`count` packets, each in the very text that the sniffer's json.dump gives it."""
    packets = generate_packets(random.Random(SEED))
    return (json.dumps(packet) + "\n" for packet in islice(packets, count))


def write_arrays(lines: Iterable[str], folder: Path, size: int, start: int = 1795430266) -> list[str]:
    """Write files of `size` packets named by time; the same bytes as json.dump of the array."""
    folder.mkdir(parents=True, exist_ok=True)
    names: list[str] = []
    lines = iter(lines)
    for first in lines:
        moment = time.gmtime(start + 5 * len(names))
        names.append(time.strftime("packets_%Y%m%d_%H%M%S.json", moment))
        with open(folder / names[-1], "w", encoding="utf-8", newline="\n") as file:
            file.write("[" + first.rstrip("\n"))
            file.writelines(", " + line.rstrip("\n") for line in islice(lines, size - 1))
            file.write("]")
    return names


def build_work(folder: Path, packets: int, file_size: int) -> Work:
    """The files of a new work; those of the spool begin and end each run in processed/."""
    lines, logs, bodies = folder / "packets.lines", folder / "logs", folder / "bodies"
    for name in ("pending_upload", "failed_uploads", "processed"):
        (logs / name).mkdir(parents=True)
    with open(lines, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(packet_lines(packets))
    with open(lines, encoding="utf-8") as file:
        names = write_arrays(file, logs / "processed", file_size)
    with open(lines, encoding="utf-8") as file:
        write_arrays(file, bodies, min(file_size, BATCH))
    return Work(logs, names, packets, bodies, lines)


def add_old_files(work: Work) -> None:
    """Fill processed/ with small files uploaded on an earlier day."""
    write_arrays(packet_lines(OLD_FILES), work.logs / "processed", 1, start=1795300000)


def make_ready(work: Work) -> None:
    """Put the files of `work`, all of which are in processed/, where the sniffer puts them."""
    pending = work.logs / "pending_upload"
    for name in work.names:
        os.replace(work.logs / "processed" / name, pending / name)
        (pending / (name + ".ready")).touch()


def check_processed(work: Work, contender: str) -> None:
    left = sorted(os.listdir(work.logs / "pending_upload"))
    missing = set(work.names).difference(os.listdir(work.logs / "processed"))
    if left or missing:
        sys.exit(f"bench: {contender} left {left[:3]} in pending_upload/, {len(missing)} files are not in processed/")


# --- The sink ----------------------------------------------------------------------------------


def sink_main(latency: float) -> None:
    """Serve on a free port, told on standard output; answer each line of input with the count.

    The count is that of the packets received since the last question. The end of standard input
    is the end of the sink, so that it cannot outlive the bench.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tally = Tally()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threading.Thread(target=accept, args=(listener, latency, tally), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    for _question in sys.stdin:
        with tally.lock:
            print(tally.packets, flush=True)
            tally.packets = 0


class Tally:
    """The packets received. Whoever has been answered is counted by the time that the lock is free."""

    def __init__(self) -> None:
        self.lock, self.packets = threading.Lock(), 0


def accept(listener: socket.socket, latency: float, tally: Tally) -> None:
    while True:
        connection, _address = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve, args=(connection, latency, tally), daemon=True).start()


def serve(connection: socket.socket, latency: float, tally: Tally) -> None:
    """Answer the requests of one connection until its client is gone."""
    reply = b'{"status": "success"}'
    buffer = bytearray(1 << 20)
    with connection, contextlib.suppress(ConnectionError):
        while True:
            buffer, length = read_request(connection, buffer)
            if not length:
                return
            time.sleep(latency)
            with tally.lock:
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(reply), reply)
                )
                tally.packets += buffer.count(PACKET_MARK, 0, length)  # now: this is not to be waited for


def read_request(connection: socket.socket, buffer: bytearray) -> tuple[bytearray, int]:
    """One request, header and body, and its length, which is 0 at the end of the connection."""
    filled, expected = 0, 0
    while not expected or filled < expected:
        if filled == len(buffer):
            buffer = buffer + bytes(filled)
        count = connection.recv_into(memoryview(buffer)[filled:])
        if not count:
            return buffer, 0
        filled += count
        if not expected:
            expected = request_length(buffer, filled)
    return buffer, filled


def request_length(buffer: bytearray, filled: int) -> int:
    """Header and body together, or 0 while the header is still incomplete."""
    header_end = buffer.find(b"\r\n\r\n", 0, filled)
    if header_end < 0:
        return 0
    match = re.search(rb"\r\ncontent-length: *(\d+)", buffer[:header_end], re.IGNORECASE)
    return header_end + 4 + (int(match[1]) if match else 0)


class Sink(NamedTuple):
    """A running sink, as the bench sees it."""

    process: subprocess.Popen[str]
    url: str

    def take_count(self) -> int:
        """How many packets have arrived since the last call."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def running_sink(latency: float = 0.0) -> Iterator[Sink]:
    command = [sys.executable, __file__, "--sink", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield Sink(process, f"http://127.0.0.1:{int(process.stdout.readline())}/ingest")


# --- What runs inside the processes of our own contenders --------------------------------------
# requests is imported here and not above: the bench and the sink have no use for its memory.
# (That they are this file costs them 10 ms of start-up, as sender.py has its own text to compile.)


def straightforward(url: str, logs: Path) -> None:
    import requests

    for marker in sorted((logs / "pending_upload").glob("*.json.ready")):
        path = marker.with_suffix("")
        with open(path, encoding="utf-8") as file:
            packets = json.load(file)
        for start in range(0, len(packets), BATCH):
            requests.post(url, json=packets[start : start + BATCH], timeout=30).raise_for_status()
        path.rename(logs / "processed" / path.name)
        marker.unlink()


def floor(url: str, bodies: Path) -> None:
    import requests

    headers = {"Content-Type": "application/json"}
    with requests.Session() as session:
        for path in sorted(bodies.iterdir()):
            body = path.read_bytes()
            session.post(url, data=body, headers=headers, timeout=30).raise_for_status()


# --- One measured run --------------------------------------------------------------------------


class Run(NamedTuple):
    """What one process did and cost; `nan` is what this platform cannot tell."""

    delivered: int  # packets, by the sink's count
    seconds: float
    cpu_seconds: float
    peak_bytes: float


Contender = Callable[[Work, Sink], Run]


def run_process(command: list[str], work: Work, sink: Sink) -> Run:
    """Run a contender from start to exit; its messages go to a file, as a service's would."""
    messages = work.logs.parent / "messages.txt"
    flush_disk()
    with open(messages, "wb") as log:
        started = time.perf_counter()
        process = start_process(command, work.logs, sink, log)
        with time_limit(process):
            cpu_seconds, peak_bytes = wait_and_weigh(process)
        seconds = time.perf_counter() - started
    if process.returncode != 0:
        contender = " ".join([Path(command[1]).name, *command[2:4]])
        give_up(f"{contender} ended with status {process.returncode}", messages)
    return Run(sink.take_count(), seconds, cpu_seconds, peak_bytes)


def flush_disk() -> None:
    """Or the kernel writes back what was prepared for a run during that run."""
    if hasattr(os, "sync"):
        os.sync()


def give_up(reason: str, messages: Path) -> NoReturn:
    last = messages.read_text("utf-8", "replace").splitlines()[-5:]
    sys.exit("\n".join([f"bench: {reason}", *last]))


def start_process(command: list[str], logs: Path, sink: Sink, log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment(logs, sink), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )


def environment(logs: Path, sink: Sink) -> dict[str, str]:
    """The caller's environment without proxies and without other settings of sender.py."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in SENDER_SETTINGS and not name.lower().endswith("_proxy")
    }
    return {**kept, "SERVER_URL": sink.url, "LOGS_DIR": str(logs), "LOG_LEVEL": "INFO"}


@contextlib.contextmanager
def time_limit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens, `process` is not left running."""
    timer = threading.Timer(RUN_LIMIT, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if process.returncode is None:
            process.kill()
            process.wait()


def wait_and_weigh(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for the end of `process`; its CPU seconds and the peak of its resident memory."""
    if not hasattr(os, "wait4"):
        process.wait()
        return math.nan, math.nan
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen could not learn it any more
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit


def run_straightforward(work: Work, sink: Sink) -> Run:
    make_ready(work)
    command = [sys.executable, __file__, "--contender", "straightforward", sink.url, str(work.logs)]
    run = run_process(command, work, sink)
    check_processed(work, "straightforward")
    return run


def run_sender(work: Work, sink: Sink) -> Run:
    make_ready(work)
    run = run_process([sys.executable, str(sender_copy(work)), "--once"], work, sink)
    check_processed(work, "sender.py")
    return run


def sender_copy(work: Work) -> Path:
    """sender.py where no `.env` of the checkout changes what it does."""
    return Path(shutil.copy(SENDER, work.logs.parent / "sender.py"))


def run_floor(work: Work, sink: Sink) -> Run:
    command = [sys.executable, __file__, "--contender", "floor", sink.url, str(work.bodies)]
    return run_process(command, work, sink)


SYSLOG_NG_CONF = """\
@version: {version}
options {{ stats-freq(0); log-msg-size(65536); }};
source packets {{ file("{lines}" flags(no-parse) log-fetch-limit(1000) log-iw-size(10000)); }};
destination sink {{
    http(url("{url}") headers("Content-Type: application/json") body("$MSG") batch-lines({batch})
         batch-timeout(1000) body-prefix("[") delimiter(", ") body-suffix("]"));
}};
log {{ source(packets); destination(sink); flags(flow-control); }};
"""


def run_syslog_ng(work: Work, sink: Sink) -> Run:
    """syslog-ng follows its file for ever: its time ends when the last packet has arrived."""
    with (
        tempfile.TemporaryDirectory(dir=work.logs.parent) as folder,
        open(work.logs.parent / "messages.txt", "wb") as log,
    ):
        command = syslog_ng_command(Path(folder), work, sink)
        flush_disk()
        started = time.perf_counter()
        process = start_process(command, work.logs, sink, log)
        with time_limit(process):
            arrived = 0
            while arrived < work.packets and time.perf_counter() < started + RUN_LIMIT:
                time.sleep(0.02)
                arrived += sink.take_count()
            seconds = time.perf_counter() - started
            process.terminate()
            cpu_seconds, peak_bytes = wait_and_weigh(process)
        return Run(arrived + sink.take_count(), seconds, cpu_seconds, peak_bytes)


def syslog_ng_command(folder: Path, work: Work, sink: Sink) -> list[str]:
    about = subprocess.run(["syslog-ng", "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"Config version: (\S+)", about.stdout)
    (folder / "conf").write_text(
        SYSLOG_NG_CONF.format(version=version[1] if version else "3.35", lines=work.lines, url=sink.url, batch=BATCH)
    )
    return [
        "syslog-ng",
        "--foreground",
        "--cfgfile",
        str(folder / "conf"),
        "--persist-file",
        str(folder / "persist"),
        "--pidfile",
        str(folder / "pid"),
        "--control",
        str(folder / "control"),
    ]


# --- The comparison ----------------------------------------------------------------------------


def measure(name: str, contender: Contender, work: Work, sink: Sink) -> Run:
    """One run, with nothing else of the bench under way, of which every packet has to arrive."""
    sink.take_count()
    run = contender(work, sink)
    if run.delivered != work.packets:
        sys.exit(f"bench: {name} delivered {run.delivered:,} packets of {work.packets:,}")
    return run


def compare(work: Work, sink: Sink, rounds: int) -> dict[str, list[Run]]:
    """Rounds in which every contender has one run, each time with another one first."""
    contenders: dict[str, Contender] = {
        "straightforward": run_straightforward,
        "sender.py": run_sender,
        "floor": run_floor,
    }
    if shutil.which("syslog-ng"):
        contenders["syslog-ng"] = run_syslog_ng
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(rounds):
        for name in order:
            show_progress(f"round {number + 1} of {rounds}: {name}")
            runs[name].append(measure(name, contenders[name], work, sink))
        order = order[1:] + order[:1]
    show_progress("")
    return runs


def show_progress(text: str) -> None:
    """One line that replaces itself, for a person who waits; nothing in a redirected output."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r", end="", file=sys.stderr, flush=True)


def packets_per_second(run: Run) -> float:
    return run.delivered / run.seconds


def cpu_per_million(run: Run) -> float:
    return run.cpu_seconds / run.delivered * 1e6


def peak_megabytes(run: Run) -> float:
    return run.peak_bytes / 1e6


def print_table(title: str, runs: dict[str, list[Run]]) -> None:
    base = runs["straightforward"]
    rounds = "one round" if len(base) == 1 else f"median of {len(base)} rounds"
    print(f"\n{title}; {rounds}\n")
    print_row("", "", "CPU s per", "CPU", "throughput", "peak")
    print_row("", "packets/s", "1M packets", "ratio", "ratio", "MB")
    for name, own in runs.items():
        print_row(
            name,
            show(median_of(own, packets_per_second), ",.0f"),
            show(median_of(own, cpu_per_million), ".2f"),
            show_ratios(own, base, cpu_per_million),
            show_ratios(own, base, packets_per_second),
            show(median_of(own, peak_megabytes), ",.0f"),
        )
    sys.stdout.flush()


def print_row(name: str, rate: str, cpu: str, cpu_ratio: str, throughput: str, peak: str) -> None:
    print(f"{name:<15}{rate:>10}{cpu:>12}   {cpu_ratio:<18} {throughput:<18}{peak:>7}")


def median_of(runs: list[Run], figure: Callable[[Run], float]) -> float:
    return median(map(figure, runs))


def median(values: Iterable[float]) -> float:
    import statistics  # whose start-up the straightforward version would have to pay for

    return statistics.median(values)


def show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def ratios(own: list[Run], base: list[Run], figure: Callable[[Run], float]) -> list[float]:
    """Each run's figure relative to the `base` of the same round."""
    return [figure(run) / figure(other) for run, other in zip(own, base)]


def show_ratios(own: list[Run], base: list[Run], figure: Callable[[Run], float]) -> str:
    found = ratios(own, base, figure)
    middle = show(median(found), ".2f")
    if own is base or len(own) == 1 or math.isnan(found[0]):
        return middle
    return f"{middle} ({min(found):.2f}-{max(found):.2f})"


def print_chart(title: str, figures: dict[str, float], form: str) -> None:
    if any(map(math.isnan, figures.values())):
        return
    print(f"\n{title}\n")
    longest = max(figures.values())
    for name, value in figures.items():
        bar = "#" * max(1, round(BAR_WIDTH * value / longest))
        print(f"{name:<16}{bar:<{BAR_WIDTH}} {format(value, form):>9}")


def compare_sizes(folder: Path, rounds: int, packets: int, full: bool) -> None:
    headline: dict[str, list[Run]] = {}
    with running_sink() as sink:
        for size in FILE_SIZES:
            with prepared(folder, packets, size) as work:
                runs = compare(work, sink, rounds)
            print_table(f"Files of {size:,} packets, {packets:,} in all", runs)
            if size == HEADLINE_SIZE:
                headline = runs
        if full:
            with prepared(folder, HUGE_SIZE, HUGE_SIZE) as work:
                runs = compare(work, sink, 1)
            print_table(f"One file of {HUGE_SIZE:,} packets", runs)
    with running_sink(LATENCY) as sink, prepared(folder, min(packets, SLOW_PACKETS), HEADLINE_SIZE) as work:
        runs = compare(work, sink, rounds)
    print_table(f"Files of {HEADLINE_SIZE:,} packets, {LATENCY * 1000:.0f} ms before each answer", runs)
    print_headline(headline)


def print_headline(runs: dict[str, list[Run]]) -> None:
    about = f"files of {HEADLINE_SIZE:,} packets"
    for title, figure, form in (
        ("Packets per second", packets_per_second, ",.0f"),
        ("CPU seconds per million packets", cpu_per_million, ".2f"),
    ):
        figures = {name: median_of(own, figure) for name, own in runs.items()}
        print_chart(f"{title}, {about}", figures, form)
    sender, base = runs["sender.py"], runs["straightforward"]
    cpu = median(ratios(sender, base, cpu_per_million))
    throughput = median(ratios(sender, base, packets_per_second))
    print(
        f"\nsender.py: {show(cpu, '.2f')} of the CPU of the straightforward version, "
        f"{throughput:.1f} times its throughput"
    )


@contextlib.contextmanager
def prepared(folder: Path, packets: int, file_size: int) -> Iterator[Work]:
    """A work that is removed after its rounds, before the next one is written."""
    show_progress("writing files")
    with tempfile.TemporaryDirectory(dir=folder) as own_folder:
        yield build_work(Path(own_folder), packets, file_size)


# --- Idle and backlog --------------------------------------------------------------------------


def measure_idle(folder: Path) -> None:
    """The CPU of two waiting senders; what they used until they settled is taken off."""
    if os.name != "posix":
        sys.exit("bench: the CPU of a running process is read on POSIX systems only")
    empty, old = (build_work(folder / name, 0, SMALL_FILE) for name in ("empty", "old"))
    add_old_files(old)
    works = {"empty folders": empty, f"{OLD_FILES:,} files in processed/": old}
    with running_sink() as sink, contextlib.ExitStack() as stack:
        pids = {name: stack.enter_context(waiting_sender(work, sink)) for name, work in works.items()}
        time.sleep(IDLE_SETTLE)
        before = {name: cpu_clock(pid) for name, pid in pids.items()}
        show_progress(f"waiting for {IDLE_SECONDS} s")
        time.sleep(IDLE_SECONDS)
        after = {name: cpu_clock(pid) for name, pid in pids.items()}
    show_progress("")
    print(f"\nsender.py while it waits, over {IDLE_SECONDS} s\n")
    for name in works:
        share = (after[name] - before[name]) / IDLE_SECONDS
        print(f"{name:<32}{share:8.3%} of one core")


@contextlib.contextmanager
def waiting_sender(work: Work, sink: Sink) -> Iterator[int]:
    """The pid of a sender.py that polls its empty pending_upload/ until the block ends."""
    messages = work.logs.parent / "messages.txt"
    with open(messages, "wb") as log:
        process = start_process([sys.executable, str(sender_copy(work))], work.logs, sink, log)
        with time_limit(process):
            yield process.pid
            if process.poll() is not None:
                give_up(f"sender.py ended with status {process.returncode}", messages)


def cpu_clock(pid: int) -> float:
    """CPU seconds that a running process has used so far."""
    if sys.platform == "linux":
        # Its clock by the kernel's formula, in nanoseconds: /proc/PID/stat counts steps of 10 ms,
        # which is as much as an idle minute may cost.
        return time.clock_gettime((~pid << 3) | 2)
    answer = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    parts = answer.strip().split(":")
    return sum(float(part) * 60.0**power for power, part in enumerate(reversed(parts)))


def measure_backlog(folder: Path, rounds: int) -> None:
    """Drain many small files beside many old ones, and few beside none.

    Nothing in the cost of one file may depend on how many others there are, so start-up, measured
    with no file at all, is taken off before the two are compared.
    """
    show_progress("writing files")
    works = [build_work(folder / str(files), files * SMALL_FILE, SMALL_FILE) for files in (BACKLOG_FILES, FEW_FILES, 0)]
    add_old_files(works[0])
    costs: list[tuple[Run, ...]] = []
    with running_sink() as sink:
        for number in range(rounds):
            show_progress(f"round {number + 1} of {rounds}")
            costs.append(tuple(measure("sender.py", run_sender, work, sink) for work in works))
    show_progress("")
    print_backlog(costs)


def print_backlog(costs: list[tuple[Run, ...]]) -> None:
    """The figures of rounds of three runs: many files, few files and none."""
    print(f"\nsender.py --once, files of {SMALL_FILE} packets, start-up taken off; rounds: {len(costs)}\n")
    print(f"{'':<40}{'files/s':>10}{'CPU ms per file':>18}")
    many = [per_file(run, none, BACKLOG_FILES) for run, _few, none in costs]
    few = [per_file(run, none, FEW_FILES) for _many, run, none in costs]
    for name, own in (
        (f"{BACKLOG_FILES:,} files, {OLD_FILES:,} in processed/", many),
        (f"{FEW_FILES:,} files, processed/ empty", few),
    ):
        rate = 1 / median(seconds for seconds, _cpu in own)
        cpu = median(cpu for _seconds, cpu in own)
        print(f"{name:<40}{rate:>10,.0f}{show(cpu * 1000, '.3f'):>18}")
    ratio = median(a / b for (_, a), (_, b) in zip(many, few))
    print(f"{'CPU per file, ratio':<40}{'':>10}{show(ratio, '.2f'):>18}")


def per_file(run: Run, start_up: Run, files: int) -> tuple[float, float]:
    """Seconds and CPU seconds for one file."""
    return ((run.seconds - start_up.seconds) / files, (run.cpu_seconds - start_up.cpu_seconds) / files)


# --- The command -------------------------------------------------------------------------------


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure sender.py against a straightforward uploader and a floor, side by side on this machine."
    )
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each contender (default 3)")
    parser.add_argument(
        "--packets", type=positive, default=ROUND_PACKETS, help=f"packets in one run (default {ROUND_PACKETS:,})"
    )
    parser.add_argument("--full", action="store_true", help="also one file of 1,000,000 packets: 2 GB of memory")
    parser.add_argument("--idle", action="store_true", help="instead: the CPU of a waiting sender.py")
    parser.add_argument("--backlog", action="store_true", help="instead: 5,000 small files beside 10,000 uploaded ones")
    parser.add_argument("--sink", type=float, metavar="LATENCY", help=argparse.SUPPRESS)
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.sink is not None:
        sink_main(arguments.sink)
    elif arguments.contender:
        name, url, folder = arguments.contender
        {"straightforward": straightforward, "floor": floor}[name](url, Path(folder))
    else:
        bench(arguments)


def bench(arguments: argparse.Namespace) -> None:
    if not SENDER.is_file():
        sys.exit(f"bench: {SENDER} is missing")
    print(f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if arguments.idle:
            measure_idle(folder)
        if arguments.backlog:
            measure_backlog(folder, arguments.rounds)
        if not (arguments.idle or arguments.backlog):
            compare_sizes(folder, arguments.rounds, arguments.packets, arguments.full)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
