"""What the routes answer, for the OpenAPI document; fields that are not named here may be added."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorObject(Answer):
    """`param` names the request's field, `code` a kind of error where there is one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """OpenAI's error object, which every failure has."""

    error: ErrorObject


class CachedTokens(Answer):
    cached_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ShownToken(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(ShownToken):
    top_logprobs: list[ShownToken]


class ChatLogprobs(Answer):
    content: list[ChosenToken]


class ChatMessage(Answer):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class OutputItem(Answer):
    """A message, with its text in `content`."""

    id: str
    type: str
    status: Literal["in_progress", "completed", "incomplete"]


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    total_tokens: int


class ResponseAnswer(Answer):
    """OpenAI's response object."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None


class ModelCard(Answer):
    """`parent` is the base model's name for an adapter, null for the base model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class AdapterVersion(Answer):
    version: str
    bytes: int
    modified: str | None
    current: bool


class AdapterVersions(Answer):
    object: Literal["list"]
    data: list[AdapterVersion]


class AdapterCard(AdapterVersion):
    """Its current version."""

    name: str
    versions: int | None = Field(
        description="How many versions the store has; null where it cannot be listed."
    )


class AdapterWithBasis(AdapterCard):
    basis: str


class AdapterList(Answer):
    object: Literal["list"]
    basis: str
    data: list[AdapterCard]


class Published(Answer):
    name: str
    version: str
    previous: str | None
    basis: str
    bytes: int


class RolledBack(Answer):
    name: str
    version: str


class Deleted(Answer):
    name: str
    deleted: Literal[True]


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(Answer):
    prompt: str


class Status(Answer):
    status: str
