"""Reading a capture: what is accepted, what is refused and why, and that the batches are the file's own text."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import DATA, Spool, packet
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ingest_server import IngestServer
from servers import ScriptedServer, reply

settings.register_profile(
    "reading",
    deadline=None,
    database=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
examples = settings(settings.get_profile("reading"), max_examples=150)

CORRUPT = DATA / "corrupt_packets_20261123_114453.json"
NORMAL = 128 * 1024  # bytes in a block; smaller ones put block edges everywhere


# ---------------------------------------------------------------- both readers, and what they must agree with


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ModuleType]]:
    """sender.py twice: with its fast reader, and with the walk alone as on a Python without sqlite3."""
    spool = Spool(tmp_path_factory.mktemp("readers"))
    fast, walking = spool.load(), spool.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walking, "sqlite3", None)
        yield [fast, walking]


@pytest.fixture(params=["fast", "walking"])
def reader(request: pytest.FixtureRequest, readers: list[ModuleType]) -> ModuleType:
    fast, walking = readers
    return fast if request.param == "fast" else walking


def capture_path(module: ModuleType) -> Path:
    return Path(str(module.__file__)).with_name("capture.json")


def batches(module: ModuleType, content: bytes, size: int, block: int = NORMAL) -> list[bytes]:
    """The requests' bodies for a file with this content. Raises ValueError where it is refused."""
    path = capture_path(module)
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        with open(path, "rb") as file:
            capture = module.Capture(file)
            stops = [*range(0, len(capture), size), len(capture)]
            return [capture.cut(start, stop) for start, stop in zip(stops, stops[1:])]


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def strictly(content: bytes) -> list[dict[str, Any]] | None:
    """The packets of a file as the json module reads it, where it is one UTF-8 JSON array of objects; else None."""
    try:
        packets = json.loads(content.decode("utf-8-sig"), parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(packets, list) and all(isinstance(element, dict) for element in packets)
    return packets if whole else None


def assert_file_text(content: bytes, bodies: list[bytes]) -> None:
    """The bodies, one after the other, are the file: nothing is left out but what stands between two batches."""
    at = content.index(b"[") + 1
    for number, body in enumerate(bodies):
        assert (body[:1], body[-1:]) == (b"[", b"]"), body
        between = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*" if number else rb"[ \t\r\n]*").match(content, at)
        assert between, (number, content[at : at + 20])
        at = between.end()
        assert content.startswith(body[1:-1], at), (body, content[at : at + len(body)])
        at += len(body) - 2
    assert content[at:].strip(b" \t\r\n") == b"]", content[at:]


def assert_agrees_with_json(readers: list[ModuleType], content: bytes, size: int, block: int) -> bool:
    """Each reader takes what the json module takes, with the same packets, and refuses the rest; True if it took it."""
    packets = strictly(content)
    for module in readers:
        if packets is None:
            with pytest.raises(ValueError):  # noqa: PT011  the reasons have their own tests
                batches(module, content, size, block)
            continue
        bodies = batches(module, content, size, block)
        assert [element for body in bodies for element in json.loads(body)] == packets
        assert [len(json.loads(body)) for body in bodies[:-1]] == [size] * (len(bodies) - 1)
        assert all(0 < len(json.loads(body)) <= size for body in bodies)
        assert_file_text(content, bodies)
    return packets is not None


def flat(count: int, first: int = 0) -> bytes:
    """Packets in the sniffer's own layout, without the brackets."""
    return json.dumps([packet(first + number) for number in range(count)]).encode()[1:-1]


def reason(module: ModuleType, content: bytes, block: int = NORMAL) -> str:
    """The message with which a file is refused, by read_json_file too."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        batches(module, content, 10, block)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        with pytest.raises(ValueError, match=re.escape(str(refused.value))):
            module.read_json_file(capture_path(module))
    return str(refused.value)


def place(message: str) -> int:
    """The byte that a message points to."""
    found = re.search(r"\bbyte ([\d,]+)", message)
    assert found, f"no place in: {message}"
    return int(found[1].replace(",", ""))


# ---------------------------------------------------------------- what is accepted

VALID = {
    "an empty array": b"[]",
    "an empty array with white space": b"\r\n [ \t\n ] \n",
    "an empty array after a byte-order mark": b"\xef\xbb\xbf[]",
    "one packet": b'[{"t": 1}]',
    "an empty packet": b"[{}]",
    "empty packets": b"[{}, {},{} , {}]",
    "a byte-order mark": b'\xef\xbb\xbf[{"t": 1}, {"t": 2}]',
    "a byte-order mark and white space": b'\xef\xbb\xbf \n[\n{"t": 1}]\n',
    "compact": b'[{"t":1},{"t":2},{"t":3},{"t":4}]',
    "windows line ends": b'[\r\n  {\r\n    "t": 1\r\n  },\r\n  {\r\n    "t": 2\r\n  }\r\n]\r\n',
    "odd white space": b' [\t{ "t"\n:\r1 }\n\n,\t{"t" :2 } , {"t":3}\r\n,{"t":4}\n]\t\n ',
    "a layout that changes": b'[{"t": 1}, {"t": 2}, {"t": 3},{"t": 4}\n,{"t": 5}, {"t": 6}]',
    "duplicate keys": b'[{"t": 1, "t": 2}, {"t": 3, "t": {"t": 4}}, {"t": 5}]',
    "nested": b'[{"t": {"u": [{"t": 1}, {"t": 2}]}}, {"t": [[], [{}]]}, {"t": [{"t": 1}, {"t": 2}]}]',
    "separators in strings": b'[{"t": "}, {"}, {"t": "}, {\\"t"}, {"t": "}, {\\"t\\": 1}, {\\"t"}, {"}, {": "]"}]',
    "brackets in strings": b'[{"t": "]"}, {"t": "["}, {"t": "[{}]"}, {"[t": "}]"}]',
    "backslashes": rb'[{"t": "\\"}, {"t": "\\\\"}, {"t": "\\\""}, {"t\\": "\\\\\\"}, {"t": "\"}, {\"t\\"}]',
    "every escape": rb'[{"t": "\"\\\/\b\f\n\r\t\u0000\u00e9\uD83D\uDE00"}, {"t": 2}]',
    "lone surrogates as escapes": rb'[{"t": "\ud800"}, {"t": "\udc00\ud800"}, {"\ud800": 1}]',
    "raw unicode": '[{"t": "é\u2028😀\x7f\x85\ufeff"}, {"é": "日本"}, {"": "\u00a0"}, {"😀": 1}]'.encode(),
    "a key that begins with no letter": b'[{"": 1}, {" t": 2}, {"{": 3}, {"-": 4}, {"}, {": 5}]',
    "numbers": b'[{"t": -0}, {"t": -0.0}, {"t": 1E5}, {"t": 1e-5}, {"t": 1e999}, {"t": 0.1000000000000000055511151}]',
    "an integer of 4000 digits": b'[{"t": 1}, {"t": ' + b"9" * 4000 + b'}, {"t": 3}]',
    "words": b'[{"t": true}, {"t": false}, {"t": null}]',
    "packets of all sizes": b'[{"t": "' + b"x" * 3000 + b'"}, {"t": 1}, {"t": "' + b"y" * 9000 + b'"}, {"t": 2}]',
}


@pytest.mark.parametrize("block", [5, 16, 64, 1024, NORMAL])
@pytest.mark.parametrize("content", VALID.values(), ids=VALID)
def test_every_legal_file_is_read_as_json_reads_it(readers: list[ModuleType], content: bytes, block: int) -> None:
    for size in (1, 2, 1000):
        assert assert_agrees_with_json(readers, content, size, block)
    for module in readers:
        assert module.read_json_file(capture_path(module)) == strictly(content)


def test_white_space_longer_than_a_block_is_still_white_space(readers: list[ModuleType]) -> None:
    padding = b" \n\t\r" * 40_000
    for content in (
        padding + b'[{"t": 1}, {"t": 2}]',
        b"[" + padding + b'{"t": 1}, {"t": 2}]',
        b'[{"t": 1}' + padding + b', {"t": 2}]',
        b'[{"t": 1},' + padding + b'{"t": 2}]',
        b'[{"t": 1}, {"t":' + padding + b"2}]",
        b'[{"t": 1}, {"t": 2}' + padding + b"]",
        b'[{"t": 1}, {"t": 2}]' + padding,
        b"[" + padding + b"]",
        b"\xef\xbb\xbf" + padding + b"[]",
    ):
        assert assert_agrees_with_json(readers, content, 1, NORMAL), content.strip()[:30]


def test_a_block_may_end_at_any_byte(readers: list[ModuleType]) -> None:
    content = '[{"t": "é"}, {"t": "}, {\\"t"} ,\n{"t": {"u": "日本"}}, {"t": [1, {"t": "😀"}]}, {"é": 5}]\n'.encode()
    for block in range(5, len(content) + 2):
        assert assert_agrees_with_json(readers, b"\xef\xbb\xbf" + content, 2, block), block


@pytest.mark.parametrize("value", [b"1", b"[1]"], ids=["flat", "with an array"])
@pytest.mark.parametrize("gap", [b",", b", ", b" ,\r\n  "], ids=repr)
def test_the_gap_between_packets_may_lie_on_a_blocks_edge(readers: list[ModuleType], gap: bytes, value: bytes) -> None:
    """Packets and gaps of 1 KiB together: at one of these offsets each edge of a block meets the same byte of a gap."""
    padding = b"x" * (1024 - len(gap) - len(b'{"t": "", "u": }') - len(value))
    one = b'{"t": "%s", "u": %s}' % (padding, value)
    for offset in range(len(gap) + 2):
        content = b"[" + b" " * offset + gap.join([one] * (4 * NORMAL // 1024)) + b"]"
        assert assert_agrees_with_json(readers, content, 100, NORMAL), offset


def test_a_packet_larger_than_many_blocks_is_read(readers: list[ModuleType]) -> None:
    content = b"[" + flat(3) + b', {"t": "' + b"x" * 3_000_000 + b'"}, ' + flat(3) + b"]"
    assert assert_agrees_with_json(readers, content, 2, NORMAL)


@pytest.mark.parametrize("path", sorted(DATA.glob("packets_*.json")), ids=lambda path: path.name)
def test_real_captures_are_sent_byte_for_byte(readers: list[ModuleType], path: Path) -> None:
    content = path.read_bytes()
    assert assert_agrees_with_json(readers, content, 1000, NORMAL)
    assert assert_agrees_with_json(readers, content, 7, 4096)
    for module in readers:
        assert module.read_json_file(path) == json.loads(content)
        assert module.read_json_file(str(path)) == json.loads(content)


@pytest.mark.parametrize("place", [b"}%b, {", b"},%b {", b"}, {%b"])
def test_an_endless_separator_is_no_pattern_to_search_for(readers: list[ModuleType], place: bytes) -> None:
    """Compiled, it would take a hundred times its length, and stay in memory."""
    content = (b"[" + flat(3) + b"]").replace(b"}, {", place.replace(b"%b", b" " * 5000))
    assert assert_agrees_with_json(readers, content, 2, NORMAL)
    path = capture_path(readers[0])
    path.write_bytes(content)
    with open(path, "rb") as file:
        capture = readers[0].Capture(file)
        assert len(capture) == 3
        assert not capture._separator


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(
    "odd",
    [
        b'{"t": [{"t": 1}, {"t": 2}]}',
        b'{"t": [[{"t": 1}, {"t": 2}], 3]}',
        b'{"t": "}, {\\"t"}',
        b'{"t": "}, {"}',
        b'{"t": {"t": 1}, "u": 2}',
        b'{"t": {"t": {"t": 1}}}',
        b'{"t": {"t": 1} }',
        b"{}",
    ],
)
def test_one_odd_packet_among_many_is_cut_where_it_ends(readers: list[ModuleType], odd: bytes, size: int) -> None:
    content = b"[" + flat(30) + b", " + odd + b", " + flat(30) + b"]"
    assert assert_agrees_with_json(readers, content, size, NORMAL)


def test_the_sniffers_layout_is_not_walked(readers: list[ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparisons of the two readers in this file would compare the walk with itself."""
    decoded: list[int] = []
    decode = json.JSONDecoder.raw_decode

    def counting(decoder: json.JSONDecoder, text: str, idx: int = 0) -> tuple[Any, int]:
        decoded.append(idx)
        return decode(decoder, text, idx)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counting)
    costs = []
    for module in readers:
        decoded.clear()
        batches(module, b"[" + flat(2000) + b"]", 1000, 2048)
        costs.append(len(decoded))
    fast, walking = costs
    assert walking >= 2000
    assert fast < 100


