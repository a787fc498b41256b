"""The playground's files, and its page in Chromium where the server has keys or falls silent."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import DESKTOP, NOTHING, PHONE, Page, chromium
from fake_engine import FakeEngine, adapter_bytes, folder_loader, served, wait_until
from fastapi import FastAPI
from selenium.webdriver.common.keys import Keys
from sites import BASIS, CONFIG, Site

from lorasb_runtime.adapters.names import parse_name
from lorasb_server.app import create_app
from lorasb_server.playground.routes import PAGE


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.resize(DESKTOP)
    return browser


def key_of(site: Site, who: str) -> str:
    return str(site.api[who].headers["authorization"]).removeprefix("Bearer ")


def use_key(page: Page, key: str) -> None:
    page.fill("#key-field", key)
    page.leave(lambda: page.press(Keys.ENTER))


def test_the_files_are_open_and_let_nothing_else_in(site: Site) -> None:
    for path in PAGE:
        answer = httpx.get(f"{site.url}{path}")
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        named = set(re.findall(r"""["(](?:\./)?([\w/]+\.(?:css|js|svg))[")]""", answer.text))
        assert {f"/playground/{name.removeprefix('playground/')}" for name in named} <= set(PAGE)
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert httpx.head(site.url).status_code == 200
    assert httpx.get(f"{site.url}/playground/routes.py").status_code == 401
    assert not [path for path in site.app.openapi()["paths"] if path in PAGE]


def test_a_key_is_asked_for_and_kept_in_its_tab(site: Site, page: Page) -> None:
    site.put("acme", "alice").raise_for_status()
    page.open(site.url)
    assert "API key" in page.text("#trouble") and page.focused == "key-field"
    use_key(page, "lsb-wrong")
    page.wait_for(lambda: page.text("#live-note") == "The server's figures need an API key.")
    refused = httpx.get(f"{site.url}/v1/models", headers={"Authorization": "Bearer lsb-wrong"})
    assert refused.json()["error"]["message"] in page.text("#trouble")

    use_key(page, key_of(site, "acme-reads"))
    page.wait_for(lambda: page.picked == ["pico", "alice"])
    assert not page.text("#trouble") and not page.find("#key").is_displayed()
    page.ask("hello")
    assert all(page.answers().values())
    page.wait_for(lambda: "need a key with role admin" in page.text("#live-note"))
    page.wait_for(lambda: page.text("#live-running") == "0" and page.text("#live-slots") == NOTHING)
    page.reload()
    assert page.picked == ["pico", "alice"]
    assert page.run("return Object.keys(localStorage).length + document.cookie.length") == 0


def test_what_a_role_may_not_do_is_explained(site: Site, page: Page, tmp_path: Path) -> None:
    file = tmp_path / "bob.safetensors"
    file.write_bytes(adapter_bytes(BASIS, 1.0))

    def publish() -> None:
        page.find("#upload-file").send_keys(str(file))
        page.find("#upload-name").send_keys(Keys.ENTER)
        page.wait_for(lambda: page.text("#upload-result"))

    page.open(site.url)
    use_key(page, key_of(site, "acme-reads"))
    publish()
    said = page.text("#upload-result")
    assert "role: found 'infer', expected 'publish'" in said and "403 · permission_error" in said
    page.find("#key-button").click()
    use_key(page, key_of(site, "root"))
    page.wait_for(lambda: page.text("#live-slots") == "none" and not page.text("#live-note"))
    publish()
    assert "bob is published" in page.text("#upload-result")
    assert site.listed("root") == ["bob"]
    page.find("#key-button").click()
    page.leave(page.find("#key-forget").click)
    assert "401 · authentication_error" in page.text("#trouble")


def test_escape_stops_all_answers_and_frees_their_sequences(
    site: Site, engine: FakeEngine, page: Page
) -> None:
    site.put("root", "alice").raise_for_status()
    site.put("root", "bob", 2.0).raise_for_status()
    engine.pace = 0.25  # ten seconds for an answer
    page.open(site.url)
    use_key(page, key_of(site, "root"))
    page.wait_for(lambda: len(page.picked) == 3)
    question = page.find("#question")
    for stop in (lambda: question.send_keys(Keys.ESCAPE), page.find("#stop").click):
        question.send_keys(Keys.ENTER)
        page.find("#blend-slider").send_keys(Keys.ARROW_RIGHT)
        page.wait_for(lambda: page.state("#blend-answer") == "streaming")
        page.wait_for(lambda: all(page.answers().values()))
        assert engine.open == 4
        stop()
        page.settle()
        assert {page.state("#answers"), page.state("#blend-answer")} == {"stopped"}
        assert page.text("#answers .cost").startswith("stopped")
        assert not page.find("#stop").is_enabled()
        wait_until(lambda: engine.open == 0)
    assert engine.finished == 0 and engine.aborted == len(engine.requests) >= 8


def test_errors_are_shown_as_the_server_words_them(engine: FakeEngine, page: Page) -> None:
    with served(create_app(engine, None, CONFIG)) as url:
        page.open(url)
        page.add("<b>nobody</b>")
        page.ask("hello", 100_000)
        assert page.answers()["pico"].startswith(
            "This model's maximum context length is 256 tokens"
        )
        assert "400 · invalid_request_error · context_length_exceeded" in page.answers()["pico"]
        page.ask("hello", 24)
        nobody = page.answers()["<b>nobody</b>"]
        assert "The model '<b>nobody</b>' does not exist" in nobody
        assert "404 · not_found_error · model_not_found · field model" in nobody
        assert not page.all("b")


def test_what_is_touched_on_a_phone_is_large_enough(engine: FakeEngine, page: Page) -> None:
    with served(create_app(engine, None, CONFIG)) as url:
        page.open(url)
        page.resize(PHONE)
        page.find("#key-button").click()
        page.find("summary").click()
        assert page.run("return matchMedia('(pointer: coarse)').matches")
        touched = page.all("button, input, textarea, summary")
        sizes = {e.get_attribute("outerHTML"): e.size for e in touched if e.is_displayed()}
        assert len(sizes) > 12
        small = {html: size for html, size in sizes.items() if min(size.values()) < 44}
        assert not small


def test_a_model_s_text_is_text(
    engine: FakeEngine, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "<img src=x onerror=alert(1)>\n<b>é</b> &amp; "
    monkeypatch.setattr(engine, "says", lambda request, index: said)
    with served(create_app(engine, None, CONFIG)) as url:
        page.open(url)
        page.ask("hello")
        assert page.answers() == {"pico": said}
        assert not page.all("#answers img, #answers b")
        engine.error, engine.fail_after = RuntimeError("no"), 3
        page.ask("hello")
        assert page.answers()["pico"] == said[:3] + "internal error" + "server_error"
        page.find("#upload-file").send_keys(__file__)
        page.fill("#upload-name", "alice")
        page.find("#upload-name").send_keys(Keys.ENTER)
        page.wait_for(lambda: "this server has no basis" in page.text("#upload-result"))
    page.ask("hello")  # the server is gone
    assert page.answers()["pico"].startswith("The server does not answer")


def test_more_adapters_than_are_listed_and_a_root_path(
    engine: FakeEngine, page: Page, tmp_path: Path
) -> None:
    loader = folder_loader(tmp_path, BASIS)
    data = adapter_bytes(BASIS, 1.0)
    for number in range(120):
        loader.publish(parse_name(f"user-{number:04}"), data)
    outer = FastAPI()
    outer.mount("/deep/path", create_app(engine, loader, CONFIG))
    with served(outer) as url:
        page.open(f"{url}/deep/path/")
        assert page.picked == ["pico", "user-0000", "user-0001"]
        field = page.find("#add input")
        field.click()
        page.wait_for(lambda: len(page.all("[role=option]")) == 50)
        assert "68 more" in page.text("#add .more")
        field.send_keys("0119")
        assert [option.text for option in page.all("[role=option]")] == ["user-0119"]
        field.send_keys(Keys.ENTER)
        page.ask("hello")
        answers: Any = page.answers()
        assert list(answers) == ["pico", "user-0000", "user-0001", "user-0119"]
        assert answers["user-0119"] == answers["user-0000"] != answers["pico"]
