"""The chat template that synthetic checkpoints get: what the published one renders, in our own words.

`tools` must come with its keys sorted at every depth; `tojson` must take `separators` and `ensure_ascii`.
"""

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content -%}
    {%- for part in content if part.type == 'text' -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(answered=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'assistant' and not message.tool_calls -%}
    {%- set ns.answered = loop.index0 -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>
  {{- tools | tojson(separators=(',', ':'), ensure_ascii=False) -}}
  <|im_end|>
{%- endif -%}
{%- if not messages or messages[0].role != 'system' -%}
  <|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    <|im_user|>
  {%- elif message.role == 'assistant' -%}
    <|im_assistant|>
  {%- else -%}
    <|im_system|>
  {%- endif -%}
  {{- message.name or message.role -}}
  <|im_middle|>
  {%- if message.role == 'assistant' -%}
    <think>
    {%- if loop.index0 > ns.answered -%}
      {{- text(message.reasoning_content) -}}
    {%- endif -%}
    </think>
    {{- text(message.content) -}}
    {%- if message.tool_calls -%}
      <|tool_calls_section_begin|>
      {%- for call in message.tool_calls -%}
        <|tool_call_begin|>
        {{- call.id -}}
        <|tool_call_argument_begin|>
        {{- call.function.arguments -}}
        <|tool_call_end|>
      {%- endfor -%}
      <|tool_calls_section_end|>
    {%- endif -%}
  {%- elif message.role == 'tool' -%}
    {{- '## Return of ' ~ message.tool_call_id ~ '\\n' -}}
    {{- text(message.content) -}}
  {%- else -%}
    {{- text(message.content) -}}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}
"""
