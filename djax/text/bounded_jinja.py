"""A jinja2 environment whose templates end: every step is counted, and nothing large is made before its size is known.

A chat template is a program of whoever made the checkpoint. jinja2's sandbox keeps it from files and from Python's insides,
but lets it run for hours or fill the memory. Here loops, calls, filters, tests, comparisons and pieces of output spend from a
budget (`Work`), by the size of what they read and make; operations whose result may be far larger than what they are given
(`'x' * n`, `**`, `%`, format, join, replace, center, ...) are measured first. Whatever is not known to take linear time is
charged the square of its size. Settings, extensions, filters and globals are otherwise those that transformers renders with.
"""

import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import update_wrapper
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, markup_join, str_join
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Cycler, Joiner, Namespace, pass_context, pass_eval_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

# Characters of a text and entries of a list: several times what fits any model that djax knows.
LONGEST = 1_000_000
# What a rendering may do: about a second of loops. Published templates take some hundred steps a message.
WORK = 2_000_000
# Where one step takes long, as between two steps of a template with very long expressions.
SECONDS = 10.0
# Steps of a call and of a filter or a test; a turn of a loop and a piece of output are one.
_CALL, _FILTER = 8, 2
# Characters that are read, and made, for one step. Making takes memory.
_READ, _MADE = 1024, 64
_INT_BITS = 20_000
DEEPEST = 200
_MOST_PRECISION = 1000
# Filters that no template can name.
_EACH, _MEASURED, _JOINED, _SLICED = "djax each", "djax measured", "djax joined", "djax sliced"

_Collection = list | tuple | set | frozenset | type({}.keys()) | type({}.values()) | type({}.items())


class LimitError(Exception):
    """A template does more than it may. No subclass of what filters catch."""


class RefusedError(jinja2.TemplateError):
    """The template called raise_exception: the message is its own."""


