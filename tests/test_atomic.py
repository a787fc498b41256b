"""Folders written aside and renamed: what is left where the process stops halfway."""

import shutil
from pathlib import Path

import pytest

from lorasb_runtime.storage import atomic


class KilledError(BaseException):
    """Stands for the process' end: nothing catches it."""


def write(path: Path, text: str, *, force: bool = False) -> None:
    with atomic.new_folder(path, force=force) as folder:
        (folder / "model.safetensors").write_text(text)
        (folder / "config.json").write_text("{}")


def test_half_of_a_replaced_folder_never_looks_complete_or_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    write(path, "old")

    def killed(folder: Path, **_: object) -> None:
        (folder / "model.safetensors").unlink()
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shutil, "rmtree", killed)
        write(path, "new", force=True)
    assert (path / "model.safetensors").read_text() == "new"
    assert [file.parent for file in tmp_path.rglob("config.json")] == [path]
    shutil.rmtree(path)
    write(path, "third")
    assert (path / "model.safetensors").read_text() == "third"
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]
