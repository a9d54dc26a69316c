"""Conversations over HTTP: trees, search in two languages, one owner's apart from another's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qiusuo.server.database import Database
from qiusuo.server.page import conversations as store
from qiusuo.server.page.conversations import Conversations
from tests.server.page.conftest import Served

WORDS = "《离骚》：路漫漫其修远兮，吾将上下而求索。"


def ok(answer: httpx.Response) -> Any:
    assert answer.is_success, answer.text
    return answer.json() if answer.content else None


def refused(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def new(client: httpx.Client, *contents: str, **fields: Any) -> str:
    """A conversation of these messages, one below the other; its id."""
    conversation = ok(client.post("/api/conversations", json=fields))["id"]
    parent = None
    for place, content in enumerate(contents):
        role = ("user", "assistant")[place % 2]
        parent = say(client, conversation, parent, role, content)["id"]
    return conversation


def say(
    client: httpx.Client,
    conversation: str,
    parent: str | None,
    role: str,
    content: str,
    **more: Any,
) -> Any:
    message = {"parent": parent, "role": role, "content": content} | more
    return ok(client.post(f"/api/conversations/{conversation}/messages", json=message))


def found(client: httpx.Client, query: str) -> list[str]:
    listed = ok(client.get("/api/conversations", params={"q": query}))
    return [one["id"] for one in listed]


def test_a_conversation_grows_and_is_read_again(page: Served) -> None:
    settings = {"temperature": 0.5, "tools": "", "seed": None}
    fields = {"model": "quickstart", "system": "答短些", "settings": settings}
    made = ok(page.client.post("/api/conversations", json=fields))
    assert made["messages"] == []
    question = say(page.client, made["id"], None, "user", "什么是\n求索？" + "长" * 90)
    rest = {
        "reasoning_content": "想一想",
        "reasoning_seconds": 1.5,
        "model": "quickstart",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
        "cost": "0.000012 CNY",
        "speed": {"seconds": 0.3, "ttft": None, "tokens_per_second": 31.5},
    }
    answer = say(page.client, made["id"], question["id"], "assistant", "寻", **rest)
    path = f"/api/conversations/{made['id']}"
    grown = ok(
        page.client.patch(
            f"{path}/messages/{answer['id']}", json={"content": "寻找", "finish_reason": "stop"}
        )
    )
    got = ok(page.client.get(path))
    assert got["messages"] == [question, grown]
    assert {key: grown[key] for key in rest} == rest
    assert grown["content"] == "寻找"
    assert grown["finish_reason"] == "stop"
    assert got["leaf"] == answer["id"]
    assert got["title"] == ("什么是 求索？" + "长" * 90)[:60]
    assert {key: got[key] for key in fields} == fields
    changed = ok(page.client.patch(path, json={"title": "求索", "system": None}))
    assert (changed["title"], changed["system"], changed["model"]) == ("求索", "", "quickstart")
    [listed] = ok(page.client.get("/api/conversations"))
    assert listed["snippet"] == "寻找"
    assert listed["updated"] == changed["updated"] > got["updated"]


def test_an_edit_is_a_branch_and_the_leaf_chooses(page: Served) -> None:
    conversation = new(page.client, "first question", "first answer")
    path = f"/api/conversations/{conversation}"
    question, answer = ok(page.client.get(path))["messages"]
    edited = say(page.client, conversation, None, "user", "edited question")
    last = say(
        page.client,
        conversation,
        edited["id"],
        "assistant",
        "edited answer",
        reasoning_content="a thought",
        model="m<1>",
    )
    attachment = {"name": "a.txt", "text": "one\n```\ntwo"}
    say(page.client, conversation, last["id"], "user", "read this", attachments=[attachment])
    got = ok(page.client.get(path))
    assert len(got["messages"]) == 5
    before = got["updated"]
    markdown = page.client.get(f"{path}/export", params={"format": "md"})
    assert "edited answer" in markdown.text
    assert "first answer" not in markdown.text
    assert markdown.text.index("<summary>Thought") < markdown.text.index("edited answer")
    assert "````\none\n```\ntwo\n````" in markdown.text
    assert markdown.headers["content-type"] == "text/markdown; charset=utf-8"
    assert markdown.headers["content-disposition"].startswith("attachment;")
    ok(page.client.patch(path, json={"leaf": answer["id"]}))
    other = page.client.get(f"{path}/export").text
    assert "first answer" in other
    assert "edited" not in other
    whole = ok(page.client.get(f"{path}/export", params={"format": "json"}))
    assert whole == ok(page.client.get(path))
    assert whole["updated"] == before  # to look is not to change
    assert question["parent"] is None
    stranger = new(page.client, "another one")
    leaf = ok(page.client.get(f"/api/conversations/{stranger}"))["leaf"]
    refused(page.client.patch(path, json={"leaf": leaf}), 404)
    body = {"parent": leaf, "role": "user", "content": "?"}
    refused(page.client.post(f"{path}/messages", json=body), 404)


def test_search_finds_chinese_and_short_words(page: Served) -> None:
    poem = new(page.client, "请背一段", WORDS)
    english = new(page.client, "The Road is LONG", 'she said "100%_sure" AND left', title="Ode")
    new(page.client, "nothing of that")
    assert found(page.client, "上下而求索") == [poem]
    assert found(page.client, "求索") == [poem]  # too short for the index
    assert found(page.client, "兮") == [poem]
    assert found(page.client, "修远 求索") == [poem]
    assert found(page.client, "路漫漫 road") == []
    assert found(page.client, "road long") == [english]
    assert found(page.client, "roa") == [english]
    assert found(page.client, "ode") == [english]  # in the title
    for text in ('"100%_sure"', "100%_sure", '"', "%_", "AND left"):
        assert found(page.client, text) == [english], text
    for text in ("%%%", "___", "NOT", "sure*", "a OR b", 'x" OR "y', "NEAR(road)", "\x00", "'"):
        assert english not in found(page.client, text) or text == "\x00", text
    [hit] = ok(page.client.get("/api/conversations", params={"q": "求索"}))
    assert "求索" in hit["snippet"]


def test_search_follows_what_changes(page: Served) -> None:
    conversation = new(page.client, "question", "half an ans")
    path = f"/api/conversations/{conversation}"
    leaf = ok(page.client.get(path))["leaf"]
    assert found(page.client, "half an") == [conversation]
    ok(page.client.patch(f"{path}/messages/{leaf}", json={"content": "the whole answer"}))
    assert found(page.client, "half an") == []
    assert found(page.client, "whole answer") == [conversation]
    kept = new(page.client, "whole answer elsewhere")
    ok(page.client.delete(path))
    assert found(page.client, "whole answer") == [kept]
    refused(page.client.get(path), 404)
    refused(page.client.delete(path), 404)
    with page.house.database.write() as connection:  # the index holds just what the table does
        connection.execute("INSERT INTO message_words (message_words) VALUES ('integrity-check')")
        [messages] = connection.execute("SELECT count(*) FROM messages").fetchone()
    assert messages == 1


def test_one_keys_conversations_are_not_anothers(page: Served) -> None:
    mine = page.key("ann", "team", admin=True)
    other = page.key("bob", "team", admin=True)  # of the same account, and an administrator
    secret = new(mine, "my secret plan", "indeed")
    path = f"/api/conversations/{secret}"
    leaf = ok(mine.get(path))["leaf"]
    refused(other.get(path), 404)
    refused(other.get(f"{path}/export"), 404)
    refused(other.patch(path, json={"title": "x"}), 404)
    refused(other.delete(path), 404)
    refused(other.post(f"{path}/messages", json={"role": "user", "content": "x"}), 404)
    refused(other.patch(f"{path}/messages/{leaf}", json={"content": "x"}), 404)
    assert ok(other.get("/api/conversations")) == []
    assert found(other, "secret") == found(other, "plan") == found(other, "my") == []
    own = new(other, "my own")
    body = {"parent": leaf, "role": "user", "content": "x"}
    refused(other.post(f"/api/conversations/{own}/messages", json=body), 404)
    assert found(mine, "secret plan") == [secret]
    refused(page.client.get(path), 401)  # no key, now that there are some


def test_pages_of_a_list_have_each_once(page: Served) -> None:
    made = [new(page.client, f"question {number}") for number in range(7)]
    seen: list[str] = []
    before = None
    while True:
        params = {"limit": 3} | ({} if before is None else {"before": before})
        part = ok(page.client.get("/api/conversations", params=params))
        if not part:
            break
        seen += [one["id"] for one in part]
        before = part[-1]["updated"]
    assert seen == made[::-1]


@pytest.mark.parametrize(
    "body",
    [
        {"role": "user", "content": "x" * 2_000_001},
        {"role": "root", "content": "x"},
        {"role": "user", "content": "x", "owner": "ann"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": "x", "usage": {"a": "x" * 70_000}},
        {"role": "assistant", "content": "x", "attachments": [{"name": "a", "text": "b"}] * 17},
    ],
)
def test_a_message_that_is_none(page: Served, body: dict[str, Any]) -> None:
    conversation = new(page.client)
    refused(page.client.post(f"/api/conversations/{conversation}/messages", json=body), 422)
    assert ok(page.client.get(f"/api/conversations/{conversation}"))["messages"] == []


@pytest.mark.parametrize("where", ["title", "settings"])
def test_text_that_is_no_unicode(page: Served, where: str) -> None:
    text = '"\\ud800"'
    value = f'{{"deep": [{text}]}}' if where == "settings" else text
    headers = {"content-type": "application/json"}
    content = f'{{"{where}": {value}}}'
    refused(page.client.post("/api/conversations", content=content, headers=headers), 422)


def test_bounds(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_CONVERSATIONS", 2)
    monkeypatch.setattr(store, "MOST_MESSAGES", 2)
    monkeypatch.setattr(store, "MOST_BYTES", 1000)
    first = new(page.client, "一" * 100, "x")
    path = f"/api/conversations/{first}/messages"
    assert "begin a new one" in refused(
        page.client.post(path, json={"role": "user", "content": "x"}), 400
    )
    second = new(page.client)
    assert "delete" in refused(page.client.post("/api/conversations", json={}), 400)
    body = {"role": "user", "content": "x" * 800}
    other = f"/api/conversations/{second}/messages"
    assert "1,000 bytes" in refused(page.client.post(other, json=body), 400)
    leaf = ok(page.client.get(f"/api/conversations/{first}"))["leaf"]
    refused(page.client.patch(f"{path}/{leaf}", json={"content": "x" * 800}), 400)
    ok(page.client.delete(f"/api/conversations/{first}"))
    ok(page.client.post(other, json=body))  # there is room again


def test_a_long_chain_is_deleted_whole(tmp_path: Any) -> None:
    """SQLite nests cascades a thousand times at most: a chain of messages must not need it."""
    database = Database(tmp_path / "server.sqlite3")
    kept = Conversations(database)
    name = kept.create("me", "", None, "", {})["id"]
    parent = None
    for number in range(1500):
        message = {"parent": parent, "role": "user", "content": f"turn {number}"}
        parent = kept.add("me", name, message)["id"]
    Conversations(database)  # made again on what is there: nothing is lost
    assert len(kept.get("me", name)["messages"]) == 1500
    kept.delete("me", name)
    with database.read() as connection:
        [left] = connection.execute("SELECT count(*) FROM messages").fetchone()
    assert left == 0
    database.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    path = tmp_path_factory.mktemp("library") / "server.sqlite3"
    return Conversations(Database(path))


LETTERS = st.text(alphabet='路漫求索abA%_"\\* ', max_size=12)


@given(st.lists(LETTERS, min_size=1, max_size=5), LETTERS)
def test_search_finds_just_what_reading_everything_would(
    library: Conversations, texts: list[str], query: str
) -> None:
    owner = f"{texts} {query}"
    for one in library.latest(owner, 200):
        library.delete(owner, one["id"])
    texts_of = {}
    for text in texts:
        name = library.create(owner, "-", None, "", {})["id"]
        library.add(owner, name, {"parent": None, "role": "user", "content": text})
        texts_of[name] = text
    words = [word.lower() for word in query.split()]
    expected = {
        name for name, text in texts_of.items() if all(word in text.lower() for word in words)
    }
    assert {one["id"] for one in library.search(owner, query, 200)} == expected
