"""Second half of the sandbox: run an answer's code, then its tests, and say the run's word if both came to their end.

Run as text by `sandbox_lock.py`, in a fresh interpreter, so it imports nothing of djax. The code shares this interpreter,
which decides how everything here is written:

- Nothing that proves success may be within its reach. The word, the tests and the function that writes are held only by
  objects made in C that a running C function has in its hands: no frame, no module and no attribute leads there.
- Between the code and the word no line of Python runs but the tests, so there is nothing to replace or to interrupt.
- What looks into frames, objects or threads, and what makes code from bytes, is taken away or refused.
"""

import _collections
import _functools
import _imp
import _operator
import _signal
import _thread
import builtins
import gc
import os
import posix
import sys
from _collections_abc import Callable, Iterator  # collections.abc loads more than an answer may ever need

# Modules made in C that an answer may import; Python's own source is free. Missing on purpose: what calls the system beyond
# files (sockets, other processes, terminals, shared memory), what reaches into the interpreter, and what reads other files.
EXTENSIONS = frozenset(
    """_abc _ast _asyncio _bisect _blake2 _bz2 _codecs _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw
    _collections _contextvars _crypt _csv _datetime _decimal _elementtree _functools _hashlib _heapq _hmac _io _json _locale
    _lzma _md5 _multibytecodec _opcode _operator _pickle _queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _sre _stat
    _statistics _string _struct _suggestions _symtable _sysconfig _tokenize _tracemalloc _types _typing _uuid _warnings
    _weakref _zoneinfo array atexit audioop binascii cmath errno fcntl itertools math mmap pyexpat resource select time
    unicodedata zlib""".split()
)
# What stays of modules that call the system: to look at files and at itself.
POSIX = frozenset(
    """_cpu_count _create_environ _exit _fspath _inputhook abort access close confstr cpu_count device_encoding fspath fstat
    get_exec_path get_inheritable get_terminal_size getcwd getcwdb getegid geteuid getgid getloadavg getpgrp getpid getppid
    getrandom getuid isatty listdir lseek lstat major makedev minor open pathconf pread putenv read readlink readv
    register_at_fork scandir sched_getaffinity sched_yield stat strerror sysconf times umask uname unsetenv urandom
    waitstatus_to_exitcode write""".split()
)
SIGNAL = frozenset("alarm default_int_handler getitimer getsignal pause setitimer signal strsignal valid_signals".split())
# Kinds of audit events that are refused, but for the ones that are free.
CLOSED = frozenset(
    """os sys gc code cpython ctypes socket subprocess pty shutil sqlite3 resource fcntl signal _thread syslog faulthandler
    setopencodehook ftplib smtplib urllib webbrowser http imaplib poplib telnetlib nntplib tempfile msvcrt winreg
    _posixsubprocess""".split()
)
FREE = frozenset(
    """os.walk os.fwalk os.putenv os.unsetenv sys.excepthook sys.unraisablehook sys._getframemodulename
    sys.set_asyncgen_hooks_firstiter sys.set_asyncgen_hooks_finalizer""".split()
)
ZONES = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo")


def refuse(*_: object, **__: object) -> None:
    raise PermissionError("this is not allowed in the sandbox")


def refuse_import(*_: object) -> None:
    raise ImportError("this module is not allowed in the sandbox")


def ignore(*_: object) -> None:
    """For `sys.settrace` and `sys.setprofile`, which parts of the library call in passing."""


def receive(file: int) -> tuple[bytes, str, str]:
    """The word, the code and the tests, read to the end of a descriptor and closed."""
    data = b""
    while part := os.read(file, 1 << 20):
        data += part
    os.close(file)
    word, length, rest = data.split(b"\n", 2)
    return word, rest[: int(length)].decode(), rest[int(length) :].decode()


