"""The command line, put together: each command stands in a file of :mod:`saekit.commands.terminal`.

Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from saekit._version import __version__
from saekit.commands.terminal import (
    bench,
    bench_synthetic,
    cache,
    compare,
    config,
    convert_config,
    dashboard,
    demo,
    evals,
    export,
    features,
    plan,
    plugins,
    pretokenize,
    push,
    saes,
    show,
    statistics,
    train,
    tsea,
    watch,
)  # fmt: skip
from saekit.commands.terminal.arguments import examples
from saekit.commands.terminal.ending import last_words
from saekit.commands.terminal.warned import Warned
from saekit.errors import PluginWarning, SaekitError

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """The command; after Ctrl-C a word, which typer does not say, where the command has said none itself."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            last_words(error, str(error) or "interrupted")
            raise typer.Exit(128 + signal.SIGINT) from error


app = typer.Typer(
    name="saekit",
    cls=_Commands,
    help="Train, load and study sparse autoencoders on language models.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("""
    saekit demo
    saekit config > run.toml
    saekit train run.toml
"""),
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


app.command("train", epilog=examples(train.EXAMPLES))(train.train)
app.command("demo", epilog=examples(demo.EXAMPLES))(demo.demo)
app.command("config", epilog=examples(config.EXAMPLES))(config.config)
app.command("convert-config", epilog=examples(convert_config.EXAMPLES))(convert_config.convert_config)
app.command("plugins", epilog=examples(plugins.EXAMPLES))(plugins.plugins)
app.command("plan", epilog=examples(plan.EXAMPLES))(plan.plan)
app.command("pretokenize", epilog=examples(pretokenize.EXAMPLES))(pretokenize.pretokenize)
app.command("show", epilog=examples(show.EXAMPLES))(show.show)
app.command("compare", epilog=examples(compare.EXAMPLES))(compare.compare)
app.command("eval", epilog=examples(evals.EXAMPLES))(evals.evaluate)
app.command("features", epilog=examples(features.EXAMPLES))(features.features)
app.command("dashboard", epilog=examples(dashboard.EXAMPLES))(dashboard.dashboard)
app.command("push", epilog=examples(push.EXAMPLES))(push.push)
app.command("statistics", epilog=examples(statistics.EXAMPLES))(statistics.statistics)
app.command("tsea", epilog=examples(tsea.EXAMPLES))(tsea.tsea)
app.command("watch", epilog=examples(watch.EXAMPLES))(watch.watch)
app.command("bench", epilog=examples(bench.EXAMPLES))(bench.bench)
app.command("bench-synthetic", epilog=examples(bench_synthetic.EXAMPLES))(bench_synthetic.bench_synthetic)
app.add_typer(cache.app, name="cache", epilog=examples(cache.EXAMPLES))
app.add_typer(export.app, name="export", epilog=examples(export.EXAMPLES))
app.add_typer(saes.app, name="saes", epilog=examples(saes.EXAMPLES))


def main() -> NoReturn:
    """The console script: errors in one paragraph, exit code 2 for the user's mistakes, 1 for saekit's."""
    debug = "--debug" in sys.argv[1:]
    _make_printable()
    warned = _quiet_warnings()
    try:
        code = app(standalone_mode=False)
        warned.show_kept()
        _leave(code if isinstance(code, int) else 0)
    except SaekitError as error:
        if debug:
            raise
        last_words(error, "\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
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
        last_words(error, "\n".join([*lines, "This is a fault of saekit or of a plugin; --debug shows where."]))
        _leave(1)


def _make_printable() -> None:
    """What an output cannot encode is shown as ``?``, and one that is closed takes everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _quiet_warnings() -> Warned:
    """Warnings as one line each; a left-out plugin is worth seeing, a library's deprecation is not."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, (PluginWarning, UserWarning, RuntimeWarning)) and not issubclass(
            category, DeprecationWarning
        ):
            warned.show(str(message))

    warned, warnings.showwarning = Warned(), show
    return warned


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
