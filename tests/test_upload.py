"""One upload: what is sent, what each answer leads to, and what a server or a network may do to it."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import gzip
import hashlib
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Said, Spool, capture, console_lines, packet, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest_httpserver import HTTPServer
from servers import (
    Answer,
    Behaviour,
    Certificates,
    Clock,
    IngestApp,
    Request,
    ScriptedServer,
    close,
    drip,
    flood,
    full_backlog,
    hold,
    make_certificates,
    reply,
    reset,
    say,
    say_and_hold,
    tunnel,
)
from werkzeug import Response

REDIRECTS = (300, 301, 302, 303, 304, 305, 307, 308)
STATUSES = {
    "BUSY": (409, 425, 429, 503),
    "MISCONFIGURED": (*REDIRECTS, 401, 407),
    "UNANSWERED": (408, 502, 504),
    "FAULT": (500, 501, 505, 507, 520, 599),
    "REJECTED": (400, 402, 403, 404, 405, 406, 410, 411, 413, 414, 415, 416, 421, 422, 426, 428, 431, 451),
}
AGAIN_LATER = (*STATUSES["BUSY"], *STATUSES["UNANSWERED"])
PACKETS = [packet(number) for number in range(3)]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


def key_of(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()}"'


def waits(slept: list[float]) -> list[float]:
    """The pauses between requests, from what the clock had slept in all when each came in."""
    return [after - before for before, after in zip(slept, slept[1:])]


# ---------------------------------------------------------------- what is sent


def test_a_file_goes_out_as_posts_of_its_own_bytes(spool: Spool) -> None:
    with ScriptedServer() as server:
        content = spool.drop("a.json", capture(5))
        sender = spool.load(SERVER_URL=server.url + "?site=7", BATCH_SIZE=2)
        assert sender.process_json_file(spool.pending / "a.json")
    assert server.sizes == [2, 2, 1]
    for request in server.requests:
        assert request.line == "POST /ingest?site=7 HTTP/1.1"
        assert request.headers["content-type"] == "application/json"
        assert request.body[:1] + request.body[-1:] == b"[]"
    assert b", ".join(request.body[1:-1] for request in server.requests) == content[1:-1]
    assert spool.names() == ["processed/a.json"]


def test_the_key_is_the_hash_of_the_batch_whatever_happens(
    spool: Spool,
) -> None:
    with ScriptedServer(lambda request: reply(503) if request.number % 3 else close) as server:
        spool.drop("a.json", capture(3))
        path = spool.pending / "a.json"
        assert not spool.load(SERVER_URL=server.url).process_json_file(path)  # three attempts, from pending_upload/
        spool.load(SERVER_URL=server.url).retry_failed_uploads()  # after a restart, from failed_uploads/
        spool.load(SERVER_URL=server.url, COMPRESS="gzip").retry_failed_uploads()
        assert any("content-encoding" in request.headers for request in server.requests)
    assert len(server.requests) >= 5
    assert {request.plain for request in server.requests} == {json.dumps(capture(3)).encode()}
    assert {request.key for request in server.requests} == {key_of(json.dumps(capture(3)).encode())}


def test_all_batches_of_all_files_share_one_connection(spool: Spool) -> None:
    with ScriptedServer() as server:
        sender = spool.load(SERVER_URL=server.url, BATCH_SIZE=5)
        for number in range(4):
            spool.drop(f"{number}.json", capture(50, 100 * number))
            assert sender.process_json_file(spool.pending / f"{number}.json")
    assert (len(server.requests), server.connections) == (40, 1)


def test_a_refused_batch_does_not_cost_the_connection(spool: Spool) -> None:
    answers = iter([reply(status, "a few words") for status in (503, 500, 429, 422, 400, 404)])
    with ScriptedServer(lambda request: next(answers, None)) as server:
        sender = spool.load(SERVER_URL=server.url)
        while not sender.upload_packets(PACKETS):
            pass
    assert (len(server.requests), server.connections) == (7, 1)


# ---------------------------------------------------------------- the table of answers


@pytest.mark.parametrize("status", [200, 201, 202, 203, 204, 205, 206, 208, 226, 299])
def test_every_2xx_delivers(spool: Spool, said: Said, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        spool.drop("a.json", capture(3))
        assert spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    assert len(server.requests) == 1
    assert spool.names() == ["processed/a.json"]
    assert said(logging.WARNING) == []


@pytest.mark.parametrize(
    "words",
    [
        b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\ncontent-length:2\n\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;a=b\r\n}\r\n0\r\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
    ids=lambda words: repr(words)[2:40],
)
def test_success_counts_in_whatever_form_it_comes(spool: Spool, said: Said, words: bytes) -> None:
    with ScriptedServer(lambda request: say(words)) as server:
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        assert sender.upload_packets(PACKETS)
        clock.move(2)
        assert sender.upload_packets(PACKETS)
    assert len(server.requests) == 2
    assert said(logging.WARNING) == []


@pytest.mark.parametrize(
    ("outcome", "status"), [(outcome, status) for outcome, statuses in STATUSES.items() for status in statuses]
)
def test_each_status_asks_for_a_move_of_its_own(spool: Spool, outcome: str, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        sender = spool.load(SERVER_URL=server.url)
        assert sender.upload_packets(PACKETS).outcome is sender.Outcome[outcome]


@pytest.mark.parametrize("status", [500, 501, 520])
def test_by_hand_a_fault_is_tried_again_as_well(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: None if request.number == 2 else reply(status)) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert sender.upload_with_retry(PACKETS)
    assert len({request.body for request in server.requests}) == 1
    assert 15 <= clock.slept <= 16.51


PORTALS = (
    "<!DOCTYPE html><html>",
    "\n <html lang=en>",
    "\ufeff<!doctype HTML>",
    '<?xml version="1.0"?><!DOCTYPE html>',
)


@pytest.mark.parametrize("page", [*PORTALS, "<!-- portal --><head>", "<script>location.href='http://login.example'"])
def test_a_web_page_for_a_2xx_is_no_delivery(spool: Spool, said: Said, page: str) -> None:
    """A hotel's portal says 200 to everything."""
    with ScriptedServer(lambda request: reply(200, page + "Welcome", "Content-Type: text/html")) as server:
        spool.drop("a.json", capture(3))
        assert not spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    assert len(server.requests) == 1
    assert any("web page" in line for line in said(logging.ERROR))


@pytest.mark.parametrize("words", ["ok", '<?xml version="1.0"?><receipt><meta>1</meta></receipt>'])
@pytest.mark.parametrize("kind", ["text/html", "application/json; charset", ";;=", ""])
def test_ok_delivers_whatever_it_calls_itself(spool: Spool, words: str, kind: str) -> None:
    with ScriptedServer(lambda request: reply(200, words, f"Content-Type: {kind}")) as server:
        assert spool.load(SERVER_URL=server.url).upload_packets(PACKETS)


def test_two_lengths_in_a_reply_are_a_broken_reply_and_no_wrong_setting(spool: Spool) -> None:
    words = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
    with ScriptedServer(lambda request: say(words)) as server:
        sender = spool.load(SERVER_URL=server.url)
        assert sender.upload_packets(PACKETS).outcome is sender.Outcome.UNANSWERED


