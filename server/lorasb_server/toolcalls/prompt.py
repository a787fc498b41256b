"""Tools in the prompt of a model whose chat template takes none, and the grammar of a forced call.

Such a model is told of the tools in the system message, with calls and results in the tags that
Hermes models use.
"""

import json
from collections.abc import Iterable
from typing import Any

from lorasb_runtime.engines.base import Grammar
from lorasb_runtime.models.text import TextCodec

OFFER = """You may call functions to answer. Their signatures, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments within tags, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{}}}}
</tool_call>"""
ORDER = """Answer by calling one of these functions, given as JSON:
<tools>
{tools}
</tools>
Write its name and its arguments as one JSON object, and nothing else:
{{"name": "the function's name", "arguments": {{}}}}"""


def chat_tokens(
    codec: TextCodec,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    *,
    forced: bool = False,
    **options: Any,
) -> list[int]:
    """Token ids of a conversation that offers `tools`; options are the chat template's.

    Raises InputError as `TextCodec.render_chat` does.
    """
    if codec.takes_tools:
        return codec.encode_chat(messages, tools=tools, **options)
    return codec.encode_chat(plain_messages(messages, tools, forced=forced), **options)


def plain_messages(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, forced: bool
) -> list[dict[str, Any]]:
    """The conversation for a template that knows system, user and assistant alone."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (ORDER if forced else OFFER).format(tools=listed)
    if plain[0]["role"] == "system":
        first = plain.pop(0)
        text = f"{first['content']}\n\n{text}"
    return [{"role": "system", "content": text}, *plain]


def forced_call(tools: Iterable[dict[str, Any]]) -> Grammar:
    """One call of one of these functions, as the JSON object of name and arguments."""
    calls: list[dict[str, Any]] = []
    for tool in tools:
        function = tool["function"]
        place = f"#/anyOf/{len(calls)}/properties/arguments"
        properties = {
            "name": {"const": function["name"]},
            "arguments": _moved(function["parameters"], place),
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return Grammar("json_schema", json.dumps({"anyOf": calls}))


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at `place` in another, its references to itself led there."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    role, text = message["role"], message["content"]
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {"role": role, "content": "\n".join([text, *calls] if text else calls)}
