"""Fixtures of the whole suite."""

from __future__ import annotations

import os

# No test reaches a hub: a miss would cost half a minute each, and machines without a network must pass.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
