"""Merging as a process: how much memory it takes, and what is left where it is killed."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from bases import random_adapter, random_basis
from checkpoint_files import Shape, make_checkpoint
from merging import merge, tensors_of

from lorasb_runtime.storage.adapter_file import save_adapter
from lorasb_runtime.storage.basis_file import save_basis
from lorasb_runtime.storage.checkpoint import open_checkpoint

MB = 1 << 20
KILLS = 30  # at least; until a finished and an unfinished merge were seen, up to four times it

# Has imported what it needs before it says so; then merges.
MERGER = """
import sys
import torch
import lorasb_runtime.merging.checkpoint
from lorasb_tools.cli import main
print("ready", flush=True)
sys.argv[1:] = sys.stdin.readline().split()
main()
"""

# Each merge is forked from one process, and killed after so many seconds. The first is not, and
# says how many it took.
KILLED = """
import os, signal, sys, time
import lorasb_runtime.merging.checkpoint
from lorasb_tools import cli
words = sys.argv[1:]
for number, line in enumerate(sys.stdin):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.argv = ["lorasb", *words]
        sys.stdout = sys.stderr = open(os.devnull, "w")
        cli.main()
        os._exit(0)
    if number:
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(time.monotonic() - began, flush=True)
"""


def anonymous(pid: int) -> int:
    """Bytes of memory that no file stands for; 0 once the process has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 105 MB, its largest tensors of 32 MB, in less memory than one of them."""
    shape = Shape(hidden=1024, inner=16384, vocab=2048)
    files = make_checkpoint(tmp_path / "model", shape, layers=1, rank=16)
    sizes = [entry.nbytes for entry in open_checkpoint(files.model).tensors.values()]
    assert sum(sizes) > 105 * MB
    assert max(sizes) == 32 * MB
    words = ["merge", files.model, "--basis", files.basis, files.adapter, "-o", tmp_path / "out"]
    with subprocess.Popen(
        [sys.executable, "-c", MERGER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = most = anonymous(process.pid)
        process.stdin.write(" ".join(map(str, words)) + " --workers 2\n")
        process.stdin.close()
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert most - before < max(sizes)


def test_a_merge_killed_at_any_moment_leaves_no_model(pico: Path, tmp_path: Path) -> None:
    basis = random_basis(pico, rank=4)
    save_basis(basis, tmp_path / "basis")
    save_adapter(random_adapter(basis, 0), tmp_path / "a")
    merge(pico, basis, tmp_path / "whole", random_adapter(basis, 0))
    expected = tensors_of(tmp_path / "whole")
    work = tmp_path / "work"
    work.mkdir()
    words = ["merge", pico, tmp_path / "a", "--basis", tmp_path / "basis", "-o", work / "out"]
    draw = random.Random(0)
    finished = unfinished = 0
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, words), "--force"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(seconds: float) -> float:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        whole = run(0)
        shutil.rmtree(work / "out")
        for number in range(4 * KILLS):
            if number >= KILLS and min(finished, unfinished) > 0:
                break
            run(draw.uniform(0, 1.5 * whole))
            models = [path.parent for path in work.rglob("config.json")]
            for folder in models:
                found = tensors_of(folder)
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in found)
            finished += work / "out" in models
            unfinished += any(folder not in models for folder in work.iterdir())
        process.stdin.close()
    assert min(finished, unfinished) > 0
    subprocess.run(
        [sys.executable, "-c", MERGER, "x"],
        input=" ".join(map(str, [*words, "--force"])),
        text=True,
        check=True,
        capture_output=True,
    )
    assert [path.name for path in work.iterdir()] == ["out"]
