"""Benchmark cases in processes of their own, which take turns.

Turns of seconds, as the speed of a machine that others share changes within minutes.
"""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

from lorasb_runtime.engines.torch.bench import BenchCase, ready
from lorasb_runtime.errors import EngineError


class CaseProcess:
    """One case, loaded in a fresh process, which computes when it is asked to."""

    def __init__(self, case: BenchCase) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(case, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def measure(self) -> dict[str, float]:
        """One wave of requests, as of `bench.ready`."""
        self._pipe.send(True)
        return self._answer()

    def close(self) -> None:
        self._pipe.close()  # on which the process ends
        self._process.join()

    def _answer(self) -> dict[str, float]:
        try:
            found = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineError(
                f"the benchmark's process ended with exit code {self._process.exitcode}"
            ) from None
        if isinstance(found, Exception):
            raise found
        answer: dict[str, float] = found
        return answer


def measure_beside(
    base: CaseProcess, case: BenchCase, rounds: int
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Waves of the base and of the case in turn, `rounds` times: what each measured."""
    process = CaseProcess(case)
    try:
        for _ in range(rounds):
            yield base.measure(), process.measure()
    finally:
        process.close()


def _work(case: BenchCase, pipe: Connection) -> None:
    """The process' side: loads, warms up, and answers until the pipe ends."""
    try:
        with ready(case) as measure:
            measure()
            pipe.send({})
            while pipe.recv():
                pipe.send(measure())
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
