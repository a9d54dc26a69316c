"""A ledger's life at random beside a plain model of it: dictionaries, and no database."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qiusuo.server.database import Database
from qiusuo.server.keys import Keys
from qiusuo.server.ledger import (
    InsufficientBalance,
    Ledger,
    LedgerError,
    OverBudget,
    Settled,
    Used,
)
from qiusuo.server.prices import Price
from qiusuo.server.usage import UsageReports


@dataclass
class Asked:
    """What the plain model knows of a request."""

    account: str
    budgeted: bool
    most: int
    granted: int
    state: str = "reserved"
    cost: int = 0


ACCOUNTS = st.sampled_from(["main", "local"])
REQUESTS = st.sampled_from([f"r{number}" for number in range(12)])
BUDGET = 150


class LedgerLife(RuleBasedStateMachine):
    """The ledger beside a plain model: dictionaries, and no database."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.open()
        self.key = Keys(self.database).make("somebody", budget=BUDGET)[0]
        self.granted, self.paid = {"main": 0, "local": 0}, {"main": 0, "local": 0}
        self.requests: dict[str, Asked] = {}
        self.tokens: dict[str, tuple[str, int, bool]] = {}

    def open(self) -> None:
        self.database = Database(self.folder / "money.sqlite3")
        self.ledger = Ledger(self.database)

    @rule(
        account=ACCOUNTS,
        amount=st.integers(1, 100),
        granted=st.booleans(),
        token=st.sampled_from("abcdefgh"),
    )
    def top_up(self, account: str, amount: int, granted: bool, token: str) -> None:
        wanted = (account, amount, granted)
        if self.tokens.get(token, wanted) != wanted:
            with pytest.raises(LedgerError):
                self.ledger.top_up(account, amount, granted=granted, token=token)
            return
        first = token not in self.tokens
        assert self.ledger.top_up(account, amount, granted=granted, token=token) == first
        self.tokens[token] = wanted
        if first:
            (self.granted if granted else self.paid)[account] += amount

    @rule(request=REQUESTS, account=ACCOUNTS, budgeted=st.booleans(), most=st.integers(0, 80))
    def reserve(self, request: str, account: str, budgeted: bool, most: int) -> None:
        budgeted = budgeted and account == "main"
        words = (request, self.key if budgeted else None, account, "m", most, Price(0, 0, 1))
        before = self.requests.get(request)
        if before is not None:
            same = (before.account, before.budgeted, before.most, before.state)
            if same == (account, budgeted, most, "reserved"):
                self.ledger.reserve(*words)
                return
            with pytest.raises(LedgerError):
                self.ledger.reserve(*words)
            return
        granted, paid = self.granted[account], self.paid[account]
        over_budget = budgeted and most and self.taken() + most > BUDGET
        if over_budget or (account == "main" and most and most > granted + paid):
            with pytest.raises(OverBudget if over_budget else InsufficientBalance):
                self.ledger.reserve(*words)
            return
        self.ledger.reserve(*words)
        gift = min(granted, most)
        self.granted[account] -= gift
        self.paid[account] -= most - gift
        self.requests[request] = Asked(account, budgeted, most, gift)

    @rule(request=REQUESTS, share=st.integers(0, 110))
    def settle(self, request: str, share: int) -> None:
        asked = self.requests.get(request)
        cost = 0 if asked is None else asked.most * share // 100
        if asked is None or asked.state == "refunded":
            with pytest.raises(LedgerError):
                self.ledger.settle(request, Used("m", 0, 0, cost))
            return
        told = self.ledger.settle(request, Used("m", 0, 0, cost))
        if asked.state == "reserved":
            asked.state, asked.cost = "settled", cost
            self.give_back(asked, asked.most - cost)
        assert told == Settled(asked.cost, max(0, asked.cost - asked.most))

    @rule(request=REQUESTS)
    def refund(self, request: str) -> None:
        asked = self.requests.get(request)
        if asked is None:
            with pytest.raises(LedgerError):
                self.ledger.refund(request)
            return
        assert self.ledger.refund(request) == (asked.state == "reserved")
        self.refunded(asked)

    @rule()
    @precondition(lambda self: self.requests)
    def crash_and_open_again(self) -> None:
        """As the kernel does when a process is killed: locks fall, nothing else is done."""
        self.ledger._owner._file.close()
        self.open()
        left = [asked for asked in self.requests.values() if asked.state == "reserved"]
        assert self.ledger.release_stale() == len(left)
        for asked in left:
            self.refunded(asked)

    def refunded(self, asked: Asked) -> None:
        if asked.state == "reserved":
            asked.state = "refunded"
            self.give_back(asked, asked.most)

    def give_back(self, asked: Asked, rest: int) -> None:
        """Gifts were spent first, so what was paid comes back first; below zero: charged more."""
        paid = min(rest, asked.most - asked.granted)
        gift = rest - paid
        if rest < 0:
            gift = -min(-rest, max(0, self.granted[asked.account]))
            paid = rest - gift
        self.granted[asked.account] += gift
        self.paid[asked.account] += paid

    def taken(self) -> int:
        mine = [asked for asked in self.requests.values() if asked.budgeted]
        return sum(
            {"reserved": asked.most, "settled": asked.cost, "refunded": 0}[asked.state]
            for asked in mine
        )

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        held = dict.fromkeys(self.granted, 0)
        for asked in self.requests.values():
            held[asked.account] += asked.most if asked.state == "reserved" else 0
        for account in held:
            has = self.ledger.balance(account)
            assert has.granted == self.granted[account]
            assert has.topped_up == self.paid[account]
            assert has.reserved == held[account]
        key = Keys(self.database).get(self.key.id)
        assert key.spent + key.reserved == self.taken()
        spent = sum(asked.cost for asked in self.requests.values())
        assert UsageReports(self.database).total().amount == spent

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.ledger.close()
            self.database.close()
            shutil.rmtree(self.folder)


TestLedgerLife = LedgerLife.TestCase
TestLedgerLife.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
