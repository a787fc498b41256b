"""Tensor names of PEFT checkpoints: which module each belongs to, and which cannot be imported."""

import re
from collections.abc import Mapping

from lorasb_runtime.errors import FileFormatError, InputError
from lorasb_runtime.importing.folder import TensorFile

PREFIX = "base_model.model."
MAX_NAME = 256
MERGE_FIRST = (
    "merge it into its base model with PEFT (merge_and_unload) and import the result with "
    "--from-merged"
)
_MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

# How each kind of tensor is spelled after the module's name: as PEFT saves it, or as a live
# state_dict names it, with the adapter's name inside.
SPELLINGS: dict[str, re.Pattern[str]] = {
    "lora_A": re.compile(r"\.lora_A(?:\.(?P<adapter>[^.]+))?\.weight"),
    "lora_B": re.compile(r"\.lora_B(?:\.(?P<adapter>[^.]+))?\.weight"),
    "ada_A": re.compile(r"\.lora_A(?:\.(?P<adapter>(?!weight$)[^.]+))?"),
    "ada_B": re.compile(r"\.lora_B(?:\.(?P<adapter>(?!weight$)[^.]+))?"),
    "ada_E": re.compile(r"\.lora_E(?:\.(?P<adapter>[^.]+))?"),
    # PEFT up to 0.17 takes ".default" out of ".default_lora_latent_mapping", its dot included.
    "core": re.compile(r"(?:\.default_|\.|_)lora_latent_mapping(?:\.weight)?"),
    "tiny_A": re.compile(r"\.tinylora_A(?:\.(?P<adapter>[^.]+))?"),
    "tiny_B": re.compile(r"\.tinylora_B(?:\.(?P<adapter>[^.]+))?"),
    "tiny_P": re.compile(r"\.tinylora_P(?:\.(?P<adapter>[^.]+))?"),
    "sora_A": re.compile(r"\.lora\.lora_A"),
    "sora_B": re.compile(r"\.lora\.lora_B"),
    "sora_gate": re.compile(r"\.lora\.gate"),
}

# What else is met in the wild: what it is, and the way out.
FOREIGN: tuple[tuple[str, str, str], ...] = (
    ("lora_magnitude_vector", "DoRA's magnitudes, which no delta can express", MERGE_FIRST),
    ("lora_embedding_", "a LoRA of an embedding", "train without embeddings as targets"),
    ("trainable_tokens", "trained token embeddings", "train without trainable_token_indices"),
    ("lora_B.bias", "a bias beside lora_B (lora_bias)", "train with lora_bias=False"),
    ("lora_diag", "KaSA's diagonal, whose base model is changed too", MERGE_FIRST),
    ("base_layer", "weights of the base model", "save the adapter alone (save_pretrained)"),
    ("modules_to_save", "fully trained modules", "train without modules_to_save"),
    (".bias", "a trained bias", "train with bias='none'"),
)


def by_module(
    file: TensorFile, kinds: tuple[str, ...], others: frozenset[str] = frozenset()
) -> dict[str, dict[str, str]]:
    """For each module, the tensor's name of each of `kinds`; all of them, exactly once.

    others: names that the reader takes care of itself. Raises FileFormatError for a module with
    one missing or twice and for names that are no module's; InputError, with the way out, for
    tensors that no adapter can hold.
    """
    found: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for name in file.names:
        if name in others:
            continue
        module, kind, adapter = _split(file, name, kinds)
        if kind in found.setdefault(module, {}):
            twice = f"{found[module][kind]!r} and {name!r}, both the {kind} of {module}"
            raise file.wrong(twice, "each module once")
        found[module][kind] = name
        adapters.update({adapter} if adapter else ())
    if len(adapters) > 1:
        raise file.wrong(f"adapters named {sorted(adapters)[:3]}", "one adapter in a file")
    if not found:
        raise file.wrong("no tensors of target modules", "some for each module")
    for module, tensors in found.items():
        for kind in kinds:
            if kind not in tensors:
                raise file.wrong(
                    f"{module} with {', '.join(sorted(tensors.values()))} alone",
                    f"its {kind} as well",
                )
    return found


def _split(file: TensorFile, name: str, kinds: tuple[str, ...]) -> tuple[str, str, str | None]:
    """Module, kind and the adapter's name in it, where it has one."""
    if len(name) > MAX_NAME:
        raise file.wrong(f"a tensor name of {len(name)} characters", f"at most {MAX_NAME}")
    for kind in kinds:
        for match in SPELLINGS[kind].finditer(name):
            if match.end() == len(name):
                module = name[: match.start()].removeprefix(PREFIX)
                return check_module(file, module), kind, match.groupdict().get("adapter")
    raise _refusal(file, name)


def check_module(file: TensorFile, module: str) -> str:
    """The name, if it is one that a model's module can have. Raises FileFormatError."""
    if not _MODULE.fullmatch(module):
        raise file.wrong(f"module name {module[:80]!r}", "parts of [A-Za-z0-9_-] between dots")
    return module


def _refusal(file: TensorFile, name: str) -> Exception:
    for part, what, way_out in FOREIGN:
        if part in name:
            return InputError(f"{file.source}: found {name!r}, {what}; {way_out}")
    return FileFormatError(file.source, f"a tensor {name!r}", "an adapter's tensors alone")


def in_model_order(modules: Mapping[str, object]) -> list[str]:
    """Names sorted by their numbers as numbers, and within a block as models compute them.

    Projections that read the same input become neighbours, which engines multiply at once.
    """
    return sorted(modules, key=_order)


PEERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _order(module: str) -> tuple[tuple[int, int, str], ...]:
    parts = []
    for part in module.split("."):
        if part.isdecimal():
            parts.append((0, int(part), ""))
        else:
            parts.append((1, PEERS.index(part) if part in PEERS else len(PEERS), part))
    return tuple(parts)
