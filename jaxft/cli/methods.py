"""`jaxft methods`: what the registry holds."""

import json
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show only this method, with every option.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")] = False,
) -> None:
    """List the tuning methods: id, family, paper, options with their defaults.

    The options of a method are the keys beside its name in the configuration:

        method: {name: lora, rank: 16}

    and a list is a chain, each method working on what the ones before left frozen:

        method: [{name: lora, rank: 16}, {name: hft}]

    [bold]Examples[/bold]

        jaxft methods

        jaxft methods hft

        jaxft methods --json | jq '.[].id'
    """
    from jaxft.methods.registry import get_method
    from jaxft.methods.registry import methods as registered

    entries = [get_method(name)] if name else list(registered().values())
    if as_json:
        typer.echo(json.dumps([_record(entry) for entry in entries], indent=2, default=str))
    elif name:
        _print_one(entries[0])
    else:
        _print_all(entries)


def _record(entry: Any) -> dict[str, Any]:
    return {
        "id": entry.id,
        "family": entry.family,
        "summary": entry.summary,
        "paper": {"title": entry.title, "url": entry.url},
        "learning_rate": entry.learning_rate,
        "mergeable": entry.mergeable,
        "options": [{"name": o.name, "type": o.type, "default": o.default, "help": o.help} for o in entry.options],
    }


def _print_all(entries: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("what it does, and its options", ratio=1)
    for entry in entries:
        options = ", ".join(f"{o.name}={_plain(o.default)}" for o in entry.options) or "no options"
        table.add_row(
            f"[bold]{entry.id}[/bold]", entry.family, f"{_escape(entry.summary)}\n[dim]{_escape(options)}[/dim]"
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\n{len(entries)} methods. `jaxft methods NAME` shows one with its paper and the meaning of its options."
    )


def _print_one(entry: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{entry.id}[/bold]  ({entry.family})\n{_escape(entry.summary)}\n")
    if entry.url:
        console.print(f"Paper: {_escape(entry.title)}\n       {entry.url}", soft_wrap=True)
    if entry.learning_rate is not None:
        console.print(f"Learning rate to start from: {entry.learning_rate:g} (AdamW)")
    if not entry.mergeable:
        console.print("Its result cannot be merged into plain weights: export it with --delta.")
    if not entry.options:
        console.print("\nIt has no options.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("option", "type", "default"):
        table.add_column(column, no_wrap=True)
    table.add_column("meaning", ratio=1)
    for option in entry.options:
        table.add_row(option.name, _escape(option.type), _escape(_plain(option.default)), _escape(option.help))
    console.print()
    console.print(table)


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
