"""What comparing two things of a kind gives."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """kind: adapter, basis or model. facts: of the whole, JSON values, in the order to show them.

    rows: one for each module or tensor, the greatest difference first.
    """

    kind: str
    facts: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        rows = "tensors" if self.kind == "model" else "modules"
        return {"kind": self.kind, **self.facts, rows: list(self.rows), "notes": list(self.notes)}
