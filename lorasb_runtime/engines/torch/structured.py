"""Structured output: which tokens a grammar allows next, by llguidance."""

import json
import threading
from typing import Any

import torch

from lorasb_runtime.engines.base import Grammar
from lorasb_runtime.errors import InputError
from lorasb_runtime.models.text import TextCodec

# One line of JSON, with a space after separators or none: where white space is free, small models
# can go on with it for ever.
JSON_FORM: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
}


class GrammarMatcher:
    """How far one sequence has come in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> "GrammarMatcher":
        return GrammarMatcher(self._matcher.deep_copy())

    @property
    def finished(self) -> bool:
        """Whether nothing can follow any more but an end token."""
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    def allowed(self, vocab: int) -> torch.Tensor:
        """Bool [vocab]: the tokens that may come next, end tokens where the text may end."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        bits = allocate_token_bitmask(1, vocab)
        fill_next_token_bitmask(self._matcher, bits, 0)
        words = torch.from_numpy(bits)[0]
        return ((words[:, None] >> torch.arange(32)) & 1).view(-1)[:vocab].bool()


class GrammarCompiler:
    """Compiles grammars for one tokenizer; safe to call from many threads."""

    def __init__(self, codec: TextCodec, vocab_size: int, eos: frozenset[int]) -> None:
        self._codec = codec
        self._vocab_size = vocab_size
        self._eos = sorted(eos)
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def compile(self, grammar: Grammar) -> GrammarMatcher:
        """Takes a second the first time. Raises InputError for a grammar that is none."""
        from llguidance import LLMatcher

        tokenizer = self._ready_tokenizer()
        try:
            source = _source(grammar)
        except ValueError as error:
            raise _refusal(grammar, str(error)) from None
        matcher = LLMatcher(tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _refusal(grammar, matcher.get_error())
        return GrammarMatcher(matcher)

    def _ready_tokenizer(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._tokenizer is None:
                if not self._eos:
                    raise InputError("structured output: this model has no end token")
                try:
                    self._tokenizer = from_tokenizer(
                        self._codec.tokenizer, self._vocab_size, self._eos
                    )
                except Exception as error:  # the library raises whatever its parser does
                    reason = " ".join(str(error).split())[:200]
                    raise InputError(
                        f"structured output: not available with this tokenizer ({reason})"
                    ) from None
            return self._tokenizer


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, JSON_FORM)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "choice":
        options = " | ".join(json.dumps(option) for option in json.loads(grammar.text))
        return LLMatcher.grammar_from_lark(f"start: {options}")
    return LLMatcher.grammar_from_lark(grammar.text)


def _refusal(grammar: Grammar, reason: str) -> InputError:
    first = next((line for line in reason.splitlines() if line.strip()), "no reason given")
    return InputError(f"{grammar.kind}: found one that cannot be used ({first.strip()[:200]})")
