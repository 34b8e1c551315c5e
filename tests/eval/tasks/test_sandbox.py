"""Programs that mean harm do none, programs that cheat do not pass, honest ones do.

Every hostile program here is one that would succeed in this process.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvant.eval.tasks import sandbox
from kvant.eval.tasks.sandbox import Verdict, run_program, run_programs
from tests.eval.tasks.conftest import refusal

HUMANEVAL = Path(__file__).parents[4] / "shared/data/humaneval/HumanEval.jsonl.gz"
pytestmark = pytest.mark.usefixtures("permitted")
LONG = 60.0  # seconds: no program here is to end because a busy machine was slow


def run(source: str, seconds: float = LONG) -> Verdict:
    return run_program(source, seconds=seconds)


# honest programs


HONEST = {
    "nothing": "",
    "its own names": "x = 1\ndef f():\n    return x\nassert f() == 1",
    "libraries": (
        "import bisect, collections, copy, dataclasses, datetime, decimal, enum, fractions\n"
        "import functools, hashlib, heapq, itertools, json, math, operator, random, re, string\n"
        "import statistics, typing, zlib, ctypes, sqlite3\n"
        "assert hashlib.md5(b'x').hexdigest().startswith('9dd4e461')\n"
        "assert random.random() < 1"
    ),
    "a data class": (
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: int\n"
        "assert pickle.loads(pickle.dumps(P(1))) == P(1)"
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as T\n"
        "assert sum(T(4).map(abs, range(5))) == 10"
    ),
    "its own file": (
        "from pathlib import Path\nPath('x').write_text('a')\nassert Path('/tmp/x').read_text()"
    ),
    "what it does as a script is not run": "if __name__ == '__main__':\n    input()",
    "other alphabets": "assert '\u0436\u0304'.encode() == b'\\xd0\\xb6\\xcc\\x84'",
    "output without end of a line": "print('a' * 100_000, end='')",
}


@pytest.mark.parametrize("source", HONEST.values(), ids=HONEST)
def test_honest_programs_pass(source: str) -> None:
    assert run(source) == Verdict(True, "passed")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'a\\nb'", "AssertionError: a b"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("x = '\ud800'", "UnicodeEncodeError: "),
        ("input()", "EOFError: "),
        ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: "),
        ("raise type('E' * 9000, (Exception,), {})", "EEEE"),
    ],
)
def test_a_wrong_program_says_why_in_one_line(source: str, reason: str) -> None:
    verdict = run(source)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)
    assert len(verdict.reason.splitlines()) == 1
    assert len(verdict.reason) <= 500


# programs that claim to have passed


EVERYWHERE = """
import os
def tell(text):
    for fd in range(64):
        try:
            os.write(fd, text)
        except OSError:
            pass
