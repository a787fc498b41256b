"""`lorasb serve` as a process of its own, on a port that it chooses itself."""

import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
START_SECONDS = 300
STOP_SECONDS = 60


@dataclass(frozen=True)
class Running:
    """A server process that is ready."""

    process: "subprocess.Popen[bytes]"
    url: str


@contextmanager
def serving(log: Path, *words: object) -> Iterator[str]:
    """Runs `lorasb serve` with these words; yields its URL once it is ready."""
    with running(log, *words) as server:
        yield server.url


@contextmanager
def running(
    log: Path,
    *words: object,
    env: Mapping[str, str] | None = None,
    verify: ssl.SSLContext | bool = True,
) -> Iterator[Running]:
    """As `serving`, with the process; `env` None: this process's environment."""
    command = [*LORASB, "serve", *(str(word) for word in words), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, env=env) as process:
        try:
            yield Running(process, _wait(process, log, verify))
        finally:
            process.terminate()
            process.wait(timeout=STOP_SECONDS)


def _wait(process: "subprocess.Popen[bytes]", log: Path, verify: ssl.SSLContext | bool) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r'serving on (http[^\s"]+)', log.read_text())
        with suppress(httpx.TransportError):
            if found and httpx.get(f"{found[1]}/ready", verify=verify).status_code == 200:
                return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready: {log.read_text()}")
