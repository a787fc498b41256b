"""Request fields of tool calls: what may be called, what has to be, and calls made earlier."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from lorasb_server.errors import FieldError
from lorasb_server.schemas.strict import JsonObject, Strict, Text

MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """`strict` changes nothing where the call is forced: the schema is always kept to then."""

    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function

    def as_template_input(self) -> dict[str, Any]:
        """As chat templates expect it; a function without parameters takes none."""
        function = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": self.function.parameters or {"type": "object", "properties": {}},
        }
        return {"type": "function", "function": function}


class NamedFunction(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Strict):
    name: FunctionName
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made in an earlier turn; `arguments` is a JSON object's text."""

    id: Text
    type: Literal["function"]
    function: CalledFunction

    def as_template_input(self) -> dict[str, Any]:
        """With the arguments as an object. Raises FieldError where their text is none."""
        text = self.function.arguments
        try:
            arguments = json.loads(text) if text.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise FieldError(
                "messages",
                f"messages: tool_calls of {self.function.name}: found arguments {text[:80]!r}, "
                "expected a JSON object",
            )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ToolFields(Strict):
    """The fields of a request that offer tools."""

    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def offered(self) -> list[FunctionTool]:
        """The tools that may be called: none where tool_choice says so.

        Raises FieldError for fields that contradict each other.
        """
        tools = self.tools or []
        names = [tool.function.name for tool in tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise FieldError("tools", f"tools: found two functions named {twice!r}")
        if not tools:
            for field in ("tool_choice", "parallel_tool_calls"):
                if getattr(self, field) not in (None, "none"):
                    raise FieldError(field, f"{field}: only allowed with tools")
        if isinstance(self.tool_choice, NamedTool):
            named = self.tool_choice.function.name
            if named not in names:
                raise FieldError(
                    "tool_choice", f"tool_choice: found {named!r}, expected one of {names[:20]}"
                )
        return [] if self.tool_choice == "none" else tools