"""
SEARCH = EVERYWHERE + (
    "import gc, re, sys\n"
    "seen, found, todo = set(), set(), [sys._getframe(), *sys._current_frames().values(),\n"
    "    *gc.get_objects(), *sys.modules.values()]\n"
    "frame = sys._getframe()\n"
    "while frame:\n"
    "    todo += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]\n"
    "    frame = frame.f_back\n"
    "while todo:\n"
    "    thing = todo.pop()\n"
    "    if id(thing) in seen:\n"
    "        continue\n"
    "    seen.add(id(thing))\n"
    "    if type(thing) in (bytes, str):\n"
    "        text = thing if type(thing) is bytes else thing.encode('utf-8', 'replace')\n"
    "        found |= set(re.findall(rb'[0-9a-f]{64}', text))\n"
    "    todo += gc.get_referents(thing)\n"
    "assert len(seen) > 10_000\n"
    "for each in found:\n"
    "    tell(each)\n"
    "os._exit(0)"
)
FORGERIES = {
    "exits": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "raises SystemExit": "raise SystemExit",
    "raises KeyboardInterrupt": "raise KeyboardInterrupt",
    "prints": "print('passed', flush=True)\nraise SystemExit(0)",
    "writes everywhere": EVERYWHERE + "tell(b'passed')\nos._exit(0)",
    "writes JSON everywhere": EVERYWHERE
    + 'tell(b\'{"in_time": true, "status": 0}\\n\')\nos._exit(0)',
    "writes, then goes on": EVERYWHERE + "tell(b'passed')",
    "patches builtins": (
        "import builtins, os\n"
        "builtins.exec = builtins.compile = builtins.print = lambda *x, **y: None\n"
        "builtins.BaseException = builtins.Exception = int\nassert False"
    ),
    "patches os": (
        "import os\nwrite = os.write\nos._exit = lambda status: None\n"
        "os.write = lambda fd, text: write(fd, b'passed')\nassert False"
    ),
    "at exit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "an exception that cannot be told": (
        "class E(Exception):\n    def __str__(self):\n        raise SystemExit\nraise E"
    ),
    "an exception that says so": (
        "class E(Exception):\n    def __str__(self):\n        return 'passed'\n"
        "E.__name__ = 'passed'\nraise E"
    ),
    "ends in a thread": (
        "import os, threading, time\nthreading.Thread(target=os._exit, args=[0]).start()\n"
        "time.sleep(50)\nassert False"
    ),
    "closes everything": "import os\nos.closerange(0, 64)",
    "ends by a signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nassert False",
    "looks for the token": SEARCH,
}


@pytest.mark.parametrize("source", FORGERIES.values(), ids=FORGERIES)
def test_what_did_not_run_to_its_end_has_not_passed(source: str) -> None:
    assert not run(source).passed


# programs that take what they can get


def test_time_is_limited() -> None:
    for source in ("while True: pass", "import time; time.sleep(1000)", "10 ** 10 ** 10"):
        assert run(source, 0.5) == Verdict(False, "timed out after 0.5 s")


def test_a_program_cannot_hold_its_supervisor_up() -> None:
    source = (
        "import signal\nfor number in range(1, 65):\n"
        "    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: pass"
    )
    assert run(source, 0.5) == Verdict(False, "timed out after 0.5 s")


@pytest.mark.parametrize(
    "source",
    [
        "x = bytearray(10 ** 9)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(64)]",
        "import os\nx = os.memfd_create('x')\nos.ftruncate(x, 10 ** 10)",
        "import threading\nx = [bytearray(1 << 26) for _ in range(64)]",
    ],
)
def test_memory_is_limited(source: str) -> None:
    assert not run(source).passed


def test_the_limit_of_memory_is_as_asked() -> None:
    source = "x = bytearray(200 << 20)"
    assert run_program(source, seconds=LONG, memory=400 << 20).passed
    assert run_program(source, seconds=LONG, memory=150 << 20).reason == "MemoryError"


@pytest.mark.parametrize(
    "source",
    [
        "open('x', 'wb').write(bytes(17 << 20))",
        "for i in range(9): open(str(i), 'wb').write(bytes(4 << 20))",
        "for i in range(10_000): open(str(i), 'w').close()",
        "x = [open('x', 'w') for _ in range(1000)]",
        "import os\nos.mknod('x', 0o060666, 0xFE00)",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
        "import threading, time\n"
        "for _ in range(5000): threading.Thread(target=time.sleep, args=[50], daemon=True).start()",
    ],
)
def test_files_stacks_and_threads_are_limited(source: str) -> None:
    assert not run_program(source, seconds=LONG, memory=128 << 20).passed


def test_a_flood_of_output_goes_nowhere() -> None:
    source = "import os\nx = b'a' * (1 << 20)\nfor _ in range(2000):\n    os.write(1, x)\n"
    assert run(source).passed
    flood = EVERYWHERE + "while True: tell(b'passed' * 10_000)"  # blocks at the pipe's size
    assert run(flood, 0.5) == Verdict(False, "timed out after 0.5 s")


def test_there_are_no_other_processes() -> None:
    for start in (
        "os.fork()",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
        "os.execv('/bin/sh', ['sh'])",
    ):
        verdict = run(f"import os\nwhile True: {start}")
        assert not verdict.passed
        assert verdict.reason.startswith(("PermissionError", "FileNotFoundError"))
    assert not run("import subprocess, sys; subprocess.Popen([sys.executable])").passed
    assert not run("import multiprocessing as m; m.Process(target=print).start()").passed


# programs that reach for the machine


def test_files_of_the_machine_cannot_be_read() -> None:
    mine = [__file__, sandbox.__file__, "/etc/passwd", "/etc/hostname", "/proc/self/environ"]
    mine += [
        str(Path.home()),
        "/home",
        "/proc",
        "/sys",
        "/dev/null",
        "/var",
        "/bin/sh",
        sys.executable,
    ]
    mine += [f"/tmp/../../../..{__file__}", "/dev/fd/0"]
    there = f"import os\nfound = [x for x in {mine!r} if os.path.lexists(x)]\n"
    # Python's own library may be in the home folder, which is then empty but for it
    library = Path(os.__file__)
    allowed = [x for x in mine if Path(x) in library.parents]
    assert run(there + f"assert found == {allowed!r}, found") == Verdict(True, "passed")
    for folder in allowed:
        expected = library.relative_to(folder).parts[0]
        assert run(f"import os\nassert os.listdir({folder!r}) == [{expected!r}]").passed


def test_nothing_of_the_machine_can_be_written(tmp_path: Path) -> None:
    marker = f"kvant-{os.getpid()}"
    assert run(f"open('/tmp/{marker}', 'w').close()").passed, "a folder of its own"
    assert not Path("/tmp", marker).exists()
    assert run(f"import os\nassert not os.path.exists('/tmp/{marker}')").passed, "and a new one"
    source = (
        "import os, stat\nfor folder, folders, files in os.walk('/'):\n"
        "    if folder != '/tmp':\n        try:\n"
        "            open(folder + '/x', 'w').close()\n        except OSError:\n"
        "            continue\n        raise Exception(folder)\n"
    )
    assert run(source) == Verdict(True, "passed")
    assert not run(f"open({str(tmp_path / 'x')!r}, 'w')").passed
    assert not run(f"open({os.__file__!r}, 'a')").passed
    assert not list(tmp_path.iterdir())


def test_environment_user_and_arguments_say_nothing() -> None:
    source = (
        "import os, sys\nassert not os.environ and not os.environb\n"
        "assert (os.getuid(), os.getgid(), os.getpid(), os.getppid()) == (65534, 65534, 1, 0)\n"
        "assert not set(os.getgroups()) - {65534}\nassert os.getcwd() == '/tmp'\n"
        "assert not [x for x in sys.path if 'site-packages' in x]"
    )
    assert run(source) == Verdict(True, "passed")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_there_is_no_network(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    for source in (
        f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).bind(('', 0))",
        "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0x')",
        "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}', timeout=5)",
    ):
        verdict = run(source)
        assert not verdict.passed
        assert "Operation not permitted" in verdict.reason
    listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        listener.accept()


def test_other_processes_cannot_be_signalled() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        source = (
            "import os, signal\nsignal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
            f"for process in ({os.getpid()}, {os.getppid()}, 0, -1):\n    try:\n"
            "        os.kill(process, signal.SIGUSR1)\n    except OSError:\n        pass\n"
        )
        run(source)
        assert "No such process" in run(f"import os\nos.kill({os.getpid()}, 9)").reason
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not received


REFUSED_CALLS = {
    "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "setns": (308, 0, 0),
    "unshare": (272, 0x10000000),
    "unshare(nothing)": (272, 0),
    "fork": (57,),
    "clone": (56, 17, 0, 0, 0, 0),
    "clone3": (435, 0, 0),
    "fork of x32": (0x40000000 + 57,),
    "socket": (41, 2, 1, 0),
    "mount": (165, 0, 0, 0, 0, 0),
    "umount2": (166, 0, 2),
    "chroot": (161, 0),
    "bpf": (321, 0, 0, 0),
    "io_uring_setup": (425, 1, 0),
    "perf_event_open": (298, 0, 0, 0, 0, 0),
    "keyctl": (250, 0, 0),
    "shmget": (29, 0, 1 << 30, 0o1600),
    "setsid": (112,),
    "open_by_handle_at": (304, 0, 0, 0),
    "prctl(PR_SET_PDEATHSIG)": (157, 1, 0, 0, 0, 0),
    "pidfd_open": (434, 1, 0),
    "setuid(0)": (105, 0),
    "setgroups": (116, 0, 0),
    "reboot": (169, 0, 0, 0, 0),
    "sethostname": (170, 0, 0),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
def test_system_calls_are_refused() -> None:
    source = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nthrough = []\n"
        f"for name, call in {REFUSED_CALLS!r}.items():\n"
        "    done = libc.syscall(*map(ctypes.c_ulong, call))\n"
        "    if done != -1 or ctypes.get_errno() not in (1, 38):\n"
        "        through.append((name, done, ctypes.get_errno()))\n"
        "assert not through, through"
    )
    assert run(source) == Verdict(True, "passed")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_system_calls_of_another_processor_kill() -> None:
    source = (  # mov eax, 20 (getpid of i386); int 0x80; ret
        "import ctypes, mmap\ncode = mmap.mmap(-1, 4096, prot=7)\n"
        "code.write(bytes.fromhex('b814000000cd80c3'))\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(code))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(at)()"
    )
    assert run(source) == Verdict(False, "killed: SIGSYS")


# machines that are not as simple


WITHOUT = ("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
"""Starts a program that can make namespaces only within a user namespace."""


def elsewhere(code: str, *through: str) -> str:
    """What ``code`` printed that ran in a process started through the commands ``through``."""
    if shutil.which(through[0]) is None:
        pytest.skip(f"needs {through[0]}")
    if reason := refusal(*through):
        pytest.skip(reason)
    command = [*through, sys.executable, "-c", f"from kvant.eval.tasks.sandbox import *\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LONG)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a capability up")
def test_a_user_namespace_will_do() -> None:
    printed = elsewhere(
        "check_sandbox()\n"
        "print(run_program('import os; os.kill(0, 9)'), run_program('open(\"/etc/passwd\")'))\n"
        "print(run_program('assert 1'))",
        *WITHOUT,
    )
    assert "No such file or directory: '/etc/passwd'" in printed
    assert printed.splitlines()[-1] == "Verdict(passed=True, reason='passed')"


MOUNTED = Path(os.__file__).with_name("wsgiref")
"""A folder of Python's library that nothing here needs."""
MOUNT = (
    'mount -n -t tmpfs -o mode=777 none "$0" && touch "$0/handlers.py" && '
    'mount -n --bind "$1" "$0/handlers.py" && shift && exec "$@"'
)
SEALED = f"""
import os
for path in ("{MOUNTED}/handlers.py", "{MOUNTED}/new"):
    try:
        open(path, "a").close()
    except OSError:
        continue
    raise Exception(path)
for path in ("{MOUNTED}/handlers.py", "{MOUNTED}"):
    assert os.statvfs(path).f_flag & 7 == os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV, path
from wsgiref import handlers
assert hasattr(handlers, "mounted") is %s
"""


