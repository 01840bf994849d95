"""Record what sae-lens 4.4.5 and 5.11.0 have of a run's options: ``PYTHONPATH=UNPACKED_WHEEL python
make_flat_configs.py VERSION``, in an environment that has what they import."""

import json
import sys
import types
from pathlib import Path

package = types.ModuleType("sae_lens")  # config.py alone: the rest needs other versions of what it imports
for folder in sys.path:
    if Path(folder, "sae_lens", "config.py").is_file():
        package.__path__ = [str(Path(folder, "sae_lens"))]
        break
package.__version__, package.logger = sys.argv[1], __import__("logging").getLogger("sae_lens")
sys.modules["sae_lens"] = package

from sae_lens.config import LanguageModelSAERunnerConfig  # noqa: E402

OPTIONS = {
    "standard": {"l1_coefficient": 2.0, "l1_warm_up_steps": 10},
    "topk": {"activation_fn_kwargs": {"k": 16}},
    "gated": {"l1_coefficient": 3.0, "normalize_sae_decoder": False, "decoder_heuristic_init": True},
    "jumprelu": {"l1_coefficient": 4.0, "l1_warm_up_steps": 20, "jumprelu_bandwidth": 0.05},
}
for name, options in OPTIONS.items():
    config = LanguageModelSAERunnerConfig(
        architecture=name,
        model_name="gpt2",
        dataset_path="owner/texts",
        hook_name="blocks.8.hook_resid_pre",
        hook_layer=8,
        d_in=128,
        d_sae=512,
        training_tokens=100_000_000,
        log_to_wandb=False,
        wandb_id="abc",
        verbose=False,
        **options,
    )
    path = Path(__file__).with_name(f"{sys.argv[1]}_{name}.json")
    path.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
