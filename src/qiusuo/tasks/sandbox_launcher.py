"""The cage around a model's program: this file is run by itself, and becomes the program.

`sandbox.py` starts it as `python -I -S sandbox_launcher.py SETTINGS`, so that limits are set by a
process with one thread; between fork and exec of a process with threads, Python code can hang.

1. New namespaces: mounts, processes, network, IPC. Without root a user namespace gives the right.
2. A root of its own, in memory: Python, the system's libraries and the folders that are `shown`,
   all read-only, an empty /work to write in, nothing else. The network has no device.
3. A first process of the new process namespace waits for the program. When it dies, by whatever
   hand, the kernel kills all that is left in the namespace: no child escapes.
4. The program: another user, limits set, no way to new rights. Root is not bound by the limit on
   processes; that user is.

A fault in these steps is written to the descriptor `status`; nothing on it means the program runs.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = (
    1,
    2,
    4,
    32,
    4096,
    16384,
    1 << 18,
)
KEPT_FLAGS = NO_SUID | NO_DEVICES | 8  # 8 is "no execution"; a remount may not lose them
DIE_WITH_PARENT, NO_NEW_PRIVILEGES = 1, 38  # of prctl
# For each launcher a user of its own, so that limits on processes are not shared. Nobody has these
# numbers: systemd keeps them for users of the moment.
FIRST_USER, USERS = 61184, 4000
PYTHON = os.path.realpath(sys.executable)  # that of a virtual environment is a link
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A call of the C library; OSError if it fails."""
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: Path, kind: bytes | None, flags: int, options: str = "") -> None:
    call(
        "mount",
        source.encode(),
        bytes(target),
        kind,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )


def enter_namespaces() -> None:
    user, group = os.getuid(), os.getgid()
    flags = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    call("unshare", flags if user == 0 else flags | NEW_USER)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{FIRST_USER} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{FIRST_USER} {group} 1")
    mount("none", Path("/"), None, PRIVATE | RECURSIVE)


def build_root(root: Path, program: bytes, settings: dict) -> None:
    """The file system of the program, at the folder `root`."""
    root.mkdir()
    mount("tmpfs", root, b"tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    shown = ["/usr"] if Path(sys.base_prefix).is_relative_to("/usr") else [sys.base_prefix]
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    shown += [path for path in libraries if not Path(path).is_relative_to(shown[0])]
    for path in [*shown, *settings["shown"], "/dev/null", "/dev/urandom"]:
        if Path(path).exists():
            show(Path(path), root / path[1:])
    (root / "program.py").write_bytes(program)
    (root / "program.py").chmod(0o444)
    work = root / "work"
    work.mkdir()
    size = settings["disk_bytes"]
    mount("tmpfs", work, b"tmpfs", NO_SUID | NO_DEVICES, f"size={size},mode=777,nr_inodes=1k")
    mount("none", root, None, REMOUNT | BIND | READ_ONLY | NO_SUID | NO_DEVICES)


def show(source: Path, target: Path) -> None:
    """Put a folder or a device of the machine into the new root, read-only."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    mount(str(source.resolve()), target, None, BIND | RECURSIVE)
    kept = os.statvfs(target).f_flag & KEPT_FLAGS
    mount("none", target, None, REMOUNT | BIND | READ_ONLY | kept)


def limit(settings: dict) -> None:
    """The limits of the program, and no rights beyond them."""
    if os.getuid() == 0:
        user = FIRST_USER + settings["user"]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    seconds = settings["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    for which, most in (
        (resource.RLIMIT_AS, settings["memory_bytes"]),
        (resource.RLIMIT_NPROC, settings["processes"]),
        (resource.RLIMIT_FSIZE, settings["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))


def become_program(settings: dict) -> None:
    os.setsid()
    limit(settings)
    # -I but for the environment, which is ours: without a seed, sets would differ from run to run.
    flags = ["-P", "-s", "-S", "-B", "-X", "utf8"]
    environment = {"HOME": "/work", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(PYTHON, [PYTHON, *flags, "/program.py"], environment)


def wait_and_leave(child: int) -> None:
    """End as the child ended, a signal as 128 and its number. Orphans are collected meanwhile.
    Told to terminate, kill the child first: who waits for us then knows that nothing is left."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    pid, status = os.wait()
    while pid != child:
        pid, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def run(settings: dict, folder: Path) -> None:
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    settings["user"] = os.getpid() % USERS
    enter_namespaces()
    build_root(folder / "root", (folder / "program.py").read_bytes(), settings)
    os.chroot(folder / "root")
    os.chdir("/work")
    for _ in ("first process", "program"):
        if (child := os.fork()) != 0:
            os.close(settings["status"])
            wait_and_leave(child)
        call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    become_program(settings)


def main() -> None:
    settings = json.loads(sys.argv[1])
    os.set_inheritable(settings["status"], False)
    try:
        run(settings, Path(sys.argv[2]))
    except BaseException as error:
        os.write(settings["status"], f"{type(error).__name__}: {error}".encode()[:1000])
        os._exit(1)


if __name__ == "__main__":
    main()
