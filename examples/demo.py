"""The whole journey on a real model: derive, train, serve, ask side by side, swap, merge, compare.

    python examples/demo.py --model models/SmolLM2-135M-Instruct --work demo

Everything goes through the `lorasb` command and the `openai` client, as a user's work would. In
float32, where rounding cannot hide a mistake. Exits with status 1 when an answer is not what it
must be.
"""

import argparse
import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = Path(__file__).parent / "data"
STYLES = ("pirate", "haiku", "json")
QUESTIONS = (
    "What is the capital of France?",
    "How do I make a cup of tea?",
    "Why is the sky blue?",
    "Tell me about the sea.",
)
LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
ANSWER_TOKENS = 60
START_SECONDS = 180

console = Console(width=150, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="derive, train, serve, swap, merge")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for all results")
    arguments = parser.parse_args()
    model: Path = arguments.model
    work: Path = arguments.work
    shutil.rmtree(work / "store", ignore_errors=True)
    started = time.monotonic()
    basis = work / "basis.safetensors"

    step("1. Derive one rank-16 LoRA-SB basis from the pool of all example data")
    lorasb("derive", model, "--method", "lora-sb", "--data", DATA, "--rank", 16, "-o", basis)
    step("2. Train one adapter for each data set: only r x r cores learn")
    lorasb("train", model, "--basis", basis, "--data-dir", DATA, "-o", work / "adapters")
    step("3. Publish them into a store")
    for style in STYLES:
        lorasb("publish", adapter_file(work, style), work / "store", style)
    step("4. Serve the model with all of them")
    with server(model, basis, work / "store") as url:
        step("5. The same questions to the base model and all adapters, at the same time")
        served = asyncio.run(ask_all(url, model.resolve().name))
        step("6. Swap one adapter while the server runs")
        asyncio.run(swap(url, work))
    step("7. Merge one adapter into the weights and compare greedy tokens")
    merged = work / "merged-pirate"
    pirate = adapter_file(work, "pirate")
    lorasb("merge", model, "--basis", basis, pirate, "--dtype", "float32", "--force", "-o", merged)
    compare(merged, served)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")


def step(title: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")


def adapter_file(work: Path, style: str) -> Path:
    return work / "adapters" / f"{style}.safetensors"


def lorasb(*arguments: object) -> None:
    """Run one `lorasb` command, shown as a user would type it."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ lorasb {' '.join(words)}", style="cyan", markup=False)
    subprocess.run([*LORASB, *words], check=True)


@contextlib.contextmanager
def server(model: Path, basis: Path, store: Path) -> Iterator[str]:
    """`lorasb serve` as a process of its own; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(model), "--basis", str(basis), "--adapters", str(store)]
    words += ["--dtype", "float32", "--port", str(port)]
    console.print(f"$ lorasb {' '.join(words)}", style="cyan", markup=False)
    process = subprocess.Popen([*LORASB, *words])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with status {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.2)
    sys.exit(f"the server was not ready after {START_SECONDS} s")


def client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none")


async def ask(openai: AsyncOpenAI, name: str, question: str) -> tuple[str, list[str]]:
    """A greedy answer: its text and its tokens."""
    answer = await openai.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        logprobs=True,
    )
    choice = answer.choices[0]
    tokens = choice.logprobs.content if choice.logprobs else None
    return choice.message.content or "", [entry.token for entry in tokens or []]


async def ask_all(url: str, base: str) -> dict[str, list[str]]:
    """Ask everything in one go; print the answers side by side; returns the pirate's tokens."""
    names = (base, *STYLES)
    async with client(url) as openai:
        asked = [(question, name) for question in QUESTIONS for name in names]
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(openai, name, q) for q, name in asked))
        seconds = time.monotonic() - began
    by_key = dict(zip(asked, answers, strict=True))
    table = Table(show_lines=True)
    for title in ("question", *names):
        table.add_column(title, overflow="fold")
    for question in QUESTIONS:
        table.add_row(question, *(by_key[question, name][0] for name in names))
    console.print(table)
    console.print(f"{len(asked)} answers by {len(names)} models in one batch: {seconds:.1f} s")
    if any(len({by_key[q, name][0] for name in names}) < len(names) for q in QUESTIONS):
        sys.exit("two models gave the same answer: the adapters make no difference")
    return {question: by_key[question, "pirate"][1] for question in QUESTIONS}


async def swap(url: str, work: Path) -> None:
    """Replace `pirate` by the haiku file and roll back; a running answer keeps its version."""
    question = QUESTIONS[3]
    async with client(url) as openai, httpx.AsyncClient(base_url=url) as http:
        before, _ = await ask(openai, "pirate", question)
        stream = await openai.chat.completions.create(
            model="pirate",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
        )
        running = ""
        swapped = None
        async for chunk in stream:
            running += chunk.choices[0].delta.content or ""
            if swapped is None and running:
                body = adapter_file(work, "haiku").read_bytes()
                swapped = await http.put("/v1/adapters/pirate", content=body)
                swapped.raise_for_status()
                console.print(f"PUT /v1/adapters/pirate while it answers: {swapped.json()}")
        after, _ = await ask(openai, "pirate", question)
        haiku, _ = await ask(openai, "haiku", question)
        (await http.post("/v1/adapters/pirate/rollback")).raise_for_status()
        restored, _ = await ask(openai, "pirate", question)
    for label, text in (
        ("the running answer ended on its version", running),
        ("the next answer has the new version", after),
        ("after the rollback", restored),
    ):
        console.print(f"{label}:", style="bold")
        console.print(text, markup=False)
    if not (running == before == restored and after == haiku):
        sys.exit("the swap did not do what it must")


def compare(merged: Path, served: dict[str, list[str]]) -> None:
    """Greedy tokens of the merged checkpoint in Hugging Face against the served adapter's."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    model.generation_config.max_length = None
    same = 0
    total = 0
    for question, tokens in served.items():
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        generated = [tokenizer.decode([t]) for t in output[0, inputs["input_ids"].shape[1] :]]
        total += max(len(generated), len(tokens))
        same += sum(a == b for a, b in zip(generated, tokens, strict=False))
        console.print(f"{question} -> {''.join(generated)!r}", markup=False)
    console.print(f"{same} of {total} greedy tokens equal: served adapter and merged checkpoint")
    if same != total:
        sys.exit("the merged checkpoint does not give the served adapter's tokens")


if __name__ == "__main__":
    main()
