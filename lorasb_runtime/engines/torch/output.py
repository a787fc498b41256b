"""From a sequence's tokens to its chunks: text, stop strings, and how it ends. Pure Python."""

from lorasb_runtime.engines.base import Chunk, FinishReason, TokenLogprob
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.models.text import TextCodec


class SequenceOutput:
    """Decodes one sequence as it grows; text that may become a stop string is held back."""

    def __init__(self, sequence: Sequence, codec: TextCodec, eos: frozenset[int]) -> None:
        params = sequence.sampling
        self._sequence = sequence
        self._decoder = codec.incremental(skip_special_tokens=params.skip_special_tokens)
        # A grammar lets an end token come only where its text may end, so it always counts.
        ignored = params.ignore_eos and sequence.matcher is None
        self._eos = frozenset() if ignored else eos
        self._held = ""

    def push(self, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Chunk:
        """The chunk for one more token, which the sequence already holds."""
        sequence = self._sequence
        ended, stop_reason = self._ends(token)
        if not ended:
            self._held += self._decoder.push(token)
        reason: FinishReason | None = None
        if ended or (sequence.matcher is not None and sequence.matcher.finished):
            reason = "stop"
        elif len(sequence.tokens) >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._held += self._decoder.flush()
        text, stop = self._release(final=reason is not None)
        if stop is not None:
            reason, stop_reason = "stop", stop
        first = sequence.generated == 1
        shows_prompt = first and sequence.index == 0
        return Chunk(
            sequence.index,
            text,
            (token,),
            logprobs,
            reason,
            stop_reason,
            cached_tokens=(sequence.cached or 0) if shows_prompt else 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if shows_prompt else (),
            queue_seconds=sequence.waited if first else None,
        )

    def _ends(self, token: int) -> tuple[bool, str | int | None]:
        """Whether the token is an end or stop token, which has no text, and which stop token."""
        sequence = self._sequence
        if sequence.matcher is None and sequence.generated <= sequence.sampling.min_tokens:
            return False, None
        if token in sequence.sampling.stop_token_ids:
            return True, token
        return token in self._eos, None

    def _release(self, *, final: bool) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that it ran into, if any."""
        stops = self._sequence.sampling.stop
        if self._sequence.generated > self._sequence.sampling.min_tokens:
            found = [(self._held.find(stop), stop) for stop in stops if stop in self._held]
            if found:
                at, stop = min(found, key=lambda pair: pair[0])
                return self._held[:at], stop
        keep = 0 if final else max((_overlap(self._held, stop) for stop in stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that starts `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