# ---------------------------------------------------------------- what is refused, and where it says the fault is

DEEP = 200_000
BAD_ELEMENTS = {
    "NaN": b'{"t": NaN}',
    "Infinity": b'{"t": Infinity}',
    "-Infinity": b'{"t": -Infinity}',
    "NaN deep inside": b'{"t": {"u": {"v": NaN}}}',
    "a number": b"5",
    "a string": b'"t"',
    "a string that looks like packets": b'"}, {\\"t"',
    "null": b"null",
    "true": b"true",
    "an array": b"[]",
    "an array of packets": b'[{"t": 1}, {"t": 2}]',
    "nothing": b"",
    "a number behind a separator in a string": b'{"a":"}, {\\"t"}, 5',
    "a number behind another separator in a string": b'{"a":"}, {"}, 5',
    "a number between two such strings": b'{"t": "}, {\\"t"}, 5, {"t": "}, {\\"t"}',
    "two objects without a comma": b'{"t": 1} {"t": 2}',
    "two objects and a colon": b'{"t": 1}: {"t": 2}',
    "an object as a key": b'{{"t": 1}: 2}',
    "a comma after the last member": b'{"t": 1,}',
    "an unquoted key": b"{t: 1}",
    "single quotes": b"{'t': 1}",
    "a hexadecimal number": b'{"t": 0x10}',
    "a leading plus": b'{"t": +1}',
    "a leading zero": b'{"t": 01}',
    "no digit before the point": b'{"t": .5}',
    "no digit after the point": b'{"t": 1.}',
    "a comment": b'{"t": 1 /* one */}',
    "a line comment": b'{"t": 1 // one\n}',
    "a raw newline in a string": b'{"t": "a\nb"}',
    "a raw tab in a string": b'{"t": "a\tb"}',
    "a NUL in a string": b'{"t": "a\0b"}',
    "a NUL in a key": b'{"\0": 1}',
    "a NUL between members": b'{"t": 1,\0 "u": 2}',
    "a NUL after the object": b'{"t": 1}\0',
    "a NUL before the object": b'\0{"t": 1}',
    "an unknown escape": b'{"t": "\\x41"}',
    "a short escape": b'{"t": "\\u12"}',
    "a form feed as white space": b'{"t":\f1}',
    "a no-break space as white space": '{"t":\u00a01}'.encode(),
    "a byte-order mark inside": b'\xef\xbb\xbf{"t": 1}',
    "absurd nesting of arrays": b'{"t": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "absurd nesting of objects": b'{"t": ' * DEEP + b"1" + b"}" * DEEP,
    "an integer of 5000 digits": b'{"t": ' + b"9" * 5000 + b"}",
    "a negative integer of 5000 digits": b'{"t": -' + b"9" * 5000 + b"}",
    "an integer of 5000 digits in a list": b'{"t": [1, ' + b"9" * 5000 + b"]}",
    "latin-1": b'{"t": "\xe9"}',
    "a bad byte in a key": b'{"\xff": 1}',
    "a bad byte between members": b'{"t": 1,\xff "u": 2}',
    "an overlong encoding": b'{"t": "\xc0\xaf"}',
    "an encoded surrogate": b'{"t": "\xed\xa0\x80"}',
    "a cut character": b'{"t": "\xf0\x9f\x98"}',
    "a character beyond unicode": b'{"t": "\xf5\x80\x80\x80"}',
}


@pytest.mark.parametrize("element", BAD_ELEMENTS.values(), ids=BAD_ELEMENTS)
def test_one_bad_element_condemns_the_file_and_its_place_is_told(reader: ModuleType, element: bytes) -> None:
    for before, after in (
        (b"[", b", " + flat(40) + b"]"),
        (b"[" + flat(40) + b", ", b", " + flat(40, 40) + b"]"),
        (b"[" + flat(40) + b", ", b"]"),
    ):
        content = before + element + after
        assert strictly(content) is None
        for block in (64, 600, NORMAL):
            message = reason(reader, content, block)
            assert len(before) <= place(message) <= len(before) + len(element) + 2, message
            assert message.isprintable()
            assert len(message) < 200


BAD_FILES = {
    "an object": (b"", b"{}"),
    "an object of arrays": (b"", b'{"packets": [{"t": 1}]}'),
    "a string": (b"", b'"[]"'),
    "a number": (b" \n", b"5"),
    "NaN alone": (b"", b"NaN"),
    "zeros": (b"", b"\0" * 5000),
    "text": (b"", b"hello"),
    "two byte-order marks": (b"\xef\xbb\xbf", b"\xef\xbb\xbf[]"),
    "half a byte-order mark": (b"", b"\xef\xbb[]"),
    "UTF-16": (b"", '[{"t": 1}]'.encode("utf-16")),
    "UTF-16 without a mark": (b"[", '{"t": 1}]'.encode("utf-16-be")),
    "UTF-32": (b"", '[{"t": 1}]'.encode("utf-32")),
    "never closed": (b"", b"["),
    "never closed after a packet": (b'[{"t": 1}', b" "),
    "never closed after a comma": (b'[{"t": 1}, {"t": 2},', b" "),
    "closed with a brace": (b'[{"t": 1}', b"}"),
    "a trailing comma": (b'[{"t": 1}, {"t": 2}', b",]"),
    "a trailing comma and white space": (b'[{"t": 1}, {"t": 2}', b" ,\n ]\n"),
    "only a comma": (b"[", b",]"),
    "a leading comma": (b"[", b', {"t": 1}]'),
    "two commas": (b'[{"t": 1},', b', {"t": 2}]'),
    "a comma after the array": (b'[{"t": 1}]', b","),
    "a second array": (b'[{"t": 1}, {"t": 2}]\n', b'[{"t": 3}]'),
    "a second array after an empty one": (b"[]", b'[{"t": 3}]'),
    "a second closing bracket": (b'[{"t": 1}, {"t": 2}]', b"]"),
    "the tail of an older buffer": (b'[{"t": 1}, {"t": 2}]', b', "t": 7}, {"t": 8}]'),
    "a NUL tail": (b'[{"t": 1}, {"t": 2}]', b"\0" * 10),
    "a long NUL tail": (b'[{"t": 1}, {"t": 2}]', b"\0" * 300_000),
    "a NUL tail after white space": (b'[{"t": 1}, {"t": 2}]\n', b"\0"),
    "a NUL tail behind an empty array": (b"[]", b"\0"),
    "a NUL tail and a bracket": (b'[{"t": 1}, {"t": 2}]', b"\0\0\0]"),
    "a NUL tail and the end of an older packet": (b'[{"t": 1}, {"t": 2}]', b'\0\0\0, "t": 3}]'),
    "a NUL tail inside": (b'[{"t": 1}, {"t": 2}', b"\0]"),
    "a NUL tail and another end": (b'[{"t": 1}, {"t": 2}', b'\0\0\0, {"t": 3}]'),
    "a bad byte at the end": (b'[{"t": 1}, {"t": 2}]', b"\xff"),
    "a byte-order mark at the end": (b'[{"t": 1}, {"t": 2}]', b"\xef\xbb\xbf"),
    "a form feed at the end": (b'[{"t": 1}, {"t": 2}]', b"\f"),
    "a form feed at the beginning": (b"", b'\f[{"t": 1}]'),
    "a comment at the end": (b'[{"t": 1}, {"t": 2}]', b"// end"),
    "a comment at the beginning": (b"", b'/**/[{"t": 1}]'),
    "arrays without end": (b"[", b"[" * DEEP),
}


@pytest.mark.parametrize(("before", "bad"), BAD_FILES.values(), ids=BAD_FILES)
def test_no_array_of_objects_is_refused_with_reason_and_place(reader: ModuleType, before: bytes, bad: bytes) -> None:
    befores = {before, before.replace(b"[{", b"[" + flat(12) + b", {")}  # short, and with many packets before the fault
    for start, block in itertools.product(befores, (5, 64, 600, NORMAL)):
        assert strictly(start + bad) is None
        message = reason(reader, start + bad, block)
        assert len(start) <= place(message) <= len(start) + len(bad), message
        assert message.isprintable()
        assert len(message) < 200


@pytest.mark.parametrize("content", [b"", b" ", b"\n\r\t ", b"\xef\xbb\xbf", b" " * 300_000], ids=repr)
def test_a_file_with_nothing_in_it_is_no_capture(reader: ModuleType, content: bytes) -> None:
    assert reason(reader, content)


def test_the_corrupt_capture_is_refused_at_its_first_nul(reader: ModuleType) -> None:
    content = CORRUPT.read_bytes()
    for block in (1000, NORMAL):
        assert place(reason(reader, content, block)) == content.index(b"\0")


def test_nesting_is_readable_or_refused_and_nothing_in_between(reader: ModuleType) -> None:
    """Wherever this Python's limit is: a file that was proved is also one that read_json_file can decode."""

    def readable(depth: int) -> bool:
        path = capture_path(reader)
        path.write_bytes(b'[{"t": ' + b"[" * depth + b"]" * depth + b"}]")
        try:
            return bool(reader.read_json_file(path))
        except ValueError:
            return False

    good, bad = 1, DEEP
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if readable(middle) else (good, middle)
    assert good >= 100
    for depth in range(bad - 20, bad + 20):
        assert readable(depth) == (depth < bad)


@pytest.mark.parametrize("depth", [100, 600, 1300, 1900, 2500, 10_000])
def test_both_readers_have_the_same_limit_for_nesting(readers: list[ModuleType], depth: int) -> None:
    nested = b'{"t": ' * depth + b"1" + b"}" * depth
    verdicts = set()
    for module in readers:
        try:
            verdicts.add(len(batches(module, b"[" + flat(5) + b", " + nested + b", " + flat(5) + b"]", 100)))
        except ValueError:
            verdicts.add(0)
    assert len(verdicts) == 1


# ---------------------------------------------------------------- small files, exhaustively

SMALL = '[{"t": 1}, {"t": "é}, {\\"t"}, {"t": {"u": null}}, {"t": [2.5, {}]}, {"t": 5}]\n'.encode()


def test_a_file_cut_off_at_any_byte_is_refused(readers: list[ModuleType]) -> None:
    for end in range(len(SMALL) - 1):
        for block in (5, 24, NORMAL):
            assert not assert_agrees_with_json(readers, SMALL[:end], 2, block), SMALL[:end]


TELLING = [b"", *(bytes([byte]) for byte in b"\0\t \"\\,:{}[]5-'\xc3\xff")]


@pytest.mark.parametrize("replacement", TELLING, ids=repr)
def test_any_byte_replaced_is_judged_as_json_judges_it(readers: list[ModuleType], replacement: bytes) -> None:
    for at in range(len(SMALL)):
        assert_agrees_with_json(readers, SMALL[:at] + replacement + SMALL[at + 1 :], 2, 24)


JSON_VALUES = '1 -1 0 -0 1.5 1e5 1E+5 1e-5 0e0 0.0 -0.5 1e999 {} [] [1] "" "a" "\\u0041" true false null'
NOT_JSON = r"""
+1 .5 -.5 1. 1.e5 1e 1e+ 01 -01 00 - -- --1 +-1 0x1F 0X1f -0x1 0b1 0o7 1_000 1f 1n NaN -NaN +NaN nan QNaN SNaN
Infinity -Infinity +Infinity infinity inf Inf undefined None True FALSE nul tru truee nulll 'a' 'a" "a' `a` a $a _
/**/ /*c*/1 1/*c*/ //c #c 1//c {,} [,] [1,] {"a":1,} {"a":1,,} {a:1} {'a':1} {"a"} {"a":} {:1} {1:1} {"a"=1}
"\x41" "\'" "\v" "\0" "\a" "\u12" "\u{41}" "\U0041" "\" " } ] ) ( ; , : \ /
"""
WHITE_AND_CONTROL = [
    *("", " ", "\t", "\n", "\r", "\v1", "\f1", "\u00a01", "\u20281", "\ufeff1", "\u30001", "1 2", "1e 5"),
    *('"a" "b"', '"a\tb"', '"a\nb"', '"a\rb"', '"a\\\nb"', '"\x1f"', '"\x01"', '"\x7f"', '"\x85"', '"\u2028"', '"\\ "'),
    *('"\0"', "\0", "1\0", "//c\n1", "/*\n*/1", "1 /", "tr ue", "- 1", "1 .5"),
]
FRAGMENTS = [*JSON_VALUES.split(), *NOT_JSON.split(), *WHITE_AND_CONTROL]
PATTERNS = [
    *('{"t": %s}', '{"t": %s, "u": 1}', '{"t":1%s}', '{"t"%s: 1}', '{%s"t": 1}', "{%s: 1}", '{"t": {"u": %s}}'),
    *('{"t": "%s"}', '{"%s": 1}', '{"t": 1%s, "u": 2}', "%s", '%s{"t": 1}', '{"t": 1}%s', '{"t": 1},%s {"t": 2}'),
]


@pytest.mark.slow
def test_json5_and_other_dialects_are_not_json(readers: list[ModuleType]) -> None:
    """The fast proof must not be laxer, nor stricter, than json: in every place of a packet, every such fragment."""
    accepted = 0
    for fragment, pattern in itertools.product(FRAGMENTS, PATTERNS):
        element = pattern.replace("%s", fragment).encode()
        content = b"[" + flat(3) + b", " + element + b", " + flat(3, 3) + b"]"
        accepted += assert_agrees_with_json(readers, content, 2, 200)
    assert accepted > 300  # or little was compared


# ---------------------------------------------------------------- properties

TRICKY = [
    "}, {", '}, {"t', '"}, {"', '},{"t', "},\n{", '"', "\\", '\\"', "[", "]", "[]", "{", "}", "}]", "\0", "\n", "\x7f",
    "é", "日本", "😀", "\u2028", "\ufeff", "t", "NaN", "5", ", 5, ", "/*", "//",
]  # fmt: skip
strings = st.one_of(st.text(max_size=8), st.lists(st.sampled_from(TRICKY), max_size=4).map("".join))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), strings).filter(
    lambda value: not isinstance(value, float) or abs(value) != float("inf")
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
    max_leaves=6,
)
counts = st.integers(0, 99)
sniffed = st.fixed_dictionaries({"timestamp": counts, "src": strings, "length": st.one_of(st.none(), counts)})
packets_of_any_kind = st.one_of(
    st.lists(sniffed, max_size=12),
    st.lists(st.dictionaries(strings, values, max_size=4), max_size=8),
    st.lists(st.one_of(sniffed, st.dictionaries(strings, values, max_size=2)), max_size=12),
)
white = st.text(" \t\r\n", max_size=3)


