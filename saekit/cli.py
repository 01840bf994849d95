"""The command line.  Nothing here imports torch before a command needs it."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from saekit import __version__
from saekit.errors import ConfigError, PluginWarning, SaekitError, UnknownKeyError

__all__ = ["app", "main"]

app = typer.Typer(
    name="saekit",
    help="Train, load and study sparse autoencoders on language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        typer.echo(f"saekit {__version__}")
        raise typer.Exit


Overrides = Annotated[list[str] | None, typer.Argument(help="Options to change, as section.option=value.")]


@app.command("train")
def _train(
    config: Annotated[str, typer.Argument(help="A TOML, YAML or JSON file; `saekit config` prints one to start from.")],
    overrides: Overrides = None,
) -> None:
    """Train an SAE as a configuration file says."""
    from saekit.config_files import load_config

    checked = load_config(config, overrides or ())  # before torch is imported, so that mistakes show at once
    from saekit.training.run import train

    with _interruptible():
        result = train(checked)
    for name, value in sorted(result.metrics.items()):
        if name.startswith("evals/"):
            typer.echo(f"{name.removeprefix('evals/'):24} {value:.6g}")
    typer.echo(f"run folder: {result.folder}")


@app.command("demo")
def _demo(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where the run folder goes.")] = "saekit-demo",
) -> None:
    """Train an SAE on the embedded model and Python's own sources, offline, and show what it found."""
    from saekit.demo import demo

    with _interruptible():
        demo(folder, overrides or ())


@app.command("config")
def _config(
    config: Annotated[str | None, typer.Argument(help="Check this file and print it in full.")] = None,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", help="toml, yaml or json.")] = "toml",
) -> None:
    """Print the full default configuration, commented; or check a file and print what it means."""
    from saekit.config_files import commented_toml, dump_config, load_config

    if form not in ("toml", "yaml", "json"):
        raise ConfigError([("--format", f"must be toml, yaml or json, found {form!r}")])
    if config is None and form == "toml":
        typer.echo(commented_toml(), nl=False)
    else:
        typer.echo(dump_config(load_config(config or {}, overrides or ()), form), nl=False)


@app.command("plugins")
def _plugins(
    entry: Annotated[str | None, typer.Argument(help="KIND:KEY shows that plugin's options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List every plugin, or one plugin's options with types, defaults and explanations."""
    from saekit import plugin_listing as listing
    from saekit.manager import default_manager

    manager = default_manager()
    if entry is None:
        data: Any = listing.overview(manager)
        typer.echo(json.dumps(data, indent=2) if as_json else listing.table(data))
        return
    kind, colon, key = entry.partition(":")
    if not colon:
        raise UnknownKeyError(f"{entry!r} is not KIND:KEY, such as lr_schedules:cosine. `saekit plugins` lists them")
    detail = listing.detail(manager.get(listing.kind_named(kind), key))
    typer.echo(json.dumps(detail, indent=2) if as_json else listing.detail_text(detail))


class _DefaultCommand(typer.core.TyperGroup):
    """``saekit cache run.toml`` means ``saekit cache write run.toml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = ["write", *args]
        return super().parse_args(ctx, args)


cache_app = typer.Typer(
    cls=_DefaultCommand, no_args_is_help=True, rich_markup_mode=None, help="Write activations to disk, or check them."
)
app.add_typer(cache_app, name="cache")


@cache_app.command("write")
def _cache_write(
    config: Annotated[str, typer.Argument(help="The configuration of the training run that will read the cache.")],
    overrides: Overrides = None,
) -> None:
    """Write the model's activations on the training text to disk (also: saekit cache CONFIG).

    Interrupted, it goes on after the last finished shard when it is called again.
    """
    from saekit.config_files import load_config

    checked = load_config(config, overrides or ())
    from saekit.data.cache.make import cache_activations

    folder = checked.activations.cache.folder
    with _interruptible("interrupted; finished shards are kept, and the same command goes on after them"):
        manifest = cache_activations(checked)
    typer.echo(f"{manifest.rows:,} activations of {', '.join(s.site.name for s in manifest.sites)} in {folder}")
    typer.echo(f'train on them with: activations.source={{name="cached", folder="{folder}"}}')


@cache_app.command("verify")
def _cache_verify(
    folder: Annotated[str, typer.Argument(help="The folder that `saekit cache` wrote.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and a sample of each file, not all of it.")] = False,
) -> None:
    """Compare every file of a cache with its checksum."""
    from pathlib import Path

    from saekit.data.cache.manifest import verify_cache

    manifest = verify_cache(Path(folder), full=not quick)
    typer.echo(f"{folder}: {len(manifest.shards)} shards, {manifest.rows:,} activations per site, all as written")


@contextmanager
def _interruptible(message: str = "interrupted") -> Iterator[None]:
    """Says where the work is after Ctrl-C or SIGTERM, and exits with 130 or 143; typer would exit without a word."""
    received = [signal.SIGINT]

    def terminate(number: int, frame: object) -> None:
        received[0] = signal.SIGTERM
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        _complain(str(error) or message)
        raise typer.Exit(128 + received[0]) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> NoReturn:
    """The console script: errors in one paragraph, exit code 2 for the user's mistakes, 1 for saekit's."""
    debug = "--debug" in sys.argv[1:]
    _quiet_warnings()
    try:
        code = app(standalone_mode=False)
        _leave(code if isinstance(code, int) else 0)
    except SaekitError as error:
        if debug:
            raise
        _complain(f"error: {error}")
        _leave(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            show: Any = error
            show.show()
            _leave(2)
        if debug:
            raise
        _complain(
            f"error: {type(error).__name__}: {error}\nThis is a fault of saekit or of a plugin; --debug shows where."
        )
        _leave(1)


def _quiet_warnings() -> None:
    """Warnings as one line each; a left-out plugin is worth seeing, a library's deprecation is not."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, (PluginWarning, UserWarning, RuntimeWarning)) and not issubclass(
            category, DeprecationWarning
        ):
            _complain(f"warning: {message}")

    warnings.showwarning = show


def _complain(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
