"""Records what hooks hold in a HookedTransformer of transformer_lens 3: ``python tests/golden_lens/make_golden.py``.

Of the embedded model and of tiny models of four families, processed as ``from_pretrained`` does by default and not at
all.  Of each hook the last position of the first context is kept, of logits the first hundred.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import transformer_lens  # noqa: E402
from support.lens_golden import CASES, FILE, held  # noqa: E402

import saekit  # noqa: E402


def main() -> None:
    assert hasattr(transformer_lens, "HookedTransformer"), "this needs transformer_lens 3"
    tensors: dict[str, Any] = {}
    for case, (name, options) in CASES.items():
        backend = saekit.load_model(name(), backend=options, device="cpu")
        assert type(backend).__name__ == "TransformerLensBackend"
        tensors |= {f"{case}/{hook}": value.clone().contiguous() for hook, value in held(backend).items()}
    save_file(tensors, FILE)


if __name__ == "__main__":
    main()
