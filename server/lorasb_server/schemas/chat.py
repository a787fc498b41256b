"""Body of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from lorasb_runtime.engines.base import SamplingParams
from lorasb_server.errors import FieldError
from lorasb_server.schemas.sampling import TEXT_OR_LIST, Metadata, SamplingFields
from lorasb_server.schemas.strict import JsonObject, Strict, Text
from lorasb_server.schemas.tools import ToolCall, ToolFields

MAX_TOP_LOGPROBS = 20
# Arguments of the template that other fields or the server itself set.
RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "messages",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
    "truncation",
}


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class RefusalPart(Strict):
    """What the assistant said instead of an answer, in an earlier turn."""

    type: Literal["refusal"]
    refusal: Text


ContentPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
# What a message of each role has besides role, content and name.
ROLE_FIELDS = {"assistant": {"tool_calls", "refusal"}, "tool": {"tool_call_id"}}


class Message(Strict):
    """A turn; `developer` is what newer clients call `system`.

    Content may be missing beside tool_calls or a refusal alone; a tool's answer names its call.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[Text, Tag("<text>")]
            | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<list>")],
            TEXT_OR_LIST,
        ]
        | None
    ) = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        given = {f for f in ("tool_calls", "tool_call_id", "refusal") if getattr(self, f)}
        wrong = sorted(given - ROLE_FIELDS.get(self.role, set()))
        if wrong:
            raise PydanticCustomError("role", f"{wrong[0]}: not allowed with role {self.role}")
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("role", "tool_call_id: missing in a message of role tool")
        if self.content is None and not given & {"tool_calls", "refusal"}:
            raise PydanticCustomError("role", "content: missing")
        return self

    def as_template_input(self) -> dict[str, Any]:
        text = self.content
        if text is None:
            text = self.refusal or ""
        elif not isinstance(text, str):
            text = "".join(p.text if isinstance(p, TextPart) else p.refusal for p in text)
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": text}
        turn |= {f: getattr(self, f) for f in ("name", "tool_call_id") if getattr(self, f)}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        return turn


class ChatRequest(SamplingFields, ToolFields):
    """Of a field with one allowed value, nothing else is supported.

    add_generation_prompt, continue_final_message and chat_template_kwargs are vLLM's.
    """

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    metadata: Metadata | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None
    verbosity: Literal["medium"] | None = None

    @property
    def limit_field(self) -> str | None:
        """The field that limits the answer's length, where one does."""
        fields = ("max_tokens", "max_completion_tokens")
        return next((name for name in fields if getattr(self, name) is not None), None)

    def template_input(self) -> list[dict[str, Any]]:
        return [message.as_template_input() for message in self.messages]

    def parameters(self) -> SamplingParams:
        """Raises FieldError for fields that contradict each other."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise FieldError(
                "max_tokens", "max_tokens: differs from max_completion_tokens; give one of them"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs: only allowed with logprobs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=next(iter(limits), None), logprobs=logprobs)

    def template_options(self) -> dict[str, Any]:
        """How the chat template is filled in. Raises FieldError for options that contradict."""
        own = sorted(set(self.chat_template_kwargs or {}) & RESERVED)
        if own:
            raise FieldError(
                "chat_template_kwargs", f"chat_template_kwargs: {own[0]} has a field of its own"
            )
        options: dict[str, Any] = dict(self.chat_template_kwargs or {})
        options["add_generation_prompt"] = self.add_generation_prompt is not False
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise FieldError(
                    "continue_final_message",
                    "continue_final_message: not allowed with add_generation_prompt",
                )
            if self.messages[-1].role != "assistant":
                raise FieldError(
                    "continue_final_message",
                    "continue_final_message: expected the last message to be the assistant's",
                )
            options |= {"add_generation_prompt": False, "continue_final_message": True}
        return options
