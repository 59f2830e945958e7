"""Code that tries to get out of the sandbox of the verifier `python`, or to be judged right without being so.

An attempt of `TOUCH` adds rightly and does something that it may not, so it scores 1 if that works. One of `FORGE` adds
wrongly and means to be judged right all the same. Names say what is tried.
"""

GOOD = "def add(a, b):\n    return a + b\n"
BAD = "def add(a, b):\n    return 0\n"

_PARENT = {
    "kill": "os.kill(os.getppid(), signal.SIGWINCH)",
    "kill with 0": "os.kill(os.getppid(), 0)",
    "killpg": "os.killpg(os.getpgid(os.getppid()), signal.SIGWINCH)",
    "pidfd_open": "os.pidfd_open(os.getppid())",
    "pidfd_send_signal": "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGWINCH)",
    "pidfd of /proc": "signal.pidfd_send_signal(os.open(f'/proc/{os.getppid()}', os.O_RDONLY), signal.SIGWINCH)",
    "pthread_kill": "signal.pthread_kill(1, signal.SIGWINCH)",
    "setpriority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "setpriority of the user": "os.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "nice": "os.nice(1)",
    "sched_setaffinity": "os.sched_setaffinity(os.getppid(), {0})",
    "sched_setaffinity of itself": "os.sched_setaffinity(0, {0})",
    "sched_setscheduler": "os.sched_setscheduler(os.getppid(), os.SCHED_BATCH, os.sched_param(0))",
    "sched_setparam": "os.sched_setparam(os.getppid(), os.sched_param(0))",
    "prlimit": "resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
    "setrlimit": "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))",
    "setpgid": "os.setpgid(os.getppid(), 0)",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb')",
    "memory of its own": "open('/proc/self/mem', 'rb')",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ', 'rb')",
    "files of the parent": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "directory of the parent": "os.listdir(f'/proc/{os.getppid()}/cwd')",
    "command of the parent": "print(open(f'/proc/{os.getppid()}/cmdline').read())",
    "oom score": "open(f'/proc/{os.getppid()}/oom_score_adj', 'w').write('1000')",
    "setuid": "os.setuid(os.getuid())",
    "setgroups": "os.setgroups([])",
    "setsid": "os.setsid()",
    "chroot": "os.chroot('.')",
    "chdir": "os.chdir('/')",
    "unshare": "os.unshare(0)",
    "setns": "os.setns(os.open('.', os.O_RDONLY), 0)",
}
_DISK = {
    "open for writing": "open('x', 'w')",
    "open for appending": "open('x', 'a')",
    "open for creating": "open('x', 'x')",
    "open for both": "open(os.__file__, 'r+')",
    "open an absolute path": "open('/tmp/djax-sandbox-attempt', 'w')",
    "open in shared memory": "open('/dev/shm/djax-sandbox-attempt', 'w')",
    "open with an opener": "open('x', 'w', opener=lambda path, flags: os.open(path, os.O_CREAT | os.O_WRONLY))",
    "os.open": "os.open('x', os.O_CREAT | os.O_WRONLY)",
    "os.open that truncates": "os.open(os.__file__, os.O_TRUNC)",
    "os.open without a name": "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    "os.open that only creates": "os.open('x', os.O_CREAT)",
    "FileIO": "io.FileIO('x', 'w')",
    "codecs": "import codecs; codecs.open('x', 'w', 'utf-8')",
    "pathlib": "pathlib.Path('x').write_text('x')",
    "touch": "pathlib.Path('x').touch()",
    "mkdir": "os.mkdir('x')",
    "makedirs": "os.makedirs('x/y')",
    "mkfifo": "os.mkfifo('x')",
    "mkfifo elsewhere": "os.mkfifo('/tmp/djax-sandbox-attempt')",
    "mkfifo of posix": "import posix; posix.mkfifo('x')",
    "mkfifo of a set": "[f for f in os.supports_dir_fd if f.__name__ == 'mkfifo'][0]('x')",
    "mkfifo of a new posix": "del sys.modules['posix']; import posix; posix.mkfifo('x')",
    "mkfifo of a posix made by hand": "importlib.machinery.BuiltinImporter.load_module('posix').mkfifo('x')",
    "mknod": "os.mknod('x')",
    "mknod of a device": "os.mknod('x', 0o20666, os.makedev(1, 3))",
    "mknod of a socket": "os.mknod('x', 0o140666)",
    "symlink": "os.symlink('/etc', 'x')",
    "link": "os.link(os.__file__, 'x')",
    "rename": "os.rename('.', '../djax-sandbox-attempt')",
    "rmdir": "os.rmdir(os.getcwd())",
    "remove": "os.remove('x') if os.path.exists('x') else os.remove('/tmp/djax-sandbox-attempt')",
    "truncate": "os.truncate(os.__file__, 0)",
    "chmod": "os.chmod('.', 0o777)",
    "fchmod": "os.fchmod(os.open('.', os.O_RDONLY), 0o777)",
    "chown": "os.chown('.', os.getuid(), os.getgid())",
    "utime": "os.utime('.')",
    "setxattr": "os.setxattr('.', 'user.x', b'x')",
    "mkstemp": "tempfile.mkstemp()",
    "TemporaryFile": "tempfile.TemporaryFile()",
    "TemporaryDirectory": "tempfile.TemporaryDirectory()",
    "sqlite3": "import sqlite3; sqlite3.connect('x').execute('create table t (a)')",
    "shelve": "import shelve; shelve.open('x')",
    "gzip": "import gzip; gzip.open('x', 'w')",
    "zipfile": "import zipfile; zipfile.ZipFile('x', 'w')",
    "shutil": "import shutil; shutil.copy(os.__file__, 'x')",
    "logging": "import logging; logging.FileHandler('x')",
    "memfd_create": "os.memfd_create('x')",
    "shm_open": "import _posixshmem; _posixshmem.shm_open('/djax-attempt', os.O_CREAT | os.O_RDWR, mode=0o600)",
    "SharedMemory": "from multiprocessing.shared_memory import SharedMemory; SharedMemory('djax-attempt', True, 16)",
    "a semaphore": "import multiprocessing; multiprocessing.Semaphore()",
    "mmap": "import mmap; mmap.mmap(os.open(os.__file__, os.O_RDWR), 0)",
    "faulthandler": "import faulthandler; faulthandler.enable(file=3)",
    "a secret of the user": "print(open('/etc/passwd').read())",
    "a secret by a way around": "print(open(os.path.dirname(os.__file__) + '/../../../../../../../etc/passwd').read())",
    "a secret by a changing path": (
        "class Path:\n    told = ['/etc/passwd', os.__file__]\n"
        "    def __fspath__(self): return self.told.pop()\n"
        "io.FileIO(Path())"
    ),
    "a secret by a kind of text": (
        "class Path(str):\n    def split(self, *a): return []\n    def startswith(self, *a): return True\n"
        "os.open(Path('/etc/passwd'), os.O_RDONLY)"
    ),
    "a list of files": "os.listdir('/')",
    "a list of files by a scan": "list(os.scandir('/'))",
    "packages that are installed": "import numpy",
    "packages put on the path": (
        "sys.path += [os.path.dirname(os.__file__) + '/site-packages']\nimport numpy\nnumpy.zeros(3).tofile('x')"
    ),
    "a terminal": "open('/dev/tty', 'rb')",
    "a pipe": "os.pipe()",
    "an event": "os.eventfd(0)",
    "a copy of a descriptor": "os.dup(1)",
    "a copy onto a descriptor": "os.dup2(1, 2)",
    "a copy by fcntl": "import fcntl; fcntl.fcntl(1, fcntl.F_DUPFD, 10)",
    "send": "os.sendfile(1, os.open(os.__file__, os.O_RDONLY), 0, 10)",
    "sync": "os.sync()",
}
_PROCESSES = {
    "fork": "os.fork() or os._exit(0)",
    "forkpty": "os.forkpty()",
    "system": "assert os.system('true') == 0",
    "popen": "os.popen('true').close()",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "posix_spawnp": "os.posix_spawnp('true', ['true'], {})",
    "exec": "os.execv('/bin/true', ['true'])",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "fork_exec": "import _posixsubprocess; _posixsubprocess.fork_exec",
    "fork of posix made by hand": "importlib.machinery.BuiltinImporter.load_module('posix').fork() or os._exit(0)",
    "multiprocessing": "import multiprocessing; multiprocessing.Process(target=print).start()",
    "a pool of processes": (
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor(1).submit(print).result()"
    ),
    "a pseudo-terminal": "import pty; pty.openpty()",
    "a thread": "import threading; threading.Thread(target=print).start()",
    "a thread by _thread": "import _thread; _thread.start_new_thread(print, ())",
    "a daemon": "import threading; threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "a timer": "import threading; threading.Timer(9, print).start()",
    "a pool of threads": "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(1).submit(print).result()",
    "a socket": "import socket; socket.socket()",
    "a pair of sockets": "import socket; socket.socketpair()",
    "a socket by _socket": "import _socket; _socket.socket()",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    "a loop of events": "import asyncio; asyncio.run(asyncio.sleep(0))",
    "syslog": "import syslog; syslog.syslog('x')",
    "ctypes": "import ctypes; ctypes.CDLL(None).getpid()",
    "_ctypes": "import _ctypes; _ctypes.dlopen(None, 0)",
    "_ctypes by a loader": (
        "from importlib import machinery, util\nimport glob\n"
        "path = glob.glob(sys.path[-1] + '/_ctypes.*')[0]\n"
        "util.module_from_spec(machinery.ModuleSpec('_ctypes', machinery.ExtensionFileLoader('_ctypes', path), origin=path))"
    ),
    "_ctypes under another name": (
        "import _imp, glob\nfrom importlib import machinery\n"
        "path = glob.glob(sys.path[-1] + '/_ctypes.*')[0]\n"
        "_imp.create_dynamic(machinery.ModuleSpec('math', None, origin=path))"
    ),
    "_ctypes that is built in": (
        "import _imp; from importlib import machinery\n_imp.create_builtin(machinery.ModuleSpec('_ctypes', None)).dlopen"
    ),
    "_testcapi": "import _testcapi",
    "_testinternalcapi": "import _testinternalcapi",
    "a library of the system": (
        "import _imp; from importlib import machinery\n"
        "_imp.create_dynamic(machinery.ModuleSpec('math', None, origin='/lib/x86_64-linux-gnu/libc.so.6'))"
    ),
    "_xxsubinterpreters": "import _xxsubinterpreters; _xxsubinterpreters.create()",
    "_interpreters": "import _interpreters; _interpreters.create()",
    "_interpreters that is built in": (
        "import _imp; from importlib import machinery\n"
        "_imp.create_builtin(machinery.ModuleSpec('_interpreters', None)).create()"
    ),
    "concurrent.interpreters": "from concurrent import interpreters; interpreters.create()",
    "a code object": "exec((lambda: None).__code__.replace(co_consts=(1,)))",
    "a code object of its type": "type((lambda: None).__code__)(0, 0, 0, 0, 0, 0, b'', (), (), (), '', '', '', 0, b'', b'')",
    "marshal": "import marshal; marshal.loads(marshal.dumps(1))",
    "cProfile": "import cProfile; cProfile.Profile().enable()",
    "readline": "import readline; readline.read_history_file('/etc/passwd')",
    "termios": "import termios; termios.tcgetattr(0)",
    "objects of gc": "import gc; gc.get_objects()",
    "referrers of gc": "import gc; gc.get_referrers(print)",
    "referents of gc": "import gc; gc.get_referents(vars(type))",
    "a new gc": "del sys.modules['gc']; import gc; gc.get_objects()",
    "a gc made by hand": "importlib.machinery.BuiltinImporter.load_module('gc').get_objects()",
    "frames of threads": "sys._current_frames()",
    "exceptions of threads": "sys._current_exceptions()",
    "frames of a new sys": "del sys.modules['sys']; import sys; sys._current_frames()",
    "another audit hook": "sys.addaudithook(print)",
    "monitoring": "sys.monitoring.register_callback(0, 1, print)",
}

