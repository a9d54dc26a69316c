"""A server with tiny models that know a few conversations by heart, for a browser to visit.

    python -m tests.server.page.chat_server FOLDER PORT WEIGHTS SECONDS

is one that can be killed. Everything in it is real: tokens are drawn by the engine, thoughts and
calls parsed from the model's own marks. Only, each pass of the model takes SECONDS longer, for what
is to be seen while it writes.
"""

import fcntl
import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import qiusuo
from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import EOS_TOKEN
from qiusuo.engine.limits import Limits
from qiusuo.server.house import House
from qiusuo.server.serving import Server
from qiusuo.server.settings import Settings
from tests.model.shapes import tiny_model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How the weather is",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
SKY = "Why is the sky blue?"
SKY_THOUGHT = (
    "The question is about **Rayleigh scattering**. Light from the sun holds all colours, and air "
    "is made of molecules much smaller than a wavelength.\n\nScattering grows as "
    "$\\lambda^{-4}$, so blue at 450 nm is scattered $(700/450)^4 \\approx 5.9$ times as much as "
    "red. Violet would be scattered even more, but the sun sends less of it and our eyes see it "
    "poorly. I should give the formula, a small program and a table, and keep it short."
)
SKY_ANSWER = r"""## Because air scatters blue most

Sunlight holds **all colours**. Molecules of air, far smaller than a wavelength, scatter it as

\[
I(\lambda) \;\propto\; \frac{1}{\lambda^4}\left(1 + \cos^2\theta\right)
\]

so blue ($\lambda \approx 450$ nm) is scattered \(5.9\) times as much as red:

| colour | wavelength | scattered |
| --- | --- | --- |
| red | 700 nm | 1.0 |
| green | 550 nm | 2.6 |
| blue | 450 nm | 5.9 |

```python
def scattered(nm: float) -> float:
    # relative to red light
    return (700 / nm) ** 4

print(f"{scattered(450):.1f}")
```

1. At noon the path through the air is short, and *the rest* looks white.
2. At sunset it is long: what is left is `red`.

> It costs $5 and not $10 to try this with milk in water."""
CHINESE = "求索是什么意思？"
CHINESE_THOUGHT = "这句话出自屈原的《离骚》。我应当引用原文，再解释两个字。"
CHINESE_ANSWER = (
    "“求索”出自屈原《离骚》：\n\n> 路漫漫其修远兮，吾将上下而求索。\n\n"
    "- **求**：寻求。\n- **索**：探寻。\n\n合起来，就是*不断探寻真理*。"
)
EVIL = "Attack"
EVIL_ANSWER = (
    "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>\n\n"
    "[a link](javascript:document.title='hacked') ![a picture](http://127.0.0.1:9/spy.png)\n\n"
    "<b onclick=alert(1)>bold</b> https://example.org"
)
PARIS = "Weather in Paris?"
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
OPENING = "Once upon a time"
STORY = " there was a road. It was long, and whoever walked it asked questions."


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


