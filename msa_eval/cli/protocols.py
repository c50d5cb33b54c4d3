"""``msa-eval protocols``."""

from __future__ import annotations

import click


@click.group(invoke_without_command=True)
@click.pass_context
def protocols(ctx: click.Context) -> None:
    """List the shipped protocols, or show one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_protocols)


@protocols.command("list")
def list_protocols() -> None:
    """List the shipped protocols."""
    from msa_eval.protocols.loading import load_protocol, shipped

    for name in shipped():
        protocol = load_protocol(name)
        click.echo(f"{name:16} v{protocol.version}  {protocol.description}")


@protocols.command("show")
@click.argument("name")
def show_protocol(name: str) -> None:
    """Show the protocol NAME (a shipped one, or a .toml file) as it will be run."""
    from msa_eval.protocols.loading import load_protocol

    click.echo(load_protocol(name).text(), nl=False)
