"""What all bodies are made of: models without coercion, and text that can be encoded."""

from typing import Annotated

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


Text = Annotated[str, AfterValidator(_encodable)]
