"""A tool: the model says which function to call and how, and answers with what that returns.

python examples/tool_call.py [MODEL]
"""

import json
import os
import sys

from openai import OpenAI


def multiply(a: int, b: int) -> int:
    return a * b


NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = sys.argv[1] if len(sys.argv) > 1 else next(iter(client.models.list())).id
messages = [{"role": "user", "content": "What is 17 times 23?"}]


def ask(tool_choice: str):
    answer = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[TOOL],
        tool_choice=tool_choice,  # "auto" leaves it to the model
        temperature=0,
        max_tokens=80,
    )
    return answer.choices[0].message


message = ask("required")
messages.append(message)
for call in message.tool_calls:
    arguments = json.loads(call.function.arguments)
    result = multiply(**arguments)
    print(f"{call.function.name}({arguments}) -> {result}")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})

print(ask("none").content)
