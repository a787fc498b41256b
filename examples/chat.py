"""The same question to the base model and to one adapter.

python examples/chat.py [ADAPTER]
"""

import os
import sys

from openai import OpenAI

adapter = sys.argv[1] if len(sys.argv) > 1 else "pirate"
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)

base, *others = (model.id for model in client.models.list())
print("this server has", base, "with the adapters", ", ".join(others))
for model in (base, adapter):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=60,
    )
    print(f"{model}: {answer.choices[0].message.content}")