@st.composite
def layouts(draw: st.DrawFn, packets: list[dict[str, Any]]) -> bytes:
    """Some way to write these packets as JSON: any white space, escaped or raw, with or without a byte-order mark."""
    separators = draw(st.sampled_from([None, (",", ":"), (", ", ": "), (" ,\n", "\t:")]))
    indent = draw(st.sampled_from([None, None, 0, 2, "\t"]))
    ascii_only = draw(st.booleans())
    gap = draw(white) + "," + draw(white)
    gaps = st.just(gap) if draw(st.booleans()) else st.builds("{},{}".format, white, white)
    text = draw(white) + "[" + draw(white)
    for number, one in enumerate(packets):
        text += draw(gaps) if number else ""
        text += json.dumps(one, separators=separators, indent=indent, ensure_ascii=ascii_only)
    text += draw(white) + "]" + draw(white)
    return text.encode("utf-8-sig" if draw(st.booleans()) else "utf-8")


@examples
@given(st.data(), packets_of_any_kind, st.integers(1, 12), st.one_of(st.integers(1, 80), st.just(NORMAL)))
def test_any_packets_in_any_layout_come_out_as_the_files_own_text(
    readers: list[ModuleType], data: st.DataObject, packets: list[dict[str, Any]], size: int, block: int
) -> None:
    content = data.draw(layouts(packets))
    assert assert_agrees_with_json(readers, content, size, block)


