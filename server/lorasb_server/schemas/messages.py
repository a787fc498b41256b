"""The turns of a conversation in chat requests, one form for each role, as OpenAI has them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from lorasb_server.schemas.sampling import TEXT_OR_LIST
from lorasb_server.schemas.strict import Strict, Text
from lorasb_server.schemas.tools import ToolCall


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    """What the assistant said instead of an answer, in an earlier turn."""

    type: Literal["refusal"]
    refusal: Text


Texts = Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
Parts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]],
    Field(min_length=1, fail_fast=True),
]
Content = Annotated[Annotated[Text, Tag("<text>")] | Annotated[Texts, Tag("<list>")], TEXT_OR_LIST]
AssistantContent = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Parts, Tag("<list>")], TEXT_OR_LIST
]


def _joined(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(p.text if isinstance(p, TextPart) else p.refusal for p in content)


class TextMessage(Strict):
    """What the operator or the user says; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Text | None = None

    def as_template_input(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        turn = {"role": role, "content": _joined(self.content)}
        return turn | ({"name": self.name} if self.name else {})


class AssistantMessage(Strict):
    """An earlier answer; content may be missing beside tool_calls or a refusal alone.

    The fields that can only be null are those of answers that no text model gives.
    """

    role: Literal["assistant"]
    content: AssistantContent | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    refusal: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not (self.tool_calls or self.refusal):
            raise PydanticCustomError("content", "content: missing")
        return self

    def as_template_input(self) -> dict[str, Any]:
        text = self.refusal or "" if self.content is None else _joined(self.content)
        turn: dict[str, Any] = {"role": self.role, "content": text}
        if self.name:
            turn["name"] = self.name
        if self.tool_calls:
            turn["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        return turn


class ToolMessage(Strict):
    """What a call that the assistant made has given."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: Text | None = None

    def as_template_input(self) -> dict[str, Any]:
        turn = {"role": self.role, "content": _joined(self.content)}
        turn["tool_call_id"] = self.tool_call_id
        return turn | ({"name": self.name} if self.name else {})


ROLES = {"system": "<text message>", "developer": "<text message>", "user": "<text message>"}
ROLES |= {"assistant": "<assistant>", "tool": "<tool>"}


def _form(value: object) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return ROLES.get(role) if isinstance(role, str) else None


Message = Annotated[
    Annotated[TextMessage, Tag("<text message>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(_form, "message", f"Input should be an object whose role is one of {[*ROLES]}"),
]
