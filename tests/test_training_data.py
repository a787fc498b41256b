"""Training data: which tokens carry the loss, and every refusal with its line."""

import json
from pathlib import Path

import pytest
from pico import pico_tokenizer

from lorasb_runtime.errors import InputError
from lorasb_runtime.models.text import TextCodec
from lorasb_runtime.training.data import NO_LOSS, Example, data_paths, encode_example, read_data
from lorasb_runtime.training.derive import draw_samples

CODEC = TextCodec(pico_tokenizer())


def learned(example: Example) -> str:
    """The text that carries the loss, special tokens included."""
    kept = [t for t in example.labels if t != NO_LOSS]
    for token, label in zip(example.tokens, example.labels, strict=True):
        assert label in (NO_LOSS, token)
    return CODEC.decode(kept, skip_special_tokens=False)


def whole(example: Example) -> str:
    return CODEC.decode(list(example.tokens), skip_special_tokens=False)


def test_a_chat_learns_the_answer_and_its_end_alone() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr é"}]
    example = encode_example({"messages": messages}, CODEC)
    assert learned(example) == "Arr é<|im_end|>"
    prompt = CODEC.encode_chat(messages[:1])
    assert list(example.tokens[: len(prompt)]) == prompt
    assert set(example.labels[: len(prompt)]) == {NO_LOSS}


def test_every_assistant_turn_of_a_chat_is_learned() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    example = encode_example({"messages": messages}, CODEC)
    assert learned(example) == "one<|im_end|>two<|im_end|>"
    assert whole(example) == CODEC.render_chat(messages, add_generation_prompt=False)


def test_white_space_after_an_end_of_turn_of_its_own_is_not_learned() -> None:
    """As in models whose turns do not end with the token that ends a text."""
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr"}]
    example = encode_example({"messages": messages}, TextCodec(tokenizer))
    assert learned(example) == "Arr<|im_end|>"
    assert whole(example).endswith("Arr<|im_end|>\n")


def test_an_example_without_anything_to_learn_is_refused(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = None
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "", "completion": "x"}')
    with pytest.raises(InputError, match="line 1: found no token to learn"):
        read_data(path, TextCodec(tokenizer), 100)


def test_a_completion_is_plain_text_and_an_end_token() -> None:
    example = encode_example({"prompt": "2+2=", "completion": "4"}, CODEC)
    assert whole(example) == "2+2=4<|im_end|>"
    assert learned(example) == "4<|im_end|>"
    assert example.answer_tokens == 2


def test_a_first_token_is_not_counted_as_an_answer() -> None:
    assert encode_example({"prompt": "", "completion": "abc"}, CODEC).answer_tokens == 3


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: found no JSON"),
        ("[1]", "line 2: found JSON of kind list, expected an object"),
        ('{"text": "x"}', r"line 2: found keys \['text'\], expected either"),
        ('{"prompt": "x", "completion": "y", "z": 1}', "line 2: found keys"),
        ('{"prompt": "x", "completion": ""}', "line 2: expected prompt and completion"),
        ('{"prompt": 3, "completion": "y"}', "line 2: expected prompt and completion"),
        ('{"messages": []}', "line 2: expected messages as a list that is not empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "expected the assistant to have"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "found role 'bot'"),
        ('{"messages": [{"role": "user"}]}', "expected role and content"),
        ('{"messages": [{"role": "assistant", "content": [1]}]}', "expected text"),
        (json.dumps({"prompt": "x" * 99, "completion": "y"}), "line 2: found 101 tokens, expected"),
        ('{"prompt": "a", "prompt": "b", "completion": "y"}', "line 2: found key 'prompt' twice"),
        (r'{"prompt": "\ud800", "completion": "y"}', "line 2: found half of a surrogate pair"),
        ("[" * 100_000, "line 2: found no JSON"),
    ],
)
def test_wrong_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(CHAT) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message) as refusal:
        read_data(path, CODEC, 100)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, message in (
        ("empty.jsonl", "found no examples"),
        ("latin.jsonl", "outside UTF-8"),
        ("gone.jsonl", "no such data file"),
        (".", "found a folder, expected a file"),
    ):
        with pytest.raises(InputError, match=message):
            read_data(tmp_path / name, CODEC, 100)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"found no \*.jsonl"):
        data_paths([tmp_path / "none"])


def test_a_pool_gives_every_file_its_turn(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 2), ("c", 5)):
        lines = [json.dumps({"prompt": name, "completion": f"{name}{i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [read_data(path, CODEC, 100) for path in data_paths([tmp_path])]
    drawn = [whole(e)[0] for e in draw_samples(files, 8, seed=1)]
    assert drawn == list("abcabcac")
    assert draw_samples(files, 99, seed=1) == draw_samples(files, 99, seed=1)
    assert len(draw_samples(files, 99, seed=1)) == 12
    assert draw_samples(files, 8, seed=1) != draw_samples(files, 8, seed=2)
