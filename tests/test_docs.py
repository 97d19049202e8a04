"""What a reader copies, runs or follows works: snippets, commands, links, examples, the built pages."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import re
import socket
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path
from types import ModuleType
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

import pytest

import callbackq
from callbackq.core.addresses import SPECIAL_NETWORKS, Network, special_block
from callbackq.core.lifecycle import TABLE
from callbackq.core.models import CallbackState
from support.pages import DOCS, PAGES, ROOT, Block, Command, blocks_of, matches, name_of

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TUTORIAL = DOCS / "tutorial.md"
NOT_RUN = 2
"""Blocks that can't run: each would need a web server of others, or wait for a signal. Keep it small."""


@pytest.fixture
def give_what_it_needs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Give a page or an example that names a DATABASE_URL one, with a real database behind it."""

    def give(source: Path) -> None:
        if "DATABASE_URL" in source.read_text(encoding="utf-8"):
            conninfo = request.getfixturevalue("postgres").conninfo(request.getfixturevalue("database"))
            monkeypatch.setenv("DATABASE_URL", url_of(conninfo))

    return give


# Snippets.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
# A snippet is no program: what it leaves open is collected here.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_snippets_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, give_what_it_needs: Callable[[Path], None]
) -> None:
    give_what_it_needs(page)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    printed = ""
    for block in blocks_of(page):
        if block.kind == "python" and not block.caption:
            printed = run(block, page, namespace)
        elif block.kind == "output":
            assert matches(block.text, printed), f"{name_of(page)}:{block.line}: it prints\n{printed}"
        elif page == TUTORIAL:
            continue  # needs a second terminal, below
        elif block.caption:
            (tmp_path / block.caption).write_text(block.text, encoding="utf-8")
        elif block.kind == "console":
            for command, expected in commands_in(block.text):
                do(command, expected, tmp_path)
    namespace.clear()
    gc.collect()


def url_of(conninfo: str) -> str:
    """Write a conninfo as the URL that psycopg, SQLAlchemy and everybody else understands."""
    from psycopg.conninfo import conninfo_to_dict

    parameters = {name: str(value) for name, value in conninfo_to_dict(conninfo).items()}
    return f"postgresql:///{parameters.pop('dbname')}?{urlencode(parameters, quote_via=quote)}"


def run(block: Block, page: Path, namespace: dict[str, object]) -> str:
    # Empty lines in front, so that a traceback shows the line in the page.
    code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    return output.getvalue()


def test_hardly_any_snippet_is_left_unrun() -> None:
    kinds = Counter(block.kind for page in PAGES for block in blocks_of(page))

    assert kinds["python no-run"] == NOT_RUN
    assert kinds["python"] > 20 * NOT_RUN


def test_every_block_says_what_it_is() -> None:
    known = {"python", "python no-run", "output", "console", "console stays", "sh", "text", "sql", "toml"}
    strange = [
        f"{name_of(page)}:{block.line}: {block.kind!r}"
        for page in PAGES
        for block in blocks_of(page)
        if block.kind not in known and not block.kind.startswith("{")
    ]

    assert strange == []


# The tutorial, as a reader does it.


def test_tutorial_goes_as_it_says(tmp_path: Path) -> None:
    port = str(a_free_port())
    with contextlib.ExitStack() as terminals:
        other_terminal: Command | None = None
        for block in blocks_of(TUTORIAL):
            text = block.text.replace("8000", port)
            if block.caption:
                (tmp_path / block.caption).write_text(text, encoding="utf-8")
            elif block.kind == "console stays":
                command, expected = next(commands_in(text))
                other_terminal = Command(command, tmp_path)
                terminals.callback(other_terminal.kill)
                assert_prints(other_terminal, expected)
            elif block.kind == "console" and not text.startswith("$"):
                assert other_terminal is not None
                assert_prints(other_terminal, text.splitlines())
            elif block.kind == "console":
                for command, expected in commands_in(text):
                    do(command, expected, tmp_path, other_terminal)


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Give each command with the lines it prints."""
    for entry in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *lines = entry.rstrip("\n").split("\n")
        yield command, lines


