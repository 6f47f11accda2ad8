"""Talk to a running server with the official OpenAI client (pip install openai).

nemotron4 serve smollm2 &
python examples/openai_client.py [http://127.0.0.1:1424]
"""

from __future__ import annotations

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:1424"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Write a poem on NVIDIA in the style of Shakespeare"}],
    temperature=0,
    max_tokens=64,
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
