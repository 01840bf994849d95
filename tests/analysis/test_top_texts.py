"""The texts of features, of SAEs from anywhere: found as they are, shown so that people can read them."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from saekit_plugins.architectures.standard import StandardConfig
from support.ports import EARLY, EMBED, HEAD, LATE
from support.tiny import hooked_transformer, run_config
from torch import Tensor

import saekit
from saekit.analysis.promoting import output_logits, why_no_logits
from saekit.analysis.top_texts import find_top_texts
from saekit.errors import ConfigError, DataError, ModelError
from saekit.sae.build import build_module
from saekit.testing import FakeBackend

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXTS = [f"def f{n}(x):\n    return x + {n} if x else None\n" * 8 for n in range(40)]
CONTEXTS = torch.randint(32, 127, (40, 16), generator=torch.Generator().manual_seed(1))


def made(sites: saekit.Sites, d_sae: int = 24, **metadata: Any) -> saekit.SAE:
    widths = {site: 4 if site == HEAD else 8 for site in sites.all}
    plugins, config = saekit.default_manager(), StandardConfig(d_sae=d_sae, apply_b_dec_to_input=False)
    item = plugins.find("sae_architectures", config)
    sae: Any = build_module(item, config, saekit.Ports.of(sites, widths), plugins)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.b_enc -= 2
    sae.info = saekit.SAEInfo(sites=sites, metadata=metadata)
    return sae


def activations(sae: saekit.SAE, sites: saekit.Sites) -> Tensor:
    held = FakeBackend().run(CONTEXTS, read={site.hook_name for site in sites.inputs}).held
    with torch.no_grad():
        features = sae.encode(sites.input_of(held))
    features[:, 0] = 0
    return features


@pytest.mark.parametrize(
    "sites", [saekit.Sites.one(EARLY), saekit.Sites.one(HEAD), saekit.Sites((EMBED,), (LATE,))], ids=lambda s: s.name
)
def test_the_strongest_places_are_found(sites: saekit.Sites) -> None:
    sae = made(sites)
    features = activations(sae, sites)
    found = find_top_texts(sae, backend=FakeBackend(), sites=sites, contexts=CONTEXTS, features=[7, 3], texts=4)
    assert [one.feature for one in found] == [7, 3]
    assert found.tokens == CONTEXTS.numel()
    for one in found:
        values = features[..., one.feature]
        assert one.frequency == pytest.approx(float((values > 0).float().mean()))
        strongest = values.amax(1).topk(4)
        assert [example.activation for example in one.examples] == pytest.approx(strongest.values.tolist(), rel=1e-5)
        # The fake model sees no context, so several may fire it alike: by the text around it is told which it was.
        windows = {}
        for row, at in (values > 0).nonzero().tolist():
            around = slice(max(at - 12, 0), at + 13)
            windows["".join(map(chr, CONTEXTS[row, around].tolist())), min(at, 12)] = values[row, around].tolist()
        for example in one.examples:
            assert example.before + example.token + example.after == "".join(example.tokens)
            assert list(example.activations) == pytest.approx(windows["".join(example.tokens), example.at], rel=1e-5)
            assert example.token == example.tokens[example.at]
        assert len({example.tokens for example in one.examples}) == 4, "each from a context of its own"


def test_bos_is_no_text() -> None:
    sites = saekit.Sites.one(EARLY)
    contexts = CONTEXTS.clone()
    contexts[:, 0] = 0
    how: Any = {"sites": sites, "contexts": contexts, "features": range(24)}
    for one in find_top_texts(made(sites), backend=FakeBackend(), **how):
        assert all("\0" not in example.tokens for example in one.examples)
        assert all(example.activation == max(example.activations) for example in one.examples)


def test_what_features_promote() -> None:
    sae, backend = made(saekit.Sites((EMBED,), (LATE,))), FakeBackend()
    found = find_top_texts(sae, backend=backend, sites=saekit.Sites((EMBED,), (LATE,)), contexts=CONTEXTS, features=[5])
    logits = (sae.W_dec[5] @ backend.unembedding()[0]).detach()
    logits = logits - logits.mean()
    assert found.why_no_logits is None
    assert found[0].promotes is not None
    assert found[0].suppresses is not None
    assert [token for token, _ in found[0].promotes] == [chr(token) for token in logits.topk(10).indices]
    assert [value for _, value in found[0].promotes] == pytest.approx(logits.topk(10).values.tolist(), rel=1e-5)
    assert found[0].suppresses[0][1] == pytest.approx(float(logits.min()), rel=1e-5)
    sae.add_scaling_factor()
    with torch.no_grad():
        sae.scaling_factor[5] = 2.0  # type: ignore[index]
    assert torch.allclose(output_logits(sae, [5], backend)[0], 2 * logits, rtol=1e-5), "as the SAE decodes it"


def test_nothing_is_claimed_of_what_is_not_in_the_residual_stream() -> None:
    sites = saekit.Sites.one(HEAD)
    found = find_top_texts(made(sites), backend=FakeBackend(), sites=sites, contexts=CONTEXTS, features=[0])
    assert found[0].promotes is found[0].suppresses is None
    assert str(found.why_no_logits).startswith("blocks.0.attn.hook_z.head1 is not in the residual stream")
    assert "promotes" not in repr(found)
    several = saekit.Sites((EMBED, LATE))
    assert "several sites" in str(why_no_logits(made(several), FakeBackend(), several))

    class Unsaid(FakeBackend):
        in_residual_stream = None  # type: ignore[assignment]

    assert "does not say" in str(why_no_logits(made(saekit.Sites.one(LATE)), Unsaid(), LATE))


def test_the_residual_stream_of_transformer_lens() -> None:
    backend: Any = saekit.load_model(hooked_transformer())
    inside = {name for name in backend.hook_names() if backend.in_residual_stream(name)}
    written = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    assert inside == {"hook_embed", "hook_pos_embed"} | {f"blocks.{n}.hook_{what}" for n in (0, 1) for what in written}
    assert not backend.in_residual_stream("blocks.7.hook_resid_post"), "there are two blocks"


def test_features_are_chosen() -> None:
    sites = saekit.Sites.one(EARLY)
    sae = made(sites)
    with torch.no_grad():
        sae.b_enc[:4] = -1e6
    how = {"backend": FakeBackend(), "sites": sites, "contexts": CONTEXTS}
    drawn = [
        [one.feature for one in find_top_texts(sae, features="random", k=6, seed=seed, **how)] for seed in (0, 1, 1)
    ]
    assert drawn[0] != drawn[1] == drawn[2]
    assert len(set(drawn[0])) == 6
    assert not {0, 1, 2, 3} & {*drawn[0], *drawn[1]}, "which never fire"
    assert len({one.feature for one in find_top_texts(sae, features="best", k=7, **how)}) == 7
    silent = find_top_texts(sae, features=[2], **how)
    assert (silent[0].frequency, silent[0].examples) == (0, [])
    alike = find_top_texts(sae, features=[9], diverse=True, **how)[0].examples
    assert len({example.token for example in alike}) >= len(
        {e.token for e in find_top_texts(sae, features=[9], **how)[0].examples}
    )
    assert [e.activation for e in alike] == sorted((e.activation for e in alike), reverse=True)


# ---- for people


class Balanced(HTMLParser):
    """Every tag is closed, and nothing comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: str) -> str:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    assert "color:#" not in html, "it would be lost on a page of another color"
    return parser.text