def do(command: str, expected: list[str], folder: Path, other_terminal: Command | None = None) -> None:
    running = Command(command, folder)
    try:
        is_killed = expected[-1:] == ["^\\Quit"]
        assert_prints(running, expected[:-1] if is_killed else expected)
        if is_killed:
            # The reader presses the key when a request has arrived.
            assert other_terminal is not None
            other_terminal.wait_for_line()
            running.press_ctrl_backslash()
        assert running.next_line() is None, f"{command} prints more than the page says"
        assert (running.end() == 0) is not is_killed
    finally:
        running.kill()


def assert_prints(command: Command, expected: list[str]) -> None:
    for line in expected:
        printed = command.next_line()
        assert printed is not None, f"it ends before it prints {line}"
        assert matches(line, printed), f"it prints {printed}\ninstead of {line}"


def a_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Commands.


def test_commands_of_callbackq_exist() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    commands = set(re.findall(r"python -m callbackq ([a-z][\w-]*)", text))
    assert "demo" in commands

    for command in commands:
        help_text = subprocess.run(
            [sys.executable, "-m", "callbackq", command, "--help"], capture_output=True, text=True, timeout=30
        )
        assert help_text.returncode == 0, help_text.stderr


def test_files_that_pages_name_exist() -> None:
    named = {
        (name_of(page), name)
        for page in PAGES
        for name in re.findall(r"`((?:examples|docs|tests|benchmarks|src)/[\w./-]+)`", page.read_text(encoding="utf-8"))
    }
    assert named

    assert sorted(entry for entry in named if not path_of(entry[1]).exists()) == []


def path_of(name: str) -> Path:
    # The package may be an installed wheel, without its source beside the tests.
    package = Path(callbackq.__file__).parent
    return package.joinpath(*Path(name).parts[2:]) if name.startswith("src/callbackq/") else ROOT / name


# Links. (Those between the pages in docs/ are checked again by Sphinx, with their anchors.)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    relative = [link for link in links if not re.match(r"https?://", link)]

    assert [link for link in relative if not (page.parent / link).exists()] == []


def test_every_page_is_reached_from_the_readme_and_the_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    howtos = {name_of(page) for page in PAGES if page.parent.name == "howto"}

    assert {page for page in howtos if f"({page})" not in readme} == set()


# Examples.


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_and_end_by_themselves(
    example: Path, tmp_path: Path, give_what_it_needs: Callable[[Path], None]
) -> None:
    give_what_it_needs(example)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=40
    )

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    for promise in PRINTED.get(example.name, []):
        assert promise in done.stdout


PRINTED = {
    "quickstart.py": [
        "receiver: order-1042, number 2, attempt 1: paid -> 503",
        "record:   order-1042, number 2: succeeded after 503, 200",
        "record:   order-1042, number 3: succeeded after 200",
    ],
    "wsgi_app.py": [
        "shop: stored order-1042-placed, waiting",
        "warehouse: callback order-1042-placed",
        "shop: succeeded",
    ],
    "own_transaction.py": [
        "shop: order 1043 failed",
        "shop: orders [1042, 1044]",
        "warehouse: ['order-1042-placed', 'order-1044-placed']",
    ],
    "two_machines_postgres.py": ["all 8 queues complete: True, in order: True"],
    "two_machines.py": ["all 8 queues complete: True, in order: True"],
    "receiver_verify.py": [
        "a, number 1: 200 accepted",
        "b, number 2: 200 duplicate, dropped",
        "z, number 1: 200 stale copy, dropped",
        "c, number 3: 401 not signed with our secret",
    ],
}


# The built pages.


