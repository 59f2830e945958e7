"""Drawn calls of every public function: strange values in every argument, and objects whose own methods raise.

A call that comes out with anything but a typed error (or `TypeError` for an argument that does not exist) fails, as does one
that takes too long, one that accepts what means nothing, and one whose answer is not that of the plain call it stands for.
`DJAX_TEST_FUZZ=1 pytest -n 0 -s tests/test_door_fuzz.py` draws 4,320 calls instead of 600 and prints the figures.
"""

import array
import collections
import contextlib
import dataclasses
import datetime
import enum
import faulthandler
import itertools
import os
import random
import signal
import threading
import time
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model
from toy import toy_model

import djax
from djax.caching import CACHES
from djax.decoding import DECODERS
from djax.decoding.contract import write
from djax.decoding.smoothing import SMOOTHINGS
from djax.errors import DjaxError
from djax.plugs import parse
from djax.runtime.compilation import enable_cache

try:
    import torch
except ImportError:
    torch = None

FULL = bool(os.environ.get("DJAX_TEST_FUZZ"))
SECONDS = 60  # after which a call hangs
MODEL, NETWORK = toy_model(), tiny_model()
EOS = MODEL.config.eos_id
# What is in no plain call: it has to be refused.
NONSENSE = type("Nonsense", (), {"__repr__": lambda self: "NONSENSE"})()


class Odd(BaseException):
    """Like a panic of a library: no Exception."""


class Hangs(KeyboardInterrupt):
    """Which nothing of djax may catch."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A value to call with, and the plain one it stands for. own: code of its own may run, and raise."""

    value: object
    plain: object
    own: bool = False


RAISED = (
    *(ValueError, TypeError, ZeroDivisionError, AttributeError, KeyError, IndexError, RuntimeError, RecursionError),
    *(MemoryError, StopIteration, AssertionError, NotImplementedError, OSError, OverflowError, GeneratorExit, Odd),
)
SPECIAL = (
    *("__repr__", "__str__", "__array__", "__len__", "__iter__", "__getitem__", "__eq__", "__hash__", "__bool__", "__float__"),
    *("__int__", "__index__", "__fspath__", "__contains__", "__lt__", "__le__", "__ge__", "__gt__", "__class__", "__getattr__"),
    *("__iter__", "__next__", "__format__", "__call__", "ndim", "shape", "dtype", "item", "keys", "get", "init", "step"),
    *(
        "reach",
        "plan",
        "weight",
        "least",
        "edit",
        "keeps",
        "draws",
        "edits",
        "tolist",
        "strip",
        "encode",
        "__array_interface__",
    ),
)


