"""`qiusuo keys`, `qiusuo accounts`, `qiusuo prices`: words for what the ledger's file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(no_args_is_help=True, help="API keys: who may ask, and how much.")
accounts = typer.Typer(no_args_is_help=True, help="Accounts and their balances.")
prices = typer.Typer(no_args_is_help=True, help="What a million tokens cost.")

DatabaseOption = Annotated[
    Path | None, typer.Option(help="The server's file; without it the one beside the cache.")
]
KeyArgument = Annotated[str, typer.Argument(help="A key's id, or its name.")]
ModelsOption = Annotated[
    list[str] | None, typer.Option("--model", help="Only this model (repeatable).")
]
RpmOption = Annotated[str | None, typer.Option(help="Requests a minute; none: no limit.")]
TpmOption = Annotated[str | None, typer.Option(help="Tokens a minute; none: no limit.")]
ConcurrencyOption = Annotated[str | None, typer.Option(help="Requests at once; none: no limit.")]
BudgetOption = Annotated[str | None, typer.Option(help="Money in all; none: no limit.")]


def _database(given: Path | None) -> Path:
    from qiusuo.server.settings import default_database

    return given or default_database()


@keys.command("make")
def make_key(
    name: Annotated[str, typer.Argument(help="For whom or for what.")],
    account: Annotated[str, typer.Option(help="Who pays.")] = "main",
    model: ModelsOption = None,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    concurrency: ConcurrencyOption = None,
    budget: BudgetOption = None,
    admin: Annotated[bool, typer.Option("--admin", help="May manage keys and runs.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Make a key and print its secret, this once."""
    from qiusuo.server import keys_command

    keys_command.make_key(
        _database(database),
        name,
        account,
        models=model,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        budget=budget,
        admin=admin,
    )


@keys.command("list")
def list_keys(database: DatabaseOption = None) -> None:
    """All keys, what they may do and have spent."""
    from qiusuo.server import keys_command

    keys_command.list_keys(_database(database))


@keys.command("change")
def change_key(
    key: KeyArgument,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    model: ModelsOption = None,
    rpm: RpmOption = None,
    tpm: TpmOption = None,
    concurrency: ConcurrencyOption = None,
    budget: BudgetOption = None,
    admin: Annotated[bool | None, typer.Option(help="May manage keys and runs.")] = None,
    database: DatabaseOption = None,
) -> None:
    """Change a key's limits, from its next request on."""
    from qiusuo.server import keys_command

    keys_command.change_key(
        _database(database),
        key,
        name=name,
        models=model,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        budget=budget,
        admin=admin,
    )


@keys.command("revoke")
def revoke_key(key: KeyArgument, database: DatabaseOption = None) -> None:
    """End a key for good."""
    from qiusuo.server import keys_command

    keys_command.revoke_key(_database(database), key)


@accounts.command("list")
def list_accounts(database: DatabaseOption = None) -> None:
    """What every account has, and whether the ledger adds up."""
    from qiusuo.server import keys_command

    keys_command.list_accounts(_database(database))


@accounts.command("top-up")
def top_up(
    account: Annotated[str, typer.Argument()],
    sum: Annotated[str, typer.Argument(help="A decimal; a negative one is taken out again.")],
    granted: Annotated[bool, typer.Option("--granted", help="As a gift, used up first.")] = False,
    note: Annotated[str, typer.Option(help="Why.")] = "",
    token: Annotated[
        str | None, typer.Option(help="The same movement with the same token is made once.")
    ] = None,
    database: DatabaseOption = None,
) -> None:
    """Put money into an account, made if need be."""
    from qiusuo.server import keys_command

    keys_command.top_up(_database(database), account, sum, granted=granted, note=note, token=token)


@accounts.command("open")
def open_account(
    account: Annotated[str, typer.Argument()],
    prepaid: Annotated[bool, typer.Option("--prepaid", help="The other way round.")] = False,
    database: DatabaseOption = None,
) -> None:
    """Let an account go below zero, to be billed later."""
    from qiusuo.server import keys_command

    keys_command.open_account(_database(database), account, open=not prepaid)


@prices.command("list")
def list_prices(database: DatabaseOption = None) -> None:
    """The prices in force, and their hours."""
    from qiusuo.server import keys_command

    keys_command.list_prices(_database(database))


@prices.command("set")
def set_price(
    model: Annotated[str, typer.Argument()],
    hit: Annotated[str, typer.Argument(help="Prompt tokens found in the cache, a million.")],
    miss: Annotated[str, typer.Argument(help="Prompt tokens not found there, a million.")],
    output: Annotated[str, typer.Argument(help="Tokens of the answer, a million.")],
    database: DatabaseOption = None,
) -> None:
    """What a model costs from now on, at all hours."""
    from qiusuo.server import keys_command

    keys_command.set_price(_database(database), model, hit, miss, output)


@prices.command("load")
def load_prices(
    file: Annotated[Path, typer.Argument(help="A price file in TOML; see docs/server.md.")],
    database: DatabaseOption = None,
) -> None:
    """Take over a price file, peak hours and all."""
    from qiusuo.server import keys_command

    keys_command.load_prices(_database(database), file)
