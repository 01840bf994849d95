"""What is not collected with transformer_lens 4, which has no HookedTransformer, and so no HookedSAETransformer."""

from __future__ import annotations

from saekit_plugins.backends.lens_versions import has_hooked_transformer

collect_ignore = [] if has_hooked_transformer() else ["test_hooked_sae_transformer.py", "test_faults_of_splices.py"]
