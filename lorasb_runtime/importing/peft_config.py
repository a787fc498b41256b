"""PEFT's adapter_config.json: what scales each module, and what no adapter of ours can express."""

import math
import re
from collections.abc import Iterable
from typing import Any

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import PEFT_CONFIG, CheckpointFolder
from lorasb_runtime.importing.peft_fields import HARMLESS, MUTATING_INITS, REFUSED
from lorasb_runtime.importing.peft_tensors import MERGE_FIRST

MAX_PATTERN = 256
MAX_BRANCHES = 3


def _is_number(value: object) -> bool:
    """Finite, and of a size that float32 holds; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


class PeftConfig:
    """The checked configuration of a LoRA-like adapter."""

    def __init__(self, folder: CheckpointFolder) -> None:
        """Raises FileFormatError for wrong types, InputError for what cannot be imported."""
        self.source = str(folder.path / PEFT_CONFIG)
        self._values = folder.peft_config
        self._refuse()

    @property
    def base_model(self) -> str | None:
        """The base model's name; of a path its last part, as the rest is the writer's own disk."""
        name: str | None = self._get("base_model_name_or_path", str, None)
        if not name:
            return None
        if len(name) > MAX_PATTERN or not name.isprintable():
            raise self._wrong("base_model_name_or_path", "a printable name")
        return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises FileFormatError for another kind, or none without a default."""
        value = self._values.get(key, default)
        if value is None or not _is_number(value):
            raise self._wrong(key, "a number")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self._values.get(key, default)
        if type(value) is not int or value < 1:
            raise self._wrong(key, "a whole number above zero")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty where the field is null or absent."""
        found: dict[str, Any] = self._get(key, dict, None) or {}
        return found

    def rank(self, module: str) -> int:
        """The rank that the module has by `rank_pattern`, or else by `r`."""
        found = self._by_pattern("rank_pattern", module, self.count("r"))
        if type(found) is not int or found < 1:
            raise self._wrong("rank_pattern", "whole numbers above zero")
        return found

    def check_rank(self, module: str, found: int) -> None:
        """Raise FileFormatError unless the module's tensors have the rank of the configuration."""
        expected = self.rank(module)
        if found != expected:
            raise FileFormatError(
                self.source, f"rank {expected} for {module}", f"{found} as its tensors have"
            )

    def transposed_of(self, modules: Iterable[str]) -> frozenset[str]:
        """The modules, if PEFT found weights that are stored as [in, out]."""
        return frozenset(modules) if self._get("fan_in_fan_out", bool, False) else frozenset()

    def scaling(self, module: str) -> float:
        """What PEFT multiplies B A by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = self._by_pattern("alpha_pattern", module, self.number("lora_alpha"))
        if not _is_number(alpha):
            raise self._wrong("alpha_pattern", "numbers")
        rank = self.rank(module)
        stabilised = self._get("use_rslora", bool, False)
        if alpha == 0:
            raise FileFormatError(self.source, f"a scaling of 0 for {module}", "another number")
        return float(alpha / math.sqrt(rank) if stabilised else alpha / rank)

    def _by_pattern(self, key: str, module: str, default: float) -> Any:
        """The value of the first pattern that matches the module's name or its end, as in PEFT."""
        for pattern, value in self.table(key).items():
            if self._compile(key, pattern).match(module):
                return value
        return default

    def _compile(self, key: str, pattern: str) -> re.Pattern[str]:
        """Patterns that could take for ever are refused, as they come with the file."""
        if (
            len(pattern) > MAX_PATTERN
            or len(re.findall(r"[*+?{(]", pattern)) > MAX_BRANCHES
            or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern)
        ):
            expected = (
                f"module names, or expressions with at most {MAX_BRANCHES} groups and repetitions, "
                "none of them nested"
            )
            raise FileFormatError(self.source, f"{key} {pattern[:80]!r}", expected)
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise FileFormatError(
                self.source, f"{key} {pattern[:80]!r} ({error})", "a regular expression"
            ) from None

    def _refuse(self) -> None:
        for key, value in self._values.items():
            if key in REFUSED and value:
                raise InputError(f"{self.source}: found {key}, expected none; {REFUSED[key]}")
            if key not in HARMLESS and key not in REFUSED and value:
                raise InputError(
                    f"{self.source}: found {key[:80]!r}, a field that is not known here and may "
                    f"change what the adapter computes; {MERGE_FIRST}"
                )
        if self._get("bias", str, "none") != "none":
            raise InputError(f"{self.source}: found trained biases; train with bias='none'")
        init = self._values.get("init_lora_weights", True)
        for start, way_out in MUTATING_INITS.items():
            if isinstance(init, str) and init.lower().startswith(start):
                raise InputError(
                    f"{self.source}: found init_lora_weights {init[:40]!r}, which changes the base "
                    f"model's weights; {way_out}"
                )

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self._wrong(key, f"{'an object' if kind is dict else kind.__name__}")
        return value

    def _wrong(self, key: str, expected: str) -> FileFormatError:
        value = self._values.get(key)
        return FileFormatError(self.source, f"{key} {value!r:.80}", expected)
