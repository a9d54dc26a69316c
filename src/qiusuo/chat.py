"""`qiusuo chat`: a conversation in the terminal, streamed, with thoughts dimmed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from qiusuo.checkpoint.open import find_model
from qiusuo.data.errors import DataError
from qiusuo.engine.answer_events import Event, Kind
from qiusuo.engine.language_model import DRAFTS, LanguageModel, Message
from qiusuo.engine.limits import Limits
from qiusuo.engine.request import RequestError
from qiusuo.terminal import without_controls

HELP = """/new          begin a new conversation
/system TEXT  tell the model this first, and begin anew; without TEXT nothing
/undo         take back the last question and its answer
/help         this list
/exit         leave (or Ctrl-D); Ctrl-C stops an answer
"""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@dataclass
class Conversation:
    """The turns so far, and how the model is asked: ``options`` of ``LanguageModel.chat``."""

    model: LanguageModel
    options: dict[str, Any]
    console: Console = field(default_factory=lambda: Console(highlight=False))
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer as it comes. One that is interrupted, or refused with a DataError,
        leaves no trace in the turns."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*first, *self.turns, {"role": "user", "content": question}]
        started = time.monotonic()
        answer = self.model.chat(messages, on_event=self._show(), **self.options)
        self.turns = messages[len(first) :]
        self.turns.append({"role": "assistant", "content": answer.content})
        self._sum_up(answer, time.monotonic() - started)

    def _show(self) -> Callable[[Event], None]:
        """What prints the pieces: as they are into a file or a pipe, where marks tell the thought
        from the answer; on a terminal without control characters, and with the thought dimmed."""
        last = Kind.CONTENT
        styled = self.console.color_system is not None

        def show(event: Event) -> None:
            nonlocal last
            kind, text = event.kind, event.text
            if self.console.is_terminal:
                text = without_controls(text)
            if styled and kind is Kind.THOUGHT:
                text = f"{DIM}{text}{PLAIN}"
            if kind is not last:
                opening, closing = ("", "\n\n") if styled else ("<think>\n", "\n</think>\n\n")
                text = (opening if kind is Kind.THOUGHT else closing) + text
            last = kind
            self.console.file.write(text)
            self.console.file.flush()

        return show

    def _sum_up(self, answer: Message, seconds: float) -> None:
        count = len(answer.token_ids)
        self.console.print()
        if not self.console.is_terminal:
            return
        cut = ""
        if answer.finish_reason == "length":
            asked = count == self.options.get("max_tokens")
            cut = ", cut at --max-tokens" if asked else ", cut where the context ends: /new"
        usage = answer.usage
        thought = f" ({usage.reasoning_tokens} of thought)" if usage.reasoning_tokens else ""
        read = f"; read {usage.prompt_tokens}, of them {usage.cached_tokens} from the cache"
        rate = count / max(seconds, 1e-9)
        self.note(f"{count} tokens{thought}, {rate:.1f} a second{cut}{read}\n")

    def command(self, line: str) -> bool:
        """Obey a /command; False to leave."""
        word, _, rest = line.partition(" ")
        match word:
            case "/exit" | "/quit":
                return False
            case "/new":
                self.turns = []
                self.note("(a new conversation)\n")
            case "/undo":
                self.note("(taken back)\n" if self.turns else "(there is nothing to take back)\n")
                self.turns = self.turns[:-2]
            case "/system":
                self.system, self.turns = rest.strip() or None, []
                self.note("(a new conversation)\n")
            case "/help":
                self.console.print(HELP, markup=False)
            case _:
                self.console.print(f"{word} is no command. There are:\n{HELP}", markup=False)
        return True

    def note(self, text: str) -> None:
        """A word to a person: not part of what a pipe or a file gets."""
        if self.console.is_terminal:
            self.console.print(text, style="dim", markup=False, soft_wrap=True)


def check_draft(draft: str) -> None:
    """CheckpointError for what is neither a way to draft nor a model: before minutes of loading."""
    if draft not in DRAFTS:
        find_model(draft)


def limits_for(cache_gb: float | None, keep_prefixes: Path | None) -> Limits:
    """What the engine may take: 10^9 bytes each. ValueError for what cannot be."""
    if cache_gb is not None and not 0 < cache_gb < math.inf:
        raise ValueError(f"--cache-gb must be a number above 0, not {cache_gb}")
    cache = None if cache_gb is None else round(cache_gb * 1e9)
    return Limits(cache_bytes=cache, prefix_folder=keep_prefixes)


def converse(conversation: Conversation) -> bool:
    """Ask for questions until the end of the input. At a terminal Ctrl-C stops an answer; from a
    pipe it ends the program, as everywhere. False if a question was refused, with the reason on
    stderr."""
    person, answered = sys.stdin.isatty(), True
    if person:
        conversation.note(conversation.model.describe())
        conversation.note("/help lists the commands; Ctrl-D leaves.\n")
    for line in _lines_typed() if person else map(str.strip, sys.stdin):
        if line.startswith("/"):
            if not conversation.command(line):
                break
        elif line:
            try:
                conversation.ask(line)
            except (DataError, RequestError) as error:
                print(f"qiusuo: {without_controls(str(error))}", file=sys.stderr)
                answered = False
            except KeyboardInterrupt:
                if not person:
                    raise
                conversation.note("\n(stopped; question and answer are forgotten)\n")
    return answered


def _lines_typed() -> Iterator[str]:
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
