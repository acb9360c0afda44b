"""Programs that attack: what they must not do is checked from outside."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.sandbox import landlock, run, syscalls
from megatron_vespo.rewards.sandbox.run import Limits, Outcome, Sandbox

Attack = Callable[..., Outcome]

LIMITS = Limits(
    cpu_seconds=2.0,
    wall_seconds=10.0,
    memory_bytes=300 << 20,
    output_bytes=100_000,
    folder_bytes=1 << 20,
    folder_files=20,
)

LIMITS_AS_SENT = Sandbox(LIMITS)._limits()

pytestmark = pytest.mark.skipif(
    landlock.version() < run.LANDLOCK_NEEDED or not syscalls.supported(), reason="no Landlock or no seccomp here"
)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attack]:
    """Runs a program; afterwards no process and no folder of it is left, and it took no longer than it may."""
    # Others on this machine run programs too.
    monkeypatch.setattr(run, "FOLDER_PREFIX", f"{run.FOLDER_PREFIX}{os.getpid()}-")
    folders, processes = leftovers(), psutil.Process().children(recursive=True)
    begin = time.monotonic()

    def attack(program: str, stdin: str = "", limits: Limits = LIMITS) -> Outcome:
        return Sandbox(limits).run(textwrap.dedent(program), stdin)

    yield attack
    assert time.monotonic() - begin < 25
    assert leftovers() <= folders
    assert set(psutil.Process().children(recursive=True)) <= set(processes)


def leftovers() -> set[Path]:
    return set(Path("/tmp").glob(f"{run.FOLDER_PREFIX}*"))


def denied(outcome: Outcome) -> bool:
    return outcome.status == 1 and outcome.stderr.strip().splitlines()[-1].startswith("PermissionError")


def test_a_program_reads_computes_and_prints(attack: Attack) -> None:
    program = """
        import collections, fractions, heapq, random, re, sys, threading
        numbers = [int(word) for word in sys.stdin.read().split()]
        thread = threading.Thread(target=lambda: print(fractions.Fraction(sum(numbers), 2), "中"))
        thread.start()
        thread.join()
        print("warned", file=sys.stderr)
        """
    outcome = attack(program, "1 2\n4")
    assert (outcome.broken, outcome.status, outcome.stdout, outcome.stderr) == ("", 0, "7/2 中\n", "warned\n")
    assert outcome.succeeded and 0 < outcome.cpu_seconds < 2


def test_its_folder_is_its_own(attack: Attack) -> None:
    program = """
        import os
        print(sorted(os.listdir(".")))
        with open("note", "w") as file:
            file.write("kept")
        os.mkdir("deep")
        os.rename("note", "deep/note")
        print(open("deep/note").read(), open(os.path.join(os.getcwd(), "deep", "note")).read())
        """
    for _ in range(2):
        assert attack(program).stdout == "['program.py']\nkept kept\n"


@pytest.mark.parametrize("status", [0, 1, 3])
def test_its_exit_status_is_told(attack: Attack, status: int) -> None:
    outcome = attack(f"import sys; print('x'); sys.exit({status})")
    assert (outcome.status, outcome.succeeded, outcome.stdout) == (status, status == 0, "x\n")


def test_a_crash_is_told(attack: Attack) -> None:
    assert attack("import ctypes; ctypes.string_at(0)").status == -11


FORKS = {
    "fork bomb": "while True: os.fork()",
    "fork bomb that forgives": """
        while True:
            try:
                os.fork()
            except OSError as error:
                print(error.errno)
                sys.exit(7)
        """,
    "posix_spawn": "os.posix_spawn(sys.executable or '/bin/sh', ['sh'], {})",
    "subprocess": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
    "multiprocessing": "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "daemon": "os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(60)",
    "raw clone": """
        libc = ctypes.CDLL(None, use_errno=True)
        for number in (56, 57, 58, 435):
            assert libc.syscall(number, 17, 0, 0, 0, 0) == -1, number
        raise PermissionError
        """,
}


@pytest.mark.parametrize("name", FORKS)
def test_it_starts_no_processes(attack: Attack, name: str) -> None:
    outcome = attack(f"import ctypes, os, sys, time\n{textwrap.dedent(FORKS[name])}")
    assert outcome.status == 7 if "forgives" in name else denied(outcome), outcome


def test_a_thread_bomb_ends(attack: Attack) -> None:
    program = """
        import threading, time
        threading.stack_size(32768)
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """
    outcome = attack(program)
    assert not outcome.succeeded
    assert outcome.broken == "time" or "can't start new thread" in outcome.stderr or "MemoryError" in outcome.stderr


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import sys; sys.stdin.read(); import signal; signal.pause()",
        "import signal\nfor n in range(1, 32):\n    n in (9, 19) or signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
        "10 ** 10 ** 9",
    ],
)
def test_time_runs_out(attack: Attack, program: str) -> None:
    outcome = attack(program, "never read" * 100_000, Limits(cpu_seconds=1.0, wall_seconds=2.0))
    assert outcome.broken == "time" and not outcome.succeeded


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_huge_output_is_cut(attack: Attack, stream: str) -> None:
    outcome = attack(f"import sys\nwhile True: sys.{stream}.write('x' * 10000)")
    assert outcome.broken == "output"
    assert 100_000 < len(outcome.stdout + outcome.stderr) < 300_000


def test_huge_output_of_a_program_that_is_gone_is_cut_too(attack: Attack) -> None:
    outcome = attack("print('x' * 60000)", limits=Limits(output_bytes=50_000))
    assert outcome.broken == "output" and not outcome.succeeded


@pytest.mark.parametrize(
    "program",
    [
        "block = bytearray(1 << 30)",
        "blocks = []\nwhile True: blocks.append(bytearray(1 << 20))",
        "import mmap; mmap.mmap(-1, 1 << 30)",
        "x = [0] * (1 << 28)",
    ],
)
def test_memory_runs_out(attack: Attack, program: str) -> None:
    outcome = attack(program)
    assert outcome.status == 1 and ("MemoryError" in outcome.stderr or "Cannot allocate" in outcome.stderr)


@pytest.mark.parametrize(
    "program, broken",
    [
        ("file = open('big', 'wb')\nwhile True: file.write(b'x' * 100000); file.flush()", "files"),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'w').write('x' * 100000)\n    i += 1", "files"),
        ("i = 0\nwhile True:\n    open(f'f{i}', 'w')\n    i += 1", "files"),
        ("import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')", "files"),
    ],
)
def test_its_folder_does_not_grow(attack: Attack, program: str, broken: str) -> None:
    outcome = attack(program)
    assert not outcome.succeeded
    # A limit of the kernel may be quicker: EFBIG, ENAMETOOLONG.
    assert outcome.broken == broken or "too large" in outcome.stderr or "too long" in outcome.stderr


SIGNALS = [
    "os.kill(os.getppid(), 9)",
    "os.kill({pid}, 9)",
    "os.kill(-1, 9)",
    "os.killpg({group}, 9)",
    "os.kill({pid}, 0)",
    "signal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
    "resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "os.sched_setaffinity({pid}, [0])",
    "[libc.syscall(234, {pid}, {pid}, 9) == -1 and deny()]",
    "[libc.syscall(200, {pid}, 9) == -1 and deny()]",
    "[libc.ptrace(16, {pid}, 0, 0) == -1 and deny()]",
    "[libc.syscall(310, {pid}, 0, 0, 0, 0, 0) == -1 and deny()]",
]


@pytest.mark.parametrize("act", SIGNALS)
def test_it_reaches_no_other_process(attack: Attack, act: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as victim:
        try:
            head = "import ctypes, os, resource, signal\nlibc = ctypes.CDLL(None)\n"
            head += "def deny(): raise PermissionError\n"
            outcome = attack(head + act.format(pid=victim.pid, group=victim.pid))
            assert denied(outcome) or "ProcessLookupError" in outcome.stderr, outcome
            assert victim.poll() is None
            assert psutil.Process(victim.pid).rlimit(psutil.RLIMIT_CPU)[0] == -1
        finally:
            victim.kill()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that everybody may read and write, in a folder where everybody may write."""
    tmp_path.chmod(0o777)
    path = tmp_path / "secret"
    path.write_text("the label is 42")
    path.chmod(0o666)
    return path


