"""What a merged model says of itself: the headers' metadata, a model card and a report file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from lorasb_runtime.merging import folder_files
from lorasb_runtime.merging.plan import ShardPlan
from lorasb_runtime.merging.survival import Survival
from lorasb_runtime.storage import tensor_file
from lorasb_runtime.storage.checkpoint import Checkpoint
from lorasb_runtime.storage.tensor_file import dump_json

PREFIX = "lorasb."
DTYPES_KEY = "source_dtypes"
FORMAT = "lorasb-merge"
FORMAT_VERSION = "1"
# Of the base model's card: what holds of anything that is made from it.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
JSON_KEYS = ("base_model", "adapters", "options", "changes", "earlier")


@dataclass(frozen=True)
class MergeRecord:
    """Where a merged model came from: by key, as text, JSON where JSON_KEYS says.

    Its keys are those of `describe_merge`; `changes`, what was done besides adding the delta;
    `earlier`, the record of the model that this one was merged into, if that was merged itself.
    """

    provenance: Mapping[str, str]

    @staticmethod
    def of(
        source: Checkpoint, provenance: Mapping[str, str], changes: Mapping[str, object]
    ) -> "MergeRecord":
        """A new record for a merge into `source`."""
        values = dict(provenance)
        if changes:
            values["changes"] = dump_json(dict(changes))
        before = MergeRecord.read(source)
        if before is not None:
            values["earlier"] = dump_json(before.as_json())
        return MergeRecord(values)

    @staticmethod
    def read(merged: Checkpoint) -> "MergeRecord | None":
        """The record in a checkpoint's first shard; None where it was not merged."""
        path = merged.folder / merged.shards[0]
        header, _ = tensor_file.read_header(path)
        values = {
            key.removeprefix(PREFIX): value
            for key, value in header.get("__metadata__", {}).items()
            if key.startswith(PREFIX) and key != PREFIX + DTYPES_KEY
        }
        for key in JSON_KEYS:
            tensor_file.Metadata(str(path), values).json(key)
        return MergeRecord(values) if values else None

    def metadata(self, source: Checkpoint, plan: ShardPlan) -> dict[str, str]:
        """A shard's metadata: the record, and the source's dtypes of tensors that changed them."""
        values = {PREFIX + key: value for key, value in self.provenance.items()}
        changed = {
            name: source.tensors[name].dtype
            for name, spec in plan.layout.items()
            if name in source.tensors and source.tensors[name].dtype != spec.dtype
        }
        return {**values, PREFIX + DTYPES_KEY: dump_json(changed)} if changed else values

    def as_json(self) -> dict[str, Any]:
        return {
            key: json.loads(value) if key in JSON_KEYS else value
            for key, value in self.provenance.items()
        }


def figures(survival: Survival) -> dict[str, float]:
    """A delta's fate as the reports give it."""
    return {
        "delta_ratio": survival.ratio,
        "kept": survival.kept,
        "relative_error": survival.relative_error,
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
    data = ModelCardData(
        base_model=base.get("name"),
        base_model_relation="finetune",
        library_name="transformers",
        tags=["lorasb", "merge"],
        **_inherited(folder / folder_files.BASE_CARD),
    )
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
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"
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


def _inherited(card: Path) -> dict[str, Any]:
    """From the base model's card, where it has one that can be read."""
    try:
        found = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        found = None
    return {key: found[key] for key in INHERITED if key in found} if found else {}
