"""Body of POST /v1/responses, and the chat request that means the same."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from lorasb_server.errors import FieldError
from lorasb_server.schemas.chat import MAX_TOP_LOGPROBS, ChatRequest
from lorasb_server.schemas.messages import AssistantMessage, Message, TextMessage
from lorasb_server.schemas.sampling import (
    TEXT_OR_LIST,
    CommonFields,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    Metadata,
    ResponseFormat,
    TextFormat,
)
from lorasb_server.schemas.strict import JsonObject, Strict, Text

# The chat request's names for what this one calls otherwise.
RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
STATELESS = "this server keeps no responses; send the whole conversation as input"

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Strict):
    type: Literal["input_text"]
    text: Text


class OutputText(Strict):
    """What an earlier response said; its log-probabilities mean nothing to the model."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[dict[str, Any]] | None = None


ContentPart = Annotated[InputText | OutputText, Field(discriminator="type")]


class InputMessage(Strict):
    """A turn, in the short form or as an output item of an earlier response."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<list>")],
        TEXT_OR_LIST,
    ]
    id: str | None = None
    status: ItemStatus | None = None
    phase: None = None

    def as_chat(self) -> Message:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        if self.role == "assistant":
            return AssistantMessage(role=self.role, content=text)
        return TextMessage(role=self.role, content=text)


InputItem = InputMessage


class TextJsonSchema(JsonSchema):
    """Chat's `json_schema` without the nesting."""

    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class TextConfig(Strict):
    format: (
        Annotated[TextFormat | JsonObjectFormat | TextJsonSchema, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Literal["medium"] | None = None

    def as_chat(self) -> ResponseFormat | None:
        if isinstance(self.format, TextJsonSchema):
            return JsonSchemaFormat(type="json_schema", json_schema=self.format)
        return self.format


class ResponseStreamOptions(Strict):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(CommonFields):
    """Of a field with one allowed value, nothing else is supported."""

    input: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("<list>")],
        TEXT_OR_LIST,
    ]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextConfig | None = None
    metadata: Metadata | None = None
    stream_options: ResponseStreamOptions | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    store: bool | None = None
    previous_response_id: Any = None
    conversation: Any = None
    tools: None = None
    tool_choice: None = None
    prompt: None = None
    reasoning: None = None
    max_tool_calls: None = None
    context_management: None = None
    moderation: None = None

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.include)

    def as_chat(self) -> ChatRequest:
        """Raises FieldError for what needs kept state and for fields that contradict others."""
        self._refuse()
        common = {name: getattr(self, name) for name in CommonFields.model_fields}
        return ChatRequest(
            **{**common, "stream": None},
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
            response_format=self.text.as_chat() if self.text else None,
        )

    def _messages(self) -> list[Message]:
        said: list[Message] = []
        if self.instructions is not None:
            said.append(TextMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*said, TextMessage(role="user", content=self.input)]
        return said + [item.as_chat() for item in self.input]

    def _refuse(self) -> None:
        if self.store:
            raise FieldError("store", f"store: found true, expected false: {STATELESS}")
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise FieldError(name, f"{name}: {STATELESS}")
        if self.top_logprobs and not self.wants_logprobs:
            raise FieldError(
                "top_logprobs",
                "top_logprobs: only allowed with include message.output_text.logprobs",
            )
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options: only allowed with stream")


def renamed(error: FieldError) -> FieldError:
    """An error about the chat request as one about the fields that the caller knows."""
    param = RENAMED.get(error.param or "", error.param)
    words = r"\b(" + "|".join(RENAMED) + r")\b"
    message = re.sub(words, lambda match: RENAMED[match[0]], str(error))
    return FieldError(param, message, error.code)
