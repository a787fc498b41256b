"""Training data: JSON lines of chats or prompts, as token ids and labels.

{"messages": [...]} goes through the model's chat template, with the loss on the assistant's
tokens; {"prompt": ..., "completion": ...} is plain text with the loss on the completion.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_runtime.errors import InputError, NotFoundError
from lorasb_runtime.models.text import TextCodec

NO_LOSS = -100  # what torch's cross-entropy ignores
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """tokens and labels of one length; labels are NO_LOSS where no loss is taken."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss (the first has nothing before it to be predicted from)."""
        return sum(label != NO_LOSS for label in self.labels[1:])


@dataclass(frozen=True)
class DataFile:
    """The examples of one file, and the digest of its bytes."""

    name: str
    digest: str
    examples: tuple[Example, ...]


def data_paths(paths: list[Path]) -> list[Path]:
    """The files that `paths` name; a folder stands for its *.jsonl files in order of name."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise NotFoundError(f"{path}: found no *.jsonl file in this folder")
        found.extend(inside)
    return found


def read_data(path: Path, codec: TextCodec, max_length: int) -> DataFile:
    """Read a file whole. Raises InputError naming the file and the line that is wrong."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such data file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder, expected a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found byte {error.start} outside UTF-8") from None
    examples = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            example = encode_example(_parse_line(line), codec)
            if len(example.tokens) > max_length:
                raise InputError(
                    f"found {len(example.tokens)} tokens, expected at most {max_length} "
                    "(--max-length)"
                )
            if not example.answer_tokens:
                raise InputError("found no token to learn, expected an answer")
        except InputError as error:
            raise InputError(f"{path} line {number}: {error}") from None
        examples.append(example)
    if not examples:
        raise InputError(f"{path}: found no examples, expected JSON lines")
    return DataFile(path.name, f"sha256:{hashlib.sha256(data).hexdigest()}", tuple(examples))


def encode_example(record: dict[str, Any], codec: TextCodec) -> Example:
    """Tokens and labels of one record. Raises InputError for a record of another form."""
    if set(record) == {"messages"}:
        return _encode_chat(record["messages"], codec)
    if set(record) == {"prompt", "completion"}:
        return _encode_completion(record["prompt"], record["completion"], codec)
    raise InputError(
        f"found keys {sorted(record)}, expected either messages, or prompt and completion"
    )


def _parse_line(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_object)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("found half of a surrogate pair, expected Unicode text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"found no JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"found JSON of kind {type(record).__name__}, expected an object")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may come twice: one of the two would go unread."""
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"found key {twice!r} twice, expected it once")
    return record


def _encode_completion(prompt: Any, completion: Any, codec: TextCodec) -> Example:
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise InputError("expected prompt and completion as text, the completion not empty")
    before = codec.encode(prompt)
    after = codec.encode(completion, special_tokens=False)
    if codec.eos_token_id is not None:
        after = [*after, codec.eos_token_id]
    return Example((*before, *after), (*([NO_LOSS] * len(before)), *after))


def _encode_chat(messages: Any, codec: TextCodec) -> Example:
    """Each assistant turn is tokenized apart from what leads up to it, as it is when serving.

    Its content and the end token after it carry the loss; what the template adds then does not.
    """
    _check_messages(messages)
    tokens: list[int] = []
    labels: list[int] = []
    rendered = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = codec.render_chat(messages[:i], add_generation_prompt=True)
        whole = codec.render_chat(messages[: i + 1], add_generation_prompt=False)
        if not (prompt.startswith(rendered) and whole.startswith(prompt)):
            raise InputError("the chat template does not put turns one after the other")
        context = codec.encode(prompt[len(rendered) :], special_tokens=False)
        answer = codec.encode(whole[len(prompt) :], special_tokens=False)
        learned = _through_end(answer, codec)
        tokens += [*context, *answer]
        labels += [*([NO_LOSS] * len(context)), *answer[:learned]]
        labels += [NO_LOSS] * (len(answer) - learned)
        rendered = whole
    return Example(tuple(tokens), tuple(labels))


def _through_end(answer: list[int], codec: TextCodec) -> int:
    """How many tokens of a turn there are up to its end token, which is included.

    Where a turn ends with another token than the model's end token, all but the white space that
    the template puts after it counts.
    """
    end = codec.eos_token_id
    if end is not None and end in answer:
        return len(answer) - answer[::-1].index(end)
    count = len(answer)
    while count and codec.decode([answer[count - 1]], skip_special_tokens=False).isspace():
        count -= 1
    return count


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError("expected messages as a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(f"found message {message!r:.80}, expected role and content")
        if message["role"] not in ROLES:
            raise InputError(f"found role {message['role']!r}, expected {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InputError(f"found content {message['content']!r:.80}, expected text")
    if messages[-1]["role"] != "assistant":
        raise InputError("expected the assistant to have the last word")
