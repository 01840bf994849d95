"""The configuration: frozen data, nested by owner.  Nothing here imports torch, logs or touches a file.

Fields made by :func:`plugin_field` hold a plugin's key (``"cosine"``, ``"saekit:cosine"``) or an instance of its own
options class (``CosineConfig(end=0.1)``).  :mod:`saekit.converter` reads, checks and writes all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs

from saekit.errors import ConfigError
from saekit.site import Site

__all__ = [
    "ActivationsConfig",
    "CacheConfig",
    "CheckpointsConfig",
    "DatasetConfig",
    "EvalsConfig",
    "ModelConfig",
    "OptimiserConfig",
    "PretokenizeConfig",
    "SAEConfig",
    "Site",
    "TrainConfig",
    "TrainingConfig",
    "check",
    "plugin_field",
]

PluginChoice: TypeAlias = Any
"""A plugin's key, or an instance of its options class; in files also a table with ``name`` and the options."""

PLUGIN_KIND = "saekit_plugin_kind"
SAME_AT_START = "saekit_same_at_start"
"""Metadata of an SAE's option that decides what its weights mean: training goes on from saved ones with the same."""
ALWAYS_TRACKED = "saekit:jsonl"


def plugin_field(kind: str, default: Any) -> Any:
    """A field that chooses a plugin of ``kind``; a tuple as ``default`` makes it choose several."""
    return attrs.field(default=default, metadata={PLUGIN_KIND: kind})


def check(test: Callable[[Any], bool], expected: str) -> Callable[[object, Any, Any], None]:
    """A validator whose error says what was expected and what was found.  None passes."""

    def validate(_: object, attribute: Any, value: Any) -> None:
        try:
            fine = value is None or bool(test(value))
        except TypeError:
            fine = False
        if not fine:
            raise ConfigError([(attribute.name, f"must be {expected}, found {value!r}")])

    return validate


_positive = check(lambda v: v > 0, "above 0")
_at_least_0 = check(lambda v: v >= 0, "0 or more")
_at_least_1 = check(lambda v: v >= 1, "1 or more")
_below_1 = check(lambda v: 0 <= v < 1, "at least 0 and below 1")
_not_empty = check(lambda v: bool(v.strip()), "a name, not an empty text")
_token = check(
    lambda v: v in ("bos", "eos", "sep", "none") if isinstance(v, str) else v >= 0,
    '"bos", "eos", "sep", "none" or a token id',
)
Token: TypeAlias = str | int
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]


@attrs.frozen(kw_only=True)
class ModelConfig:
    """The language model whose activations are studied."""

    name: str = attrs.field(default="saekit/tiny-python", validator=_not_empty)
    """A name that the backend knows, or a folder.  `saekit/tiny-python` ships with saekit."""
    backend: PluginChoice = plugin_field("model_backends", "saekit:HookedTransformer")
    """What loads and runs the model."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: a GPU if there is one."""
    dtype: Dtype = "float32"
    """The type of the model's weights and activations."""
    autocast: bool = False
    """Run the model's matrix products in bfloat16 (torch's autocast), whatever the type of its weights."""
    compile: bool = False
    """Compile the model with `torch.compile`: slow at the start, faster after."""
    compile_mode: CompileMode = "default"
    """torch's mode of compilation."""


@attrs.frozen(kw_only=True)
class DatasetConfig:
    """The text, and how it becomes contexts."""

    path: str = attrs.field(default="saekit/python-stdlib", validator=_not_empty)
    """A dataset on the Hub, a `save_to_disk` folder, or text, JSONL or parquet files.  `saekit/python-stdlib` reads the
    sources of the running Python's standard library."""
    name: str | None = None
    """The configuration of a Hub dataset that has several."""
    split: str = attrs.field(default="train", validator=_not_empty)
    """The split to train on."""
    revision: str | None = None
    """The revision of a Hub dataset."""
    data_files: tuple[str, ...] = ()
    """The files of a dataset to read, as names or patterns (`["data/part-*.parquet"]`).  Empty: those of the split."""
    streaming: bool = True
    """Read a Hub dataset as it is needed, without downloading all of it first."""
    column: str | None = None
    """The column to read.  None: the first of `tokens`, `input_ids` and `text` that is there."""
    context_size: int | None = attrs.field(default=None, validator=check(lambda v: v >= 2, "2 or more"))
    """Tokens in a context, the prepended ones included.  None: that of pretokenised data, else 128."""
    prepend_bos: bool | None = None
    """Begin every context with the BOS token, exactly once.  None: as pretokenised data does, else true."""
    begin_batch_token: Token | None = attrs.field(default=None, validator=_token)
    """The token that begins every context when `prepend_bos` is off: `bos`, `eos`, `sep`, an id, or `none`.  None: as
    in pretokenised data, else `none`."""
    begin_sequence_token: Token | None = attrs.field(default=None, validator=_token)
    """The token put before each document.  None: as in pretokenised data, else `none`."""
    sequence_separator_token: Token | None = attrs.field(default=None, validator=_token)
    """The token put between two documents.  None: as in pretokenised data, else `bos`."""
    on_exhausted: Literal["repeat", "stop", "error"] = "repeat"
    """When the text ends before training does: read it again, end training cleanly, or fail."""

    def __attrs_post_init__(self) -> None:
        if self.prepend_bos is not False and self.begin_batch_token not in (None, "none", "bos"):
            raise ConfigError(
                [("begin_batch_token", f"is {self.begin_batch_token!r}, but prepend_bos begins contexts with BOS; "
                  "set prepend_bos = false to use another token")]
            )  # fmt: skip


