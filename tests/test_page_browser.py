"""The page in a headless browser, against a real server: `ptuning serve` with a tuning group, keys and a runner of batches."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import toml, toy_rows
from serving_world import Command
from support.browser import PROGRAM, Page, browser
from test_http_api import ADMIN, KEY, fill_storage, settings
from test_interventions import begun, listening
from test_tracking import free_port

from ptuning.config import parse_experiment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no browser here"),
    # MLflow 3.17 uses SQLAlchemy's noload, deprecated in 2.1 (store/tracking/sqlalchemy_store.py).
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("browser")
    registry = fill_storage(folder / "runs", tiny_base_folder)
    (folder / "keys").write_text(f"{KEY}\n{ADMIN} admin\n", encoding="utf-8")
    tables = settings(
        folder / "runs", tiny_base_folder, refresh_s=0.5, cache_mb=16, cpus_per_replica=0.5, keys=str(folder / "keys")
    )
    tables |= {"tuning": {"workers": 1, "slots": 2, "trials": 1}, "train": {"steps": 20, "evaluate_every": 5, "batch_size": 8}}
    (folder / "toy.toml").write_text(toml(tables), encoding="utf-8")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(64, 0)), encoding="utf-8")
    command = Command(folder / "toy.toml", free_port(), folder)
    try:
        command.wait("serving at")
        yield SimpleNamespace(url=command.url.removesuffix("/v1"), registry=registry, folder=folder, rows=rows)
    finally:
        command.stop()
        print(command.said)


@pytest.fixture(scope="module")
def window(world: SimpleNamespace) -> Iterator[Page]:
    with browser(world.folder) as page:
        yield page


@pytest.fixture
def page(world: SimpleNamespace, window: Page) -> Iterator[Page]:
    """The page, with an administrator's key. Afterwards no script has failed, and nothing was asked of another server."""
    window.errors.clear()
    window.open(f"{world.url}/?{time.monotonic_ns()}")
    window.type("#key", ADMIN)
    window.click("#key-form button")
    window.wait("document.querySelectorAll('#choices input').length > 3")
    yield window
    assert not window.errors
    assert all(url.startswith((world.url, "blob:", "about:")) for url in window.requested)


def view(page: Page, name: str) -> None:
    page.click(f"#tab-{name}")
    assert not page.run(f"document.getElementById('{name}').hidden")


def labelled(label: str) -> str:
    return f'[aria-label="{label}"]'


def test_the_key_is_asked_for_and_stays_in_the_tab(world: SimpleNamespace, window: Page) -> None:
    window.open(world.url)
    window.run("sessionStorage.clear()")
    window.open(f"{world.url}/?again")
    assert "API key is missing or unknown" in window.wait("document.getElementById('said').innerText")
    window.type("#key", KEY)
    window.click("#key-form button")
    window.wait("document.querySelectorAll('#choices input').length > 3")
    assert window.run("localStorage.length") == 0 and window.run("document.cookie") == ""
    assert window.run("sessionStorage.length") == 1 and KEY not in window.run("location.href")


def test_answers_side_by_side(page: Page) -> None:
    """The base, a text prompt and two versions: their texts, and the probabilities of the labels as bars."""
    page.run("[...document.querySelectorAll('#choices input')].filter(box => box.checked).forEach(box => box.click())")
    view(page, "prompts")
    page.run("document.querySelector('#choices').replaceChildren()")
    view(page, "try")  # the list is made again: nothing is chosen for who chose nobody
    page.wait("document.querySelectorAll('#choices input').length > 3")
    assert page.run("document.querySelectorAll('#choices input:checked').length") == 0
    for name in ("tiny-llama", "fruits:1", "fruits:2"):
        page.click(f'#choices input[value="{name}"]')
    page.type("#text", "the old hammer")
    page.type("#front", "Say the kind of a thing.")
    page.click("#ask-form button.main")
    page.wait("document.querySelectorAll('#answers .facts').length === 4")
    page.wait("[...document.querySelectorAll('#answers .facts')].every(each => each.innerText.includes('tokens read'))")
    page.wait("document.querySelectorAll('#answers meter').length === 4")
    titles = page.run("[...document.querySelectorAll('#answers h3')].map(each => each.innerText)")
    assert titles == ["tiny-llama (the base)", "fruits:1", "fruits:2", "the base with the text prompt"]
    facts = page.run("[...document.querySelectorAll('#answers .facts')].map(each => each.innerText)")
    assert "ms" in facts[1] and "12 virtual" in facts[1] and "cached" in facts[1] and "virtual" not in facts[0]
    shares = page.run("[...document.querySelectorAll('#answers .card:nth-child(2) meter')].map(each => each.value)")
    assert sum(shares) == pytest.approx(1, abs=1e-3) and shares[0] >= shares[1]
    assert page.run("document.querySelectorAll('#answers .answer')[1].innerText") in ("fruit", "tool")


