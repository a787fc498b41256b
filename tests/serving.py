"""`lorasb` as a user runs it: commands, and a server process on a free port of 127.0.0.1."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

LORASB = (sys.executable, "-c", "from lorasb_tools.cli import main; main()")
START_SECONDS = 120


def lorasb(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end, which must be a good one."""
    command = [*LORASB, *(str(word) for word in words)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


@contextmanager
def serving(log: Path, *words: object) -> Iterator[str]:
    """`lorasb serve` on a port that it chooses itself; yields its URL once it is ready."""
    command = [*LORASB, "serve", *(str(word) for word in words), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            yield _wait(process, log)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        url = log.read_text().partition("serving on ")[2].partition("\n")[0]
        with suppress(httpx.TransportError):
            if url and httpx.get(f"{url}/ready").status_code == 200:
                return url
        time.sleep(0.1)
    raise AssertionError(f"the server did not get ready: {log.read_text()}")