numbers = itertools.count()


@pytest.fixture(scope="module")
def ingest(tmp_path_factory: pytest.TempPathFactory, readers: list[ModuleType]) -> Iterator[IngestServer]:
    for module in readers:
        module.PENDING_DIR.mkdir(parents=True, exist_ok=True)
    with IngestServer(tmp_path_factory.mktemp("ingest") / "ingest.sqlite3") as server:
        yield server


def batch_sizes(server: IngestServer) -> list[int]:
    """How many packets each batch held, in the order of arrival; a batch that came again counts once."""
    with sqlite3.connect(server.db_path) as db:
        return [size for (size,) in db.execute("SELECT packets_received FROM idempotency_keys ORDER BY rowid")]


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few bytes replaced, inserted, deleted, cut off, or moved from elsewhere in it."""
    telling = st.sampled_from(TELLING)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = draw(st.integers(at, min(at + 40, len(content))))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "truncate", "splice", "bytes"]))
        if kind == "replace":
            content = content[:at] + draw(telling) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(telling) + content[at:]
        elif kind == "delete":
            content = content[:at] + content[end:]
        elif kind == "truncate":
            content = content[:at] + draw(st.sampled_from([b"", b"]", b"}]", b"\0" * 50, b"\0" * 50 + content[end:]]))
        elif kind == "bytes":
            content = content[:at] + draw(st.binary(max_size=4)) + content[end:]
        else:
            to = draw(st.integers(0, len(content)))
            content = content[:to] + content[at:end] + content[to:]
    return content


FLAT = b"[" + flat(12) + b"]"
SAMPLES = [FLAT, SMALL, FLAT[:-1] + b", " + SMALL[1:], json.dumps([packet(1)] * 9, indent=1).encode()]


@pytest.mark.slow
@settings(examples, max_examples=300)
@given(data=st.data(), block=st.integers(16, 300), size=st.integers(1, 5))
def test_any_damage_is_harmless_or_refused(
    readers: list[ModuleType], data: st.DataObject, block: int, size: int
) -> None:
    content = data.draw(st.one_of(st.sampled_from(SAMPLES), packets_of_any_kind.filter(bool).flatmap(layouts)))
    damaged = data.draw(mutations(content))
    assume(damaged != content)
    assert_agrees_with_json(readers, damaged, size, block)


PIECES = [*"{}\",:[]5t \\/'", '}, {"t', '{"t":', '"}', "null", '\\"', "{}"]


@settings(examples, max_examples=300)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14), block=st.integers(16, 120))
def test_no_string_of_separators_fools_the_fast_reader(
    readers: list[ModuleType], pieces: list[str], block: int
) -> None:
    content = b'[{"t":1}, {"t":2}, ' + "".join(pieces).encode() + b', {"t":3}, {"t":4}]'
    assert_agrees_with_json(readers, content, 2, block)


# ---------------------------------------------------------------- what becomes of a file that is refused


def refusals(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if name in record.getMessage()]


def test_a_fault_in_the_last_packet_holds_back_the_first(
    spool: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = spool.drop("X.json", b"[" + flat(40) + b', {"t": NaN}]')
    with IngestServer(tmp_path / "ingest.sqlite3") as server:
        module = spool.load(SERVER_URL=server.url, BATCH_SIZE=2)
        assert not module.process_json_file(module.PENDING_DIR / "X.json")
        assert batch_sizes(server) == []
    assert (spool.failed / "X.json").read_bytes() == content
    assert sorted(path.name for path in spool.logs.rglob("X.json*")) == ["X.json", "X.json.state"], spool.tree()
    (line,) = refusals(caplog, "X.json")
    assert "NaN" in line
    assert place(line) == content.index(b'{"t": NaN}')


def test_a_refused_file_is_read_again_when_it_has_changed(
    spool: Spool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = spool.drop("X.json", b'[{"t": 1}, {"t": 0x}]')
    with IngestServer(tmp_path / "ingest.sqlite3") as server:
        spool.load(SERVER_URL=server.url).process_json_file(spool.pending / "X.json")
        caplog.clear()
        file = spool.failed / "X.json"
        then = file.stat().st_mtime_ns
        file.write_bytes(content.replace(b"0x", b"42"))  # mended, but neither its size nor its time shows it
        os.utime(file, ns=(then, then))
        for _ in range(3):
            spool.load(SERVER_URL=server.url).retry_failed_uploads()
        assert caplog.messages == []
        assert server.packets() == []
        os.utime(file, ns=(then, then + 1_000_000_000))
        caplog.set_level(logging.INFO)
        spool.load(SERVER_URL=server.url).retry_failed_uploads()
        assert server.packets() == ['{"t": 1}', '{"t": 42}'], caplog.text
    assert spool.names() == ["processed/X.json"]


def test_a_refused_file_changed_but_not_mended_is_told_once(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    spool.drop("X.json", b'[{"t": 1}, 5]')
    module = spool.load()
    module.process_json_file(spool.pending / "X.json")
    caplog.clear()
    (spool.failed / "X.json").write_bytes(b'[{"t": 1}, {"t": 2}, "six"]')
    for _ in range(3):
        module.retry_failed_uploads()
    assert [place(line) for line in refusals(caplog, "X.json") if "byte" in line] == [21], caplog.text


@pytest.mark.parametrize("name", ["no such file.json", "logs"])
def test_what_cannot_be_opened_is_an_os_error(reader: ModuleType, name: str) -> None:
    capture_path(reader).with_name("logs").mkdir(exist_ok=True)
    with pytest.raises(OSError, match=name):
        reader.read_json_file(capture_path(reader).with_name(name))


# ---------------------------------------------------------------- memory

if sys.platform != "win32":  # which has no getrusage
    PEAK = (
        "import resource, subprocess, sys;"
        "code = subprocess.call([sys.executable, *sys.argv[1:]]);"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )

    def peak(spool: Spool, **settings: object) -> int:
        """The most memory (bytes) that `sender.py --once` held; a small process between us and it keeps ours out."""
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(spool.sender_py), "--once"],
            env=spool.environment(**settings),
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        code, figure = map(int, done.stdout.split())
        assert code == 0, done.stderr
        return figure * (1 if sys.platform == "darwin" else 1024)

    @pytest.mark.slow
    @pytest.mark.parametrize("indent", [None, 1], ids=["the sniffer's layout", "indented"])
    def test_a_hundred_times_the_packets_take_no_more_memory(spool: Spool, tmp_path: Path, indent: int | None) -> None:
        one = json.dumps(packet(1, padding="x" * 60), indent=indent).encode()
        with IngestServer(tmp_path / "ingest.sqlite3") as server:
            spool.drop("few.json", b"[" + b", ".join([one] * 1000) + b"]")
            few = peak(spool, SERVER_URL=server.url)
            content = spool.drop("many.json", b"[" + b", ".join([one] * 100_000) + b"]")
            many = peak(spool, SERVER_URL=server.url)
        assert spool.names() == ["processed/few.json", "processed/many.json"]
        assert len(content) > 15_000_000
        assert many - few < 8_000_000, f"{few:,} bytes for 1,000 packets, {many:,} for 100,000"

    PEAK = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


if sys.platform != "win32":

    @pytest.mark.slow
    @pytest.mark.parametrize(("one", "count"), [(b"{}", 2_000_000), (b'{"a":1}', 3_000_000)], ids=["{}", "a letter"])
    def test_millions_of_tiny_packets_take_no_memory_each(spool: Spool, one: bytes, count: int) -> None:
        """A small process between us and the sender keeps our own memory out of its figure."""
        spool.drop("a.json", b"[" + b",".join([one] * count) + b"]")
        with ScriptedServer(lambda request: reply(200)) as server:
            done = subprocess.run(
                [sys.executable, "-c", PEAK, str(spool.sender_py), "--once"],
                env=spool.environment(SERVER_URL=server.url, BATCH_SIZE=count // 20),
                capture_output=True,
                text=True,
                check=True,
            )
        code, peak = map(int, done.stdout.split())
        assert code == 0, done.stderr
        assert len(server.requests) == 20
        assert sum(len(request.body) - 1 for request in server.requests) == (len(one) + 1) * count
        assert peak * (1 if sys.platform == "darwin" else 1024) < 64_000_000
