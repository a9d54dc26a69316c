"""What the commands print, and what they do to a database beside a running server."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qiusuo.data.errors import DataError
from qiusuo.server import keys_command as command
from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import Ledger, OverBudget
from qiusuo.server.prices import Price, PriceBook

Shown = Callable[[], tuple[str, str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "money.sqlite3"


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    monkeypatch.setenv("COLUMNS", "200")

    def shown() -> tuple[str, str]:
        told = capsys.readouterr()
        return told.out, told.err

    return shown


def test_a_secret_is_all_that_goes_to_the_output(path: Path, shown: Shown) -> None:
    command.make_key(path, "Ann [red]", "ann", models=["m"], rpm="60", budget="12.50", admin=True)
    secret, note = shown()
    assert re.fullmatch(r"sk-\w{48}\n", secret)
    assert secret.strip() not in note
    key = Keys(Database(path)).find(secret.strip())
    assert (key.rpm, key.tpm, key.budget, key.models, key.admin) == (
        60, None, 12_500_000_000, ("m",), True
    )  # fmt: skip
    command.list_keys(path)
    told = "".join(shown())
    assert secret.strip() not in told
    for word in (key.id, "Ann [red]", "ann", key.prefix, "60 a minute", "12.50", "admin"):
        assert word in told


def test_keys_are_changed_and_revoked_by_id_or_name(path: Path, shown: Shown) -> None:
    database = Database(path)
    keys = Keys(database)
    key, secret = keys.make("laptop", rpm=5)
    command.change_key(path, "laptop", rpm="none", tpm="9000", budget="0")
    assert "9,000 tokens a minute" in shown()[1]
    changed = keys.find(secret)
    assert (changed.rpm, changed.tpm, changed.budget) == (None, 9000, 0)
    ledger = Ledger(database)  # a server that runs meets the new budget at once
    ledger.open_account("main", open=True)
    with pytest.raises(OverBudget):
        ledger.reserve("r", key, "main", "m", 1, Price(0, 0, 1))
    keys.make("laptop")
    with pytest.raises(DataError, match="2 keys"):
        command.revoke_key(path, "laptop")
    command.revoke_key(path, key.id)
    assert keys.find(secret) is None
    command.list_keys(path)
    assert "revoked" in shown()[0]


@pytest.mark.parametrize(
    "change",
    [{}, {"rpm": "0"}, {"rpm": "many"}, {"rpm": "-1"}, {"tpm": "1.5"}, {"budget": "a lot"},
     {"budget": "-1"}, {"name": ""}],
)  # fmt: skip
def test_what_is_no_change_is_refused(path: Path, change: dict[str, str]) -> None:
    keys = Keys(Database(path))
    key, _ = keys.make("laptop", rpm=5)
    with pytest.raises(DataError):
        command.change_key(path, key.id, **change)
    with pytest.raises(DataError, match="no key 'desktop'"):
        command.change_key(path, "desktop", rpm="1")
    assert keys.list() == [key]


def test_money_comes_and_goes(path: Path, shown: Shown) -> None:
    command.top_up(path, "ann", "100")
    command.top_up(path, "ann", "0.02", granted=True, note="welcome", token="t")
    assert "100.02 CNY" in shown()[1]
    command.top_up(path, "ann", "0.02", granted=True, token="t")
    assert "nothing was moved" in shown()[1]
    command.top_up(path, "ann", "-99.5")
    assert "0.52 CNY" in shown()[1]
    with pytest.raises(DataError, match=r"0\.50 topped up"):
        command.top_up(path, "ann", "-0.51")
    with pytest.raises(DataError):
        command.top_up(path, "ann", "0")
    command.open_account(path, "bob", open=True)
    command.list_accounts(path)
    told, note = shown()
    assert re.search(r"ann +0\.52 +0\.02 +0\.00 +prepaid", told)
    assert re.search(r"bob +0\.00 +0\.00 +0\.00 +open", told)
    assert "adds up" in note
    assert [file.name for file in path.parent.iterdir() if "-server-" in file.name] == []


def test_prices_are_set_and_shown(path: Path, shown: Shown, tmp_path: Path) -> None:
    command.list_prices(path)
    assert "no price was set" in shown()[1]
    command.set_price(path, "m", "0.02", "1", "4")
    assert re.search(r"m +0\.02 +1\.00 +4\.00", shown()[0])
    assert PriceBook(Database(path)).price("m") == Price(20, 1000, 4000)
    file = tmp_path / "prices.toml"
    file.write_text(
        '[[window]]\nstart = "09:00"\nend = "12:00"\n[model.n]\nhit = 0.1\nmiss = 1\noutput = 2\n',
        encoding="utf-8",
    )
    command.load_prices(path, file)
    told, note = shown()
    assert "1 new price of" in note
    assert "09:00-12:00 Asia/Shanghai x2" in told
    with pytest.raises(DataError, match=r"0\.021"):
        command.set_price(path, "m", "0.0207", "1", "4")
