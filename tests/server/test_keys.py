"""Keys: shown once, found by their secret alone, never told again."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qiusuo.server.accounts import AccountError
from qiusuo.server.database import Database
from qiusuo.server.keys import Keys, KeysError
from qiusuo.server.ledger import Ledger


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "money.sqlite3")
    yield database
    database.close()


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def test_a_key_is_found_by_its_secret(keys: Keys) -> None:
    limits = {"rpm": 60, "tpm": 9000, "concurrency": 4, "budget": 10**9, "admin": True}
    key, secret = keys.make("Ann's laptop", "ann", models=("a", "b"), **limits)
    other, _ = keys.make("second")
    assert keys.find(secret) == keys.get(key.id) == key
    assert (key.name, key.account, key.models) == ("Ann's laptop", "ann", ("a", "b"))
    assert {name: getattr(key, name) for name in limits} == limits
    assert (other.account, other.models, other.rpm, other.budget) == ("main", None, None, None)
    assert other.admin is False
    assert keys.list() == [key, other]


@pytest.mark.parametrize("change", [str.lower, str.strip, lambda s: s[:-1], lambda s: s + "\n"])
def test_another_secret_finds_nothing(keys: Keys, change: object) -> None:
    key, secret = keys.make("one")
    assert (keys.find(change(secret)) == key) == (change(secret) == secret)
    for wrong in ("", "sk-", "x" * 10**5, "\udc80", key.id, key.prefix, "' OR 1=1 --"):
        assert keys.find(wrong) is None


def test_secrets_are_long_and_drawn_anew(keys: Keys) -> None:
    secrets = {keys.make("k")[1] for _ in range(20)}
    assert len(secrets) == 20
    assert all(re.fullmatch("sk-[0-9A-Za-z]{48}", secret) for secret in secrets)
    assert 44 * math.log2(62) > 256  # beside the four letters that are kept
    assert len(set("".join(secrets))) > 60


def test_a_secret_is_kept_nowhere(
    keys: Keys, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        key, secret = keys.make("one")
        keys.find(secret)
        keys.revoke(key.id)
    assert key.prefix == f"sk-...{secret[-4:]}"
    assert secret[3:-4] not in repr(key) + repr(dataclasses.asdict(key)) + caplog.text
    files = [path.read_bytes() for path in database.path.parent.iterdir()]
    assert any(hashlib.sha256(secret.encode()).hexdigest().encode() in text for text in files)
    assert not any(secret[3:-4].encode() in text for text in files)


def test_a_revoked_key_is_found_no_more_and_still_counts(keys: Keys) -> None:
    assert not keys.any()
    key, secret = keys.make("one")
    assert keys.any()
    revoked = keys.revoke(key.id)
    assert revoked.revoked is not None
    assert keys.revoke(key.id) == revoked
    assert keys.find(secret) is None
    assert keys.any()  # or the last key's end would open the server to all
    with pytest.raises(KeysError, match="was revoked"):
        keys.change(key.id, rpm=1)


def test_what_is_changed_holds_and_the_rest_stays(keys: Keys) -> None:
    key, secret = keys.make("one", rpm=5, budget=7, models=["a"])
    changed = keys.change(key.id, rpm=None, name="two", admin=True)
    assert keys.find(secret) == changed
    assert changed == dataclasses.replace(key, rpm=None, name="two", admin=True)
    assert keys.change(key.id) == changed
    assert keys.change(key.id, models=()).models == ()  # none at all


@pytest.mark.parametrize(
    "limits",
    [{"rpm": 0}, {"rpm": -1}, {"tpm": 1.5}, {"concurrency": True}, {"concurrency": "4"},
     {"budget": -1}, {"budget": 0.5}, {"budget": 10**18}, {"models": "all"}, {"models": [""]},
     {"models": [3]}, {"rpm": 2**40}, {"colour": "red"}, {"id": "x"}, {"hash": "x"},
     {"spent": 0}, {"admin": "no"}, {"name": ""}, {"name": "a\nb"}, {"name": "x" * 101}],
)  # fmt: skip
def test_what_is_no_limit_is_refused(keys: Keys, limits: dict[str, object]) -> None:
    key, _ = keys.make("one")
    with pytest.raises(KeysError):
        keys.change(key.id, **limits)
    with pytest.raises(KeysError):
        keys.make(**({"name": "two"} | limits))
    assert keys.list() == [key]


@pytest.mark.parametrize("account", ["", "a:b", " a", "a\n", "x" * 101])
def test_an_account_has_a_plain_name(keys: Keys, account: str) -> None:
    with pytest.raises(AccountError):
        keys.make("one", account)
    assert not keys.any()


def test_an_unknown_key_is_named(keys: Keys) -> None:
    for step in (keys.get, keys.revoke, keys.change):
        with pytest.raises(KeysError, match="no key 'key-x'"):
            step("key-x")


def test_a_new_key_has_an_account_without_money(keys: Keys, database: Database) -> None:
    keys.make("one", "阿明")
    ledger = Ledger(database)
    assert (ledger.balance("阿明").total, ledger.balance("阿明").open) == (0, False)
    assert [account.name for account in ledger.accounts()] == ["local", "阿明"]
    ledger.close()
