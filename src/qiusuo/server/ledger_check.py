"""An audit of the ledger: everything added up anew, from the postings alone."""

from __future__ import annotations

import sqlite3

_FAULTS = (
    (
        "all postings sum to {0}, not to 0",
        "SELECT sum(amount) FROM postings HAVING sum(amount) <> 0",
    ),
    (
        "transaction {0} sums to {1}",
        "SELECT entry, sum(amount) FROM postings GROUP BY entry HAVING sum(amount) <> 0",
    ),
    (
        "transaction {0} has {1} postings, and needs two at least",
        "SELECT id, count(entry) FROM transactions LEFT JOIN postings ON entry = id "
        "GROUP BY id HAVING count(entry) < 2",
    ),
    (
        "the balance of {0} is {1}, and its postings sum to {2}",
        "SELECT account, coalesce(b.amount, 0), coalesce(p.amount, 0) FROM "
        "(SELECT account FROM balances UNION SELECT account FROM postings) "
        "LEFT JOIN balances b USING (account) LEFT JOIN "
        "(SELECT account, sum(amount) AS amount FROM postings GROUP BY account) p USING (account) "
        "WHERE coalesce(b.amount, 0) <> coalesce(p.amount, 0)",
    ),
    (
        "account {0} has {1} reserved, and its open requests have {2}",
        "SELECT name, coalesce(amount, 0) AS held, coalesce(taken, 0) AS wanted FROM accounts "
        "LEFT JOIN balances ON account = 'user:' || name || ':reserved' "
        "LEFT JOIN (SELECT account AS holder, sum(granted + topped_up) AS taken "
        "FROM reservations WHERE state = 'reserved' GROUP BY account) ON holder = name "
        "WHERE held <> wanted",
    ),
    (
        "key {0} has {1} spent and {2} reserved, and its requests {3} and {4}",
        "SELECT id, spent, reserved, "
        "(SELECT coalesce(sum(amount), 0) FROM usage WHERE key = id) AS paid, "
        "(SELECT coalesce(sum(granted + topped_up), 0) FROM reservations "
        "WHERE key = id AND state = 'reserved') AS taken "
        "FROM keys WHERE spent <> paid OR reserved <> taken",
    ),
    (
        "usage comes to {0}, and revenue to {1}",
        "SELECT (SELECT coalesce(sum(amount), 0) FROM usage) AS used, "
        "(SELECT coalesce(sum(amount), 0) FROM postings WHERE account = 'house:revenue') AS earned "
        "WHERE used <> earned",
    ),
    (
        "request {0} is {1}, and its movements say otherwise",
        "SELECT request, state FROM reservations r WHERE granted + topped_up > 0 AND ("
        "NOT EXISTS (SELECT 1 FROM transactions t WHERE t.request = r.request "
        "AND kind = 'reserve') OR "
        "(state = 'settled') <> EXISTS (SELECT 1 FROM transactions t WHERE t.request = r.request "
        "AND kind = 'settle') OR "
        "(state = 'refunded') <> EXISTS (SELECT 1 FROM transactions t WHERE t.request = r.request "
        "AND kind = 'refund'))",
    ),
    (
        "request {0} is {1}, and usage says otherwise",
        "SELECT request, state FROM reservations LEFT JOIN usage u USING (request) "
        "WHERE (state = 'settled') <> (u.amount IS NOT NULL)",
    ),
    ("{0} row {1} refers to nothing in {2}", "PRAGMA foreign_key_check"),
)
_TOLD = 5  # of each kind


def find_faults(connection: sqlite3.Connection) -> list[str]:
    """What does not add up, in words; empty when all does."""
    return [
        words.format(*row)
        for words, query in _FAULTS
        for row in connection.execute(query).fetchmany(_TOLD)
    ]
