"""Every hook of saekit: the reference for plugin authors.

A plugin is a module with functions of these names, marked ``@saekit.hookimpl``, and one line in its distribution's
``pyproject.toml``::

    [project.entry-points.saekit]
    my_plugin = "my_package.my_module"

Each hook takes no argument and returns an iterable of :class:`saekit.Entry`.  Hooks are called once, when the
plugins are loaded, never in the training loop.  ``Entry.config`` is a frozen attrs class with the plugin's options;
``Entry.build`` makes the thing itself: a function with the heavy imports inside, or the import path of a class or
function in a module of its own (``"my_package.module:MyClass"``), which is imported on use.

``Entry.precheck(config, whole)``, which may be left out, is called before any of that, with the options and the
configuration that they are part of (a :class:`saekit.config.TrainConfig`; for a model backend also a
:class:`saekit.config.PretokenizeConfig`), and raises a :class:`saekit.errors.SaekitError` for what it can see to be
wrong without heavy imports.  The protocols named below are
in :mod:`saekit.protocols`; what ``build`` returns is checked for their names.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from saekit.plugins.registry import Entry

hookspec = pluggy.HookspecMarker("saekit")
hookimpl = pluggy.HookimplMarker("saekit")


@hookspec
def saekit_register_model_backends() -> Iterable[Entry]:
    """Language models to read activations from (``model.backend``).

    ``build(config, *, model: saekit.config.ModelConfig, loaded: object | None) -> ModelBackend``

    ``loaded`` is the in-memory model that the caller passed to ``saekit.train(model=...)``, else None: load
    ``model.name`` then.  Raise :class:`saekit.errors.ModelError` for a name that cannot be loaded.  An entry with
    ``no_model=True`` stands for having none, as the built-in ``none`` does.  With an ``outline`` `saekit plan` counts
    memory and disk before anything large is downloaded: see :class:`saekit.Entry`.
    """


@hookspec
def saekit_register_activation_functions() -> Iterable[Entry]:
    """The SAE's non-linearity (``sae.activation``).

    ``build(config) -> ActivationFunction``: pre-activations ``[..., d_sae]`` to feature activations of that shape,
    differentiable by autograd.
    """


@hookspec
def saekit_register_pretrained_loaders() -> Iterable[Entry]:
    """Formats of saved SAEs (``SAE.load(path, loader=...)``).

    ``build(config) -> PretrainedLoader``: says whether a folder or Hub repository is of its format, and reads it
    into a :class:`saekit.pretrained.PretrainedSAE`.
    """


@hookspec
def saekit_register_lr_schedules() -> Iterable[Entry]:
    """Learning rates (``lr_schedule``).

    ``build(config, *, lr: float, steps: int) -> LRSchedule``: the main schedule's own ``steps`` steps, from the peak
    ``lr``.  The kernel puts the linear warm-up before and the linear decay after it, and keeps the last rate when a
    run takes more steps than it was to (its batches were not full).
    """


@hookspec
def saekit_register_sae_architectures() -> Iterable[Entry]:
    """SAE architectures (``sae``).

    ``config`` derives from :class:`saekit.SAEConfig`.
    ``build(config, *, ports: saekit.Ports, activation: ActivationFunction) -> saekit.SAE``: uninitialized, on the
    CPU; the kernel initializes, moves and loads it.
    """


@hookspec
def saekit_register_activation_sources() -> Iterable[Entry]:
    """Where training batches come from (``activations.source``).

    ``build(config, *, stream: saekit.data.StreamContext) -> ActivationSource``: the context holds the backend, the
    sites, the batch size and the seed, and opens the packed contexts when they are asked for.  Each batch has rows at
    every one of the sites, of the same tokens.  A source that states the widths of its activations
    (:class:`saekit.abilities.StatesWidths`) and opens no text (``Entry(needs_text=False)``) works without a language
    model, too: ``stream.has_model`` says whether there is one.
    """


@hookspec
def saekit_register_trackers() -> Iterable[Entry]:
    """Where metrics go (``trackers``).

    ``build(config, *, run: saekit.values.RunInfo) -> Tracker``: the run's name, folder and full configuration.
    """


@hookspec
def saekit_register_evals() -> Iterable[Entry]:
    """Measurements on held-out text (``evals.run``).

    ``build(config, *, run: saekit.values.EvalRun) -> Eval``: takes an SAE, a backend, the sites that it reads and
    writes, and contexts; returns named numbers.  Those that read no text say so (``Entry(needs_text=False)``).
    """


@hookspec
def saekit_register_optimizers() -> Iterable[Entry]:
    """What updates the weights (``optimizer``).

    ``config`` derives from :class:`saekit.config.OptimizerConfig`.
    ``build(config, *, groups: list[dict[str, Any]], lr: float) -> Optimizer``: ``groups`` are parameters with their
    settings, as :mod:`torch.optim` takes them; the kernel clips gradients and sets each group's rate before every step,
    times its ``lr_factor``.  Lists beside ``params`` say of each parameter its name (``names``), whether its rows are
    kept at norm 1 (``unit_rows``), and whether it is shown as the transpose of what the SAE has (``transposed``).
    """


@hookspec
def saekit_register_input_transforms() -> Iterable[Entry]:
    """What activations go through before the SAE reads them (``activations.normalize_activations``).

    ``build(config) -> InputTransform``: a :class:`saekit.transforms.RowTransform`, which stays a part of the SAE and is
    saved with it, or a :class:`saekit.transforms.WholeTransform`, which is estimated at the start and folded into the
    weights.
    """


@hookspec
def saekit_register_releases() -> Iterable[Entry]:
    """Published SAEs, by names under which :meth:`saekit.SAE.from_pretrained` and `saekit saes` find them.

    ``build(config) -> ReleaseList``: its ``releases()`` are :class:`saekit.pretrained.Release`.  What
    :func:`saekit.pretrained.read_releases` makes of a TOML file is one.  It is built with the defaults of its options,
    and its releases have the qualified names ``distribution:name``.
    """


@hookspec
def saekit_register_step_kernels() -> Iterable[Entry]:
    """Faster steps of architectures that others wrote.

    ``build(config) -> saekit.kernels.StepKernel``, for the architectures that ``Entry.serves`` names and the types of
    device in its ``devices``.  Where it does not refuse an SAE, it is taken before the kernels that the architecture
    lists; its steps must be those of autograd.  It is built with the defaults of its options, where what it
    ``requires`` is installed.
    """
