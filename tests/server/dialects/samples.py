"""Small templates of the known kinds, tools, and a way to read a whole output."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

from kvant.server.dialects import Answer, Dialect, Tools, check_tools, dialect_of

# As much of each template as tells the kinds apart and shows what messages must look like.
QWEN = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
<tool_call>
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role + '\\n' + message.content }}
{%- for call in message.tool_calls %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
QWEN_THINKING = QWEN + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
LLAMA = """\
{%- if tools is not none %}Environment: ipython
Respond in the format {"name": function name, "parameters": dictionary}.{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>
{% if 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}{{ raise_exception("single tool-calls") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ message.content | trim }}{% endif %}<|eot_id|>
{%- endfor %}"""
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>\
system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}\
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
R1 = """\
{% for message in messages %}{{ message.content.split('</think>')[-1] }}
{% for tool in message['tool_calls'] %}{{ tool['function']['arguments'] + '' }}{% endfor %}
{%- endfor %}<|Assistant|><think>
"""
CODER = '{{ tools }}<tool_call><function=example></function></tool_call> "arguments"'


def tool(name: str, parameters: object = None, **more: Any) -> dict[str, Any]:
    """A tool as OpenAI's API has it."""
    function = {"name": name, "parameters": parameters, **more}
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


TOOLS = [tool("get"), tool("get_weather", {"properties": {"city": {"type": "string"}}})]
OFFERED = check_tools(TOOLS)

HERMES = dialect_of("", "hermes")
LLAMA3 = dialect_of("", "llama3")
SMOL = dialect_of("", "smollm2")
PLAIN = dialect_of("", "plain")


def read(
    dialect: Dialect,
    text: str | Iterable[str],
    tools: Tools = OFFERED,
    prompt: str = "",
    reasoning: bool = True,
) -> Answer:
    """The answer that pieces of text make; ids are id0, id1 ... A string is read whole and by
    character."""
    if isinstance(text, str):
        whole = read(dialect, [text], tools, prompt, reasoning)
        assert read(dialect, iter(text), tools, prompt, reasoning) == whole
        return whole
    numbers = count()
    parser = dialect.parser(prompt, tools, reasoning=reasoning, new_id=lambda: f"id{next(numbers)}")
    answer = Answer()
    for piece in text:
        answer.add(parser.push(piece))
    answer.add(parser.finish())
    return answer


def calls(answer: Answer) -> list[tuple[str | None, str]]:
    """Names and arguments."""
    return [(call.name, call.arguments) for call in answer.calls]
