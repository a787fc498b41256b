"""The benchmark's processes measure when they are asked, and say why one ended."""

from pathlib import Path

import pytest

from lorasb_runtime.engines.torch.bench import BenchCase
from lorasb_runtime.engines.torch.bench_turns import CaseProcess, measure_beside
from lorasb_runtime.errors import InputError


def test_cases_take_turns_in_processes_of_their_own(pico: Path) -> None:
    case = BenchCase(pico, "float32", batch=3, prompt=5, tokens=6)
    base = CaseProcess(case)
    adapted = BenchCase(pico, "float32", batch=3, prompt=5, tokens=6, adapters=2, rank=4)
    turns = list(measure_beside(base, adapted, 2))
    base.close()
    assert len(turns) == 2
    for found in (found for turn in turns for found in turn):
        assert found["tokens_per_second"] > 0 and 0 < found["outside_forward"] < 1


def test_a_case_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing-here"):
        CaseProcess(BenchCase(tmp_path / "nothing-here", None))