OUTSIDE = [
    "print(open('{path}').read())",
    "print(os.listdir('{folder}'))",
    "open('{path}', 'w')",
    "open('{path}', 'a').write('!')",
    "open('{folder}/new', 'w')",
    "os.mkdir('{folder}/new')",
    "os.remove('{path}')",
    "os.rename('{path}', 'mine')",
    "os.link('{path}', 'mine')",
    "os.truncate('{path}', 0)",
    "os.close(os.open('{path}', os.O_RDONLY | os.O_TRUNC))",
    "os.chmod('{path}', 0)",
    "os.chown('{path}', 1, 1)",
    "os.utime('{path}')",
    "os.setxattr('{path}', 'user.x', b'x')",
    "os.symlink('{path}', 'way'); print(open('way').read())",
    "os.symlink('{folder}', 'way'); open('way/new', 'w')",
    "print(open('../' * 20 + '{path}').read())",
    "print(open('/proc/self/root{path}').read())",
    "print(open('/proc/{pid}/environ', 'rb').read())",
    "print(open('/proc/{pid}/maps').read())",
    "open('/proc/{pid}/mem', 'r+b')",
    "print(open(f'/proc/{{os.getppid()}}/environ', 'rb').read())",
    "print(open('/proc/self/environ', 'rb').read())",
    "print(os.listdir('/proc/{pid}/fd'))",
    "print(open('/etc/passwd').read())",
    "print(os.listdir('/'))",
    "print(os.listdir(os.path.expanduser('~') if os.path.expanduser('~') != '~' else '/home'))",
    "open('/dev/shm/new', 'w')",
    "open('/tmp/new-of-the-sandbox', 'w')",
    "open(sys.prefix + '/new', 'w')",
    "os.execv('/bin/ls', ['ls', '/'])",
    "os.chroot('.')",
    "os.memfd_create('x')",
    "os.mkfifo('x')",
]


