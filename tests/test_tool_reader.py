"""Tool calls in the text of each family of models, however the text is cut into chunks."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_server.toolcalls.formats import FORCED, HERMES, LLAMA, MISTRAL, ToolFormat
from lorasb_server.toolcalls.json_scan import ObjectScanner
from lorasb_server.toolcalls.prompt import forced_call, plain_messages
from lorasb_server.toolcalls.reader import ArgumentsDelta, CallBegin, CallReader, TextDelta

NAMES = {"weather", "add"}
WEATHER = '{"name": "weather", "arguments": {"city": "Bern {[\\"]}", "days": [1, 2]}}'
ADD = '{"name": "add", "parameters": {"a": 1}, "id": {"x": "}"}}'
W_ARGS, A_ARGS = '{"city": "Bern {[\\"]}", "days": [1, 2]}', '{"a": 1}'

UNKNOWN = '<tool_call>{"name": "rm", "arguments": {}}'

CASES: list[tuple[ToolFormat, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Just text. ", "Just text. ", []),
    (HERMES, f"<tool_call>\n{WEATHER}\n</tool_call>", "", [("weather", W_ARGS)]),
    (
        HERMES,
        f"Let me see.\n<tool_call>{WEATHER}</tool_call>\n<tool_call>\n{ADD}\n</tool_call>",
        "Let me see.",
        [("weather", W_ARGS), ("add", A_ARGS)],
    ),
    (HERMES, "<tool_call> is a tag, <tool", "<tool_call> is a tag, <tool", []),
    (
        HERMES,
        '<tool_call>{"name": "rm", "arguments": {}}',
        '<tool_call>{"name": "rm", "arguments": {}}',
        [],
    ),
    (HERMES, '<tool_call>{"arguments": {}, "name": "add"}</tool_call>', "", [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "", [("add", "{}")]),
    (HERMES, '<tool_call>{"name": "add", "arguments": {"a": ', "", [("add", '{"a": ')]),
    (HERMES, '<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
    (LLAMA, WEATHER, "", [("weather", W_ARGS)]),
    (LLAMA, f"<|python_tag|>{WEATHER}; {ADD}", "", [("weather", W_ARGS), ("add", A_ARGS)]),
    (LLAMA, '{"answer": 1} is JSON', '{"answer": 1} is JSON', []),
    (LLAMA, f"Say {WEATHER}", f"Say {WEATHER}", []),
    (MISTRAL, f"[TOOL_CALLS] [{WEATHER}, {ADD}]", "", [("weather", W_ARGS), ("add", A_ARGS)]),
    (
        MISTRAL,
        f"Well[TOOL_CALLS]weather[ARGS]{W_ARGS}[TOOL_CALLS]add[ARGS]{A_ARGS}",
        "Well",
        [("weather", W_ARGS), ("add", A_ARGS)],
    ),
    (MISTRAL, "[TOOL_CALLS]unknown[ARGS]{}", "[TOOL_CALLS]unknown[ARGS]{}", []),
    (FORCED, WEATHER, "", [("weather", W_ARGS)]),
]


def read(reader: CallReader, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    text, calls = "", []
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    for delta in deltas:
        match delta:
            case TextDelta():
                text += delta.text
            case CallBegin():
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
            case ArgumentsDelta():
                assert delta.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    return text, calls


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_calls_are_read(
    form: ToolFormat, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    assert read(CallReader(form, NAMES), [text]) == (said, calls)
    assert read(CallReader(form, NAMES), list(text)) == (said, calls)
    one = read(CallReader(form, NAMES, single=True), list(text))
    assert one[1] == calls[:1]


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 150), max_size=12))
def test_chunks_may_be_cut_anywhere(case: Any, cuts: list[int]) -> None:
    form, text, said, calls = case
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert read(CallReader(form, NAMES), pieces) == (said, calls)


@given(text=st.text(alphabet='<tool_call>{}[]"\\\\ \n:,ARGSname[TOOL_CALLS]', max_size=60))
def test_no_text_is_lost_or_made_up(text: str) -> None:
    for form in (HERMES, LLAMA, MISTRAL):
        said, calls = read(CallReader(form, NAMES), list(text))
        if not calls and form.markers[0] not in text:
            assert said == text


def test_without_tools_text_passes_at_once() -> None:
    reader = CallReader(ToolFormat("none"), set())
    assert [reader.feed(t) for t in (" ", "<tool_call>", "\n")] == [
        [TextDelta(" ")],
        [TextDelta("<tool_call>")],
        [TextDelta("\n")],
    ]
    assert reader.finish() == []


def test_arguments_leave_as_they_come() -> None:
    reader = CallReader(HERMES, NAMES)
    begin, *rest = reader.feed('<tool_call>{"name": "add", "arguments": {"a"')
    assert isinstance(begin, CallBegin) and begin.name == "add" and begin.id.startswith("call_")
    assert rest == [ArgumentsDelta(0, '{"a"')]
    assert reader.feed(": 12") == [ArgumentsDelta(0, ": 12")]


def test_ids_differ_and_suit_mistral() -> None:
    ids = {MISTRAL.new_id() for _ in range(50)}
    assert len(ids) == 50 and all(len(i) == 9 and i.isalnum() for i in ids)


@given(
    value=st.recursive(
        st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_the_scanner_finds_the_end(value: Any) -> None:
    text = json.dumps({"x": value}, ensure_ascii=False)
    assert ObjectScanner().feed(text + " }]") == len(text)
    assert ObjectScanner().feed(text[:-1]) is None


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": "", "parameters": parameters}
    return {"type": "function", "function": function}


def test_references_are_led_to_their_new_place() -> None:
    schema = {
        "$defs": {"P": {"type": "integer"}},
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}},
    }
    found = json.loads(forced_call([tool("a", {}), tool("b", schema)]).text)
    place = found["anyOf"][1]["properties"]["arguments"]
    assert place["properties"]["p"]["$ref"] == "#/anyOf/1/properties/arguments/$defs/P"
    assert found["anyOf"][1]["properties"]["name"] == {"const": "b"}


def test_a_template_without_tools_gets_them_as_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Add"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    system, user, assistant, answer = plain_messages(messages, [tool("add", {})], forced=False)
    assert system["content"].startswith("Be kind.\n\nYou may call") and '"add"' in system["content"]
    assert user == {"role": "user", "content": "Add"}
    said = read(CallReader(HERMES, NAMES), [assistant["content"]])
    assert said == ("", [("add", '{"a": 1}')])
    assert answer == {"role": "user", "content": "<tool_response>\n2\n</tool_response>"}
    assert plain_messages(messages[1:2], [], forced=False) == [{"role": "user", "content": "Add"}]
