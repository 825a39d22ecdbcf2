"""What a replica serves while its registry comes and goes, vanishes, or is damaged: its `Service` alone, without Ray."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from serving_world import until
from test_http_api import fill_storage, settings
from test_tracking import free_port, server

from ptuning.config import parse_experiment
from ptuning.registry.promotions import PromotionLog
from ptuning.registry.registry import Registry
from ptuning.serving.auth import read_keys
from ptuning.serving.service import Service

pytestmark = [
    pytest.mark.slow,
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def base(endless_base: Path) -> Path:
    return endless_base


def test_a_registry_that_comes_and_goes(tmp_path, base):
    """Absent at start, there, killed, back: what is served stays, and a promotion arrives when it can."""
    port = free_port()
    fill_storage(tmp_path / "runs", base)
    # The server takes over the database that was filled here, artifacts where they are.
    home = tmp_path / "server"
    home.mkdir()
    shutil.copy(tmp_path / "runs" / "mlflow.db", home / "server.db")
    tables = settings(tmp_path / "elsewhere", base, refresh_s=0.2, cache_mb=16)
    tables |= {"tracking": {"uri": f"http://127.0.0.1:{port}"}}
    began = time.monotonic()
    service = Service(parse_experiment(tables), read_keys(None), "one")
    try:
        print(f"started without a registry in {time.monotonic() - began:.1f} s")
        assert service.ready and set(service.models.names) == {"endless"}
        with server(home, port):
            published = {name for each in ("fruits", "writer", "pair", "raw") for name in (each, f"{each}:1")} | {"fruits:2"}
            back = until(lambda: published <= set(service.models.names), 40, "it does not find what is published")
            print(f"the registry came: served after {back:.1f} s")
        first = dict(service.models.names)
        time.sleep(1)
        assert service.alive and dict(service.models.names) == first, "what is served stays"
        with server(home, port) as uri:
            ledger = PromotionLog(Registry(uri), "fruits")
            ledger.promote(2, ledger.state())
            until(lambda: service.models.find("fruits").id == "fruits:2", 40, "a promotion does not arrive")
    finally:
        service.close()


def test_a_database_that_vanishes_takes_nothing_along(tmp_path, base, caplog):
    """A file system that is not mounted any more looks like a registry without any entry."""
    fill_storage(tmp_path / "runs", base)
    tables = parse_experiment(settings(tmp_path / "runs", base, cache_mb=16))
    service = Service(tables, {}, "one")
    database = tmp_path / "runs" / "mlflow.db"
    try:
        assert service.models.find("fruits").id == "fruits:1"
        database.rename(tmp_path / "away")
        service._look()
        assert service.models.find("fruits").id == "fruits:1" and "no longer exists; restore it" in caplog.text
    finally:
        service.close()
    again = Service(tables, {}, "two")
    try:
        assert again.models.find("fruits").id == "fruits:1" and not database.exists()
        (tmp_path / "away").rename(database)
        again._look()
        assert again.models.find("fruits").id == "fruits:1"
    finally:
        again.close()


DAMAGED = [b"", b"{", b"[]", b'{"versions": [{"x": 1}], "champions": {}}', b'{"versions": 3}', b"\xff"]


def test_a_damaged_memory_of_the_last_set_is_said_and_not_fatal(tmp_path, base, caplog):
    (folder := tmp_path / "runs").mkdir()
    tables = settings(folder, base, cache_mb=16) | {"tracking": {"uri": "http://127.0.0.1:9"}}  # nothing listens there
    known = Service(parse_experiment(tables), {}, "one")
    known.close()
    path = Path(known.models._folder) / "served.json"
    path.parent.mkdir(parents=True)
    for number, content in enumerate(DAMAGED):
        path.write_bytes(content)
        service = Service(parse_experiment(tables), {}, f"{number}")
        try:
            assert service.ready and set(service.models.names) == {"endless"}
            assert "served.json is damaged, nothing in it is served" in caplog.text, content
        finally:
            service.close()
        caplog.clear()


def test_a_disk_that_takes_nothing_is_no_reason_not_to_serve(tmp_path, base, caplog):
    fill_storage(tmp_path / "runs", base)
    (tmp_path / "runs" / "served").write_text("a file where the folder would be")
    service = Service(parse_experiment(settings(tmp_path / "runs", base, cache_mb=16)), {}, "one")
    try:
        assert service.models.find("fruits").id == "fruits:1"
        assert "served.json could not be written" in caplog.text and "could not be updated" not in caplog.text
    finally:
        service.close()
