"""Tiny models that talk: trained here, in seconds, on a handful of turns until they know them by
heart. So thoughts, answers and calls come out of a real engine that reads real tokens."""

import functools
from dataclasses import dataclass, field

import torch
from torch import nn

import qiusuo
from qiusuo.data.chat_template import default_template, render_chat
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.data.vocabularies import EOS_TOKEN
from qiusuo.engine.limits import Limits
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
CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
TWO_CALLS = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def call(identity: str, city: str) -> dict:
    function = {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'}
    return {"id": identity, "type": "function", "function": function}


def result(identity: str, text: str) -> dict:
    return {"role": "tool", "tool_call_id": identity, "content": text}


@dataclass(frozen=True)
class Turn:
    """A conversation and what the model says to it, in its own marks."""

    messages: list[dict]
    answer: str
    options: dict = field(default_factory=dict)


HELLO = [user("Hello")]
PARIS = [user("Weather in Paris?")]
BOTH = [user("Weather in Paris and Rome?")]
AFTER_PARIS = [
    *PARIS,
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I must look.",
        "tool_calls": [call("1", "Paris")],
    },
    result("1", "sunny"),
]
AFTER_BOTH = [
    *BOTH,
    {"role": "assistant", "content": "", "tool_calls": [call("1", "Paris"), call("2", "Rome")]},
    result("1", "sunny"),
    result("2", "rainy"),
]
TURNS = (
    Turn(HELLO, "Good day, 求索 friend!"),
    Turn(HELLO, "Someone greets me.</think>Good day, 求索 friend!", {"thinking": True}),
    Turn(PARIS, CALL.format('{"city": "Paris"}'), {"tools": [WEATHER]}),
    Turn(PARIS, "I cannot know."),
    Turn(
        PARIS,
        "I must look.</think>Let me see." + CALL.format('{"city": "Paris"}'),
        {"tools": [WEATHER], "thinking": True},
    ),
    Turn(BOTH, TWO_CALLS.format('{"city": "Paris"}', '{"city": "Rome"}'), {"tools": [WEATHER]}),
    Turn(AFTER_PARIS, "It is sunny.", {"tools": [WEATHER]}),
    Turn(AFTER_BOTH, "Sunny and rainy.", {"tools": [WEATHER]}),
)
TEXT = "Once upon a time there was a road. It was long. 路漫漫其修远兮，吾将上下而求索。"
MIDDLE = ("def add(a, b):\n    return ", "\n\nprint(add(1, 2))", "a + b")


@functools.cache
def tokenizer() -> Tokenizer:
    """Learnt from the prompts too, so that these are few tokens."""
    marks = dict(bos_token="", eos_token="")
    prompts = [
        render_chat(default_template(), turn.messages, **marks, **turn.options) for turn in TURNS
    ]
    answers = [turn.answer for turn in TURNS]
    return Tokenizer.train_bpe([*prompts, *answers, TEXT, *MIDDLE], 480)


def _examples(tokens: Tokenizer) -> list[tuple[list[int], int]]:
    """Token ids of prompt and answer, and how many are the prompt."""
    examples = []
    for turn in TURNS:
        prompt = tokens.apply_chat_template(turn.messages, **turn.options)
        answer = tokens.encode(turn.answer + EOS_TOKEN, allow_special=True)
        examples.append((prompt + answer, len(prompt)))
    start = tokens.text_start
    examples.append((start + tokens.encode(TEXT + EOS_TOKEN, allow_special=True), len(start)))
    before, after, middle = MIDDLE
    marked = f"<｜fim▁begin｜>{before}<｜fim▁hole｜>{after}<｜fim▁end｜>"
    prompt = start + tokens.encode(marked, allow_special=True)
    answer = tokens.encode(middle + EOS_TOKEN, allow_special=True)
    return [*examples, (prompt + answer, len(prompt))]


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """Of a model that knows all of the above by heart."""
    examples = _examples(tokenizer())
    model = _model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    longest = max(len(ids) for ids, _ in examples)
    tokens_BT = torch.zeros(len(examples), longest, dtype=torch.long)
    targets_BT = torch.full((len(examples), longest), -100)
    for row, (ids, start) in enumerate(examples):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        targets_BT[row, start - 1 : len(ids) - 1] = torch.tensor(ids[start:])
    wanted = targets_BT >= 0
    for _ in range(400):
        logits_NW = model.logits(model(tokens_BT).x_BTD[wanted])
        loss = nn.functional.cross_entropy(logits_NW, targets_BT[wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    else:
        raise AssertionError(f"the tiny model did not learn its lines: a loss of {loss.item()}")
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _model() -> nn.Module:
    tokens = tokenizer()
    return tiny_model(
        vocab_size=tokens.vocab_size,
        eos_token_id=tokens.eos_id,
        max_position_embeddings=1024,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        first_k_dense_replace=2,
        initializer_range=0.05,
    )


def talker(**limits) -> qiusuo.LanguageModel:
    """Not trained anew; its engine is its own."""
    model = _model()
    model.load_state_dict(weights())
    settings = dict(cache_bytes=8 << 20, page_tokens=4) | limits
    return qiusuo.LanguageModel(model.eval(), tokenizer(), Limits(**settings))
