"""The inside of the sandbox: a script that locks itself up and then runs one program.

``sandbox.run_program`` starts it as ``python -I -S jail.py``. It imports nothing of kvant. A step
that the machine refuses is reported by its name, and no program is run. The steps:

1. New mount, pid, network, IPC, host name and cgroup namespaces, within a new user namespace where
   this process may not make them otherwise (``namespaces(7)``).
2. A root folder in memory with the system's and Python's libraries, read-only with all that is
   mounted below them (``mount_setattr(2)``), and a small ``/tmp``. Everything else is unmounted
   (``pivot_root(2)``).
3. A fork. The child is process 1 of its namespace: whatever it starts dies with it. It becomes
   ``nobody`` without capabilities, with limits (``setrlimit(2)``) and a filter that refuses the
   system calls that a computation has no use for, new processes among them (``seccomp(2)``).
4. The child runs the program. This process, which the program cannot see, keeps the time.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NOBODY = 65534

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET; CLONE_NEWUSER
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_USER_NAMESPACE = 0x10000000

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_RECURSIVE, _PRIVATE = 0x4000, 0x40000
_SEALED = _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV
_DETACH = 2
_HERE, _AT_RECURSIVE = -100, 0x8000
_ROOT = Path("/dev")  # the new root is mounted here: a folder that is always there, of no library

_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS = 1, 4, 22, 24, 38

_DISK = 16 << 20  # bytes of /tmp, and of one file
_THREADS, _FILES = 64, 64

# The processors whose system calls are known: their code in a filter and their column below.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_REFUSED: dict[str, tuple[int, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "socket": (41, 198), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "modify_ldt": (154, None),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "fanotify_init": (300, 262),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "syslog": (103, 116),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106),
}  # fmt: skip
_CLONE, _CLONE3, _PRCTL = (56, 220), (435, 435), (157, 167)
_CLONE_THREAD = 0x00010000


class RefusedError(Exception):
    """The machine refused a step of the way in."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Makes a :class:`RefusedError` that begins with ``name`` of whatever the system refuses."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RefusedError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def call(function: str, *arguments: Any) -> None:
    """A function of the C library; raises ``OSError`` where it returns -1."""
    wide = [ctypes.c_ulong(x) if isinstance(x, int) else x for x in arguments]
    if getattr(_LIBC, function)(*wide) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def system_call(name: str, *arguments: Any) -> None:
    """One of ``_REFUSED``, which this process may make yet, by its number."""
    call("syscall", _REFUSED[name][_MACHINES[platform.machine()][1]], *arguments)


