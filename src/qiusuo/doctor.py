"""`qiusuo doctor MODEL`: is this checkpoint whole, does it fit together, does it run?

Each check looks at one thing and says what it found. What stops a model is a fault, what merely
makes it behave unlike what its owner expects is a remark. The order is from cheap to dear: what a
header tells first, a forward pass last, and a check that cannot run without an earlier one is left
out when that one failed.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

import torch
import torch.nn.functional as F

from qiusuo.checkpoint.files import CheckpointError
from qiusuo.checkpoint.inventory import check_inventory, check_tokenizer
from qiusuo.checkpoint.load import load_model, loaded_bytes
from qiusuo.checkpoint.open import find_model, open_checkpoint
from qiusuo.checkpoint.stored import Checkpoint, Progress, chunks
from qiusuo.data.cache import show_bytes
from qiusuo.data.errors import DataError
from qiusuo.data.tokenizer import Tokenizer
from qiusuo.kernels.native import REMEDY, built_library, native
from qiusuo.model.checks import ConfigError
from qiusuo.model.cost import available_memory, measure
from qiusuo.model.transformer import Transformer

WHOLE_BYTES = 16 << 30  # beyond this, only the beginning of every tensor is read
PROBES = (
    "The capital of France is Paris.",
    "《春夜》李白：举头望明月，低头思故乡。",
    "def f(x: int) -> str:\n\treturn f'{x:>8}'  # 12345.678\n",
    "café naïve  👩‍🔬 ½ \u00a0\n\n end",
)
TURNS = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is 2+2?"},
)


class Mark(StrEnum):
    GOOD = "good"
    REMARK = "remark"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    mark: Mark
    subject: str
    text: str


@dataclass
class Examination:
    """What has been found so far, and what later checks need of earlier ones."""

    reference: str
    progress: Progress | None = None
    findings: list[Finding] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    model: Transformer | None = None

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.mark is Mark.FAULT]

    @property
    def remarks(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.mark is Mark.REMARK]

    def verdict(self) -> str:
        """One line that says what to do next."""
        if self.faults:
            count = _counted(len(self.faults), "fault")
            first = self.faults[0].subject
            return (
                f"Not usable as it is, {count} above. Mend the first ({first}), then look again: "
                f"qiusuo doctor {self.reference}"
            )
        if self.model is None:
            return f"Whole, as far as could be seen without running it here. {self._use()}"
        if self.remarks:
            return f"Usable, {_counted(len(self.remarks), 'remark')} above. {self._use()}"
        return f"Healthy. {self._use()}"

    def _use(self) -> str:
        if self.tokenizer is None:
            return f"In Python: qiusuo.load({self.reference!r}).generate([token_ids])"
        if self.tokenizer.chat_template is None:
            return f"In Python: qiusuo.load({self.reference!r}).generate([text])"
        return f"Talk with it: qiusuo chat {self.reference}"


def examine(examination: Examination) -> Iterator[Finding]:
    """The findings as they come; the examination keeps them, and has the verdict in the end.

    Raises CheckpointError where there is nothing to examine."""
    find_model(examination.reference)
    for check in (_files, _tensors, _numbers, _tokenizer, _template, _forward):
        for finding in _guarded(check, examination):
            examination.findings.append(finding)
            yield finding
        if examination.checkpoint is None or (check is _tensors and examination.faults):
            return


def kernels_in_use() -> Finding:
    """What computes on this machine's CPU: nothing of the checkpoint's, so not of its verdict.

    Raises KernelError where QIUSUO_KERNELS asks for what is not to be had."""
    library = native()
    if library is not None:
        whose = "shared with PyTorch" if library.shares_threads else "of their own"
        text = f"native, {library.instructions}, {torch.get_num_threads()} threads {whose}"
        return Finding(Mark.GOOD, "Kernels", text)
    if built_library() is not None:
        return Finding(Mark.GOOD, "Kernels", "reference, as QIUSUO_KERNELS asks")
    lost = "answers come slower, and from int8 and int4 weights many times slower"
    text = f"reference (PyTorch alone): the native ones were not built, so {lost}; {REMEDY}"
    return Finding(Mark.REMARK, "Kernels", text)


Check = Callable[[Examination], Iterator[Finding]]


def _guarded(check: Check, examination: Examination) -> Iterator[Finding]:
    """A check's findings; what it stumbles over is a fault with the reader's own words."""
    subject = (check.__doc__ or "").partition(":")[0]
    try:
        yield from check(examination)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        yield Finding(Mark.FAULT, subject, str(error))


def _files(examination: Examination) -> Iterator[Finding]:
    """Files and config: headers, index, sizes, FP8 scales, and what config.json says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(examination.reference)
    examination.checkpoint = checkpoint
    config = checkpoint.config
    cost = measure(config)
    mtp = f", {cost.mtp_parameters:,} more in MTP" if cost.mtp_parameters else ""
    yield Finding(
        Mark.GOOD,
        "Files and config",
        f"{checkpoint.format} at {checkpoint.place}: {config.model_type}, "
        f"{config.num_hidden_layers} layers, {cost.parameters:,} parameters{mtp}",
    )
    for warning in caught:
        yield Finding(Mark.REMARK, "Config", str(warning.message))
    for token in _ends(checkpoint):
        if not 0 <= token < config.vocab_size:
            yield Finding(
                Mark.FAULT,
                "Config",
                f"eos_token_id {token} is outside the {config.vocab_size:,} tokens of vocab_size",
            )


