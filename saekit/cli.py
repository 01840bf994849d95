"""The command line.  Nothing here imports torch before a command needs it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from saekit._version import __version__
from saekit.errors import ConfigError, PluginWarning, SaekitError, UnknownKeyError
from saekit.plugins.text import printable

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


ConfigFile = Annotated[
    str, typer.Argument(help="A TOML, YAML or JSON file; or the first of the options, if the rest are the defaults.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Options to change, as section.option=value.")]


def _source(config: str, overrides: list[str] | None) -> tuple[Any, list[str]]:
    """What to load, and the overrides on top; ``a.b=value`` in the place of the file means that there is none."""
    given = overrides or []
    no_file = "=" in config and not os.path.exists(config)  # noqa: PTH110 - pathlib would be imported for it alone
    return ({}, [config, *given]) if no_file else (config, given)


@app.command("train")
def _train(
    config: Annotated[
        str | None,
        typer.Argument(help="A TOML, YAML or JSON file; or the first of the options, if the rest are the defaults."),
    ] = None,
    overrides: Overrides = None,
    axes: Annotated[
        list[str] | None,
        typer.Option("--grid", help="section.option=value,value,...: train an SAE for each, on one run of the model."),
    ] = None,
    run: Annotated[str | None, typer.Option("--resume", help="Go on with the run in this folder.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="With --resume: an option that may differ from before.")
    ] = None,
) -> None:
    """Train an SAE as a configuration file says, or one for each point of a grid; or go on with a run."""
    if run is None and (config is None or allow):
        missing = "a configuration file is missing" if config is None else "--allow goes with --resume"
        raise ConfigError(f"{missing}: saekit train run.toml, or saekit train --resume RUN")
    if run is not None and axes:
        raise ConfigError("--grid starts a new run, and --resume goes on with one; give one of them")
    if run is not None:
        from saekit.files.paths import as_path
        from saekit.runs.place import check_is_run

        check_is_run(as_path(run))  # before anything is imported that is for runs
    source, given = ({}, []) if config is None else _source(config, overrides)
    from saekit.config.files import load_config, parse_grid

    if run is None:
        wanted: Any = load_config(source, given)  # before torch is imported, so that mistakes show at once
    if axes:
        from saekit.runs.sweep import grid

        wanted = grid(wanted, parse_grid(axes))
    from saekit.commands.jobs import resume, train

    with _interruptible():
        _report(train(wanted) if run is None else resume(run, source or None, given, allow=allow or ()))


def _report(result: Any) -> None:
    """What came of a run or a sweep; exits with 1 if some of its SAEs diverged."""
    if not hasattr(result, "summary"):
        for name, value in sorted(result.metrics.items()):
            if name.startswith("evals/"):
                typer.echo(f"{name.removeprefix('evals/'):24} {value:.6g}")
        typer.echo(f"run folder: {result.folder}")
        return
    from rich.console import Console

    from saekit.reports.table import summary_table

    console = Console(width=None if sys.stdout.isatty() else 1000)
    console.print(summary_table(result.summary, console))
    typer.echo(f"sweep folder: {result.folder}")
    for name, why in result.diverged.items():
        _complain(f"{name} diverged: {why}")
    if result.diverged:
        raise typer.Exit(1)


@app.command("demo")
def _demo(
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where the run folder goes.")] = "saekit-demo",
) -> None:
    """Train an SAE on the embedded model and Python's own sources, offline, and show what it found."""
    from saekit.commands.demo import demo

    with _interruptible():
        demo(folder, overrides or ())


@app.command("config")
def _config(
    config: Annotated[str | None, typer.Argument(help="Check this file and print it in full.")] = None,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--format", help="toml, yaml or json.")] = "toml",
    of: Annotated[str, typer.Option("--of", help="train or pretokenize.")] = "train",
) -> None:
    """Print the full default configuration, commented; or check a file and print what it means."""
    from saekit.config import PretokenizeConfig, TrainConfig
    from saekit.config.files import commented_toml, dump_config, load_config

    kinds: dict[str, Any] = {"train": TrainConfig, "pretokenize": PretokenizeConfig}
    if of not in kinds:
        raise ConfigError([("--of", f"must be {' or '.join(kinds)}, found {of!r}")])
    if form not in ("toml", "yaml", "json"):
        raise ConfigError([("--format", f"must be toml, yaml or json, found {form!r}")])
    if config is None and form == "toml":
        typer.echo(commented_toml(of), nl=False)
    else:
        typer.echo(dump_config(load_config(config or {}, overrides or (), kind=kinds[of]), form), nl=False)