def test_they_show_themselves() -> None:
    sites = saekit.Sites.one(EARLY)
    found = find_top_texts(made(sites), backend=FakeBackend(), sites=sites, contexts=CONTEXTS, features=[7, 3])
    lines = repr(found).splitlines()
    assert lines[0].startswith("Feature 7, firing on ")
    assert lines[1].startswith("  promotes  ")
    assert all("«" in line and "»" in line for line in lines[2:7])
    assert len(lines) == 7 + 1 + 7
    assert repr(found[0]) == "\n".join(lines[:7])
    text = read(found._repr_html_())
    assert "Feature 7, firing on " in text
    assert "Feature 3, firing on " in text
    for example in found[0].examples:
        assert example.before.replace("\n", "⏎") + example.token in text, "escaped, and not broken"
    assert "&lt;" in found._repr_html_() or "<" not in "".join(map(repr, found))


@pytest.mark.filterwarnings("ignore:.*wrong site, scale or model")  # it was trained for a few steps
def test_sizes_numbers_and_places_of_saes_and_results(tmp_path: Path) -> None:
    result = saekit.train(run_config(tmp_path, checkpoints={"folder": str(tmp_path), "name": "x"}))
    shown = repr(result.sae)
    assert shown == "StandardSAE(d_in=128, d_sae=64, blocks.1.hook_resid_post of saekit/tiny-python, float32 on cpu)"
    assert repr(result) == (
        f"TrainResult({str(tmp_path / 'x')!r}: EV {result.metrics['evals/explained_variance']:.3g}, "
        f"L0 {result.metrics['evals/l0']:.3g}, CE recovered {result.metrics['evals/ce_recovered']:.3g}, "
        f"{result.metrics['sparsity/dead_features']:.0f} of 64 features dead; {shown})"
    )
    assert repr(result.backend) == (
        "TransformerLensBackend('saekit/tiny-python' on cpu: contexts of up to 128 tokens, vocabulary of 2,048)"
    )
    table = read(result._repr_html_())
    assert all(text in table for text in ("explained variance", "CE recovered", "of 64", str(tmp_path / "x")))
    about = read(result.sae._repr_html_())
    assert all(text in about for text in ("StandardSAE", "d_in=128, d_sae=64", "saekit/python-stdlib", "context_size"))
    sweep = saekit.train(saekit.grid(run_config(tmp_path / "two"), {"training.seed": [1, 2]}))
    assert repr(sweep).startswith(f"SweepResult({str(sweep.folder)!r}: 2 SAEs: 0_")
    assert "training.seed" in read(sweep._repr_html_())
    # What train returned has a model, and text that it held out.
    found = saekit.top_texts(result, tokens=2000, texts=2, verbose=False)
    assert len(found) == 5
    assert found[0].promotes


