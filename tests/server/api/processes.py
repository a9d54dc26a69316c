"""`qiusuo serve` as somebody starts it: a process of its own on a free port."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

PATIENCE = 90.0


class ServerProcess:
    """Serves the model in ``folder`` as "talker"; ``with`` it."""

    def __init__(self, folder: Path, database: Path, *words: str) -> None:
        command = [sys.executable, "-m", "qiusuo", "serve", str(folder), "--name", "talker"]
        command += ["--port", "0", "--database", str(database), "--cache-gb", "0.02", *words]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=database.parent,
        )
        self.said = ""
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.said += line
                self._heard.notify_all()
        with self._heard:
            self.said += "(the end)"
            self._heard.notify_all()

    def __enter__(self) -> "ServerProcess":
        try:
            with self._heard:
                known = self._heard.wait_for(lambda: self.address or "(the end)" in self.said, 60)
            assert known and self.address, self.said  # noqa: PT018
            self._wait_for_model()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str | None:
        found = re.search(r"http://localhost:\d+", self.said)
        return found[0] if found else None

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(PATIENCE)

    def _wait_for_model(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                if "talker" in httpx.get(f"{self.address}/health").json().get("models", []):
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.said
            time.sleep(0.05)
        raise AssertionError(f"no model after {PATIENCE} s: {self.said}")
