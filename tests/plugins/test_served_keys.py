"""Step kernels that would never be used say so where plugins are listed."""

from __future__ import annotations

import pytest

from saekit.plugins.listing import detail, detail_text, overview, table
from saekit.testing import fake_plugin, isolated_manager


@pytest.mark.parametrize(
    ("serves", "told"),
    [
        (
            (),
            "the step kernel test:fake serves no SAE architecture: name them in its entry, such as serves=('distri",
        ),
        (["topk"], "serves 'topk', which is no SAE architecture here: write 'saekit:topk'"),
        (["saekit:topkk"], "serves 'saekit:topkk', which is no SAE architecture here: write 'saekit:topk'"),
        (["saekit:topk"], None),
        (["elsewhere:mine"], None),  # whose distribution need not be here
    ],
)
def test_what_a_kernel_serves(serves: list[str], told: str | None) -> None:
    plugins = isolated_manager(fake_plugin("step_kernels", serves=serves), builtins=True)
    data = overview(plugins, "step_kernels")
    texts = [note["text"] for note in data["notes"]]
    assert len(texts) == (told is not None)
    if told is not None:
        assert told in texts[0]
        assert told in table(data, "step_kernels")
    shown = detail_text(detail(plugins.get("step_kernels", "test:fake")))
    assert (f"serves: {', '.join(serves)}" in shown) == bool(serves)
