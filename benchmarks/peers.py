"""
Other libraries at the same work, side by side with callbackq and with a bare urllib3 loop.

    python benchmarks/peers.py [--callbacks 2000] [--rounds 5] [--quick]

huey with several processes on SQLite, pgqueuer and procrastinate with two on PostgreSQL, callbackq with two on both:
the same POSTs of 1 KiB to the same receiver, every outcome recorded, as durable. How each is configured stands in its
script, `peer_huey.py` and so on; of a few settings each is given the one that is quickest here. Then come rounds, each
between two of the loop. pip installs them into an environment that is removed afterwards.

Writes its figures into the pages, but not with --quick, which only shows that all works.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from sqlite3 import connect as connect_sqlite
from typing import TYPE_CHECKING, Final

import psycopg
import publish
import runs
from attrs import evolve, field, frozen
from drain import LONGEST_SECONDS, POLL_SECONDS, RAW, drained, fill, raw
from figures import Figure, figure_of, show
from receiver import receiver

import stores

if TYPE_CHECKING:
    from support.postgres import PostgreSQLServer

PACKAGES: Final = [
    "aiohttp",
    "huey",
    "pgqueuer[asyncpg]",
    "procrastinate",
    "psycopg[binary,pool]",
    "urllib3>=2.8,<3",
    "uvloop",
]

HERE = Path(__file__).parent


@frozen
class Peer:
    """
    Attributes:
        processes: that we start; 0 where one starts as many as the setting says.
        settings: what to try.
        setting: how people call what is tried.
        is_left: whether some are not yet begun or not yet recorded, as far as a quick statement can tell.
        delivered: how many are recorded as delivered.
        target: how many times as fast we want to be.
    """

    name: str
    store: str
    processes: int
    settings: tuple[int, ...]
    setting: str
    is_left: str
    delivered: str
    target: float | None = None

    @property
    def script(self) -> str:
        return str(HERE / f"peer_{self.name}.py")


PEERS: Final = [
    Peer(
        "huey",
        "sqlite",
        processes=0,
        settings=(2, 4, 8),
        setting="processes",
        is_left="SELECT EXISTS (SELECT * FROM task)",
        delivered="SELECT count(*) FROM kv",
    ),
    Peer(
        "pgqueuer",
        "postgres",
        processes=2,
        settings=(10, 50, 200),
        setting="a batch",
        is_left="SELECT EXISTS (SELECT FROM pgqueuer)",
        delivered="SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'",
        target=1.8,
    ),
    Peer(
        "procrastinate",
        "postgres",
        processes=2,
        settings=(10, 30, 100),
        setting="at a time",
        is_left="SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))",
        delivered="SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'",
    ),
]


@frozen
class Place:
    """Where to run: the receiver, the peers' Python, and room for files and databases."""

    url: str
    python: str
    folder: Path
    server: PostgreSQLServer
    names: Iterator[int] = field(factory=count)

    def make(self, store: str) -> str:
        """Give a new file or the conninfo of a new database."""
        if store == "sqlite":
            return str(self.folder / f"{next(self.names)}.db")
        return self.server.conninfo(self.server.create_database())


def run_peer(place: Place, peer: Peer, setting: int, number: int) -> float:
    """Let a peer deliver so many, and say how many seconds that took."""
    where = place.make(peer.store)
    subprocess.run([place.python, peer.script, "fill", where, str(number)], check=True, timeout=LONGEST_SECONDS)
    with ExitStack() as stack:
        command = [place.python, peer.script, "work", where, place.url, str(setting)]
        workers = [stack.enter_context(worker(command)) for _ in range(peer.processes or 1)]
        ask = stack.enter_context(asking(peer.store, where))
        for one in workers:
            assert one.stdout
            assert one.stdout.readline() == b"ready\n"
        began = time.perf_counter()
        for one in workers:
            assert one.stdin
            one.stdin.write(b"\n")
            one.stdin.flush()
        while ask(peer.is_left) or ask(peer.delivered) != number:
            assert time.perf_counter() - began < LONGEST_SECONDS, f"{peer.name} doesn't come to an end"
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - began