def mount(source: Path | str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """``mount(2)``."""
    names = (os.fsencode(source), os.fsencode(target), os.fsencode(kind))
    call("mount", *names, flags, os.fsencode(options))


def isolate() -> None:
    """New namespaces; in a user namespace where we may not make them or become nobody otherwise."""
    user, group = os.geteuid(), os.getegid()
    if knows_nobody():
        try:
            call("unshare", _NAMESPACES)
        except PermissionError:
            pass
        else:
            return
    call("unshare", _NAMESPACES | _USER_NAMESPACE)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1")


def knows_nobody() -> bool:
    """Whether nobody is a user and a group here: a user namespace may have no other than root."""
    for name in ("uid_map", "gid_map"):
        lines = Path("/proc/self", name).read_text().splitlines()
        ranges = [[int(x) for x in line.split()] for line in lines]
        if not any(first <= _NOBODY < first + length for first, _, length in ranges):
            return False
    return True


def libraries() -> list[Path]:
    """The folders of Python's own modules and of the libraries that these load."""
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
    bases = (sys.base_prefix, sys.base_exec_prefix)
    python = [f"{base}/{name}" for base in bases for name in ("lib", sys.platlibdir)]
    found: list[Path] = []
    for folder in map(Path, (*system, *python)):
        if folder.is_dir() and not any(folder.is_relative_to(other) for other in found):
            found.append(folder)
    return found


def show(source: Path, target: Path) -> None:
    """Mounts a folder at another place too, read-only there, with all that is mounted below it.

    A user namespace may not leave out what is mounted below. Linux before 5.12 cannot seal that
    and leaves it out.
    """
    mount(source, target, "", _BIND | _RECURSIVE)
    try:
        seal(target)
    except OSError as error:
        # not there, also as a container's filter says it that does not know this call
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        call("umount2", os.fsencode(target), _DETACH)
        mount(source, target, "", _BIND)
        stays = os.statvfs(target).f_flag & _NOEXEC  # a user namespace may not take it away
        mount("none", target, "", _SEALED | stays)


def seal(folder: Path) -> None:
    """Makes a mount and those below it read-only (``mount_setattr(2)``)."""
    flags = _RDONLY | _NOSUID | _NODEV  # the values are mount(2)'s
    given = struct.pack("=4Q", flags, 0, 0, 0)
    system_call("mount_setattr", _HERE, os.fsencode(folder), _AT_RECURSIVE, given, len(given))


def confine() -> None:
    """A new root: libraries to read, ``/tmp`` to write, nothing else."""
    sources = libraries()
    mount("none", Path("/"), "", _PRIVATE | _RECURSIVE)
    mount("tmpfs", _ROOT, "tmpfs", _NOSUID | _NODEV, "mode=755,size=1m")
    for source in sources:
        target = _ROOT / source.relative_to("/")
        target.mkdir(parents=True)
        show(source, target)
    own = _ROOT / "tmp"
    own.mkdir()
    options = f"mode=1777,size={_DISK},nr_inodes=1024"
    mount("tmpfs", own, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    os.chdir(_ROOT)
    system_call("pivot_root", b".", b".")  # the old root is then on top of the new one
    call("umount2", b".", _DETACH)
    mount("none", Path("/"), "", _SEALED)
    os.chdir("/tmp")


def limit(seconds: float, memory: int) -> None:
    """Limits on this process: CPU time in seconds, address space in bytes, and fixed ones."""
    for kind, most in (
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _DISK),
        (resource.RLIMIT_NPROC, _THREADS),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(kind, (most, most))


def disarm() -> None:
    """A session of its own, the user nobody, no capability now or later."""
    os.setsid()
    for capability in count():
        try:
            call("prctl", _CAPBSET_DROP, capability, 0, 0, 0)
        except OSError:
            break  # the last one there is
    try:
        os.setgroups([])
    except PermissionError:
        pass  # in a user namespace: groups that own nothing of what can be seen
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    version = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    call("capset", version, ctypes.create_string_buffer(24))
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", _DUMPABLE, 0, 0, 0, 0)
    call("prctl", _PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def refuse() -> None:
    """Has the kernel refuse system calls to this process from now on."""
    program = filter_program(*_MACHINES[platform.machine()])
    instructions = ctypes.create_string_buffer(program, len(program))
    where = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    call("prctl", _SECCOMP, 2, ctypes.create_string_buffer(where), 0, 0)


def filter_program(machine: int, column: int) -> bytes:
    """The filter in classic BPF; a comparison skips as many instructions as it says."""
    load, equal, least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number, of_machine, first = 0, 4, 16  # offsets in struct seccomp_data
    allow, kill, not_permitted, not_there = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    code = [
        (load, 0, 0, of_machine),
        (equal, 1, 0, machine),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (least, 0, 1, 0x40000000),  # x32: x86-64's other set of numbers
        (give, 0, 0, not_permitted),
        (equal, 0, 1, _CLONE3[column]),  # its flags cannot be seen; the C library falls back
        (give, 0, 0, not_there),
    ]
    for numbers in _REFUSED.values():
        if (refused := numbers[column]) is not None:
            code += [(equal, 0, 1, refused), (give, 0, 0, not_permitted)]
    code += [
        (equal, 0, 4, _CLONE[column]),  # threads, no processes
        (load, 0, 0, first),
        (bits, 0, 1, _CLONE_THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, not_permitted),
        (equal, 0, 3, _PRCTL[column]),  # it cannot outlive whoever keeps the time
        (load, 0, 0, first),
        (equal, 0, 1, _PDEATHSIG),
        (give, 0, 0, not_permitted),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def run(source: str, token: list[bytes], result: int) -> None:
    """Runs a program; writes the token when it has come to its end, else why it has not.

    The token leaves its list before the program begins and is from then on only on the
    interpreter's stack: no frame, module or object that the garbage collector knows leads to it.
    """
    name = "program"  # not __main__: as in OpenAI's harness, what a script does as such is not run
    module = sys.modules.setdefault(name, types.ModuleType(name))
    try:
        code = compile(source, f"<{name}>", "exec", dont_inherit=True)
        os.write(result, (token.pop(), exec(code, vars(module)))[0])  # type: ignore[func-returns-value]
    except BaseException as error:
        os.write(result, describe(error).encode("utf-8", "replace"))


def describe(error: BaseException) -> str:
    """An exception's type and message, whatever its own methods do."""
    name = type(error).__name__
    try:
        return f"{name}: {error}".removesuffix(": ")[:1000]
    except BaseException:
        return name


def child(task: dict[str, Any], source: str, token: list[bytes]) -> None:
    """Locks the door from within, runs the program and ends; reports on stdout if it cannot."""
    leave = os._exit
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        with step("limits"):
            limit(task["seconds"], task["memory"])
        with step("becoming nobody"):
            disarm()
        with step("seccomp"):
            refuse()
    except RefusedError as error:
        report(error=str(error))
        leave(1)
    os.environ.clear()
    for ours in (1, 2):  # stdout and stderr are how this script reports; stdin is nothing by now
        os.dup2(0, ours)
    run(source, token, task["result"])
    leave(0)


def supervise(process: int, seconds: float) -> None:
    """Waits for the child, kills it when its time is over or SIGTERM came, reports its end."""
    woken = signal.sigtimedwait([signal.SIGCHLD, signal.SIGTERM], seconds)
    in_time = woken is not None and woken.si_signo == signal.SIGCHLD
    if not in_time:
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    report(in_time=in_time, status=os.waitstatus_to_exitcode(status))


def report(**facts: Any) -> None:
    """One line of JSON on stdout."""
    os.write(1, json.dumps(facts).encode() + b"\n")


def read_task() -> tuple[dict[str, Any], str, list[bytes]]:
    """The task, the program and the token, from stdin: a line of JSON, then source text."""
    parts: list[bytes] = []
    while part := os.read(0, 1 << 20):
        parts.append(part)
    head, _, source = b"".join(parts).partition(b"\n")
    task = json.loads(head)
    return task, source.decode("utf-8", "surrogatepass"), [task.pop("token").encode()]


def main() -> None:
    """See the module."""
    call("prctl", _PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
    task, source, token = read_task()
    if os.getppid() != task["parent"]:
        return  # it died before prctl
    try:
        if platform.machine() not in _MACHINES:
            raise RefusedError(
                f"the processor {platform.machine()} (known: {', '.join(_MACHINES)})"
            )
        with open("/dev/null", "r+b", 0) as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 0)
        with step("namespaces"):
            isolate()
        with step("a root folder of its own"):
            confine()
    except RefusedError as error:
        report(error=str(error))
        return
    process = os.fork()
    if process == 0:
        child(task, source, token)
    os.close(task["result"])
    supervise(process, task["seconds"])


if __name__ == "__main__":
    main()