def watch() -> Callable[[str, tuple], None]:
    """An audit hook that refuses what an answer does not need.

    Its frames can be had from the errors it raises. So it looks nothing up by name and keeps nothing that can be changed: all
    it uses are its arguments and constants. The function itself is in nobody's reach.
    """
    roots = [path.rstrip("/") for path in sys.path if path.startswith("/")]

    def hook(
        event: str,
        arguments: tuple,
        *,
        free: frozenset = FREE,
        closed: frozenset = CLOSED,
        reading: frozenset = frozenset(("open", "os.listdir", "os.scandir")),
        inside: tuple = tuple(root + "/" for root in (*roots, *ZONES, os.getcwd())),
        installed: tuple = tuple(root + name for root in roots for name in ("/site-packages", "/dist-packages")),
        names: frozenset = frozenset((*roots, *ZONES, os.getcwd(), "/dev/null", "/dev/urandom", "/etc/localtime")),
        write: int = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND,
        extensions: frozenset = EXTENSIONS,
        type: type = type,
        str: type = str,
        bytes: type = bytes,
        int: type = int,
        PermissionError: type = PermissionError,
        ImportError: type = ImportError,
    ) -> None:
        if event in reading:
            path = arguments[0]
            if type(path) is bytes:
                path = path.decode("utf-8", "surrogateescape")
            # What is relative lies in the empty directory this runs in. A link followed by ".." may lead anywhere.
            known = type(path) is str and ".." not in path.split("/") and not path.startswith(installed)
            known = known and (path[:1] != "/" or path in names or path.startswith(inside))
            if event == "open":
                known = known and type(arguments[2]) is int and not arguments[2] & write
            if not known and (path is not None or event == "open"):
                raise PermissionError(f"{event} is not allowed here")
        elif event == "import":
            path, name = arguments[1], arguments[0].rpartition(".")[2]
            # A library may bear another's name, and be loaded before that shows.
            if path is not None and (
                name not in extensions
                or type(path) is not str
                or path.rpartition("/")[2].partition(".")[0] != name
                or not path.startswith(inside)
                or path.startswith(installed)
                or ".." in path.split("/")
            ):
                raise ImportError("this module is not allowed here")
        elif event == "object.__setattr__":
            if arguments[1] == "__code__":
                raise PermissionError("to change a function's code is not allowed here")
        elif event not in free and event.partition(".")[0] in closed:
            raise PermissionError(f"{event} is not allowed here")

    return hook


def take_away(namespace: dict) -> None:
    """Leave the code only functions that it may call, for systems and events that nothing else watches."""
    for name in EXTENSIONS & set(sys.builtin_module_names):
        __import__(name)
    # A module can be made anew from C, with all its functions, by this alone.
    vars(_imp)["create_builtin"] = refuse_import
    for imported in ("marshal", "sys.monitoring"):
        sys.modules.pop(imported, None)
    for module, kept in ((posix, POSIX), (os, POSIX), (_signal, SIGNAL)):
        for name, value in list(vars(module).items()):
            if type(value) is type(len) and name not in kept and not name.startswith(("_path_", "W")):
                setattr(module, name, refuse)
    for name in ("supports_dir_fd", "supports_effective_ids", "supports_fd", "supports_follow_symlinks"):
        setattr(os, name, {f for f in getattr(os, name) if f.__name__ in POSIX})
    for module, names in (
        (gc, "get_objects get_referrers get_referents"),
        (sys, "_current_frames _current_exceptions addaudithook call_tracing remote_exec activate_stack_trampoline"),
        (_thread, "start_new_thread start_new start_joinable_thread interrupt_main"),
    ):
        for name in names.split():
            if hasattr(module, name):
                setattr(module, name, refuse)
    for name in ("settrace", "setprofile", "_settraceallthreads", "_setprofileallthreads"):
        if hasattr(sys, name):
            setattr(sys, name, ignore)
    if hasattr(sys, "monitoring"):
        del sys.monitoring
    # Many ask for their caller's frame to learn the name of its module, so there is one to be had: that of no call.
    frame = eval("(0 for _ in ())", namespace).gi_frame
    sys._getframe = eval("lambda depth=0, /: frame", {"frame": frame})
    sys.argv, sys.orig_argv = [""], []


def hide_callers(get_referents: Callable) -> None:
    """Let no frame lead to the one that called it. Tests call the code, and their frames hold what they expect."""
    (attributes,) = get_referents(vars(type(eval("(0 for _ in ()).gi_frame", {}))))
    attributes["f_back"] = property(eval("lambda frame: None", {}))


def prepare(file: int, say: int, mark: bytes) -> Iterator[None]:
    """Everything there is to do, as an iterator made in C, which alone holds the word, the tests, and what says the word."""
    write, leave = os.write, os._exit
    # No handler of Python's may raise in between.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    write(say, mark)
    word, text, checks = receive(file)
    main = type(sys)("__main__")
    namespace = vars(main)
    namespace["__builtins__"] = builtins
    sys.modules["__main__"] = main
    code = compile(text, "answer.py", "exec", dont_inherit=True)
    tests = compile(checks, "tests.py", "exec", dont_inherit=True)
    get_referents, add_hook = gc.get_referents, sys.addaudithook
    take_away(namespace)
    hide_callers(get_referents)
    add_hook(watch())
    call = _functools.partial
    steps = (
        call(exec, code, namespace),
        # The tests' own built-in functions are Python's.
        call(vars(builtins).update, dict(vars(builtins))),
        call(namespace.__setitem__, "__builtins__", builtins),
        call(exec, tests, namespace),
        call(write, say, word),
        call(leave, 0),
    )
    return map(_operator.call, steps)


if __name__ == "__main__":
    try:
        _collections.deque(prepare(int(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]).encode()), 0)
    finally:
        os._exit(1)