LARGE = [packet(number, payload="x" * 100_000) for number in range(80)]  # 8 MB


def answer_early(words: bytes) -> Behaviour:
    """Read 2 kB of the body, answer and close, as servers and proxies do that refuse a request by its headers."""

    def behave(connection: socket.socket) -> None:
        connection.recv(2000)
        connection.sendall(words)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)  # the words get through before what is unread makes it a reset

    return behave


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize(("status", "outcome"), [(401, "MISCONFIGURED"), (413, "REJECTED"), (429, "BUSY")])
def test_an_early_answer_is_an_answer(
    spool: Spool, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, status: int, outcome: str, tls: bool
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    context = certificates.server("127.0.0.1") if tls else None
    with ScriptedServer(early=lambda request: answer_early(reply(status)), tls=context) as server:
        sender = spool.load(SERVER_URL=server.url)
        assert sender.upload_packets(LARGE).outcome is sender.Outcome[outcome]


EARLY = """
def wsgi(environ, start_response):
    start_response(environ["PATH_INFO"][1:] + " Early", [("Content-Length", "2"), ("Connection", "close")])
    return [b"{}"]

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": int(scope["path"][1:]), "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gunicorn needs fork, and a socket is handed over")
@pytest.mark.parametrize("server", ["gunicorn early:wsgi", "gunicorn -k gthread early:wsgi", "hypercorn early:asgi"])
def test_real_servers_early_answers_over_tls_are_answers(
    spool: Spool, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    (spool.folder / "early.py").write_text(EARLY)
    key = spool.folder / "key.pem"
    certificates.authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(key))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number, port = listening.fileno(), listening.getsockname()[1]
        tls = ["--certfile", str(key), "--keyfile", str(key), "--bind", f"fd://{number}"]
        command = [sys.executable, "-m", *server.split(), *tls]
        process = subprocess.Popen(command, cwd=spool.folder, pass_fds=[number], stderr=subprocess.DEVNULL)
        try:
            for status, outcome in ((401, "MISCONFIGURED"), (413, "REJECTED"), (429, "BUSY")):
                sender = spool.load(SERVER_URL=f"https://127.0.0.1:{port}/{status}")
                assert sender.upload_packets(LARGE).outcome is sender.Outcome[outcome]
        finally:
            process.terminate()
            process.wait(30)


def test_success_that_is_answered_before_the_body_has_gone_out_is_no_success(spool: Spool) -> None:
    with ScriptedServer(early=lambda request: answer_early(reply(200))) as server:
        sender = spool.load(SERVER_URL=server.url)
        assert sender.upload_packets(LARGE).outcome is sender.Outcome.UNANSWERED


def test_connecting_is_not_slowness(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose first address is dead takes long to connect to; its batches must not shrink for that."""
    with ScriptedServer() as server:
        sender = spool.load(SERVER_URL=server.url, BATCH_SIZE=10, REQUEST_TIMEOUT=30)
        clock = Clock(sender)

        def slowly(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
            clock.move(29)
            return socket.create_connection(address)

        monkeypatch.setattr("urllib3.util.connection.create_connection", slowly)
        spool.drop("a.json", capture(30))
        assert sender.process_json_file(spool.pending / "a.json")
    assert [len(request.packets) for request in server.requests] == [10, 10, 10]


@pytest.mark.parametrize("status", AGAIN_LATER)
def test_trouble_that_may_pass_is_tried_again_with_doubling_waits_and_none_after_the_last_attempt(
    spool: Spool, httpserver: HTTPServer, said: Said, status: int
) -> None:
    slept: list[float] = []

    def answer(request: object) -> Response:
        slept.append(clock.slept)
        return Response("down for maintenance", status)

    httpserver.expect_request("/ingest", method="POST").respond_with_handler(answer)
    spool.drop("a.json", capture(3))
    sender = spool.load(SERVER_URL=httpserver.url_for("/ingest"), RETRY_DELAY=5, MAX_RETRIES=4)
    clock = Clock(sender)
    assert not sender.process_json_file(spool.pending / "a.json")
    assert len(slept) == 4
    for wait, delay in zip(waits(slept), (5, 10, 20)):
        assert delay <= wait <= 1.1 * delay + 0.001
    assert clock.slept == slept[-1]
    assert spool.names() == ["failed_uploads/a.json", "failed_uploads/a.json.state"]
    attempts = [line for line in said(logging.WARNING) if f"Server error: {status}" in line and "attempt" in line]
    assert [f"(attempt {number}/4)" in line for number, line in enumerate(attempts, 1)] == [True] * 4
    assert ["Retrying in" in line for line in said(logging.INFO)].count(True) == 3
    assert any("Retrying in 5 seconds..." in line for line in said(logging.INFO))
    assert not said(logging.ERROR), "it will be tried again: nobody is needed"


@pytest.mark.parametrize("status", STATUSES["MISCONFIGURED"])
def test_what_a_person_must_mend_gets_one_attempt(
    spool: Spool, httpserver: HTTPServer, said: Said, status: int
) -> None:
    httpserver.expect_request("/ingest").respond_with_data("no such luck", status)
    content = spool.drop("a.json", capture(3))
    sender = spool.load(SERVER_URL=httpserver.url_for("/ingest"), RETRY_DELAY=5)
    clock = Clock(sender)
    assert not sender.process_json_file(spool.pending / "a.json")
    assert (len(httpserver.log), clock.slept) == (1, 0)
    assert (spool.failed / "a.json").read_bytes() == content
    assert any(str(status) in line and "a.json" in line for line in said(logging.ERROR))
    mend = {401: "API_TOKEN", 407: "proxy"}.get(status, "SERVER_URL")
    assert any(mend in line for line in said(logging.ERROR))


@pytest.mark.parametrize("status", [s for s in REDIRECTS if s != 304])
@pytest.mark.parametrize("same_host", [True, False])
def test_redirects_are_told_and_never_followed(spool: Spool, said: Said, status: int, same_host: bool) -> None:
    with ScriptedServer() as tempting, ScriptedServer() as server:
        there = (server if same_host else tempting).url.replace("/ingest", "/new/place")
        moved = reply(status, "moved", f"Location: {there}")
        server.script = lambda request: moved if "/ingest" in request.line else None
        spool.drop("a.json", capture(3))
        assert not spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    assert (len(server.requests), tempting.connections) == (1, 0)
    assert any(there in line for line in said(logging.ERROR))
    assert "failed_uploads/a.json" in spool.names()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_batch_that_asks_to_be_smaller_is_not_sent_again_as_it_was(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status)) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert not sender.upload_with_retry(PACKETS)
    assert (len(server.requests), clock.slept) == (1, 0)


@pytest.mark.parametrize("field", ["packets_received", "raw_packets"])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_smaller_count_of_the_servers_is_told(spool: Spool, said: Said, field: str, count: int) -> None:
    with ScriptedServer(lambda request: reply(200, {"status": "success", field: count})) as server:
        spool.drop("a.json", capture(5))
        assert spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    (line,) = said(logging.WARNING)
    assert "a.json" in line
    assert {str(count), "5"} <= set(re.findall(r"\d+", line))


@pytest.mark.parametrize(
    "answer",
    [
        {"packets_received": 3, "raw_packets": 3},
        {"packets_received": 4},
        {"packets_received": None},
        {"packets_received": "0"},
        {"packets_received": [0]},
        {"errors": {"packets_received": 0}},
        "",
        "OK",
        "[0]",
        "0",
        "null",
        '{"packets_received": 0',
        '{"packets_received": ' + "9" * 5000 + "}",
        "[" * 4000,
        b"\xff\xfe\x00",
    ],
    ids=lambda answer: repr(answer)[:40],
)
def test_a_reply_without_a_smaller_count_is_no_reason_to_warn(spool: Spool, said: Said, answer: Any) -> None:
    with ScriptedServer(lambda request: reply(200, answer)) as server:
        assert spool.load(SERVER_URL=server.url).upload_packets(PACKETS)
    assert said(logging.WARNING) == []


@pytest.mark.parametrize("more", [OK, reply(408), b"HTTP/1.1 200 OK\r\n"], ids=["200", "408", "half a 200"])
def test_an_answer_that_nobody_asked_for_does_not_count_for_the_next_batch(spool: Spool, more: bytes) -> None:
    with ScriptedServer(lambda request: reply(500) if request.number else OK + more) as server:
        sender = spool.load(SERVER_URL=server.url)
        assert sender.upload_packets(PACKETS)
        assert not sender.upload_packets(capture(3, start=10))
    assert len(server.requests) == 2


# ---------------------------------------------------------------- waits


@pytest.mark.parametrize(
    ("header", "least"),
    [
        ("20", 20),
        ("60", 60),
        ("61", 60),
        ("86400", 60),
        ("0", 5),
        ("3", 5),
        ("+20 s", 20),
        ("+3 s", 5),
        ("+3600 s", 60),
        ("-20 s", 5),
        ("", 5),
        ("-1", 5),
        ("soon", 5),
        ("1e2", 5),
        ("inf", 5),
        ("nan", 5),
        ("30, 40", 5),
        ("²", 5),
        ("Mon, 99 Foo 2026 10:00:00 GMT", 5),
        ("Mon, 01 Jan 99999 10:00:00 GMT", 5),
        ("\x7f\x01", 5),
    ],
)
def test_retry_after_is_heeded_in_both_forms_up_to_60_seconds_and_nonsense_ignored(
    spool: Spool, said: Said, header: str, least: float
) -> None:
    slept: list[float] = []

    def script(request: Request) -> bytes | None:
        slept.append(clock.slept)
        value = header
        if header.endswith(" s"):
            value = email.utils.formatdate(time.time() + float(header[:-2]), usegmt=True)
        return reply(503, "", f"Retry-After: {value}") if request.number == 0 else None

    with ScriptedServer(script) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert sender.upload_with_retry(PACKETS)
    (wait,) = waits(slept)
    assert least - 1 <= wait <= 1.1 * least + 0.001
    assert all(line.isprintable() for line in said())


@pytest.mark.parametrize("status", [408, 429, 500, 502])
def test_retry_after_is_heeded_with_any_answer_that_may_pass(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status, "", "Retry-After: 20")) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5, MAX_RETRIES=2)
        clock = Clock(sender)
        assert not sender.upload_with_retry(PACKETS)
    assert 20 <= clock.slept <= 22.001


