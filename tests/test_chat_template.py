"""Chat templates: rendered as transformers renders them, whatever else they do ends soon and in an error of djax's own."""

import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import djax
from djax import bounded_jinja
from djax.chat_template import render_chat
from djax.errors import CheckpointError, PromptError
from djax.source import SHIPPED
from djax.text import encode, load_tokenizer

USER = {"role": "user", "content": "How many apples? "}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "\nBe brief."}, USER],
    "turns": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\nLet me see.\n</think>\n\nSeven.\n"},
        {"role": "user", "content": "And {{ pears }} <|role_end|> é\u2028 \n\n"},
    ],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "reasoning": "Count.",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5, None], "b": "<é>"}}}],
        },
        {"role": "user", "content": "Go on", "name": None, "extra": np.float32(0.5), "object": object()},
    ],
}

# In the manner of what is published for each: constructs, whitespace and all.
TEMPLATES = {
    "llada": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + message['role'] + "
    "'<|end|>\n\n'+ message['content'] | trim + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
    "bailing": """{% for message in messages %}{% set role = message['role'] | lower %}{% if role == 'user' %}{% set role = 'HUMAN' %}
{% endif %}{% set role = role | upper %}{{ '<role>' + role + '</role>' + message['content'] }}{% endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}
""",
    "bailing with tools": """{% set thinking_option = 'off' %}
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content + '\\n' }}
{%- endif %}
{%- if tools %}
    {{- "# Tools\\n" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{{- 'detailed thinking ' + thinking_option + '<|role_end|>' }}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" %}
        {{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
    {%- elif message.role == "system" and not loop.first %}
        {{- '<role>SYSTEM</role>' + message.content + '<|role_end|>' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<role>ASSISTANT</role>' + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<role>ASSISTANT</role>' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|role_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<role>ASSISTANT</role>' }}
{%- endif %}""",
    "chatml": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message, wherever it comes from #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson(indent=4) }}
        {{- "}" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}
            {%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set offset = 1 %}{% else %}{% set offset = 0 %}{% endif %}
{%- for message in messages[offset:] %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + (messages[0].content ~ '\n\n' if offset and loop.first else '') + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] + '\n\n' -%}
{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first = "" -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}
""",
    "generation blocks": "{%- for message in messages %}{{ '<|' + message.role + '|>' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}",
    "macros": """{%- macro render(value, indent=0, *rest, **named) %}
{%- if value is mapping %}{% for key, item in value|dictsort %}{{ ' ' * indent }}{{ key }}:
{{ render(item, indent + 2) }}{% endfor %}
{%- elif value is iterable and value is not string %}{% for item in value %}{{ render(item, indent=indent + 2) }}{% endfor %}
{%- else %}{{ ' ' * indent ~ value }}
{% endif %}
{%- endmacro %}
{%- macro box(title) -%}[{{ title }}:{{ caller(title|upper) }}]{%- endmacro -%}
{% for message in messages %}{{ render(message) }}{% call(up) box(message.role) %}{{ up }}-{{ message.content|replace('a', 'A')|indent(2) }}{% endcall %}
{% endfor %}""",
    "everything": """{% set ns = namespace(found=false, count=0, l=[]) %}
{% for message in messages if message.role != 'system' %}
  {% if loop.index > 5 %}{% break %}{% endif %}
  {% if message.role == 'assistant' %}{% continue %}{% endif %}
  {% set ns.count = ns.count + 1 %}{% set ns.l = ns.l + [message.content|length] %}
  {{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ loop.previtem.role if loop.previtem is defined else '-' }}
  {{ loop.nextitem.role|default('none') }} {{ loop.cycle('odd', 'even') }} {{ loop.changed(message.role) }}
{% else %}
  nobody
{% endfor %}
{{ ns.count }} {{ ns.l|sum }} {{ ns.l|join(', ') }} {{ ns.l|max }} {{ ns.l[-1:] }} {{ ns.l[0] ** 2 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ -3|abs }}
{{ messages|map(attribute='role')|list }} {{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|join('|') }}
{{ messages|rejectattr('role', 'in', ['system', 'assistant'])|list|length }} {{ (messages|groupby('role'))|map('first')|list }}
{{ 'x'|center(7) }}|{{ 'x'.ljust(3) }}|{{ '%s is %05.1f%%' % ('it', 2.55) }}|{{ '{0:>6}{a!r:<8}{1[0]}'.format('r', [3], a='q') }}|{{ '%d'|format(3) }}
{{ 'a,b'.split(',') }} {{ 'Ab'|upper }}{{ 'Ab'.lower() }}{{ 'ab'|capitalize }}{{ 'a b'|title }} {{ '  a '|trim }}{{ 'xxaxx'.strip('x') }}
{{ {'b': 1, 'a': [true, none, 1.5]}|tojson }} {{ {'b': '<é>'}|tojson(indent=2) }} {{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}
{{ {'k': 'v'}.items()|list }} {{ {'k': 'v'}.get('z', 'no') }} {{ 'k' in {'k': 1} }} {{ 3 in [1, 2] }} {{ 1 < 2 < 3 }} {{ 'a' ~ 1 ~ none ~ true }}
{{ dict(a=1) }} {{ range(2, 9, 3)|list }} {{ [3, 1, 2]|sort(reverse=true) }} {{ ['b', 'a', 'b']|unique|list }} {{ [1, 2, 3]|batch(2)|list }}
{{ '<b>'|e }}{{ '<b>'|safe }} {{ 'a\nb'|indent(4, first=true) }} {{ '3.7'|float|round|int }} {{ 'abc'|first }}{{ 'abc'|last }}{{ 'abc'|reverse }}
{{ undefined_thing }}{{ undefined_thing is defined }}{{ undefined_thing|default('d') }}{{ none is none }}{{ 'x' is string }}{{ 3 is odd }}
{%- set block %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %} {{ block }} {% filter upper %}shout{% endfilter %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
    {% if true %}
    lstrip
    {% endif %}
{# a comment #}
{% raw %}{{ raw }}{% endraw %}{% with z = 3 %}{{ z }}{% endwith %}{{ messages[-1].content }}{{ messages[-1]['missing'] }}""",
}


@pytest.fixture(scope="module")
def words():
    """A tokenizer of its own, whose template tests may change."""
    return load_tokenizer(SHIPPED)


def reference(words, chat):
    return words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_it_is_what_transformers_renders(words, template, chat):
    words.chat_template = TEMPLATES[template]
    words.bos_token = "<role>"
    try:
        expected = reference(words, CHATS[chat])
    except Exception as error:
        with pytest.raises(PromptError, match="prompts: this checkpoint's chat template (refuses|fails on) the chat: ") as said:
            render_chat(words, CHATS[chat])
        assert str(error)[:100] in str(said.value)
    else:
        assert render_chat(words, CHATS[chat]) == expected
        ids = words.apply_chat_template(CHATS[chat], add_generation_prompt=True, tokenize=True)["input_ids"]
        (mine,), single = encode(words, CHATS[chat], 500, 1000)
        assert single and mine.tolist() == ids


def test_the_reference_renders_most_of_them(words):
    """Refusals compared with refusals would say little."""
    fine = 0
    for template in TEMPLATES.values():
        words.chat_template = template
        for chat in CHATS.values():
            try:
                fine += bool(reference(words, chat))
            except Exception:
                pass
    assert fine >= len(TEMPLATES) * len(CHATS) * 3 // 4


# --- content parts

PARTS_ONLY = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}<assistant>"
)
PARTS_STRICT = PARTS_ONLY.replace("part['type']", "m['content'][0]['type'] + ''")
STRINGS_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
STRINGS_STRICT = "{% for m in messages %}<{{ m.role }}>{{ m.content + '' }}{% endfor %}<assistant>"
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}<assistant>"
)
USER_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}<assistant>"
)


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (PARTS_ONLY, [USER | {"content": "Hi"}], "<user>Hi<assistant>"),
        (PARTS_STRICT, [USER | {"content": "Hi"}], "<user>Hi<assistant>"),
        (PARTS_ONLY, [USER | {"content": parts("a", "b")}], "<user>ab<assistant>"),
        (PARTS_ONLY, [{"role": "system", "content": "S"}, USER | {"content": parts("a")}], "<system>S<user>a<assistant>"),
        (STRINGS_ONLY, [USER | {"content": parts("a", "b")}], "<user>a\nb<assistant>"),
        (STRINGS_STRICT, [USER | {"content": parts("a")}], "<user>a<assistant>"),
        (STRINGS_ONLY, [USER | {"content": "Hi"}], "<user>Hi<assistant>"),
        (BOTH, [USER | {"content": "Hi"}], "<user>Hi<assistant>"),
        (BOTH, [USER | {"content": parts("a", "b")}], "<user>[a][b]<assistant>"),
        (USER_PARTS, [{"role": "system", "content": "S"}, USER | {"content": "Hi"}], "<system>S<user>Hi<assistant>"),
        (
            USER_PARTS,
            [USER | {"content": "Hi"}, {"role": "assistant", "content": parts("x", "y")}, USER | {"content": parts("b", "c")}],
            "<user>Hi<assistant>x\ny<user>bc<assistant>",
        ),
        (
            TEMPLATES["gemma"],
            [USER | {"content": parts(" a ", "b")}],
            "<start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("{{ messages[0].content|tojson }}", [USER | {"content": parts("a")}], '"a"'),
    ],
)
def test_content_parts(words, template, chat, expected):
    words.chat_template, words.bos_token = template, None
    assert render_chat(words, chat) == expected


def test_a_string_goes_to_a_template_of_parts(small):
    """As a prompt, as everything else."""
    model = djax.load()
    model.tokenizer.chat_template = PARTS_ONLY
    out = djax.generate(model, "Hi", gen_length=8)
    assert model.tokenizer.decode(out.canvas[: out.prompt_length]) == "<user>Hi<assistant>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "image": "x"}], "expected content parts .* got one of type 'image'"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], "got one of type 'image_url'"),
        ([{"type": "text"}], "got one of type 'text'"),
        ([{"type": "text", "text": 5}], "got one of type 'text'"),
        (["text"], "got one of type 'str'"),
        ([None], "got one of type 'NoneType'"),
        ([], "expected some text, got an empty last message"),
        (parts(" ", "\n"), "expected some text, got an empty last message"),
        (b"bytes", "expected chat messages with the strings 'role' and 'content'"),
        (None, "expected chat messages with the strings 'role' and 'content'"),
        ({"type": "text", "text": "a"}, "expected chat messages with the strings 'role' and 'content'"),
    ],
)
def test_other_parts(words, content, message):
    words.chat_template = BOTH
    with pytest.raises(PromptError, match=message):
        render_chat(words, [{"role": "user", "content": content}])


# --- templates that fail


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate!') }}", "template refuses the chat: Roles must alternate!"),
        ("{{ raise_exception(messages) }}", "template refuses the chat: [{'role': 'user'"),
        ("{{ raise_exception('a\nb ' * 9999) }}", "a b a b"),
        ("{{ nothing.there }}", "fails on the chat: UndefinedError: 'nothing' is undefined"),
        ("{{ messages[9].content }}", "fails on the chat: UndefinedError: list object has no element 9"),
        ("{{ messages.__class__.__mro__ }}", "fails on the chat: SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "fails on the chat: SecurityError: access to attribute 'append'"),
        ("{{ '{0.__class__.x}'.format(1) }}", "fails on the chat: SecurityError: access to attribute '__class__'"),
        ("{% set ns = namespace(_x=1) %}", "fails on the chat: SecurityError: a namespace's names"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on the chat: RecursionError"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "fails on the chat: RecursionError"),
        ("{{ 1 / 0 }}", "fails on the chat: ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "fails on the chat: TypeError"),
        ("{% include 'x' %}", "fails on the chat: TypeError: no loader"),
        ("{{ 10 ** 4400 }}", "fails on the chat: ValueError"),
        ("{% for a, b in [1] %}{% endfor %}", "fails on the chat: TypeError"),
        ("{# nothing #}", "makes nothing of the chat"),
    ],
)
def test_templates_that_fail(small, template, message):
    model = djax.load()
    model.tokenizer.chat_template = template
    with pytest.raises(PromptError) as said:
        djax.generate(model, "Hi")
    assert message in str(said.value)
    assert len(str(said.value)) < 1000


def test_what_the_user_presses_passes(words, monkeypatch):
    """KeyboardInterrupt is no failure of the template."""

    def press(x, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", lambda x, **options: press(x) if options.get("indent") == 3 else "")
    words.chat_template = "{{ 1|tojson(indent=3) }}"
    with pytest.raises(KeyboardInterrupt):
        render_chat(words, [USER])


GROWN = "{{% set ns = namespace(a={0}, b={0}) %}}{{% for i in range(60) %}}{{% set ns.a = {1} %}}{{% set ns.b = {2} %}}{{% endfor %}}"
LISTS = GROWN.format("[1]", "[ns.a, ns.a]", "[ns.b, ns.b]")
TUPLES = GROWN.format("(1,)", "(ns.a, ns.a)", "(ns.b, ns.b)")
DICTS = GROWN.format("1", "{'x': ns.a, 'y': ns.a}", "{'x': ns.b, 'y': ns.b}")
DEEP = GROWN.format("()", "(ns.a,)", "1").replace("range(60)", "range(99999)")
LONG = "{% set s = 'a' * 1000000 %}{% set t = 'b' ~ 'a' * 500000 %}"
# Each would take minutes or more, or all of the memory, were it only run.
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested output": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "nested chars": "{% for a in 'x' * 999999 %}{% for b in 'x' * 999999 %}{% endfor %}{% endfor %}",
    "nested filtered": "{% for a in range(99999) if a in range(99999)|map('int') %}{% endfor %}",
    "recursive loop": "{% for x in [1] recursive %}{% for i in range(99999) %}{{ loop.index }}{% endfor %}{{ loop(range(99999)) }}{% endfor %}",
    "generation": "{% for a in range(99999) %}{% generation %}{% for b in range(99999) %}{% endfor %}{% endgeneration %}{% endfor %}",
    "tree of calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "cycler": "{% set c = cycler(1, 2) %}{% for a in range(99999) %}{% for b in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "times": "{{ 'x' * 10 ** 9 }}",
    "times left": "{{ 10 ** 9 * 'x' }}",
    "list times": "{{ ([0] * 10 ** 9)|length }}",
    "tuple times": "{{ ((0,) * 10 ** 9)|length }}",
    "safe times": "{{ ('x'|safe) * 10 ** 9 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power compared": "{% if 7 ** (7 ** 12) > 3 %}x{% endif %}",
    "squares": "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "center": "{{ 'x'|center(10 ** 9) }}",
    "center method": "{{ 'x'.center(10 ** 9) }}",
    "center map": "{{ ['x']|map('center', 10 ** 9)|list }}",
    "center block": "{% filter center(10 ** 9) %}x{% endfilter %}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "zfill": "{{ '1'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "translate": LONG + "{{ s.translate({97: t}) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "format map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "format digits": "{{ '{:\u0661\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660}'.format(1) }}",
    "format many": LONG + "{{ ('{0}' * 100000).format(s) }}",
    "format attr": "{{ ('{:1000000000}'|attr('format'))(1) }}",
    "format mapped": "{% for f in ['{:1000000000}']|map(attribute='format') %}{{ f(1) }}{% endfor %}",
    "format safe": "{{ ('{:1000000000}'|safe).format(1) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10 ** 9, 1) }}",
    "percent places": "{{ '%.1000000000f' % 1.5 }}",
    "percent names": LONG + "{{ ('%(a)s' * 100000) % {'a': s} }}",
    "percent bytes": "{{ '%1000000000d'.encode() % 1 }}",
    "percent filter": "{{ '%1000000000d'|format(1) }}",
    "percent filter names": LONG + "{{ ('%(a)s' * 100000)|format(a=s) }}",
    "join": LONG + "{{ range(99999)|join(s) }}",
    "join method": LONG + "{{ s.join(['a'] * 100000) }}",
    "replace": LONG + "{{ s|replace('a', s) }}",
    "replace method": LONG + "{{ s.replace('', s) }}",
    "indent": "{{ ('\n' * 100000)|indent(10 ** 6) }}",
    "indent text": "{{ ('\n' * 100000)|indent('x' * 100000) }}",
    "tojson indent": "{{ [[1]]|tojson(indent=10 ** 9) }}",
    "tojson separators": LONG + "{{ ([1] * 100000)|tojson(separators=(s, ':')) }}",
    "lipsum": "{{ lipsum(n=10 ** 8) }}",
    "lipsum words": "{{ lipsum(n=1, min=10 ** 8, max=10 ** 9) }}",
    "batch": "{{ [1]|batch(10 ** 9, 0)|list }}",
    "slice": "{% for x in [1]|slice(10 ** 9) %}{% endfor %}",
    "round": "{{ 5|round(-10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big')|length }}",
    "wordwrap": "{{ ('a ' * 500000)|wordwrap(1) }}",
    "urlize": "{{ (')' * 500000 ~ 'a')|urlize }}",
    "striptags": "{{ ('<!---->' * 200000)|striptags }}",
    "pprint": "{{ ([1] * 500000)|pprint }}",
    "sum of lists": "{{ ([[0] * 1000] * 10000)|sum(start=[])|length }}",
    "rfind": LONG + "{{ s.rfind(t) }}",
    "rsplit": LONG + "{{ s.rsplit(t)|length }}",
    "strip": LONG + "{{ s.strip(t) }}",
    "trim": LONG + "{{ s|trim(t) }}",
    "in list": "{% set r = range(99999)|list %}{% for i in r %}{% if -1 in r %}{% endif %}{% endfor %}",
    "in text": LONG + "{% for i in range(99999) %}{% if t in s %}{% endif %}{% endfor %}",
    "in test": LONG + "{{ range(99999)|map('string')|select('in', s)|list }}",
    "doubled": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubled by ~": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubled list": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubled block": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}",
    "doubled macro": "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns = namespace(s='x') %}{% for i in range(60) %}"
    "{% set ns.s = d(ns.s) %}{% endfor %}",
    "escaped": "{% set ns = namespace(s='<' * 100000) %}{% for i in range(20) %}{% set ns.s = ns.s|forceescape|string %}{% endfor %}",
    "kept texts": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['x' * 999999] %}{% endfor %}",
    "kept lists": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [('x ' * 99999).split()] %}{% endfor %}",
    "printed tree": LISTS + "{{ ns.a }}",
    "joined tree": LISTS + "{{ ns.a ~ '' }}",
    "json tree": DICTS + "{{ ns.a|tojson }}",
    "compared trees": LISTS + "{{ ns.a == ns.b }}",
    "compared dicts": DICTS + "{{ ns.a != ns.b }}",
    "tested trees": LISTS + "{{ ns.a is eq(ns.b) }}",
    "sorted trees": LISTS + "{{ [ns.a, ns.b]|sort|length }}",
    "indexed tree": LISTS + "{{ [ns.a].index(ns.b) }}",
    "changed tree": LISTS + "{% for x in [1, 2] %}{{ loop.changed(ns.a if x == 1 else ns.b) }}{% endfor %}",
    "hashed tree": TUPLES + "{{ {ns.a: 1}|length }}",
    "looked up tree": TUPLES + "{{ {1: 1}[ns.a] }}",
    "got tree": TUPLES + "{{ {1: 1}.get(ns.a) }}",
    "unique trees": TUPLES + "{{ [ns.a]|unique|list }}",
    "keyed tree": TUPLES + "{{ dict([(ns.a, 1)])|length }}",
    "keyed trees": TUPLES + "{{ dict.fromkeys([ns.a])|length }}",
    "formatted tree": TUPLES + "{{ '{!r}'.format(ns.a) }}",
    "percent tree": TUPLES + "{{ '%s' % (ns.a,) }}",
    "raised tree": TUPLES + "{{ raise_exception(ns.a) }}",
    "hashed depth": DEEP + DEEP.replace("namespace(a=(), b=())", "namespace(a=ns.a)") + "{{ {ns.a: 1}|length }}",
    "strftime": "{{ strftime_now('%Y' * 1000000) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_would_not_end(words, name):
    """In an error that names what was too much, within seconds and within little memory."""
    words.chat_template = ENDLESS[name]
    began = time.perf_counter()
    with pytest.raises(PromptError, match="chat template does more than it may: it .*pass token ids"):
        render_chat(words, [USER])
    assert time.perf_counter() - began < bounded_jinja.SECONDS + 5


def test_long_chains_of_generators_overflow_no_stack(words):
    """Each asks the one before: Python would crash."""
    chain = "{% set ns = namespace(g=[1]) %}{% for i in range(20000) %}{% set ns.g = ns.g|map('string') %}{% endfor %}"
    words.chat_template = chain + "{{ ns.g|list }}"
    assert render_chat(words, [USER]) == "['1']"


def test_all_of_them_together_take_little_memory():
    """In a process of its own, which may not have more."""
    code = (
        "import resource; from test_chat_template import *; words = load_tokenizer(SHIPPED)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('times', 'join', 'kept texts', 'kept lists', 'doubled list', 'percent names', 'replace', 'json tree'):\n"
        "    words.chat_template = ENDLESS[name]\n"
        "    try: print(render_chat(words, [USER])[:9])\n"
        "    except PromptError: pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=str(SHIPPED.parents[1] / "tests"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700, "MiB"


def test_threads_have_budgets_of_their_own(words):
    words.chat_template = "{% for i in range(90000) %}{{ '' }}{% endfor %}{{ messages[0].content }}"
    wrong = []

    def render():
        for _ in range(3):
            if render_chat(words, [USER]) != USER["content"]:
                wrong.append(1)

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- long prompts


@pytest.mark.parametrize("template", [None, STRINGS_ONLY])
@pytest.mark.parametrize("text", ["a" * 30_000_000, "a b " * 5_000_000])
def test_a_prompt_of_any_length_ends_soon(words, template, text):
    words.chat_template = template
    began = time.perf_counter()
    with pytest.raises(PromptError, match="expected at most 2,000,000 characters of text, got"):
        encode(words, text, 500, 1)
    if template:
        with pytest.raises(PromptError, match="expected at most 2,000,000 characters of text, got"):
            encode(words, [{"role": "user", "content": parts(text[:15_000_000], text[15_000_000:])}], 500, 1)
    assert time.perf_counter() - began < 5


def test_a_long_prompt_is_rendered(words):
    """The bounds are far above what a model can hold."""
    words.chat_template, words.bos_token = TEMPLATES["bailing with tools"], None
    chat = [USER, {"role": "assistant", "content": "<think>x</think>" + "b" * 20_000}] * 20 + [
        {"role": "user", "content": "c " * 200_000}
    ]
    assert render_chat(words, chat) == reference(words, chat)
    words.chat_template = TEMPLATES["chatml"]
    chat = [USER, {"role": "assistant", "content": "Yes."}] * 1000 + [USER]
    assert render_chat(words, chat) == reference(words, chat)


# --- at load


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "copy")


def give(directory, template):
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    (directory / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in b %}", "the chat template cannot be compiled: line 1: Unexpected end of template"),
        ("\n\n{{ a b }}", "line 3: expected token 'end of print statement', got 'b'"),
        ("{% nope %}", "line 1: Encountered unknown tag 'nope'"),
        ("{{ 1|nope }}", "line 1: No filter named 'nope'"),
        ("{{ " + "(" * 10_000, "cannot be compiled: maximum recursion depth exceeded"),
        ("{{ " + "[" * 300 + "]" * 300 + " }}", "cannot be compiled: "),
        ("{% if 1 %}" * 200 + "{% endif %}" * 200, "cannot be compiled: "),
        ("{% for a in [1] %}" * 40 + "{% endfor %}" * 40, "cannot be compiled: "),
        ("{{ a" + ".b" * 5_000 + " }}", "cannot be compiled: "),
        ("{% break %}", "cannot be compiled: 'break' outside loop"),
        ("{{ " + "9" * 9_999 + " }}", "cannot be compiled: Exceeds the limit"),
        ("x" * 300_000, "cannot be compiled: expected at most 200,000 characters, got 300,000"),
        (5, "chat template|tokenizer.json"),
        ([1], "chat template|tokenizer.json"),
        ([{"name": "default", "template": "{{"}], "cannot be compiled: line 1"),
        ([{"name": "default", "template": 5}], "cannot be compiled: expected a string, got int"),
    ],
)
def test_templates_that_do_not_parse(copy, template, message):
    give(copy, template)
    began = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        djax.load(copy)
    assert time.perf_counter() - began < 15


def test_what_would_take_long_does_not_at_load(copy):
    """Constants are worked out when the template is compiled, if they are."""
    give(copy, "{{ 'x' * 10 ** 9 }}{{ 'x'|center(10 ** 9) }}{% if 7 ** (7 ** 12) %}{% endif %}{{ '%1000000000d' % 1 }}")
    model = djax.load(copy)
    with pytest.raises(PromptError, match="does more than it may"):
        djax.generate(model, "Hi")


def test_several_templates(copy):
    """The default is taken; without one token ids still decode."""
    give(copy, [{"name": "default", "template": STRINGS_ONLY}, {"name": "tool_use", "template": "{{"}])
    assert render_chat(djax.load(copy).tokenizer, [USER]) == reference(djax.load(copy).tokenizer, [USER])
    give(copy, [{"name": "tool_use", "template": STRINGS_ONLY}, {"name": "rag", "template": STRINGS_ONLY}])
    model = djax.load(copy)
    assert len(djax.generate(model, [5, 6], gen_length=8).canvas) == 10
    with pytest.raises(PromptError, match="multiple chat templates"):
        djax.generate(model, "Hi")


def test_a_template_that_is_none(copy):
    give(copy, None)
    model = djax.load(copy)
    with pytest.raises(PromptError, match="no chat template; pass a string or token ids"):
        djax.generate(model, [USER])
    assert djax.generate(model, "Hi", gen_length=8).prompt_length == len(model.tokenizer("Hi")["input_ids"])
