"""Imports as tests make them, and what must hold of each that succeeds or is refused."""

from pathlib import Path

import pytest
from bases import reference_logits
from foreign import TOKENS, peft_logits

from lorasb_runtime.errors import InputError
from lorasb_runtime.importing.run import ImportConfig, Imported, ImportResult, import_checkpoints
from lorasb_runtime.storage.adapter_file import load_adapter
from lorasb_runtime.storage.basis_file import load_basis


def refused(folder: Path, message: str, kind: type[InputError] = InputError) -> str:
    """The one line of the refusal; nothing was written."""
    output = folder.parent / "out"
    with pytest.raises(kind, match=message) as refusal:
        import_checkpoints([folder], ImportConfig(), output)
    assert not output.exists()
    said = str(refusal.value)
    assert "\n" not in said and str(folder) in said
    return said


def import_one(folder: Path, output: Path, *, model: Path | None = None) -> ImportResult:
    name = None if model is None else str(model)
    return import_checkpoints([folder], ImportConfig(name), output)


def check_logits(base: Path, folder: Path, output: Path, *, model: bool = False) -> Imported:
    """Import, read the files again, and compare with PEFT on the same checkpoint."""
    result = import_one(folder, output, model=base if model else None)
    basis = load_basis(output / "basis.safetensors")
    adapter = load_adapter(output / f"{folder.name}.safetensors", basis)
    found = reference_logits(base, basis, adapter, TOKENS)
    expected = peft_logits(base, folder)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    untouched = reference_logits(base, basis, None, TOKENS)
    assert (found - untouched).abs().max() > 0.05 * expected.abs().max()
    return result.adapters[0]
