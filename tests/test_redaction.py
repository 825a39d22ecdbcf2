"""What is written of texts that hold passwords and paths: the functions alone. `test_secrets` sees where they are used."""

from __future__ import annotations

import ast
import logging
from typing import Any

import pytest
from conftest import REPOSITORY

from ptuning.redaction import first_line, logger, placeless, redact, redacted

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://***@host:5000/x"),
        ("postgresql://u:p%40ss@db/mlflow", "postgresql://***@db/mlflow"),
        ("postgresql+psycopg2://u:12/ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("see http://u:p@ss@h/ and mail a@b", "see http://***@h/ and mail a@b"),
        ("mysql://h/db?password=abc&x=1", "mysql://h/db?password=***&x=1"),
        ("sqlite:////data/me@home/mlflow.db", "sqlite:////data/me@home/mlflow.db"),
        ("s3://bucket/me@home/runs", "s3://bucket/me@home/runs"),
        ("s3://AKIA:a/b+c@bucket/runs", "s3://***@bucket/runs"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://h/x?X-Amz-Credential=a&X-Amz-Signature=b&v=1", "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***&v=1"),
        ("https://h/x?sig=a&st=b", "https://h/x?sig=***&st=b"),
        ("'http://u:it's@h', next", "'http://***@h', next"),
        ('{"uri": "http://a", "mail": "b@c"}', '{"uri": "http://a", "mail": "b@c"}'),
    ],
)
def test_passwords_in_addresses(text: str, shown: str) -> None:
    assert redact(text) == shown == redact(shown)
    assert redacted({"a": [text, 1, None, {"b": (text,)}]}) == {"a": [shown, 1, None, {"b": [shown]}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/runs/x: made for width 4", "x: made for width 4"),
        ("made for ~/models/llama (weights 12), use it", "made for llama (weights 12), use it"),
        ("'/a/b/c d' is not", "'c d' is not"),
        ("MLflow (sqlite:////data/mlflow.db) has gone", "MLflow (***) has gone"),
        ("at http://mlflow:5000/x?y", "at ***"),
        ("s3://bucket/runs/x is", "*** is"),
        ("use /v1/completions, or org/model and a/b", "use /v1/completions, or org/model and a/b"),
    ],
)
def test_places_are_left_out(text: str, shown: str) -> None:
    assert placeless(text) == shown


def test_what_is_logged_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    log = logger("ptuning.redaction.test")
    assert logger("ptuning.redaction.test") is log and len(log.filters) == 1
    with caplog.at_level(logging.DEBUG):
        log.warning("asked %s", "http://me:hunter2@host")
        try:
            raise ConnectionError("no answer from postgresql://me:hunter2@host/db")
        except ConnectionError:
            log.exception("failed")
    assert "hunter2" not in caplog.text and "asked http://***@host" in caplog.text
    assert "ConnectionError: no answer from postgresql://***@host/db" in caplog.text and "Traceback" in caplog.text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ptuning").glob("*.py")), ids=lambda path: path.stem)
def test_every_module_logs_through_it(path: Any) -> None:
    """A logger of its own would write tracebacks and addresses as they are."""
    calls = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)}
    assert "logging.getLogger(__name__)" not in calls


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  not   here;\nmore"), "not here"),
        (OSError("http://me:secret@host is gone."), "http://***@host is gone"),
        (ValueError("x" * 300), "x" * 200),
        (KeyError(), "KeyError"),
    ],
    ids=["one line", "redacted", "short", "without words"],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