def _tensors(examination: Examination) -> Iterator[Finding]:
    """Tensors: every one that the config asks for, no other, each of its shape."""
    checkpoint = _opened(examination)
    check_inventory(checkpoint)
    kinds = Counter(tensor.kind for tensor in checkpoint.tensors.values())
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    size = show_bytes(checkpoint.stored_bytes)
    yield Finding(Mark.GOOD, "Tensors", f"{len(checkpoint.tensors)} as expected ({listed}), {size}")


def _numbers(examination: Examination) -> Iterator[Finding]:
    """Numbers: none is NaN or infinite, and no matrix is all zeros."""
    checkpoint = _opened(examination)
    total, done, empty = checkpoint.stored_bytes, 0, []
    whole = total <= WHOLE_BYTES
    for name, tensor in checkpoint.tensors.items():
        largest = 0.0
        for start, rows in chunks(tensor) if whole else islice(chunks(tensor), 1):
            peak = float(rows.float().abs().max()) if rows.numel() else 0.0
            if not math.isfinite(peak):
                yield Finding(
                    Mark.FAULT,
                    "Numbers",
                    f"{tensor.place} holds NaN or infinity near row {start}: the file is damaged "
                    "or the model diverged; fetch it again",
                )
                return
            largest = max(largest, peak)
        if largest == 0.0 and len(tensor.shape) > 1:
            empty.append(name)
        done += tensor.stored_bytes
        if examination.progress is not None:
            examination.progress(done, total)
    if empty:
        listed = ", ".join(empty[:3]) + (" ..." if len(empty) > 3 else "")
        yield Finding(Mark.REMARK, "Numbers", f"all zeros: {listed}")
    else:
        seen = "all" if whole else "the first rows of every tensor (of so many bytes not all)"
        yield Finding(Mark.GOOD, "Numbers", f"{seen} finite, no matrix of zeros")


def _tokenizer(examination: Examination) -> Iterator[Finding]:
    """Tokenizer: as large as the embedding at most, and text survives it."""
    checkpoint = _opened(examination)
    tokenizer = checkpoint.read_tokenizer()
    if not _ends(checkpoint) and (tokenizer is None or tokenizer.eos_id is None):
        yield Finding(
            Mark.REMARK,
            "End",
            "neither the config (eos_token_id) nor a tokenizer names an end token: every answer "
            "goes on to max_tokens",
        )
    if tokenizer is None:
        yield Finding(
            Mark.REMARK, "Tokenizer", "none (no tokenizer.json): the model takes token ids only"
        )
        return
    check_tokenizer(checkpoint, tokenizer)
    examination.tokenizer = tokenizer
    rows, size = checkpoint.config.vocab_size, tokenizer.vocab_size
    padding = f", {rows - size} rows of padding" if rows > size else ""
    yield Finding(Mark.GOOD, "Tokenizer", f"{size:,} tokens for {rows:,} rows{padding}")
    for probe in PROBES:
        if (back := tokenizer.decode(tokenizer.encode(probe))) != probe:
            yield Finding(
                Mark.REMARK,
                "Tokenizer",
                f"{probe!r} comes back as {back!r}: its vocabulary lacks some characters, or it "
                "changes text",
            )
            break
    else:
        yield Finding(Mark.GOOD, "Tokenizer", f"{len(PROBES)} texts come back unchanged")
    ends, own = _ends(checkpoint), tokenizer.eos_id
    if own is None or own in ends:
        return
    others = f"the config's are {', '.join(map(str, ends))}" if ends else "the config has none"
    yield Finding(
        Mark.REMARK,
        "Tokenizer",
        f"its end token is {own} ({tokenizer.eos_token}), {others}: each of them ends an answer "
        "here, elsewhere perhaps not; eos_token_id in config.json can list all",
    )


