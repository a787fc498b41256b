"""The playground in a headless Chromium (`make chromium`), as its user sees it."""

import base64
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_engine import wait_until
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP = (1280, 900)
PHONE = (390, 844)
RUNNING = "[data-state=waiting], [data-state=streaming]"
NOTHING = "\N{EN DASH}"  # shown for a figure that is not known
SECONDS = 60.0  # for what a busy machine may need long for


@contextmanager
def chromium(profile: Path) -> Iterator["Page"]:
    """A browser of its own with a fresh profile in the folder `profile`."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    assert binary and driver, "found no Chromium with its driver: run `make chromium`"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Page(browser)
    finally:
        browser.quit()


class Page:
    """The playground's page and what can be done on it."""

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self.resize(DESKTOP)

    def resize(self, size: tuple[int, int]) -> None:
        """A window of this size in CSS pixels; a phone's is touched, not pointed at."""
        phone = size == PHONE
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": phone})

    def open(self, url: str) -> None:
        """The page as in a new tab, with its names once the server has told them."""
        self.browser.get(url)
        self.run("sessionStorage.clear()")
        self.reload()

    def reload(self) -> None:
        self.leave(self.browser.refresh)

    def leave(self, how: Callable[[], None]) -> None:
        """Do what loads the page anew; wait until the server has told it names, or a refusal."""
        self.run("window.left = true")
        how()
        loaded = "return !window.left && document.readyState === 'complete'"
        self.wait_for(lambda: self.run(loaded))
        self.wait_for(lambda: self.text("#model") or self.text("#trouble"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def find(self, css: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        """What is written there, to the character; nothing where that is hidden."""
        element = self.find(css)
        return str(element.get_property("textContent")) if element.is_displayed() else ""

    def wait_for(self, condition: Callable[[], Any]) -> None:
        wait_until(lambda: bool(condition()), SECONDS)

    @property
    def picked(self) -> list[str]:
        return [chip.text for chip in self.all("#picked span")]

    @property
    def focused(self) -> str:
        """The focused element, by its id or what it is called."""
        script = "const e = document.activeElement; return e.id || e.ariaLabel || e.textContent"
        return str(self.run(script)).strip()

    def add(self, text: str) -> None:
        self.find("#add input").send_keys(text, Keys.ENTER)

    def press(self, *keys: str, held: str = "") -> None:
        """Type wherever the focus is."""
        chain = ActionChains(self.browser)
        if held:
            chain.key_down(held)
        chain.send_keys(*keys)
        if held:
            chain.key_up(held)
        chain.perform()

    def fill(self, css: str, text: str) -> None:
        field = self.find(css)
        field.clear()
        field.send_keys(text)

    def ask(self, question: str, max_tokens: int | None = None) -> None:
        """Ask, and wait for the end of all answers."""
        if max_tokens is not None:
            self.run(f"document.querySelector('#max-tokens').value = {max_tokens}")
        self.fill("#question", question)
        self.find("#question").send_keys(Keys.ENTER)
        self.settle()

    def settle(self) -> None:
        self.wait_for(lambda: not self.all(RUNNING))

    def answers(self) -> dict[str, str]:
        """What each picked model says."""
        script = """const text = (card, css) => card.querySelector(css).textContent;
            const cards = [...document.querySelectorAll("#answers .answer")];
            return cards.map((card) => [text(card, "h3"), text(card, ".text")])"""
        return dict(self.run(script))

    def state(self, within: str) -> str:
        return str(self.find(f"{within} .answer").get_attribute("data-state"))

    def set_slider(self, value: int) -> None:
        """Move the blend's slider as a hand does, step by step."""
        slider = self.find("#blend-slider")
        steps = (value - int(str(slider.get_property("value")))) // 5
        slider.send_keys(*[Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT] * abs(steps))

    def blended(self) -> str:
        """The blend's answer, once it is that of where the slider stands."""
        self.wait_for(lambda: self.state("#blend-answer") in ("done", "failed"))
        return self.text("#blend-answer .text")

    def overflow(self) -> int:
        """CSS pixels that the page is wider than its window."""
        script = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
        return int(self.run(script))

    def complaints(self) -> list[str]:
        """What the browser has logged since it was last asked."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def screenshot(self) -> bytes:
        """The whole page as a PNG."""
        script = "const e = document.documentElement; return [e.clientWidth, e.scrollHeight]"
        width, height = self.run(script)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        how = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        return base64.b64decode(self.browser.execute_cdp_cmd("Page.captureScreenshot", how)["data"])
