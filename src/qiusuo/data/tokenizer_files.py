"""A tokenizer as Hugging Face lays it out: tokenizer.json, tokenizer_config.json, a template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qiusuo.data.atomic import write_file
from qiusuo.data.errors import DataError
from qiusuo.data.vocabularies import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN

if TYPE_CHECKING:
    import tokenizers

OURS = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
FIELDS = (*OURS, "add_bos_token", "chat_template", "model_max_length")
"""What a tokenizer has beside its tokenizer.json."""


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The library's tokenizer and the `FIELDS`, from a folder or a tokenizer.json."""
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {path}: expected a tokenizer.json or its folder")
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} is not a tokenizer.json: {error}") from error
    # Saved training settings; they would cut or pad what is encoded here.
    backend.no_truncation()
    backend.no_padding()
    place = file.parent / "tokenizer_config.json"
    config = _read_config(place)
    fields: dict[str, Any] = {name: _named_token(config, name, backend, place) for name in OURS}
    fields["add_bos_token"] = add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise DataError(f"{place}: add_bos_token must be true or false, not {add_bos!r:.80}")
    template = file.parent / "chat_template.jinja"
    fields["chat_template"] = (
        _read_template(template) if template.is_file() else _config_template(config, place)
    )
    length = config.get("model_max_length")
    # Hugging Face writes 10^30 for "no limit".
    limited = isinstance(length, int) and length < 1 << 40
    fields["model_max_length"] = length if limited else None
    return backend, fields


def save_tokenizer(folder: Path, tokenizer_json: str, fields: Mapping[str, Any]) -> None:
    """Write both files; transformers' AutoTokenizer reads them too."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: value for name, value in fields.items() if value is not None or name in OURS},
    }
    write_file(folder / "tokenizer.json", tokenizer_json.encode())
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    write_file(folder / "tokenizer_config.json", text.encode())
    # One left by an earlier tokenizer would go before the template just saved.
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} must hold a JSON object, not {type(config).__name__}")
    return config


def _named_token(
    config: Mapping[str, Any], name: str, backend: tokenizers.Tokenizer, place: Path
) -> str | None:
    """The spelling that the config gives; where it is silent, ours if the vocabulary has it."""
    if name not in config:
        return OURS[name] if backend.token_to_id(OURS[name]) is not None else None
    token = config[name]
    if isinstance(token, dict):  # {"__type": "AddedToken", "content": ...}
        token = token.get("content")
    if not isinstance(token, str | None):
        raise DataError(f"{place}: {name} must be a token's text, not {token!r:.80}")
    if token is not None and backend.token_to_id(token) is None:
        raise DataError(
            f"{place} names {token!r} as its {name}, which tokenizer.json does not "
            "know; the two files belong to different tokenizers"
        )
    return token


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise DataError(f"{file} is not UTF-8: {error}") from error


def _config_template(config: Mapping[str, Any], place: Path) -> str | None:
    """The template of a config; of several named ones, the one called default."""
    said = template = config.get("chat_template")
    if isinstance(said, list):
        try:
            template = {entry["name"]: entry["template"] for entry in said}.get("default")
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{place}: chat_template must be a text or a list of objects with a name and a "
                f"template, not {said!r:.80}"
            ) from error
    if not isinstance(template, str | None):
        raise DataError(f"{place}: chat_template must be a text, not {template!r:.80}")
    return template
