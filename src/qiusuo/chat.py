"""`qiusuo chat`: a conversation in the terminal, streamed, with thoughts dimmed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from qiusuo.engine.language_model import LanguageModel, Message
from qiusuo.engine.text_stream import Part

HELP = """/new     begin a new conversation
/system  set what the model is told first: /system You answer in French.
/undo    take back the last question and its answer
/exit    leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Conversation:
    """The turns so far, and how the model is asked: ``options`` of ``LanguageModel.chat``."""

    model: LanguageModel
    options: dict[str, Any]
    console: Console = field(default_factory=lambda: Console(highlight=False))
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> bool:
        """Print the answer as it comes; False when it was stopped, which leaves no trace."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*first, *self.turns, {"role": "user", "content": question}]
        started = time.monotonic()
        try:
            answer = self.model.chat(messages, on_text=self._show(), **self.options)
        except KeyboardInterrupt:
            self.console.print("\n[dim](stopped; question and answer are forgotten)[/dim]")
            return False
        self.turns = messages[len(first) :]
        self.turns.append({"role": "assistant", "content": answer.content})
        self._sum_up(answer, time.monotonic() - started)
        return True

    def _show(self) -> Any:
        last: list[Part] = []

        def show(part: Part, text: str) -> None:
            if last and last[-1] is not part:
                self.console.print("\n")
            last.append(part)
            style = "dim" if part is Part.THOUGHT else None
            self.console.print(text, end="", style=style, markup=False, soft_wrap=True)

        return show

    def _sum_up(self, answer: Message, seconds: float) -> None:
        count = len(answer.token_ids)
        cut = ", cut at --max-tokens" if answer.finish_reason == "length" else ""
        self.console.print()
        if self.console.is_terminal:
            rate = f"{count} tokens, {count / seconds:.1f} a second{cut}"
            self.console.print(f"[dim]{rate}[/dim]\n")

    def command(self, line: str) -> bool:
        """Obey a /command; False to leave."""
        word, _, rest = line.partition(" ")
        match word:
            case "/exit" | "/quit":
                return False
            case "/new":
                self.turns = []
            case "/undo":
                self.turns = self.turns[:-2]
            case "/system":
                self.system, self.turns = rest.strip() or None, []
            case _:
                self.console.print(HELP, markup=False)
        return True


def converse(conversation: Conversation) -> None:
    """Ask for questions until the end of the input."""
    if sys.stdin.isatty():
        conversation.console.print("[dim]/help lists the commands; Ctrl-D leaves.[/dim]\n")
    for line in _lines():
        if line.startswith("/"):
            if not conversation.command(line):
                return
        elif line:
            conversation.ask(line)


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    while True:
        try:
            yield input(">>> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
