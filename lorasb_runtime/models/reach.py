"""How far back a model's layers see and how long its context is, from its configuration alone."""

from transformers import PretrainedConfig

from lorasb_runtime.errors import InputError


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """Per layer how many positions each one sees, its own included; None: all of the context.

    Raises InputError for a layer that is neither full nor sliding-window attention.
    """
    text = config.get_text_config()
    window = _effective(getattr(text, "sliding_window", None), config)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [window] * int(text.num_hidden_layers)
    for layer, kind in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(
                f"layer {layer}: found {kind}, expected full_attention or sliding_attention"
            )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def check_windows(config: PretrainedConfig, asked: dict[int, int | None]) -> None:
    """Compare with the configuration what window each layer asked of our attention.

    Raises InputError where they differ: the model's own attention then has the window from a
    mask, or is not ours at all, which a prompt shorter than the window does not show.
    """
    for layer, expected in enumerate(layer_windows(config)):
        if layer not in asked:
            raise InputError(f"layer {layer}: found an attention of its own, expected ours")
        found = _effective(asked[layer], config)
        if found != expected:
            raise InputError(f"layer {layer}: found {_sees(found)}, expected {_sees(expected)}")


def _effective(window: int | None, config: PretrainedConfig) -> int | None:
    """`window`, or None where it covers the whole context anyway."""
    return None if window is None or window >= context_length(config) else int(window)


def _sees(window: int | None) -> str:
    return "attention to all positions" if window is None else f"a window of {window} positions"


def context_length(config: PretrainedConfig) -> int:
    """The longest context in which a token's position embedding depends on nothing but its place.

    Beyond its original length a "longrope" model turns all positions at other frequencies, also
    those whose keys are cached and those of a batch's shorter sequences.
    """
    text = config.get_text_config()
    length = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(p for p in rope.values() if isinstance(p, dict))):
        if parameters.get("rope_type") == "longrope":
            length = min(length, int(parameters["original_max_position_embeddings"]))
    return length