_IMPORTS = "import importlib.machinery, io, os, pathlib, signal, sys, tempfile, time\n"
_LIMITS = "import resource\n"
TOUCH = {
    name: (_LIMITS if "resource." in code else "") + _IMPORTS + code + "\n" + GOOD
    for table in (_PARENT, _DISK, _PROCESSES)
    for name, code in table.items()
}

# Looks through all it can reach for something that may be the word, and says that on every descriptor.
_SEARCH = """
import os, re, sys
def say(found):
    for word in re.findall(rb"[0-9a-f]{32}", found if isinstance(found, bytes) else repr(found).encode(errors="replace")):
        for fd in range(3, 64):
            try:
                os.write(fd, word)
            except OSError:
                pass
NAMES = (
    "__dict__ __closure__ cell_contents __defaults__ __kwdefaults__ __globals__ __code__ co_consts __self__ func args f_locals "
    "f_globals f_back tb_frame tb_next gi_frame __wrapped__ __func__ __traceback__"
).split()
seen, left = set(), []
def walk(start, most=20000):
    left.append(start)
    while left and len(seen) < most:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (bytes, str)):
            say(one)
        elif isinstance(one, dict):
            left.extend([*one.keys(), *one.values()])
        elif isinstance(one, (list, tuple, set, frozenset)):
            left.extend(one)
        else:
            for name in NAMES:
                try:
                    left.append(getattr(one, name))
                except BaseException:
                    pass
            try:
                left.append(one.__reduce__())
            except BaseException:
                pass
"""
_HOOK = """
def refused():
    import sys
    try:
        open("/etc/passwd")
    except PermissionError as error:
        return error.__traceback__
def frames(tb):
    while tb:
        yield tb.tb_frame
        tb = tb.tb_next
"""
# Adds by what the tests expect, which it looks for in the constants of a frame of theirs.
_PEEK = """
def constants(frame):
    out = []
    while frame:
        out += [c for c in frame.f_code.co_consts if isinstance(c, int) and frame.f_code.co_filename != "answer.py"]
        frame = frame.f_back
    return out[-1] if out else 0
"""