PARIS_ASKED = [_user(PARIS)]
PARIS_TOLD = [
    *PARIS_ASKED,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I must look.",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]
# messages, options of the template, what the model says
TURNS: tuple[tuple[list[dict], dict, str], ...] = (
    ([_user(SKY)], {"thinking": True}, f"{SKY_THOUGHT}</think>{SKY_ANSWER}"),
    ([_user(SKY)], {}, SKY_ANSWER),
    ([_user(CHINESE)], {"thinking": True}, f"{CHINESE_THOUGHT}</think>{CHINESE_ANSWER}"),
    ([_user("Hello")], {}, "Good day, friend!"),
    ([_user("Hello there")], {}, "Good day to you too!"),
    ([_user(EVIL)], {}, EVIL_ANSWER),
    (PARIS_ASKED, {"thinking": True, "tools": [WEATHER]}, "I must look.</think>" + CALL),
    (PARIS_TOLD, {"thinking": True, "tools": [WEATHER]}, "Now I know.</think>It is sunny."),
)


@functools.cache
def tokenizer() -> Tokenizer:
    marks = dict(bos_token="", eos_token="")
    prompts = [render_chat(default_template(), one, **marks, **more) for one, more, _ in TURNS]
    answers = [answer for _, _, answer in TURNS]
    return Tokenizer.train_bpe([*prompts, *answers, OPENING + STORY] * 2, 900)


def _model() -> nn.Module:
    tokens = tokenizer()
    return tiny_model(
        vocab_size=tokens.vocab_size,
        eos_token_id=tokens.eos_id,
        max_position_embeddings=2048,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        first_k_dense_replace=2,
        initializer_range=0.05,
    )


def learn() -> dict[str, torch.Tensor]:
    """Weights that know all of the above by heart."""
    tokens, examples = tokenizer(), []
    for messages, options, answer in TURNS:
        prompt = tokens.apply_chat_template(messages, **options)
        examples.append((prompt, tokens.encode(answer + EOS_TOKEN, allow_special=True)))
    start = tokens.text_start + tokens.encode(OPENING)
    examples.append((start, tokens.encode(STORY + EOS_TOKEN, allow_special=True)))
    model, steps = _model().train(), 120
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    rise = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps, pct_start=0.1)
    answered = sum(len(answer) for _, answer in examples)
    for _ in range(steps):
        loss, exact = 0.0, True
        for prompt, answer in examples:
            ids = torch.tensor(prompt + answer)
            logits_TW = model.logits(model(ids[None, :-1]).x_BTD[0, len(prompt) - 1 :])
            part = nn.functional.cross_entropy(logits_TW, ids[len(prompt) :], reduction="sum")
            (part / answered).backward()
            loss += part.item() / answered
            exact &= bool((logits_TW.argmax(-1) == ids[len(prompt) :]).all())
        if exact and loss < 0.05:  # the likeliest token is always the right one
            return {name: tensor.detach() for name, tensor in model.state_dict().items()}
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rise.step()
    raise AssertionError(f"the tiny model did not learn its lines: a loss of {loss}")


@dataclass
class Pace:
    """How many seconds each pass of the model takes longer than it must; may change meanwhile."""

    seconds: float = 0.0

    @contextmanager
    def of(self, seconds: float) -> Iterator[None]:
        before, self.seconds = self.seconds, seconds
        try:
            yield
        finally:
            self.seconds = before


def learnt(folder: Path) -> Path:
    """The file of weights in this folder; whoever comes first learns, the others wait for it."""
    weights = folder / "talker.pt"
    with (folder / "talker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not weights.is_file():
            half = weights.with_suffix(".half")
            torch.save(learn(), half)
            half.replace(weights)
    return weights


def talker(weights: Path, pace: Pace) -> qiusuo.LanguageModel:
    model = _model()
    model.load_state_dict(torch.load(weights))
    model.register_forward_pre_hook(lambda *_: time.sleep(pace.seconds))
    limits = Limits(cache_bytes=16 << 20, page_tokens=4)
    return qiusuo.LanguageModel(model.eval(), tokenizer(), limits)


def settings_in(folder: Path, port: int = 0) -> Settings:
    return Settings(
        port=port, database=folder / "server.sqlite3", runs=folder / "runs", drain_seconds=1
    )


def furnish(house: House, weights: Path, pace: Pace) -> None:
    served = house.registry.adopt("talker", talker(weights, pace))
    # The same model, as one without a template would be served.
    teller = replace(served, name="teller", kind="text", thinks=False, tools=None)
    house.registry.models["teller"] = teller


def main(folder: str, port: str, weights: str, seconds: str) -> None:
    import asyncio

    async def run() -> None:
        house = House.open(settings_in(Path(folder), int(port)))
        furnish(house, Path(weights), Pace(float(seconds)))
        await Server(house).serve()

    asyncio.run(run())


if __name__ == "__main__":
    main(*sys.argv[1:])
