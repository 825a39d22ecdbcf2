"""Makes the pictures of the page (`docs/guides/page.md`) in a headless Chromium, from a server that trains and answers: some
minutes. The pictures are light and dark."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.browser import Page, browser  # type: ignore[import-not-found]  # noqa: E402  # of the tests

PICTURES = REPOSITORY / "docs" / "pictures"
ROWS = REPOSITORY / "ptuning" / "builtin" / "tasks" / "sentiment" / "train.jsonl"
MANY = 400
"""Rows of a job: enough for curves."""
PORT = 8765
TEXT = "The staff was friendly, but the soup was cold and far too salty."
KINDS = {"light": False, "dark": True}


def train(page: Page, rows: Path, epochs: int) -> None:
    """A job from its rows to its result, through the page."""
    page.click("#tab-jobs")
    page.wait("document.getElementById('start').value")
    page.choose_file("#rows", rows)
    page.type("#suffix", "sentiment")
    page.type("#epochs", str(epochs))
    page.type("#input", "Review: {text} Sentiment:")
    page.type("#target", " {label}")
    before = page.run("document.querySelectorAll('#job-rows tr').length")
    page.click("#job-form button.main")
    page.wait(f"document.querySelectorAll('#job-rows tr').length > {before}")
    page.wait("['succeeded', 'failed'].includes(document.querySelector('#job-rows td').innerText)", 900)


def ask(page: Page) -> None:
    """One text, and the answers side by side."""
    listed = "document.querySelector('#choices input[value=\"sentiment:2\"]') !== null"
    while not page.run(listed):  # the replica finds a new version at its next look
        page.click("#tab-try")
        time.sleep(1)
    page.run("[...document.querySelectorAll('#choices input')].filter(box => box.checked).forEach(box => box.click())")
    for name in ("builtin", "sentiment:1", "sentiment:2"):
        page.click(f'#choices input[value="{name}"]')
    page.type("#text", TEXT)
    page.type("#front", "Is this review Positive or Negative?")
    page.click("#ask-form button.main")
    page.wait("document.querySelectorAll('#answers .facts').length === 4")
    page.wait("[...document.querySelectorAll('#answers .facts')].every(each => each.innerText.includes('tokens read'))")
    page.wait("document.querySelectorAll('#answers meter').length === 4")


def look(page: Page) -> None:
    """The champion and where it comes from."""
    page.click("#tab-prompts")
    page.type("#filter", "sentiment:")
    page.click('[aria-label="Promote sentiment:1"]')
    page.wait("document.getElementById('said').innerText")
    page.click('[aria-label="Details of sentiment:1"]')
    page.wait("document.querySelector('#details h3') !== null")
    page.run("window.scrollTo(0, 0)")


def answer(page: Page, folder: Path) -> None:
    """A table and its answers."""
    texts = [json.loads(line)["text"] for line in ROWS.read_text(encoding="utf-8").splitlines()[:40]]
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "review"], *([number, text] for number, text in enumerate(texts, 1))])
    page.click("#tab-batch")
    page.choose_file("#table", folder / "reviews.csv")
    page.wait("document.querySelectorAll('#preview tbody tr').length > 3")
    page.type("#batch-model", "sentiment")
    page.click("#batch-form button.main")
    page.wait("!document.getElementById('download').hidden", 300)


def main() -> None:
    """Serve, use the page, and take a picture of each view."""
    with tempfile.TemporaryDirectory(prefix="ptuning-page-") as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "ptuning", "serve", str(REPOSITORY / "jobs" / "sentiment.toml"), f"serve.port={PORT}"]
        command += [f"compute.storage={folder / 'runs'}", "tuning.workers=1", "serve.cpus_per_replica=0.5"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            while b"serving at" not in (folder / "log").read_bytes():
                if server.poll() is not None:
                    sys.exit((folder / "log").read_text())
                time.sleep(0.2)
            with browser(folder) as page:
                page.open(f"http://127.0.0.1:{PORT}/")
                rows = folder / "reviews.jsonl"
                rows.write_text("".join(ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:MANY]), encoding="utf-8")
                for epochs in (2, 4):
                    train(page, rows, epochs)
                picture(page, "jobs", 1000)
                page.open(f"http://127.0.0.1:{PORT}/?again")
                ask(page)
                picture(page, "try")
                look(page)
                picture(page, "prompts")
                answer(page, folder)
                picture(page, "batch")
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)


def picture(page: Page, name: str, most: int = 900) -> None:
    """Of one view, light and dark."""
    for kind, dark in KINDS.items():
        page.picture(PICTURES / f"page-{name}-{kind}.png", dark, most=most)


if __name__ == "__main__":
    main()
