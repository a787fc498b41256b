"""The output items of one response as they grow, and the events that tell of each step.

Both the streamed and the whole answer come from here, so they cannot differ.
"""

import uuid
from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]


class ResponseOutput:
    """`items` are the finished ones. Every event but its sequence number is made here."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None  # of the message that is being written
        self._unsent: list[dict[str, Any]] = []  # log-probabilities of tokens without text so far
        self._id = ""

    def text(self, delta: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """More of the message, which begins with the first."""
        self._unsent += logprobs
        if not delta:
            return
        if self._part is None:
            yield from self._begin_message()
        assert self._part is not None
        self._part["text"] += delta
        self._part["logprobs"] += self._unsent
        yield self._event("output_text.delta", delta=delta, logprobs=self._unsent)
        self._unsent = []

    def finish(self, status: str) -> Iterator[Event]:
        """The end of what has been begun; a response without any text has an empty message."""
        if self._part is None:
            yield from self._begin_message()
        assert self._part is not None
        part, self._part = self._part, None
        part["logprobs"] += self._unsent
        yield self._event("output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._event("content_part.done", part=part)
        yield self._item("output_item.done", self._message(status, [part]))

    def _begin_message(self) -> Iterator[Event]:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._part = _text_part()
        yield self._item("output_item.added", self._message("in_progress", []))
        yield self._event("content_part.added", part=_text_part())

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _item(self, kind: str, item: dict[str, Any]) -> Event:
        index = len(self.items)
        if kind == "output_item.done":
            self.items.append(item)
        return {"type": f"response.{kind}", "output_index": index, "item": item}

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self._id, "output_index": len(self.items), "content_index": 0}
        return {"type": f"response.{kind}", **place, **fields}


def _text_part() -> dict[str, Any]:
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
