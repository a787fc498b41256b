"""What a merged model says of itself: the headers' metadata, a model card and a report file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorasb_runtime.errors import FileFormatError
from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.plan import ShardPlan
from lorasb_runtime.merging.survival import Survival
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.checkpoint import Checkpoint
from lorasb_runtime.storage.tensor_file import dump_json

PREFIX = "lorasb."
DTYPES_KEY = PREFIX + "source_dtypes"
EARLIER_KEY = PREFIX + "earlier"
FORMAT = "lorasb-merge"
FORMAT_VERSION = "1"
# Of the base model's card: what holds of anything that is made from it.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
JSON_KEYS = ("base_model", "adapters", "options", "changes", "config")


@dataclass(frozen=True)
class MergeRecord:
    """Where a merged model came from: by key, as text, JSON where JSON_KEYS says.

    Its keys are those of `describe_merge`; `changes`, what was done besides adding the delta;
    `config`, the source's, where it is not the merged model's. A shard's metadata also has
    `source_dtypes`, of tensors that do not have them any more, and `earlier`, what a merge before
    this one had put there.
    """

    provenance: Mapping[str, str]

    @staticmethod
    def of(
        source: Checkpoint,
        provenance: Mapping[str, str],
        changes: Mapping[str, object],
        config: Mapping[str, Any],
    ) -> "MergeRecord":
        """A new record for a merge into `source`; config: the merged model's."""
        values = dict(provenance)
        if changes:
            values["changes"] = dump_json(dict(changes))
        if config != source.config:
            values["config"] = dump_json(source.config)
        return MergeRecord(values)

    @staticmethod
    def read(merged: Checkpoint) -> "MergeRecord | None":
        """The record in a checkpoint's first shard; None where it was not merged.

        Raises FileFormatError for one that is not of the form that `of` gives it.
        """
        path = merged.folder / merged.shards[0]
        values = {
            key.removeprefix(PREFIX): value
            for key, value in shard_metadata(path).items()
            if key.startswith(PREFIX) and key not in (DTYPES_KEY, EARLIER_KEY)
        }
        meta = tensor_file.Metadata(str(path), values)
        for key in JSON_KEYS:
            if key != "adapters":
                meta.json_object(key)
        _check_adapters(meta)
        return MergeRecord(values) if values else None

    def metadata(self, source: Checkpoint, plan: ShardPlan) -> dict[str, str]:
        """What the merged shard has for its metadata."""
        own = shard_metadata(source.folder / plan.file)
        before = {key: value for key, value in own.items() if key.startswith(PREFIX)}
        kept = {key: value for key, value in own.items() if key not in before}
        values = {PREFIX + key: value for key, value in self.provenance.items()}
        changed = {
            name: source.tensors[name].dtype
            for name, spec in plan.layout.items()
            if name in source.tensors and source.tensors[name].dtype != spec.dtype
        }
        if changed:
            values[DTYPES_KEY] = dump_json(changed)
        if before:
            values[EARLIER_KEY] = dump_json(before)
        return {**kept, **values}

    def as_json(self) -> dict[str, Any]:
        return {
            key: json.loads(value) if key in JSON_KEYS else value
            for key, value in self.provenance.items()
        }


def _check_adapters(meta: tensor_file.Metadata) -> None:
    adapters = meta.json("adapters", [])
    kinds = {"name": str, "version": str, "weight": int | float}
    if not isinstance(adapters, list) or not all(
        isinstance(item, dict) and all(isinstance(item.get(k), kinds[k]) for k in kinds)
        for item in adapters
    ):
        found = f"{PREFIX}adapters {adapters!r:.80}"
        raise FileFormatError(meta.source, found, "adapters with name, version and weight")


def shard_metadata(path: Path) -> dict[str, str]:
    header, _ = tensor_file.read_header(path)
    found: dict[str, str] = header.get("__metadata__", {"format": "pt"})
    return found


