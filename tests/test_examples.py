"""Every short example as a newcomer runs it, against one server on the pico model."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from bases import random_adapter, random_basis
from pico import make_pico_llama
from serving import lorasb, serving

from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import save_basis

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = {"demo.py", "fetch_model.py"}  # which `make demo` runs

SEA = {"role": "user", "content": "Tell me about the sea."}

Run = Callable[[str], str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context in which a tool can be described, at one token for each byte."""
    folder = tmp_path_factory.mktemp("models") / "pico"
    return make_pico_llama(folder, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def work(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` leaves it, as far as the examples go."""
    folder = tmp_path_factory.mktemp("examples")
    basis = random_basis(model)
    (folder / "demo" / "adapters").mkdir(parents=True)
    save_basis(basis, folder / "demo" / "basis.safetensors")
    for seed, name in enumerate(("pirate", "haiku")):
        file = folder / "demo" / "adapters" / f"{name}.safetensors"
        save_adapter(random_adapter(basis, seed), file)
        lorasb("publish", file, folder / "demo" / "store", name)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, work: Path) -> Iterator[str]:
    demo = work / "demo"
    words = ("--basis", demo / "basis.safetensors", "--adapters", demo / "store")
    with serving(work / "serve.log", model, *words, "--dtype", "float32") as url:
        yield f"{url}/v1"


@pytest.fixture
def run(url: str, work: Path) -> Run:
    return lambda name: example(name, url, work)


def example(name: str, url: str, folder: Path) -> str:
    """What an example prints, which must end well and complain about nothing."""
    command = ["bash"] if name.endswith(".sh") else [sys.executable]
    result = subprocess.run(
        [*command, str(EXAMPLES / name)],
        capture_output=True,
        cwd=folder,
        env={**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "none"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr.decode()
    assert not result.stderr
    return result.stdout.decode()


def test_the_readme_names_every_example() -> None:
    named = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert named == {file.name for file in EXAMPLES.glob("*.*") if file.suffix != ".md"} - DEMO


def test_chat(run: Run) -> None:
    said = run("chat.py")
    assert said.startswith("this server has pico with the adapters haiku, pirate\npico: ")
    assert "\npirate: " in said


def test_streaming(run: Run) -> None:
    chat, responses = run("streaming.py").removeprefix("chat completions:\n").split("responses:\n")
    assert re.search(r"\n\[\d+ tokens\]\n$", chat)
    assert re.search(r"\n\[\d+ tokens, (completed|incomplete)\]\n$", responses)


def test_json_schema(run: Run) -> None:
    country = r"capital=['\"].* continent='(Africa|America|Asia|Europe|Oceania)'\n"
    assert re.fullmatch(country * 2, run("json_schema.py"))


def test_tool_call(run: Run) -> None:
    call, _ = run("tool_call.py").split("\n", 1)
    found = re.fullmatch(r"multiply\(\{'a': (\d+), 'b': (\d+)\}\) -> (\d+)", call)
    assert found and int(found[1]) * int(found[2]) == int(found[3])


@pytest.mark.slow
def test_examples_on_a_model_that_knows(smol: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "serve.log", smol) as url:
        schema = example("json_schema.py", f"{url}/v1", tmp_path)
        call = example("tool_call.py", f"{url}/v1", tmp_path)
    assert schema == "capital='Paris' continent='Europe'\n" * 2
    assert re.fullmatch(r"multiply\(\{'a': 17, 'b': 23\}\) -> 391\n.*391.*\n", call)


def greedy(url: str, model: str, tokens: int) -> str:
    """What an adapter says about the sea, asked for by its name."""
    body = {"model": model, "messages": [SEA], "max_tokens": tokens, "temperature": 0}
    answer = httpx.post(f"{url}/chat/completions", json=body).json()
    return str(answer["choices"][0]["message"]["content"])


def test_blend(run: Run, url: str) -> None:
    lines = re.findall(r"^(\d+)% pirate: (.*)$", run("blend.py"), re.MULTILINE)
    assert [share for share, _ in lines] == ["100", "70", "30", "0"]
    ends = [ast.literal_eval(lines[i][1]) for i in (0, -1)]
    assert ends == [greedy(url, name, 40) for name in ("pirate", "haiku")]


def test_inline_adapter(run: Run, url: str) -> None:
    assert run("inline_adapter.py") == f"{greedy(url, 'pirate', 60)}\n"


def test_swap(run: Run, url: str) -> None:
    said = re.findall(r"^(\w.*?) ([0-9a-f]{12}) -> (.*)$", run("swap.py"), re.MULTILINE)
    assert [what for what, _, _ in said] == ["published", "swapped to", "rolled back to"]
    versions = [version for _, version, _ in said]
    assert versions[0] == versions[2] != versions[1]
    expected = [greedy(url, name, 40) for name in ("pirate", "haiku", "pirate")]
    assert [ast.literal_eval(text) for _, _, text in said] == expected


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl(run: Run) -> None:
    said = run("curl.sh")
    models, answer, stream, blend, files = re.split(r"^== .*\n", said, flags=re.MULTILINE)[1:]
    assert [card["id"] for card in json.loads(models)["data"]] == ["pico", "haiku", "pirate"]
    assert json.loads(answer)["model"] == "pirate"
    assert stream.startswith("event: response.created\n") and "data: [DONE]" in stream
    assert json.loads(blend)["model"] == "pico"
    published, versions, deleted = (json.loads(line) for line in files.splitlines())
    assert [v["version"] for v in versions["data"]] == [published["version"]]
    assert deleted == {"name": "guest-curl", "deleted": True}