@contextmanager
def worker(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that ends, with all those it starts, when we close its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as process:
        yield process


@contextmanager
def asking(store: str, where: str) -> Iterator[Callable[[str], int]]:
    """Give what asks a question of SQL that a number answers."""
    if store == "sqlite":
        with closing(connect_sqlite(where, timeout=60)) as file:
            yield lambda question: int(next(file.execute(question))[0])
    else:
        with psycopg.connect(where, autocommit=True) as session:
            yield lambda question: int(next(session.execute(question))[0])


def run_callbackq(place: Place, store: str, number: int) -> float:
    """Let two dispatchers deliver so many."""
    where = place.make(store)
    ground = stores.Ground(Path(where).parent if store == "sqlite" else where)
    make_store = ground.maker(Path(where).stem if store == "sqlite" else "callbackq")
    fill(make_store, place.url, number, queues=0)
    return drained(make_store, processes=2)[0]


def best_setting(place: Place, peer: Peer, number: int) -> int:
    """Try each setting twice, in turns, and give the quickest."""
    took: dict[int, list[float]] = {setting: [] for setting in peer.settings}
    for _ in range(2):
        for setting, seconds in took.items():
            seconds.append(run_peer(place, peer, setting, number))
    tried = ", ".join(f"{number / min(took[one]):,.0f}/s with {one} {peer.setting}" for one in took)
    print(f"{peer.name}: {tried}", flush=True)
    return min(took, key=lambda setting: min(took[setting]))


def measure(place: Place, number: int, rounds: int) -> list[Figure]:
    """Run all in turns, each beside the bare loop."""
    settings = {peer: best_setting(place, peer, number) for peer in PEERS}
    contenders: dict[str, Callable[[], float]] = {
        f"callbackq, {stores.NAMES[store]}, 2 processes": partial(run_callbackq, place, store, number)
        for store in ("sqlite", "postgres")
    }
    for peer, setting in settings.items():
        version = version_of(peer, place.python)
        name = f"{peer.name} {version}, {stores.NAMES[peer.store]}, {peer.processes or setting} processes"
        contenders[name] = partial(run_peer, place, peer, setting, number)
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        before, _ = raw(place.url, number)
        for name, run in contenders.items():
            seconds = run()
            after, _ = raw(place.url, number)
            ratios[name].append((before + after) / 2 / seconds)
            before = after
            print(f"{name}: {ratios[name][-1]:.2f} x raw", flush=True)
    found = [figure_of(rounds_of, name, "x raw", baseline=RAW) for name, rounds_of in ratios.items()]
    on_sqlite, on_postgres, *theirs = ratios.values()
    for peer, rounds_of in zip(PEERS, theirs, strict=True):
        ours = on_sqlite if peer.store == "sqlite" else on_postgres
        relative = [own / other for own, other in zip(ours, rounds_of, strict=True)]
        name = f"relative to {peer.name}, {stores.NAMES[peer.store]}"
        found.append(figure_of(relative, name, f"x {peer.name}", target=peer.target, baseline=peer.name))
    return found


def version_of(peer: Peer, python: str) -> str:
    code = f"from importlib.metadata import version; print(version({peer.name!r}))"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return told.stdout.strip()


def install(folder: Path) -> str:
    """Install the peers into an environment, unless they are there, and give its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True, timeout=600)
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--environment", type=Path, help="a folder for the peers that is kept, for the next time")
    options = parser.parse_args()
    logging.disable()
    beginning = runs.begin()
    print(f"{beginning.machine}\nload {beginning.load:.1f}", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="callbackq-peers-")))
        python = install(options.environment or folder / "environment")
        ground = stack.enter_context(stores.ground(argparse.Namespace(store="postgres", conninfo=None)))
        assert ground.server
        place = Place(stack.enter_context(receiver()), python, folder, ground.server)
        figures = measure(place, *((50, 1) if options.quick else (options.callbacks, options.rounds)))
    show(figures)
    if not options.quick:
        results = runs.load(publish.ROOT / publish.JSON)
        publish.write(evolve(results, peers=beginning.run([runs.rounded(figure) for figure in figures])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
