"""Trainings started from the page: processes of their own, which outlive the server.

`qiusuo train` is started as anyone would type it, in a session of its own. Nothing is kept about it
but its run folder: whether it lives, and which process it is, the folder's lock says, to this
server and to the next one. What it is told comes from the web, so names are plain, recipes are
those of the package or of the recipes folder, and no key of a recipe may name a file.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from qiusuo.runs.durable import RunError
from qiusuo.runs.folder import default_run_path
from qiusuo.runs.lock import RunLock, writer_of
from qiusuo.runs.toml import dump_toml
from qiusuo.server.api.errors import ApiError
from qiusuo.server.page.runs import Runs, console_of, is_plain, tail

MOST_TRAININGS = 4  # at a time: each wants the whole machine
PATIENCE = 60.0  # seconds for a new process to make its run folder, or to say why not
LOOK_SECONDS = 0.05
KEY = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*", re.ASCII)
NAMES_A_FILE = {"path", "source", "corpora"}  # keys that are for those who may read any file here

Setting = bool | int | float | str | list[bool | int | float | str]


class Trainings:
    """Belongs to one event loop. ``recipes``: the folder of the firm's own recipes; ``device``:
    where to compute."""

    def __init__(self, runs: Runs, recipes: Path, device: str = "cpu") -> None:
        self.runs, self._folder, self._device = runs, recipes, device
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._order = asyncio.Lock()

    def recipes(self) -> list[dict[str, Any]]:
        """Those that can be started: name, description, and planned minutes (None: by steps)."""
        told = []
        for name, path in sorted(self._recipes().items()):
            with suppress(OSError, ValueError):
                recipe = tomllib.loads(path.read_text(encoding="utf-8"))
                stages = [stage for stage in recipe.get("stages", []) if isinstance(stage, dict)]
                told.append(
                    {
                        "name": name,
                        "description": str(recipe.get("description", "")),
                        "minutes": _minutes(stages),
                        "steps": [stage.get("steps") for stage in stages],
                    }
                )
        return told

    async def start(
        self, recipe: str, changes: Mapping[str, Setting], name: str | None = None
    ) -> str:
        """Begin a run; its name. ApiError 400 with the words of the training where it refuses, 404
        for an unknown recipe, 409 where the name is taken or too many train."""
        words = self._words(recipe, changes)
        async with self._order:
            self._refuse_too_many()
            path = self._new_path(recipe, name)
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            # A run folder is made where there is nothing; what is printed until then stands beside.
            console = path.with_name(f".{path.name}.console.txt")
            console.unlink(missing_ok=True)
            child = await self._spawn([*words, "--run", str(path)], console, path.name)
            await self._wait(child, console, (path / "recipe.toml").is_file)
            with suppress(OSError):
                console.rename(console_of(path))
        return path.name

    async def resume(self, name: str) -> None:
        """Go on with a run. ApiError 409 where it trains or is finished, and as ``start``."""
        path = self.runs.path(name)
        async with self._order:
            state = (await asyncio.to_thread(self.runs.summary, name))["state"]
            if self.process_of(name) is not None:
                raise ApiError(409, f"{name} is being trained already")
            if state == "finished":
                raise ApiError(409, f"{name} is finished: there is nothing left to train")
            self._refuse_too_many()
            words = ["train", "--resume", "--run", str(path)]
            child = await self._spawn(words, console_of(path), name)
            await self._wait(child, console_of(path), lambda: writer_of(path) == child.pid)

    def stop(self, name: str) -> None:
        """Ask a training to save and end: a Ctrl-C. ApiError 409 where none is under way."""
        process = self.process_of(name)
        if process is None:
            raise ApiError(409, f"{name} is not being trained")
        try:
            os.kill(process, signal.SIGINT)
        except PermissionError as error:
            raise ApiError(403, f"process {process} belongs to another user") from error
        except ProcessLookupError:  # it has just ended
            return

    def process_of(self, name: str) -> int | None:
        """The process that trains a run, whoever started it."""
        path = self.runs.path(name)
        try:
            RunLock(path).release()
        except RunError:  # somebody holds it, and wrote there who
            return writer_of(path)
        child = self._children.get(name)  # it may not have come to its lock yet
        return child.pid if child is not None and child.poll() is None else None

    # -- what comes from the web ------------------------------------------------------------

    def _recipes(self) -> dict[str, Path]:
        built_in = Path(str(files("qiusuo") / "recipes"))
        found = {path.stem: path for path in self._folder.glob("*.toml") if path.is_file()}
        return found | {path.stem: path for path in built_in.glob("*.toml")}

    def _words(self, recipe: str, changes: Mapping[str, Setting]) -> list[str]:
        """The command. A built-in recipe goes by its name."""
        known = self._recipes()
        if recipe not in known:
            names = ", ".join(sorted(known))
            raise ApiError(404, f"there is no recipe {recipe[:80]!r}; there are: {names}")
        own = known[recipe].parent == self._folder
        words = ["train", str(known[recipe]) if own else recipe]
        for key, value in changes.items():
            words += ["--set", _setting(key, value)]
        return words

    def _new_path(self, recipe: str, name: str | None) -> Path:
        if name is None:
            return default_run_path(recipe, self.runs.root)
        if not is_plain(name):
            raise ApiError(400, f"{name[:80]!r} cannot name a run: give a word without slashes")
        path = self.runs.root / name
        if path.exists():
            raise ApiError(409, f"there is a run {name} already: give another name")
        return path

    # -- processes --------------------------------------------------------------------------

    def _refuse_too_many(self) -> None:
        living = sum(child.poll() is None for child in self._children.values())
        if living >= MOST_TRAININGS:
            raise ApiError(409, f"{living} trainings are under way: stop one, or wait for it")

    async def _spawn(
        self, words: Sequence[str], console: Path, name: str
    ) -> subprocess.Popen[bytes]:
        child = await asyncio.to_thread(_process, [*words, "--device", self._device], console)
        # A child that ended and that nobody waited for still counts as alive.
        threading.Thread(target=child.wait, name=f"training {name}", daemon=True).start()
        self._children[name] = child
        return child

    @staticmethod
    async def _wait(
        child: subprocess.Popen[bytes], console: Path, begun: Callable[[], bool]
    ) -> None:
        """Until it has begun, or has refused: then ApiError 400 with its own words."""
        until = time.monotonic() + PATIENCE
        while not begun() and time.monotonic() < until:
            if child.poll() is not None:
                if begun():  # and is over already
                    return
                said = tail(console)
                raise ApiError(400, _refusal(said) or f"it ended at once ({child.returncode})")
            await asyncio.sleep(LOOK_SECONDS)


def _process(words: Sequence[str], console: Path) -> subprocess.Popen[bytes]:
    # Waiting threads must not spin: the server's engines compute on the same cores.
    threads = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with console.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "qiusuo", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=threads | os.environ,
            start_new_session=True,  # a Ctrl-C at the server's terminal is not meant for it
        )


def _setting(key: str, value: Setting) -> str:
    """The word after `--set`."""
    if not KEY.fullmatch(key):
        raise ApiError(422, f"set: {key[:80]!r} is not a key of a recipe", param="set")
    if NAMES_A_FILE & set(key.split(".")):
        raise ApiError(
            422,
            f"set: {key} can name a file of this machine, which the page may not: write it into a "
            "recipe in the recipes folder",
            param="set",
        )
    try:
        return f"{key}={dump_toml({'v': value}).removeprefix('v = ').rstrip()}"
    except RunError as error:
        raise ApiError(422, f"set: {key}: {error}", param="set") from error


def _refusal(said: str) -> str:
    """What a command said last: from its own "qiusuo: ..." on, or the last lines."""
    start = said.rfind("\nqiusuo: ") if not said.startswith("qiusuo: ") else -1
    told = said[start + 1 :] if start >= 0 or said.startswith("qiusuo: ") else said[-1000:]
    return told.removeprefix("qiusuo: ").strip()[:2000]


def _minutes(stages: Sequence[Mapping[str, Any]]) -> float | None:
    known = [one for stage in stages if isinstance(one := stage.get("minutes"), int | float)]
    return sum(known) if known and len(known) == len(stages) else None
