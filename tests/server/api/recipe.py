"""DeepSeek's own package as the oracle: what its conversion and its chunks say."""

import json
from dataclasses import dataclass
from typing import Any

import deepseek_recipe as recipe

MODEL = "DeepSeek-V4-Pro"
TOOL_CALLS = "<｜DSML｜tool_calls>\n{}</｜DSML｜tool_calls>"
INVOKE = '<｜DSML｜invoke name="{}">\n{}</｜DSML｜invoke>\n'
PARAMETER = '<｜DSML｜parameter name="{}" string="true">{}</｜DSML｜parameter>\n'


@dataclass
class RefusedError(Exception):
    """``status`` None: a field of a wrong type, to which the package gives no status."""

    status: int | None
    message: str


def converted(body: dict[str, Any]) -> recipe.ConversationRequest:
    options = recipe.ConversionOptions(
        thinking_max_tokens_upper_bound=65_536, non_thinking_max_tokens_upper_bound=65_536
    )
    try:
        return recipe.ChatCompletionRequest(json.dumps(body)).convert(options)
    except recipe.ConversionError as error:
        raise RefusedError(error.status_code, error.body) from None
    except ValueError as error:
        raise RefusedError(None, str(error)) from None


def chunks(
    body: dict[str, Any], pieces: list[str], tokens: list[int], finish: str = "Stop"
) -> list[dict[str, Any]]:
    """What it streams for a model's text in ``pieces``, of so many tokens each."""
    request = converted(body)
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "the-id", "the-model")
    processor = recipe.StreamProcessor(generator, request.parsing_options)
    usage = recipe.PromptUsage(prompt_tokens=20, prompt_cache_hit_tokens=16)
    ready = recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint="fp_0")
    made = processor.push(ready)
    for piece, count in zip(pieces, tokens, strict=True):
        made += processor.push(recipe.InferenceChunk.text(piece, count))
    made += processor.push(
        recipe.InferenceChunk.finish(getattr(recipe.InferenceFinishReason, finish))
    )
    made += processor.finish()
    return [json.loads(chunk.to_json()) for chunk in made]


def accumulated(body: dict[str, Any], pieces: list[str], finish: str = "Stop") -> dict[str, Any]:
    """The same as one response."""
    request = converted(body)
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "the-id", "the-model")
    processor = recipe.StreamProcessor(generator, request.parsing_options)
    usage = recipe.PromptUsage(prompt_tokens=20, prompt_cache_hit_tokens=16)
    ready = recipe.InferenceChunk.ready(prompt_usage=usage, system_fingerprint="fp_0")
    made = processor.push(ready)
    for piece in pieces:
        made += processor.push(recipe.InferenceChunk.text(piece, 1))
    reason = getattr(recipe.InferenceFinishReason, finish)
    made += processor.push(recipe.InferenceChunk.finish(reason))
    made += processor.finish()
    response = recipe.ChatCompletionResponse("the-id", "the-model", 1, 20, 16)
    for chunk in made:
        response.accumulate(chunk)
    return json.loads(response.to_json())
