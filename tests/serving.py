"""`lorasb` as a user runs it: commands, and the server process that the benchmarks use too."""

import subprocess

from server_process import LORASB, Running, running, serving

__all__ = ["LORASB", "Running", "lorasb", "running", "serving"]


def lorasb(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end, which must be a good one."""
    command = [*LORASB, *(str(word) for word in words)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result