def _template(examination: Examination) -> Iterator[Finding]:
    """Chat template: renders a short conversation."""
    tokenizer = examination.tokenizer
    if tokenizer is None:
        return
    if tokenizer.chat_template is None:
        yield Finding(Mark.REMARK, "Chat template", "none: a base model, which continues texts")
        return
    ids = tokenizer.apply_chat_template(TURNS, thinking=True)
    opened = "opens a thought" if tokenizer.opens_thought(ids) else "opens no thought"
    tail = tokenizer.decode(ids[-8:])
    yield Finding(
        Mark.GOOD, "Chat template", f"{len(ids)} tokens for three turns, {opened}: ...{tail!r}"
    )


def _forward(examination: Examination) -> Iterator[Finding]:
    """Forward pass: a few tokens through the whole model, MTP modules too."""
    checkpoint = _opened(examination)
    if any(fault.subject == "Numbers" for fault in examination.faults):
        return
    if (needed := loaded_bytes(checkpoint)) > (free := available_memory()):
        yield Finding(
            Mark.REMARK,
            "Forward pass",
            f"not run: it needs {show_bytes(needed)} of memory, {show_bytes(free)} are free",
        )
        return
    model = load_model(checkpoint, progress=examination.progress)
    examination.model = model
    ids, what = _probe_ids(checkpoint, examination.tokenizer)
    try:
        logits_TW, loss = _run(model, torch.tensor([ids]))
    except Exception as error:  # whatever it is, it would stop an answer too
        words = f"{type(error).__name__}: {error}"
        yield Finding(Mark.FAULT, "Forward pass", f"stopped after {len(ids)} tokens by {words}")
        return
    if not bool(logits_TW.isfinite().all()):
        yield Finding(Mark.FAULT, "Forward pass", f"NaN or infinity after {len(ids)} tokens")
        return
    uniform = math.log(checkpoint.config.vocab_size)
    text = f"{len(ids)} tokens, all finite"
    if len(ids) > 1:  # else nothing follows that could be foretold
        text += f"; {loss:.2f} nats a token {what} (chance: {uniform:.2f})"
    foreign = what == "of text" and loss >= uniform
    if foreign:
        text += ": no better than chance on everyday text; unless it learned another kind of text, "
        text += "look whether these are the weights of a trained model"
    yield Finding(Mark.REMARK if foreign else Mark.GOOD, "Forward pass", text)


def _run(model: Transformer, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of the main model and of the MTP modules, and the main model's loss."""
    with torch.inference_mode():
        hidden_BTD = model(tokens_BT).x_BTD
        logits_TW = model.logits(hidden_BTD)[0]
        loss = float(F.cross_entropy(logits_TW[:-1], tokens_BT[0, 1:]))
        depths = min(model.config.num_nextn_predict_layers, tokens_BT.shape[1] - 1)
        for depth in range(depths):  # each sees one token less
            following_BT = tokens_BT[:, depth + 1 :]
            context = model.context(following_BT)
            hidden_BTD = model.predict_ahead(hidden_BTD[:, :-1], following_BT, depth, context).x_BTD
            logits_TW = torch.cat((logits_TW, model.logits(hidden_BTD)[0]))
    return logits_TW, loss


def _probe_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> tuple[list[int], str]:
    limit = checkpoint.config.max_position_embeddings
    if tokenizer is None:
        vocabulary = checkpoint.config.vocab_size
        return [(7 * i + 1) % vocabulary for i in range(min(32, limit))], "of arbitrary ids"
    ids = [*tokenizer.text_start, *tokenizer.encode(" ".join(PROBES[:2]))]
    return ids[:limit], "of text"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _ends(checkpoint: Checkpoint) -> tuple[int, ...]:
    ends = checkpoint.config.eos_token_id
    return ends if isinstance(ends, tuple) else () if ends is None else (ends,)


def _opened(examination: Examination) -> Checkpoint:
    assert examination.checkpoint is not None
    return examination.checkpoint
