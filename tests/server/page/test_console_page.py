"""Console, as whoever runs a server has it: a real server, its database, Chromium."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from qiusuo.server.database import Database
from qiusuo.server.ledger import Ledger
from qiusuo.server.prices import Price
from qiusuo.server.settlement import Used
from tests.server.page.browser import browser
from tests.server.page.site import PHONE, Site, site, too_wide, visits

SECTIONS = ("engine", "usage", "keys", "accounts", "prices")
# Money of one day: (days ago, model, tokens from the cache, others, written), at 1, 2 and 4 CNY for
# a million.
USED = (
    (0, "small", 1000, 2000, 3000),
    (1, "small", 0, 5000, 1000),
    (1, "large", 400_000, 100_000, 50_000),
)
PRICE = Price(hit=1000, miss=2000, output=4000)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def place(chromium, tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("console")
    write_usage(folder / "server.sqlite3")
    with site(folder) as one:
        yield one


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., Any]]:
    with visits(chromium) as opener:
        yield opener


def write_usage(path: Path) -> None:
    """Requests of yesterday and today, charged by the ledger itself."""
    moment = [datetime.now(UTC)]
    database = Database(path)
    ledger = Ledger(database, clock=lambda: moment[0])
    ledger.open_account("local", open=True)
    for number, (days, model, hit, miss, output) in enumerate(USED):
        moment[0] = datetime.now(UTC) - timedelta(days=days)
        ledger.reserve(f"r{number}", None, "local", model, 10**9, PRICE)
        ledger.settle(f"r{number}", Used(model, hit, miss, output))
    ledger.close()
    database.close()


def section(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def row(page: Any, name: str) -> Any:
    """The row of a table that begins with this name."""
    return page.locator("tr").filter(has=page.locator("th[scope=row]").filter(has_text=name))


def cells(page: Any, name: str) -> list[str]:
    row(page, name).first.wait_for()
    return row(page, name).first.locator("td").all_inner_texts()


# -- keys ---------------------------------------------------------------------------------------


def test_a_key_is_made_seen_once_limited_and_revoked(visit, tmp_path):
    with site(tmp_path) as place:
        page = visit(f"{place.address}/console?s=keys")
        page.get_by_role("button", name="Make a key").click()
        page.get_by_text("This is the first key.").wait_for()
        assert page.get_by_label("Administrator", exact=False).is_checked()
        page.get_by_label("Name", exact=True).fill("boss")
        page.get_by_role("button", name="Make it").click()
        boss = page.get_by_label("The new key", exact=True).last.input_value()
        assert re.fullmatch(r"sk-\w{48}", boss)
        keys = f"{place.address}/api/console/keys"
        assert httpx.get(keys).status_code == 401  # the door is closed
        page.get_by_role("button", name="I have it").click()
        row(page, "boss").wait_for()  # and the page has the key
        assert boss not in page.content()

        page.get_by_role("button", name="Make a key").click()
        page.get_by_label("Name", exact=True).fill("shop")
        page.get_by_label("Account", exact=True).fill("shop-account")
        page.get_by_label("Requests a minute").fill("60")
        page.get_by_label("Budget in all (CNY)").fill("2.5")
        page.get_by_role("button", name="Make it").click()
        shop = page.get_by_label("The new key", exact=True).last.input_value()
        page.get_by_role("button", name="Copy").click()
        page.get_by_role("button", name="Copied").wait_for()
        page.get_by_role("button", name="I have it").click()
        account, models, limits, spent = cells(page, "shop")[:4]
        assert (account, models, limits) == ("shop-account", "every model", "60 requests/min")
        assert spent == "0.00 of 2.50"

        def me() -> httpx.Response:
            return httpx.get(f"{place.address}/api/me", headers={"authorization": f"Bearer {shop}"})

        assert me().json()["name"] == "shop"
        row(page, "shop").get_by_role("button", name="Change").click()
        page.get_by_label("Requests a minute").fill("")
        page.get_by_label("At once").fill("3")
        page.get_by_role("button", name="Save").click()
        row(page, "shop").get_by_text("3 at once").wait_for()
        told = httpx.get(keys, headers={"authorization": f"Bearer {boss}"}).json()[1]
        assert (told["rpm"], told["concurrency"], told["budget"]) == (None, 3, "2.50")

        row(page, "shop").get_by_role("button", name="Revoke").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        page.get_by_text("Revoked keys (1)").wait_for()
        assert me().status_code == 401
        row(page, "boss").get_by_role("button", name="Revoke").click()
        page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
        page.get_by_text("this is the last administrator's key").wait_for()


def test_who_is_no_administrator_sees_what_is_theirs(visit, tmp_path):
    with site(tmp_path) as place:
        keys = f"{place.address}/api/console/keys"
        boss = httpx.post(keys, json={"name": "boss", "admin": True}).json()["secret"]
        shop = httpx.post(
            keys, json={"name": "shop"}, headers={"authorization": f"Bearer {boss}"}
        ).json()["secret"]
        page = visit(f"{place.address}/console")
        page.get_by_placeholder("sk-…").fill(shop)
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("What your key has used").wait_for()
        assert page.get_by_role("tab").all_inner_texts() == ["Usage", "Prices"]
        page.get_by_text("Nothing was asked in this time.").wait_for()
        section(page, "Prices")
        page.get_by_text("No price is set").wait_for()
        assert page.get_by_role("button", name="Set a price").count() == 0


# -- money --------------------------------------------------------------------------------------


def test_an_account_is_topped_up(place, visit):
    page = visit(f"{place.address}/console?s=accounts")
    page.get_by_role("button", name="Top up").first.click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Account").fill("firm")
    dialog.get_by_label("Amount (CNY)", exact=False).fill("25.5")
    dialog.get_by_role("button", name="Top up").click()
    page.get_by_text("The balance of firm is now 25.50 CNY.").wait_for()
    assert cells(page, "firm")[:4] == ["25.50 CNY", "25.50", "0.00", "0.00"]

    row(page, "firm").get_by_role("button", name="Top up").click()
    dialog.get_by_label("Amount (CNY)", exact=False).fill("-30")
    dialog.get_by_role("button", name="Top up").click()
    dialog.get_by_role("alert").wait_for()  # there is not so much to take out
    dialog.get_by_label("Amount (CNY)", exact=False).fill("1.000000001")
    dialog.get_by_label("Granted", exact=False).check()
    dialog.get_by_role("button", name="Top up").click()
    dialog.wait_for(state="detached")
    row(page, "firm").get_by_text("26.50").wait_for()
    assert row(page, "firm").get_by_title("26.500000001 CNY").count() == 1  # to the last digit
    accounts = httpx.get(f"{place.address}/api/console/accounts").json()
    assert [one["total"] for one in accounts if one["name"] == "firm"] == ["26.500000001"]


def test_prices_are_set_with_their_peak_hours(place, visit):
    page = visit(f"{place.address}/console?s=prices")
    page.get_by_text("No price is set").wait_for()
    page.get_by_role("button", name="Set a price").click()
    page.get_by_label("Model", exact=True).fill("*")
    for kind, price in (("Cache hit", "0.0001"), ("Cache miss", "1"), ("Output", "2")):
        page.get_by_label(kind, exact=True).fill(price)
    page.get_by_role("button", name="Add Beijing's").click()
    page.get_by_role("button", name="Save").click()
    page.get_by_role("alert").get_by_text("0.0001").wait_for()  # no whole nano-unit a token
    page.get_by_label("Cache hit", exact=True).fill("0.02")
    page.get_by_role("button", name="Save").click()
    hit, miss, output, hours = cells(page, "every other model")[:4]
    assert (hit, miss, output) == ("0.02", "1.00", "2.00")
    assert hours.splitlines() == [
        "Mon–Fri 09:00–12:00 ×2 (Asia/Shanghai)",
        "Mon–Fri 14:00–18:00 ×2 (Asia/Shanghai)",
    ]
    row(page, "every other model").get_by_role("button", name="Change").click()
    page.get_by_label("Output", exact=True).fill("3")
    page.get_by_role("button", name="Sat").first.click()
    page.get_by_role("button", name="Remove these hours").last.click()
    page.get_by_role("button", name="Save").click()
    row(page, "every other model").get_by_text("Mon–Sat 09:00–12:00").wait_for()
    book = httpx.get(f"{place.address}/api/console/prices").json()
    assert [(one["output"], len(one["windows"])) for one in book["prices"]] == [("3.00", 1)]


# -- usage --------------------------------------------------------------------------------------


def test_usage_by_day_model_and_key(place, visit):
    page = visit(f"{place.address}/console?s=usage", timezone_id="UTC")
    assert cells(page, "large") == ["1", "400,000", "100,000", "50,000", "0", "0.80 CNY"]
    assert cells(page, "small") == ["2", "1,000", "7,000", "4,000", "0", "0.031 CNY"]
    assert cells(page, "Total")[-1] == "0.831 CNY"
    bars = page.get_by_role("figure", name="By day: spending")
    bars.locator(".st-key b").filter(has_text="CNY").first.wait_for()
    assert bars.locator(".st-key").all_inner_texts() == ["large\n0.80 CNY", "small\n0.031 CNY"]
    page.get_by_role("button", name="tokens", exact=True).click()
    bars = page.get_by_role("figure", name="By day: tokens")
    bars.locator(".st-key b").filter(has_text="K").first.wait_for()
    assert bars.locator(".st-key").all_inner_texts() == ["large\n550K", "small\n12K"]

    page.get_by_role("button", name="key", exact=True).click()
    assert cells(page, "this machine, without a key")[0] == "3"
    page.get_by_role("button", name="day", exact=True).click()
    page.locator("tbody tr").nth(1).wait_for()
    assert [one.inner_text() for one in page.locator("tbody tr td:nth-child(2)").all()] == [
        "1",
        "2",
    ]  # the latest first
    with page.expect_download() as loading:
        page.get_by_role("button", name="Download CSV").click()
    table = list(csv.reader(io.StringIO(Path(loading.value.path()).read_text())))
    assert table[0] == ["day", "requests", "hit", "miss", "output", "reasoning", "CNY"]
    assert [line[-1] for line in table[1:]] == ["0.814", "0.017"]


def test_bars_are_stacked(place, visit):
    """Yesterday's bar holds both models' colours, today's the small one's alone."""
    page = visit(f"{place.address}/console?s=usage", timezone_id="UTC")
    page.get_by_role("button", name="requests", exact=True).click()
    page.get_by_role("button", name="7 days").click()
    bars = page.get_by_role("figure", name="By day: requests")
    bars.locator(".st-key b").filter(has_text="2").first.wait_for()
    page.wait_for_function(  # the bars of thirty days may be there for a moment
        """() => {
            const canvas = document.querySelector(".st-lead canvas");
            if (!canvas) return false;
            const box = canvas.getBoundingClientRect();
            const over = document.querySelector(".st-lead .u-over").getBoundingClientRect();
            const ratio = canvas.width / box.width, context = canvas.getContext("2d");
            const colours = (day) => {
                const x = (over.left - box.left + (over.width * (day + 0.6)) / 7.2) * ratio;
                const y = (over.top - box.top) * ratio;
                const { data } = context.getImageData(x, y, 1, over.height * ratio);
                const seen = {};
                for (let i = 0; i < data.length; i += 4) {
                    const colour = data.slice(i, i + 3);
                    if (data[i + 3] === 255) seen[colour] = (seen[colour] ?? 0) + 1;
                }
                return Object.entries(seen).filter(([, count]) => count > 20).length;
            };
            return String([0, 5, 6].map(colours)) === "0,2,1";
        }"""
    )


# -- engines ------------------------------------------------------------------------------------


def test_no_engine_is_said_and_one_that_cannot_be_loaded_refused(place, visit):
    page = visit(f"{place.address}/console")
    page.get_by_text("No model is being served").wait_for()
    page.get_by_role("button", name="Load a model").click()
    page.get_by_label("A model that was pulled, or a run").fill("/etc/passwd")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_role("alert").get_by_text("is neither a model that was pulled").wait_for()


# -- everywhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_in_chinese(place, visit, theme):
    page = visit(f"{place.address}/console", color_scheme=theme, **PHONE)
    page.get_by_role("heading", name="控制台").wait_for()
    for name in ("引擎", "用量", "密钥", "账户", "价格"):
        section(page, name)
        page.locator(".spinner").wait_for(state="detached")
        assert too_wide(page) == []


def test_a_section_has_an_address(place, visit):
    for name in SECTIONS:
        page = visit(f"{place.address}/console?s={name}")
        page.locator(f"#st-tab-{name}[aria-selected=true]").wait_for()
    page.get_by_role("tab", name="Prices").press("ArrowRight")
    page.wait_for_url("**/console?s=engine")
