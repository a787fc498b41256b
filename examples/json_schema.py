"""An answer that is always valid JSON of a given form, read into a pydantic model.

python examples/json_schema.py [MODEL]
"""

import os
import sys
from typing import Annotated, Literal

from openai import OpenAI
from pydantic import BaseModel, Field


class Country(BaseModel):
    capital: Annotated[str, Field(max_length=20)]
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]


client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = sys.argv[1] if len(sys.argv) > 1 else next(iter(client.models.list())).id

question = "What is the capital of France, and the continent?"

completion = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": question}],
    response_format=Country,
    temperature=0,
)
print(completion.choices[0].message.parsed)

# The same by the Responses API.
response = client.responses.parse(model=model, input=question, text_format=Country, temperature=0)
print(response.output_parsed)