@app.command("plugins")
def _plugins(
    entry: Annotated[str | None, typer.Argument(help="KIND:KEY shows that plugin's options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List every plugin, or one plugin's options with types, defaults and explanations."""
    from saekit.plugins import listing
    from saekit.plugins.manager import default_manager

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


@app.command("plan")
def _plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check a run without training, and say what it needs and how long it takes; exits with 2 if it could not run."""
    from saekit.commands import preflight
    from saekit.commands.jobs import plan
    from saekit.config.files import load_config
    from saekit.plugins.manager import default_manager

    checked = load_config(*_source(config, overrides))
    early: list[str] = [] if as_json else preflight.of_training([checked], default_manager()).texts
    for text in early:  # now, and not when the model has run
        typer.echo(f"problem: {text}")
    sys.stdout.flush()
    found = plan(checked)
    if as_json:
        import attrs

        typer.echo(json.dumps(attrs.asdict(found), indent=2))
    else:
        width = max(map(len, found.facts), default=0)
        for name, text in found.facts.items():
            typer.echo(f"{name:{width}}  {text}")
        for text in found.warnings:
            typer.echo(f"warning: {text}")
        for text in found.problems[len(early) :]:
            typer.echo(f"problem: {text}")
    if found.problems:
        raise typer.Exit(2)


@app.command("pretokenize")
def _pretokenize(
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Pack text into shuffled contexts, on disk or on the Hub, that `train` reads with dataset.path alone.

    `saekit config --of pretokenize` prints every option. A file is not needed: saekit pretokenize
    dataset.path=book.txt tokenizer=gpt2 folder=contexts
    """
    from saekit.commands.jobs import pretokenize
    from saekit.config import PretokenizeConfig
    from saekit.config.files import load_config

    checked = load_config(*_source(config, overrides), kind=PretokenizeConfig)

    with _interruptible("interrupted; nothing was written"):
        made = pretokenize(checked)
    where = " and ".join(place for place in (made.folder, made.hub_repo_id) if place)
    typer.echo(f"{made.contexts:,} contexts of {made.context_size} tokens in {where}")
    typer.echo(f"train on them with: {shlex.quote(f'dataset.path={made.folder or made.hub_repo_id}')}")


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
    config: ConfigFile,
    overrides: Overrides = None,
) -> None:
    """Write the model's activations on the training text to disk (also: saekit cache CONFIG).

    CONFIG is that of the training run that will read them; what is written is said by activations.cache. Interrupted,
    it goes on after the last finished shard when it is called again.
    """
    from saekit.commands.jobs import cache_activations
    from saekit.config.files import load_config

    checked = load_config(*_source(config, overrides))
    folder = checked.activations.cache.folder
    with _interruptible("interrupted; finished shards are kept, and the same command goes on after them"):
        manifest = cache_activations(checked)
    typer.echo(f"{manifest.rows:,} activations of {', '.join(s.site.name for s in manifest.sites)} in {folder}")
    source = f'activations.source={{name="cached", folder={json.dumps(folder)}}}'
    typer.echo(f"train on them with: {shlex.quote(source)}")


@cache_app.command("verify")
def _cache_verify(
    folder: Annotated[str, typer.Argument(help="The folder that `saekit cache` wrote.")],
    quick: Annotated[bool, typer.Option("--quick", help="Sizes and a sample of each file, not all of it.")] = False,
) -> None:
    """Compare every file of a cache with its checksum."""
    from saekit.data.cache.manifest import Manifest, verify_cache
    from saekit.files.paths import as_path
    from saekit.progress import ProgressDisplay

    size = Manifest.load(as_path(folder)).nbytes
    with ProgressDisplay(size, doing="verifying", unit="bytes") as progress:
        manifest = verify_cache(as_path(folder), full=not quick, report=progress.update)
    typer.echo(f"{folder}: {len(manifest.shards)} shards, {manifest.rows:,} activations per site, all as written")


@app.command("show")
def _show(
    folder: Annotated[
        str, typer.Argument(help="A run folder, a sweep's, that of a saved SAE, or one of several runs.")
    ],
    draw: Annotated[bool, typer.Option("--draw", help="Draw the pictures anew, from the metrics as they are.")] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Open the pictures in a browser.")] = False,
) -> None:
    """Show what there is of a run: its numbers, its pictures, its best features, and what to type next."""
    from rich.console import Console

    from saekit.commands.show import show

    show(folder, Console(width=None if sys.stdout.isatty() else 1000), draw=draw, open_it=open_it)


@app.command("watch")
def _watch(
    folder: Annotated[str, typer.Argument(help="The run folder, which may be still to come.")],
    every: Annotated[
        float | None, typer.Option("--every", min=0.1, help="Seconds between two looks; without a terminal, lines.")
    ] = None,
) -> None:
    """Watch a run that trains in another process, or on another machine over a shared disk, until it ends."""
    from rich.console import Console

    from saekit.commands.watch import watch

    try:
        watch(folder, Console(width=None if sys.stdout.isatty() else 1000), every=every)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


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
        raise typer.Exit(128 + getattr(error, "signal", received[0])) from error
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
        _complain("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
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
        lines = [f"error: {type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        _complain("\n".join([*lines, "This is a fault of saekit or of a plugin; --debug shows where."]))
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
    sys.stderr.write(printable(text.rstrip(), keep="\n\t") + "\n")  # strangers' texts are among them


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
