"""Body of POST /v1/chat/completions."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from lorasb_runtime.engines.base import SamplingParams
from lorasb_server.errors import FieldError
from lorasb_server.schemas.sampling import TEXT_OR_LIST, SamplingFields
from lorasb_server.schemas.strict import Strict, Text

MAX_TOP_LOGPROBS = 20


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[TextPart], Field(fail_fast=True), Tag("<list>")],
        TEXT_OR_LIST,
    ]

    def as_template_input(self) -> dict[str, Any]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

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
