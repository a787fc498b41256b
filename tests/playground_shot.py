"""Makes the README's picture of the playground, after `make demo` (fonts: Debian's fonts-inter).

PYTHONPATH=benchmarks python tests/playground_shot.py MODEL demo docs/playground.png
"""

import sys
import tempfile
from pathlib import Path

from browser import Page, chromium
from selenium.webdriver.common.keys import Keys
from serving import serving


def shoot(page: Page, url: str, adapter: str) -> bytes:
    """Ask the base model, the first two adapters and `adapter`, and blend it in; as a PNG."""
    page.open(url)
    page.add(adapter)
    page.find("#question").click()
    page.ask("Tell me about the sea.", 44)
    page.find("#blend-right input").click()
    page.press(adapter, Keys.ENTER)
    page.set_slider(60)
    page.wait_for(lambda: page.state("#blend-answer") == "streaming")
    page.settle()
    page.run("document.activeElement.blur()")
    return page.screenshot()


def main() -> None:
    model, demo, output = map(Path, sys.argv[1:])
    words = ("--basis", demo / "basis.safetensors", "--adapters", demo / "store")
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch) / "log", model, *words, "--dtype", "float32") as url,
        chromium(Path(scratch) / "profile") as page,
    ):
        output.write_bytes(shoot(page, url, "pirate"))


if __name__ == "__main__":
    main()
