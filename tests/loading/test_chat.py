"""Chat templates render as transformers renders them, and refuse bad messages in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kvant.errors import ModelError, RequestError
from kvant.loading.chat import ChatTemplate, as_messages

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n<SYSTEM><|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "smollm2": CHATML.replace(
        "<SYSTEM>", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ),
    "qwen2": CHATML.replace("<SYSTEM>", "You are a helpful assistant."),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
        "message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "internlm2": (
        "{{ bos_token }}{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # The features that larger templates use: tools, tojson, namespaces, loop controls, blocks on
    # lines of their own, generation marks.
    "tools": """{{- bos_token }}
{%- set found = namespace(system=none) %}
{%- for message in messages %}
    {%- if message.role == "system" %}
        {%- set found.system = message.content %}
        {%- continue %}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- tool | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{%- if documents is defined and documents is none %}{{ "no documents" }}{% endif %}
{% for message in messages if message.role != "system" %}
    {% if loop.index0 > 4 %}
        {% break %}
    {% endif %}
    {% if message.role == "assistant" %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {% endgeneration %}
    {% else %}
[{{ message['role'] }}] {{ message.content | trim }}{{ found.system if loop.last }}
    {% endif %}
{% endfor %}
{{ flavour | default("plain") }}
""",
}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi"}],
    "system": [
        {"role": "system", "content": "Be <b>brief</b> & kind."},
        {"role": "user", "content": "  Wie geht's?\n"},
    ],
    "several turns": [
        {"role": "user", "content": "你好 <|im_start|> {{ messages }}"},
        {"role": "assistant", "content": "Hello!\n\n- a\n- b"},
        {"role": "user", "content": "é 😀"},
    ],
    "ends with the assistant": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": ""},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "für <Köln> & '你'"}}]


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' rendering of a template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()),
            bos_token="<s>",
            eos_token="</s>",
            chat_template=source,
        )
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    return render


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(reference: Any, name: str, talk: str) -> None:
    source, messages = TEMPLATES[name], TALKS[talk]
    template = ChatTemplate(source, "<s>", "</s>")
    for generate in (True, False):
        expected = reference(source, messages, add_generation_prompt=generate)
        assert template.render(messages, add_generation_prompt=generate) == expected
    expected = reference(source, messages, tools=TOOLS, flavour="mild", add_generation_prompt=True)
    assert template.render(messages, tools=TOOLS, flavour="mild") == expected


def test_known_prompts() -> None:
    messages = TALKS["one turn"]
    prompts = {name: ChatTemplate(TEMPLATES[name], "<s>", "</s>").render(messages)
               for name in ("qwen2", "llama3", "internlm2")}  # fmt: skip
    assert prompts == {
        "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "internlm2": "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    }


def test_date() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}", "", "").render(TALKS["one turn"])
    assert year.isdigit() and len(year) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ 'a' + none }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set _ = messages.append(1) %}", "unsafe"),
        ("{% for i in range(10000000000) %}{% endfor %}", "too big"),
    ],
)
def test_template_errors_are_request_errors(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(source, "", "").render(TALKS["one turn"])
    assert "\n" not in str(caught.value)


def test_a_broken_template_is_a_model_error() -> None:
    template = ChatTemplate("{% if %}", "", "")  # the model still serves prompts given as text
    with pytest.raises(ModelError, match="does not compile"):
        template.render(TALKS["one turn"])


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("Hi", "is of type str"),
        (None, "is of type NoneType"),
        ({"content": "Hi"}, "has no role"),
        ({"role": 1, "content": "Hi"}, "has no role"),
        ({"role": "user"}, "has no content"),
        ({"role": "user", "content": None}, "has no content"),
        ({"role": "user", "content": 3}, "has content of type int"),
    ],
)
def test_bad_messages_are_named_by_index(message: Any, problem: str) -> None:
    messages = [{"role": "user", "content": "a"}, message]
    for refuse in (ChatTemplate("{{ 1 }}", "", "").render, as_messages):
        with pytest.raises(RequestError, match=rf"messages\[1\] {problem}"):
            refuse(messages)


def test_tool_calls_need_no_content() -> None:
    call = [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    assert as_messages(call) == call
    assert ChatTemplate("{{ messages[0].tool_calls | length }}", "", "").render(call) == "1"


def test_as_messages() -> None:
    assert as_messages("Hi") == [{"role": "user", "content": "Hi"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "user", "content": parts, "name": "x"}]
    assert as_messages(given) == [{"role": "user", "content": "ab", "name": "x"}]
    assert given[0]["content"] is parts
    with pytest.raises(RequestError, match="messages is empty"):
        as_messages([])


@pytest.mark.parametrize(
    "part", ["a", {"type": "image_url", "image_url": {}}, {"type": "text"}, {"text": "a"}]
)
def test_parts_that_are_not_text_are_refused(part: Any) -> None:
    with pytest.raises(RequestError, match=r'messages\[0\] has a content part .* only "text"'):
        as_messages([{"role": "user", "content": [part]}])


def test_import_is_cheap() -> None:
    code = (
        "import sys, kvant.loading.chat, kvant.loading.tokenizer, kvant.engine.text; "
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
