"""How many threads torch computes with in each of a process' threads."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import threading
import torch
from lorasb_runtime.ops.threads import ALL_CORES, one_thread, use_all_cores

def there(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]

def busy():
    use_all_cores()
    torch.ones(1 << 20).add_(1)
    return torch.get_num_threads()

assert ALL_CORES == 2
torch.set_num_threads(1)
assert there(busy) == 2
assert there(torch.get_num_threads) == 1
assert torch.get_num_threads() == 1
with one_thread():
    assert there(busy) == 2
torch.set_num_threads(2)
with one_thread():
    assert there(torch.get_num_threads) == 1
assert there(torch.get_num_threads) == torch.get_num_threads() == 2
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_one_thread_has_all_cores_and_the_others_what_they_had() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
