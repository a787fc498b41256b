"""How each family of models writes a tool call; which one a model is of, its template tells."""

import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolFormat:
    """A call is a JSON object with "name" and "arguments" (or "parameters").

    markers: what announces calls within text. closing: what may follow a call. bare: an answer
    that begins with such an object is a call, without a marker. name_first: a marker may also be
    followed by name[ARGS] and the arguments alone. id_length: of the ids of calls.
    """

    name: str
    markers: tuple[str, ...] = ()
    closing: str = ""
    bare: bool = False
    name_first: bool = False
    id_length: int = 24
    id_prefix: str = "call_"

    def new_id(self) -> str:
        return f"{self.id_prefix}{uuid.uuid4().hex[: self.id_length]}"


HERMES = ToolFormat("hermes", ("<tool_call>",), "</tool_call>")
LLAMA = ToolFormat("llama", ("<|python_tag|>",), bare=True)
# Mistral's templates refuse other ids than nine letters and digits.
MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]",), name_first=True, id_length=9, id_prefix="")
FORCED = ToolFormat("forced", bare=True)

# The first whose sign the chat template holds. Qwen, Hermes, SmolLM3 and many others are of the
# first kind; Llama 3.1 to 3.3 name the role of a tool's answer "ipython".
SIGNS = (("<tool_call>", HERMES), ("[TOOL_CALLS]", MISTRAL), ("ipython", LLAMA))


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, None for one that is not known."""
    return next((found for sign, found in SIGNS if sign in template), None)
