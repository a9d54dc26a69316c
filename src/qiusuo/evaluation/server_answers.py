"""The same problems to any OpenAI-compatible server, by its chat completions.

One request a sample, several at a time: not every server knows ``n``. Thought and answer come apart
(``reasoning_content``, or ``reasoning``, and ``content``) and are put together again; a server that
leaves the marks in the content is read as it is.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qiusuo.evaluation.answers import Answered, EvaluationError, Reply, draw_seed
from qiusuo.evaluation.asking import Ask, text_of
from qiusuo.tasks.task import END_THINK, THINK, Problem, response_of

if TYPE_CHECKING:
    import httpx

AT_ONCE = 8
TRIES = 6
FIRST_PAUSE = 1.0  # seconds before the second try; doubled for each further one
LONGEST_PAUSE = 60.0
PATIENCE = 600.0  # seconds for one answer
WORTH_A_RETRY = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
MOST_TOLD = 300  # characters of a server's own words in an error


class ServerAnswerer:
    """``url``: as OpenAI's clients take it (``http://localhost:8000/v1``); without a path, /v1 is
    added. ``model``: its name there; None takes the only one the server lists. ``thinking``:
    DeepSeek's field, None leaves it out, as other servers may refuse what they do not know.

    EvaluationError at once for an address that is none, a server that is not there, a wrong key or
    an unknown model."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        *,
        ask: Ask = "question",
        system: str | None = None,
        thinking: bool | None = None,
        at_once: int = AT_ONCE,
        tries: int = TRIES,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise EvaluationError("--url needs httpx: pip install 'qiusuo[eval]'") from error
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise EvaluationError(f"{url!r} is no address such as http://localhost:8000/v1")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self.ask, self.system, self.thinking = ask, system, thinking
        self.at_once, self.tries, self.first_pause = at_once, tries, first_pause
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self.client = httpx.Client(headers=headers, timeout=httpx.Timeout(PATIENCE, connect=20))
        self._given_up = threading.Event()
        self.model = self._known_model(model)

    def answers(
        self,
        problems: Sequence[Problem],
        *,
        samples: int,
        temperature: float,
        max_tokens: int,
        seed: int,
        progress: Answered | None = None,
    ) -> list[list[Reply]]:
        sampling = {"temperature": temperature, "max_tokens": max_tokens}
        replies: dict[tuple[int, int], Reply] = {}
        self._given_up.clear()
        pool = ThreadPoolExecutor(self.at_once)
        try:
            asked = {
                pool.submit(
                    self._reply, problem, sampling | {"seed": draw_seed(seed, problem, sample)}
                ): (row, sample)
                for row, problem in enumerate(problems)
                for sample in range(samples)
            }
            for done in as_completed(asked):
                replies[asked[done]] = done.result()
                if progress is not None:
                    progress(1)
        except BaseException:  # nobody waits for the others
            self._given_up.set()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        rows = range(len(problems))
        return [[replies[row, sample] for sample in range(samples)] for row in rows]

    def describe(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "model": self.model,
            "ask": self.ask,
            "thinking": self.thinking,
            "system": self.system,
        }

    def _reply(self, problem: Problem, sampling: dict[str, Any]) -> Reply:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, {"role": "user", "content": text_of(problem, self.ask)}]
        body: dict[str, Any] = {"model": self.model, "messages": messages} | sampling
        if self.thinking is not None:
            body["thinking"] = {"type": "enabled" if self.thinking else "disabled"}
        told = self._asked("POST", "/chat/completions", body)
        try:
            choice = told["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            thought = message.get("reasoning_content") or message.get("reasoning") or ""
            tokens = (told.get("usage") or {}).get("completion_tokens")
            return Reply(_response(thought, content), tokens, choice.get("finish_reason") or "stop")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{self.url} gave no chat completion: {json.dumps(told)[:MOST_TOLD]}"
            ) from error

    def _known_model(self, model: str | None) -> str:
        if model is not None:
            return model
        told = self._asked("GET", "/models")
        entries = told.get("data", []) if isinstance(told, dict) else []
        names = [one["id"] for one in entries if isinstance(one, dict) and "id" in one]
        if len(names) != 1:
            raise EvaluationError(
                f"{self.url} has the models {', '.join(names) or '(none)'}: say which with "
                "--model-name"
            )
        return str(names[0])

    def _asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, after as many tries as it takes and are allowed."""
        import httpx

        for attempt in range(1, self.tries + 1):
            answer, pause = None, self.first_pause * 2 ** (attempt - 1)
            try:
                answer = self.client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if answer.is_success:
                    return self._read(answer)
                trouble = f"{answer.status_code}: {_words(answer)}"
                pause = max(pause, _asked_to_wait(answer))
                if answer.status_code not in WORTH_A_RETRY:
                    break
            if attempt < self.tries and self._given_up.wait(min(pause, LONGEST_PAUSE)):
                break
        hint = ""
        if answer is not None and answer.status_code in (401, 403):
            hint = "; give its key with --key, or in QIUSUO_API_KEY"
        elif answer is None:
            hint = "; is it running there?"
        raise EvaluationError(f"{self.url}{path} failed: {trouble}{hint}")

    def _read(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise EvaluationError(
                f"{self.url} gave no JSON but {answer.text[:MOST_TOLD]!r}: is it the API's "
                "address, which mostly ends in /v1?"
            ) from error


def _response(thought: str, content: str) -> str:
    if not thought and (THINK in content or END_THINK in content):
        return content
    return response_of(thought, content)


def _words(answer: httpx.Response) -> str:
    """The message of an error in OpenAI's form, or the text."""
    try:
        return str(answer.json()["error"]["message"])[:MOST_TOLD]
    except (ValueError, KeyError, TypeError):
        return answer.text[:MOST_TOLD]


def _asked_to_wait(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", 0)))
    except ValueError:  # a date
        return 0.0
