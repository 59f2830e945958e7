"""The sandbox of the verifier `python`: nothing gets out of it, nothing forges its word, and honest code runs in it."""

import concurrent.futures
import json
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from sandbox_attempts import BAD, FORGE, GOOD, TOUCH

from djax import distill
from djax.errors import VerifierError
from djax.tasks import sandbox, sandbox_filter

TESTS = "assert add(2, 3) == 5"
OUTCOME = sandbox.run(GOOD, TESTS, seconds=10, megabytes=1024)
filtered = pytest.mark.skipif(not OUTCOME.calls_filtered, reason="this system filters no calls (seccomp)")
closed = pytest.mark.skipif(not OUTCOME.files_closed, reason="this system closes no files (Landlock)")


def passing(table, tests=TESTS, seconds=3):
    """The names whose code passes the tests, all run side by side as threads run them."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda code: sandbox.run(code, tests, seconds=seconds, megabytes=512).passed, table.values())
        return {name for name, passed in zip(table, runs, strict=True) if passed}


def children():
    """The processes of this one, and of none: who has lost its parent goes to the first process, or a reaper."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() or (b"marshal.loads(os.read" in command and int(fields[1]) <= 1):
                found[int(entry.name)] = command
    return found


def surroundings():
    """What an attempt might change of this process and around it."""
    shared = Path("/dev/shm")
    return {
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
        "scheduler": os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None,
        "group": os.getpgid(0),
        "directory": os.getcwd(),
        "shared memory": sorted(f.name for f in shared.glob("*attempt*")) if shared.is_dir() else [],
        "files": sorted(f.name for f in Path(tempfile.gettempdir()).glob("djax-sandbox-attempt*")),
        "library": os.stat(os.__file__)[:7],
        "descriptors": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "children": children() if os.path.isdir("/proc") else {},
    }


@pytest.fixture
def untouched():
    before = surroundings()
    yield
    assert surroundings() == before


def test_there_are_enough_attempts():
    assert len(TOUCH) > 140
    assert len(FORGE) > 90


def test_no_attempt_touches_anything(untouched):
    assert passing({"honest": GOOD} | TOUCH) == {"honest"}


def test_no_attempt_forges_a_verdict(untouched):
    assert passing({"honest": GOOD} | FORGE) == {"honest"}


def test_no_attempt_forges_a_check_that_it_is_given():
    """Tests as they are usual: a function that is given the answer's."""
    tests = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(3, 4) == 7\n\n\ncheck(add)\n"
    attempts = {
        "check": "def check(f): pass\n" + BAD,
        "its code": "def add(a, b):\n    check.__code__ = (lambda candidate: None).__code__\n    return 5\n",
        "its builtins": "import builtins\nbuiltins.__build_class__ = builtins.__import__ = None\n" + BAD,
        "an exit": "import sys\ndef add(a, b):\n    sys.exit(0)\n",
        "an exit from a thread": "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\n" + BAD,
        "its frame": (
            "import sys\ndef add(a, b):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n"
            "        e.__traceback__.tb_frame.f_back.f_locals['candidate'] = sum\n    return 5\n"
        ),
    }
    assert passing({"honest": GOOD} | attempts, tests) == {"honest"}


HONEST = {
    "dataclasses": "from dataclasses import dataclass, field, asdict\n"
    "@dataclass(order=True, frozen=True)\nclass P:\n    x: int\n"
    "    y: list = field(default_factory=list)\nassert P(1) < P(2) and asdict(P(3)) == {'x': 3, 'y': []}\n",
    "slots": "from dataclasses import dataclass\n@dataclass(slots=True)\nclass P:\n    x: int\nassert P(1).x == 1\n",
    "re": "import re\nassert re.sub(r'(\\d+)', lambda m: str(int(m[1]) + 1), 'a1b22') == 'a2b23'\n",
    "math": "import math, cmath\n"
    "assert math.isclose(math.gamma(5), 24) and math.prod([1, 2, 3]) == 6 and cmath.sqrt(-1) == 1j\n",
    "itertools": "from itertools import *\n"
    "assert len(list(permutations(range(5)))) == 120 and next(islice(count(), 5, 6)) == 5\n",
    "collections": "from collections import *\nP = namedtuple('P', 'x y')\nassert P(1, 2)._replace(x=3) == (3, 2)\n"
    "assert Counter('aab').most_common(1) == [('a', 2)] and OrderedDict(a=1) and deque([1], 3) and defaultdict(int)[1] == 0\n",
    "functools": "from functools import *\n@lru_cache(None)\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)\n"
    "assert f(90) == 2880067194370816120 and reduce(int.__mul__, [1, 2, 3]) == 6\n@singledispatch\ndef g(x): return 0\n"
    "@g.register\ndef _(x: int): return 1\nassert g(1) == 1 and g('') == 0\n",
    "json": "import json\nassert json.loads(json.dumps({'a': [1, 2.5, None]})) == {'a': [1, 2.5, None]}\n",
    "random": "import random, secrets\nrandom.seed(0)\n"
    "assert random.random() == 0.8444218515250481\nassert len(secrets.token_hex(4)) == 8\n"
    "assert sorted(random.sample(range(9), 9)) == list(range(9))\n",
    "time": "import time, datetime, calendar\nt = time.time()\n"
    "time.sleep(0.01)\nassert time.time() > t and time.localtime()\n"
    "assert datetime.datetime(2024, 2, 29) + datetime.timedelta(days=1) == datetime.datetime(2024, 3, 1)\n"
    "assert time.perf_counter()\n",
    "typing": "from typing import *\nT = TypeVar('T')\nclass S(Generic[T]):\n"
    "    def f(self, x: Optional[T]) -> List[T]: return [x]\n"
    "class N(NamedTuple):\n    a: int = 1\nclass D(TypedDict):\n"
    "    a: int\nassert N().a == 1 and S().f(1) == [1] and D(a=1)\n"
    "assert get_type_hints(S.f)['return'] == List[T]\n",
    "heapq": "import heapq, bisect\nh = [3, 1, 2]\nheapq.heapify(h)\n"
    "assert heapq.heappop(h) == 1 and bisect.bisect([1, 2, 3], 2) == 2\n",
    "decimal": "from decimal import *\ngetcontext().prec = 50\nassert str(Decimal(1) / 7)[:12] == '0.1428571428'\n",
    "fractions": "from fractions import Fraction\nassert Fraction(1, 3) + Fraction(1, 6) == Fraction(1, 2)\n",
    "statistics": "import statistics\nassert statistics.median([1, 2, 3]) == 2 and statistics.stdev([1, 2, 3]) == 1\n",
    "io": "import io, sys\nb = io.StringIO()\nprint('a', file=b)\n"
    "assert b.getvalue() == 'a\\n' and io.BytesIO(b'x').read() == b'x'\n"
    "old, sys.stdout = sys.stdout, io.StringIO()\nprint(1)\nassert sys.stdout.getvalue() == '1\\n'\nsys.stdout = old\n",
    "redirected output": "import contextlib, io\nb = io.StringIO()\n"
    "with contextlib.redirect_stdout(b): print('x')\nassert b.getvalue()\n",
    "recursion": "import sys\nsys.setrecursionlimit(100000)\n"
    "def f(n): return 0 if n == 0 else 1 + f(n - 1)\nassert f(20000) == 20000\n",
    "memory": "x = bytearray(200 << 20)\ny = list(range(1_000_000))\nassert len(x) + len(y) == (200 << 20) + 1_000_000\n",
    "output": "import sys\nfor _ in range(20000): print('x' * 100)\nsys.stderr.write('y')\nsys.stdout.flush()\n",
    "input": "import sys\nassert sys.stdin.read() == ''\ntry:\n    input()\nexcept EOFError: pass\n",
    "classes": "import abc, enum\nclass A(abc.ABC):\n    @abc.abstractmethod\n"
    "    def f(self): ...\nclass B(A):\n    def f(self): return super().__init__()\n"
    "class C(enum.Enum):\n    X = enum.auto()\nE = enum.Enum('E', 'a b')\n"
    "assert B().f() is None and C.X.value == 1 and E.a\n"
    "class F(enum.IntFlag):\n    A = 1\n    B = 2\nassert F.A | F.B == 3 and isinstance(B(), A)\n",
    "generators": "def g():\n    x = yield 1\n    yield from [x, 3]\n"
    "i = g()\nassert next(i) == 1 and i.send(2) == 2 and list(i) == [3]\n",
    "coroutines": "async def f(): return 3\nc = f()\ntry:\n"
    "    c.send(None)\nexcept StopIteration as e:\n    assert e.value == 3\n",
    "errors": "import traceback, warnings, logging\ntry:\n    1 / 0\n"
    "except ZeroDivisionError:\n    assert 'answer.py' in traceback.format_exc()\n"
    "warnings.warn('x')\nlogging.warning('x')\nlogging.getLogger(__name__).info('y')\n",
    "inspect": "import inspect, ast\ndef f(a, *, b=1): ...\nassert list(inspect.signature(f).parameters) == ['a', 'b']\n"
    "assert ast.literal_eval('[1]') == [1] and inspect.currentframe()\n",
    "copies": "import copy, pickle, operator, string, textwrap\nclass P: pass\np = P()\np.x = [1]\n"
    "assert copy.deepcopy(p).x == [1] and pickle.loads(pickle.dumps(p)).x == [1] and string.digits\n"
    "from collections import namedtuple\nQ = namedtuple('Q', 'a')\nassert pickle.loads(pickle.dumps(Q(1))) == (1,)\n",
    "hashes": "import hashlib, hmac, base64, zlib, binascii, struct, uuid\n"
    "assert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'\n"
    "assert zlib.decompress(zlib.compress(b'x')) == b'x' and hashlib.md5(b'').hexdigest() and uuid.uuid4()\n",
    "text": "import unicodedata, difflib, html, csv, io, pprint, locale\n"
    "assert unicodedata.name('é') and list(csv.reader(io.StringIO('a,b')))\n"
    "assert 'é'.encode('latin-1').decode('cp1252') == 'é' and 'あ'.encode('shift_jis')\n",
    "arrays": "import array, queue, weakref, types, numbers, sched\n"
    "a = array.array('i', [1])\nq = queue.Queue()\nq.put(1)\nassert q.get() == 1 and a[0] == 1\n",
    "big numbers": "assert len(str(3 ** 8000)) > 3000 and pow(3, 10 ** 6, 7) == 4 and int('9' * 4000)\n",
    "exec and eval": "d = {}\nexec('x = 1', d)\nassert d['x'] == 1 and eval('1 + 1') == 2 and compile('1', '', 'eval')\n",
    "globals": "count = 0\ndef up():\n    global count\n    count += 1\n"
    "up()\nassert globals()['count'] == 1 and __name__ == '__main__'\n",
    "a main part": "if __name__ == '__main__':\n    import sys\n    print(sys.argv)\n",
    "its module": "import __main__\nx = 1\nassert __main__.x == 1\n",
    "doctest": "def f():\n    '''\n    >>> f()\n    1\n    '''\n"
    "    return 1\nimport doctest\nassert doctest.testmod().attempted == 1\n",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
    "r = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))\n"
    "assert r.wasSuccessful() and r.testsRun == 1\n",
    "system": "import os, sys, platform, pathlib, glob, tempfile, shutil\n"
    "assert os.getcwd() and os.listdir() == [] and os.cpu_count()\n"
    "assert pathlib.Path('a/b').name == 'b' and not os.path.exists('x')\n"
    "assert glob.glob('*') == [] and list(pathlib.Path().iterdir()) == []\n"
    "assert open(os.__file__).read(10) and os.path.join('a', 'b') == 'a/b' and platform.python_version()\n",
    "garbage": "import gc\nclass N: pass\nfor _ in range(10000):\n"
    "    n = N()\n    n.me = n\ngc.collect()\ngc.disable()\ngc.enable()\n",
    "a lock": "import threading\nl = threading.Lock()\nwith l: pass\nassert threading.current_thread().name\n",
    "an alarm": "import signal\ndef f(*a): raise TimeoutError\n"
    "signal.signal(signal.SIGALRM, f)\nsignal.setitimer(signal.ITIMER_REAL, 0.01)\n"
    "try:\n    for _ in range(10 ** 10): pass\nexcept TimeoutError: pass\n",
    "zones": "import zoneinfo, datetime\ntry:\n    z = zoneinfo.ZoneInfo('Europe/Berlin')\n"
    "except zoneinfo.ZoneInfoNotFoundError:\n    z = None\n",
    "a builtin's name": "def sum(xs): return 0\ndef max(*a): return 7\nassert max(1) == 7\n",
}


def test_honest_code_passes():
    assert set(HONEST) - passing({name: code + GOOD for name, code in HONEST.items()}, seconds=10) == set()


def test_tests_may_do_what_tests_do():
    tests = {
        "classes": "class T:\n    def run(self): assert add(1, 1) == 2\nT().run()",
        "imports": "import math, random\nrandom.seed(1)\nassert math.isclose(add(0.1, 0.2), 0.3)",
        "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(add(1, 2), 3)\n"
        "assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T)).wasSuccessful()",
        "globals": "LIMIT = 3\nassert bounded() == 3",
        "futures": "from __future__ import annotations\nassert add(1, 2) == 3",
        "errors": "try:\n    add(1, '')\nexcept TypeError:\n    pass\nelse:\n    raise AssertionError",
    }
    code = GOOD + "def bounded():\n    return LIMIT\n"
    for name, text in tests.items():
        assert sandbox.run(code, text, seconds=10, megabytes=1024).passed, name
    for text in ("assert add(1, 2) == 4", "assert (", "raise SystemExit", "1 / 0", "import nothing_there", "exit(0)"):
        assert not sandbox.run(code, text, seconds=10, megabytes=1024).passed, text


def test_tests_have_pythons_own_builtins():
    code = "import builtins\nbuiltins.abs = builtins.all = lambda *a: 0 or True\nbuiltins.len = lambda x: 5\n" + BAD
    for tests in ("assert abs(add(2, 3) - 5) < 1e-9", "assert len([add(2, 3)] * 4) == 5", "assert all([add(2, 3)])"):
        assert not sandbox.run(code, tests, seconds=10, megabytes=1024).passed


def judge(program, call, *arguments, machine=None):
    """What a filter says of a call: a small machine for classic BPF, which the kernel has too."""
    data = struct.pack("<IIQ6Q", call, sandbox_filter.MACHINES[machine], 0, *(*arguments, *[0] * (6 - len(arguments))))
    lines = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        code, yes, no, k = lines[at]
        at += 1
        match code:
            case sandbox_filter.LOAD:
                assert k % 4 == 0
                (value,) = struct.unpack_from("<I", data, k)
            case sandbox_filter.EQUAL:
                at += yes if value == k else no
            case sandbox_filter.AT_LEAST:
                at += yes if value >= k else no
            case sandbox_filter.BITS:
                at += yes if value & k else no
            case sandbox_filter.RETURN:
                return k
            case _:
                raise AssertionError(code)


NUMBERS = {
    "x86_64": dict(read=0, write=1, close=3, mmap=9, ioctl=16, fcntl=72, openat=257, prlimit64=302, clone3=435),
    "aarch64": dict(read=63, write=64, close=57, mmap=222, ioctl=29, fcntl=25, openat=56, prlimit64=261, clone3=435),
}
REFUSED = {
    "x86_64": "sendto=44 socket=41 clone=56 fork=57 vfork=58 execve=59 kill=62 mkdir=83 unlink=87 symlink=88 ptrace=101 "
    "mknod=133 setpriority=141 prctl=157 chroot=161 mount=165 tkill=200 sched_setaffinity=203 tgkill=234 mknodat=259 "
    "unshare=272 memfd_create=319 pidfd_send_signal=424 pidfd_open=434 pwrite64=18 writev=20 pipe=22 dup=32 dup2=33 "
    "execveat=322 process_vm_writev=311 io_uring_setup=425 shmget=29 seccomp=317 bpf=321 pipe2=293 eventfd2=290 wait4=61",
    "aarch64": "socket=198 clone=220 execve=221 kill=129 tgkill=131 mkdirat=34 unlinkat=35 mknodat=33 symlinkat=36 ptrace=117 "
    "setpriority=140 prctl=167 chroot=51 mount=40 sched_setaffinity=122 unshare=97 memfd_create=279 pidfd_open=434 "
    "pidfd_send_signal=424 pwrite64=68 writev=66 pipe2=59 dup=23 dup3=24 execveat=281 io_uring_setup=425 shmget=194 wait4=260",
}


@pytest.mark.parametrize("machine", NUMBERS)
def test_the_filter_lets_through_what_computes_and_nothing_else(machine):
    program = sandbox_filter.filter_program(machine, writing=9)
    allow, refuse, missing = sandbox_filter.ALLOW, sandbox_filter.REFUSE, sandbox_filter.MISSING

    def say(call, *arguments):
        return judge(program, call, *arguments, machine=machine)

    n = NUMBERS[machine]
    assert [say(n[name]) for name in ("read", "close", "mmap")] == [allow] * 3
    assert [say(n["write"], fd) for fd in (0, 1, 2, 3, 8, 9, 10)] == [refuse, allow, allow, refuse, refuse, allow, refuse]
    for flags, verdict in ((0, allow), (os.O_CLOEXEC, allow), (1, refuse), (2, refuse), (0o100, refuse), (0o1000, refuse)):
        assert say(n["openat"], 0, 0, flags) == verdict
    assert say(n["openat"], 0, 0, 0o20200000) == refuse
    assert [say(n["fcntl"], 1, command) for command in (0, 1, 3, 4, 1030)] == [refuse, allow, allow, refuse, refuse]
    assert [say(n["ioctl"], 0, command) for command in (0x5401, 0x5412)] == [allow, refuse], "nothing is typed into a terminal"
    assert say(n["prlimit64"], 0, 1, 0) == allow
    assert [say(n["prlimit64"], *a) for a in ((1, 1, 0), (0, 1, 4096), (0, 1, 1 << 32))] == [refuse] * 3
    assert say(n["clone3"]) == missing
    for name, number in (entry.split("=") for entry in REFUSED[machine].split()):
        assert say(int(number)) == refuse, name
    assert all(say(call) in (refuse, missing, allow) for call in range(600))
    assert sum(say(call) == allow for call in range(600)) < 80
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert judge(program, n["read"], machine=other) == refuse
    assert say(0x40000000 + 1, 9) == refuse
    assert sandbox_filter.filter_program("riscv64", 9) == b""


@pytest.mark.skipif(sys.platform != "linux", reason="tables of Linux")
def test_the_filters_numbers_are_the_systems():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")
    for machine, file in zip(("x86_64", "aarch64"), header, strict=True):
        if not file.exists():
            pytest.skip(f"without {file}")
        known = dict(re.findall(r"^#define __NR(?:3264)?_(\w+) (\d+)$", file.read_text(), re.MULTILINE))
        known.setdefault("newfstatat", known.get("fstatat"))
        table = sandbox_filter._FREE[machine] | sandbox_filter._BOUND[machine] | {"execve": sandbox_filter.EXECVE[machine]}
        assert {name: str(n) for name, n in table.items()} == {name: known[name] for name in table}


def confined(text, *, strict, filter_calls):
    """What a program prints that runs under the system's rules alone, with ctypes and without Python's hooks."""
    lock = sandbox._compile("sandbox_lock.py")
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as given:
        given.write(lock)
        given.seek(0)
        reading, writing = os.pipe()
        machine = platform.machine()
        program = sandbox_filter.filter_program(machine, writing).hex() if filter_calls else ""
        numbers = (20, 1 << 30, given.fileno(), writing, int(strict), sandbox_filter.EXECVE.get(machine, 0))
        first = sandbox._LOAD.format(given.fileno(), len(lock))
        process = subprocess.run(
            [sandbox._interpreter(), "-I", "-S", "-B", "-c", first, *map(str, numbers), program, text],
            **dict(cwd=directory, env={}, pass_fds=(given.fileno(), writing), capture_output=True, text=True),
        )
        os.close(writing)
        os.close(reading)
        assert os.listdir(directory) == []
    assert process.returncode == 0, process.stderr
    return process.stdout


@filtered
def test_the_filter_holds_alone(untouched):
    text = """
import ctypes, os, signal, errno, resource
def attempt(f, *a):
    try:
        f(*a)
    except OSError as e:
        return errno.errorcode[e.errno]
    except (RuntimeError, ValueError):  # how Python says it of a thread, and of a limit
        return "EPERM"
    return "done"
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *a):
    return attempt(lambda: libc[name](*a) < 0 and (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")))
import _thread
up = os.getppid()
print(*[
    attempt(os.kill, up, signal.SIGWINCH), attempt(os.pidfd_open, up), attempt(os.mkfifo, "x"), attempt(os.mknod, "x"),
    attempt(os.setpriority, os.PRIO_PROCESS, up, 19), attempt(os.sched_setaffinity, up, {0}), attempt(os.fork),
    attempt(os.execv, "/bin/true", ["true"]), attempt(os.posix_spawn, "/bin/true", ["true"], {}),
    attempt(os.open, "x", os.O_CREAT),
    attempt(os.open, ".", os.O_TMPFILE | os.O_RDWR), attempt(os.mkdir, "x"), attempt(os.memfd_create, "x"), attempt(os.pipe),
    attempt(os.dup, 1), attempt(os.chmod, ".", 0o777), attempt(os.chdir, "/"), attempt(os.write, 0, b"x"),
    attempt(_thread.start_new_thread, print, ()), attempt(resource.setrlimit, resource.RLIMIT_CORE, (0, 0)),
    raw("socket", 1, 1, 0), raw("prctl", 1, 9, 0, 0, 0), raw("ptrace", 16, up, 0, 0),
    raw("shm_open", b"/djax-attempt", 66, 384),
    raw("shmget", 0, 4096, 0o1600), raw("unshare", 0), raw("mount", b"a", b"b", b"c", 0, 0), raw("sync_file_range", 1, 0, 0, 0),
])
"""
    assert set(confined(text, strict=False, filter_calls=True).split()) == {"EPERM"}


@closed
def test_the_rule_on_files_holds_alone(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    text = f"""
import os, signal
def attempt(f, *a):
    try:
        f(*a)
    except PermissionError:
        return "refused"
    return "done"
up = os.getppid()
names = ({str(secret)!r}, "/etc/passwd", f"/proc/{{up}}/mem", f"/proc/{{up}}/environ", "/proc/self/mem")
print(*[attempt(open, name) for name in names],
      attempt(os.listdir, "/"), attempt(os.mkdir, "x"), attempt(os.mkfifo, "x"), attempt(open, {str(secret)!r}, "a"))
print(attempt(open, os.__file__), attempt(os.listdir, "."), attempt(__import__, "json"))
"""
    refused, done = confined(text, strict=True, filter_calls=False).splitlines()
    assert set(refused.split()) == {"refused"}
    assert set(done.split()) == {"done"}
    assert secret.read_text() == "secret"


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="for a superuser")
def test_a_superusers_privileges_are_dropped():
    text = """
import ctypes, struct
libc = ctypes.CDLL(None)
held = ctypes.create_string_buffer(24)
libc.capget(struct.pack("<Ii", 0x20080522, 0), held)
print(struct.unpack("<6I", held.raw)[:2], libc.prctl(39, 0, 0, 0, 0))
"""
    shown = confined(text, strict=True, filter_calls=False)
    assert shown.strip() == "(0, 0) 1"


def test_a_sandbox_that_cannot_start_is_no_verdict():
    with pytest.raises(VerifierError, match=r"the sandbox of the verifier python did not start: .* needs more than 1 MB"):
        distill.python({"prompt": "", "tests": TESTS}, GOOD, megabytes=1)


def test_many_threads_and_descriptors(untouched):
    """Right for right and wrong for wrong, also where descriptors have large numbers."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2048 if hard == resource.RLIM_INFINITY else min(hard, 2048)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(most - 200)]
    try:
        answers = [GOOD if n % 3 else BAD for n in range(24)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            scores = list(pool.map(lambda code: distill.python({"prompt": "", "tests": TESTS}, code), answers))
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert scores == [float(code is GOOD) for code in answers]


def test_time_is_bounded_and_nothing_is_left(untouched):
    before = set(Path(tempfile.gettempdir()).glob("djax-sandbox-*"))
    began = time.monotonic()
    assert not sandbox.run("while True: pass", TESTS, seconds=1, megabytes=1024).passed
    assert not sandbox.run("import time\ntime.sleep(60)\n" + GOOD, TESTS, seconds=1, megabytes=1024).passed
    assert time.monotonic() - began < 20
    assert set(Path(tempfile.gettempdir()).glob("djax-sandbox-*")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_an_answer_dies_with_the_process_that_asked():
    ask = (
        "from djax.tasks import sandbox\nprint('asked', flush=True)\n"
        "sandbox.run('while True: pass', 'assert True', seconds=60, megabytes=1024)"
    )
    process = subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "asked\n"
    answers = []
    until = time.monotonic() + 20
    while not answers and time.monotonic() < until:
        time.sleep(0.2)
        listed = Path(f"/proc/{process.pid}/task").glob("*/children")
        answers = [int(pid) for file in listed for pid in file.read_text().split()]
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert answers
    while any(os.path.exists(f"/proc/{pid}") for pid in answers) and time.monotonic() < until:
        time.sleep(0.1)
    alive = [pid for pid in answers if os.path.exists(f"/proc/{pid}") and "Z" not in _state(pid)]
    assert alive == []


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_scores_are_kept_as_they_were(tmp_path):
    """The verifier by its name, as `keep` asks it."""
    assert distill.VERIFIERS["python"] is distill.python
    assert json.dumps(distill.python({"prompt": "", "tests": TESTS}, f"```python\n{GOOD}```")) == "1.0"
