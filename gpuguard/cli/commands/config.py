"""``gpuguard config``: show what is set and who set it, check a file, print the schema."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click

from gpuguard import config_sources
from gpuguard.cli.arguments import policy_of
from gpuguard.cli.output import EXIT_USAGE, complain
from gpuguard.ui.markup import visible


@click.group()
def command() -> None:
    """Show, check and describe the settings.

    \b
    Examples:
      gpuguard config show --origin
      gpuguard config validate /etc/gpuguard/conf.d/site.toml
      gpuguard config schema > gpuguard.schema.json
      gpuguard config import-opensandbox policy.json --sandbox sb-1 > /etc/gpuguard/policies.d/sb-1.yaml
    """


@command.command()
@click.option("--origin", is_flag=True, help="Say beside each value where it comes from.")
@click.option("-o", "--output", type=click.Choice(["toml", "json"]), default="toml", help="Form of the output.")
def show(*, origin: bool, output: str) -> None:
    """Print every setting as it would be used now."""
    import msgspec

    loaded = _or_exit(None)
    rows = [(key, config_sources.value_of(loaded.config, key)) for key in config_sources.all_keys()]
    if output == "json":
        content = {key: {"value": value, "origin": loaded.origins[key]} if origin else value for key, value in rows}
        click.echo(msgspec.json.format(msgspec.json.encode(content)).decode())
        return
    section = ""
    for key, value in rows:
        head, name = key.split(".")
        if head != section:
            click.echo(f"{'' if not section else chr(10)}[{head}]")
            section = head
        said = f"  # {loaded.origins[key]}" if origin else ""
        # TOML writes text, truths, numbers and lists of text as JSON does.
        click.echo(visible(f"{name} = {msgspec.json.encode(value).decode()}{said}"))


@command.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
def validate(file: Path | None) -> None:
    """Check FILE (settings in TOML, or a policy in YAML), or all of this host. Exit status 0: good, 2: not."""
    if file and file.suffix in (".yaml", ".yml"):
        policy_of([file])
        click.echo("good: a policy")
        return
    loaded = _or_exit([file] if file else None)
    if file is None:
        policy_of(None)
    given = sum(origin != "default" for origin in loaded.origins.values())
    click.echo(f"good: {given} of {len(loaded.origins)} settings given, the rest are defaults")


@command.command()
def schema() -> None:
    """Print the JSON Schema of a settings file."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(config_sources.json_schema())).decode())


@command.command()
@click.argument("file", type=click.File())
@click.option("--name", default="opensandbox", show_default=True, help="Name of the section.")
@click.option("--sandbox", "sandbox_ids", metavar="ID", multiple=True,
              help="A sandbox that it is about; everybody if none is named. May be repeated.")
def import_opensandbox(file: IO[str], name: str, sandbox_ids: tuple[str, ...]) -> None:
    """Print OpenSandbox's network policy in FILE (JSON, - for stdin) as a policy file with an egress section."""
    from gpuguard.integrations.opensandbox import policy_text
    from gpuguard.policies import FILE_BYTES_MAX, PolicyError

    try:
        click.echo(policy_text(file.read(FILE_BYTES_MAX + 1), name, sandbox_ids), nl=False)
    except (PolicyError, UnicodeDecodeError) as error:
        complain(f"gpuguard: {file.name}: {error}")
        raise SystemExit(EXIT_USAGE) from error


def _or_exit(files: list[Path] | None) -> config_sources.Loaded:
    try:
        # A file that is checked by itself is checked without the environment of whoever asks.
        return config_sources.load_config(files=files, environ={} if files else None)
    except config_sources.ConfigError as error:
        complain(f"gpuguard: {error}")
        raise SystemExit(EXIT_USAGE) from error
