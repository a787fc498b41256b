"""The request field `adapter`: a name, a blend of named adapters, or an adapter file inline."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from lorasb_server.schemas.strict import Strict

MAX_PARTS = 16
MAX_WEIGHT = 100


class BlendPart(Strict):
    """Weights are taken as they are, never normalised."""

    name: str
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = 1.0


class InlineAdapter(Strict):
    """An adapter file's bytes in base64 (RFC 4648's standard alphabet, padded)."""

    inline: str


def _kind(value: object) -> str | None:
    """Which form the field takes, so that one form is checked only."""
    match value:
        case str():
            return "<text>"
        case list():
            return "<list>"
        case dict() | InlineAdapter():
            return "<object>"
        case _:
            return None


AdapterField = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[
        list[BlendPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")
    ]
    | Annotated[InlineAdapter, Tag("<object>")],
    Discriminator(
        _kind,
        "adapter",
        'Input should be a name, a list of {"name", "weight"}, or {"inline": base64 of a file}',
    ),
]