FORGE = {
    "nothing": BAD,
    "an early exit": "import os\nos._exit(0)",
    "an early exit of the system's": "raise SystemExit(0)",
    "an exit when asked": "import os\ndef add(a, b):\n    os._exit(0)",
    "an exit by an error when asked": "def add(a, b):\n    raise SystemExit(0)",
    "an interrupt when asked": "def add(a, b):\n    raise KeyboardInterrupt",
    "an abort": "import os\ndef add(a, b):\n    os.abort()",
    "an end of a generator": "def add(a, b):\n    raise StopIteration",
    "frames of callers": _SEARCH
    + BAD
    + "frame = sys._getframe()\nwhile frame:\n    walk(frame.f_locals); walk(frame.f_globals); frame = frame.f_back\n",
    "the frame above": "import sys\nprint(sys._getframe(1).f_locals['word'])\n" + BAD,
    "the frame above, to write the word": (
        "import sys, os\nf = sys._getframe().f_back\nos.write(f.f_locals['say'], f.f_locals['word'])\n" + BAD
    ),
    "frames by inspect": _SEARCH + "import inspect\nfor f in inspect.stack(): walk(f.frame)\n" + BAD,
    "the frame by inspect": _SEARCH + "import inspect\nwalk(inspect.currentframe())\n" + BAD,
    "frames of an error": _SEARCH + "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    walk(e.__traceback__)\n" + BAD,
    "frames of an error when asked": _SEARCH + "def add(a, b):\n    try:\n        1 / 0\n"
    "    except ZeroDivisionError as e:\n        walk(e.__traceback__)\n    return 0\n",
    "the frame of a generator": _SEARCH
    + "def g():\n    walk(me.gi_frame); walk(me.gi_frame.f_back)\n    yield\nme = g()\nnext(me)\n"
    + BAD,
    "the frame of a coroutine": _SEARCH + "async def g():\n    walk(me.cr_frame); walk(me.cr_frame.f_back)\n"
    "me = g()\ntry:\n    me.send(None)\nexcept StopIteration:\n" + "    pass\n" + BAD,
    "frames of threads": _SEARCH + "walk(sys._current_frames())\n" + BAD,
    "frames of the hook": _SEARCH + _HOOK + "for f in frames(refused()): walk(f)\n" + BAD,
    "objects of gc": _SEARCH + "import gc\nwalk(gc.get_objects())\n" + BAD,
    "the modules": _SEARCH + "walk(sys.modules)\n" + BAD,
    "the main module": _SEARCH + "import __main__\nwalk(vars(__main__))\n" + BAD,
    "a function that refuses": _SEARCH + "walk(os.mkfifo)\n" + BAD,
    "the arguments": _SEARCH + "walk(sys.argv + sys.orig_argv + list(os.environ.items()))\n" + BAD,
    "the command": _SEARCH + "say(open('/proc/self/cmdline', 'rb').read())\n" + BAD,
    "subclasses of object": _SEARCH + "walk(object.__subclasses__())\n" + BAD,
    "descriptors read": _SEARCH
    + "for fd in range(64):\n    try:\n        say(os.pread(fd, 1 << 16, 0))\n    except OSError:\n        pass\n"
    + BAD,
    "descriptors read from their start": _SEARCH + "for fd in range(64):\n    try:\n"
    "        os.lseek(fd, 0, 0); say(os.read(fd, 1 << 16))\n    except OSError:\n        pass\n" + BAD,
    "descriptors by name": _SEARCH + "for fd in range(64):\n    try:\n"
    "        say(open(f'/proc/self/fd/{fd}', 'rb').read())\n    except OSError:\n        pass\n" + BAD,
    "maps of memory": _SEARCH + "say(open('/proc/self/maps', 'rb').read())\n" + BAD,
    "the hook's globals": _HOOK
    + "look = open\nfor f in list(frames(refused())):\n    if f.f_code.co_name == 'hook':\n        f.f_globals.clear()\n"
    + "        for name in ('type', 'str', 'int', 'PermissionError'): f.f_builtins[name] = None\nlook('/etc/passwd')\n"
    + GOOD,
    "the hook's locals": _HOOK + "for f in frames(refused()):\n    for name in list(f.f_locals):\n"
    "        try:\n            f.f_locals[name] = frozenset()\n"
    + "        except BaseException:\n            pass\nopen('/etc/passwd')\n"
    + GOOD,
    "the hook's constants": _HOOK + "for f in frames(refused()):\n    for value in f.f_locals.values():\n"
    "        if hasattr(value, 'clear'): value.clear()\n" + "open('/etc/passwd')\n" + GOOD,
    "the hook's code": "import gc\nfor o in gc.get_objects():\n    if getattr(o, '__name__', '') == 'hook':\n"
    + "        o.__code__ = (lambda *a, **k: None).__code__\nopen('/etc/passwd')\n"
    + GOOD,
    "a function's code": "def f(): pass\nf.__code__ = (lambda: 0).__code__\n" + GOOD,
    "the hook's depth": (
        "import sys\ndef deep(n):\n    try:\n        deep(n + 1)\n    except RecursionError:\n        global f\n"
        "        f = open('/etc/passwd')\n        raise\n"
        "try:\n    deep(0)\nexcept RecursionError:\n    pass\nf.read()\n" + GOOD
    ),
    "the hook's types": (
        "import builtins\nbuiltins.type = lambda x: str\nbuiltins.PermissionError = Exception\nbuiltins.str = bytes\n"
        "open('/etc/passwd')\n" + GOOD
    ),
    "an audit hook that sees the tests": (
        "import sys\nfound = []\ndef hook(event, args):\n    if event == 'exec':\n        found.extend(args[0].co_consts)\n"
        "sys.addaudithook(hook)\ndef add(a, b):\n    return [c for c in found if isinstance(c, int)][-1]\n"
    ),
    "a trace that jumps": (
        "import sys\ndef trace(frame, event, arg):\n    return trace\nsys.settrace(trace)\ndef add(a, b):\n"
        "    frame = sys._getframe(1)\n    frame.f_trace = lambda f, e, a: setattr(f, 'f_lineno', 99)\n    return 0\n"
    ),
    "a trace of the tests": _PEEK
    + "import sys\nfound = []\ndef trace(frame, event, arg):\n    found.append(constants(frame))\n    return trace\n"
    + "sys.settrace(trace)\ndef add(a, b):\n    return found[-1]\n",
    "a profile of the tests": _PEEK
    + "import sys\nfound = []\nsys.setprofile(lambda frame, event, arg: found.append(constants(frame)))\n"
    + "def add(a, b):\n    return found[-1]\n",
    "a trace of all threads": (
        "import threading, sys\nthreading.settrace_all_threads(lambda *a: 1 / 0)\n" + BAD
        if __import__("sys").version_info >= (3, 12)
        else "import threading\nthreading.settrace(lambda *a: 1 / 0)\n" + BAD
    ),
    "constants of the caller": _PEEK + "import sys\ndef add(a, b):\n    return constants(sys._getframe(1))\n",
    "constants of the caller by inspect": _PEEK
    + "import inspect\ndef add(a, b):\n    return constants(inspect.currentframe().f_back)\n",
    "constants of the caller by a stack": _PEEK
    + "import inspect\ndef add(a, b):\n    return constants(inspect.stack()[1].frame)\n",
    "constants of the caller by an error": _PEEK
    + "def add(a, b):\n    try:\n        raise KeyError\n    except KeyError as e:\n"
    "        return constants(e.__traceback__.tb_frame.f_back)\n",
    "constants of the caller by a generator": _PEEK
    + "def add(a, b):\n    def g():\n        yield constants(me.gi_frame.f_back)\n    me = g()\n    return next(me)\n",
    "constants of the caller by gc": (
        "import gc\ndef add(a, b):\n    return [o for o in gc.get_objects() if type(o) is tuple and 5 in o][0][0]\n"
    ),
    "constants of the caller by a warning": _PEEK + "import warnings, sys\ndef show(*a):\n    global found\n"
    "    found = constants(sys._getframe(2))\nwarnings.showwarning = show\n"
    + "def add(a, b):\n    warnings.warn('x', stacklevel=2)\n    return found\n",
    "constants of the caller by monitoring": (
        "import sys\nm = sys.monitoring\nfound = []\nm.use_tool_id(0, 'x')\n"
        "m.register_callback(0, m.events.PY_START, lambda code, at: found.append(code))\n"
        "m.set_events(0, m.events.PY_START)\n"
        "def add(a, b):\n    return [c for c in found[-2].co_consts if isinstance(c, int)][-1]\n"
    ),
    "the tests' text": "def add(a, b):\n    return int(open('tests.py').read()[-1])\n",
    "the tests' lines": "import linecache\ndef add(a, b):\n    return int(linecache.getline('tests.py', 1).strip()[-1])\n",
    "the tests' text by a descriptor": (
        "import os\ndef add(a, b):\n    for fd in range(3, 64):\n        try:\n            os.lseek(fd, 0, 0)\n"
        "            return int(os.read(fd, 1 << 16).split()[-1])\n        except (OSError, ValueError, IndexError):\n"
        "            pass\n    return 0\n"
    ),
    "a function that writes": "import os\nos.write = lambda *a: 0\n" + BAD,
    "a function that leaves": "import os\nos._exit = lambda *a: None\n" + BAD,
    "functions of posix": "import posix\nposix.write = posix._exit = lambda *a: 0\n" + BAD,
    "steps that are skipped": (
        "import _operator, _functools, _collections, operator, functools\n"
        "_operator.call = operator.call = lambda *a: None\n"
        "_functools.partial = functools.partial = lambda *a: None\n_collections.deque = list\n" + BAD
    ),
    "exec": "import builtins\nbuiltins.exec = lambda *a: None\n" + BAD,
    "compile": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: None).__code__\n" + BAD,
    "map": "import builtins\nbuiltins.map = lambda *a: iter(())\n" + BAD,
    "AssertionError": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\n" + BAD,
    "no builtins": "__builtins__ = {}\n" + BAD,
    "builtins cleared": "import builtins\nvars(builtins).clear()\n" + BAD,
    "builtins of another kind": (
        "class D(dict):\n    def __getitem__(self, k): return lambda *a: 5\n__builtins__ = D()\n" + BAD
    ),
    "an import of its own": "import builtins\nbuiltins.__import__ = lambda *a: None\n" + BAD,
    "a codec": "import codecs\ncodecs.register(lambda name: None)\ncodecs.register_error('strict', lambda e: ('', e.end))\n"
    + BAD,
    "modules replaced": "import sys\nfor name in list(sys.modules):\n    sys.modules[name] = None\n" + BAD,
    "modules removed": "import sys\nsys.modules.clear()\n" + BAD,
    "a finder": "import sys\nsys.meta_path.clear()\nsys.path_hooks.clear()\n" + BAD,
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
    "an exception hook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\n" + BAD,
    "an exception hook that searches": _SEARCH + "sys.excepthook = lambda kind, e, tb: walk(tb)\n" + BAD,
    "an unraisable hook that searches": _SEARCH
    + "sys.unraisablehook = walk\nclass A:\n    def __del__(self): 1 / 0\nA()\n"
    + BAD,
    "a finalizer": _SEARCH
    + "class A:\n    def __del__(self):\n        try:\n            1 / 0\n        except ZeroDivisionError as e:\n"
    + "            walk(e.__traceback__)\nkept = A()\nkept.me = kept\ndef add(a, b):\n    global kept\n    kept = None\n"
    + "    import gc\n    gc.collect()\n    return 0\n",
    "a callback of gc": _SEARCH
    + "import gc\ngc.set_threshold(1)\ndef call(*a):\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n"
    + "        walk(e.__traceback__)\ngc.callbacks.append(call)\n"
    + BAD,
    "a handler of a signal": _SEARCH + "import signal\nsignal.signal(signal.SIGALRM, lambda n, frame: walk(frame))\n"
    "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)\n" + BAD,
    "a handler that ends": (
        "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.01)\ntime.sleep(1)\n" + BAD
    ),
    "an interrupt of the main thread": (
        "import _thread, sys\nsys.excepthook = lambda *a: None\n_thread.interrupt_main()\n" + BAD
    ),
    "text on every descriptor": (
        "import os\nfor fd in range(5000):\n    try: os.write(fd, b'f' * 32)\n    except OSError:\n        pass\n" + BAD
    ),
    "much text on every descriptor": (
        "import os\nfor fd in range(3, 64):\n    try:\n        for _ in range(1000): os.write(fd, b'x' * 100000)\n"
        "    except OSError:\n        pass\n" + BAD
    ),
    "every descriptor closed": "import os\nos.closerange(0, 64)\n" + BAD,
    "each descriptor closed": "import os\nfor fd in range(5000):\n    try:\n        os.close(fd)\n    except OSError: pass\n"
    + GOOD,
    "text that closes the tests": "x = '''\n" + BAD,
    "a line that goes on": BAD + "\\",
    "a comment": BAD + "#",
    "an open bracket": BAD + "x = [",
    "a zero byte": BAD + "\0",
    "a form feed and a marker": BAD + "\f\n\x1a\n",
    "half a character": BAD + "x = '\ud800'\n",
    "the length of the code": "0\n" + "1\n" * 20 + BAD,
    "a future": "from __future__ import annotations\n" + BAD,
    "a name of a module": "__name__ = 'tests'\n__file__ = 'tests.py'\n__loader__ = None\n" + BAD,
    "a recursion limit": "import sys\nsys.setrecursionlimit(20)\n" + BAD,
    "memory": "x = bytearray(1 << 33)\n" + GOOD,
    "much memory in small parts": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "no end": "while True: pass",
    "a long sleep": "import time\ntime.sleep(60)\n" + GOOD,
    "a crash": "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __getattr__(s, n): return getattr(s, n)\n"
    "try:\n    A().x\nexcept RecursionError:\n    pass\n" + BAD,
}