def test_retry_after_never_shortens_a_longer_backoff(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503, "", "Retry-After: 20")) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=100, MAX_RETRIES=2)
        clock = Clock(sender)
        assert not sender.upload_with_retry(PACKETS)
    assert 100 <= clock.slept <= 110.001


def test_waits_are_spread_by_up_to_ten_percent_so_that_a_fleet_does_not_come_back_in_step(spool: Spool) -> None:
    with ScriptedServer(lambda request: reply(503)) as server:
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=100, MAX_RETRIES=2)
        clock = Clock(sender)
        found = []
        for _ in range(60):
            before = clock.slept
            assert not sender.upload_with_retry(PACKETS)
            found.append(clock.slept - before)
    assert min(found) >= 100
    assert max(found) <= 110.001
    assert max(found) - min(found) > 5
    assert len({round(wait, 3) for wait in found}) > 40


# ---------------------------------------------------------------- what a server may say


NASTY = "line one\r\nline two\x00\x1b[31mred\x1b[0m\x07\u202eesrever\u2028\x85\ud83e\n2026-01-01 - INFO - forged"


@pytest.mark.parametrize("status", [301, 400, 401, 413, 415, 422, 429, 500, 503])
def test_what_the_server_says_becomes_one_short_printable_line(spool: Spool, said: Said, status: int) -> None:
    words = NASTY.encode("utf-8", "surrogatepass") + b"\xff\xfe" + b"x" * 300_000

    def script(request: Request) -> bytes:
        return reply(status, words, "Location: http://x/\x1b[2J\x07\x9b" + "y" * 5000)

    with ScriptedServer(script) as server:
        spool.drop("a.json", capture(1))
        assert not spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    lines = [line for line in said(logging.WARNING) if str(status) in line]
    assert lines
    for line in said():
        assert line.isprintable(), repr(line)
        assert len(line) < 700
    assert any("line one" in line for line in lines) or status == 301
    for path in spool.failed.glob("*.state"):
        assert "\x1b" not in json.dumps(json.loads(path.read_bytes()), ensure_ascii=False)


TOKEN, USER, PASSWORD, QUERY = "t0ken-Secret", "us3r-Secret", "p%40ss-Secret", "qu3ry-Secret"
SECRETS = [TOKEN, PASSWORD, "p@ss-Secret", QUERY]


def with_secrets(url: str) -> str:
    return url.replace("://", f"://{USER}:{PASSWORD}@") + f"?key={QUERY}&site=7"


def assert_no_secret(spool: Spool, texts: list[str], *more: str) -> None:
    """Nothing secret in `texts` nor in any file of the spool, be it as it is or in base64."""
    files = {str(path): path.read_bytes().decode(errors="replace") for path in spool.logs.rglob("*") if path.is_file()}
    for where, text in [*enumerate(texts), *files.items()]:
        for secret in [*SECRETS, *more]:
            assert secret not in text, (where, text)


def echo(request: Request) -> str:
    """What a chatty server makes of a request in an error page."""
    return "\n".join([request.line, *(f"{name}: {value}" for name, value in request.headers.items())])


ECHOES: dict[str, Callable[[Request], str]] = {
    "the whole request": echo,
    "the request's line": lambda request: request.line,
    "the Authorization header": lambda request: request.headers["authorization"],
    "the query's value": lambda request: f"unknown key {QUERY}",
    "the password": lambda request: f"wrong password p@ss-Secret ({PASSWORD}) for {USER}",
    "the end of a cut line": lambda request: "x" * 185 + request.headers["authorization"],
    "a line of its own": lambda request: f"credentials\n{request.headers['authorization'].split()[1]}\n",
}


