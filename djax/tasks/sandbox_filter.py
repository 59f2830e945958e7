"""Which calls of the system a computing Python needs, as a seccomp filter: classic BPF that refuses everything else."""

import struct
from collections.abc import Iterator

# linux/bpf_common.h: load a word of the call; jump if it is equal, at least, or has bits set; return a verdict.
LOAD, EQUAL, AT_LEAST, BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# linux/seccomp.h: where the call's number and its machine stand, and the verdicts (EPERM, ENOSYS).
NUMBER, MACHINE = 0, 4
ALLOW, REFUSE, MISSING = 0x7FFF0000, 0x00050001, 0x00050026
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
EXECVE = {"x86_64": 59, "aarch64": 221}
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000


def _parse(table: str) -> dict[str, int]:
    return {name: int(number) for name, number in (entry.split("=") for entry in table.split())}


# Memory, files that are open, names of files, the clock, and waiting. No other process, no network, nothing that writes.
_FREE = {
    "x86_64": _parse("""
        read=0 close=3 stat=4 fstat=5 lstat=6 poll=7 lseek=8 mmap=9 mprotect=10 munmap=11 brk=12 rt_sigaction=13
        rt_sigprocmask=14 rt_sigreturn=15 pread64=17 readv=19 access=21 select=23 sched_yield=24 mremap=25 madvise=28
        pause=34 nanosleep=35 getitimer=36 alarm=37 setitimer=38 getpid=39 exit=60 uname=63 getcwd=79 readlink=89
        gettimeofday=96 getrlimit=97 getrusage=98 sysinfo=99 times=100 getuid=102 getgid=104 geteuid=107 getegid=108
        getppid=110 getpgrp=111 sigaltstack=131 arch_prctl=158 gettid=186 time=201 futex=202 sched_getaffinity=204
        getdents64=217 set_tid_address=218 restart_syscall=219 clock_gettime=228 clock_getres=229 clock_nanosleep=230
        exit_group=231 newfstatat=262 readlinkat=267 faccessat=269 pselect6=270 ppoll=271 set_robust_list=273
        getrandom=318 statx=332 rseq=334 faccessat2=439
    """),
    "aarch64": _parse("""
        getcwd=17 faccessat=48 close=57 getdents64=61 lseek=62 read=63 readv=65 pread64=67 pselect6=72 ppoll=73
        readlinkat=78 newfstatat=79 fstat=80 exit=93 exit_group=94 set_tid_address=96 futex=98 set_robust_list=99
        nanosleep=101 getitimer=102 setitimer=103 clock_gettime=113 clock_getres=114 clock_nanosleep=115
        sched_getaffinity=123 sched_yield=124 restart_syscall=128 sigaltstack=132 rt_sigaction=134 rt_sigprocmask=135
        rt_sigreturn=139 times=153 uname=160 getrlimit=163 getrusage=165 gettimeofday=169 getpid=172 getppid=173
        getuid=174 geteuid=175 getgid=176 getegid=177 gettid=178 sysinfo=179 brk=214 munmap=215 mremap=216 mmap=222
        mprotect=226 madvise=233 getrandom=278 statx=291 rseq=293 faccessat2=439
    """),
}
# What depends on its arguments.
_BOUND = {
    "x86_64": _parse("write=1 open=2 ioctl=16 fcntl=72 openat=257 prlimit64=302 clone3=435 openat2=437"),
    "aarch64": _parse("fcntl=25 ioctl=29 openat=56 write=64 prlimit64=261 clone3=435 openat2=437"),
}


def filter_program(machine: str, writing: int) -> bytes:
    """A program for `machine` (as `platform.machine` has it), 8 bytes an instruction; empty for one that is not known.

    writing: the descriptor that may be written to besides standard output and error. Refused calls fail with EPERM, which
    Python raises as PermissionError.
    """
    if machine not in MACHINES:
        return b""
    lines = [line(LOAD, MACHINE), line(EQUAL, MACHINES[machine], 1, 0), line(RETURN, REFUSE), line(LOAD, NUMBER)]
    if machine == "x86_64":  # the same calls by the x32 ABI's numbers
        lines += [line(AT_LEAST, 0x40000000, 0, 1), line(RETURN, REFUSE)]
    for number in _FREE[machine].values():
        lines += [line(EQUAL, number, 0, 1), line(RETURN, ALLOW)]
    for name, number in _BOUND[machine].items():
        rule = list(_bind(name, writing))
        lines += [line(EQUAL, number, 0, len(rule)), *rule]
    return b"".join([*lines, line(RETURN, REFUSE)])


def _bind(name: str, writing: int) -> Iterator[bytes]:
    """The instructions that judge a call by its arguments; every way through them ends in a verdict."""
    match name:
        case "write":
            yield from _among(0, 1, 2, writing)
        case "ioctl":  # TCGETS and TIOCGWINSZ (is it a terminal, how wide), FIONCLEX, FIOCLEX
            yield from _among(1, 0x5401, 0x5413, 0x5450, 0x5451)
        case "fcntl":  # F_GETFD, F_SETFD, F_GETFL: a copy of a descriptor would pass the rule on writing
            yield from _among(1, 1, 2, 3)
        case "open" | "openat":
            yield line(LOAD, argument(1 if name == "open" else 2))
            yield line(BITS, _WRITING, 0, 1)
            yield line(RETURN, REFUSE)
            yield line(RETURN, ALLOW)
        case "prlimit64":  # to ask, about this process
            for place in (argument(0), argument(2), argument(2) + 4):
                yield from (line(LOAD, place), line(EQUAL, 0, 1, 0), line(RETURN, REFUSE))
            yield line(RETURN, ALLOW)
        case _:  # arguments in memory cannot be judged; the C library falls back on calls whose can
            yield line(RETURN, MISSING)


def _among(n: int, *values: int) -> Iterator[bytes]:
    yield line(LOAD, argument(n))
    for value in values:
        yield from (line(EQUAL, value, 0, 1), line(RETURN, ALLOW))
    yield line(RETURN, REFUSE)


def argument(n: int) -> int:
    """Where the low half of argument n stands; both machines have it before the high half."""
    return 16 + 8 * n


def line(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    """One instruction. yes, no: how many to skip where a jump's condition holds, and where it does not."""
    return struct.pack("<HBBI", code, yes, no, value)
