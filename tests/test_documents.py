"""`.env.example`, README.md, requirements.txt and sender.py say the same."""

from __future__ import annotations

import ast
import http.client
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SENDER, SETTINGS, Spool

PROJECT = SENDER.parent
DEFAULTS = {  # SPEC section 2
    "SERVER_URL": "http://localhost:8000/ingest",
    "API_TOKEN": "",
    "POLL_INTERVAL": "1",
    "MAX_RETRIES": "3",
    "RETRY_DELAY": "5",
    "BATCH_SIZE": "1000",
    "REQUEST_TIMEOUT": "30",
    "RETRY_FAILED_INTERVAL": "300",
    "COMPRESS": "none",
    "KEEP_PROCESSED_DAYS": "0",
    "LOGS_DIR": "",
    "LOG_LEVEL": "INFO",
}
TREE = ast.parse(SENDER.read_text(encoding="utf-8"))


def readme() -> str:
    return (PROJECT / "README.md").read_text(encoding="utf-8")


def example() -> dict[str, str]:
    """The settings of .env.example, also those that are commented out."""
    lines = (PROJECT / ".env.example").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := re.fullmatch(r"#?\s?([A-Z_]+)=(.*)", line))]
    assert len({match[1] for match in found}) == len(found), "a setting twice"
    return {match[1]: match[2] for match in found}


# ---------------------------------------------------------------- settings


def test_env_example_lists_every_setting_with_its_default() -> None:
    assert example() == DEFAULTS


def test_env_example_gives_each_setting_a_line_of_explanation() -> None:
    lines = (PROJECT / ".env.example").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match("[A-Z_]+=", line):
            assert re.match(r"# \w.{15,}", lines[number - 1]), f"no explanation above {line}"


def test_the_defaults_in_the_code_are_those_of_the_specification(spool: Spool) -> None:
    module = spool.load(RETRY_DELAY="", POLL_INTERVAL="")
    for name, default in DEFAULTS.items():
        value = getattr(module, name)
        if name == "LOGS_DIR":
            assert Path(value) == spool.folder / "logs"
        elif isinstance(value, (int, float)):
            assert value == float(default), name
        else:
            assert (value or "") == default, name


def test_a_copied_env_example_changes_nothing(spool: Spool) -> None:
    without = spool.load(RETRY_DELAY="", POLL_INTERVAL="")
    (spool.folder / ".env").write_bytes((PROJECT / ".env.example").read_bytes())
    copied = spool.load(RETRY_DELAY="", POLL_INTERVAL="")
    assert {name: getattr(copied, name) for name in SETTINGS} == {name: getattr(without, name) for name in SETTINGS}


def test_a_filled_env_example_reaches_every_setting(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = {
        "SERVER_URL": "https://ingest.example:8443/v2?x=1",
        "API_TOKEN": "token",
        "POLL_INTERVAL": "2.5",
        "MAX_RETRIES": "7",
        "RETRY_DELAY": "0.25",
        "BATCH_SIZE": "123",
        "REQUEST_TIMEOUT": "61",
        "RETRY_FAILED_INTERVAL": "17",
        "COMPRESS": "gzip",
        "KEEP_PROCESSED_DAYS": "14",
        "LOGS_DIR": str(spool.folder / "elsewhere"),
        "LOG_LEVEL": "WARNING",
    }
    text = (PROJECT / ".env.example").read_text(encoding="utf-8")
    for name, value in filled.items():
        text = re.sub(rf"(?m)^#?\s?{name}=.*$", lambda _: f"{name}={value}", text)  # noqa: B023
    (spool.folder / ".env").write_text(text, encoding="utf-8")
    nothing_set = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    monkeypatch.setattr(spool, "environment", lambda: nothing_set)
    module = spool.load()
    assert {name: str(getattr(module, name)).removesuffix(".0") for name in SETTINGS} == filled


def test_the_readme_has_a_row_with_the_default_of_every_setting() -> None:
    rows = {match[1]: match[2] for match in re.finditer(r"(?m)^\|\s*`([A-Z_]+)`\s*\|(.*)$", readme())}
    assert sorted(rows) == sorted(DEFAULTS)
    for name, default in DEFAULTS.items():
        cell = rows[name].split("|")[0]
        plain = rf"(?<![\w.]){re.escape(default)}(?![\w.])"
        shown = {"API_TOKEN": r"none|empty|—|-|^\s*$", "LOGS_DIR": "logs"}.get(name, plain)
        assert re.search(shown, cell), f"{name}: the default {default!r} is not in {cell!r}"


def test_sender_has_no_setting_that_the_documents_do_not_know(spool: Spool) -> None:
    strings = {node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    called = {
        argument.value
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call)
        and node.args
        and isinstance(argument := node.args[0], ast.Constant)
        and isinstance(argument.value, str)
        and re.fullmatch("[A-Z]{3,}_?[A-Z_]*", argument.value)
    }
    assert set(DEFAULTS) <= strings
    assert called - set(DEFAULTS) <= {"POST", "GET", "REQUESTS_CA_BUNDLE", "INFO"}


# ---------------------------------------------------------------- requirements


def test_requirements_are_exactly_the_two_packages_with_lower_bounds() -> None:
    lines = [line.partition("#")[0].strip() for line in (PROJECT / "requirements.txt").read_text().splitlines()]
    found = dict(re.split("(?=>=)", line, maxsplit=1) for line in lines if line)
    assert sorted(found) == ["python-dotenv", "requests"]
    assert all(re.fullmatch(r">=\d+(\.\d+)+(,<\d+(\.\d+)*)?", bound) for bound in found.values()), found


# ---------------------------------------------------------------- the manual page


def test_the_state_table_in_the_docstring_names_every_suffix() -> None:
    docstring = ast.get_docstring(TREE) or ""
    values = [value for node in TREE.body if isinstance(node, ast.Assign) for value in ast.walk(node.value)]
    strings = {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)}
    suffixes = {string for string in strings if re.fullmatch(r"(\.[a-z]+)+", string) and "sender" not in string}
    assert {".ready", ".taken", ".state"} <= suffixes
    assert [suffix for suffix in sorted(suffixes) if suffix not in docstring] == []


