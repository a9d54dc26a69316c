"""Models from a hub, over real sockets: broken lines, killed processes, traps and refusals."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qiusuo.data import cache as cache_module
from qiusuo.data.cache import only_one
from qiusuo.data.digests import check_digest
from qiusuo.data.errors import DataError
from qiusuo.data.hub import pull_repository
from qiusuo.data.hub_reference import find_model_folder, model_folder, parse_reference
from tests.data.stand_in_hub import StandInHub, describe, serve

WEIGHTS = bytes(range(256)) * 3000
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": "# A model, 一个模型\n".encode(),
    "LICENSE": b"MIT\n",
    "config.json": b'{"model_type": "qwen2"}\n',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_mine.py": b"raise SystemExit('never')",
    "tokenizer_mine.py": b"raise SystemExit('never')",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": WEIGHTS,
    "original/model.safetensors": WEIGHTS,
    "figures/picture.png": b"png",
}
NEEDED = {
    *("README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
}
FIRST = "model-00001-of-00002.safetensors"
TOTAL = sum(len(FILES[name]) for name in NEEDED)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandInHub]:
    """The hub running, and everything pointed at it."""
    with serve(StandInHub(dict(FILES))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("QIUSUO_HOME", str(tmp_path))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield hub


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def expected() -> dict[str, bytes]:
    return {name: FILES[name] for name in NEEDED}


def left_over(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir()}


# A whole pull


def test_what_makes_a_model_is_fetched_and_nothing_else(hub: StandInHub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = pull_repository("owner/name", progress=lambda *at: seen.append(at))
    assert folder == tmp_path / "models" / "owner--name"
    assert content_of(folder) == expected()
    assert [name for name, _ in hub.fetched()].count(FIRST) == 1
    assert {name for name, _ in hub.fetched()} == NEEDED - {"tokenizer_config.json"}  # empty
    assert {total for _, total in seen} == {TOTAL}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (TOTAL, TOTAL)
    assert left_over(tmp_path) == {"owner--name"}
    assert json.loads((folder / ".pulled.json").read_text())["commit"] == hub.commit
    hub.requests.clear()
    assert pull_repository("owner/name") == folder
    assert hub.fetched() == []
    assert find_model_folder("owner/name") == folder


def test_another_revision_is_another_folder(hub: StandInHub, tmp_path: Path) -> None:
    for revision, name in [("v1", "@v1"), ("refs/pr/1", "@refs%2Fpr%2F1"), ("main", "")]:
        folder = pull_repository(f"owner/name@{revision}")
        assert folder == tmp_path / "models" / f"owner--name{name}"
        assert content_of(folder) == expected()


def test_a_branch_that_moved_replaces_the_folder_when_whole(hub: StandInHub) -> None:
    folder = pull_repository("owner/name")
    hub.commit, hub.files["config.json"] = "f" * 40, b'{"model_type": "llama"}\n'
    hub.cut = 300_000 // 5  # too short for five tries
    with pytest.raises(DataError, match="broke off"):
        pull_repository("owner/name")
    assert content_of(folder) == expected()
    hub.cut = None
    assert pull_repository("owner/name") == folder
    assert content_of(folder) == expected() | {"config.json": hub.files["config.json"]}


def test_a_folder_that_lost_a_file_is_made_whole(hub: StandInHub) -> None:
    folder = pull_repository("owner/name")
    (folder / "config.json").unlink()
    assert content_of(pull_repository("owner/name")) == expected()


def test_a_renamed_repository(hub: StandInHub, tmp_path: Path) -> None:
    folder = pull_repository("old/name")
    assert folder == tmp_path / "models" / "old--name"
    assert content_of(folder) == expected()


def test_addresses_of_the_hub(hub: StandInHub) -> None:
    for address in ("", "/", "/tree/main", "/tree/v1"):
        for host in (hub.address, "https://huggingface.co"):
            assert content_of(pull_repository(f"{host}/owner/name{address}")) == expected()


# Interruptions


def test_a_broken_line_is_taken_up_where_it_broke(hub: StandInHub) -> None:
    hub.cut = 300_000
    assert content_of(pull_repository("owner/name")) == expected()
    ranges = [asked for name, asked in hub.fetched() if name == FIRST]
    assert ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_line_that_keeps_breaking_keeps_what_came(hub: StandInHub, tmp_path: Path) -> None:
    hub.cut = 1000
    with pytest.raises(
        DataError, match=r"stands at 5000 of 768000 .*qiusuo pull owner/name` again"
    ):
        pull_repository("owner/name")
    assert find_model_folder("owner/name") is None
    assert left_over(tmp_path) == {".owner--name.draft"}
    hub.cut = None
    hub.requests.clear()
    seen: list[int] = []
    pull_repository("owner/name", progress=lambda done, _: seen.append(done))
    assert hub.fetched()[0] == (FIRST, "bytes=5000-")
    there = len(FILES["config.json"]) + len(FILES["generation_config.json"]) + 5000
    assert seen[0] == there + (1 << 18)  # what was there already counts
    assert content_of(tmp_path / "models" / "owner--name") == expected()


def test_a_killed_process_goes_on(hub: StandInHub, tmp_path: Path) -> None:
    hub.stall_at = 500_000
    program = (
        "from qiusuo.data.hub import pull_repository as pull\n"
        "pull('owner/name', progress=lambda done, total: print(done, flush=True))"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 200_000:
            pass
        with pytest.raises(DataError, match="being fetched or converted by another process"):
            pull_repository("owner/name")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    hub.stall_at = None
    hub.released.set()
    assert find_model_folder("owner/name") is None
    size = (tmp_path / "models/.owner--name.draft" / f"{FIRST}.part").stat().st_size
    assert 0 < size < len(WEIGHTS)
    hub.requests.clear()
    assert content_of(pull_repository("owner/name")) == expected()
    fetched = hub.fetched()
    assert (FIRST, f"bytes={size}-") in fetched
    assert "config.json" not in dict(fetched)


def test_a_server_without_ranges_sends_all_again(hub: StandInHub) -> None:
    hub.cut = 700_000
    hub.ranges = False
    with pytest.raises(DataError, match="broke off"):
        pull_repository("owner/name")
    hub.cut = None
    assert content_of(pull_repository("owner/name")) == expected()


def test_a_draft_of_an_older_commit_gives_only_what_is_still_right(hub: StandInHub) -> None:
    hub.cut = 1000
    with pytest.raises(DataError, match="broke off"):
        pull_repository("owner/name")
    hub.commit, hub.files[FIRST] = "f" * 40, WEIGHTS[1:]
    hub.cut = None
    hub.requests.clear()
    folder = pull_repository("owner/name")
    assert content_of(folder) == expected() | {FIRST: WEIGHTS[1:]}
    assert (FIRST, None) in hub.fetched()
    assert "config.json" not in dict(hub.fetched())


def test_killed_between_the_old_folder_and_the_new(hub: StandInHub, tmp_path: Path) -> None:
    models = tmp_path / "models"
    pull_repository("owner/name").rename(models / ".owner--name.draft")
    (models / ".owner--name.old").mkdir()
    hub.requests.clear()
    assert content_of(pull_repository("owner/name")) == expected()
    assert hub.fetched() == []
    assert left_over(tmp_path) == {"owner--name"}


def test_two_at_once(hub: StandInHub) -> None:
    with only_one("model-owner--name"), pytest.raises(DataError, match="by another process"):
        pull_repository("owner/name")
    assert hub.requests == []
    assert content_of(pull_repository("owner/name")) == expected()


# What is wrong is refused


@pytest.mark.parametrize("name", ["config.json", FIRST])
@pytest.mark.parametrize("wrong", [lambda right: right[:-1] + b"!", lambda right: right + b"more"])
def test_wrong_bytes_are_put_aside(hub: StandInHub, tmp_path: Path, name: str, wrong) -> None:
    hub.spoilt[name] = wrong(FILES[name])
    with pytest.raises(DataError, match=f"{name} is not the file that was pinned") as error:
        pull_repository("owner/name")
    aside = tmp_path / "models" / ".owner--name.rejected" / name
    assert str(aside) in str(error.value)
    assert aside.read_bytes()[: len(FILES[name])] == hub.spoilt[name][: len(FILES[name])]
    assert find_model_folder("owner/name") is None
    hub.spoilt.clear()
    assert content_of(pull_repository("owner/name")) == expected()


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/config.json", "a/../../x.gguf", "..\\config.json", "C:x.jinja"]
)
def test_names_that_lead_elsewhere(hub: StandInHub, tmp_path: Path, name: str) -> None:
    hub.files[name] = b"trap"
    with pytest.raises(DataError, match="not a safe name"):
        pull_repository("owner/name")
    assert hub.fetched() == []
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"sha": "../../x"},
        {"siblings": None},
        {"siblings": [{"size": 1}]},
        {"siblings": [describe("config.json", b"{}") | {"size": -1}]},
        {"siblings": [describe("config.json", b"{}") | {"size": "many"}]},
        {
            "siblings": [
                describe("config.json", b"") | {"blobId": "x"},
                describe("model.safetensors", b""),
            ]
        },
    ],
)
def test_a_list_that_is_none(hub: StandInHub, change: dict) -> None:
    hub.listing = {"sha": hub.commit, "siblings": []} | change
    with pytest.raises(DataError, match=r"did not answer as a hub does .* check HF_ENDPOINT"):
        pull_repository("owner/name")


def test_repositories_without_usable_weights(hub: StandInHub) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(DataError, match=r"only as pickles \(pytorch_model.bin\)"):
        pull_repository("owner/name")
    hub.files = {"config.json": b"{}", "model.py": b""}
    with pytest.raises(DataError, match="holds no weights"):
        pull_repository("owner/name")
    hub.files = {"adapter_model.safetensors": b"x"}
    with pytest.raises(DataError, match=r"no config.json"):
        pull_repository("owner/name")


def test_a_disk_without_room(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=TOTAL - 2000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"1.5 MB are still to come: free 2.0 kB more"):
        pull_repository("owner/name")
    assert hub.fetched() == []


def test_a_disk_that_fills_up(hub: StandInHub, tmp_path: Path) -> None:
    hub.files = {"a.gguf": WEIGHTS}
    draft = tmp_path / "models" / ".owner--name.draft"
    hub.cut = 0
    with pytest.raises(DataError, match="broke off"):
        pull_repository("owner/name")
    (draft / "a.gguf.part").unlink()
    (draft / "a.gguf.part").symlink_to("/dev/full")
    hub.cut = None
    with pytest.raises(DataError, match="the disk is full"):
        pull_repository("owner/name")


# Who may have it


def test_a_token_goes_to_the_hub_and_nowhere_else(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_s3cret"
    monkeypatch.setenv("HF_TOKEN", " hf_s3cret\n")
    assert content_of(pull_repository("owner/name")) == expected()
    tokens = {(request.host, request.token) for request in hub.requests}
    assert tokens == {("hub", "Bearer hf_s3cret"), ("store", None)}


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (
            (401, "RepoNotFound"),
            "check the spelling.*ask for access at .*/owner/name and set HF_TOKEN",
        ),
        ((401, "GatedRepo"), "gated.*ask for access at http.*/owner/name, then set HF_TOKEN"),
        ((403, ""), "gated"),
        (
            (404, "RepoNotFound"),
            "there is no owner/name .*spelling; if it is private, set HF_TOKEN",
        ),
        ((404, "RevisionNotFound"), "no branch, tag or commit 'main'"),
        ((503, ""), "answered 503 .*try again later"),
    ],
)
def test_refusals(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str], expected: str
) -> None:
    hub.refuse = refusal
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    with pytest.raises(DataError, match=expected) as error:
        pull_repository("owner/name")
    assert "s3cret" not in str(error.value)


def test_a_refusal_of_the_store_is_not_one_of_the_hub(hub: StandInHub, monkeypatch) -> None:
    hub.storage += "/gone"
    with pytest.raises(DataError, match=r"/gone/large/.* answered 404 .*try again") as error:
        pull_repository("owner/name")
    assert "s3cret" not in str(error.value)
    assert "spelling" not in str(error.value)


def test_a_token_that_is_none(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret\nX: y")
    with pytest.raises(DataError, match="HF_TOKEN is not a token") as error:
        pull_repository("owner/name")
    assert "s3cret" not in str(error.value)


def test_no_hub_at_that_address(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(DataError, match=f"cannot reach 127.0.0.1:{port} .*HF_ENDPOINT"):
        pull_repository("owner/name")
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(DataError, match=r"not an http\(s\) address: check HF_ENDPOINT"):
        pull_repository("owner/name")


# Single files


def test_the_one_gguf_of_a_repository(hub: StandInHub) -> None:
    hub.files = {"README.md": b"x", "config.json": b"{}", "small model.gguf": WEIGHTS}
    folder = pull_repository("owner/name")
    assert content_of(folder) == {"README.md": b"x", "small model.gguf": WEIGHTS}


def test_one_of_several_ggufs(hub: StandInHub, tmp_path: Path) -> None:
    hub.files = {"a-Q4.gguf": WEIGHTS, "q8/a.gguf": WEIGHTS + b"longer", "b/a.gguf": b"other"}
    with pytest.raises(DataError, match=r"holds 3 \.gguf files") as error:
        pull_repository("owner/name")
    listed = re.findall(r"^  (\S+)  (\d.*)$", str(error.value), re.MULTILINE)
    assert [size for _, size in listed] == ["768.0 kB", "768.0 kB", "5 bytes"]
    for (address, _), content in zip(listed, hub.files.values(), strict=True):
        folder = pull_repository(address)
        assert list(content_of(folder).values()) == [content]
        assert find_model_folder(address) == folder
    assert left_over(tmp_path) == {f"owner--name--{n}" for n in ("a-Q4", "q8%2Fa", "b%2Fa")}
    with pytest.raises(DataError, match=r"unknown file of owner/name 'a-q4\.gguf': did you mean"):
        pull_repository(f"{hub.address}/owner/name/blob/main/a-q4.gguf")
    promised = hashlib.sha256(b"promised").hexdigest()
    with pytest.raises(DataError, match=f"expected {promised}"):
        pull_repository(f"{hub.address}/owner/name/resolve/v1/a-Q4.gguf#sha256={promised}")


def test_a_file_anywhere(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"a.gguf": WEIGHTS}
    address = f"{hub.storage}/large/a.gguf"
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    hub.cut = 1000
    with pytest.raises(DataError, match=r"stands at 5000.*pull that address again"):
        pull_repository(address)
    hub.etag = '"second"'  # another version: nothing of the first may be kept
    hub.files["a.gguf"] = WEIGHTS[::-1]
    hub.cut = None
    folder = pull_repository(address)
    assert content_of(folder) == {"a.gguf": WEIGHTS[::-1]}
    hub.requests.clear()
    assert pull_repository(address) == folder
    assert len(hub.requests) == 1
    assert {request.token for request in hub.requests} == {None}
    right = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    assert pull_repository(f"{address}#sha256={right}") == folder
    with pytest.raises(DataError, match="not the file that was pinned"):
        pull_repository(f"{address}#sha256={'0' * 64}")
    assert content_of(folder) == {"a.gguf": WEIGHTS[::-1]}
    hub.lengths = False
    with pytest.raises(DataError, match="does not say how large"):
        pull_repository(address)


# Names


@pytest.mark.parametrize(
    "name",
    [
        *(
            "name",
            "a/b/c",
            "/owner/name",
            "./x/y",
            "../x",
            "owner/..",
            "own--er/name",
            "a/b@",
            "a/b@../x",
        ),
        *("owner/na me", "o\\x/n", "https://", "ftp://x.org/a.gguf", "https://x.org/a.zip"),
        *("https://huggingface.co/datasets/a/b", "https://huggingface.co/a/b/resolve/main/x.bin"),
        *("https://huggingface.co/a/b/blob/main/../x.gguf", "https://x.org/%2e%2e%2fa%5c.gguf"),
        *("https://x.org/a.gguf#sha256=12", "https://x.org/a b.gguf", "https://x.org:99999/a.gguf"),
    ],
)
def test_references_that_name_nothing(name: str) -> None:
    with pytest.raises(DataError):
        parse_reference(name)
    assert find_model_folder(name) is None


def test_references_have_folders_of_their_own() -> None:
    references = [
        *("a/b", "a/b@v1", "a/b@v1--x", "https://huggingface.co/a/b/resolve/v1/x.gguf"),
        *("https://hf.co/a/b/blob/main/x.gguf", "https://hf.co/a/b/blob/main/q/x.gguf"),
        *("https://x.org/x.gguf", "https://x.org/x.gguf?v=2", f"a/b@{'r' * 200}"),
    ]
    names = {model_folder(reference).name for reference in references}
    assert len(names) == len(references)
    assert all(len(name) <= 150 and "/" not in name for name in names)
    assert "pw" not in model_folder("https://me:pw@x.org/x.gguf").name


def test_models_of_the_catalogue_have_a_place(tmp_path: Path) -> None:
    assert model_folder("smollm2", tmp_path) == tmp_path / "models" / "smollm2"
    assert find_model_folder("smollm2", tmp_path) is None
    model_folder("smollm2", tmp_path).mkdir(parents=True)
    assert find_model_folder("smollm2", tmp_path) == tmp_path / "models" / "smollm2"
    assert find_model_folder("song-poems", tmp_path) is None


def test_git_names_blobs_as_digests_does(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello\n")  # `echo hello | git hash-object --stdin`
    check_digest(tmp_path / "x", 6, "git-sha1:ce013625030ba8dba906f756967f9e9ca394464a")
    with pytest.raises(DataError, match=r"git-sha1 ce01.*, expected 0"):
        check_digest(tmp_path / "x", 6, "git-sha1:" + "0" * 40)


def test_the_stand_in_speaks_as_the_hub_does(hub: StandInHub) -> None:
    client = pytest.importorskip("huggingface_hub").HfApi(endpoint=hub.address, token=False)
    found = client.model_info("owner/name", revision="main", files_metadata=True)
    assert found.sha == hub.commit
    weights = next(file for file in found.siblings if file.rfilename == FIRST)
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.lfs.size == weights.size == len(WEIGHTS)