def metadata_before(merged: Path) -> dict[str, str]:
    """What a merged shard's source had for its metadata."""
    own = shard_metadata(merged)
    before = tensor_file.Metadata(str(merged), own).json_object(EARLIER_KEY)
    return {**{key: value for key, value in own.items() if not key.startswith(PREFIX)}, **before}


def source_dtypes(merged: Checkpoint) -> dict[str, str]:
    """By name, what safetensors calls the dtype that a tensor had before it was merged."""
    found: dict[str, str] = {}
    for shard in merged.shards:
        path = merged.folder / shard
        found |= tensor_file.Metadata(str(path), shard_metadata(path)).json_object(DTYPES_KEY)
    return found


def figures(survival: Survival) -> dict[str, float]:
    """A delta's fate as the reports give it; measured: the share of entries that were looked at."""
    return {
        "delta_ratio": survival.ratio,
        "kept": survival.kept,
        "relative_error": survival.relative_error,
        "measured": survival.measured / survival.entries if survival.entries else 1.0,
    }


def write_report(folder: Path, record: MergeRecord, modules: Mapping[str, Survival]) -> None:
    """The report file: provenance, and the figures of every module and in all."""
    value = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **record.as_json(),
        "total": figures(sum(modules.values(), Survival())),
        "modules": {name: figures(survival) for name, survival in modules.items()},
    }
    folder_files.write_json(folder / folder_files.REPORT, value)


def write_card(folder: Path, record: MergeRecord, total: Survival) -> None:
    """README.md: what the model hub reads, and what a person wants to know first.

    The base model's own card lies beside it; its license and language are taken over.
    """
    said = record.as_json()
    base = said.get("base_model") or {}
    data = {
        "base_model": base.get("name"),
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["lorasb", "merge"],
        **{k: v for k, v in read_card(folder / folder_files.BASE_CARD).items() if k in INHERITED},
    }
    header = yaml.safe_dump({k: v for k, v in data.items() if v is not None}, sort_keys=False)
    lines = [
        f"# {base.get('name', 'A model')}, merged",
        "",
        f"Adapters folded into the weights by lorasb {said.get('version', '')}: W = W0 + delta, "
        "added in float32 and rounded once.",
        "",
        *_table(said),
        "",
        f"rms(delta) / rms(W0) is {total.ratio:.2e}; {total.kept:.1%} of the delta survived the "
        f"rounding, with a relative error of {total.relative_error:.2e}. The figures of every "
        f"module are in `{folder_files.REPORT}`.",
    ]
    if (folder / folder_files.BASE_CARD).is_file():
        lines += ["", f"The base model's own card is `{folder_files.BASE_CARD}`."]
    text = f"---\n{header}---\n\n" + "\n".join(lines) + "\n"
    (folder / folder_files.CARD).write_text(text, encoding="utf-8")


def _table(said: Mapping[str, Any]) -> list[str]:
    base = said.get("base_model") or {}
    rows = [
        ("base model", base.get("name")),
        ("its fingerprint", base.get("fingerprint")),
        ("basis", said.get("basis")),
        ("method", said.get("method")),
        *((f"option {key}", value) for key, value in (said.get("options") or {}).items()),
        *((key.replace("_", " "), value) for key, value in (said.get("changes") or {}).items()),
    ]
    for item in said.get("adapters") or []:
        rows.append((f"adapter {item['name']} x {item['weight']:g}", item["version"]))
    return ["| | |", "|---|---|", *(f"| {k} | `{v}` |" for k, v in rows if v is not None)]


def read_card(card: Path) -> dict[str, Any]:
    """A model card's header; empty where there is no card, or none whose header can be read."""
    try:
        text = card.read_text(encoding="utf-8-sig")
        found = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (FileNotFoundError, ValueError, IndexError, yaml.YAMLError):
        found = None
    return found if isinstance(found, dict) else {}