@attrs.frozen(kw_only=True)
class CacheConfig:
    """What `saekit cache` writes.  Training reads it with `activations.source = {name = "cached", folder = ...}`."""

    folder: str = attrs.field(default="activations", validator=_not_empty)
    """The folder to write, or to go on with."""
    tokens: int | None = attrs.field(default=None, validator=_at_least_1)
    """Activation vectors to write, rounded up to whole contexts.  None: `training.training_tokens`."""
    sites: tuple[Site, ...] = ()
    """Sites to write in the same pass beside `site`."""
    dtype: Dtype | None = None
    """The type of the numbers on disk.  None: what the model gives."""
    batch_size_prompts: int = attrs.field(default=16, validator=_at_least_1)
    """Contexts in one forward of the model."""
    shard_megabytes: int = attrs.field(
        default=2048, validator=check(lambda v: 1 <= v <= 8192, "1 to 8192, which can be mapped into little memory")
    )
    """The size of a shard's largest file, about.  After an interruption, writing goes on from the last whole shard;
    many small ones make reading slower."""


@attrs.frozen(kw_only=True)
class ActivationsConfig:
    """From contexts to shuffled batches."""

    source: PluginChoice = plugin_field("activation_sources", "saekit:live")
    """Where batches come from."""
    normalize_activations: Literal["none", "expected_average_only_in"] = "none"
    """`expected_average_only_in` scales activations to a mean norm of `sqrt(d_in)`. The factor is estimated on the
    first buffer, before anything else uses activations, and folded into the weights that are saved, so that they work
    on raw activations."""
    cache: CacheConfig = attrs.field(factory=CacheConfig)
    """What `saekit cache` writes."""


@attrs.frozen(kw_only=True)
class SAEConfig:
    """What every SAE architecture has.  Architecture plugins derive their options from this class."""

    d_in: int | None = attrs.field(default=None, validator=_at_least_1)
    """The width of the site.  None: found by running the model once.  A stated width that is wrong is an error."""
    d_sae: int | None = attrs.field(default=None, validator=_at_least_1)
    """The number of features."""
    expansion_factor: int | None = attrs.field(default=None, validator=_at_least_1)
    """The number of features as a multiple of `d_in`, instead of `d_sae`.  Neither given: 16."""
    activation: PluginChoice = plugin_field("activation_functions", "saekit:relu")
    """The non-linearity."""
    apply_b_dec_to_input: bool = True
    """Subtract the decoder's bias from the input."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """The type of the SAE's weights."""
    normalize_sae_decoder: bool = True
    """Keep every decoder row at norm 1: project the gradient before each step, rescale after it."""
    decoder_orthogonal_init: bool = False
    """Start from a decoder with orthogonal columns."""
    decoder_heuristic_init: bool = False
    """Start from Gaussian decoder rows of norm 0.1."""
    init_encoder_as_decoder_transpose: bool = False
    """Start from `W_enc = W_dec.T`."""
    b_dec_init_method: Literal["zeros", "mean", "geometric_median"] = "zeros"
    """Start `b_dec` at zero, or at the mean or geometric median of the first activations."""

    def __attrs_post_init__(self) -> None:
        if self.d_sae is not None and self.expansion_factor is not None:
            raise ConfigError([("expansion_factor", "give d_sae or expansion_factor, not both")])
        if self.decoder_heuristic_init and self.normalize_sae_decoder:
            raise ConfigError(
                [("decoder_heuristic_init", "starts from rows of norm 0.1, which normalize_sae_decoder sets to 1; "
                  "set normalize_sae_decoder = false")]
            )  # fmt: skip
        if self.decoder_heuristic_init and self.decoder_orthogonal_init:
            raise ConfigError([("decoder_heuristic_init", "choose one of decoder_heuristic_init and "
                                "decoder_orthogonal_init")])  # fmt: skip

    def features(self, d_in: int) -> int:
        """``d_sae`` at a site of width ``d_in``."""
        return self.d_sae or d_in * (self.expansion_factor or 16)


