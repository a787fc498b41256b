"""`lorasb serve` as a process of its own, on a port that it chooses itself."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
START_SECONDS = 300
STOP_SECONDS = 60


@contextmanager
def serving(log: Path, *words: object) -> Iterator[str]:
    """Runs `lorasb serve` with these words; yields its URL once it is ready."""
    command = [*LORASB, "serve", *(str(word) for word in words), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            yield _wait(process, log)
        finally:
            process.terminate()
            process.wait(timeout=STOP_SECONDS)


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        url = log.read_text().partition("serving on ")[2].partition("\n")[0]
        with suppress(httpx.TransportError):
            if url and httpx.get(f"{url}/ready").status_code == 200:
                return url
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready: {log.read_text()}")
