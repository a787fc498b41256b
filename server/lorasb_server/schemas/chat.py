"""Body of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lorasb_runtime.engines.base import SamplingParams
from lorasb_server.errors import FieldError
from lorasb_server.schemas.messages import Message
from lorasb_server.schemas.sampling import Metadata, SamplingFields
from lorasb_server.schemas.strict import JsonObject, Text
from lorasb_server.schemas.tools import ToolFields

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
