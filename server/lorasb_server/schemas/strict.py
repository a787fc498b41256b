"""What all bodies are made of: models without coercion, and values that can be sent back."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """No coercion and no unknown field."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Input should be valid Unicode text") from None
    return text


def _encodable_object(value: dict[str, Any]) -> dict[str, Any]:
    """Python's parser takes numbers too that JSON does not have."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise PydanticCustomError(
            "not_json", "Input should be JSON with valid Unicode text and finite numbers"
        ) from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_encodable_object)]