def hostile(rng, base=object, *made_of):
    """An object some of whose methods and attributes raise."""
    error = rng.choice(RAISED)

    def fail(*args, **kwargs):
        raise error()

    names = rng.sample(SPECIAL, rng.choice((1, 2, 5, len(SPECIAL) // 2)))
    if base is not object:
        names = [n for n in names if n not in ("__class__", "__getattr__")] + ["__repr__"]
    members = {
        n: property(fail) if n in ("__class__", "ndim", "shape", "dtype", "keeps", "draws", "edits") else fail for n in names
    }
    return type("Hostile", (base,), members)(*made_of)


class Mean(enum.IntEnum):
    THREE = 3


@contextlib.contextmanager
def within(seconds):
    """Raises `Hangs` in a call that takes longer; what not even that ends is ended with all threads' stacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def leaked():
    """What a function that jax traced left behind."""
    kept = []
    jax.eval_shape(lambda x: kept.append(x) or x, jnp.float32(1))
    return kept[0]


def deleted():
    gone = jnp.float32(0.5) + 0
    gone.delete()
    return gone


LEAKED, DELETED = leaked(), deleted()
NOTHING = [  # means no number anywhere
    *(lambda: object(), lambda: "0.5", lambda: "", lambda: b"3", lambda: bytearray(b"3"), lambda: memoryview(b"3"), lambda: 3j),
    *(lambda: Decimal(3), lambda: {}, lambda: {3}, lambda: {"input_ids": [3]}, lambda: (x for x in (3,)), lambda: iter([3])),
    *(lambda: len, lambda: int, lambda: np, lambda: jnp.float32, lambda: np.float32, lambda: djax.Threshold, lambda: ...),
    *(
        lambda: datetime.timedelta(3),
        lambda: np.timedelta64(3, "s"),
        lambda: np.timedelta64(3, "ns"),
        lambda: np.datetime64(3, "ns"),
    ),
    *(lambda: np.ma.masked, lambda: np.ma.array(3, mask=True), lambda: jax.random.key(0), lambda: DELETED),
    *(lambda: jax.ShapeDtypeStruct((), jnp.float32), lambda: jax.sharding.PartitionSpec(), lambda: np.array("3")),
    *(lambda: np.array(None), lambda: np.array([[3]]), lambda: float("nan"), lambda: float("inf"), lambda: -float("inf")),
    *(lambda: 10**400, lambda: -(10**400), lambda: 10**5000, lambda: Fraction(10**400), lambda: Fraction(10**5000, 3)),
    *(lambda: np.longdouble("1e4000"), lambda: 1e300, lambda: np.float64(1e39), lambda: np.array(np.nan), lambda: jnp.inf),
    *(lambda: np.bool_(True), lambda: np.zeros((), [("a", int)]), lambda: Exception("3"), lambda: NotImplemented),
]
if torch is not None:
    NOTHING += [
        *(lambda: torch.tensor(True), lambda: torch.tensor(3j), lambda: torch.tensor(0.5, requires_grad=True)),
        *(lambda: torch.float32, lambda: torch.tensor(float("nan"))),
    ]


def nothing(rng):
    value = hostile(rng) if rng.random() < 0.4 else rng.choice(NOTHING)()
    return Drawn(value, NONSENSE, own=True)


def whole(rng, n, raises=0.1):
    """A spelling of a whole number."""
    if not -(2**63) <= n < 2**63:
        return Drawn(n, n)
    ways = [lambda: n, lambda: np.int64(n), lambda: np.array(n), lambda: np.ma.array(n), lambda: type("Int", (int,), {})(n)]
    if -(2**31) <= n < 2**31:
        ways += [lambda: np.int32(n), lambda: jnp.int32(n), lambda: jnp.array(n)]
    if 0 <= n < 128:
        ways += [lambda: np.uint8(n), lambda: np.int8(n), lambda: np.array(n, ">i4")]
    if n == 3:
        ways.append(lambda: Mean.THREE)
    if torch is not None:
        ways += [lambda: torch.tensor(n), lambda: np.asarray(torch.tensor(n))]
    if rng.random() < raises:
        return Drawn(hostile(rng, int, n), n, own=True)
    return Drawn(rng.choice(ways)(), n)


def real(rng, x):
    ways = [lambda: x, lambda: np.float64(x), lambda: np.array(x), lambda: Fraction(x), lambda: np.longdouble(x)]
    if float(np.float32(x)) == x:
        ways += [lambda: np.float32(x), lambda: jnp.float32(x), lambda: np.ma.array(x, np.float32)]
    if x == int(x):
        return whole(rng, int(x)) if rng.random() < 0.5 else Drawn(rng.choice(ways)(), x)
    if torch is not None:
        ways.append(lambda: torch.tensor(x, dtype=torch.float64))
    if rng.random() < 0.1:
        return Drawn(hostile(rng, float, x), x, own=True)
    return Drawn(rng.choice(ways)(), x)


def flag(rng):
    value = rng.random() < 0.5
    if rng.random() < 0.3:
        return rng.choice(
            [
                Drawn(hostile(rng), NONSENSE, own=True),
                Drawn(0, NONSENSE),
                Drawn(None, NONSENSE),
                Drawn("yes", NONSENSE),
                Drawn([1], NONSENSE),
            ]
        )
    return Drawn(rng.choice([value, np.bool_(value), np.array(value), jnp.array(value)]), value)


def maybe(rng, make, chance=0.5):
    """A spelling of something legal, or something that is not."""
    return make() if rng.random() < chance else nothing(rng)


FIELDS = {  # of each constructor: the kind of each field and values that are legal, on the border and beyond
    "Threshold": {"tau": (0.9, 0.5, 1.5, 0.0, -1.0, 1e-60), "slack": (0.0, 0.25, -1.0)},
    "Fixed": {"per_step": [1, 3, 0, -1, 2**31 - 1, 2**31], "steps": [1, 3, 0]},
    "Credit": {"alpha": (0.5, 0.0, -1.0), "gamma": (0.5, -1.0), "beta": (0.5, 1.0, 1.5)},
    "Hierarchy": {"high": (0.75, 0.25), "low": (0.5, 0.0, 0.875)},
    "Factor": {"f": (0.5, 2.0, 0.0)},
    "Entropy": {"theta": (0.5, 0.0, -1.0)},
    "Edit": {"tau": (0.5, 0.0), "post_steps": [0, 3, 1024, 1025, -1]},
    "Prefix": {"every": [1, 3, 0], "surplus": None},
    "Dual": {"every": [1, 3, 0], "surplus": None},
    "Vicinity": {"before": [0, 3, -1], "after": [0, 3], "warmup": [0, 3, -1], "every": [3, 0]},
    "Smoothing": {"first": (0.5, -1.0), "growth": (0.25, -1.0), "last": (0.5,), "threshold_decay": (0.5, -1.0), "top": [3, 0]},
}


def field(rng, kind, chance=0.6):
    if kind is None:
        return flag(rng)
    make = (lambda: whole(rng, rng.choice(kind))) if isinstance(kind, list) else (lambda: real(rng, rng.choice(kind)))
    return maybe(rng, make, chance)


def constructor(rng):
    name = rng.choice(sorted(FIELDS))
    chosen = rng.sample(sorted(FIELDS[name]), rng.randint(1, len(FIELDS[name])))
    options = {f: field(rng, FIELDS[name][f]) for f in chosen}
    if name in ("Credit", "Edit") and rng.random() < 0.3:
        options["inner"] = rng.choice([nothing(rng), Drawn(djax.Fixed(2), djax.Fixed(2)), Drawn(djax.Edit(), NONSENSE)])
    if name == "Fixed" and rng.random() < 0.3:
        order = rng.choice(
            [nothing(rng), Drawn(hostile(rng, str, "random"), "random", own=True), Drawn(np.str_("random"), "random")]
        )
        options["order"] = order
    return getattr(djax, name), (), options


# ---------------------------------------------------------------- prompts


def ids(rng, count=None):
    return [rng.randint(1, 40) for _ in range(count or rng.randint(1, 6))]


def as_array(rng, rows):
    ways = [
        lambda: np.array(rows, rng.choice([np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i8"])),
        lambda: jnp.array(rows),
        lambda: np.ma.array(rows),
    ]
    if torch is not None:
        ways += [lambda: torch.tensor(rows), lambda: torch.tensor(rows, dtype=torch.uint8)]
    return rng.choice(ways)()


def as_list(rng, row):
    ways = [
        *(lambda: list(row), lambda: tuple(row), lambda: collections.deque(row), lambda: collections.UserList(row)),
        *(lambda: array.array("i", row), lambda: [whole(rng, i, raises=0).value for i in row], lambda: as_array(rng, row)),
    ]
    if torch is not None:
        ways.append(lambda: list(torch.tensor(row)))
    return rng.choice(ways)()


def padded(rng, rows):
    """A tokenizer's output, with anything where the mask hides it, and perhaps a mask that is wrong."""
    width = max(map(len, rows)) + rng.randint(0, 2)
    left = rng.choice([True, False, None])
    tokens, mask = [], []
    for row in rows:
        rest = width - len(row)
        before = rest if left else 0 if left is False else rng.randint(0, rest)
        junk = [rng.choice([EOS, 0, -100 % 48]) for _ in range(rest)]
        tokens.append(junk[:before] + row + junk[before:])
        mask.append([0] * before + [1] * len(row) + [0] * (rest - before))
    wrong = rng.random() < 0.25
    if wrong:
        row = rng.choice(mask)
        kind = rng.choice(["hole", "two", "nothing", "short", "more", "float", "other", "negative"])
        if kind == "hole":
            for m in mask:
                m[:] = [1, 0, 1] + [0] * (width - 3) if width >= 3 else [0] * width
        elif kind == "two":
            row[rng.randrange(width)] = 2
        elif kind == "negative":
            row[rng.randrange(width)] = -1
        elif kind == "nothing":
            row[:] = [0] * width
        elif kind == "short":
            mask = [m[:-1] for m in mask]
        elif kind == "more":
            mask.append([1] * width)
        elif kind == "float":
            mask = np.array(mask, float)
        else:
            mask = nothing(rng).value
            mask = 3 if mask is None else mask
    else:
        mask = rng.choice([lambda: mask, lambda: as_array(rng, mask), lambda: np.array(mask, bool), lambda: tuple(mask)])()
    form = rng.choice([dict, collections.UserDict, encoding])
    tokens = tokens if rng.random() < 0.4 else as_array(rng, tokens)
    return Drawn(form({"input_ids": tokens, "attention_mask": mask}), NONSENSE if wrong else rows, own=wrong)


def encoding(given):
    from transformers import BatchEncoding

    return BatchEncoding(given)


class Lies(collections.abc.Sequence):
    """A sequence that says another length than it has."""

    def __init__(self, count, item):
        self.count, self.item = count, item

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if self.count < 0 or i == 2:
            raise IndexError
        return self.item

    def __iter__(self):
        return itertools.repeat(self.item) if self.count < 4 else iter([self.item])


def bad_prompts(rng):
    row = ids(rng, 3)
    ways = [
        *(lambda: [], lambda: [[]], lambda: bytes(row), lambda: bytearray(row), lambda: memoryview(bytes(row)), lambda: 3),
        *(lambda: iter(row), lambda: (i for i in row), lambda: set(row), lambda: dict.fromkeys(row), lambda: None),
        *(lambda: [bytes(row)], lambda: [row, bytearray(row)], lambda: [row, 3], lambda: [3, row], lambda: [row, "text"]),
        *(lambda: [True, False], lambda: [np.bool_(True), 3], lambda: [row, [True]], lambda: [3.0, 4.0], lambda: [row, [None]]),
        *(lambda: np.ma.array(row, mask=[0, 0, 1]), lambda: [np.ma.array(row, mask=[0, 1, 0]), row], lambda: [3, np.ma.masked]),
        *(lambda: np.array(row, "m8[ns]"), lambda: np.array(row, "M8[s]"), lambda: list(np.array(row, "m8[ns]"))),
        *(
            lambda: [datetime.timedelta(3)],
            lambda: np.array(row, bool),
            lambda: np.array(row, float),
            lambda: np.array(row, object),
        ),
        *(
            lambda: np.array(["a", "b"]),
            lambda: np.array(3),
            lambda: jnp.int32(3),
            lambda: np.int64(3),
            lambda: np.zeros((1, 1, 1), int),
        ),
        *(lambda: jax.random.key(0), lambda: jax.random.split(jax.random.key(0)), lambda: [jax.random.key(0)]),
        *(lambda: np.zeros((0, 3), int), lambda: np.zeros((2, 0), int), lambda: np.array([[EOS, 3], [4, 5]])),
        *(
            lambda: np.array([[3, EOS], [4, 5]]),
            lambda: jnp.array([[EOS, EOS, 3], [EOS, 4, 5]]),
            lambda: [-1],
            lambda: [10**30],
        ),
        *(
            lambda: [2**63, -1],
            lambda: [48],
            lambda: [47],
            lambda: range(10**12),
            lambda: range(10**30),
            lambda: [range(10**12)],
        ),
        *(lambda: np.broadcast_to(np.int32(3), 10**12), lambda: np.broadcast_to(np.int32(3), (10**10, 3))),
        *(lambda: Lies(10, [3]), lambda: Lies(-1, 3), lambda: Lies(2**40, "text")),
        *(lambda: {"input_ids": row, "attention_mask": [1, 0, 1]}, lambda: {"input_ids": [row], "attention_mask": [1, 1, 1]}),
        *(lambda: {"ids": row}, lambda: {"input_ids": None}, lambda: {"input_ids": "text"}, lambda: {"input_ids": []}),
        *(lambda: {"input_ids": np.array([[EOS, 3], [4, 5]])}, lambda: {"input_ids": {"input_ids": row}}),
        *(
            lambda: [hostile(rng), row],
            lambda: [row, [hostile(rng)]],
            lambda: hostile(rng),
        ),
        *(
            lambda: [{"role": "user", "content": "x"}],
            lambda: [{"role": hostile(rng), "content": hostile(rng)}],
            lambda: "text",
        ),
        *(lambda: [{"role": "user", "content": "x", "more": hostile(rng)}], lambda: [hostile(rng, dict, {"role": "user"})]),
        *(lambda: nested(rng.choice([10, 1000, 100000])), lambda: recursive(), lambda: np, lambda: LEAKED, lambda: [LEAKED]),
    ]
    if torch is not None:
        ways += [
            *(lambda: torch.tensor([[EOS, 3], [4, 5]]), lambda: torch.tensor([1.5]), lambda: torch.tensor(3)),
            *(lambda: torch.tensor([True]), lambda: torch.tensor([3]).to_sparse(), lambda: [torch.tensor(3.0)]),
        ]
    return Drawn(rng.choice(ways)(), NONSENSE, own=True)


def nested(depth):
    out = [3]
    for _ in range(depth):
        out = [out]
    return out


def recursive():
    out = []
    out.append(out)
    return out


def prompts(rng, most=3):
    """Spellings of prompts of token ids, one or several."""
    if rng.random() < 0.35:
        return bad_prompts(rng)
    if rng.random() < 0.05:
        row = ids(rng, 3)
        return Drawn(*rng.choice([(hostile(rng, list, [row]), [row]), (Lies(3, row), [row] * 3)]), own=True)
    if rng.random() < 0.3:
        row = ids(rng)
        ways = [
            lambda: as_list(rng, row),
            lambda: {"input_ids": as_list(rng, row), "attention_mask": as_list(rng, [1] * len(row))},
            lambda: {"input_ids": [5, *row, EOS], "attention_mask": [0] + [1] * len(row) + [0]},
            lambda: encoding({"input_ids": row, "token_type_ids": [0] * len(row)}),
        ]
        value = rng.choice(ways)()
        # A list of arrays of one token each is a list of prompts.
        return Drawn(value, row)
    count = rng.randint(1, most)
    rows = [ids(rng) for _ in range(count)]
    choice = rng.random()
    if choice < 0.35:
        return padded(rng, rows)
    if choice < 0.65:
        rows = [ids(rng, 4) for _ in range(count)]
        return Drawn(as_array(rng, rows), rows)
    if choice < 0.75:
        return Drawn([{"input_ids": as_list(rng, row)} for row in rows], rows)
    if choice < 0.8:
        return Drawn([[EOS, *row, EOS] for row in rows], [[EOS, *row, EOS] for row in rows])
    return Drawn([as_list(rng, row) for row in rows], rows)


# ---------------------------------------------------------------- plugs of one's own

KINDS = ("right", "raises", "nothing", "shape", "dtype", "two", "state")


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Mine(djax.Decoder):
    """A decoder of one's own: right, or wrong in one way."""

    number: object = 0.5
    kind: str = dataclasses.field(default="right", metadata={"static": True})
    error: object = dataclasses.field(default=None, metadata={"static": True})

    def init(self, block, vocab):
        if self.kind == "init":
            raise self.error()
        return ()

    def step(self, state, look):
        if self.kind == "raises":
            raise self.error()
        if self.kind == "nothing":
            return None
        if self.kind == "two":
            return state, look.masked
        verdict = write(look, jnp.ones_like(look.tokens), look.masked)
        if self.kind == "dtype":
            verdict = verdict._replace(tokens=verdict.tokens.astype(jnp.float32))
        if self.kind == "shape":
            verdict = verdict._replace(tokens=verdict.tokens[:-1])
        return jnp.zeros(99) if self.kind == "state" else state, verdict


@djax.pytree
@dataclasses.dataclass(frozen=True)
class MyCache(djax.Policy):
    kind: str = dataclasses.field(default="right", metadata={"static": True})
    error: object = dataclasses.field(default=None, metadata={"static": True})

    @property
    def keeps(self):
        if self.kind == "raises":
            raise self.error()
        return None if self.kind == "dtype" else False

    def reach(self):
        return {"nothing": None, "two": (0.5, 0), "shape": (0, 0, -1)}.get(self.kind, (0, 0))

    def plan(self, tick, cached_block):
        from djax.caching.contract import Plan

        if self.kind == "init":
            raise self.error()
        yes = jnp.full((2,) if self.kind == "state" else (), True)
        return Plan(yes, ~yes & False, ~yes & False)


def plug_of_ones_own(rng):
    kind, error = rng.choice((*KINDS, "init")), rng.choice(RAISED)
    number = hostile(rng) if rng.random() < 0.3 else 0.5
    right = kind == "right" and type(number) is float
    return Drawn(Mine(number, kind, error), Mine(0.5, kind, error) if right else NONSENSE, own=True)


def cache_of_ones_own(rng):
    kind = rng.choice((*KINDS, "init"))
    return Drawn(MyCache(kind, rng.choice(RAISED)), None if kind == "right" else NONSENSE, own=True)


def broken(rng):
    """A plug that no constructor made."""
    plug = rng.choice([djax.Threshold(), djax.Smoothing(), djax.Vicinity(), djax.Dual(), djax.Credit()])
    bad = rng.choice([object(), -1.0, None, "0.9", LEAKED, jax.ShapeDtypeStruct((), jnp.float32), float("nan"), hostile(rng)])
    return Drawn(jax.tree.map(lambda _: bad, plug), NONSENSE, own=True)


# ---------------------------------------------------------------- calls


def options(rng, count):
    """Options of generate for this many prompts, few of them strange."""

    def several(values, strange):
        if rng.random() < 0.5:
            return field(rng, values, strange)
        plain = [rng.choice(values) for _ in range(count)]
        return Drawn(as_list(rng, plain), plain) if max(plain) < 128 and min(plain) >= 0 else Drawn(plain, plain)

    strange = 0.85
    makers = {
        "gen_length": lambda: several([5, 8, 12], strange),
        "min_gen_length": lambda: several([0, 3, 5], strange),
        "seed": lambda: several([0, 3, 2**32 - 1, 2**32, -1], strange),
        "temperature": lambda: field(rng, (0.0, 0.5, -1.0, 1e39), strange),
        "top_p": lambda: field(rng, (0.5, 1.0, 0.0, 1.5), strange),
        "top_k": lambda: several([0, 3, -1], strange),
        "stop": lambda: nothing(rng),
        "early_stop": lambda: flag(rng),
        "align_blocks": lambda: flag(rng),
        "trace": lambda: flag(rng),
        "max_batch": lambda: field(rng, [1, 3, 0], strange),
        "decoder": lambda: rng.choice(
            [
                Drawn(djax.Fixed(2), djax.Fixed(2)),
                plug_of_ones_own(rng),
                broken(rng),
                nothing(rng),
                Drawn(djax.Dual(), NONSENSE),
            ]
        ),
        "cache": lambda: rng.choice(
            [Drawn(djax.Dual(), djax.Dual()), Drawn(None, None), cache_of_ones_own(rng), broken(rng), nothing(rng)]
        ),
        "smoothing": lambda: rng.choice(
            [Drawn(djax.Smoothing(), djax.Smoothing()), Drawn(djax.Smoothing(top=10**6), NONSENSE), broken(rng), nothing(rng)]
        ),
    }
    chosen = rng.sample(sorted(makers), rng.choice((0, 1, 1, 2, 3)))
    out = {name: makers[name]() for name in chosen}
    out.setdefault("gen_length", Drawn(8, 8))
    if rng.random() < 0.8:
        out["block_length"] = Drawn(8, 8)
    else:
        out["block_length"] = field(rng, [3, 8, 0, 2**31 - 1])
    return out


def count_of(drawn):
    return 2 if drawn.plain is NONSENSE else 1 if isinstance(drawn.plain[0], int) else len(drawn.plain)


def explained(rng):
    asked = prompts(rng)
    return djax.explain, (Drawn(MODEL, MODEL), asked), options(rng, count_of(asked))


def generated(rng):
    """Few kinds of program, since each is compiled."""
    asked = prompts(rng, most=2)
    given = options(rng, count_of(asked))
    for name in ("decoder", "cache", "smoothing", "block_length", "trace", "temperature", "max_batch"):
        given.pop(name, None)
    given["block_length"] = whole(rng, 8)
    if rng.random() < 0.3:
        given["decoder"] = Drawn(djax.Threshold(real(rng, 0.5).value), djax.Threshold(0.5))
    return djax.generate, (Drawn(MODEL, MODEL), asked), given


def logits(rng):
    rows = [ids(rng, 4) for _ in range(2)]
    short = [row[: rng.randint(1, 4)] for row in rows]
    choice = rng.random()
    if choice < 0.4:
        # What stands for it is the rows alone, and only what the mask shows is compared.
        while (asked := padded_to(rng, short, 6)) is None:
            pass
        return djax.logits, (Drawn(NETWORK, NETWORK), asked), {}
    asked = bad_prompts(rng) if choice < 0.6 else Drawn(as_array(rng, rows), rows)
    if type(asked.value) is np.ndarray and asked.value.shape == (2, 2) and EOS in asked.value[:, -1:]:
        asked = Drawn(as_array(rng, rows), rows)  # rows that end with EOS are canvases
    if choice > 0.8:
        plain = [rng.randint(1, 4) for _ in rows]
        wrong = nothing(rng)
        lengths = wrong if rng.random() < 0.4 and wrong.value is not None else Drawn(as_list(rng, plain), plain)
        return djax.logits, (Drawn(NETWORK, NETWORK), asked, lengths), {}
    return djax.logits, (Drawn(NETWORK, NETWORK), asked), {}


def padded_to(rng, rows, width):
    tokens, mask = [], []
    for row in rows:
        before = rng.randint(0, width - len(row))
        after = width - len(row) - before
        tokens.append([EOS] * before + row + [EOS] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
    value = {"input_ids": as_array(rng, tokens), "attention_mask": as_array(rng, mask)}
    return Drawn(value, Shown(tuple(map(tuple, tokens)), tuple(map(tuple, mask))))


@dataclasses.dataclass(frozen=True)
class Shown:
    """Rows of tokens, and where they are real: what `djax.logits` gives there is compared with each row's own."""

    tokens: tuple
    mask: tuple


def not_a_model(rng, tmp):
    name = rng.choice(["generate", "explain", "logits", "save", "export_hf", "compile", "export_program"])
    second = {"save": (Drawn(tmp / "a", 0),), "export_hf": (Drawn(tmp / "a", 0),), "export_program": (Drawn(tmp / "a", 0),)}
    given = second.get(name, () if name == "compile" else (Drawn([3], [3]),))
    return getattr(djax, name), (nothing(rng), *given), {}


def path(rng, tmp):
    return rng.choice(
        [
            *(nothing_written(rng), nothing_written(rng)),
            *(Drawn(given, NONSENSE) for given in ("a\0b", "x" * 300, "\ud800", "/proc/none/x", "~nobody-of-this-name/x")),
            *(Drawn(given, NONSENSE) for given in (b"bytes", tmp.as_posix().encode(), os.devnull, "/dev/null/x", ["a"])),
        ]
    )


def nothing_written(rng):
    """No path: neither a string nor one that says it has one."""
    while issubclass(type((drawn := nothing(rng)).value), str):
        pass
    return drawn


def others(rng, tmp):
    """Functions whose arguments are words, paths, models and devices."""
    choice = rng.randrange(10)
    if choice == 0:
        return not_a_model(rng, tmp)
    if choice == 1:
        name = rng.choice(["dtype", "quantize", "not_finite", "mesh"])
        wrong = rng.choice(
            [nothing(rng), Drawn("float99", NONSENSE), Drawn(np.array(["a", "b"]), NONSENSE), Drawn([], NONSENSE)]
        )
        return djax.load, (), {name: wrong}
    if choice == 2:
        return djax.load, (path(rng, tmp),), {}
    if choice == 3:
        save = rng.choice([djax.save, djax.export_hf, djax.export_program])
        return save, (Drawn(NETWORK, NETWORK), path(rng, tmp)), {}
    if choice == 4:
        wrong = rng.choice([nothing(rng), Drawn("vax", NONSENSE), Drawn(["cpu"], NONSENSE)])
        name = rng.choice(["platform", "prompt_length", "rows"])
        if name == "platform":
            return djax.export_program, (Drawn(MODEL, MODEL), Drawn(tmp / "new", tmp / "new")), {name: wrong}
        value = field(rng, [0, -1, 2**31 - 1, 10**12], 0.4)
        return djax.compile, (Drawn(MODEL, MODEL),), {name: Drawn(value.value, NONSENSE, own=value.own)}
    if choice == 5:
        devices = rng.choice(
            [
                *(
                    nothing(rng),
                    Drawn(jax.devices()[:1], jax.devices()[:1]),
                    Drawn(np.array(jax.devices()[:1]), jax.devices()[:1]),
                ),
                *(Drawn(itertools.repeat(jax.devices()[0]), NONSENSE), Drawn(["cpu"], NONSENSE), Drawn([], NONSENSE)),
                *(Drawn([jax.devices()[0]] * 2, NONSENSE), Drawn(itertools.count(), NONSENSE)),
            ]
        )
        many = Drawn(2, 2) if devices.plain is NONSENSE else whole(rng, 1)
        return djax.mesh, (), {rng.choice(["model", "data"]): maybe(rng, lambda: many, 0.8), "devices": devices}
    if choice == 6:
        return djax.preset, (rng.choice([nothing(rng), Drawn("llada", "llada"), Drawn(np.array(["llada"]), NONSENSE)]),), {}
    if choice == 7:
        return djax.compile_cache, (path(rng, tmp),), {}
    if choice == 8:
        return djax.pytree, (rng.choice([nothing(rng), Drawn(djax.Threshold, NONSENSE), Drawn(Mean, NONSENSE)]),), {}
    function = rng.choice([djax.Threshold, djax.Dual, djax.Smoothing, djax.load, djax.mesh])
    return function, (), {"no_such_option": nothing(rng)}


REGISTRY = DECODERS | CACHES | SMOOTHINGS
PIECES = (
    *(
        "Threshold",
        "(",
        ")",
        ",",
        "0.9",
        "tau=",
        "Credit",
        "inner=",
        "None",
        "none",
        "[",
        "]",
        "{",
        "}",
        "'a'",
        "*",
        "**",
        "-",
        "+",
    ),
    *(
        "1e999",
        "9" * 5000,
        "0x",
        "1j",
        "...",
        "lambda: 1",
        "\0",
        "\ud800",
        "é",
        "\n",
        " ",
        "@",
        ":=",
        "if",
        "f'{1}'",
        "b'x'",
        "True",
    ),
    *(
        "Edit(",
        "Vicinity(16, ",
        "every=",
        "Smoothing(",
        "order='random'",
        "__import__",
        ".",
        "2**31",
        "1_0",
        "''",
        '"""',
        "#",
        "\\",
    ),
)


def text(rng):
    """Of the command line's language: pieces of it, and some of it repeated very often."""
    choice = rng.random()
    if choice < 0.2:
        good = rng.choice(
            ["Threshold(0.5)", "Credit(Threshold(0.8), alpha=1)", "vicinity(1, 2, 3, 4)", "none", "Fixed(order='random')"]
        )
        return Drawn(good if rng.random() < 0.5 else f"  {good} ", good)
    if choice < 0.35:
        piece, end, count = rng.choice(
            [
                ("(", ")", 90),
                ("Credit(", ")", 30),
                ("[", "]", 190),
                ("-", "", 3000),
                ("not ", "", 900),
                ("a.", "a", 1900),
                ("x(", "", 1900),
            ]
        )
        return Drawn(piece * count + end * count, NONSENSE)
    if choice < 0.45:
        return Drawn(
            rng.choice(["Threshold(0.9)" * 10**5, "(" * 10**6, 3, None, b"Threshold()", hostile(rng, str, "Fixed(")]), NONSENSE
        )
    return Drawn("".join(rng.choice(PIECES) for _ in range(rng.randint(1, 9))), None)


KINDS_OF_CALLS = {"constructors": constructor, "explain": explained, "generate": generated, "logits": logits, "others": others}
SHARES = {"constructors": 0.27, "explain": 0.3, "generate": 0.1, "logits": 0.08, "others": 0.13, "text": 0.12}


def outcome(call):
    """What a call came to: its value, or its error."""
    try:
        with within(SECONDS):
            return call(), None
    except Hangs:
        pytest.fail("a call hangs")
    except BaseException as error:
        return None, error


def comparable(value):
    """The part of an answer that a call determines, as plain values."""
    if isinstance(value, list):
        return [comparable(v) for v in value]
    if isinstance(value, djax.Generation):
        return value.canvas.tolist(), value.tokens.tolist(), value.forwards, value.refreshes, value.positions
    if isinstance(value, jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, Mine):
        return "mine"
    return (type(value), value) if dataclasses.is_dataclass(value) and "Explanation" not in type(value).__name__ else str(value)


def same_logits(value, shown):
    """Each row's logits where the mask shows it, against the row alone."""
    for got, tokens, mask in zip(np.asarray(value), shown.tokens, shown.mask, strict=True):
        at = np.flatnonzero(mask)
        alone = [[t for t, m in zip(tokens, mask, strict=True) if m]]
        # On a canvas of one length, so that it compiles once; what is behind the length is seen by nobody.
        padded = [alone[0] + [0] * (len(tokens) - at.size)]
        np.testing.assert_allclose(got[at], np.asarray(djax.logits(NETWORK, padded, [at.size]))[0, : at.size], atol=1e-5)


def check(function, args, options):
    """One call, against the plain one it stands for. Returns whether it was answered."""
    drawn = [*args, *options.values()]
    value, error = outcome(lambda: function(*(d.value for d in args), **{n: d.value for n, d in options.items()}))
    if error is not None:
        unknown = type(error) is TypeError and "no_such_option" in options
        assert unknown or isinstance(error, DjaxError), f"{type(error).__name__}: {error}"
        str(error).encode()
        assert len(str(error)) < 4000, "a message that nobody reads"
        own = any(d.own for d in drawn)
        assert own or "reading it raised" not in str(error), f"djax's own fault: {error}"
    if any(d.plain is NONSENSE for d in drawn):
        assert error is not None, f"accepted, as {value!r:.300}"
        return False
    if any(isinstance(d.plain, Shown) for d in drawn):
        assert error is None, str(error)
        same_logits(value, drawn[1].plain)
        return True
    plain, refused = outcome(lambda: function(*(d.plain for d in args), **{n: d.plain for n, d in options.items()}))
    if refused is not None:
        assert isinstance(refused, DjaxError | TypeError)
        if any(d.own for d in drawn):
            return False  # which of two errors comes first is open
        assert type(error) is type(refused), f"the plain call is refused: {refused}; this one: {error!r}"
        return False
    if error is not None and any(d.own for d in drawn):
        return False  # a number whose own methods raise may be refused
    assert error is None, f"the plain call is answered, this one refused: {error}"
    assert comparable(value) == comparable(plain)
    return True


def check_text(drawn):
    value, error = outcome(lambda: parse(drawn.value, REGISTRY, "--decoder"))
    if error is not None:
        assert isinstance(error, DjaxError), f"{type(error).__name__}: {error}"
        str(error).encode()
        assert drawn.plain in (None, NONSENSE), f"refused: {error}"
        return False
    assert drawn.plain is not NONSENSE, f"accepted, as {value!r:.300}"
    assert value == parse(drawn.plain or repr(value), REGISTRY, "--decoder")
    return True


@pytest.mark.parametrize("seed", range(36 if FULL else 5))
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::SyntaxWarning", "ignore::RuntimeWarning", "ignore::UserWarning"
)
def test_drawn_calls(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enable_cache()
    cache = jax.config.jax_compilation_cache_dir
    rng, count = random.Random(f"door {seed}"), collections.Counter()
    began = time.monotonic()
    for i in range(120):
        (kind,) = rng.choices(list(SHARES), SHARES.values())
        if kind == "text":
            call = text(rng)
        else:
            call = KINDS_OF_CALLS[kind](rng, tmp_path) if kind == "others" else KINDS_OF_CALLS[kind](rng)
        try:
            answered = check_text(call) if kind == "text" else check(*call)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, call {i} ({kind}): {spelled(call)}\n{error}") from None
        count[kind, answered] += 1
    assert jax.config.jax_compilation_cache_dir == cache, "a refused directory took the cache's place"
    assert not list(tmp_path.iterdir()), "a refused call wrote something"
    if FULL:
        figures = ", ".join(f"{k} {count[k, True]} answered and {count[k, False]} refused" for k in SHARES)
        seconds = time.monotonic() - began
        print(f"\nseed {seed}: {sum(count.values())} calls in {seconds:.0f} s, 0 untyped errors, 0 hangs: {figures}")


def spelled(call):
    """The call, for whoever reads of its failure; values that cannot be printed by their type."""

    def one(value):
        try:
            return f"{value!r:.200}"
        except BaseException:
            return f"a {type(value).__mro__[1].__name__} whose {[n for n in vars(type(value)) if n in SPECIAL]} raise"

    if isinstance(call, Drawn):
        return one(call.value)
    function, args, options = call
    spelled = [*(one(a.value) for a in args), *(f"{name}={one(d.value)}" for name, d in options.items())]
    return f"{function.__name__}({', '.join(spelled)})"