UIDS = Path("/proc/self/uid_map")
ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or (UIDS.is_file() and UIDS.read_text().split() != ["0", "0", "4294967295"]),
    reason="needs root outside any user namespace",
)
OWN = ("unshare", "--mount")


def where_more_is_mounted(file: Path, *own: str) -> list[str]:
    """Commands that start a program where a folder and a file to which anybody may write are
    mounted below the libraries.
    """
    file.write_text("mounted = True")
    file.chmod(0o666)
    return [*own, "sh", "-c", MOUNT, str(MOUNTED), str(file)]


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(OWN, marks=ROOT, id="CAP_SYS_ADMIN"),
        pytest.param((*OWN, "--user", "--map-root-user"), id="a user namespace"),
    ],
)
def test_what_is_mounted_below_the_libraries_is_sealed(
    own: tuple[str, ...], tmp_path: Path
) -> None:
    there = where_more_is_mounted(tmp_path / "file", *own)
    printed = elsewhere(f"print(run_program({SEALED % True!r}, seconds={LONG}).reason)", *there)
    assert printed == "passed\n"


@ROOT
def test_linux_before_5_12_leaves_it_out(tmp_path: Path) -> None:
    number, jail = '"mount_setattr": (442, 442)', tmp_path / "jail.py"
    text = sandbox._JAIL.read_text()
    assert number in text
    jail.write_text(text.replace(number, '"mount_setattr": (4000, 4000)'))
    printed = elsewhere(
        "from pathlib import Path\nfrom kvant.eval.tasks import sandbox\n"
        f"sandbox._JAIL = Path({str(jail)!r})\n"
        f"print(run_program({SEALED % False!r}, seconds={LONG}).reason)",
        *where_more_is_mounted(tmp_path / "file", *OWN),
    )
    assert printed == "passed\n"


