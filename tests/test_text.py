"""Decoding token by token gives the text of all tokens, whatever the window has let go."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorasb_runtime.models.load import load_tokenizer
from lorasb_runtime.models.text import REPLACEMENT, WINDOW, TextCodec


@pytest.fixture(scope="module")
def codec(pico: Path) -> TextCodec:
    return TextCodec(load_tokenizer(pico))


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=120))
@example(text="naïve 日本語 🙂🙂 " * (2 * WINDOW))
def test_pieces_add_up_to_the_text(codec: TextCodec, text: str) -> None:
    tokens = codec.encode(text, special_tokens=False)
    decoder = codec.incremental(skip_special_tokens=False)
    pieces = [decoder.push(token) for token in tokens]
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces) or REPLACEMENT in text
    assert "".join(pieces) + decoder.flush() == codec.decode(tokens, skip_special_tokens=False)
