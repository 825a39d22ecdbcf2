"""Clients that people use, in their newest versions, against a real server. The rest is run by `tests/clients/run.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "clients"))

from run import CLIENTS, HERE, PAGE, page, run, served  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with served(tmp_path_factory.mktemp("clients")) as world:
        yield world


@pytest.mark.nightly
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, client in CLIENTS.items() if client.quick])
def test_a_client_works(world: SimpleNamespace, name: str) -> None:
    assert run(name, world, REPOSITORY / "build" / "clients")["ran"]


@pytest.mark.fast
def test_the_page_is_what_the_script_writes() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][
        1:
    ]
    assert page([(title, version, ran) for title, version, ran in rows]) == PAGE.read_text(encoding="utf-8")
    assert {title for title, *_ in rows} <= {client.title for client in CLIENTS.values()}
    assert {client.script for client in CLIENTS.values()} | {"run.py", "server.py"} == {
        Path(each).name for each in HERE.iterdir() if each.suffix in (".py", ".mjs")
    }