@pytest.mark.parametrize("says", ECHOES.values(), ids=ECHOES.keys())
@pytest.mark.parametrize("status", [301, 401, 422, 503])
@pytest.mark.parametrize("token", [TOKEN, ""], ids=["with a token", "with a password"])
def test_no_secret_gets_into_the_log_or_a_state_file_even_when_the_server_echoes_it(
    spool: Spool, said: Said, status: int, says: Callable[[Request], str], token: str
) -> None:
    def script(request: Request) -> bytes | None:
        if 1 not in request.numbers:
            return None
        there = f"Location: http://elsewhere/{says(request)}".replace("\n", " ")
        return reply(status, says(request), there)

    with ScriptedServer(script) as server:
        spool.drop("a.json", capture(4))
        sender = spool.load(SERVER_URL=with_secrets(server.url), MAX_RETRIES=2, API_TOKEN=token)
        sender.process_json_file(spool.pending / "a.json")
        assert "failed_uploads" in " ".join(spool.names())
    assert said(logging.WARNING)
    assert_no_secret(spool, said(), base64.b64encode(f"{USER}:p@ss-Secret".encode()).decode())


@pytest.mark.parametrize("behaviour", [close, reset, say(b"garbage\r\n"), say(b"HTTP/1.1 200 OK\r\n")])
def test_no_secret_gets_into_the_log_when_the_network_fails(spool: Spool, said: Said, behaviour: Behaviour) -> None:
    with ScriptedServer(lambda request: behaviour, listening=False) as server:
        spool.drop("a.json", capture(4))
        sender = spool.load(SERVER_URL=with_secrets(server.url), API_TOKEN=TOKEN)
        sender.process_json_file(spool.pending / "a.json")
        server.listen()
        sender.retry_failed_uploads()
    assert said(logging.WARNING)
    assert_no_secret(spool, said(), USER)


def test_the_whole_console_of_a_process_at_debug_level_shows_no_secret(spool: Spool) -> None:
    moods = iter([503, 0, 200, 400, 401])

    def script(request: Request) -> bytes | Behaviour | None:
        status = next(moods, 0)
        if status == 200:
            return reply(200, {"packets_received": 0, "you": echo(request)})
        return reply(status, echo(request)) if status else close

    with ScriptedServer(script) as server:
        for name in ("a.json", "b.json", "c.json"):
            spool.drop(name, capture(2))
        result = spool.run("--once", SERVER_URL=with_secrets(server.url), API_TOKEN=TOKEN, LOG_LEVEL="DEBUG")
    assert "a.json" in result.stderr
    assert "401" in result.stderr
    assert_no_secret(spool, [result.stdout, result.stderr], USER)


# ---------------------------------------------------------------- credentials


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def authorization(spool: Spool, **settings: object) -> str | None:
    """What the server of one upload saw; {} in SERVER_URL stands for its address."""
    with ScriptedServer() as server:
        url = str(settings.pop("SERVER_URL", "http://{}/ingest")).replace("{}", f"127.0.0.1:{server.port}")
        assert spool.load(SERVER_URL=url, **settings).upload_packets(PACKETS)
    return server.requests[0].headers.get("authorization")


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login n3trc password n3tpass\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_without_credentials_no_authorization_is_sent(spool: Spool) -> None:
    assert authorization(spool) is None


def test_the_token_is_sent_as_bearer(spool: Spool) -> None:
    assert authorization(spool, API_TOKEN="abc") == "Bearer abc"


def test_the_token_wins_over_netrc(spool: Spool, netrc: None) -> None:
    assert authorization(spool, API_TOKEN="abc") == "Bearer abc"


def test_the_token_wins_over_credentials_in_the_url(spool: Spool) -> None:
    assert authorization(spool, API_TOKEN="abc", SERVER_URL="http://u:p@{}/ingest") == "Bearer abc"


def test_netrc_is_used_where_there_is_no_token(spool: Spool, netrc: None) -> None:
    assert authorization(spool) == basic("n3trc", "n3tpass")


def test_credentials_in_the_url_are_used_decoded_and_leave_the_request_line(spool: Spool) -> None:
    with ScriptedServer() as server:
        url = server.url.replace("://", "://u:p%40ss@")
        assert spool.load(SERVER_URL=url).upload_packets(PACKETS)
    assert server.requests[0].headers["authorization"] == basic("u", "p@ss")
    assert server.requests[0].line == "POST /ingest HTTP/1.1"
    assert "@" not in server.requests[0].headers["host"]


@pytest.mark.parametrize("decoded", [False, True])
def test_a_netrc_password_stays_out_of_the_log(spool: Spool, said: Said, netrc: None, decoded: bool) -> None:
    def script(request: Request) -> bytes:
        credentials = request.headers["authorization"].split()[1]
        return reply(401, base64.b64decode(credentials) if decoded else credentials)

    with ScriptedServer(script) as server:
        spool.drop("a.json", capture(1))
        assert not spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    assert_no_secret(spool, said(), "n3tpass", basic("n3trc", "n3tpass").split()[1])