@attrs.frozen(kw_only=True)
class OptimiserConfig:
    """Adam."""

    beta1: float = attrs.field(default=0.0, validator=_below_1)
    """Decay of the gradient's mean."""
    beta2: float = attrs.field(default=0.999, validator=_below_1)
    """Decay of the gradient's square."""
    eps: float = attrs.field(default=1e-8, validator=_positive)
    """Added to the square root of the second moment."""
    clip_grad_norm: float = attrs.field(default=1.0, validator=_at_least_0)
    """Scale gradients down to this total norm; 0 leaves them alone."""


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """How long, how fast, and what is watched."""

    training_tokens: int = attrs.field(default=2_000_000, validator=_at_least_1)
    """Activation vectors to train on."""
    finetuning_tokens: int = attrs.field(default=0, validator=_at_least_0)
    """Activation vectors to train on after that, with only some parameters learning."""
    finetuning_method: Literal["scale", "decoder", "unrotated_decoder"] | None = None
    """What learns then: `scale`: a factor for each feature; `decoder`: the factors, `W_dec` and `b_dec`;
    `unrotated_decoder`: the factors and `b_dec`."""
    from_pretrained_path: str | None = None
    """Start from the weights of this saved SAE, of any format that `saekit.SAE.load` reads."""
    train_batch_size_tokens: int = attrs.field(default=4096, validator=_at_least_1)
    """Activation vectors in one step."""
    lr: float = attrs.field(default=4e-4, validator=_positive)
    """The peak learning rate."""
    lr_warm_up_steps: int = attrs.field(default=0, validator=_at_least_0)
    """Steps of linear warm-up: step t of w has `lr * (t + 1) / w`."""
    lr_decay_steps: int = attrs.field(default=0, validator=_at_least_0)
    """Steps of linear decay to zero at the end."""
    seed: int = attrs.field(default=42, validator=_at_least_0)
    """Seeds everything that is drawn."""
    device: str = "auto"
    """Where the SAE trains: `cpu`, `cuda`, ..., or `auto`."""
    kernels: Literal["auto", "fast", "reference"] = "auto"
    """`auto` trains by the fast kernels where the SAE has them, but not in float64, where `fast` does, too; `reference`
    trains by plain torch and autograd, in the order of operations of sae-lens."""
    autocast: bool = False
    """Run the SAE's matrix products in bfloat16 (torch's autocast) in plain torch, whatever the type of its weights."""
    compile: bool = False
    """Compile the SAE's training step in plain torch with `torch.compile`."""
    compile_mode: CompileMode = "default"
    """torch's mode of compilation."""
    dead_feature_window: int = attrs.field(default=1000, validator=_at_least_1)
    """A feature is dead when it has not fired for more steps than this."""
    feature_sampling_window: int = attrs.field(default=2000, validator=_at_least_1)
    """Steps over which firing fractions are counted before they are logged and counted anew."""
    log_frequency: int = attrs.field(default=10, validator=_at_least_1)
    """Steps between two lines of metrics."""
    verbose: bool = True
    """Show progress."""

    def __attrs_post_init__(self) -> None:
        if self.finetuning_tokens and self.finetuning_method is None:
            raise ConfigError(
                [("finetuning_method", f"is missing: it says what learns in the {self.finetuning_tokens} "
                  "finetuning_tokens; scale, decoder or unrotated_decoder")]
            )  # fmt: skip
        if self.finetuning_method is not None and not self.finetuning_tokens:
            raise ConfigError(
                [("finetuning_tokens", f"is 0, so finetuning_method = {self.finetuning_method!r} would never begin")]
            )
        if self.lr_warm_up_steps + self.lr_decay_steps > self.steps:
            raise ConfigError(
                [("lr_warm_up_steps", f"warm-up ({self.lr_warm_up_steps}) and decay ({self.lr_decay_steps}) take more "
                  f"than the {self.steps} steps of training")]
            )  # fmt: skip

    @property
    def steps(self) -> int:
        """The number of steps, fine-tuning's included; the last batch may be smaller than the others."""
        return -(-self.total_tokens // self.train_batch_size_tokens)

    @property
    def total_tokens(self) -> int:
        """Activation vectors in training and fine-tuning together."""
        return self.training_tokens + self.finetuning_tokens


@attrs.frozen(kw_only=True)
class EvalsConfig:
    """Measurements on text that is never trained on."""

    run: tuple[PluginChoice, ...] = plugin_field("evals", ("saekit:reconstruction",))
    """What to measure, at the end of training and every `every_n_steps`."""
    every_n_steps: int = attrs.field(default=0, validator=_at_least_0)
    """Steps between two evals during training; 0: only at the end."""
    n_contexts: int = attrs.field(default=64, validator=_at_least_1)
    """Held-out contexts to measure on."""
    split: str | None = None
    """A split of the dataset to measure on.  None: one document in `held_out_every` is kept from training."""
    held_out_every: int = attrs.field(default=20, validator=check(lambda v: v == 0 or v >= 2, "0, or 2 or more"))
    """See `split`.  0 trains on every document."""


@attrs.frozen(kw_only=True)
class CheckpointsConfig:
    """Where a run is kept."""

    folder: str = attrs.field(default="runs", validator=_not_empty)
    """The folder that holds the run folders."""
    name: str | None = None
    """The run folder's name, which must be new.  None: the date, the site and a number that is free."""
    n_checkpoints: int = attrs.field(default=0, validator=_at_least_0)
    """Checkpoints at even distances during training; the SAEs in them are kept."""
    every_minutes: float = attrs.field(default=30.0, validator=_at_least_0)
    """Minutes between two checkpoints; 0: none by the clock."""
    keep_last: int = attrs.field(default=2, validator=_at_least_0)
    """Checkpoints that a run can go on from are kept up to this number, the newest ones; 0: no checkpoints, and a run
    that ends early cannot be resumed."""


@attrs.frozen(kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = attrs.field(factory=ModelConfig)
    """The language model whose activations are studied."""
    dataset: DatasetConfig = attrs.field(factory=DatasetConfig)
    """The text, and how it becomes contexts."""
    site: Site = attrs.field(factory=Site)
    """Where the SAE reads."""
    activations: ActivationsConfig = attrs.field(factory=ActivationsConfig)
    """From contexts to shuffled batches."""
    sae: PluginChoice = plugin_field("sae_architectures", "saekit:standard")
    """The SAE's architecture and its options."""
    optimiser: OptimiserConfig = attrs.field(factory=OptimiserConfig)
    """Adam."""
    lr_schedule: PluginChoice = plugin_field("lr_schedules", "saekit:constant")
    """The learning rate between warm-up and decay."""
    training: TrainingConfig = attrs.field(factory=TrainingConfig)
    """How long, how fast, and what is watched."""
    evals: EvalsConfig = attrs.field(factory=EvalsConfig)
    """Measurements on text that is never trained on."""
    trackers: tuple[PluginChoice, ...] = plugin_field("trackers", ())
    """Where metrics go beside the JSON lines in the run folder, which are always written."""
    checkpoints: CheckpointsConfig = attrs.field(factory=CheckpointsConfig)
    """Where the run is kept."""

    def __attrs_post_init__(self) -> None:
        if self.evals.split is not None and self.evals.split == self.dataset.split:
            raise ConfigError(
                [("evals.split", f"is {self.evals.split!r}, which is trained on (dataset.split). Name another split, "
                  "or leave it out to keep one document in evals.held_out_every from training")]
            )  # fmt: skip
        if self.evals.run and self.evals.split is None and not self.evals.held_out_every:
            raise ConfigError(
                [("evals.held_out_every", "is 0, so no text is left to measure on; name a split in evals.split, or "
                  "measure nothing: evals.run = []")]
            )  # fmt: skip


@attrs.frozen(kw_only=True)
class PretokenizeConfig:
    """One run of `saekit pretokenize`: text in, shuffled contexts out.  The text is read once; when it ends before
    `max_contexts`, `dataset.on_exhausted = "error"` fails, and the others write what there is."""

    dataset: DatasetConfig = attrs.field(factory=DatasetConfig)
    """The text, and how it becomes contexts."""
    model: ModelConfig = attrs.field(factory=ModelConfig)
    """The model whose tokenizer is used, unless `tokenizer` names another."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer, by its folder or name on the Hub; no model is loaded then."""
    folder: str | None = None
    """The folder to write, which must be new.  Training reads it with `dataset.path`."""
    hub_repo_id: str | None = None
    """The dataset repository on the Hub to push to, as `owner/name`."""
    hub_revision: str | None = None
    """The branch to push to.  None: the repository's main one."""
    hub_private: bool = True
    """Make the repository private, if it is new."""
    shuffle: bool = True
    """Shuffle the contexts."""
    seed: int = attrs.field(default=42, validator=_at_least_0)
    """Seeds the shuffle."""
    num_proc: int = attrs.field(default=1, validator=_at_least_1)
    """Processes that tokenise."""
    max_contexts: int | None = attrs.field(default=None, validator=_at_least_1)
    """Stop after this many contexts.  None: all of the data."""
    verbose: bool = True
    """Show progress."""

    def __attrs_post_init__(self) -> None:
        if self.folder is None and self.hub_repo_id is None:
            raise ConfigError([("folder", "is missing: name a folder to write, a hub_repo_id to push to, or both")])
        if self.hub_revision is not None and self.hub_repo_id is None:
            raise ConfigError([("hub_revision", "says where to push, but there is no hub_repo_id")])
