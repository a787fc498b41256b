"""Reads tool calls out of an answer while it is being generated.

Whole and streamed answers are read by the same code, so they cannot differ.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from lorasb_server.toolcalls.formats import ToolFormat
from lorasb_server.toolcalls.json_scan import ObjectScanner


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class CallBegin:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    index: int
    text: str


Delta = TextDelta | CallBegin | ArgumentsDelta
State = Literal["text", "between", "object", "arguments", "rest"]

SEPARATORS = ("[", "]", ",", ";")
_NAMED = re.compile(r"([\w-]+)\[ARGS\]\s*(?=\{)")
_NAME_SO_FAR = re.compile(r"[\w-]+(\[\w*\]?\s*)?")
_HEAD = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallReader:
    """Turns an answer's text into text and calls.

    Only functions in `names` are called; what looks like a call but is none stays text. With
    `single` everything after the first call is left out. White space around calls is dropped.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, single: bool = False) -> None:
        self.calls = 0
        self._form = form
        self._names = names
        self._single = single
        self._state: State = "text"
        self._buffer = ""
        self._spaces = ""  # may turn out to stand before a call
        self._marker = ""  # read, and text again if no call follows
        self._begun = False  # whether anything but white space has come
        self._scanner = ObjectScanner()
        self._then: State = "rest"

    def feed(self, text: str) -> list[Delta]:
        """What has become certain with more text."""
        self._buffer += text
        return list(self._run(final=False))

    def finish(self) -> list[Delta]:
        """What is left at the end; a call that was cut off stays as far as it has come."""
        deltas = list(self._run(final=True))
        if self._state in ("between", "object") and not self._done:
            deltas += self._to_text(self._buffer)
        if self._spaces and not self.calls:
            deltas.append(TextDelta(self._spaces))
        self._buffer = self._spaces = ""
        return deltas

    @property
    def _done(self) -> bool:
        """Whether what follows is left out."""
        return self._single and self.calls > 0 and self._state in ("text", "between", "object")

    def _run(self, *, final: bool) -> Iterator[Delta]:
        while self._buffer:
            if self._done:
                self._buffer = ""
                return
            before = (self._state, len(self._buffer))
            match self._state:
                case "text":
                    yield from self._read_text(final)
                case "between":
                    yield from self._read_between(final)
                case "object":
                    yield from self._read_object()
                case "arguments":
                    yield from self._read_arguments()
                case "rest":
                    self._read_rest()
            if (self._state, len(self._buffer)) == before:
                return

    def _say(self, text: str) -> Iterator[Delta]:
        """Text, but for white space at its end until more follows."""
        kept = text.rstrip() if self._names else text
        if not kept:
            self._spaces += text
            return
        self._begun = True
        spaces, self._spaces = self._spaces, text[len(kept) :]
        yield TextDelta(spaces + kept)

    def _read_text(self, final: bool) -> Iterator[Delta]:
        stripped = self._buffer.lstrip()
        if self._form.bare and not self._begun and stripped.startswith("{"):
            self._marker = self._buffer[: len(self._buffer) - len(stripped)]
            self._buffer, self._state = stripped, "object"
            return
        found = [(self._buffer.find(m), m) for m in self._form.markers if m in self._buffer]
        if found:
            at, self._marker = min(found)
            yield from self._say(self._buffer[:at])
            self._buffer = self._buffer[at + len(self._marker) :]
            self._state = "between"
            return
        keep = (
            0 if final else max((_overlap(self._buffer, m) for m in self._form.markers), default=0)
        )
        cut = len(self._buffer) - keep
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        yield from self._say(text)

    def _read_between(self, final: bool) -> Iterator[Delta]:
        """After a marker or a call: another call, the end of calls, or text after all."""
        form, rest = self._form, self._buffer.lstrip()
        for sign in (*form.markers, form.closing):
            if sign and rest.startswith(sign):
                self._buffer = rest[len(sign) :]
                if sign == form.closing:
                    self._state, self._marker = "text", ""
                return
            if not final and sign.startswith(rest):
                return
        named = _NAMED.match(rest) if form.name_first else None
        if rest.startswith("{"):
            self._buffer, self._state = rest, "object"
        elif rest[:1] in SEPARATORS:
            if self._marker:  # no call has come yet
                self._marker += self._buffer[: len(self._buffer) - len(rest) + 1]
            self._buffer = rest[1:]
        elif named and named[1] in self._names:
            self._buffer = rest[named.end() :]
            yield from self._begin(named[1], then="between")
        elif final or not (form.name_first and _NAME_SO_FAR.fullmatch(rest)):
            yield from self._to_text("")

    def _read_object(self) -> Iterator[Delta]:
        head = _HEAD.match(self._buffer)
        if head and _string(head[1]) in self._names:
            self._buffer = self._buffer[head.end() :]
            yield from self._begin(_string(head[1]), then="rest")
            return
        end = ObjectScanner().feed(self._buffer)
        if end is None:
            return
        text, self._buffer = self._buffer[:end], self._buffer[end:]
        name, arguments = _call(text)
        if arguments is None or name not in self._names:
            yield from self._to_text(text)
            return
        yield from self._begin(name, then="between")
        yield ArgumentsDelta(self.calls - 1, arguments)
        self._state = "between"

    def _begin(self, name: str, *, then: State) -> Iterator[Delta]:
        """A call whose arguments follow; `then` is the state after them."""
        self._state, self._then, self._marker, self._begun = "arguments", then, "", True
        self._spaces = ""
        self._scanner = ObjectScanner()
        self.calls += 1
        yield CallBegin(self.calls - 1, self._form.new_id(), name)

    def _read_arguments(self) -> Iterator[Delta]:
        end = self._scanner.feed(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(text) :]
        yield ArgumentsDelta(self.calls - 1, text)
        if end is not None:
            self._state, self._scanner = self._then, ObjectScanner(depth=1)

    def _read_rest(self) -> None:
        """What an object holds after the arguments, up to its end."""
        end = self._scanner.feed(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._state = "between"

    def _to_text(self, text: str) -> Iterator[Delta]:
        """No call after all."""
        said, self._marker, self._state, self._begun = self._marker + text, "", "text", True
        if said:
            yield from self._say(said)


def _overlap(text: str, sign: str) -> int:
    """Length of the longest end of `text` that starts `sign`."""
    lengths = range(min(len(text), len(sign) - 1), 0, -1)
    return next((n for n in lengths if sign.startswith(text[-n:])), 0)


def _string(text: str) -> str:
    """What a JSON string says; empty for one that is none."""
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _call(text: str) -> tuple[str, str | None]:
    """Name and arguments of a call's object, in whatever order; None where it is no call."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "", None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # some models write the object's text
        return str(value.get("name")), arguments
    shown = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else None
    return str(value.get("name")), shown
