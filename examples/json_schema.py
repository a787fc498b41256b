"""An answer that is always valid JSON of a given form, read into a pydantic model.

python examples/json_schema.py [MODEL]
"""

import os
import sys
from typing import Annotated, Literal

from openai import OpenAI
from pydantic import BaseModel, Field


class Review(BaseModel):
    mood: Literal["happy", "angry", "indifferent"]
    stars: Annotated[int, Field(ge=1, le=5)]
    recommends: bool


client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = sys.argv[1] if len(sys.argv) > 1 else next(iter(client.models.list())).id

completion = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Rate this review: 'Best soup I ever had!'"}],
    response_format=Review,
)
print(completion.choices[0].message.parsed)

# The same by the Responses API.
response = client.responses.parse(
    model=model, input="Rate this review: 'My soup was cold.'", text_format=Review
)
print(response.output_parsed)