@pytest.mark.parametrize("act", OUTSIDE)
def test_it_opens_no_file_but_its_own(attack: Attack, secret: Path, act: str) -> None:
    before = secret.stat()
    filled = act.format(path=secret, folder=secret.parent, pid=os.getpid())
    outcome = attack(f"import os, sys\n{filled}")
    refused = (
        "PermissionError",
        "OSError: [Errno 18]",
        "AttributeError",
        "FileNotFoundError: [Errno 2] No such file or",
    )
    assert outcome.status == 1 and any(error in outcome.stderr for error in refused), outcome
    assert outcome.stdout == ""
    assert secret.read_text() == "the label is 42"
    assert list(secret.parent.iterdir()) == [secret]
    after = secret.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, 1)
    assert not Path("/tmp/new-of-the-sandbox").exists() and not Path("/dev/shm/new").exists()


def test_files_are_held_by_landlock_and_not_by_chance(secret: Path) -> None:
    """The same attacks succeed where the test reaches: otherwise the tests above would prove nothing."""
    assert secret.read_text() and os.access(secret, os.R_OK | os.W_OK)
    program = f"print(open({str(secret)!r}).read())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout


NETWORK = [
    "socket.create_connection(('127.0.0.1', {port}), timeout=2).send(b'x')",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "socket.socket(socket.AF_INET6)",
    "socket.socket(socket.AF_UNIX).connect('{path}')",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "socket.socketpair()[0].connect('{path}')",
    "urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)",
    "socket.create_server(('127.0.0.1', 0))",
]


@pytest.mark.parametrize("act", NETWORK)
def test_it_has_no_network(attack: Attack, tmp_path: Path, act: str) -> None:
    reached: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        for server in (tcp, local):
            server.settimeout(0.1)
        outcome = attack(f"import socket, urllib.request\n{act.format(port=tcp.getsockname()[1], path=tmp_path / 's')}")
        for server in (tcp, local):
            with pytest.raises(TimeoutError):
                reached.append(server.accept())
    assert not reached
    assert outcome.status == 1 and "not permitted" in outcome.stderr, outcome


