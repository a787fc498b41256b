"""Body of POST /v1/completions."""

from dataclasses import replace
from typing import Annotated

from pydantic import Discriminator, Field, Tag

from lorasb_runtime.engines.base import SamplingParams
from lorasb_server.errors import FieldError
from lorasb_server.schemas.sampling import SamplingFields, TokenId
from lorasb_server.schemas.strict import Text

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 5
MAX_PROMPTS = 256

TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Many = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)


def _prompt_kind(value: object) -> str | None:
    """Which of the four forms a prompt takes, by its first entry: so one form is checked only."""
    match value:
        case str():
            return "<text>"
        case [str(), *_]:
            return "<texts>"
        case [list(), *_]:
            return "<token lists>"
        case [_, *_]:
            return "<tokens>"
        case _:
            return None


class CompletionRequest(SamplingFields):
    prompt: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[Text], Many, Tag("<texts>")]
        | Annotated[TokenIds, Tag("<tokens>")]
        | Annotated[list[TokenIds], Many, Tag("<token lists>")],
        Discriminator(
            _prompt_kind, "prompt", "Input should be text, token ids, or a non-empty list of either"
        ),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself, as text or token ids."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[token for token in self.prompt if isinstance(token, int)]]
            case _:
                return [p for p in self.prompt if not isinstance(p, int)]

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to be generated: the answer is the echoed prompt, scored."""
        return self.max_tokens == 0

    @property
    def echoes_logprobs(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    def parameters(self) -> SamplingParams:
        """Of a request that generates nothing, one token is drawn and dropped.

        Raises FieldError for fields that are known but not supported, or contradict each other.
        """
        if self.suffix is not None:
            raise FieldError("suffix", "suffix: this field is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise FieldError("best_of", "best_of: only the value of n is supported")
        if self.prompt_only and not self.echo:
            raise FieldError("max_tokens", "max_tokens: found 0, which only goes with echo")
        if self.echoes_logprobs and self.prompt_logprobs is not None:
            raise FieldError(
                "prompt_logprobs", "prompt_logprobs: not allowed with echo and logprobs"
            )
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params = self.sampling(max_tokens=limit, logprobs=self.logprobs)
        if self.echoes_logprobs:
            params = replace(params, prompt_logprobs=self.logprobs)
        return replace(params, max_tokens=1) if self.prompt_only else params
