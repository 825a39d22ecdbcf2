"""How commands ask a running server: plain HTTP, the key from the environment, every refusal as one sentence."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ptuning.cli.options import busy, fail, non_blank

KEY = "PTUNING_API_KEY"
BLOCK = 1 << 20
STARTING_S = 60.0
"""Seconds that a command waits for a server whose parts are starting."""

Say = Callable[[str, int], NoReturn]
"""Reports why there is no answer: a sentence, and an exit code."""
Url = Annotated[str, typer.Option("--url", callback=non_blank, help="The server.")]
LOCAL_URL = "http://127.0.0.1:8000/v1"


def request(
    url: str,
    route: str,
    body: Mapping[str, Any] | None = None,
    say: Say = fail,
    *,
    post: bool = False,
    delete: bool = False,
    patient: bool = False,
) -> dict[str, Any]:
    """What the server responds; `say` reports why it does not. `body`: of a POST; `post`: a POST without one; `patient`: wait
    while the server is starting."""
    data = json.dumps(body).encode() if body is not None else b"" if post else None
    method = "DELETE" if delete else "GET" if data is None else "POST"
    question = urllib.request.Request(f"{url.rstrip('/')}/{route}", data, _headers("application/json"), method=method)
    until = time.monotonic() + (STARTING_S if patient else 0)
    while True:
        try:
            with busy("asking"), urllib.request.urlopen(question, timeout=600) as response:
                return _checked(json.load(response), url, say)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > until:
                say(_complaint(error), 2)
            time.sleep(0.5)
        except (OSError, ValueError) as error:
            _unreachable(url, error, say)


def upload(url: str, path: str, purpose: str, say: Say = fail) -> dict[str, Any]:
    """Send a file, block by block."""
    boundary = uuid.uuid4().hex
    label = Path(path).name.replace('"', "_").encode("ascii", "replace").decode()
    begin = f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
    begin += f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{label}"\r\n\r\n'
    end = f"\r\n--{boundary}--\r\n"
    try:
        size = Path(path).stat().st_size + len(begin) + len(end)
        with Path(path).open("rb") as file:

            def blocks() -> Iterator[bytes]:
                yield begin.encode()
                while block := file.read(BLOCK):
                    yield block
                yield end.encode()

            headers = _headers(f"multipart/form-data; boundary={boundary}") | {"content-length": str(size)}
            question = urllib.request.Request(f"{url.rstrip('/')}/files", blocks(), headers)
            with busy("sending"), urllib.request.urlopen(question, timeout=600) as response:
                return _checked(json.load(response), url, say)
    except urllib.error.HTTPError as error:
        say(f"{path}: {_complaint(error)}", 2)
    except FileNotFoundError:
        say(f"{path}: no such file; correct the path", 2)
    except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError) as error:
        _unreachable(url, error, say)
    except OSError as error:
        say(f"{path}: cannot be read ({error.strerror}); make it readable", 2)


def _headers(kind: str) -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"content-type": kind} | ({"authorization": f"Bearer {key}"} if key else {})


def _checked(answer: Any, url: str, say: Say) -> dict[str, Any]:
    if not isinstance(answer, dict) or not {"id", "object"} & set(answer):
        say(f"{url}: what answers is not a server of ptuning; correct --url", 1)
    return answer


def _unreachable(url: str, error: Exception, say: Say) -> NoReturn:
    say(f"{url}: no server answers ({error}); start one with: ptuning serve EXPERIMENT", 1)


def _complaint(error: urllib.error.HTTPError) -> str:
    try:
        answer: Any = json.load(error)
        return str(answer["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code} {error.reason}"