def test_the_state_table_in_the_docstring_has_a_row_for_each_state_and_a_column_for_each_folder() -> None:
    lines = (ast.get_docstring(TREE) or "").splitlines()
    columns = ("pending_upload/", "failed_uploads/", "processed/", "next step")
    (head,) = (line for line in lines if all(column in line for column in columns))
    rows = lines[lines.index(head) + 1 :]
    for state in ("being written", "ready", "taken", "failed", "done"):
        assert any(re.match(rf"\s*{state}\s\s+.*X\.json", row) for row in rows), state


def test_the_docstring_says_usage_signals_and_exit_status() -> None:
    docstring = ast.get_docstring(TREE) or ""
    for words in ("--once", "--status", "Ctrl-C", "SIGTERM", "[Ee]xit status", r"\.env", "Idempotency-Key"):
        assert re.search(words, docstring), words


# ---------------------------------------------------------------- the README's consoles

LOG_LINE = re.compile(r"(?m)^.*\d\d:\d\d:\d\d,\d{3} - (?:DEBUG|INFO|WARNING|ERROR) - (.*)$")
NOUN = r"(?:[ ](?:files?|packets?|bytes?|failed[ ]uploads?|times?|seconds?|minutes?|hours?|days?|[kMG]?B)\b)?"
VARIABLE = re.compile(  # what a message takes from its occasion, and not from a format string
    rf"""https?://\S+ | \{{.*\}} | "[^"]*" | '[^']*' | (?:\w+/)*[\w.-]*\.(?:json|example|md|py)\S*(?=[\s,;:)]|$)
    | (?<!\w)/[\w./ -]*/[\w.-]+ | [A-Z]:\\\S+ | \d[\d,./%x]*{NOUN} | [*]{{3}} | …""",
    re.VERBOSE,
)


def literals() -> str:
    """All words that sender.py can print: its strings, one a line, their placeholders cut out."""
    texts = [node.value for node in ast.walk(TREE) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [os.strerror(number) for number in range(1, 140)] + list(http.client.responses.values())
    texts += ["Unprocessable Entity", "Unprocessable Content"]  # 422, in an older Python and in a newer one
    return "\n".join(re.sub(r"%[\d.]*[sdg]", "\n", " ".join(text.split(" "))) for text in texts)


def foreign_words(message: str, known: str) -> list[str]:
    """The pieces of a message between its variable parts that stand in no string of sender.py."""
    pieces = [piece.strip(" ,.[]") for piece in re.split(r"[:;()\n] ?", VARIABLE.sub("\n", message))]
    return [piece for piece in pieces if re.search(r"[A-Za-z]{2}", piece) and piece not in known]


def test_the_readme_shows_console_lines_and_each_could_have_been_printed_by_sender() -> None:
    messages = LOG_LINE.findall(readme())
    assert len(messages) >= 10, "the README shows no console"
    known = literals()
    wrong = {message: foreign for message in messages if (foreign := foreign_words(message, known))}
    assert wrong == {}


def test_real_console_lines_pass_the_check_that_the_readme_is_put_to_and_invented_ones_do_not(spool: Spool) -> None:
    spool.drop("packets_20261123_103747.json", [{"a": number} for number in range(2500)])
    spool.drop("packets_20261123_103748.json", "[7]")
    real = LOG_LINE.findall(spool.run("--once", SERVER_URL="http://127.0.0.1:9/ingest").stderr)
    assert len(real) > 6
    known = literals()
    assert {message: foreign for message in real if (foreign := foreign_words(message, known))} == {}
    for invented in ("✓ a.json was shipped (3 packets)", "Uploading 3 files", "a.json: Cannot reach server http://x/"):
        assert foreign_words(invented, known), invented


def test_the_readme_names_what_a_newcomer_needs() -> None:
    for name in ("sender.py", "requirements.txt", ".env.example", "tests/requirements.txt", "tests/demo.py"):
        assert name in readme()
        assert (PROJECT / name).exists()


@pytest.mark.parametrize(
    "block", re.findall(r"(?s)```python\n(.*?)```", readme()), ids=lambda block: block.split("\n")[0]
)
def test_each_python_block_of_the_readme_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_the_readme_has_a_python_block_for_the_producer_that_hands_a_whole_file_over(tmp_path: Path) -> None:
    """Run as printed but for the folder, three calls within a second: all captures are there, each with its marker."""
    block = next(block for block in re.findall(r"(?s)```python\n(.*?)```", readme()) if "hand_over" in block)
    call = "hand_over([{'a': 1}]); hand_over([{'a': 2}])"
    assert "/opt/sender/logs" in block
    script = f"{block}\n{call}".replace("/opt/sender", str(tmp_path))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    names = sorted(path.name for path in (tmp_path / "logs/pending_upload").iterdir())
    assert len(names) == 6
    assert [name + ".ready" for name in names[::2]] == names[1::2]


def test_the_inline_metadata_names_what_requirements_txt_names() -> None:
    """PEP 723: uv run sender.py and pipx run sender.py need no environment made by hand."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SENDER.read_text(encoding="utf-8"))
    named = set(re.findall(r'"([a-z][^"]+)"', block.split("dependencies")[1]))
    lines = (PROJECT / "requirements.txt").read_text().split()
    assert named == set(lines)
    assert 'requires-python = ">=3.9"' in block
