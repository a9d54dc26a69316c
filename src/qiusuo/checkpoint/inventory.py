"""Whether a checkpoint holds what its config says: every tensor, no other, each of its shape.

All of it is known from headers, so it is checked before a number is read or a byte allocated.
"""

from __future__ import annotations

import difflib

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.stored import Checkpoint
from qiusuo.checkpoint.tensors import copies, disk_shapes
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.model.config import ModelConfig
from qiusuo.model.deepseek_config import DeepseekConfig
from qiusuo.model.names import is_number, layer_of, natural

SHOWN = 5
SHOWN_CHARACTERS = 200
# A difference between config and files of so many tensors is spelt out name by name.
SPELT_OUT = 100_000
# What safetensors can hold and what are no weights, whatever their name.
NO_WEIGHTS = ("I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E5M2")


def check_inventory(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError naming what is missing, surplus, of the wrong shape or no weight."""
    _check_counts(checkpoint)
    shapes, config = disk_shapes(checkpoint.config), checkpoint.config
    repeated = copies(config)
    found = set(checkpoint.tensors)
    missing = sorted(set(shapes) - found, key=natural)
    surplus = sorted(found - set(shapes) - set(repeated), key=natural)
    if missing or surplus:
        lines = [f"{checkpoint.place} does not hold what its config says:"]
        lines += _listed("missing", missing, surplus) + _listed("surplus", surplus, missing)
        raise CheckpointError("\n".join([*lines, *_hint(config, missing, surplus, found)]))
    expected = shapes | {copy: shapes[original] for copy, original in repeated.items()}
    held = {name: checkpoint.tensors[name] for name in expected if name in found}
    for tensor in held.values():
        if tensor.kind in NO_WEIGHTS:
            raise CheckpointError(
                f"{tensor.place} is stored as {tensor.kind}, which is no type of weights"
            )
    wrong = [name for name, tensor in held.items() if tensor.shape != expected[name]]
    if wrong:
        lines = [f"{checkpoint.place} has tensors of other shapes than its config says:"]
        lines += [
            f"  {held[name].place} has shape {held[name].shape}, expected {expected[name]}"
            for name in wrong[:SHOWN]
        ]
        lines += [f"  and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise CheckpointError("\n".join(lines))


def _check_counts(checkpoint: Checkpoint) -> None:
    """A config that counts far more layers and experts than the files hold: told from the counts
    alone, because its names would fill the memory."""
    config, found = checkpoint.config, checkpoint.tensors
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = config.n_routed_experts if isinstance(config, DeepseekConfig) else 0
    if layers * (1 + 3 * experts) <= SPELT_OUT + 4 * len(found):
        return
    last, most = max(map(layer_of, found), default=-1), max(map(_expert_of, found), default=-1)
    raise CheckpointError(
        f"{checkpoint.place} does not hold what its config says: that counts {layers} layers "
        f"(num_hidden_layers and num_nextn_predict_layers) of {experts} experts "
        f"(n_routed_experts), and the files go on to layer {last} and expert {most}, counted from 0"
    )


def _expert_of(name: str) -> int:
    number = name.partition(".experts.")[2].partition(".")[0]
    return int(number) if is_number(number) else -1


def check_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> None:
    """A vocabulary may be smaller than the embedding (padding), never larger."""
    rows = checkpoint.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{checkpoint.place}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding "
            f"only {rows} rows (vocab_size): they do not belong together"
        )


def _listed(kind: str, names: list[str], others: list[str]) -> list[str]:
    lines = []
    for name in names[:SHOWN]:
        layer = [other for other in others if layer_of(other) == layer_of(name)]
        near = difflib.get_close_matches(name[:SHOWN_CHARACTERS], layer, 1)
        nearest = f" (nearest: {near[0]:.{SHOWN_CHARACTERS}})" if near else ""
        lines.append(f"  {kind}: {name:.{SHOWN_CHARACTERS}}{nearest}")
    if len(names) > SHOWN:
        lines.append(f"  {kind}: and {len(names) - SHOWN} more")
    return lines


def _hint(
    config: ModelConfig, missing: list[str], surplus: list[str], found: set[str]
) -> list[str]:
    """What the difference most likely comes from, where it has one cause."""
    layers, modules = config.num_hidden_layers, config.num_nextn_predict_layers
    last = max(map(layer_of, found), default=-1)
    short = last < layers + modules - 1
    if short and not surplus and all(layer_of(name) >= layers for name in missing):
        return [
            f"All of it belongs to MTP modules. If this checkpoint came without them, set "
            f"num_nextn_predict_layers to {last - layers + 1} in its config.json (now {modules})."
        ]
    if last >= 0 and last != layers + modules - 1:
        return [
            f"config.json counts {layers} layers (num_hidden_layers) and {modules} MTP modules "
            f"(num_nextn_predict_layers); the files go on to layer {last}, counted from 0."
        ]
    if missing == ["lm_head.weight"]:
        return ["Without a head of its own the model must say tie_word_embeddings: true."]
    return []
