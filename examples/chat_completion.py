"""The published model card's first example: one question, the answer and the reasoning behind it.

Start a server (`make serve`), then: python examples/chat_completion.py [--base-url http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse
from typing import Any

import openai


def simple_chat(client: openai.OpenAI, model_name: str, **options: Any) -> str:
    """Ask which of two decimals is bigger; the answer. `options` go into the request (a seed, say)."""
    messages: list[Any] = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "which one is bigger, 9.11 or 9.9? think carefully."}],
        },
    ]
    response: Any = client.chat.completions.create(
        model=model_name, messages=messages, stream=False, temperature=1.0, max_tokens=4096, **options
    )
    message = response.choices[0].message
    print(f"answer: {message.content}")
    print(f"reasoning: {message.reasoning_content}")
    return str(message.content)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument(
        "--model", default="kimi-k2-thinking", help="any name is answered by the model served"
    )
    args = parser.parse_args()
    simple_chat(openai.OpenAI(base_url=args.base_url, api_key=args.api_key), args.model)
