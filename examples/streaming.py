"""An answer as it is written, then what it cost; once by each of OpenAI's two APIs.

python examples/streaming.py [ADAPTER]
"""

import os
import sys

from openai import OpenAI

adapter = sys.argv[1] if len(sys.argv) > 1 else "pirate"
question = "Tell me about the sea."
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)

print("chat completions:")
chunks = client.chat.completions.create(
    model=adapter,
    messages=[{"role": "user", "content": question}],
    max_tokens=60,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in chunks:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n[{chunk.usage.completion_tokens} tokens]")

print("responses:")
events = client.responses.create(model=adapter, input=question, max_output_tokens=60, stream=True)
for event in events:
    if event.type == "response.output_text.delta":
        print(event.delta, end="", flush=True)
    elif event.type in ("response.completed", "response.incomplete"):
        print(f"\n[{event.response.usage.output_tokens} tokens, {event.response.status}]")
