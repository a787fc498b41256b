"""Publishing a folder of adapter files, each under its file's name."""

from collections.abc import Callable
from pathlib import Path

from lorasb_runtime.adapters.names import DEFAULT_NAMESPACE, AdapterName, parse_name
from lorasb_runtime.adapters.store import AdapterStore
from lorasb_runtime.errors import InputError
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.adapter_file import parse_adapter

BASIS_FILE = "basis.safetensors"  # what lies beside the adapters and is none


def adapter_files(folder: Path) -> dict[str, Path]:
    """The adapter files of a folder by their stems, sorted."""
    files = sorted(folder.glob("*.safetensors"))
    return {file.stem: file for file in files if file.name != BASIS_FILE}


def publish_folder(
    folder: Path,
    store: AdapterStore,
    namespace: str | None,
    report: Callable[[int, int], None] = lambda *_: None,
) -> dict[AdapterName, str]:
    """Publish every adapter file of `folder`; gives their versions.

    All are checked before the first is published. Raises InputError for a folder without any and
    for a name that none may have, and what is wrong with a file.
    """
    files = {
        parse_name(stem, namespace or DEFAULT_NAMESPACE): file
        for stem, file in adapter_files(folder).items()
    }
    if not files:
        raise InputError(f"{folder}: found no adapter files, expected at least one")
    for file in files.values():
        parse_adapter(tensor_file.read_file(file), str(file))
    published = {}
    for done, (name, file) in enumerate(files.items(), 1):
        published[name] = store.publish(name, tensor_file.read_file(file))
        report(done, len(files))
    return published
