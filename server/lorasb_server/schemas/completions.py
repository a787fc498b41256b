"""Body of POST /v1/completions."""

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

    def parameters(self) -> SamplingParams:
        """Raises FieldError for fields that are known but not supported."""
        if self.echo:
            raise FieldError("echo", "echo: this field is not supported")
        if self.suffix is not None:
            raise FieldError("suffix", "suffix: this field is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise FieldError("best_of", "best_of: only the value of n is supported")
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling(max_tokens=limit, logprobs=self.logprobs)
