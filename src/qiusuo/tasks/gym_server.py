"""The side of reasoning-gym: this file runs in the sandbox, where the package is, and answers.

A line of JSON comes in for each question, and one goes out. Items are made here; an answer is
scored in a child of its own, so that what it may do to the scorer ends with it.
"""

import importlib
import json
import os
import resource
import select
import signal
import sys
from functools import lru_cache
from importlib.metadata import version

THREADS = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"  # each thread reserves address space


@lru_cache(maxsize=4096)
def item(game: str, seed: int, level: int) -> tuple:
    """The data set of one item, and that item. Level 0 is as the package has it, others are its
    curriculum's."""
    factory = importlib.import_module("reasoning_gym.factory")
    chosen = {"seed": seed, "size": 1}
    if level:
        curriculum = factory.create_curriculum(game)
        curriculum.set_global_level(level - 1)
        made = factory.DATASETS[game][0](config=curriculum.generate_configuration(chosen))
    else:
        made = factory.create_dataset(game, **chosen)
    return made, made[0]


def score(asked: dict) -> str:
    """`right`, `wrong`, `crash` or `timeout`."""
    made, entry = item(asked["game"], asked["seed"], asked["level"])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        limit = int(asked["seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            paid = made.score_answer(asked["answer"], entry)
            said = "right" if isinstance(paid, int | float) and paid == 1 else "wrong"
        except BaseException:
            said = "crash"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = "timeout"
    if select.select([reader], [], [], asked["seconds"])[0]:
        said = os.read(reader, 100).decode() or "crash"
    os.close(reader)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return said


def reply(asked: dict) -> dict:
    if "answer" in asked:
        return {"said": score(asked)}
    _, entry = item(asked["game"], asked["seed"], asked["level"])
    return {"question": entry["question"], "answer": entry["answer"]}


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the package prints is no reply

    def say(what: dict) -> None:
        print(json.dumps(what), file=out, flush=True)

    os.environ.update(dict.fromkeys(THREADS, "1"))
    sys.path.insert(0, json.loads(sys.stdin.readline())["packages"])
    try:
        importlib.import_module("reasoning_gym")
        say({"version": version("reasoning-gym")})
    except Exception as error:
        say({"fault": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        try:
            say(reply(json.loads(line)))
        except Exception as error:
            say({"fault": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
