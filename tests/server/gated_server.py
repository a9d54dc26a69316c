"""`qiusuo serve`, but each pass of the model, and each loading, waits for a byte on stdin.

    python -m tests.server.gated_server DATABASE MODEL... -- KEY=VALUE...

So a test decides how many tokens an answer has, and what happens between two of them; nothing
depends on who is faster. When stdin is closed nothing waits any more. A line on stdout says what
is about to wait: "load" or "pass". The pairs are settings of the server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
from torch import nn

PATIENCE = 90.0  # seconds until a test that hangs fails


class GatedServer:
    """The process, seen from a test; ``with`` it. Models are served by the names of their
    folders."""

    def __init__(self, database: Path, *models: Path, **settings: object) -> None:
        command = [sys.executable, "-m", "tests.server.gated_server", str(database)]
        command += [*map(str, models), "--", *(f"{key}={value}" for key, value in settings.items())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self.database = database
        self.said, self._waits = "", {"load": 0, "pass": 0}
        self._allowed = 0
        self._heard = threading.Condition()
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._gate, self._complaints)
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> GatedServer:
        try:
            self._until(lambda: self.address is not None)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.free()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)

    # -- the gate ---------------------------------------------------------------------------

    def let(self, count: int = 1) -> None:
        """Let so many more go on."""
        assert self.process.stdin is not None
        self._allowed += count
        self.process.stdin.write(b"." * count)

    def at_gate(self) -> None:
        """Wait until something waits for what was not yet allowed."""
        self._until(lambda: self.waiting)

    @property
    def waiting(self) -> bool:
        return sum(self._waits.values()) > self._allowed

    @property
    def passes(self) -> int:
        """Of the model that have begun; the one that waits is none of them."""
        return self._waits["pass"] - self.waiting

    def free(self) -> None:
        """From now on nothing waits."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    # -- what it says -----------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        found = re.search(r"http://localhost:\d+", self.said)
        return found[0] if found else None

    def client(self, secret: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return httpx.Client(base_url=str(self.address), headers=headers, timeout=PATIENCE)

    def _until(self, reached: Any) -> None:
        with self._heard:
            known = self._heard.wait_for(lambda: reached() or "(the end)" in self.said, PATIENCE)
            assert known and reached(), self.said  # noqa: PT018

    def _gate(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self._waits[line.decode().strip()] += 1
                self._heard.notify_all()

    def _complaints(self) -> None:
        assert self.process.stderr is not None
        for line in chain(self.process.stderr, [b"(the end)"]):
            with self._heard:
                self.said += line.decode()
                self._heard.notify_all()


def wait(what: str) -> None:
    os.write(1, f"{what}\n".encode())
    os.read(0, 1)


def main(database: str, *words: str) -> None:
    from qiusuo.engine.limits import Limits
    from qiusuo.engine.loading import load
    from qiusuo.model.transformer import Transformer
    from qiusuo.server.failure import ServerError
    from qiusuo.server.house import House
    from qiusuo.server.serving import serve
    from qiusuo.server.settings import Settings

    def gated_load(*args: Any, **options: Any) -> Any:
        wait("load")
        return load(*args, **options)

    def before_pass(module: nn.Module, *_: Any) -> None:
        if isinstance(module, Transformer):
            wait("pass")

    open_house = House.open
    House.open = lambda settings: open_house(settings, gated_load)  # type: ignore
    nn.modules.module.register_module_forward_pre_hook(before_pass)
    cut = words.index("--")
    models = words[:cut]
    pairs = (pair.partition("=") for pair in words[cut + 1 :])
    changes = {key: json.loads(value) for key, _, value in pairs}
    settings = Settings(
        port=0,
        database=Path(database),
        runs=Path(database).with_name("runs"),
        draft="none",
        limits=Limits(cache_bytes=8 << 20),
        **changes,  # type: ignore[arg-type]
    )
    try:
        serve(settings, models)
    except ServerError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
