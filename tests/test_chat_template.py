"""Chat templates: rendered as transformers renders them, whatever else they do ends soon and in an error of djax's own."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import djax
from djax.checkpoints.source import SHIPPED
from djax.errors import CheckpointError, PromptError
from djax.text import bounded_jinja, encode, load_tokenizer
from djax.text.chat_template import render_chat

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
        {"role": "user", "content": "Go on", "name": None, "extra": np.float32(0.5)},
    ],
}

# In the manner of what is published for each: constructs, whitespace and all.
TEMPLATES = {
    file.stem.replace("_", " "): file.read_bytes().decode()
    for file in sorted(Path(__file__).parent.glob("chat_templates/*.jinja"))
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
        with pytest.raises(PromptError, match=r"this checkpoint's chat template (refuses|fails on) the chat: ") as said:
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


def test_messages_that_are_none(words):
    words.chat_template = STRINGS_ONLY
    knot = {}
    knot["knot"] = knot
    for chat, message in (
        ([{"content": "a"}], "with the strings 'role' and 'content', which may be a list"),
        ([{"role": ["user"], "content": "a"}], "with the strings 'role' and 'content', which may be a list"),
        ([{"role": "tool", "content": "a"}], "expected role system, user or assistant, got 'tool'"),
        ([USER | {"knot": knot}], "nested (too deep|deeper than)"),
        ([USER | {"content": "\ud800"}], "expected text that UTF-8 can write"),
    ):
        with pytest.raises(PromptError, match=message):
            encode(words, chat, 500, 1)
    with pytest.raises(PromptError, match="expected chat messages, got str among them"):
        render_chat(words, [USER, "a"])


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


GROWN = "{{% set ns = namespace(a={0}, b={0}) %}}"
GROWN += "{{% for i in range(60) %}}{{% set ns.a = {1} %}}{{% set ns.b = {2} %}}{{% endfor %}}"
LISTS = GROWN.format("[1]", "[ns.a, ns.a]", "[ns.b, ns.b]")
TUPLES = GROWN.format("(1,)", "(ns.a, ns.a)", "(ns.b, ns.b)")
DICTS = GROWN.format("1", "{'x': ns.a, 'y': ns.a}", "{'x': ns.b, 'y': ns.b}")
DEEP = GROWN.format("()", "(ns.a,)", "1").replace("range(60)", "range(99999)")
LONG = "{% set s = 'a' * 900000 %}{% set t = 'b' ~ 'a' * 450000 %}"
# Each would take minutes or more, or all of the memory, were it only run.
ENDLESS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested output": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "nested chars": "{% for a in 'x' * 999999 %}{% for b in 'x' * 999999 %}{% endfor %}{% endfor %}",
    "nested filtered": "{% for a in range(99999) if a in range(99999)|map('int') %}{% endfor %}",
    "recursive loop": "{% for x in [1] recursive %}"
    "{% for i in range(99999) %}{{ loop.index }}{% endfor %}{{ loop(range(99999)) }}{% endfor %}",
    "generation": "{% for a in range(99999) %}"
    "{% generation %}{% for b in range(99999) %}{% endfor %}{% endgeneration %}{% endfor %}",
    "tree of calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "cycler": "{% set c = cycler(1, 2) %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ c.next() }}{% endfor %}{% endfor %}",
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
    "escaped": "{% set ns = namespace(s='<' * 100000) %}"
    "{% for i in range(20) %}{% set ns.s = ns.s|forceescape|string %}{% endfor %}",
    "kept texts": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + ['x' * 999999] %}{% endfor %}",
    "kept lists": "{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [('x ' * 99999).split()] %}{% endfor %}",
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
    with pytest.raises(PromptError, match=r"chat template does more than it may: it .*pass token ids"):
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
    with pytest.raises(PromptError, match="expected at most 1,000,000 characters of text, got"):
        encode(words, text, 500, 1)
    if template:
        with pytest.raises(PromptError, match="expected at most 1,000,000 characters of text, got"):
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
        (5, "chat_template: expected a string, or names with strings, got 5"),
        ([1], "chat_template: expected a string, or names with strings"),
        ([{"name": "default", "template": "{{"}], "cannot be compiled: line 1"),
        ([{"name": "default", "template": 5}], "chat_template: expected a string, or names with strings"),
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
