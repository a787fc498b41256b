"""What one chat request makes of tools: its prompt, its grammar, and how its answer is read."""

from dataclasses import dataclass, replace
from typing import Any

from lorasb_runtime.engines.base import SamplingParams
from lorasb_runtime.models.text import TextCodec
from lorasb_server.errors import FieldError
from lorasb_server.schemas.chat import ChatRequest
from lorasb_server.schemas.tools import NamedTool
from lorasb_server.toolcalls.formats import FORCED, HERMES, ToolFormat, format_of
from lorasb_server.toolcalls.prompt import forced_call
from lorasb_server.toolcalls.reader import CallReader

NO_TOOLS = ToolFormat("none")


@dataclass(frozen=True)
class ToolUse:
    """tools: as chat templates take them, empty where none may be called.

    form: how calls are written in the answer. single: at most one call. named: a function was
    asked for by name.
    """

    tools: list[dict[str, Any]]
    forced: bool
    named: bool
    single: bool
    form: ToolFormat

    @classmethod
    def of(cls, body: ChatRequest, codec: TextCodec) -> "ToolUse":
        """Raises FieldError for fields that contradict each other or this model."""
        tools = [tool.as_template_input() for tool in body.offered()]
        named = isinstance(body.tool_choice, NamedTool)
        forced = bool(tools) and (named or body.tool_choice == "required")
        if isinstance(body.tool_choice, NamedTool):
            chosen = body.tool_choice.function.name
            tools = [tool for tool in tools if tool["function"]["name"] == chosen]
        if tools and body.has_grammar:
            raise FieldError(
                "tool_choice",
                "tool_choice: response_format and structured_outputs only go with none",
            )
        form: ToolFormat | None = HERMES
        if forced:
            form = FORCED
        elif codec.takes_tools:
            form = format_of(codec.chat_template)
        if tools and form is None:
            raise FieldError(
                "tool_choice",
                "tool_choice: the form in which this model calls tools is not known; found auto, "
                "expected required, a named function or none",
            )
        single = forced or body.parallel_tool_calls is False
        return cls(tools, forced, named, single, form if tools and form else NO_TOOLS)

    def sampling(self, params: SamplingParams, codec: TextCodec) -> SamplingParams:
        """With the grammar of a forced call; markers that are special tokens stay in the text."""
        if self.forced:
            return replace(params, grammar=forced_call(self.tools))
        if any(marker in codec.special_tokens for marker in self.form.markers):
            return replace(params, skip_special_tokens=False)
        return params

    def reader(self) -> CallReader:
        names = {tool["function"]["name"] for tool in self.tools}
        return CallReader(self.form, names, single=self.single)

    def finish_reason(self, reason: str | None, calls: int) -> str | None:
        """As OpenAI tells it: an answer that a named function was asked of ends as text does."""
        return "tool_calls" if reason == "stop" and calls and not self.named else reason
