"""``saekit dashboard``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from saekit.commands.terminal.measuring import ContextSize, Dataset, Device, Excluded, Model

__all__ = ["EXAMPLES", "dashboard"]

EXAMPLES = """
    saekit dashboard runs/RUN
    saekit dashboard runs/RUN --features 1,2,5-20 --out page.html
    saekit dashboard gpt2-features --top-by logit --count 100 --window 20
    saekit dashboard runs/RUN --serve
"""


_What = Annotated[
    str,
    typer.Argument(
        help="A run folder, that of an SAE of any format, RELEASE:ID, or a feature store.",
        metavar="RUN_OR_SAE_OR_STORE",
    ),
]
_Features = Annotated[
    str | None, typer.Option(metavar="NUMBERS", help="Such as 1,2,5-20, or all. Default: 50 at random.")
]
_Random = Annotated[
    int | None, typer.Option("--random", metavar="N", help="So many features drawn from those that fire.")
]
_TopBy = Annotated[
    str | None,
    typer.Option(
        "--top-by",
        metavar="ORDER",
        help="firing, activation or logit: those that fire most often, most strongly, or raise a logit most.",
    ),
]
_Count = Annotated[int | None, typer.Option(metavar="N", help="How many --top-by takes; default: 50.")]
_OneSAE = Annotated[str | None, typer.Option(metavar="NAME", help="One of several SAEs of a store.")]
_Out = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Where the page goes; default: dashboard.html beside the feature store."),
]
_Window = Annotated[
    str, typer.Option(metavar="TOKENS", help="Before and after each token, such as 10 or 20,5; all: the context.")
]
_Labels = Annotated[str | None, typer.Option(metavar="FILE", help="JSON with what features are called, by number.")]
_Folder = Annotated[
    str | None, typer.Option(help="Where the feature store is, or goes; default: `features` beside the SAE.")
]
_Contexts = Annotated[
    int | None, typer.Option("--n-contexts", help="Contexts to look at, where nothing is collected yet.")
]
_Seed = Annotated[int, typer.Option(help="For the features and texts that are drawn.")]
_LossEffects = Annotated[
    str | None,
    typer.Option(
        "--loss-effects",
        metavar="WAY",
        help="exact or direct: how to tell what removing a feature does to the loss.  Default: exact, of an SAE and a "
        "page that is written.",
    ),
]
_NoLossEffects = Annotated[
    bool, typer.Option("--no-loss-effects", help="Say nothing of the loss, which needs no model.")
]
_Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace a file that is no dashboard.  Stores stay: see saekit features --overwrite."
    ),
]
_Serve = Annotated[
    bool, typer.Option("--serve", help="Write no page, and show all features in a browser until Ctrl-C.")
]
_Host = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Where it is served; default: this machine alone, 127.0.0.1.")
]
_Port = Annotated[int | None, typer.Option(help="And at which port; 0: any that is free. Default: 8000.")]
_AllowedHost = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", metavar="NAME", help="A name by which the server may be called."),
]


def dashboard(
    what: _What,
    features: _Features = None,
    random: _Random = None,
    top_by: _TopBy = None,
    count: _Count = None,
    sae: _OneSAE = None,
    out: _Out = None,
    window: _Window = "10",
    labels: _Labels = None,
    folder: _Folder = None,
    model: Model = None,
    dataset: Dataset = None,
    n_contexts: _Contexts = None,
    context_size: ContextSize = None,
    exclude_special_tokens: Excluded = None,
    seed: _Seed = 0,
    device: Device = "auto",
    loss_effects: _LossEffects = None,
    no_loss_effects: _NoLossEffects = False,
    overwrite: _Overwrite = False,
    serve: _Serve = False,
    host: _Host = None,
    port: _Port = None,
    allowed_host: _AllowedHost = None,
) -> None:
    """Show features, in a page that is written or served: what they fire on, with what else, and what they write."""
    from saekit.commands.dashboards import labels_in

    chosen = {"features": features, "random": random, "top-by": top_by, "count": count, "out": out}
    page = chosen | {"overwrite": overwrite or None}
    places = {"host": host, "port": port, "allowed-host": allowed_host or None}
    way = _way(loss_effects, no_loss_effects)
    _check_together(serve, page, places)
    shared: dict[str, Any] = {
        "sae": sae, "window": _window(window), "labels": None if labels is None else labels_in(labels), "seed": seed,
        "folder": folder, "model": model,
        "dataset": None if dataset is None else {"path": dataset}, "n_contexts": n_contexts,
        "context_size": context_size, "exclude_special_tokens": exclude_special_tokens,
        "device": None if device == "auto" else device,
    }  # fmt: skip
    if serve:
        _serve(what, places, way, shared)
    else:
        _write(what, chosen, way, shared | {"overwrite": overwrite})


def _write(what: str, chosen: dict[str, Any], way: str | None, shared: dict[str, Any]) -> None:
    from saekit.commands.asked import feature_numbers
    from saekit.commands.dashboards import dashboard as written

    numbers = None if chosen["features"] is None else feature_numbers(chosen["features"])
    own = {name.replace("-", "_"): value for name, value in chosen.items()} | {"features": numbers}
    place = written(what, loss_effects=way, **own, **shared)
    size = place.stat().st_size / 1e6
    address = place.resolve().as_uri()
    typer.echo(f"The dashboard is {place} ({size:.1f} MB). Open it in a browser: {address}")


def _serve(what: str, places: dict[str, Any], way: str | None, shared: dict[str, Any]) -> None:
    from saekit.commands.serving import serve_dashboard

    given = {name.replace("-host", "_hosts"): value for name, value in places.items() if value is not None}
    serve_dashboard(what, loss_effects=None if way == "auto" else way, **given, **shared)
    typer.echo("The server has ended.")


def _way(asked: str | None, none: bool) -> str | None:
    """What is asked for of the loss."""
    from saekit.errors import ConfigError

    if asked is not None and none:
        raise ConfigError("--loss-effects and --no-loss-effects contradict each other: give one of them")
    return None if none else asked or "auto"


def _check_together(serve: bool, chosen: dict[str, Any], places: dict[str, Any]) -> None:
    """What chooses features is for a page, and where they are served for a server."""
    from saekit.errors import ConfigError

    given = [f"--{name}" for name, value in (chosen if serve else places).items() if value is not None]
    if given:
        why = "--serve shows all features, and writes nothing" if serve else "that is for --serve"
        raise ConfigError(f"{', '.join(given)}: {why}; leave that out")


def _window(text: str) -> tuple[int, int] | None:
    """``10``, ``20,5`` or ``all``."""
    from saekit.errors import ConfigError

    if text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ConfigError([("window", f"must be tokens before and after, such as 10 or 20,5, or all; found {text!r}")])
    return int(parts[0]), int(parts[-1])