class Work:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._left = WORK
        self._until = time.monotonic() + SECONDS

    def spend(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise LimitError(f"it takes more than {WORK:,} steps")
        if time.monotonic() > self._until:
            raise LimitError(f"it takes more than {SECONDS:.0f} s")

    def make(self, size: int) -> None:
        """A text of so many characters is made next."""
        if size > LONGEST:
            raise LimitError(f"it makes a text of more than {LONGEST:,} characters")
        self.spend(1 + size // _MADE)

    def fill(self, entries: int) -> None:
        """A collection of so many entries is made next."""
        if entries > LONGEST:
            raise LimitError(f"it makes a list of more than {LONGEST:,} entries")
        self.spend(1 + entries)

    def measure(self, *values: object) -> int:
        """Characters and entries of the values, everything inside them as often as it is there: what printing, comparing
        or hashing them takes. A list of lists of lists may be short and yet stand for any number of entries."""
        size, entries, depth, level = 0, 0, 0, list(values)
        while level:
            depth += 1
            if depth > DEEPEST:  # hashing a tuple that deep would overflow the stack
                raise LimitError(f"it nests values more than {DEEPEST} deep")
            inner: list[Any] = []
            for value in level:
                if isinstance(value, str | bytes):
                    size += len(value)
                elif isinstance(value, int):
                    size += value.bit_length() // 3
                elif isinstance(value, dict):
                    inner += value.keys()
                    inner += value.values()
                elif isinstance(value, _Collection):
                    inner += value
                if len(inner) > 2 * LONGEST:
                    break
            entries += len(level)
            self.spend(len(level))
            level = inner
            if size + entries + len(level) > 2 * LONGEST:
                raise LimitError(f"it handles a value of more than {2 * LONGEST:,} characters")
        self.spend(size // _READ)
        return size + entries


_work: ContextVar[Work] = ContextVar("work")


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The rendered text, of at most `LONGEST` characters. Raises `LimitError`, and whatever the template raises."""
    token = _work.set(Work())
    try:
        return template.render(variables)
    finally:
        _work.reset(token)


def compile_template(text: str) -> jinja2.Template:
    """Raises jinja2's `TemplateSyntaxError`, `RecursionError` and others for what is no template."""
    environment = Bounded()
    tree = _Counting().visit(environment.parse(text))
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _Counting(NodeTransformer):
    """Rewrites a template so that what it does without a call is counted too."""

    @staticmethod
    def _filtered(node: nodes.Node, name: str, *arguments: nodes.Expr) -> nodes.Filter:
        where = dict(lineno=node.lineno, environment=node.environment)
        return nodes.Filter(node, name, list(arguments), [], None, None, **where)

    def _measured(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else self._filtered(node, _MEASURED)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, _EACH)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._filtered(node.nodes[0], _JOINED, *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._measured(node.expr)
        for operand in node.ops:
            operand.expr = self._measured(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        long = isinstance(node.arg, nodes.Slice) and not isinstance(node.node, nodes.Literal)
        return self._filtered(node, _SLICED) if long else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Dict:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._measured(pair.key)
        return node


# --- what an operation is charged before it runs: rules(work, receiver or value, *arguments, **arguments)


def _by_value(values: Iterable[Any]) -> int:
    """Whole numbers as the sizes that they may be asked to be."""
    return sum(abs(value) for value in values if isinstance(value, int))


def _nothing(work: Work, *values: object, **named: object) -> None:
    pass


def _reads(work: Work, *values: object, **named: object) -> None:
    work.measure(*values, *named.values())


def _reads_arguments(work: Work, value: object, *values: object, **named: object) -> None:
    work.measure(*values, *named.values())


def _has_size(work: Work, *values: object, **named: object) -> None:
    """A number among the arguments is a width or a count."""
    values += tuple(named.values())
    work.make(work.measure(*values) + _by_value(values))


def _multiplies(work: Work, text: object, *values: object, **named: object) -> None:
    """Every character of the text may be compared with every one of the argument's."""
    work.spend(work.measure(text) * work.measure(*values, *named.values()) // _READ)


def _squares(work: Work, *values: object, **named: object) -> None:
    values += tuple(named.values())
    work.spend((work.measure(*values) + _by_value(values)) ** 2 // _READ)


def _copies(work: Work, value: object, *values: object, **named: object) -> None:
    if isinstance(value, str):
        work.make(len(value))
    if isinstance(value, str | dict | _Collection):
        work.fill(len(value))


def _groups(work: Work, value: object, *values: object, **named: object) -> None:
    """The number among the arguments is a count of entries."""
    work.fill(_by_value((*values, *named.values())))
    _copies(work, value)


def _joins(work: Work, values: object, d: object = "", attribute: object = None) -> None:
    count = len(values) if isinstance(values, str | dict | _Collection | range) else 0
    work.make(work.measure(values) + count * work.measure(d))


def _replaces(work: Work, text: object, old: object, new: object, count: object = None) -> None:
    size = work.measure(text)
    places = size // max(1, len(old) if isinstance(old, str | bytes) else 1) + 1
    work.make(size + places * work.measure(new))


def _indents(work: Work, text: object, width: object = 4, first: bool = False, blank: bool = False) -> None:
    size = work.measure(text)
    _copies(work, text)
    lines = 1 + (len(text.splitlines()) if isinstance(text, str) else 0)
    work.make(size + lines * (abs(width) if isinstance(width, int) else work.measure(width)))


def _rounds(work: Work, value: object, precision: object = 0, method: object = "common") -> None:
    work.measure(value)
    if isinstance(precision, int) and abs(precision) > _MOST_PRECISION:
        raise LimitError(f"it rounds to more than {_MOST_PRECISION} places")


def _writes_json(
    work: Work,
    value: object,
    ensure_ascii: object = False,
    indent: object = None,
    separators: object = None,
    sort_keys: object = False,
) -> None:
    size = work.measure(value, separators, indent)
    width = abs(indent) if isinstance(indent, int) else work.measure(indent)
    between = 1 if separators is None else work.measure(separators)
    deep = 0 if indent is None else _depth(value)
    work.make(size * (1 + width * deep + between))


def _depth(value: object) -> int:
    """How deep a value, already measured, is nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = [one for one in level if isinstance(one, dict | list | tuple)]
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
    return depth


def _digits(text: str) -> int:
    """The sum of all the numbers in a text, any of which may be a width."""
    return sum(int(number) if len(number) < 10 else LONGEST for number in re.findall(r"\d+", text))


def _formats(work: Work, template: object, *values: object, **named: object) -> None:
    """`template % values`"""
    given: Any = named or values
    if not isinstance(template, str | bytes):
        template = str(template) if work.measure(template) else ""
    text = template.decode("latin-1") if isinstance(template, bytes) else template
    size = work.measure(template) + _digits(text) + text.count("*") * _by_value(values)
    # What is taken by name may be taken often.
    often = text.count("%") if named or (len(values) == 1 and isinstance(values[0], dict)) else 1
    work.make(size + often * work.measure(given))


Rule = Callable[..., None]
# Filters that only pass on what they are given, or take it one by one.
_LAZY: dict[str, Rule] = {
    **dict.fromkeys(("attr", "count", "d", "default", "first", "items", "last", "length", "map", "random"), _nothing),
    **dict.fromkeys(("reject", "rejectattr", "safe", "select", "selectattr"), _nothing),
}
_FILTERS: dict[str, Rule] = {
    **_LAZY,
    **dict.fromkeys(("abs", "capitalize", "dictsort", "e", "escape", "filesizeformat", "float", "forceescape"), _reads),
    **dict.fromkeys(("groupby", "int", "lower", "max", "min", "sort", "string", "title", "truncate", "unique"), _reads),
    **dict.fromkeys(("upper", "urlencode", "wordcount", "xmlattr"), _reads),
    **dict.fromkeys(("list", "reverse", _SLICED), _copies),
    **dict.fromkeys(("batch", "slice"), _groups),
    "center": _has_size,
    "format": _formats,
    "indent": _indents,
    "join": _joins,
    "replace": _replaces,
    "round": _rounds,
    "tojson": _writes_json,
    "trim": _multiplies,
    _JOINED: lambda work, *values: work.make(work.measure(*values)),
}
# Filters that take all of what is passed one by one.
_COMPLETE = ("join", "max", "min", "sort", "sum", "unique", "groupby")
_METHODS: dict[str, Rule] = {
    **dict.fromkeys(("get", "items", "keys", "values"), _reads_arguments),
    **dict.fromkeys(("bit_length", "capitalize", "casefold", "count", "encode", "endswith", "find", "index"), _reads),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"), _reads),
    **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper", "is_integer", "lower"), _reads),
    **dict.fromkeys(("partition", "removeprefix", "removesuffix", "split", "splitlines", "startswith"), _reads),
    **dict.fromkeys(("swapcase", "title", "upper"), _reads),
    **dict.fromkeys(("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"), _multiplies),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _has_size),
    "copy": _copies,
    "join": lambda work, separator, values: _joins(work, values, separator),
    "replace": _replaces,
}
_PASSED_ON = ("get", "items", "keys", "values")
# Tests that look at no more than what kind of value it is.
_KINDS = (
    *("boolean", "callable", "defined", "divisibleby", "even", "false", "filter", "float", "integer"),
    *("iterable", "mapping", "none", "number", "odd", "sameas", "sequence", "string", "test", "true"),
    "undefined",
)


def _count(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, each a step of the rendering that asks for it."""
    spend = _work.get().spend
    for value in values:
        spend()
        yield value


def _counted(value: object) -> Any:
    """An argument, which C may go through without a step that is seen here."""
    if isinstance(value, range):
        _work.get().spend(len(value))
    # A loop's own context is one, too, and goes through what is counted already.
    return _count(value) if isinstance(value, Iterator) and not isinstance(value, LoopContext) else value


def _give(values: list[Any], error: Exception) -> Iterator[Any]:
    """The error comes when it would have come: never, if nobody asks."""
    yield from values
    raise error


def _made(work: Work, result: object, new: bool = True) -> Any:
    """A result, charged if it is new. What it gives one by one is made at once: a long chain of generators, each of which asks
    the one before, would overflow Python's own stack. It can still be gone through only once, and is true if it is empty."""
    if isinstance(result, Iterator):
        values: list[Any] = []
        try:
            for value in _count(result):
                values.append(value)  # what comes before an error counts
        except LimitError:
            raise
        except Exception as error:
            return _give(values, error.with_traceback(None))
        return iter(values)
    if new and isinstance(result, str | bytes):
        work.make(len(result))
    elif new and isinstance(result, dict | _Collection):
        work.fill(len(result))
    elif isinstance(result, int) and result.bit_length() > _INT_BITS:
        raise LimitError(f"it makes a number of more than {_INT_BITS:,} bits")
    return result


def _bound_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    rule, passed = _FILTERS.get(name, _squares), getattr(function, "jinja_pass_arg", None)

    # Filters that are passed the context are not called when a template is compiled, whatever their arguments.
    @pass_context
    def bounded(__context: Context, *values: object, **named: object) -> Any:
        work = _work.get()
        work.spend(_FILTER)
        values = tuple(map(_counted, values))
        if name in _COMPLETE and isinstance(values[0], Iterator):
            values = (list(values[0]), *values[1:])
        rule(work, *values, **named)
        return _made(work, function(*_also(passed, __context), *values, **named), new=name not in _LAZY)

    return bounded


def _bound_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def bounded(__context: Context, *values: object, **named: object) -> Any:
        work = _work.get()
        work.spend(_FILTER)
        values = tuple(map(_counted, values))
        if name not in _KINDS:
            _reads(work, *values, **named)
        return function(*_also(passed, __context), *values, **named)

    return bounded


def _also(passed: Any, context: Context) -> tuple[Any, ...]:
    """What jinja2 passes to a function that is marked for it."""
    if passed is None:
        return ()
    return ({"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[passed.name],)


@pass_context
def _each(context: Context, values: Any) -> Any:
    return _count(values)


@pass_context
def _measured(context: Context, value: object) -> Any:
    _work.get().measure(value)
    return value


@pass_context
def _joined(context: Context, *values: object) -> str:
    return (markup_join if context.eval_ctx.autoescape else str_join)(values)


@pass_context
def _sliced(context: Context, value: object) -> Any:
    return value


class _Formatter(SandboxedFormatter):
    """str.format with every field measured, and all of them together."""

    made = 0

    def format_field(self, value: object, format_spec: str) -> str:
        work = _work.get()
        work.make(work.measure(value) + _digits(format_spec))
        field = super().format_field(value, format_spec)
        self.made += len(field)
        work.make(self.made)
        return field

    def convert_field(self, value: Any, conversion: Any) -> Any:
        _work.get().measure(value)
        return super().convert_field(value, conversion)


class _EscapingFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


class Bounded(ImmutableSandboxedEnvironment):
    """See the module. One environment a template."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_finalize
        )
        self.filters["tojson"] = _write_json
        self.filters = {name: _bound_filter(name, f) for name, f in self.filters.items()}
        self.filters |= {_EACH: _each, _MEASURED: _measured}
        self.filters |= {name: _bound_filter(name, f) for name, f in ((_JOINED, _joined), (_SLICED, _sliced))}
        tests: Mapping[str, Any] = self.tests  # jinja2 infers `function`, which nothing takes
        self.tests = {name: _bound_test(name, f) for name, f in tests.items()}
        self.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace, "strftime_now": _now}
        self._free = [f for name, f in self.globals.items() if name not in ("lipsum", "strftime_now")]

    def concat(self, pieces: Iterable[str]) -> str:
        """Pieces of output become a text: what is rendered, and what a macro or a set block gives."""
        work, kept, size = _work.get(), [], 0
        for piece in pieces:
            size += len(piece)
            if size > LONGEST:
                raise LimitError(f"it makes a text of more than {LONGEST:,} characters")
            work.spend()
            kept.append(piece)
        work.make(size)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> Any:
        work = _work.get()
        work.spend()
        if operator == "+":
            for kinds, charge in (((str, bytes), work.make), ((list, tuple), work.fill)):
                if isinstance(left, kinds) and isinstance(right, kinds):
                    charge(len(left) + len(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
                    charge = work.make if isinstance(many, str | bytes) else work.fill
                    charge(len(many) * max(0, times))
        elif operator == "%" and isinstance(left, str | bytes):
            _formats(work, left, *(right if isinstance(right, tuple) else (right,)))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _INT_BITS:
                raise LimitError(f"it makes a number of more than {_INT_BITS:,} bits")
        return _made(work, super().call_binop(context, operator, left, right), new=False)

    def getitem(self, obj: object, argument: object) -> Any:
        if isinstance(argument, tuple):  # whose hash is made of everything in it
            _work.get().measure(argument)
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format and format_map, where jinja2 asks for a safe form of them."""
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__

        def formatted(*values: Any, **named: Any) -> str:
            if value.__name__ == "format_map":
                (named,), values = values, ()
            _work.get().make(len(text))
            if isinstance(text, Markup):
                return type(text)(_EscapingFormatter(self, escape=text.escape).vformat(text, values, named))
            return _Formatter(self).vformat(text, values, named)

        return update_wrapper(formatted, value)

    def call(__self, __context: Context, __obj: Any, *values: Any, **named: Any) -> Any:
        work = _work.get()
        work.spend(_CALL)
        values = tuple(map(_counted, values))
        # jinja2 passes the variables of the loop in two names of its own.
        given = {name: value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")}
        owner, new = getattr(__obj, "__self__", None), True
        if isinstance(__obj, LoopContext) and values:  # a recursive loop's own call
            values = (_count(values[0]), *values[1:])
        elif isinstance(__obj, types.BuiltinMethodType) and not isinstance(owner, type | types.ModuleType | None):
            if isinstance(values[0] if values else None, Iterator) and __obj.__name__ == "join":
                values = (list(values[0]),)
            _METHODS.get(__obj.__name__, _squares)(work, owner, *values, **given)
            new = __obj.__name__ not in _PASSED_ON
        elif any(__obj is __self.globals[name] for name in ("dict", "namespace")):
            work.measure(*values)  # keys among them are hashed
        elif isinstance(owner, LoopContext | Cycler | Joiner):
            work.measure(*values, *given.values())
            new = False
        elif not __self._is_free(__obj, owner):
            _squares(work, *values, **given)
        return _made(work, super().call(__context, __obj, *values, **named), new)

    def _is_free(self, function: object, owner: object) -> bool:
        """What only runs more of the template, counts by itself or takes no time."""
        if isinstance(function, Macro | LoopContext | BlockReference) or isinstance(owner, jinja2.ext.Extension):
            return True
        formats = isinstance(function, types.FunctionType) and function.__name__ in ("format", "format_map")
        return formats or any(function is one for one in self._free)


@pass_context
def _finalize(context: Context, value: object) -> Any:
    """Every expression that is printed: str() of it comes next."""
    if not isinstance(value, str):
        _work.get().measure(value)
    return value


# --- what transformers adds to jinja2


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's text for those who train, and prints it."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        block = nodes.CallBlock(self.call_method("_print"), [], [], body)
        block.set_lineno(line)
        return block

    @pass_eval_context
    def _print(self, context: nodes.EvalContext, caller: Macro) -> str:
        return caller()


def _write_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    _work.get().measure(message)
    raise RefusedError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)


class _Dict:
    """dict(...) and dict.fromkeys(...), and nothing else of the type."""

    def __call__(self, *values: object, **named: object) -> dict:
        return dict(*values, **named)

    def fromkeys(self, *values: Any) -> dict:
        return dict.fromkeys(*values)


class _Namespace(Namespace):
    """A namespace whose names begin with no underscore, as transformers has it."""

    def __init__(*values: object, **named: object) -> None:
        self, values = values[0], values[1:]
        given = dict(*values, **named)
        for name in given:
            _Namespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: object) -> None:
        _Namespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace's names begin with no underscore, got {name!r:.100}")

    def __repr__(self) -> str:
        attributes = dict(self._Namespace__attrs)  # jinja2's name for them
        _work.get().measure(attributes)
        return f"<Namespace {attributes!r}>"