# ---- of SAEs from anywhere


def test_of_folders_of_sae_lens() -> None:
    sae = saekit.SAE.load(FIXTURES / "sae_lens_6.54.12_standard")
    how: Any = {"model": hooked_transformer(), "tokens": 1500, "verbose": False}
    found = saekit.top_texts(sae, dataset=TEXTS, features=[1, 2, 3], **how)
    assert [one.feature for one in found] == [1, 2, 3]
    assert found[0].promotes is not None
    wrong = saekit.SAE.load(FIXTURES / "sae_lens_6.54.12_transcoder")
    with pytest.raises(ConfigError, match="blocks.0.hook_mlp_out: is 16 wide in 'custom', and the SAE expects 24"):
        saekit.top_texts(wrong, dataset={"path": "saekit/python-stdlib"}, features="random", k=2, **how)


def test_it_is_checked_whether_the_sae_fits_before_the_text_is_read() -> None:
    how: dict[str, Any] = {"model": FakeBackend(), "dataset": TEXTS, "tokens": 200, "features": [0], "verbose": False}
    sae = made(saekit.Sites.one(EARLY), context_size=16, model_name="gpt2", mask_column="mask")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        saekit.top_texts(sae, **how)
    texts = " ".join(str(one.message) for one in said)
    assert "was trained on activations of 'gpt2', and this model is 'fake'" in texts
    assert "trained on tokens that the column 'mask' of its data chose, and none is read here" in texts
    assert "mask=" not in texts, "there is no such argument"
    with torch.no_grad():
        sae.W_dec[0, 0] = torch.nan
    sae.info = saekit.SAEInfo(sites=sae.info.sites, metadata={"context_size": 16})
    with pytest.raises(saekit.errors.SAEFormatError, match="W_dec"):
        saekit.top_texts(sae, **how | {"dataset": {"path": "./nowhere"}})


@pytest.mark.filterwarnings("ignore:.*wrong site, scale or model")  # it was trained for a few steps
def test_of_a_saved_sae_alone(tmp_path: Path) -> None:
    """It says which model and which text it is of."""
    result = saekit.train(run_config(tmp_path))
    sae = saekit.SAE.load(result.folder / "sae")
    found = saekit.top_texts(sae, features=[0, 1], tokens=1000, verbose=False)
    assert found.tokens == 31 * 32, "contexts of 32, as in training"
    sae.info = saekit.SAEInfo(sites=sae.info.sites)
    with pytest.raises(ConfigError, match="model: is missing: the SAE does not say which model it was trained on"):
        saekit.top_texts(sae, verbose=False)
    with pytest.raises(ConfigError, match="dataset: is missing: the SAE does not say which text"):
        saekit.top_texts(sae, model=result.backend, verbose=False)
    sae.info = saekit.SAEInfo()
    with pytest.raises(ConfigError, match="site: is missing: the SAE does not say where in the model it belongs"):
        saekit.top_texts(sae, model=result.backend, dataset=TEXTS, verbose=False)
    again = saekit.top_texts(
        sae,
        model=result.backend,
        dataset=TEXTS,
        site="blocks.1.hook_resid_post",
        features=[0],
        tokens=500,
        verbose=False,
    )
    assert again[0].feature == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": [24]}, "features: are 0 to 23 of this SAE, found 24"),
        ({"features": "worst"}, "features: must be 'best', 'random' or numbers of features, found 'worst'"),
        ({"k": 0}, "k: must be a whole number of 1 or more, found 0"),
        ({"site": "nowhere"}, "has no hook 'nowhere'"),
        ({"dataset": {"path": "./nowhere"}}, "there is no file or folder './nowhere'"),
        ({"dataset": {"path": "saekit/python-stdlib", "context_size": 65}}, "is 65, but the model .* takes at most 64"),
        ({"dataset": "owner/name"}, "the dataset 'owner/name' .* cannot be opened"),
        ({"dataset": ["few"]}, "does not fill one context"),
        ({"model": object()}, "model must be"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    how: dict[str, Any] = {"model": FakeBackend(), "dataset": TEXTS, "tokens": 200, "verbose": False}
    with pytest.raises((ConfigError, DataError, ModelError), match=message):
        saekit.top_texts(made(saekit.Sites.one(EARLY), context_size=16), **(how | options))
