"""The playground in Chromium, on a server process with the pico model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bases import random_adapter, random_basis
from browser import DESKTOP, NOTHING, PHONE, SECONDS, Page, chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import serving

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.storage.adapter_file import Adapter, save_adapter
from lorasb_runtime.storage.basis_file import Basis, save_basis

QUESTION = "Tell me about the sea."
TOKENS = 24
ANN_VERSION = ".answer:nth-child(2) .version"
LONG_NAME = "a-name-as-long-as-names-can-be-" + "x" * 33  # 64 characters


@pytest.fixture(scope="module")
def basis(pico: Path) -> Basis:
    return random_basis(pico)


@pytest.fixture(scope="module")
def work(basis: Basis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the adapters ann, bob and cat, and their files."""
    folder = tmp_path_factory.mktemp("playground")
    save_basis(basis, folder / "basis.safetensors")
    store = AdapterStore(str(folder / "store"))
    for seed, name in enumerate(("ann", "bob", "cat")):
        file = folder / f"{name}.safetensors"
        save_adapter(random_adapter(basis, seed), file)
        store.publish(parse_name(name), file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def url(pico: Path, work: Path) -> Iterator[str]:
    words = ("--basis", work / "basis.safetensors", "--adapters", work / "store")
    with serving(work / "serve.log", pico, *words, "--dtype", "float32") as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page, url: str) -> Iterator[Page]:
    """Just opened; in the end the browser may have nothing to complain about."""
    browser.resize(DESKTOP)
    browser.open(url)
    browser.complaints()
    yield browser
    assert browser.complaints() == []


def says(url: str, model: str, adapter: Any = None, tokens: int = TOKENS) -> str:
    """What the API answers to the question, greedily."""
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    if adapter is not None:
        body["adapter"] = adapter
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=SECONDS)
    return str(answer.json()["choices"][0]["message"]["content"])


def blend(url: str, weight: float) -> str:
    parts = [{"name": "ann", "weight": 1 - weight}, {"name": "bob", "weight": weight}]
    return says(url, "pico", parts)


def version(url: str, name: str) -> str:
    return str(httpx.get(f"{url}/v1/adapters/{name}").json()["version"])