# many programs


def test_verdicts_are_in_the_order_of_the_programs() -> None:
    sources = [f"import time; time.sleep({0.3 - i / 20})\nassert {i % 2}, {i}" for i in range(6)]
    found = run_programs(sources, workers=3, seconds=LONG)
    expected = [
        Verdict(bool(i % 2), "passed" if i % 2 else f"AssertionError: {i}") for i in range(6)
    ]
    assert found == expected
    assert run_programs([]) == []


def _descendants(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_programs_end_with_who_started_them(end: signal.Signals) -> None:
    code = (
        "from kvant.eval.tasks.sandbox import run_programs\n"
        "source = 'import signal; signal.signal(15, signal.SIG_IGN)\\nwhile True: signal.pause()'\n"
        "run_programs([source] * 6, workers=3, seconds=600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        # A test run in the background of a script has SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until = time.monotonic() + LONG
            while len(_descendants(process.pid)) < 6:  # a supervisor and a program each
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
            started = _descendants(process.pid)
            process.send_signal(end)
            process.communicate(timeout=LONG)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(started, timeout=LONG)
    assert not alive


def test_an_exception_ends_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, first = sandbox._judge, threading.Event()

    def fail(*arguments: Any) -> Verdict:
        if first.is_set():
            return judge(*arguments)
        first.set()
        raise OSError("a fault of ours")

    monkeypatch.setattr(sandbox, "_judge", fail)
    before = time.monotonic()
    with pytest.raises(OSError, match="a fault of ours"):
        run_programs(["", *["import time; time.sleep(500)"] * 4], workers=2, seconds=500)
    assert time.monotonic() - before < 250, "the others were not waited for"


# the data set that this is for


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    if not HUMANEVAL.is_file():
        pytest.skip(f"needs HumanEval as {HUMANEVAL.name} in shared/data/humaneval")
    with gzip.open(HUMANEVAL, "rt") as lines:
        return [json.loads(line) for line in lines]


def program(problem: dict[str, str], body: str) -> str:
    check = f"check({problem['entry_point']})"
    return f"{problem['prompt']}{body}\n{problem['test']}\n{check}"


def test_humanevals_solutions_pass(problems: list[dict[str, str]]) -> None:
    sources = [program(each, each["canonical_solution"]) for each in problems]
    verdicts = run_programs(sources, seconds=LONG)
    assert len(verdicts) == 164
    assert {verdict.reason for verdict in verdicts} == {"passed"}


def test_wrong_bodies_pass_none_of_humaneval(problems: list[dict[str, str]]) -> None:
    verdicts = run_programs([program(each, "    return None\n") for each in problems], seconds=LONG)
    assert not [
        x["task_id"] for x, verdict in zip(problems, verdicts, strict=True) if verdict.passed
    ]