def test_a_prompt_is_looked_at_promoted_and_rolled_back(page: Page) -> None:
    view(page, "prompts")
    page.wait("document.querySelectorAll('#versions tr').length > 4")
    page.type("#filter", "fruits")
    assert page.run("[...document.querySelectorAll('#versions tr')].map(row => row.children[1].innerText)") == ["fruits", ""]
    page.click(labelled("Details of fruits:2"))
    page.wait("document.querySelector('#details h3')?.innerText === 'fruits:2'")
    assert page.run("document.querySelectorAll('#details .words').length") == 12
    page.click(labelled("Promote fruits:2"))  # it has no metric on the champion's rows, so the checks refuse it
    assert "no metric on the same rows" in page.wait("document.getElementById('said').innerText")
    page.type("#filter", "writer")
    page.click(labelled("Promote writer:1"))
    assert page.wait("document.getElementById('said').innerText") == "writer:1 is the champion"
    page.click(labelled("Roll back writer"))
    assert "no earlier champion" in page.wait(
        "(text => text.includes('earlier') ? text : '')(document.getElementById('said').innerText)"
    )


def test_a_job_from_its_rows_to_a_checkpoint_that_answers(page: Page, world: SimpleNamespace) -> None:
    view(page, "jobs")
    page.wait("document.getElementById('start').value")
    page.choose_file("#rows", world.rows)
    page.type("#suffix", "kinds")
    page.type("#input", "Text: {text}\nKind:")
    page.run("document.getElementById('input').value = 'Text: {text} Kind:'")
    page.type("#target", " {label}")
    page.click("#job-form button.main")
    page.wait("document.querySelectorAll('#job-rows tr').length === 1")
    page.wait("document.querySelector('#job-rows td').innerText === 'succeeded'", 300)
    page.wait("document.querySelectorAll('#job .chart polyline').length === 2")
    assert page.run("document.querySelector('#job .chart').getAttribute('aria-label')").count(" at step ") == 2
    assert page.run("document.querySelectorAll('#job details tbody tr').length") >= 4
    assert page.run("document.querySelector('#job-rows tr').children[2].innerText") == "kinds:1"
    page.click('#job [aria-label*="ckpt-step"]')
    page.wait("!document.getElementById('try').hidden && document.querySelectorAll('#choices input:checked').length === 1")
    page.type("#text", "the old hammer")
    page.click("#ask-form button.main")
    page.wait("document.querySelector('#answers .answer')?.innerText")
    page.wait("document.querySelectorAll('#answers meter').length >= 2")


def test_a_job_is_paused_resumed_and_cancelled(page: Page, world: SimpleNamespace) -> None:
    view(page, "jobs")
    page.wait("document.getElementById('start').value")
    page.choose_file("#rows", world.rows)
    page.type("#epochs", "50")
    page.run("document.getElementById('input').value = 'Text: {text} Kind:'")
    page.type("#target", " {label}")
    page.click("#job-form button.main")
    job = page.wait("document.querySelector('#job h3')?.innerText")
    for action, state in (("Pause", "paused"), ("Resume", "running"), ("Cancel", "cancelled")):
        page.click(labelled(f"{action} {job}"))
        wanted = f"['{state}', 'queued']" if state == "running" else f"['{state}']"
        page.wait(f"{wanted}.includes(document.querySelector('#job-rows tr td').innerText)", 120)