def test_it_gets_neither_environment_nor_descriptors(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    with Path("/etc/passwd").open() as inherited:
        os.set_inheritable(inherited.fileno(), True)
        program = """
            import os, sys
            open_ones = []
            for number in range(3, 256):
                try:
                    os.fstat(number)
                    open_ones.append(number)
                except OSError:
                    pass
            print(sorted(os.environ), open_ones, sys.argv, sys.flags.no_site)
            """
        assert attack(program).stdout == "['LC_ALL', 'PYTHONHASHSEED'] [] ['program.py'] 1\n"


def test_it_has_no_capabilities_and_gets_none(attack: Attack) -> None:
    program = """
        import ctypes
        libc = ctypes.CDLL(None)
        header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        print(libc.capget(header, data), list(data), libc.prctl(39, 0, 0, 0, 0))
        """
    assert attack(program).stdout == "0 [0, 0, 0, 0, 0, 0] 1\n"


def test_a_second_set_of_system_calls_is_closed_too(attack: Attack) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x86-64 alone has one")
    program = "import ctypes; print(ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0))"
    assert attack(program).stdout == "-1\n"


def test_programs_run_beside_each_other(attack: Attack) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(attack(f"print({n})", limits=Limits()).stdout))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"{n}\n" for n in range(6)]


def test_it_dies_with_whoever_waits_for_it(tmp_path: Path) -> None:
    code = "from megatron_vespo.rewards.sandbox.run import *; print('go', flush=True); "
    code += "Sandbox(Limits(cpu_seconds=50, wall_seconds=60)).run('while True: pass')"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 10
        while len(below := psutil.Process(owner.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        owner.kill()
        _, alive = psutil.wait_procs(below, timeout=10)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


ORPHAN = """
import ctypes, os, sys, time
from megatron_vespo.rewards.sandbox import jail
ctypes.CDLL(None).prctl(36, 1)  # orphans become ours, so that their end can be seen
us = os.getpid()
if os.fork() == 0:
    pipes = [os.pipe() for _ in range(4)]
    if os.fork():
        os._exit(0)
    while os.getppid() != us:
        time.sleep(0.01)
    command = [sys.executable, "-c", ""]
    jail._become_the_program({"rlimits": {}, "landlock": False, "seccomp": False, "command": command}, pipes)
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
"""


def test_it_does_not_begin_when_its_jail_is_gone() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True)
    assert done.stdout == "[0, 70]\n"


def test_a_jail_that_nobody_waits_for_does_not_begin(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-I", "-S", str(run.JAIL)]
    settings = {"program": "", "stdin": "", "become_stranger": False, "landlock": False, "seccomp": False}
    settings |= {"command": [sys.executable, "-c", "open('ran', 'w')"], **LIMITS_AS_SENT}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write, cwd=tmp_path) as jail:
        os.close(write)
        jail.communicate(json.dumps(settings).encode())
    assert jail.returncode == 1 and not (tmp_path / "ran").exists()


def test_the_protection_is_told() -> None:
    line = Sandbox(LIMITS).check()
    assert line.startswith(f"sandbox for programs: Landlock {landlock.version()}, seccomp")


def test_without_a_wall_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 0)
    with pytest.raises(UserError, match=r"missing: files.*Landlock.*without: \[files\]"):
        Sandbox(LIMITS).check()
    assert "not available here: Landlock 0" in Sandbox(LIMITS, without=["files"]).check()
    monkeypatch.setattr(syscalls, "supported", lambda: False)
    with pytest.raises(UserError, match="missing: system calls"):
        Sandbox(LIMITS, without=["files"]).check()


def test_a_wall_that_the_kernel_refuses_stops_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Sandbox, "_limits", lambda self: {**LIMITS_AS_SENT, "rlimits": {"RLIMIT_CPU": 1, "RLIMIT_OF_NOTHING": 1}}
    )
    with pytest.raises(UserError, match="could not hold the program, which did not run"):
        Sandbox(LIMITS).check()


SYSTEM_PYTHON = Path("/usr/bin/python3")


IS_ROOT = os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] == "4294967295"


@pytest.mark.skipif(not IS_ROOT or not SYSTEM_PYTHON.exists(), reason="needs root and a Python that all may read")
def test_as_root_it_is_nobody_where_nobody_may_read_python() -> None:
    outcome = Sandbox(LIMITS, python=str(SYSTEM_PYTHON)).run(
        "import os; print(os.getuid()); open('mine', 'w').write('x')"
    )
    assert outcome.succeeded and int(outcome.stdout) != 0 and "user" in outcome.second_walls, outcome
