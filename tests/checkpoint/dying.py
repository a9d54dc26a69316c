"""A program, not a test: saves a model again and again, dying at every step in turn.

For every point at which a save touches a file, a forked child is killed there by SIGKILL; then
once more in the middle of writing a file. After each death the folder is read back. Prints a JSON
list of what stood there: "old", "new" or what went wrong. Arguments: folder, "exchange" or
"renames" (the way of swapping folders).
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from qiusuo.checkpoint import files
from qiusuo.checkpoint.huggingface import load_huggingface, save_huggingface
from tests.model.shapes import tiny_model

TOUCHES = ("open", "os.", "shutil.")  # audit events of the standard library's file operations


def kill_at(step: int, parent: Path) -> None:
    """Die at the step-th event that concerns something below ``parent``."""
    left = step

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event.startswith(TOUCHES) and any(str(parent) in str(arg) for arg in args):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def cut_files_at(size: int) -> None:
    """Die by SIGXFSZ when a file grows beyond ``size`` bytes: in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(folder: Path, way: str) -> None:
    if way == "renames":
        files._exchange = lambda one, other: False
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    names = {"old": old.state_dict(), "new": new.state_dict()}

    def die(how: object, *args: object) -> int:
        child = os.fork()
        if child == 0:
            how(*args)  # type: ignore[operator]
            save_huggingface(new, folder)
            os._exit(0)
        return os.waitpid(child, 0)[1]

    def standing() -> str:
        try:
            found = load_huggingface(folder).state_dict()
        except Exception as error:
            return repr(error)
        for name, state in names.items():
            if all(torch.equal(found[key], state[key]) for key in state):
                return name
        return "a mixture"

    outcomes, status, step = [], -1, 0
    while status != 0:
        step += 1
        save_huggingface(old, folder)
        status = die(kill_at, step, folder.parent)
        outcomes.append(standing())
    save_huggingface(old, folder)
    cut = os.WTERMSIG(die(cut_files_at, 20_000)) == signal.SIGXFSZ
    report = {"outcomes": outcomes, "cut": cut and standing()}
    save_huggingface(new, folder)
    report["left"] = sorted(path.name for path in folder.parent.iterdir())
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