@pytest.fixture(scope="module")
def lifecycle() -> ModuleType:
    pytest.importorskip("docutils", reason="the documentation's packages are not installed")
    path = DOCS / "_ext" / "lifecycle.py"
    spec = importlib.util.spec_from_file_location("docs_lifecycle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edges_in(svg: str) -> Counter[tuple[str, str, str]]:
    """Give what a picture shows: (state, event, next state)."""
    names = "{http://www.w3.org/2000/svg}"
    return Counter(
        (edge.attrib["data-from"], text.text or "", edge.attrib["data-to"])
        for edge in ElementTree.fromstring(svg).iter(f"{names}g")
        if edge.attrib["class"] == "edge"
        for text in edge.iter(f"{names}text")
    )


def test_lifecycle_picture_shows_the_table_and_nothing_else(lifecycle: ModuleType) -> None:
    expected = Counter((state.name, event.value, following.name) for (state, event), following in TABLE.items())

    assert edges_in(lifecycle.draw(TABLE)) == expected


def test_lifecycle_picture_follows_the_table(lifecycle: ModuleType) -> None:
    changed = {**TABLE, (CallbackState.SUCCEEDED, lifecycle.Event.REDELIVERY_REQUESTED): CallbackState.WAITING}

    assert edges_in(lifecycle.draw(changed))["SUCCEEDED", "redeliver", "WAITING"] == 1


def test_lifecycle_picture_keeps_words_and_boxes_apart(lifecycle: ModuleType) -> None:
    names = "{http://www.w3.org/2000/svg}"
    svg = ElementTree.fromstring(lifecycle.draw(TABLE))
    words = [
        (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in svg.iter(f"{names}text")
        if text.attrib.get("class") == "event"
    ]
    boxes = lifecycle.PLACES.values()

    assert all(0 < x < lifecycle.WIDTH and 0 < y < lifecycle.HEIGHT for x, y in words)
    assert len(set(words)) == len(words)
    assert not [
        (x, y)
        for x, y in words
        for box_x, box_y in boxes
        if abs(x - box_x) < lifecycle.BOX_WIDTH / 2 and abs(y - box_y) < lifecycle.BOX_HEIGHT / 2
    ]


@pytest.mark.thorough
@pytest.mark.timeout(200)
def test_pages_build_without_a_warning_and_document_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the documentation's packages are not installed")

    options = ["-q", "-n", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "html")]
    build = subprocess.run(command, capture_output=True, text=True, timeout=170)

    assert build.returncode == 0, build.stderr
    documented = documented_in(tmp_path / "html" / "objects.inv")
    public = {f"callbackq.{name}" for name in callbackq.__all__}
    errors = {f"callbackq.{name}" for name in callbackq.__all__ if name.endswith("Error")}
    assert public - errors - documented == set()
    assert {name.replace("callbackq.", "callbackq.errors.") for name in errors} - documented == set()


def documented_in(inventory: Path) -> set[str]:
    """Read the names out of Sphinx's list of everything documented: four lines of head, then a zlib stream."""
    *_, body = inventory.read_bytes().split(b"\n", 4)
    return {line.split(" ", 1)[0] for line in zlib.decompress(body).decode().splitlines()}


# What a proxy must not let through.


def blocks_for_squid() -> list[Network]:
    text = (DOCS / "howto" / "send-through-a-proxy.md").read_text(encoding="utf-8")
    rules = re.findall(r"^acl internal dst (.+)$", text, re.MULTILINE)
    return [ip_network(block) for rule in rules for block in rule.split()]


def lies_in(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def test_squid_is_told_to_deny_every_block_of_the_table() -> None:
    denied = blocks_for_squid()

    assert [block for block in SPECIAL_NETWORKS if not any(lies_in(block, one) for one in denied)] == []


def test_squid_is_told_to_deny_all_of_ipv6_that_is_not_public_but_not_the_form_of_its_ipv4_addresses() -> None:
    denied = [block for block in blocks_for_squid() if block.version == 6]
    first_groups = [ip_network(f"{group:x}::/16") for group in range(1, 0x10000) if not 0x2000 <= group < 0x4000]

    # The first group of all is denied in parts.
    assert [one for one in first_groups[::7] if not any(lies_in(one, block) for block in denied)] == []
    assert not any(block.overlaps(ip_network("::ffff:0:0/96")) for block in denied)  # type: ignore[arg-type]


def test_squid_is_told_to_deny_nothing_that_is_public() -> None:
    for block in blocks_for_squid():
        for address in (block[0], block[-1], block[block.num_addresses // 2]):
            assert special_block(address) is not None, block
