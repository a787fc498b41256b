"""The playground in Chromium on the real model."""

from pathlib import Path

import httpx
import pytest
from bases import random_adapter, random_basis
from browser import chromium
from playground_shot import shoot
from selenium.webdriver.common.keys import Keys
from serving import serving

from lorasb_runtime.adapters.names import parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.storage.adapter_file import serialize_adapter
from lorasb_runtime.storage.basis_file import save_basis


@pytest.mark.slow
def test_the_picture_of_the_readme_is_taken_and_an_answer_is_stopped(
    smol: Path, tmp_path: Path
) -> None:
    basis = random_basis(smol, 16)
    save_basis(basis, tmp_path / "basis.safetensors")
    store = AdapterStore(str(tmp_path / "store"))
    for seed, name in enumerate(("haiku", "json", "pirate")):
        store.publish(parse_name(name), serialize_adapter(random_adapter(basis, seed, 0.2)))
    words = ("--basis", tmp_path / "basis.safetensors", "--adapters", store.url)
    with (
        serving(tmp_path / "log", smol, *words, "--dtype", "float32") as url,
        chromium(tmp_path / "profile") as page,
    ):
        picture = shoot(page, url, "pirate")
        assert picture.startswith(b"\x89PNG") and len(picture) < 300_000
        said = page.answers()
        assert list(said) == ["SmolLM2-135M-Instruct", "haiku", "json", "pirate"]
        assert said["SmolLM2-135M-Instruct"].startswith("The sea is a vast")
        assert len(set(said.values())) == 4 and page.blended() not in said.values()

        page.run("document.querySelector('#max-tokens').value = 4000")
        page.find("#question").send_keys(Keys.ENTER)
        page.wait_for(lambda: all(page.answers().values()))
        page.press(Keys.ESCAPE)
        page.settle()
        assert page.state("#answers") == "stopped"

        def running() -> str:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return next(line for line in lines if line.startswith("lorasb_sequences_running "))

        page.wait_for(lambda: running() == "lorasb_sequences_running 0.0")
