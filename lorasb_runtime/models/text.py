"""Text to tokens and back: encoding, the chat template, and decoding one token at a time."""

import re
from typing import Any

from lorasb_runtime.errors import InputError

WINDOW = 16  # tokens that are decoded together, to know what one more adds
REPLACEMENT = "\ufffd"  # what a decoder writes for an unfinished multi-byte character


class TextCodec:
    """A model's transformers tokenizer, behind the few verbs that engines and server use."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; with `special_tokens` the tokenizer's default ones are added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens)
        return ids

    @property
    def chat_template(self) -> str:
        """The source of the model's chat template, of the one for tools where there are several."""
        template = self.tokenizer.chat_template or ""
        if isinstance(template, dict):
            template = template.get("tool_use") or template.get("default") or ""
        return str(template)

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template writes out the tools that it is given."""
        return re.search(r"\btools\b", self.chat_template) is not None

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the tokens that `skip_special_tokens` leaves out."""
        return frozenset(self.tokenizer.all_special_tokens)

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the answer.

        options: those of `render_chat`. Raises InputError as it does.
        """
        return self.encode(self.render_chat(messages, **options), special_tokens=False)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """A conversation's text in the model's chat template.

        tools: as transformers' `apply_chat_template` takes them, and options besides. Raises
        InputError when the model has no template or the template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise InputError("this model has no chat template; use plain prompts instead")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except Exception as error:  # Jinja templates raise whatever their authors chose
            raise InputError(f"the chat template refuses these messages: {error}") from None
        return text

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, spaces left as they are."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> str:
        """One token's text by itself, special tokens included.

        A token that is part of a character only is spelled as the vocabulary does.
        """
        text = self.decode([token], skip_special_tokens=False)
        if REPLACEMENT not in text:
            return text
        return str(self.tokenizer.convert_ids_to_tokens(token))

    @property
    def eos_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    def incremental(self, *, skip_special_tokens: bool = True) -> "IncrementalDecoder":
        return IncrementalDecoder(self, skip_special_tokens)


class IncrementalDecoder:
    """Turns tokens into text as they come; never gives out half of a multi-byte character.

    Decodes the last tokens together with the new one, and gives out what that adds to their text:
    tokenizers that put a space before a word need the tokens before it.
    """

    def __init__(self, codec: TextCodec, skip_special_tokens: bool) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._given = 0  # tokens of the window whose text has been given out
        self._text = ""  # of these

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; empty while a character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is left at the end of the sequence, an unfinished character included."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        """Give out what `text`, the whole window's, has more than was given."""
        added = text[len(self._text) :]
        if len(self._window) > WINDOW:
            self._window = self._window[self._given :]
            text = self._decode(self._window)
        self._given, self._text = len(self._window), text
        return added

    def _decode(self, ids: list[int]) -> str:
        return self._codec.decode(ids, skip_special_tokens=self._skip)
