"""All of training in one file, as plain lines: ``python one_file.py run.toml FOLDER``.

The SAE that it leaves has the same bytes as that of ``saekit.train``, which adds what people want of a run beside:
checks before it begins, evals, logs, checkpoints and going on, many SAEs at once.  What would change the SAE and is not
done here is refused.
"""

import operator
import sys

import attrs
import torch

import saekit
from saekit.config import TokensConfig
from saekit.data import Corpus, StreamContext
from saekit.runs import metadata_of, seed_for
from saekit.sae import build_module, initialize
from saekit.training import ComposedSchedule, FiringStatistics, ScheduledOptimizer

ONLY = {
    "inputs": [()],
    "model.backend.item.entry.no_model": [False],
    "tokens": [TokensConfig()],
    "dataset.disable_concat_sequences": [None, False],
    "dataset.on_exhausted": ["repeat", "stop"],
    "activations.normalize_activations": [None, "saekit:expected_average_only_in"],
    "activations.source.item.entry.needs_text": [True],
    "sae.options.dtype": ["float32", "float64"],
    "training.device": ["auto", "cpu"],
    "training.kernels": ["auto"],
    "training.autocast": [False],
    "training.compile": [False],
    "training.finetuning_tokens": [0],
    "training.from_pretrained_path": [None],
}
"""What these are in a run that can be done here, on the CPU."""


def train(config: saekit.TrainConfig, folder: str) -> saekit.SAE:
    others = [path for path, known in ONLY.items() if operator.attrgetter(path)(config) not in known]
    if others:
        options = [path.partition(".item")[0].replace(".options", "") for path in others]
        raise saekit.ConfigError([(option, "is not done in one file: use saekit.train") for option in options])
    plugins, training, site = saekit.default_manager(), config.training, config.site
    seed = {what: seed_for(training.seed, what) for what in ("shuffle", "init", "noise")}

    # text -> tokens -> contexts -> activations -> batches
    corpus = Corpus.of(config.dataset, config.evals)
    model = config.model.backend.build(model=config.model, loaded=None)
    stream = StreamContext(
        backend=model, sites=[site], batch_size=training.train_batch_size_tokens, seed=seed["shuffle"],
        open_contexts=lambda: corpus.contexts(model), repeat=config.dataset.on_exhausted == "repeat",
    )  # fmt: skip
    source = config.activations.source.build(stream=stream)

    # the dictionary, and its first weights
    sae = build_module(config.sae.item, config.sae.options, saekit.Ports.of(config.sites, stream.widths), plugins)
    sample, scale = source.peek()[site], 1.0
    if config.activations.normalize_activations is not None:
        scale = config.activations.normalize_activations.build().estimated(sample)
    initialize(sae, torch.Generator().manual_seed(seed["init"]), sample, scale)

    # what changes it
    schedule = ComposedSchedule(training, lambda steps: config.lr_schedule.build(lr=training.lr, steps=steps))
    chosen = config.optimizer.with_defaults(sae.config.optimizer_defaults.get(config.optimizer.key, {}))
    clip = chosen.options.clip_grad_norm
    optimizer = ScheduledOptimizer(sae.named_parameters(), chosen.build, schedule, clip=clip, table=sae.table)
    firing = FiringStatistics(
        sae.d_sae, dead_after=training.dead_after, window=training.feature_sampling_window, device="cpu"
    )
    noise, steps, tokens = torch.Generator().manual_seed(seed["noise"]), 0, 0

    while tokens < training.training_tokens:
        batch = next(source, None)
        if batch is None:  # the text has ended, and is not to be read again
            break
        rows = batch.thinned(training.training_tokens - tokens).activations[site]
        sae.probe_rows = rows[:16].clone()  # by which what is saved can be known again; the memory is used for the next
        x = rows.to("cpu", sae.dtype)
        x = x * scale if scale != 1 else x
        result = sae.training_step(x, saekit.StepInput(step=steps, generator=noise, dead=firing.dead()))
        sae.before_update()
        optimizer.step(steps, result.loss)
        if optimizer.failed:
            raise saekit.SaekitError(f"the loss or its gradient is no number any more, at step {steps}")
        sae.after_update()
        firing.update(result.fired, len(x))
        steps, tokens = steps + 1, tokens + len(x)
        if steps % 100 == 0:
            print(f"step {steps}: loss {result.loss:.4g}, {result.fired.sum() / len(x):.1f} features a token")
    source.close()

    # the SAE for activations as they are, and what it is fed
    if scale != 1:
        sae.fold_activation_scale(scale)
    seen = {"training_tokens": tokens, "activation_scale": scale}
    metadata = metadata_of(config, model, corpus, plugins) | seen
    sae.info = attrs.evolve(sae.info, sites=config.sites, metadata=metadata)
    sae.log_sparsity = firing.log_sparsity()
    sae.save(folder)
    return sae


if __name__ == "__main__":
    train(saekit.load_config(sys.argv[1]), sys.argv[2])
