"""A model's program in its cage: real processes, none of which outlives or leaves it."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qiusuo.tasks.sandbox import Limits, SandboxError, run_program
from qiusuo.tasks.task import TaskError


def isolated() -> bool:
    try:
        return run_program("").status == "ok"
    except SandboxError:
        return False


pytestmark = pytest.mark.skipif(not isolated(), reason="no namespaces on this machine")

CAUGHT = "\nexcept {error} as error:\n    print(type(error).__name__)"


def marked(mark: str) -> list[str]:
    """Processes of the machine of this name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if name == mark:
                found.append(entry.name)
    return found


NAMED = "import ctypes\nctypes.CDLL(None).prctl(15, {mark!r}.encode(), 0, 0, 0)\n"  # PR_SET_NAME


def test_a_program_runs_and_reads_its_input():
    ran = run_program("print(sum(map(int, input().split())), '和')", "1 2 39\n")
    assert (ran.status, ran.exit_code, ran.stdout, ran.stderr) == ("ok", 0, "42 和\n", "")


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("1/0", 1, "ZeroDivisionError"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
        ("no python", 1, "SyntaxError"),
        ("\ud800", 1, ""),
        ("\0", 1, ""),
    ],
)
def test_a_program_fails(program, code, said):
    ran = run_program(program)
    assert (ran.status, ran.exit_code) == ("error", code)
    assert said in ran.stderr


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        ("while True: pass", Limits(cpu_seconds=1, seconds=60)),
        ("import time; time.sleep(600)", Limits(seconds=1)),
        ("import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
         "  except OSError: pass\nwhile True: time.sleep(9)", Limits(seconds=1)),
        ("import time\nwhile True: print(1, flush=True); time.sleep(0.01)", Limits(seconds=1)),
    ],
    ids=["busy", "asleep", "deaf", "trickling"],
)  # fmt: skip
def test_time_is_limited(program, limits):
    assert run_program(program, limits=limits).status == "timeout"


def test_output_is_limited():
    limits = Limits(output_bytes=1000)
    for stream in ("stdout", "stderr"):
        ran = run_program(f"import sys\nwhile True: sys.{stream}.write('x' * 999)", limits=limits)
        assert ran.status == "output"
        assert len(getattr(ran, stream)) == 1000


def test_memory_is_limited():
    ran = run_program("try:\n    x = bytearray(1 << 30)" + CAUGHT.format(error="MemoryError"))
    assert ran.stdout == "MemoryError\n"


def test_a_fork_bomb_is_bounded_for_root_too():
    bomb = """
import os
forks = 0
try:
    while True:
        if os.fork() == 0:
            import time
            time.sleep(600)
        forks += 1
except OSError as error:
    print(forks, type(error).__name__)
"""
    ran = run_program(bomb, limits=Limits(processes=6))
    count, error = ran.stdout.split()
    assert int(count) <= 5
    assert error == "BlockingIOError"


@pytest.mark.parametrize("ends", ["", "time.sleep(600)"], ids=["by itself", "killed"])
def test_no_child_outlives_the_program(ends):
    mark = f"qs-{os.getpid() % 10**6}-{len(ends)}"
    program = NAMED.format(mark=mark) + (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.write(1, b'here')\n"
        "        for handle in (0, 1, 2): os.close(handle)\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "time.sleep(0.2)\n" + ends
    )
    ran = run_program(program, limits=Limits(seconds=2))
    assert ran.stdout == "here"
    assert ran.status == ("timeout" if ends else "ok")
    # The kernel ends a namespace before its first process is reported dead.
    assert not marked(mark)


def test_files_are_limited_and_gone():
    program = """
import os, sys
def attempt(path, size=1):
    try:
        with open(path, 'w') as file: file.write('x' * size)
        return 'written'
    except OSError as error:
        return error.strerror
print(os.listdir('.'))
print(attempt('own'), attempt('large', 2 << 20), attempt('/out'), attempt('/program.py'))
print(attempt(os.__file__), attempt('/usr/out'), attempt('/dev/out'), attempt('/dev/null'))
print({attempt(f'f{number}', 1 << 20) for number in range(6)} - {'written'})
"""
    read_only = "Read-only file system"
    assert run_program(program).stdout.splitlines() == [
        "[]",
        f"written File too large {read_only} {read_only}",
        f"{read_only} {read_only} {read_only} written",
        "{'No space left on device'}",
    ]


def test_the_machine_is_out_of_sight(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    tmp_path.chmod(0o755)
    program = f"""
import os
for path in ({str(secret)!r}, '/etc/passwd', '/proc/1/cmdline', '/proc/self/environ', '/sys'):
    print(os.path.exists(path))
print(os.getuid() == 0, os.getppid(), sorted(os.environ))
import sys
print(len(sys.path), 'site' in sys.modules)
"""
    lines = run_program(program).stdout.splitlines()
    assert lines[:5] == ["False"] * 5
    assert lines[5] == "False 1 ['HOME', 'LANG', 'PYTHONHASHSEED']"
    assert lines[6].endswith("False")


def test_there_is_no_network_and_no_way_out():
    program = """
import socket, os, ctypes
for family, address in ((socket.AF_INET, ('127.0.0.1', 9)), (socket.AF_INET, ('1.1.1.1', 53))):
    try:
        socket.socket(family, socket.SOCK_STREAM).connect(address)
        print('connected')
    except OSError as error:
        print(error.strerror)
libc = ctypes.CDLL(None)
print([libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)], libc.setuid(0))
try:
    os.chroot('/work')
except PermissionError as error:
    print(error.strerror)
print(sorted(os.listdir('/')) == sorted(os.listdir('/..')), os.listdir('/dev'))
for handle in range(3, 64):
    try:
        os.fstat(handle)
        print('open', handle)
    except OSError:
        pass
"""
    lines = run_program(program).stdout.splitlines()
    assert lines[0] in ("Network is unreachable", "Connection refused")
    assert lines[1:4] == ["Network is unreachable", "[-1, -1, -1] -1", "Operation not permitted"]
    assert lines[4].startswith("True")
    assert sorted(lines[4][5:].strip("[]").split(", ")) == ["'null'", "'urandom'"]
    assert lines[5:] == []


def test_a_program_gives_the_same_again():
    program = "print(set('reproducible'), hash('a'))"
    assert run_program(program).stdout == run_program(program).stdout != ""


def test_threads_run_programs_at_once():
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(run_program, [f"print({number})" for number in range(8)]))
    assert [ran.stdout for ran in runs] == [f"{number}\n" for number in range(8)]


def test_what_is_too_large_is_refused():
    with pytest.raises(TaskError, match="1 MiB"):
        run_program("#" * (2 << 20))
    with pytest.raises(TaskError, match="64 KiB"):
        run_program("", "x" * 70_000)


def test_where_there_are_no_namespaces_nothing_runs(monkeypatch, tmp_path):
    launcher = Path(sys.modules["qiusuo.tasks.sandbox"].LAUNCHER).read_text(encoding="utf-8")
    poor = tmp_path / "launcher.py"
    poor.write_text(launcher.replace('call("unshare", ', 'call("unshare", 1 | '), encoding="utf-8")
    monkeypatch.setattr("qiusuo.tasks.sandbox.LAUNCHER", poor)
    with pytest.raises(SandboxError, match=r"no sandbox .*Invalid argument.*as root or where user"):
        run_program("print(1)")
