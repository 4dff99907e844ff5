"""The smaller commands: `cache` handles the tables of latencies, `zoo` fetches real models."""

from __future__ import annotations

from pathlib import Path

import click

from onnx_lowrank import cache as tables
from onnx_lowrank import output, terminal
from onnx_lowrank.options import PATH, PROVIDER_OPTION, options
from onnx_lowrank.providers import Provider, parse_options
from onnx_lowrank.settings import default_cache


@click.group()
def cache() -> None:
    """The tables of measured latencies."""


_folder = click.option("--cache", "folder", type=PATH, default=default_cache, help="Folder of the latency tables.")
_key = (
    click.option("--provider", default="cpu", show_default=True, help="Execution provider of the table."),
    click.option("--threads", type=int, default=1, show_default=True, help="Intra-op threads of the table."),
    PROVIDER_OPTION,
)


@cache.command("ls")
@options(_folder, *_key)
def cache_ls(folder: Path, provider: str, threads: int, provider_options: tuple[str, ...]) -> None:
    """List the tables; a star marks the one of this machine and these settings."""
    terminal.show_cache(tables.entries(folder, Provider(provider, parse_options(provider_options)), threads), folder)


@cache.command("clear")
@options(_folder)
def cache_clear(folder: Path) -> None:
    """Delete all tables."""
    click.echo(f"{tables.clear(folder)} tables deleted from {folder}")


@cache.command("export")
@click.argument("target", type=PATH)
@options(
    _folder, *_key, click.option("--precision", default="", help="Precision of the table, as `cache ls` shows it.")
)
def cache_export(
    target: Path, folder: Path, provider: str, threads: int, provider_options: tuple[str, ...], precision: str
) -> None:
    """Write this machine's table to TARGET, to plan with it elsewhere: --cache TARGET."""
    output.check(target, None)
    chosen = Provider(provider, parse_options(provider_options))
    entry = tables.export(folder, target, chosen, threads, precision)
    click.echo(f"{entry.times} times of {entry.geometries} geometries written to {target}")


@cache.command("import")
@click.argument("source", type=PATH)
@options(_folder)
def cache_import(source: Path, folder: Path) -> None:
    """Put the exported table SOURCE into the cache."""
    entry = tables.bring(folder, source)
    click.echo(f"{entry.path} holds {entry.times} times of {entry.geometries} geometries")


@click.group()
def zoo() -> None:
    """Real models to try it on, out of PyPI packages."""


@zoo.command("ls")
def zoo_ls() -> None:
    """List the models."""
    from onnx_lowrank.models import CATALOGUE

    terminal.show_catalogue(CATALOGUE)


@zoo.command("get")
@click.argument("name")
@click.option("-o", "--output", "folder", type=PATH, default=Path("zoo"), show_default=True, help="Folder for it.")
@click.option("--samples", type=click.IntRange(min=1), help="How many inputs to make [default: as `zoo ls` says].")
def zoo_get(name: str, folder: Path, samples: int | None) -> None:
    """Download model NAME and make its real calibration inputs."""
    from onnx_lowrank.models import get

    fetched = get(name, folder, samples=samples)
    click.echo(f"{fetched.model}\n{fetched.inputs}")
    click.echo(f"try: onnx-lowrank optimize {fetched.model} -o {fetched.model.stem}-lr.onnx --data {fetched.inputs}")
