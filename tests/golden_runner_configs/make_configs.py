"""Record what sae-lens 6.54.12 saves of a run's options: ``python make_configs.py``, in an environment that has it."""

import json
from pathlib import Path

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

SIZES = {"d_in": 128, "d_sae": 512}
SAES = {
    "standard": StandardTrainingSAEConfig(**SIZES, l1_coefficient=2, l1_warm_up_steps=10),
    "topk": TopKTrainingSAEConfig(**SIZES, k=16),
    "batchtopk": BatchTopKTrainingSAEConfig(**SIZES, k=16.5),
    "gated": GatedTrainingSAEConfig(**SIZES, l1_coefficient=3),
    "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAEConfig(**SIZES, k=16, matryoshka_widths=[64, 512]),
    "jumprelu": JumpReLUTrainingSAEConfig(**SIZES, l0_coefficient=3),
}
for name, sae in SAES.items():
    config = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="gpt2",
        dataset_path="owner/texts",
        hook_name="blocks.8.hook_resid_pre",
        lr_scheduler_name="cosineannealing",
        lr=4e-4,
        training_tokens=100_000_000,
        logger=LoggingConfig(log_to_wandb=name == "standard"),
        verbose=False,
    )
    Path(__file__).with_name(f"{name}.json").write_text(json.dumps(config.to_dict(), indent=1))
