"""Fixtures of the whole suite."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# No test reaches a hub: a miss would cost half a minute each, and machines without a network must pass.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
# Workers that run side by side share the processors; processes that tests start do as their worker does.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
# Nor does one leave anything in the cache of whoever runs them.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="saekit-hf-home-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
