"""Surroundings in which nothing can work: each entry point says so in one sentence, at the start, with exit code 2.

One catalogue is given to every command and to the Python API. Nothing here starts Ray.
"""

from __future__ import annotations

import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from test_tracking import client, free_port, new_database
from typer.testing import CliRunner

import ptuning
from ptuning import storage
from ptuning.cli.app import app
from ptuning.cluster.surroundings import SOCKET, check_cluster, check_port
from ptuning.config import parse_experiment
from ptuning.errors import TrackingError, UserError
from ptuning.tracking import client as tracking_client
from ptuning.tracking.client import default_uri, experiment_name, named_uri, obeyed
from ptuning.tracking.database import _newest, _schemas, check_database

pytestmark = [pytest.mark.fast, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SECONDS = 30.0
"""What a refusal may take on a busy machine, imports included. Today's are milliseconds after the imports."""


@contextmanager
def listening(answer: bytes = b"") -> Iterator[int]:
    """A port that is taken, by a program that is not Ray."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                # What was sent is read first: a socket closed with unread bytes resets the connection, and the answer is lost.
                if answer:
                    connection.recv(65536)
                    connection.sendall(answer)
                connection.close()

        Thread(target=serve, daemon=True).start()
        yield port


@dataclass(frozen=True)
class World:
    """What a case may change before a command runs."""

    tables: dict[str, Any]
    folder: Path
    store: Path
    setenv: Callable[[str, str], None]
    enter: Callable[[Any], Any]


def stale(world: World) -> None:
    world.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")


def stale_setting(world: World) -> None:
    world.tables["compute"]["address"] = f"ray://127.0.0.1:{free_port()}"


def not_ray(world: World) -> None:
    world.setenv("RAY_ADDRESS", f"127.0.0.1:{world.enter(listening(b'-ERR unknown command'))}")


def dashboard(world: World) -> None:
    world.tables["compute"]["address"] = "http://127.0.0.1:8265"


def nobody_started(world: World) -> None:
    world.setenv("RAY_TMPDIR", str(world.folder / "t"))
    world.setenv("RAY_ADDRESS", "auto")


def long_folder(world: World) -> None:
    world.setenv("TMPDIR", f"/tmp/{'x' * 84}")


def no_folder(world: World) -> None:
    world.setenv("RAY_TMPDIR", "/proc/1")


def taken(world: World) -> None:
    world.tables["serve"] = {"port": world.enter(listening())}


def elsewhere(world: World) -> None:
    world.tables["serve"] = {"host": "192.0.2.1", "port": 8000}
    world.setenv("PTUNING_API_KEYS", "0123456789abcdef0123456789abcdef")


def unset_variable(world: World) -> None:
    world.tables["compute"]["storage"] = ""


def storage_is_a_file(world: World) -> None:
    shutil.rmtree(world.store, ignore_errors=True)
    world.store.write_text("")


def not_a_database(world: World) -> None:
    (world.store / "mlflow.db").write_text("no database" * 1000)


def another_database(world: World) -> None:
    (world.store / "mlflow.db").unlink()
    with closing(sqlite3.connect(world.store / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE cars (name TEXT)")


def older(world: World) -> None:
    with closing(sqlite3.connect(world.store / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", (_schemas()[_newest(_schemas())],))


def newer(world: World) -> None:
    with closing(sqlite3.connect(world.store / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


def locked(world: World) -> None:
    other = world.enter(closing(sqlite3.connect(world.store / "mlflow.db", isolation_level=None)))
    other.execute("BEGIN EXCLUSIVE")


def deleted(world: World) -> None:
    world.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    mine = client(default_uri(world.store))
    mine.delete_experiment(mine.create_experiment("gone"))


def folder_of_files(world: World) -> None:
    world.setenv("MLFLOW_TRACKING_URI", str(world.folder / "mlruns"))


RUNS, SERVE, STORE, DOCTOR, API = ("train", "search"), ("serve",), ("prompts",), ("doctor",), ("api",)
CATALOGUE: list[tuple[Callable[[World], None], tuple[str, ...], str]] = [
    (
        stale,
        (*RUNS, *SERVE, *API),
        r"RAY_ADDRESS: no response from 127\.0\.0\.1:\d+ \(connection refused\); unset it, or",
    ),
    (stale_setting, (*RUNS, *SERVE, *API), r"compute\.address: no response from ray://127.* \(connection refused\); start the"),
    (
        not_ray,
        (*RUNS, *SERVE, *API),
        r"RAY_ADDRESS: what answers at 127\.0\.0\.1:\d+ is not a Ray cluster; correct the",
    ),
    (
        dashboard,
        (*RUNS, *SERVE),
        r"compute\.address: http://.* is the address of a dashboard; send the command there",
    ),
    (nobody_started, (*RUNS, *SERVE), r"RAY_ADDRESS: no cluster is running on this machine; start one with: ray start --head"),
    (
        long_folder,
        (*RUNS, *SERVE, *API),
        r"TMPDIR: /tmp/x+ is \d+ characters too long for .* sockets; set RAY_TMPDIR",
    ),
    (
        no_folder,
        (*RUNS, *SERVE),
        r"RAY_TMPDIR: Ray cannot write to /proc/1 \(.*\); set RAY_TMPDIR to a folder",
    ),
    (
        taken,
        SERVE,
        r"serve\.port: \d+ is taken by another program on 127\.0\.0\.1; end it, or choose another port",
    ),
    (elsewhere, SERVE, r"serve\.host: 192\.0\.2\.1 is not an address of this machine; use 127\.0\.0\.1 or 0\.0\.0\.0"),
    (unset_variable, (*RUNS, *SERVE, "plan", "submit", *DOCTOR), r"compute\.storage: is empty \(an unset shell variable\?\)"),
    (storage_is_a_file, RUNS, r"compute\.storage: .*runs cannot be written \(.*runs is a file\); choose another folder"),
    (
        not_a_database,
        (*RUNS, *STORE, *DOCTOR, *API),
        r"mlflow\.db: is not an SQLite database of MLflow \(file is",
    ),
    (
        another_database,
        (*RUNS, *STORE),
        r"mlflow\.db: is not an SQLite database of MLflow \(it has no table alembic",
    ),
    (
        older,
        (*RUNS, *STORE, *DOCTOR),
        r"written by an older MLflow; make a copy of it, then upgrade it with: mlflow db",
    ),
    (
        newer,
        (*RUNS, *STORE, *DOCTOR),
        r"written by a newer MLflow than the one that is installed here; install the same",
    ),
    (locked, ("train", *STORE), r"mlflow\.db: is locked by another program; end that program"),
    (
        deleted,
        (*RUNS, *DOCTOR, *API),
        r"experiment 'gone' was deleted; restore it with: .* --experiment-id \d",
    ),
    (
        folder_of_files,
        (*RUNS, *SERVE, *STORE, *DOCTOR),
        r"MLFLOW_TRACKING_URI: .*mlruns is a folder of files, to which",
    ),
]


def command(entry: str, case: Callable[[World], None], world: World, file: Path) -> list[str]:
    listing = ["prompts", "list", *([] if case is folder_of_files else ["--storage", str(world.store)])]
    submit = ["submit", "train", str(file), "--address", "http://127.0.0.1:9", "--dry-run"]
    return {"prompts": listing, "submit": submit}.get(entry, [entry, str(file)])


@pytest.mark.parametrize(
    ("case", "entry", "sentence"),
    [(case, entry, sentence) for case, entries, sentence in CATALOGUE for entry in entries],
    ids=[f"{entry}-{case.__name__}" for case, entries, _ in CATALOGUE for entry in entries],
)
def test_every_entry_point_says_it_at_the_start(
    case: Callable[[World], None],
    entry: str,
    sentence: str,
    toy_task: SimpleNamespace,
    write_toml: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    stack = ExitStack()
    request.addfinalizer(stack.close)
    store = Path(toy_task.experiment["compute"]["storage"])
    store.mkdir()
    new_database(store)
    world = World(toy_task.experiment, toy_task.folder, store, monkeypatch.setenv, stack.enter_context)
    case(world)
    monkeypatch.setattr("ptuning.tracking.database.PATIENCE", 0.3)
    before = sorted(path for path in toy_task.folder.parent.rglob("*") if path.is_dir())
    began = time.monotonic()
    if entry == "api":
        with pytest.raises(UserError) as refused:
            if case is not_a_database:
                ptuning.Registry(str(store)).list()
            else:
                ptuning.train(parse_experiment(world.tables), progress=False)
        said = str(refused.value)
    else:
        done = CliRunner().invoke(app, command(entry, case, world, write_toml(world.tables)))
        finding = entry == "doctor" and case not in (unset_variable, folder_of_files)
        assert done.exit_code == (1 if finding else 2), (done.output, done.exception)
        said = done.output
        assert "Traceback" not in said
    assert re.search(sentence, " ".join(said.split())), said
    assert time.monotonic() - began < SECONDS
    assert sorted(path for path in toy_task.folder.parent.rglob("*") if path.is_dir()) == before, "nothing is written"


def test_ray_is_asked_for_nothing_when_it_can_run() -> None:
    check_cluster(None)
    check_cluster("local")
    check_port("127.0.0.1", 0)
    check_port("127.0.0.1", free_port())
    check_port("localhost", free_port())


def test_the_longest_folder_that_ray_can_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The limit is the system's: of a path with the length of Ray's, a socket can be bound or cannot."""
    room = 107 - len(SOCKET) - 1
    for length, fits in ((room, True), (room + 1, False)):
        folder = Path("/tmp") / ("p" * (length - len("/tmp/")))
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        try:
            if fits:
                check_cluster(None)
            else:
                with pytest.raises(UserError, match="is 1 characters too long"):
                    check_cluster(None)
            (folder / SOCKET).parent.mkdir(parents=True)
            with closing(socket.socket(socket.AF_UNIX)) as listener:
                if fits:
                    listener.bind(str(folder / SOCKET))
                else:
                    with pytest.raises(OSError, match="too long"):
                        listener.bind(str(folder / SOCKET))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_full_disk_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    storage.check_writable(str(tmp_path / "new"))
    monkeypatch.setattr(storage, "LEAST", shutil.disk_usage(tmp_path).total + 1)
    with pytest.raises(UserError, match=r"cannot be written \(its disk has \d+ MB free\); choose another folder"):
        storage.check_writable(str(tmp_path / "new"))


def test_a_database_as_mlflow_makes_it_is_accepted(tmp_path: Path) -> None:
    """The migrations of the installed MLflow form one chain, whose end is what it writes into a new database."""
    new_database(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        ((version,),) = database.execute("SELECT version_num FROM alembic_version")
    assert version == _newest(_schemas()) and len(_schemas()) > 40
    check_database(tmp_path / "mlflow.db", write=True)
    with closing(sqlite3.connect(f"file:{tmp_path}/mlflow.db?mode=ro", uri=True)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT 1 FROM experiments").fetchall()
        check_database(tmp_path / "mlflow.db", write=True)  # readers do not matter


def test_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    new_database(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
    shutil.rmtree(tmp_path / "mlflow.db-wal", ignore_errors=True)
    (tmp_path / "mlflow.db-wal").mkdir()  # SQLite cannot open its log
    with pytest.raises(TrackingError, match=r"mlflow\.db: cannot be written; correct its permissions"):
        check_database(tmp_path / "mlflow.db", write=True)


@pytest.mark.parametrize(
    ("written", "variable", "address"),
    [
        (None, "", None),
        (None, "http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("http://a:1", "http://b:2", "http://a:1"),
        (None, "sqlite:///here.db", "sqlite:///{cwd}/here.db"),
        ("sqlite:////x/y.db", "", "sqlite:////x/y.db"),
        ("postgresql://u:p@h/d", "", "postgresql://u:p@h/d"),
        (None, "databricks", "databricks"),
    ],
)
def test_mlflows_variable_is_obeyed_unless_the_experiment_says_otherwise(
    written: str | None,
    variable: str,
    address: str | None,
    toy_task: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from ptuning.cluster.local_paths import absolute

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    expected = address and address.format(cwd=tmp_path)
    assert named_uri(written) == expected
    experiment = parse_experiment(toy_task.experiment | {"tracking": {"uri": written} if written else {}})
    assert absolute(experiment).tracking.uri == expected and absolute(experiment).tracking.experiment == "theirs"
    assert tracking_client.tracking_uri(experiment) == expected or default_uri(experiment.compute.storage)
    said = obeyed(experiment)
    assert said is not None and ("MLFLOW_TRACKING_URI=" in said) == bool(variable and not written)
    own = parse_experiment(toy_task.experiment | {"tracking": {"uri": "http://a:1", "experiment": "mine"}})
    assert experiment_name(own) == "mine" and obeyed(own) is None


def test_a_password_in_mlflows_variable_is_not_shown(toy_task: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    experiment = parse_experiment(toy_task.experiment)
    said = obeyed(experiment)
    assert said is not None and "hunter2" not in said and "127.0.0.1:9" in said
    done = CliRunner().invoke(app, ["prompts", "list"])
    assert done.exit_code == 2 and "hunter2" not in done.output and "does not respond" in done.output
    assert "hunter2" not in repr(ptuning.Registry())


def test_a_deleted_experiment_in_a_database_that_is_named_directly(toy_task: SimpleNamespace, tmp_path: Path) -> None:
    """As postgresql://..., which is asked by the same library."""
    with closing(sqlite3.connect(tmp_path / "server.db")) as database:
        database.execute("CREATE TABLE experiments (experiment_id, name, lifecycle_stage)")
        database.executemany("INSERT INTO experiments VALUES (?, ?, ?)", [(3, "ptuning", "deleted"), (4, "other", "active")])
        database.commit()
    for uri, name, deleted in (
        (f"sqlite+pysqlite:///{tmp_path}/server.db", "ptuning", True),
        (f"sqlite+pysqlite:///{tmp_path}/server.db", "other", False),
        (f"sqlite+pysqlite:///{tmp_path}/new.db", "ptuning", False),
        ("postgresql+psycopg2://me:hunter2@127.0.0.1:9/mlflow", "ptuning", False),
    ):
        experiment = parse_experiment(toy_task.experiment | {"tracking": {"uri": uri, "experiment": name}})
        if deleted:
            with pytest.raises(UserError, match="'ptuning' was deleted; restore it with: .* --experiment-id 3, or choose"):
                tracking_client.check_tracking(experiment)
        else:
            tracking_client.check_tracking(experiment)


def test_a_deleted_experiment_on_a_server(monkeypatch: pytest.MonkeyPatch, toy_task: SimpleNamespace) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}'
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        tables = toy_task.experiment | {"tracking": {"uri": f"http://127.0.0.1:{server.server_port}"}}
        with pytest.raises(UserError, match="'ptuning' was deleted; restore it with: .* --experiment-id 7, or choose"):
            tracking_client.check_tracking(parse_experiment(tables))
        server.shutdown()
    tracking_client.check_tracking(parse_experiment(tables))  # a server that does not respond does not stop a run


def test_loopback_is_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.request import getproxies, proxy_bypass

    from ptuning import environment

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with listening(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 5\r\nconnection: close\r\n\r\nproxy") as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
        monkeypatch.setenv("no_proxy", "internal.example")
        environment.apply("command")
        assert getproxies()["http"] and not proxy_bypass("example.org") and proxy_bypass("internal.example")
        assert all(proxy_bypass(host) for host in ("127.0.0.1", "localhost"))
        done = CliRunner().invoke(app, ["ask", "x", "y", "--url", f"http://127.0.0.1:{free_port()}/v1"])
        assert done.exit_code == 1 and "Connection refused" in done.output and "502" not in done.output


def test_what_is_not_our_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}") as port:
        done = CliRunner().invoke(app, ["ask", "x", "y", "--url", f"http://127.0.0.1:{port}/v1"])
    assert done.exit_code == 1 and "what answers is not a server of ptuning; correct --url" in done.output
