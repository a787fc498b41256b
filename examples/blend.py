"""Several adapters at once, each with a weight: made for the request, in no file.

python examples/blend.py [ADAPTER OTHER_ADAPTER]
"""

import os
import sys

from openai import OpenAI

one, other = sys.argv[1:] or ("pirate", "haiku")
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
base = next(iter(client.models.list())).id

for weight in (1.0, 0.7, 0.3, 0.0):
    answer = client.chat.completions.create(
        model=base,
        messages=[{"role": "user", "content": "Tell me about the sea."}],
        max_tokens=40,
        temperature=0,
        extra_body={
            "adapter": [
                {"name": one, "weight": weight},
                {"name": other, "weight": 1 - weight},
            ]
        },
    )
    print(f"{weight:.0%} {one}: {answer.choices[0].message.content!r}")