def test_a_search_is_followed_and_told(page: Page, world: SimpleNamespace, toy_task: SimpleNamespace) -> None:
    """Its driver is the real one's listener, in this process."""
    storage = world.folder / "runs"
    tables = parse_experiment(toy_task.experiment | {"name": "found"}).model_dump(mode="json")
    store = begun(storage, tables)
    withdrawn: list[str] = []
    listener = listening(storage, tables, store, withdrawn)
    listener.start()
    try:
        view(page, "jobs")
        page.wait("!document.getElementById('searches').hidden")
        page.click(labelled("Follow found"))
        page.wait("document.querySelectorAll('#trials tr').length === 2 && !!document.querySelector('#search-curves polyline')")
        page.click(labelled("Clone t000"))
        page.wait("document.activeElement.id === 'clone-changes'")
        page.type("#clone-changes", "train.learning_rate")
        page.click("#clone-form button")
        assert "is not a change; write key=value" in page.wait("document.getElementById('said').innerText")
        page.type("#clone-changes", "train.learning_rate=0.5")
        page.click("#clone-form button")
        page.wait("document.querySelectorAll('#trials tr').length === 3", 20)
        assert "learning_rate 0.5" in page.run("document.querySelectorAll('#trials tr')[2].innerText")
        page.type("#more", "2")
        page.click("#extend-form button")
        page.click(labelled("Stop t000"))
        page.wait("document.querySelector('#told').innerText.includes('t000 is stopped at step 10')", 20)
        page.wait("document.querySelector('#told').innerText.includes('2 more trials')")
        page.wait("document.querySelectorAll('#trials tr')[0].children[1].innerText === 'stopped'")
    finally:
        listener.stop()
    assert withdrawn == ["t000"]


def test_a_table_comes_back_with_answers(page: Page, world: SimpleNamespace) -> None:
    rows = [["id", "text"], ["1", "the old hammer"], ["2", 'a "ripe", plum'], ["3", "two\nlines"]]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    path = world.folder / "things.csv"
    path.write_text(out.getvalue(), encoding="utf-8", newline="")
    view(page, "batch")
    page.choose_file("#table", path)
    page.wait("document.querySelectorAll('#preview tbody tr').length === 3")
    assert page.run("document.getElementById('column').selectedOptions[0].innerText") == "text"
    page.type("#batch-model", "fruits:1")
    page.click("#batch-form button.main")
    page.wait("!document.getElementById('download').hidden", 120)
    assert page.text("#batch-state") == "completed: 3 rows, 0 of them with an error"
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(world.folder))
    page.click("#download")
    answered = world.folder / "things-answered.csv"
    until = time.monotonic() + 20
    while not answered.exists():
        assert time.monotonic() < until
        time.sleep(0.1)
    found = list(csv.reader(io.StringIO(answered.read_bytes().decode(), newline="")))
    assert found[0] == ["id", "text", "answer"] and [row[:2] for row in found[1:]] == rows[1:]
    assert {row[2] for row in found[1:]} <= {"fruit", "tool"}


def test_the_page_is_usable_by_keyboard_and_screen_reader(page: Page) -> None:
    page.run("document.getElementById('tab-try').focus()")
    for key, chosen in (
        ("ArrowRight", "prompts"),
        ("End", "batch"),
        ("ArrowRight", "try"),
        ("ArrowLeft", "batch"),
        ("Home", "try"),
    ):
        page.press(key)
        assert page.run("document.activeElement.id") == f"tab-{chosen}"
        assert page.run(
            "[...document.querySelectorAll('main > section')].filter(each => !each.hidden).map(each => each.id)"
        ) == [chosen]
    for tab in ("try", "prompts", "jobs", "batch"):
        view(page, tab)
        for role, name in page.spoken():
            if role in ("button", "textbox", "checkbox", "combobox", "tab", "searchbox", "meter", "progressbar", "img", "link"):
                assert name, f"{role} in {tab} has no name"
    for scheme in ("light", "dark"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector in ("body", "button.main", "[role=tab][aria-selected=true]", ".hint"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)


def contrast(page: Page, selector: str) -> float:
    """Contrast of text and background by WCAG 2.2."""
    script = f"""(element => {{
        const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
        const back = each => numbers(getComputedStyle(each).backgroundColor);
        let behind = element;
        while (back(behind)[3] === 0 && behind.parentElement) behind = behind.parentElement;
        return [numbers(getComputedStyle(element).color), back(behind)];
    }})(document.querySelector({json.dumps(selector)}))"""
    one, two = (
        sum(part * (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4) for part, value in zip(
            (0.2126, 0.7152, 0.0722), (each / 255 for each in colour[:3]), strict=True))
        for colour in page.run(script)
    )  # fmt: skip
    return (max(one, two) + 0.05) / (min(one, two) + 0.05)
