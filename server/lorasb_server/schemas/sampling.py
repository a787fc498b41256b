"""The fields that generation endpoints share, and the one way they become parameters."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag

from lorasb_runtime.engines.base import Grammar, SamplingParams
from lorasb_server.errors import FieldError
from lorasb_server.schemas.adapter import AdapterField
from lorasb_server.schemas.strict import JsonObject, Strict, Text

MAX_STOPS = 16
MAX_BIASES = 4096
MAX_TOKEN_DIGITS = 10
MAX_CHOICES = 1024
MAX_PROMPT_LOGPROBS = 20
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')

T = TypeVar("T")


def _text_or_list(value: object) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Stop = Annotated[Text, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TEXT_OR_LIST = Discriminator(_text_or_list, "text_or_list", "Input should be a string or a list")


Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=16),
]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    """`strict` changes nothing: the schema is always kept to."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Strict):
    """vLLM's field: exactly one of these."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Annotated[list[Stop], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None

    def as_grammar(self) -> Grammar:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise FieldError(
                "structured_outputs",
                f"structured_outputs: found {len(given)} of json, regex, choice, grammar and "
                "json_object, expected one",
            )
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            return Grammar("json_schema", text)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        return Grammar("lark", self.grammar) if self.grammar is not None else ANY_OBJECT


class CommonFields(Strict):
    """What all generation endpoints take: OpenAI's and vLLM's sampling fields, and `adapter`."""

    model: str
    adapter: AdapterField | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[Stop, Tag("<text>")]
            | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
            TEXT_OR_LIST,
        ]
        | None
    ) = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)]
        | None
    ) = None
    user: Text | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class SamplingFields(CommonFields):
    """What chat and completions have in common besides."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_PROMPT_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage; refuses the option without a stream."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options: only allowed with stream")
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_grammar(self) -> bool:
        return self._grammar() is not None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's parameters; null fields take OpenAI's defaults.

        Raises FieldError for a min_tokens over max_tokens and for a logit_bias key that is no
        token id.
        """
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs", "prompt_logprobs: not allowed with stream")
        minimum = self.min_tokens or 0
        if max_tokens is not None and minimum > max_tokens:
            raise FieldError("min_tokens", f"min_tokens: found {minimum}, over max_tokens")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            temperature=_default(self.temperature, 1.0),
            top_p=_default(self.top_p, 1.0),
            top_k=max(0, _default(self.top_k, 0)),
            min_p=_default(self.min_p, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            logit_bias={_token_id(key): bias for key, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=minimum,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            skip_special_tokens=_default(self.skip_special_tokens, True),
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            grammar=self._grammar(),
        )

    def _grammar(self) -> Grammar | None:
        form = self.response_format
        if self.structured_outputs is not None:
            if form is not None and not isinstance(form, TextFormat):
                raise FieldError(
                    "structured_outputs", "structured_outputs: not allowed with response_format"
                )
            return self.structured_outputs.as_grammar()
        if isinstance(form, JsonSchemaFormat):
            schema = form.json_schema.schema_
            return ANY_OBJECT if schema is None else Grammar("json_schema", json.dumps(schema))
        return ANY_OBJECT if isinstance(form, JsonObjectFormat) else None


def _default(value: T | None, default: T) -> T:
    return default if value is None else value


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_DIGITS):
        raise FieldError("logit_bias", f"logit_bias: found key {key[:80]!r}, expected a token id")
    return int(key)
