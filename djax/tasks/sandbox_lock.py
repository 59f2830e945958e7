"""First half of the sandbox: limit this process, have the system refuse what it will not need, become a fresh interpreter.

Run as a script by `sandbox.run`, isolated and without site, so it imports nothing of djax. Every measure that the system
lacks is left out, and the second half is told which ones hold.
"""

import ctypes
import os
import resource
import struct
import sys

# linux/prctl.h.
_DEATH_SIGNAL, _SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 1, 22, 2, 38
# Landlock's calls have the same numbers on every machine.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _READ, _LIST = 1 << 0, 1 << 2, 1 << 3
_ZONES = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo", "/etc/localtime")


def limit(seconds: int, size: int) -> None:
    """Bound processor time, memory, files and processes for good."""
    for what, most in (("CPU", seconds), ("AS", size), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0), ("NPROC", 0)):
        kind = getattr(resource, "RLIMIT_" + what, None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(kind, (most, most))
            except (ValueError, OSError):  # macOS bounds no address space
                pass


def close_files(libc: ctypes.CDLL, interpreter: str) -> bool:
    """Leave this process only the files that an interpreter reads (Landlock, Linux 5.13). Returns whether that holds."""
    call = libc.syscall
    call.restype = ctypes.c_long
    version = call(_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    # All kinds of access there are in this version, TCP, and signals and sockets that leave this process.
    files = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    fields = (files, *((3,) if version >= 4 else ()), *((3,) if version >= 6 else ()))
    handled = struct.pack(f"<{len(fields)}Q", *fields)
    rules = call(_CREATE, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        return False
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            mapped = {line.split(maxsplit=5)[5].strip() for line in file if line.count("/") > 1}
    except OSError:  # without /proc, nobody knows where the interpreter's libraries lie
        return False
    libraries = {os.path.dirname(name) for name in mapped if ".so" in os.path.basename(name)}
    prefix = {os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")}
    wanted = {*mapped, *libraries, *prefix, *sys.path, *_ZONES, interpreter, "/etc/ld.so.cache", "/dev/null", os.getcwd()}
    for name in wanted:
        try:
            fd = os.open(name, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not every system has all of them
            continue
        access = _EXECUTE | _READ | (_LIST if os.path.isdir(name) else 0)
        call(_ADD, rules, 1, struct.pack("<Qi", access, fd), 0)
        os.close(fd)
    return call(_RESTRICT, rules, 0) == 0


def drop_privileges(libc: ctypes.CDLL) -> None:
    """A superuser's process keeps none of its capabilities; without new privileges, an exec does not give them back."""
    libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24))


def become(libc: ctypes.CDLL, command: list[str], execve: int, program: bytes) -> None:
    """Replace this process by `command`, under the filter `program` from then on. Exits if that fails.

    The command's last argument becomes "1" if the filter holds. execve: the call's number. The filter gets one exception: the
    call that is made here, told by the addresses of its arguments, which what follows neither knows nor can choose.
    """
    path = ctypes.create_string_buffer(os.fsencode(command[0]))
    arguments = (ctypes.c_char_p * (len(command) + 1))(*map(os.fsencode, command), None)
    environment = (ctypes.c_char_p * 1)(None)
    if program:
        # The codes are those of sandbox_filter.py, which an isolated interpreter does not find.
        words = []
        for place, address in ((16, ctypes.addressof(path)), (24, ctypes.addressof(arguments))):
            words += [(place, address & 0xFFFFFFFF), (place + 4, address >> 32)]
        # Load the number; another one goes on to the program, and so does each word that is not this call's.
        lines = [(0x20, 0, 0, 0), (0x15, 0, 9, execve)]
        for n, (place, word) in enumerate(words):
            lines += [(0x20, 0, 0, place), (0x15, 0, 7 - 2 * n, word)]
        lines += [(0x06, 0, 0, 0x7FFF0000)]
        whole = b"".join(struct.pack("<HBBI", *line) for line in lines) + program
        code = ctypes.create_string_buffer(whole, len(whole))
        given = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(whole) // 8, ctypes.addressof(code)))
        if libc.prctl(_SECCOMP, _FILTER, ctypes.addressof(given), 0, 0) == 0:
            arguments[len(command) - 1] = b"1"
    libc.execve(path, arguments, environment)
    os._exit(1)


def main() -> None:
    seconds, size, given, writing, strict, execve = map(int, sys.argv[1:7])
    program, child = bytes.fromhex(sys.argv[7]), sys.argv[8]
    command = [sys.executable, "-I", "-S", "-B", "-c", child, str(given), str(writing)]
    limit(seconds, size)
    if sys.platform != "linux":
        os.execve(command[0], [*command, "0", "0"], {})
    libc = ctypes.CDLL(None)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.prctl(_DEATH_SIGNAL, 9, 0, 0, 0)
    held = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    closed = held and strict and close_files(libc, sys.executable)
    if strict:
        drop_privileges(libc)
    become(libc, [*command, str(int(closed)), "0"], execve, program if held else b"")


if __name__ == "__main__":
    main()