# ---------------------------------------------------------------- proxies


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_from_the_environment_is_used(spool: Spool, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with ScriptedServer() as proxy:
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        spool.drop("a.json", capture(4))
        sender = spool.load(SERVER_URL="http://sensors.invalid/ingest", API_TOKEN="abc", BATCH_SIZE=2)
        assert sender.process_json_file(spool.pending / "a.json")
    assert [request.line for request in proxy.requests] == ["POST http://sensors.invalid/ingest HTTP/1.1"] * 2
    assert proxy.requests[0].headers["authorization"] == "Bearer abc"
    assert (proxy.connections, sorted(proxy.stored)) == (1, [0, 1, 2, 3])


@pytest.mark.parametrize("exempt", ["127.0.0.1", "*", "example.com,127.0.0.0/8"])
def test_no_proxy_is_honoured(spool: Spool, monkeypatch: pytest.MonkeyPatch, exempt: str) -> None:
    with ScriptedServer() as server, ScriptedServer() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", exempt)
        assert spool.load(SERVER_URL=server.url).upload_packets(PACKETS)
    assert (len(server.requests), proxy.connections) == (1, 0)


@pytest.mark.parametrize("exempt", ["localhost,::1", "[::1]", "fe80::/10"])
def test_a_list_of_exempt_hosts_is_no_proxy(spool: Spool, monkeypatch: pytest.MonkeyPatch, exempt: str) -> None:
    monkeypatch.setenv("no_proxy", exempt)
    with ScriptedServer() as server:
        assert spool.load(SERVER_URL=server.url).upload_packets(PACKETS)


def test_a_tunnel_that_breaks_before_anything_was_sent_is_no_connection(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(lambda request: reset) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        sender = spool.load(SERVER_URL="https://sensors.invalid/ingest")
        assert sender.upload_packets(PACKETS).outcome is sender.Outcome.AWAY


def test_a_redirects_query_and_password_are_not_shown(spool: Spool, said: Said) -> None:
    there = "Location: https://u:pa55word@login.example/x?session=S3cret#S3cret"
    with ScriptedServer(lambda request: reply(302, "", there)) as server:
        assert not spool.load(SERVER_URL=server.url).upload_packets(PACKETS)
    (line,) = said(logging.ERROR)
    assert "https://login.example/x" in line
    assert "S3cret" not in line
    assert "pa55word" not in line


def test_https_takes_a_proxys_tunnel(spool: Spool, monkeypatch: pytest.MonkeyPatch, certificates: Certificates) -> None:
    tls = certificates.server("sensors.invalid")
    with ScriptedServer(tls=tls) as server, ScriptedServer(lambda request: tunnel(server.port)) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
        sender = spool.load(SERVER_URL="https://sensors.invalid/ingest", API_TOKEN="abc")
        assert sender.upload_packets(PACKETS)
        assert sender.upload_packets(PACKETS)
    assert [request.line.rpartition(" ")[0] for request in proxy.requests] == ["CONNECT sensors.invalid:443"]
    assert "authorization" not in proxy.requests[0].headers
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer abc"] * 2


def test_a_proxys_password_is_sent_to_it_and_never_logged(
    spool: Spool, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(lambda request: reply(407, echo(request)), listening=False) as proxy:
        monkeypatch.setenv("http_proxy", f"http://u:pr0xy-Secret@127.0.0.1:{proxy.port}")
        spool.drop("a.json", capture(1))
        sender = spool.load(SERVER_URL="http://sensors.invalid/ingest")
        assert not sender.process_json_file(spool.pending / "a.json")  # the proxy is down
        proxy.listen()
        sender.retry_failed_uploads()
    assert proxy.requests[0].headers["proxy-authorization"] == basic("u", "pr0xy-Secret")
    assert any("Cannot connect" in line for line in said(logging.WARNING))
    assert any("407" in line and f"check the proxy 127.0.0.1:{proxy.port}" in line for line in said(logging.ERROR))
    assert_no_secret(spool, said(), "pr0xy-Secret", basic("u", "pr0xy-Secret").partition(" ")[2])


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def assert_refused_over_tls(spool: Spool, said: Said, server: ScriptedServer, *hints: str) -> None:
    """One handshake, no request, no wait, an error line with `hints`, the file failed."""
    spool.drop("a.json", capture(3))
    sender = spool.load(SERVER_URL=server.url, API_TOKEN=TOKEN, RETRY_DELAY=5)
    clock = Clock(sender)
    assert not sender.process_json_file(spool.pending / "a.json")
    assert (server.connections, server.requests, clock.slept) == (1, [], 0)
    errors = said(logging.ERROR)
    assert all(hint in " ".join(errors) for hint in ("a.json", *hints)), errors
    assert "failed_uploads/a.json" in spool.names()


def test_an_untrusted_certificate_is_refused(spool: Spool, said: Said, certificates: Certificates) -> None:
    with ScriptedServer(tls=certificates.server("127.0.0.1")) as server:
        assert_refused_over_tls(spool, said, server, "REQUESTS_CA_BUNDLE")


def test_an_expired_certificate_is_refused(
    spool: Spool, said: Said, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    with ScriptedServer(tls=certificates.server("127.0.0.1", not_after=yesterday)) as server:
        assert_refused_over_tls(spool, said, server, "expired")


def test_another_names_certificate_is_refused(
    spool: Spool, said: Said, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    with ScriptedServer(tls=certificates.server("elsewhere.example")) as server:
        assert_refused_over_tls(spool, said, server, "127.0.0.1", "SERVER_URL")


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_certificate_is_trusted_through_requests_ca_bundle(
    spool: Spool, said: Said, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "environment":
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    else:
        (spool.folder / ".env").write_text(f"REQUESTS_CA_BUNDLE={certificates.bundle.as_posix()}\n")
    with ScriptedServer(tls=certificates.server("127.0.0.1")) as server:
        spool.drop("a.json", capture(6))
        assert spool.load(SERVER_URL=server.url, BATCH_SIZE=2).process_json_file(spool.pending / "a.json")
    assert (server.connections, len(server.requests)) == (1, 3)
    assert said(logging.WARNING) == []


def test_a_ca_bundle_in_the_environment_wins_over_the_one_in_dotenv(spool: Spool, certificates: Certificates) -> None:
    (spool.folder / ".env").write_text("REQUESTS_CA_BUNDLE=/nowhere/ca.pem\n")
    with ScriptedServer(tls=certificates.server("127.0.0.1")) as server:
        sender = spool.load(SERVER_URL=server.url, REQUESTS_CA_BUNDLE=certificates.bundle)
        assert sender.upload_packets(PACKETS)


@pytest.mark.parametrize("content", [None, "not a certificate\n"])
def test_an_unusable_ca_bundle_is_a_configuration_error_that_names_it(
    spool: Spool, said: Said, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    bundle = spool.folder / "missing-ca.pem"
    if content:
        bundle.write_text(content)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with ScriptedServer(tls=certificates.server("127.0.0.1")) as server:
        spool.drop("a.json", capture(3))
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert not sender.process_json_file(spool.pending / "a.json")
    assert (server.requests, clock.slept) == ([], 0)
    assert any("missing-ca.pem" in line for line in said(logging.ERROR)), said()
    assert not any("attempt" in line for line in said())
    assert "failed_uploads/a.json" in spool.names()


@pytest.mark.parametrize("server_speaks_tls", [True, False])
def test_http_for_https_is_told_in_one_line(
    spool: Spool, said: Said, certificates: Certificates, server_speaks_tls: bool
) -> None:
    tls = certificates.server("127.0.0.1") if server_speaks_tls else None
    with ScriptedServer(lambda request: say(b"?"), tls=tls) as server:
        url = f"{'http' if server_speaks_tls else 'https'}://127.0.0.1:{server.port}/ingest"
        spool.drop("a.json", capture(3))
        sender = spool.load(SERVER_URL=url, REQUEST_TIMEOUT=0.5, MAX_RETRIES=1)
        assert not sender.process_json_file(spool.pending / "a.json")
    assert said(logging.WARNING)
    assert all(line.isprintable() for line in said())
    assert "failed_uploads/a.json" in spool.names()


# ---------------------------------------------------------------- compression


def test_compressed_bodies_are_gzip_of_the_same_batches_under_the_same_keys(spool: Spool, said: Said) -> None:
    content = spool.drop("a.json", capture(50))
    with ScriptedServer() as server:
        sender = spool.load(SERVER_URL=server.url, COMPRESS="gzip", BATCH_SIZE=20)
        assert sender.process_json_file(spool.pending / "a.json")
    assert sorted(server.stored) == list(range(50))
    for request in server.requests:
        assert request.headers["content-encoding"] == "gzip"
        assert int(request.headers["content-length"]) == len(request.body) < len(gzip.decompress(request.body)) / 2
        assert request.key == key_of(gzip.decompress(request.body))
        assert request.plain[1:-1] in content
    assert said(logging.WARNING) == []


@pytest.mark.parametrize("status", [400, 415, 422])
def test_a_refusal_of_compressed_bodies_names_the_setting(spool: Spool, said: Said, status: int) -> None:
    def no_gzip(request: Request) -> bytes | None:
        return reply(status, "what is this?") if "content-encoding" in request.headers else None

    with ScriptedServer(no_gzip) as server:
        spool.drop("a.json", capture(50))
        sender = spool.load(SERVER_URL=server.url, COMPRESS="gzip", BATCH_SIZE=20)
        assert not sender.process_json_file(spool.pending / "a.json")
    assert all("content-encoding" in request.headers for request in server.requests)
    assert any("COMPRESS" in line for line in said(logging.ERROR))
    assert "failed_uploads/a.json" in spool.names()


@pytest.mark.parametrize("status", [401, 413, 500, 503])
def test_other_answers_say_nothing_about_compression(spool: Spool, status: int) -> None:
    with ScriptedServer(lambda request: reply(status) if request.number == 0 else None) as server:
        sender = spool.load(SERVER_URL=server.url, COMPRESS="gzip")
        while not sender.upload_with_retry(PACKETS):
            pass
        assert sender.upload_packets(PACKETS)
    assert all("content-encoding" in request.headers for request in server.requests)


# ---------------------------------------------------------------- networks and broken servers


BROKEN: dict[str, Behaviour] = {
    "closes without a word": close,
    "resets the connection": reset,
    "is no HTTP server": say(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"),
    "sends random bytes": say(bytes(range(255, -1, -1)) * 4),
    "sends only a line end": say(b"\r\n"),
    "sends half a status line": say(b"HTTP/1.1 20"),
    "sends no number": say(b"HTTP/1.1 OK 200\r\n\r\n"),
    "sends a number of many digits": say(b"HTTP/1.1 20000000000 OK\r\n\r\n"),
    "sends a negative number": say(b"HTTP/1.1 -200 OK\r\n\r\n"),
    "sends half a header": say(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "ends between two headers": say(b"HTTP/1.1 200 OK\r\nServer: x\r\n"),
    "sends an endless header line": say(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000),
    "sends a thousand headers": say(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n"),
    "truncates its reply": say(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"status": '),
    "sends no byte of its reply": say(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n"),
    "truncates a chunked reply": say(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"st'),
    "leaves out the last chunk": say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"),
    "sends a chunk of size x": say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n{}\r\n0\r\n\r\n"),
    "says only 100 Continue": say(b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("behaviour", BROKEN.values(), ids=BROKEN.keys())
def test_a_server_that_is_tried_again_with_backoff(spool: Spool, said: Said, behaviour: Behaviour) -> None:
    slept: list[float] = []

    def script(request: Request) -> Behaviour:
        slept.append(clock.slept)
        return behaviour

    with ScriptedServer(script) as server:
        content = spool.drop("a.json", capture(3))
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert not sender.process_json_file(spool.pending / "a.json")
        assert len(slept) == 3
        for wait, delay in zip(waits(slept), (5, 10)):
            assert delay <= wait <= 1.1 * delay + 0.001
        assert clock.slept == slept[-1]
        assert (spool.failed / "a.json").read_bytes() == content
        server.script = lambda request: None
        sender.retry_failed_uploads()
    assert len({request.key for request in server.requests}) == 1
    assert spool.names() == ["processed/a.json"]
    attempts = [line for line in said(logging.WARNING) if "attempt" in line]
    assert [f"(attempt {number}/3)" in line for number, line in enumerate(attempts, 1)] == [True] * 3
    assert all("a.json" in line for line in attempts)
    assert all(line.isprintable() and len(line) < 500 for line in said())
    assert said(logging.ERROR) == []


PIECES = [
    b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/9 ", b"200", b"100", b"204", b"301", b"400", b"413", b"503", b" ", b" OK",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 422 Nope\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"\r\n", b"\n", b"\r\n\r\n",
    b"Content-Length: ", b"5", b"-1", b"9" * 30, b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n",
    b"Location: ", b"Retry-After: ", b"Set-Cookie: a=b\r\n", b"Connection: close\r\n", b"hello", b"5\r\nhello\r\n",
    b"0\r\n\r\n", b'{"packets_received": ', b"}",
]  # fmt: skip


def test_no_reply_raises_or_breaks_a_line_of_the_log(
    spool: Spool, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    words = b""
    with ScriptedServer(lambda request: say(words)) as server:
        sender = spool.load(SERVER_URL=server.url, REQUEST_TIMEOUT=5)

        @settings(max_examples=250, deadline=None, database=None)
        @given(st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=12))).map(b"".join))
        def check(reply: bytes) -> None:
            nonlocal words
            words = reply
            answer = sender.upload_packets(PACKETS)
            assert isinstance(answer.outcome, sender.Outcome)
            assert all(line.isprintable() and len(line) < 700 for line in said())
            assert not any(record.exc_info for record in caplog.records if record.name == "sender")
            caplog.clear()

        check()


@pytest.mark.parametrize("words", [b"HTTP/1.1 503 Busy\r\nno header at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Le"])
def test_a_host_with_its_own_logging_sees_no_traceback_and_no_secret_of_a_broken_reply(
    spool: Spool, caplog: pytest.LogCaptureFixture, words: bytes
) -> None:
    """Embedded, the records of the libraries below sender.py reach the host's handlers too."""
    with ScriptedServer(lambda request: say(words)) as server:
        spool.load(SERVER_URL=with_secrets(server.url), API_TOKEN=TOKEN).upload_packets(PACKETS)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(record.exc_info for record in told)
    assert_no_secret(spool, [record.getMessage() for record in told])


def test_a_refused_connection_is_tried_again_and_named_without_the_path(spool: Spool, said: Said) -> None:
    with ScriptedServer(listening=False) as server:
        spool.drop("a.json", capture(3))
        sender = spool.load(SERVER_URL=server.url, RETRY_DELAY=5)
        clock = Clock(sender)
        assert not sender.process_json_file(spool.pending / "a.json")
    lines = [line for line in said(logging.WARNING) if "attempt" in line]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert f"Cannot connect to server http://127.0.0.1:{server.port}" in line
        assert f"(attempt {number}/3)" in line
    assert 15 <= clock.slept <= 16.501
    assert "failed_uploads/a.json" in spool.names()


def test_a_name_that_is_not_resolved_is_tried_again(spool: Spool, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_dns(*arguments: object, **more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_dns)
    sender = spool.load(SERVER_URL="http://sensors.invalid/ingest", RETRY_DELAY=5)
    clock = Clock(sender)
    assert not sender.upload_with_retry(PACKETS)
    assert 15 <= clock.slept <= 16.501
    assert any("Cannot connect to server http://sensors.invalid" in line and "not known" in line for line in said())


def test_a_host_that_drops_connection_attempts_is_given_up_in_time(spool: Spool, said: Said) -> None:
    with full_backlog() as url:
        sender = spool.load(SERVER_URL=url, REQUEST_TIMEOUT=0.2)
        began = time.monotonic()
        assert not sender.upload_packets(PACKETS)
        assert time.monotonic() - began < 3
    assert any("Cannot connect to server" in line for line in said(logging.WARNING))


def assert_given_up_in_time(spool: Spool, answer: Behaviour, timed_out: bool = True, **settings: Any) -> float:
    """One POST to a server that would go on for ten seconds; returns how long it took."""
    with ScriptedServer(lambda request: answer, **settings) as server:
        sender = spool.load(SERVER_URL=server.url, REQUEST_TIMEOUT=0.3)
        began = time.monotonic()
        given = sender.upload_packets(PACKETS)
        took = time.monotonic() - began
        server.script = lambda request: None
        assert sender.upload_packets(PACKETS)
        assert server.connections == 2, "what comes late on the old connection is for nobody"
    assert took < 4
    if timed_out:
        assert given.outcome is sender.Outcome.UNANSWERED
    return took


SLOW: dict[str, Behaviour] = {
    "accepts and never answers": hold,
    "stops in the middle of a header": say_and_hold(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "stops before the body": say_and_hold(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
    "stops in the middle of the body": say_and_hold(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{"),
    "drips its status line": drip(b"", b"H"),
    "drips a header": drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "drips headers": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "drips its body": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
    "drips a body without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "drips chunks": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "drips 100 Continue": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("answer", SLOW.values(), ids=SLOW.keys())
def test_a_server_that_times_out(spool: Spool, said: Said, answer: Behaviour) -> None:
    took = assert_given_up_in_time(spool, answer)
    assert took >= 0.3
    assert any("Request timed out" in line for line in said(logging.WARNING))


@pytest.mark.slow
@pytest.mark.parametrize("status", [400, 413, 500, 503])
def test_a_dripping_refusal_is_classified_by_its_status_in_bounded_time(spool: Spool, status: int) -> None:
    head = reply(status).replace(b"Content-Length: 0", b"Content-Length: 100000")
    with ScriptedServer(lambda request: drip(head, b"x")) as server:
        began = time.monotonic()
        sender = spool.load(SERVER_URL=server.url, REQUEST_TIMEOUT=0.3)
        dripping = sender.upload_packets(PACKETS)
        assert time.monotonic() - began < 4
        server.script = lambda request: reply(status)
        assert dripping.outcome is sender.upload_packets(PACKETS).outcome


def test_dripping_over_tls_is_given_up_in_time(
    spool: Spool, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    assert_given_up_in_time(spool, drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"), tls=certificates.server("127.0.0.1"))


def test_a_dripping_reply_through_a_proxy_is_given_up_in_time(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda request: drip(b"HTTP/1.1 200 OK\r\nX: ", b"x")) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        sender = spool.load(SERVER_URL="http://sensors.invalid/ingest", REQUEST_TIMEOUT=0.3)
        began = time.monotonic()
        assert sender.upload_packets(PACKETS).outcome is sender.Outcome.UNANSWERED
        assert time.monotonic() - began < 4


def test_a_proxy_that_drips_is_given_up_in_time(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda request: drip(b"HTTP/1.1 200 OK\r\nX: ", b"x")) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        sender = spool.load(SERVER_URL="https://sensors.invalid/ingest", REQUEST_TIMEOUT=0.3)
        began = time.monotonic()
        assert not sender.upload_packets(PACKETS)
        assert time.monotonic() - began < 4


def test_a_kept_alive_connection_times_out_anew_for_each_request(spool: Spool) -> None:
    """The time left for one reply must not be taken from the next."""
    with ScriptedServer(lambda request: None if request.number < 20 else hold) as server:
        sender: Any = spool.load(SERVER_URL=server.url, REQUEST_TIMEOUT=2)
        clock = Clock(sender)
        for _ in range(20):
            assert sender.upload_packets(PACKETS)
            clock.move(1.5)
        sender.REQUEST_TIMEOUT = 0.2
        assert not sender.upload_packets(PACKETS)
    assert server.connections == 1


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "status line": (b"HTTP/1.1 200 ", b"x"),
    "header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "body of an error": (b"HTTP/1.1 503 Busy\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"4\r\nwxyz\r\n"),
    "chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize(("words", "piece"), ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_reply_fills_neither_time_nor_memory(spool: Spool, said: Said, words: bytes, piece: bytes) -> None:
    sent: Counter[str] = Counter()
    tracemalloc.start()
    try:
        assert_given_up_in_time(spool, flood(words, piece, sent), timed_out=False)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    if words.endswith(
        (b"\r\n\r\n", b": ", b" ")
    ):  # other lines are read and forgotten, for as long as a request may take
        assert sent["bytes"] < 16_000_000
    assert all(len(line) < 500 for line in said())


def test_a_compressed_reply_is_not_blown_up(spool: Spool) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    with ScriptedServer(lambda request: reply(200, bomb, "Content-Encoding: gzip")) as server:
        sender = spool.load(SERVER_URL=server.url)
        tracemalloc.start()
        try:
            assert sender.upload_packets(PACKETS)
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()


def test_a_server_that_never_reads_is_given_up_in_time(spool: Spool, said: Said) -> None:
    done = threading.Event()

    def ignore(connection: socket.socket) -> None:
        done.wait(10)

    try:
        with ScriptedServer(early=lambda request: ignore, receive_buffer=4096) as server:
            sender = spool.load(SERVER_URL=server.url, REQUEST_TIMEOUT=0.3)
            began = time.monotonic()
            answer = sender.upload_packets([packet(number, payload="x" * 1_000_000) for number in range(40)])
            assert time.monotonic() - began < 4
            assert answer.outcome is sender.Outcome.UNANSWERED
            done.set()
    finally:
        done.set()
    assert any("Request timed out" in line for line in said(logging.WARNING))


@pytest.mark.parametrize("politely", [True, False], ids=["reads on", "closes at once"])
def test_a_413_that_comes_in_the_middle_of_the_body_is_heard(spool: Spool, said: Said, politely: bool) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.sendall(reply(413, "too long for me", "Connection: close"))
        if politely:
            connection.shutdown(socket.SHUT_WR)
            hold(connection)

    def early(request: Request) -> Behaviour | None:
        return refuse if int(request.headers["content-length"]) > 5_000_000 else None

    with ScriptedServer(early=early) as server:
        content = spool.drop("a.json", [packet(number, payload="x" * 1_000_000) for number in range(16)])
        assert spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "a.json")
    assert server.stored == Counter(range(16))
    assert (spool.processed / "a.json").read_bytes() == content
    assert any("413" in line for line in said(logging.WARNING))
    assert not any("Retrying" in line for line in said())


def test_a_real_413_before_the_body_is_heard(spool: Spool, tmp_path: Path) -> None:
    with IngestApp(tmp_path, MAX_BYTES=2_000_000) as app:
        spool.drop("a.json", [packet(number, payload="x" * 500_000) for number in range(12)])
        assert spool.load(SERVER_URL=app.url).process_json_file(spool.pending / "a.json")
    assert app.stored() == Counter(range(12))


# ---------------------------------------------------------------- kept-alive connections that the server closes


def serve_files(
    spool: Spool, sender: ModuleType, count: int, size: int = 2, before: Callable[[], object] = lambda: None
) -> None:
    for number in range(count):
        spool.drop(f"{number:03}.json", capture(size, start=number * size, payload="x" * 50_000))
        before()
        assert sender.process_json_file(spool.pending / f"{number:03}.json")


def assert_nobody_noticed(said: Said, clock: Clock) -> None:
    assert said(logging.WARNING) == []
    assert not any("Retrying" in line or "attempt" in line for line in said())
    assert clock.slept == 0


@pytest.mark.slow
@pytest.mark.parametrize(("keep_alive", "files"), [(1, 2), (0.02, 40)])
def test_idle_connections_that_uvicorn_closes_are_not_noticed(
    spool: Spool, said: Said, tmp_path: Path, keep_alive: float, files: int
) -> None:
    with IngestApp(tmp_path, keep_alive=keep_alive) as app:
        sender = spool.load(SERVER_URL=app.url)
        clock = Clock(sender)
        closed = "uvicorn's close of the idle connection"
        serve_files(spool, sender, files, before=lambda: wait_until(lambda: not app.open_connections, closed))
    assert_nobody_noticed(said, clock)
    assert (app.requests, app.stored()) == (files, Counter(range(2 * files)))


def test_connections_closed_at_the_very_moment_are_not_noticed(spool: Spool, said: Said, tmp_path: Path) -> None:
    with IngestApp(tmp_path, keep_alive=0.002) as app:
        sender = spool.load(SERVER_URL=app.url)
        clock = Clock(sender)
        serve_files(spool, sender, 100, before=lambda: clock.move(2))
    assert_nobody_noticed(said, clock)
    assert app.stored() == Counter(range(200))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_server_that_closes_right_after_each_answer_costs_no_retry(
    spool: Spool, said: Said, certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    with ScriptedServer(lambda request: say(OK), tls=certificates.server("127.0.0.1") if tls else None) as server:
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        serve_files(spool, sender, 60, before=lambda: clock.move(2))
    assert_nobody_noticed(said, clock)
    assert len({request.key for request in server.requests}) == 60


@pytest.mark.parametrize("ending", [close, reset])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("body_read", [False, True], ids=["while it is sent", "when it has been sent"])
def test_a_connection_closed_under_the_next_request_costs_no_retry(
    spool: Spool,
    said: Said,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    ending: Behaviour,
    tls: bool,
    body_read: bool,
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.bundle))
    used: set[int] = set()

    def once_per_connection(request: Request) -> Behaviour | None:
        if request.connection in used:
            return ending
        if body_read or request.body:
            used.add(request.connection)
        return None

    with ScriptedServer(tls=certificates.server("127.0.0.1") if tls else None) as server:
        if body_read:
            server.script = once_per_connection
        else:
            server.early = lambda request: ending if request.connection in used else None
            server.script = lambda request: used.add(request.connection)
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        serve_files(spool, sender, 12, size=8, before=lambda: clock.move(2))
    assert_nobody_noticed(said, clock)
    assert server.stored == Counter(range(96))
    assert server.connections == 12


def test_a_fresh_connection_that_breaks_is_an_attempt(spool: Spool) -> None:
    """Only a connection that was idle is replaced without counting: else a dead server would get every POST twice."""
    with ScriptedServer(lambda request: close if request.number else None) as server:
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        assert sender.upload_with_retry(PACKETS)
        clock.move(2)
        assert not sender.upload_with_retry(capture(3, start=10))
    assert len(server.requests) == 1 + 4, "one on the old connection, three attempts on new ones"


@pytest.mark.parametrize("ending", [close, reset])
def test_a_connection_that_breaks_between_batches_is_an_attempt(spool: Spool, said: Said, ending: Behaviour) -> None:
    with ScriptedServer(lambda request: ending if request.number == 1 else None) as server:
        sender = spool.load(SERVER_URL=server.url)
        Clock(sender)
        assert sender.upload_with_retry(PACKETS)
        assert sender.upload_with_retry(capture(3, start=10))
    assert any("attempt 1/3" in line for line in said(logging.WARNING))


@pytest.mark.parametrize("second", [429, 401, 200])
def test_the_repeat_on_a_fresh_connection_is_judged_by_its_own_outcome(spool: Spool, second: int) -> None:
    """The old error must not be told in its place."""
    answers: list[Answer] = [reply(200), close, reply(second)]
    with ScriptedServer(lambda request: answers[request.number]) as server:
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        assert sender.upload_packets(PACKETS)
        clock.move(2)
        answer = sender.upload_packets(PACKETS)
    expected = {429: "BUSY", 401: "MISCONFIGURED", 200: "DELIVERED"}[second]
    assert answer.outcome is sender.Outcome[expected]


def test_a_connection_idle_for_over_a_minute_is_not_used_again(spool: Spool) -> None:
    """A NAT may have forgotten it, and the request would vanish."""
    with ScriptedServer() as server:
        sender = spool.load(SERVER_URL=server.url)
        clock = Clock(sender)
        for number, idle in enumerate((59, 61, 1)):
            assert sender.upload_packets(capture(3, start=10 * number))
            clock.move(idle)
        assert sender.upload_packets(capture(3, start=90))
        assert [request.connection for request in server.requests] == [0, 0, 1, 1]


ODD_NETRCS = {"not UTF-8": b"machine elsewhere login \xfc password x"}


@pytest.mark.parametrize("netrc", ODD_NETRCS.values(), ids=ODD_NETRCS)
def test_a_netrc_with_an_odd_byte_is_told_and_ends_nothing(spool: Spool, netrc: bytes) -> None:
    (spool.folder / "netrc").write_bytes(netrc)
    spool.drop("a.json", capture(3))
    with ScriptedServer() as server:
        settings = {"SERVER_URL": server.url, "NETRC": spool.folder / "netrc", "PYTHONUTF8": 1}
        first = spool.run("--once", **settings)
        (spool.folder / "netrc").write_text("machine 127.0.0.1 login u password p")
        second = spool.run("--once", **settings)
    assert (first.returncode, second.returncode) == (1, 0)
    assert any(".netrc" in line and "moved to failed_uploads" in line for line in console_lines(first.stderr))
    assert server.stored == Counter([0, 1, 2])


def test_a_proxy_that_needs_a_package_is_told_as_that(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
    sender = spool.load(SERVER_URL="http://127.0.0.2:9/ingest")
    answer = sender.upload_with_retry(capture(1))
    assert answer.outcome is sender.Outcome.MISCONFIGURED
    assert "SOCKS" in answer.reason


def test_a_bad_url_is_shown_without_what_may_be_secret(spool: Spool) -> None:
    for url in ("http://u:SEC\nRET@h:99999/", "ftp://u:SECRET\n@h/", "ftp://h/#SECRET", "ftp://h/;k=SECRET"):
        sender = spool.load(SERVER_URL=url)
        with pytest.raises(ValueError, match=r"SERVER_URL=\S+ is not allowed") as raised:
            sender.check_settings()
        assert "SEC" not in str(raised.value)
        assert "RET" not in str(raised.value)
