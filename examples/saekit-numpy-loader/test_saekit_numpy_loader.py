"""Run it with `pytest`, where the plugin is installed."""

import numpy as np
import saekit_numpy_loader

from saekit.testing import check_plugin


def test_it_keeps_what_a_loader_promises(tmp_path):
    shapes = {"W_enc": (5, 9), "b_enc": (9,), "W_dec": (9, 5), "b_dec": (5,)}
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "sae.npz", hook_name="blocks.0.hook_resid_post", **arrays)
    check_plugin(saekit_numpy_loader, folders={"npz": tmp_path})
