"""Sections of a run's configuration that several keys of sae-lens make up: what they are here."""

from __future__ import annotations

import re

from saekit_plugins.loaders.sae_lens.run_work import Work

__all__ = ["devices", "evals", "folder", "rates", "source", "trackers"]

_GENERATED = re.compile(r"(?:\w+-)?\d+-(?:L1-.+-)?LR-.+-Tokens-[\d.]+e[+-]\d+")
"""Names of runs that sae-lens makes where nobody gives one, the same for every run of one file."""


def devices(work: Work) -> None:
    device, model = str(work.take("device") or "cpu"), work.take("llm_device")
    model = device if model in (None, "None") else str(model)
    work.set("training.device", device, "device")
    work.set("model.device", model, "llm_device")
    work.renamed["llm_device"] = "model.device"
    store = work.take("act_store_device")
    default = "with_model" if work.version < 6 else device
    store = default if store in (None, "None") else str(store)
    work.set("activations.source.act_store_device", store, "act_store_device")


def rates(work: Work) -> None:
    lr, end, cycles = work.left.get("lr"), work.take("lr_end"), work.take("n_restart_cycles")
    name = str(work.take("lr_scheduler_name") or "constant").lower()
    work.set("lr_schedule.name", name, "lr_scheduler_name")
    if name == "constant":
        work.dropped |= {"lr_end": "is of the cosine schedules", "n_restart_cycles": "is of the cosine schedules"}
        return
    if end is None and isinstance(lr, int | float):
        end = lr / 10
    if end is not None:
        work.set("lr_schedule.end", end, "lr_end")
    if "restarts" in name:
        work.set("lr_schedule.n_restart_cycles", cycles or 1, "n_restart_cycles")
    elif cycles is not None:
        work.dropped["n_restart_cycles"] = "is of the schedule with restarts"


def evals(work: Work) -> None:
    """Batches of prompts there; contexts here, and steps."""
    batches, prompts = work.take("n_eval_batches"), work.take("eval_batch_size_prompts")
    each = prompts or work.left.get("store_batch_size_prompts")
    if batches and each:
        work.set("evals.n_contexts", batches * each, "n_eval_batches")
    if prompts:
        both = [{"name": name, "batch_size_prompts": prompts} for name in ("reconstruction", "downstream")]
        work.set("evals.run", both, "eval_batch_size_prompts")
    prefix = "logger." if work.version >= 6 else ""
    logs, steps = work.take(f"{prefix}eval_every_n_wandb_logs"), work.left.get(f"{prefix}wandb_log_frequency")
    if logs and steps:
        work.set("evals.every_n_steps", logs * steps, f"{prefix}eval_every_n_wandb_logs")


def source(work: Work) -> None:
    folder = work.take("cached_activations_path")
    if not work.take("use_cached_activations", False):
        work.dropped["use_cached_activations"] = "is false, as it is here"
        if folder is not None:
            work.dropped["cached_activations_path"] = "is not used there"
        return
    work.set("activations.source.name", "cached", "use_cached_activations")
    work.set("activations.source.folder", folder or "activations", "cached_activations_path")
    work.lost["use_cached_activations"] = "caches of sae-lens are of another format: write one with `saekit cache`"
    work.without("activations.source.act_store_device")
    work.leave_out(
        ("n_batches_in_buffer", "store_batch_size_prompts", "prefetch_llm_batches"),
        "is of activations that are made while training, and these are cached",
    )


def trackers(work: Work) -> None:
    prefix = "logger." if work.version >= 6 else ""
    wanted = work.take(f"{prefix}log_to_wandb", False)
    tracker = {"name": "wandb"}
    for option in ("project", "entity"):
        value = work.take(f"{prefix}wandb_{option}")
        if wanted and value is not None:
            tracker[option] = value
            work.renamed[f"{prefix}wandb_{option}"] = f"trackers[].{option}"
        elif value is not None:
            work.dropped[f"{prefix}wandb_{option}"] = "nothing is logged to W&B"
    if wanted:
        work.set("trackers", [tracker], f"{prefix}log_to_wandb")
    else:
        work.dropped[f"{prefix}log_to_wandb"] = "is false, and so it is here"


def folder(work: Work) -> None:
    """One run folder has all here."""
    output, checkpoints = work.take("output_path"), work.take("checkpoint_path")
    folder = output or checkpoints
    if folder:
        work.set("checkpoints.folder", str(folder), "output_path" if output else "checkpoint_path")
    if output and checkpoints:
        work.dropped["checkpoint_path"] = "checkpoints lie in the run folder, which is in output_path"
    for key in ("run_name", "logger.run_name"):
        name = work.take(key)
        if name is not None and _GENERATED.fullmatch(str(name)):
            work.dropped[key] = "is made of the options there; runs are named by the date and the site here"
        elif name is not None:
            work.set("checkpoints.name", name, key)
