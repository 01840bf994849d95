"""Neuronpedia's schemas, written down from the facts, and a reader that takes nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

INT, FLOAT, TEXT = int, float, str
INTS, FLOATS, TEXTS = [int], [float], [str]
TABLES = {
    "neuron_alignment_indices": INTS, "neuron_alignment_values": FLOATS, "neuron_alignment_l1": FLOATS,
    "correlated_neurons_indices": INTS, "correlated_neurons_pearson": FLOATS, "correlated_neurons_l1": FLOATS,
    "correlated_features_indices": INTS, "correlated_features_pearson": FLOATS, "correlated_features_l1": FLOATS,
    "neg_str": TEXTS, "neg_values": FLOATS, "pos_str": TEXTS, "pos_values": FLOATS, "frac_nonzero": FLOAT,
    "freq_hist_data_bar_values": FLOATS, "freq_hist_data_bar_heights": FLOATS,
    "logits_hist_data_bar_values": FLOATS, "logits_hist_data_bar_heights": FLOATS,
}  # fmt: skip
DASHBOARD = {
    "model_id": TEXT, "layer": INT, "sae_set": TEXT, "sae_id_suffix": (TEXT, None),
    "features": [{
        "feature_index": INT, **TABLES, "n_prompts_total": INT, "n_tokens_in_prompt": INT, "dataset": TEXT,
        "decoder_weights_dist": FLOATS, "vector": FLOATS,
        "activations": [{
            "bin_min": FLOAT, "bin_max": FLOAT, "bin_contains": FLOAT, "tokens": TEXTS, "values": FLOATS,
            "qualifying_token_index": INT,
        }],
    }],
}  # fmt: skip
RUNNER = {
    "model_id": TEXT, "layer": TEXT, "sae_id": TEXT, "n_batches_to_sample_from": INT, "n_prompts_to_select": INT,
    "features": [{
        "featureIndex": INT, **TABLES, "num_tokens_for_dashboard": INT,
        "activations": [{
            "binMin": FLOAT, "binMax": FLOAT, "binContains": FLOAT, "tokens": TEXTS, "values": FLOATS,
            "maxValue": FLOAT, "lossValues": FLOATS, "logitContributions": TEXT,
        }],
    }],
}  # fmt: skip
CONTRIBUTIONS = {"pos": [({"t": TEXTS, "v": FLOATS}, {})], "neg": [({"t": TEXTS, "v": FLOATS}, {})]}
SKIPPED = {"model_id": TEXT, "layer": TEXT, "sae_set": TEXT, "log_sparsity": FLOAT, "skipped_indexes": INTS}
SKIPPED_OF_3 = {"model_id": TEXT, "layer": TEXT, "sae_id": TEXT, "log_sparsity": FLOAT, "skipped_indexes": INTS}
FEATURE_ROW = {
    "modelId": TEXT, "layer": TEXT, "index": INT, "creatorId": TEXT, "createdAt": TEXT, "maxActApprox": FLOAT,
    "hasVector": bool, "vector": FLOATS, "vectorLabel": (TEXT, None), "vectorDefaultSteerStrength": FLOAT,
    "hookName": (TEXT, None), "topkCosSimIndices": INTS, "topkCosSimValues": FLOATS, **TABLES,
    "decoder_weights_dist": FLOATS, "sourceSetName": TEXT,
}  # fmt: skip
ACTIVATION_ROW = {
    "id": TEXT, "tokens": TEXTS, "index": INT, "layer": TEXT, "modelId": TEXT, "maxValue": FLOAT,
    "maxValueTokenIndex": INT, "minValue": FLOAT, "values": FLOATS, "creatorId": TEXT, "dataSource": (TEXT, None),
    "dataIndex": (TEXT, None), "dfaValues": FLOATS, "dfaTargetIndex": (INT, None), "dfaMaxValue": (FLOAT, None),
    "createdAt": TEXT, "lossValues": FLOATS, "logitContributions": (TEXT, None), "binMin": FLOAT, "binMax": FLOAT,
    "binContains": FLOAT, "qualifyingTokenIndex": INT, "zIndices": ([INTS], None), "zValues": (FLOATS, None),
}  # fmt: skip
SOURCE_ROW = {
    "id": TEXT, "modelId": TEXT, "setName": TEXT, "creatorId": TEXT, "hasDashboards": bool, "inferenceEnabled": bool,
    "saelensConfig": (TEXT, None), "saelensRelease": (TEXT, None), "saelensSaeId": (TEXT, None),
    "hfRepoId": (TEXT, None), "hfFolderId": (TEXT, None), "visibility": TEXT, "num_prompts": INT,
    "num_tokens_in_prompt": INT, "dataset": TEXT, "notes": (TEXT, None), "createdAt": TEXT,
}  # fmt: skip


def misfit(value: Any, schema: Any, path: str = "$") -> str | None:
    """Where ``value`` is not as ``schema`` says; None: nowhere.  Types are exact: 1 is no float, and no key is new."""
    if isinstance(schema, tuple):
        return None if any(misfit(value, one, path) is None for one in schema) else f"{path}: {value!r}"
    if isinstance(schema, list):
        if type(value) is not list:
            return f"{path}: no list"
        return next((bad for n, one in enumerate(value) if (bad := misfit(one, schema[0], f"{path}[{n}]"))), None)
    if isinstance(schema, dict):
        if type(value) is not dict or value.keys() != schema.keys():
            keys = sorted(value.keys() ^ schema.keys()) if isinstance(value, dict) else value
            return f"{path}: other keys: {keys}"
        return next((bad for key in schema if (bad := misfit(value[key], schema[key], f"{path}.{key}"))), None)
    if schema is None:
        return None if value is None else f"{path}: {value!r}"
    return None if type(value) is schema else f"{path}: {value!r} is no {schema.__name__}"


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def strict(text: str | bytes) -> Any:
    """As a reader has it that knows no NaN and no Infinity."""
    return json.loads(text, parse_constant=no_constant)


def batches(home: Path) -> list[Any]:
    """All batches in ``home``, in their order."""
    paths = sorted(home.glob("batch-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    return [strict(path.read_bytes()) for path in paths]


def rows(home: Path, kind: str) -> list[Any]:
    """The rows of a bulk import, of all its files."""
    paths = sorted((home / kind).glob("*.jsonl.gz"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    return [strict(line) for path in paths for line in gzip.decompress(path.read_bytes()).splitlines()]
