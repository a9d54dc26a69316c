"""What the hub says a repository holds, and which of its files make a model.

`GET /api/models/ID/revision/REV?blobs=true` answers with the commit and, for each file, its size
and a checksum: the sha256 of large files (Git LFS), git's own SHA-1 of a blob for the others.
Only weights that are plain numbers are taken: a pickle can run code when it is read, and code of
a repository is never needed here. Every word of the answer is checked before it is used.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

from qiusuo.data.cache import show_bytes
from qiusuo.data.download import RefusedError, RemoteFile, fetch_page, show_url
from qiusuo.data.errors import DataError, unknown
from qiusuo.data.hub_reference import Reference, check_file_name, endpoint

PAPERS = ("LICENSE*", "LICENCE*", "README.md")
CONFIGURATION = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "*.safetensors.index.json",
)
WEIGHTS = ("*.safetensors", "*.gguf")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
NEVER = (*PICKLES, "*.py")


@dataclass(frozen=True)
class Listing:
    """One commit of a repository: the files to fetch, by the name they get."""

    commit: str
    files: tuple[RemoteFile, ...]


def list_repository(reference: Reference) -> Listing:
    """Ask the hub; `DataError` for a repository that is not there, not open, or has no weights."""
    name, revision = reference.repository, urllib.parse.quote(reference.revision, safe="")
    page = f"{endpoint()}/api/models/{name}/revision/{revision}?blobs=true"
    try:
        _, body = fetch_page(page, {"Accept": "application/json", **credentials()})
    except RefusedError as error:
        raise explain_refusal(error, reference) from error
    try:
        answer = json.loads(body)
        commit, siblings = answer["sha"], answer["siblings"]
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(f"sha is {commit!r}, not 40 hex digits")
        listed = _read_siblings(reference, siblings)
        sizes = {name: _size(entry) for name, entry in listed.items()}
        names = _choose(reference, sizes)
        files = tuple(_remote_file(reference, commit, name, listed[name]) for name in names)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{endpoint()} did not answer as a hub does about {name} "
            f"({type(error).__name__}: {error}): check HF_ENDPOINT"
        ) from error
    return Listing(commit, files)


def credentials() -> dict[str, str]:
    """The header that says who asks, from `HF_TOKEN`; only ever for the hub itself."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        return {}
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise DataError("HF_TOKEN is not a token: it holds blanks or other characters none has")
    return {"Authorization": f"Bearer {token}"}


def explain_refusal(error: RefusedError, reference: Reference) -> DataError:
    """What the hub's refusal means, and what to do."""
    name, place = reference.repository, f"{endpoint()}/{reference.repository}"
    token = "HF_TOKEN is set, perhaps to an old one" if credentials() else "HF_TOKEN is not set"
    if not error.address.startswith(f"{show_url(endpoint())}/"):
        # Large files lie elsewhere, at addresses that are signed for a while.
        return DataError(f"{error}, where {name} keeps this file: try again; what came is kept")
    if error.code == "RevisionNotFound":
        return DataError(f"{name} has no branch, tag or commit {reference.revision!r}: see {place}")
    if error.code == "GatedRepo" or error.status == 403:
        return DataError(
            f"{name} is gated ({error}): ask for access at {place}, then set HF_TOKEN to a token "
            f"of that account ({token})"
        )
    if error.status == 401:
        return DataError(
            f"{name} is not open to everyone, or there is no such name ({error}): check the "
            f"spelling; if it is private or gated, ask for access at {place} and set HF_TOKEN to "
            f"a token of that account ({token})"
        )
    if error.status == 404:
        return DataError(
            f"there is no {name} ({error}): check the spelling; if it is private, set HF_TOKEN "
            f"to a token of its owner ({token})"
        )
    return DataError(f"{error}: try again later; what has arrived is kept")


def _read_siblings(reference: Reference, siblings: list[dict[str, Any]]) -> dict[str, Any]:
    """Each file's entry by its name, having refused names made to lead elsewhere."""
    listed = {str(sibling["rfilename"]): sibling for sibling in siblings}
    for name in listed:
        # A path that ends like a file of a model and leads out of the folder is no accident.
        if _matches(re.split(r"[/\\]", name)[-1], (*CONFIGURATION, *PAPERS, *WEIGHTS)):
            for word in name.split("/"):
                if word in ("", "..") or "\\" in word:
                    check_file_name(word, f"the list of {reference.repository} (file {name!r})")
    return listed


def _choose(reference: Reference, sizes: dict[str, int]) -> list[str]:
    """The names to fetch, in the hub's order."""
    if reference.file:
        if reference.file not in sizes:
            ggufs = [name for name in sizes if _matches(name.lower(), WEIGHTS[1:])]
            raise unknown(f"file of {reference.repository}", reference.file, ggufs)
        return [reference.file]
    here = [name for name in sizes if "/" not in name and not _matches(name, (".*", *NEVER))]
    papers = [name for name in here if _matches(name, PAPERS)]
    weights = [name for name in here if _matches(name, WEIGHTS[:1])]
    # Some repositories hold the same weights again, as `consolidated` or as adapters.
    weights = [name for name in weights if name.startswith("model")] or weights
    if not weights:
        return [_only_gguf(reference, sizes), *papers]
    if "config.json" not in here:
        raise DataError(f"{reference.repository} has weights but no config.json: not a whole model")
    return [name for name in here if name in weights or _matches(name, CONFIGURATION)] + papers


def _only_gguf(reference: Reference, sizes: dict[str, int]) -> str:
    """The .gguf file of a repository that has one and nothing better."""
    ggufs = [name for name in sizes if _matches(name.lower(), WEIGHTS[1:])]
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        lines = "".join(
            f"\n  {_address(reference, reference.revision, name)}  {show_bytes(sizes[name])}"
            for name in ggufs
        )
        raise DataError(
            f"{reference.repository} holds {len(ggufs)} .gguf files: pull one by its address{lines}"
        )
    pickles = [name for name in sizes if _matches(name, PICKLES)]
    if pickles:
        raise DataError(
            f"{reference.repository} has its weights only as pickles ({pickles[0]}), which can "
            f"run code when they are read: ask its owner for safetensors, or pull a copy that "
            f"has them"
        )
    raise DataError(f"{reference.repository} holds no weights: no .safetensors and no .gguf")


def _remote_file(reference: Reference, commit: str, name: str, entry: dict) -> RemoteFile:
    """Where a file lies, how large it is and what proves it."""
    lfs = entry.get("lfs")
    if lfs:
        digest, size = f"sha256:{lfs['sha256']}", lfs["size"]
    else:
        digest, size = f"git-sha1:{entry['blobId']}", entry["size"]
    if not re.fullmatch("sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40}", digest):
        raise ValueError(f"{name} has the checksum {digest!r}")
    if reference.sha256 and reference.file:
        digest = f"sha256:{reference.sha256}"
    place = check_file_name(name.rsplit("/", 1)[-1], f"the list of {reference.repository}")
    return RemoteFile(place, _address(reference, commit, name), size, digest, credentials())


def _address(reference: Reference, revision: str, name: str) -> str:
    revision = urllib.parse.quote(revision, safe="")
    return f"{endpoint()}/{reference.repository}/resolve/{revision}/{urllib.parse.quote(name)}"


def _size(entry: dict) -> int:
    size = (entry.get("lfs") or entry)["size"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{entry['rfilename']} has the size {size!r}")
    return size


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