def test_the_page_loads_everything_from_the_server_itself(page: Page, url: str) -> None:
    assert page.text("#model") == "pico" and page.browser.title == "lorasb playground"
    assert page.picked == ["pico", "ann", "bob"]
    assert page.answers() == dict.fromkeys(page.picked, "")
    page.wait_for(lambda: page.text(ANN_VERSION) == version(url, "ann")[:7])
    loaded = page.run("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert len(loaded) > 10 and all(name.startswith(url) for name in loaded)


def test_models_are_asked_side_by_side(page: Page, url: str) -> None:
    page.ask(QUESTION, TOKENS)
    expected = {name: says(url, name) for name in ("pico", "ann", "bob")}
    assert page.answers() == expected and len(set(expected.values())) == 3
    assert page.text("#answers .cost").startswith(f"{TOKENS}\u00a0tokens\u00a0(limit) · first")
    page.add("ca")
    assert page.picked == ["pico", "ann", "bob", "cat"]
    assert not page.find("#add input").is_enabled()
    page.find("[aria-label='Remove pico']").click()
    page.ask(QUESTION)
    assert page.answers() == {name: says(url, name) for name in ("ann", "bob", "cat")}


def test_the_slider_blends_two_adapters(page: Page, url: str) -> None:
    page.ask(QUESTION, TOKENS)
    page.set_slider(65)
    assert page.blended() == blend(url, 0.65)
    assert page.text("#blend-answer h3") == "35 % ann, 65 % bob"
    page.set_slider(100)  # seven steps, of which the last alone is answered
    assert page.blended() == says(url, "bob") != blend(url, 0.65)
    page.set_slider(0)
    assert page.blended() == says(url, "ann")
    page.find("#blend-right input").click()
    page.press("cat", Keys.ENTER)
    page.set_slider(100)
    assert page.blended() == says(url, "cat")


def test_an_uploaded_file_is_swapped_in_and_asked_again(
    page: Page, url: str, work: Path, basis: Basis, tmp_path: Path
) -> None:
    page.ask(QUESTION, TOKENS)
    before, old = page.answers(), version(url, "ann")
    page.find("#upload-file").send_keys(str(work / "cat.safetensors"))
    assert page.find("#upload-name").get_property("value") == "cat"
    page.fill("#upload-name", "ann")
    page.find("#upload-name").send_keys(Keys.ENTER)
    page.wait_for(lambda: "→" in page.text("#upload-result"))
    page.settle()
    new = version(url, "ann")
    assert old != new and f"ann: {old[:7]} → {new[:7]}" in page.text("#upload-result")
    assert page.answers() == {**before, "ann": says(url, "cat")}
    page.wait_for(lambda: page.text(ANN_VERSION) == new[:7])
    page.find("#upload-result button").click()
    page.wait_for(lambda: "is back at" in page.text("#upload-result"))
    page.settle()
    assert version(url, "ann") == old and page.answers() == before

    save_adapter(random_adapter(basis, 7), tmp_path / "dan.safetensors")
    page.find("#upload-file").send_keys(str(tmp_path / "dan.safetensors"))
    page.fill("#upload-name", "dan")
    page.find("#upload-name").send_keys(Keys.ENTER)
    page.wait_for(lambda: "dan is published" in page.text("#upload-result"))
    page.settle()
    assert page.answers() == {**before, "dan": says(url, "dan")}
    httpx.delete(f"{url}/v1/adapters/dan").raise_for_status()


def test_what_is_no_adapter_is_refused_in_the_servers_words(
    page: Page, url: str, basis: Basis, tmp_path: Path
) -> None:
    foreign = Adapter(random_adapter(basis, 0).cores, "sha256:" + "0" * 64)
    save_adapter(foreign, tmp_path / "foreign.safetensors")
    (tmp_path / "large.safetensors").write_bytes(bytes(4 << 20))
    for file, status in (("foreign", 422), ("large", 413)):
        page.find("#upload-file").send_keys(str(tmp_path / f"{file}.safetensors"))
        page.fill("#upload-name", "eve")
        page.find("#upload-name").send_keys(Keys.ENTER)
        page.wait_for(lambda status=status: f"{status} · " in page.text("#upload-result"))
        data = (tmp_path / f"{file}.safetensors").read_bytes()
        refused = httpx.put(f"{url}/v1/adapters/eve", content=data)
        assert refused.json()["error"]["message"] in page.text("#upload-result")
    assert [bool("eve" in c) for c in page.complaints()] == [True, True]  # the two statuses


def test_the_live_figures_are_those_of_the_metrics(page: Page, url: str) -> None:
    page.wait_for(lambda: page.text("#live-rate") == "0")
    page.ask(QUESTION, 200)
    page.wait_for(lambda: page.text("#live-rate") not in ("0", NOTHING))
    page.wait_for(lambda: page.text("#live-running") == page.text("#live-waiting") == "0")
    assert page.find("#live-curve .line").get_attribute("d").count("L") >= 1
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    used = next(line.split()[1] for line in lines if line.startswith("lorasb_slots_used "))
    assert page.text("#live-slots") == f"{float(used):.0f} / 1,023"
    assert page.text("#live-kv") == "0 %" and not page.text("#live-note")


@pytest.mark.parametrize("size", [PHONE, (320, 600), DESKTOP])
def test_nothing_is_wider_than_its_window(page: Page, size: tuple[int, int]) -> None:
    page.resize(size)
    page.add(LONG_NAME)
    page.find("#key-button").click()
    page.find("summary").click()
    assert page.overflow() == 0
    page.ask(QUESTION, 120)
    page.set_slider(100)
    page.blended()
    assert page.overflow() == 0
    page.find("[aria-label='Remove bob']").click()
    for field in ("#add input", "#blend-left input", "#blend-right input"):
        page.find(field).click()
        page.wait_for(lambda: page.all("[role=option]"))
        assert page.overflow() == 0
    assert any("404" in complaint for complaint in page.complaints())  # of the long name


def test_everything_is_reached_by_the_keyboard(page: Page, url: str) -> None:
    def tab_to(*names: str) -> None:
        for name in names:
            page.press(Keys.TAB)
            assert page.focused.startswith(name)

    assert page.focused == "question"
    page.press("a", held=Keys.CONTROL)
    page.press(QUESTION)
    page.press(Keys.ENTER, held=Keys.SHIFT)
    assert page.find("#question").get_property("value") == f"{QUESTION}\n"
    page.press(Keys.BACKSPACE)
    tab_to("Remove pico", "Remove ann", "Remove bob", "Add an adapter")
    page.press("c", Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ENTER)
    assert page.picked == ["pico", "ann", "bob", "cat"]
    page.press(Keys.ENTER, held=Keys.CONTROL)
    page.settle()
    assert page.answers()["cat"] == says(url, "cat", tokens=60)
    assert page.focused == "question"
    tab_to("Remove pico", "Remove ann", "Remove bob")
    page.press(Keys.ENTER)
    assert page.focused == "Remove cat" and page.picked == ["pico", "ann", "cat"]
    tab_to("Add an adapter", "Settings", "Ask", "Left adapter", "Right adapter")
    page.press(Keys.ARROW_DOWN, Keys.ESCAPE)
    assert page.find("#blend-right input").get_property("value") == "bob"
    tab_to("blend-slider")
    page.press(Keys.END)
    assert page.blended() == says(url, "bob", tokens=60)
    tab_to("upload-file", "upload-name", "Publish")
    log = page.find("#said")
    assert log.get_attribute("role") == "log"
    assert log.find_elements(By.CSS_SELECTOR, "p")[-1].get_property("textContent") == (
        f"0 % ann, 100 % bob: {page.blended()}"
    )
    labels = page.run(
        "return [...document.querySelectorAll('input, textarea')].map((e) => "
        "e.ariaLabel || e.labels[0]?.textContent.trim())"
    )
    assert all(labels) and len(labels) > 8
