"""The published model card's second example: the model calls a tool, gets its result, and answers.

Start a server (`make serve`), then: python examples/tool_calling.py [--base-url http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import openai

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Retrieve current weather information. "
            "Call this when the user asks about the weather.",
            "parameters": {
                "type": "object",
                "required": ["city"],
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
            },
        },
    }
]


def get_weather(city: str) -> dict[str, str]:
    """The tool itself: it is sunny everywhere."""
    return {"weather": "Sunny"}


def tool_call_with_client(client: openai.OpenAI, model_name: str, **options: Any) -> tuple[str, list[Any]]:
    """Ask for the weather in Beijing, running tools until the answer comes; (answer, all messages)."""
    functions = {"get_weather": get_weather}
    messages: list[Any] = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {"role": "user", "content": "What's the weather like in Beijing today? Use the tool to check."},
    ]
    finish_reason = None
    while finish_reason is None or finish_reason == "tool_calls":
        completion: Any = client.chat.completions.create(
            model=model_name, messages=messages, temperature=1.0, tools=TOOLS, tool_choice="auto", **options
        )
        choice = completion.choices[0]
        finish_reason = choice.finish_reason
        if finish_reason == "tool_calls":
            messages.append(choice.message)
            for tool_call in choice.message.tool_calls:
                name = tool_call.function.name
                result = functions[name](**json.loads(tool_call.function.arguments))
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": tool_call.id,
                        "name": name,
                        "content": json.dumps(result),
                    }
                )
    print("-" * 100)
    print(choice.message.content)
    return str(choice.message.content), messages


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
    tool_call_with_client(openai.OpenAI(base_url=args.base_url, api_key=args.api_key), args.model)
