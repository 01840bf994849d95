"""``saekit.evaluate``: SAEs, runs and folders, in their own models and on text that was held out."""

from __future__ import annotations

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from rich.console import Console
from support.sweeps import DOCUMENTS, manager
from support.tiny import run_config

import saekit
from saekit.commands.measured import show_evaluations
from saekit.commands.show import show
from saekit.commands.terminal.measuring import evals_of
from saekit.defaults import DEFAULT_EVALS
from saekit.errors import ConfigError, ModelError, PluginError, PluginFailedError, SAEFormatError
from saekit.measuring import Evaluation, Evaluations
from saekit.testing import FakeBackend, fake_plugin

SITE = "blocks.0.hook_resid_post"
QUICK: dict[str, Any] = {"n_bootstrap": 50, "n_contexts": 4, "verbose": False}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*wrong site, scale or model"),  # they were hardly trained
    pytest.mark.filterwarnings("ignore:.*hardly better than guessing"),  # a fake model does
]


def config(folder: Path, name: str, seed: int = 1) -> dict[str, Any]:
    return run_config(
        folder,
        model={"backend": "fake"},
        site={"hook_name": SITE},
        training={"training_tokens": 512, "seed": seed},
        evals={"split": None, "held_out_every": 3, "n_contexts": 6, "run": []},
        checkpoints={"folder": str(folder), "name": name},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, ``a`` and ``b``, on the fake model."""
    folder = tmp_path_factory.mktemp("runs")
    documents = folder / "text.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for seed, name in enumerate("ab"):
        options = config(folder, name, seed)
        options["dataset"] |= {"path": str(documents)}
        saekit.train(options, plugins=manager())
    return folder


def evaluated(saes: Any, backend: FakeBackend | None = None, **options: Any) -> Any:
    return saekit.evaluate(saes, plugins=manager(backend), **(QUICK | options))


def test_a_run_is_measured_on_what_it_held_out_and_keeps_its_numbers(runs: Path) -> None:
    backend = FakeBackend()
    found = evaluated(runs / "a", backend, mean_ablation_contexts=2, kl=True, top1=True, n_contexts=5)
    assert isinstance(found, Evaluation)
    about = found.about
    assert (about["held_out"], about["n_contexts"], about["context_size"], about["model"]) == (True, 5, 32, "fake")
    assert {"explained_variance", "ce_recovered", "kl_div_with_sae", "ce_recovered_from_mean"} <= {*found.errors}
    assert len(found.resampled["l0"]) == 50
    saved = json.loads((runs / "a" / "sae" / "evals.json").read_text())
    assert saved["values"] == found.to_dict()["values"]
    assert saved["about"]["evals"]["saekit:downstream"]["mean_ablation_contexts"] == 2
    sae = saekit.SAE.load(runs / "a", plugins=manager(), verify=True)
    assert evaluated(sae, save=True, mean_ablation_contexts=2, kl=True, top1=True, n_contexts=5).values == found.values


def test_numbers_say_which_weights_they_are_of(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = saekit.SAE.load(runs / "a", plugins=manager())
    folder = sae.save(tmp_path / "sae")
    found = evaluated(folder)
    assert found.about["weights_sha256"] == sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
    assert "weights_sha256" not in evaluated(sae).about
    show(folder, Console(width=200))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"CE recovered {found.text_of('ce_recovered')}" in shown
    saved = (folder / "evals.json").read_bytes()
    evaluated(saekit.SAE.load(runs / "b", plugins=manager()).save(folder))
    (folder / "evals.json").write_bytes(saved)
    show(folder, Console(width=200))
    assert "nothing: evals.json is of other weights; saekit eval" in capsys.readouterr().out


def test_numbers_of_another_place_are_not_kept_as_its_own(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saekit.SAE.load(runs / "a", plugins=manager()).save(tmp_path / "sae")
    file, elsewhere = folder / "evals.json", "blocks.1.hook_resid_post"
    told = f"^the numbers are not kept in {file}: that is for those of the SAE in the place where it was trained"
    with pytest.warns(UserWarning, match=f"was trained at {SITE} is put"), pytest.warns(UserWarning, match=told):
        found = evaluated(folder, site=elsewhere)
    assert found.file is None
    assert not file.exists()
    assert found.about["unlike_training"][0].startswith(f"an SAE that was trained at {SITE} is put at {elsewhere}")
    kept = evaluated(folder, site=SITE, n_contexts=3)
    assert "unlike_training" not in kept.about
    before = file.read_bytes()
    about = json.loads((folder / "cfg.json").read_text())
    about["saekit"]["metadata"] |= {"model_name": "another", "model_fingerprint": "of another"}
    del about["saekit"]["seal"]
    (folder / "cfg.json").write_text(json.dumps(about))
    other = "was trained on activations of 'another', and this"
    with pytest.warns(UserWarning, match=other), pytest.warns(UserWarning, match=told):
        evaluated(folder, model=FakeBackend())
    assert file.read_bytes() == before
    show(folder, Console(width=400))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"measured on 96 of 96 tokens of 3 contexts of 32 tokens of {runs}/text.jsonl, held out from" in shown
    assert f"; at {SITE}" in shown
    with pytest.warns(UserWarning, match=other):
        assert evaluated(folder, model=FakeBackend(), save=False).file is None
    about["saekit"]["metadata"] |= {"model_name": "/models/another", "model_fingerprint": None}
    (folder / "cfg.json").write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="which may be another name of it"):
        perhaps = evaluated(folder, model=FakeBackend())
    assert perhaps.file == file, "nobody knows that it is another"
    assert "which may be another name of it" in json.loads(file.read_text())["about"]["perhaps_unlike_training"][0]


def test_held_out_documents_are_not_those_of_training(runs: Path) -> None:
    seen: list[torch.Tensor] = []

    def build(config: Any, *, run: Any) -> Any:
        return lambda sae, *, backend, sites, contexts: seen.append(contexts) or {"one": 1.0}

    plugins = manager(None, fake_plugin("evals", "seen", build))
    found = saekit.evaluate(runs / "a", evals=["seen"], plugins=plugins, save=False, verbose=False)
    assert found.values == {"one": 1.0}
    held = [document["text"] for number, document in enumerate(DOCUMENTS) if number % 3 == 2]
    for row in seen[0].tolist():
        parts = "".join(map(chr, row)).split("\0")  # at BOS
        assert all(any(part in document for document in held) for part in parts)
    with pytest.raises(ConfigError, match="kl: is no argument, and no option of test:seen: these have value"):
        saekit.evaluate(runs / "a", evals=["seen"], plugins=plugins, kl=True, verbose=False)


def test_saes_that_share_a_model_share_its_clean_forward(runs: Path) -> None:
    backend = FakeBackend()
    found = evaluated([runs / "a", runs / "b", runs / "a"], backend, save=False)
    assert isinstance(found, Evaluations)
    assert [*found] == [f"{runs}/a", f"{runs}/b", f"{runs}/a (2)"]
    measured = [shape for shape in backend.forwards if shape == (4, 32)]
    assert len(measured) == 1 + 1 + 3
    one, two, again = found.values()
    assert one.values == again.values != two.values
    assert one.contexts == two.contexts
    assert one.about["contexts_digest"] == two.about["contexts_digest"]
    whole = evaluated(runs, save=False)
    assert [*whole] == [f"{runs}/a", f"{runs}/b"], "a folder of runs is what is in it"


def test_what_counts_can_be_said_anew(runs: Path) -> None:
    whole = evaluated(runs / "a", save=False)
    part = evaluated(runs / "a", save=False, exclude_special_tokens=True, seqpos_slice=(1, 20), mask=lambda t: t != 101)
    assert whole.about["tokens_used"] == whole.about["tokens_of"] > part.about["tokens_used"]
    assert part.about["tokens"] == {"exclude_special_tokens": [0], "seqpos_slice": [1, 20]}
    assert part.about["masked"]
    with pytest.raises(ConfigError, match="no token of the contexts counts"):
        evaluated(runs / "a", save=False, mask=lambda tokens: tokens < 0)


def test_an_sae_of_nobody_knows_where_it_belongs_or_is_told() -> None:
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 8, "d_sae": 16})
    contexts = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="model: is missing: the SAE does not say which model"):
        evaluated(sae, site=SITE)
    with pytest.raises(ConfigError, match="sites: are missing|site: is missing"):
        evaluated(sae, model=FakeBackend(), contexts=contexts)
    with pytest.raises(ConfigError, match="dataset: is missing"):
        evaluated(sae, model=FakeBackend(), site=SITE)
    with pytest.raises(ModelError, match="no hook 'blocks.0.hook_resid_pots'. Did you mean 'blocks.0.hook_resid_post'"):
        evaluated(sae, model=FakeBackend(), site="blocks.0.hook_resid_pots", contexts=contexts)
    with pytest.raises(
        ConfigError, match=r"contexts: must be token ids \[n, context_size\], whole numbers; found \[4\]"
    ):
        evaluated(sae, model=FakeBackend(), site=SITE, contexts=contexts[:, 0])
    with pytest.raises(ConfigError, match=r"contexts: must be token ids of 'fake'.* 0 to 127"):
        evaluated(sae, model=FakeBackend(), site=SITE, contexts=contexts + 100)
    with pytest.raises(ConfigError, match=r"contexts: must be .*: contexts of 72 tokens are too long: .* at most 64"):
        evaluated(sae, model=FakeBackend(), site=SITE, contexts=contexts.repeat(1, 6))
    with pytest.raises(ConfigError, match="mask: must be a function of tokens"):
        evaluated(sae, model=FakeBackend(), site=SITE, mask=contexts > 3)
    with pytest.raises(ConfigError, match="saes: must be an SAE, .* found 3"):
        evaluated(3)
    with pytest.raises(ConfigError, match="n_contexts: must be a whole number of 1 or more, found 0"):
        evaluated(sae, n_contexts=0)
    with pytest.raises(ConfigError, match="saes: names none"):
        evaluated([])
    with pytest.raises(ConfigError, match=r"mean_ablation_contexts: is 9, and there are 4 contexts: ask for fewer"):
        evaluated(sae, model=FakeBackend(), site=SITE, contexts=contexts, mean_ablation_contexts=9)


def test_contexts_and_masks_of_any_kind(runs: Path) -> None:
    sae = saekit.SAE.load(runs / "a", plugins=manager())
    tokens = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0  # BOS, as in training
    mask = tokens > 20
    kinds = [(tokens, mask), (tokens.to(torch.uint8), mask.numpy()), (tokens.tolist(), mask.tolist())]
    values = [evaluated(sae, FakeBackend(), contexts=one, mask=kept, save=False).values for one, kept in kinds]
    assert values[0] == values[1] == values[2]
    for wrong, told in (
        ({"contexts": mask}, r"contexts: must be token ids \[n, context_size\], whole numbers; found .* torch.bool"),
        ({"contexts": [[1, 2], [3]]}, r"contexts: must be token ids \[n, context_size\]: "),
        ({"contexts": tokens, "mask": mask[:3]}, r"mask: must .* bool, \[4, 12\] as the contexts; found \[3, 12\]"),
        ({"contexts": tokens, "mask": mask.long()}, r"mask: must .* found \[4, 12\], torch.int64"),
    ):
        with pytest.raises(ConfigError, match=told):
            evaluated(sae, **wrong)


def test_a_text_is_named_or_passed(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[::-1]))
    given = [path, str(path), {"path": str(path)}, DOCUMENTS[::-1]]
    found = [evaluated(runs / "a", FakeBackend(), dataset=dataset, save=False) for dataset in given]
    assert len({one.about["contexts_digest"] for one in found}) == 1
    assert [one.about["dataset"] for one in found] == [*[str(path)] * 3, "a dataset from memory"]


def test_a_model_that_guesses_is_told(runs: Path) -> None:
    sae = saekit.SAE.load(runs / "a", plugins=manager())
    contexts = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    contexts[:, 0] = 0  # BOS, as in training
    with pytest.warns(UserWarning, match=r"the model's own loss is .* nats, hardly better than guessing \(4.85,"):
        evaluated(sae, FakeBackend(), contexts=contexts, save=False)


def test_what_is_worse_than_the_mean_says_so() -> None:
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 8, "d_sae": 16})
    with torch.no_grad():
        sae.b_dec.fill_(90.0)
    contexts = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="wrong site, scale or model") as told:
        found = evaluated({"mine": sae}, model=FakeBackend(), site=SITE, contexts=contexts)
    assert [str(one.message)[:30] for one in told] == [remark[:30] for remark in found["mine"].remarks]
    assert found["mine"]["explained_variance"] < 0


def test_the_model_is_run_as_it_was_in_training(tmp_path: Path, runs: Path) -> None:
    """In the reference, evals drop the model's options."""
    given: list[Any] = []

    def build(options: Any, *, model: Any, loaded: Any = None) -> Any:
        given.append((options.value, model.autocast))
        return FakeBackend()

    plugins = saekit.testing.isolated_manager(fake_plugin("model_backends", "fake_model", build), builtins=True)
    options = config(tmp_path, "run") | {"model": {"backend": {"name": "fake_model", "value": 7}, "autocast": True}}
    options["dataset"] |= {"path": str(runs / "text.jsonl")}
    saekit.train(options, plugins=plugins)
    saekit.evaluate(tmp_path / "run", plugins=plugins, save=False, **QUICK)
    assert set(given) == {(7, True)}


def test_what_is_assumed_of_a_run_is_said(tmp_path: Path, runs: Path) -> None:
    """Of one whose configuration cannot be loaded, and of an SAE that does not say what was held out."""
    shutil.copytree(runs / "a", tmp_path / "a")
    file = tmp_path / "a" / "config.toml"
    file.write_text(file.read_text() + "\n[surprise]\n")
    words = f"^{re.escape(str(file))} cannot be loaded: (.|\n)*surprise(.|\n)*those that the SAE itself says"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        found = evaluated(tmp_path / "a", FakeBackend(), model=FakeBackend(), save=False)
    assert sum(one.category is RuntimeWarning for one in caught) == 1
    assert found.values == evaluated(runs / "a", save=False).values
    contexts = torch.randint(1, 120, (4, 12), generator=torch.Generator().manual_seed(0))
    contexts[:, 0] = 0  # bos, as in its training
    evaluated(tmp_path / "a", model=FakeBackend(), contexts=contexts, save=False)  # where it would say nothing
    sae = saekit.SAE.load(runs / "a", plugins=manager())
    del sae.info.metadata["held_out_every"]
    words = "^mine does not say which documents were held out .* one document in 20 is taken to be"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert evaluated({"mine": sae})["mine"].about["held_out"]
    assert sum(one.category is RuntimeWarning for one in caught) == 1


def test_an_eval_that_fails_is_named(runs: Path) -> None:
    def build(config: Any, *, run: Any) -> Any:
        def fails(sae: Any, **given: Any) -> Any:
            raise RuntimeError("no such thing")

        return fails

    plugins = manager(None, fake_plugin("evals", "failing", build))
    with pytest.raises(PluginFailedError, match="eval 'test:failing' .* failed in __call__: RuntimeError"):
        saekit.evaluate(runs / "a", evals=["failing"], plugins=plugins, save=False, verbose=False)


def test_two_evals_with_a_number_of_one_name_are_both_named(runs: Path) -> None:
    plugins = manager(None, fake_plugin("evals", "mine", lambda config, *, run: lambda *_, **__: {"l0_se": 9.0}))
    evals: dict[str, Any] = {"evals": ["reconstruction", "mine"], "plugins": plugins}
    told = "the evals 'saekit:reconstruction' and 'test:mine' both give a number 'l0_se', .* and 9"
    with pytest.raises(PluginError, match=told):
        saekit.evaluate(runs / "a", save=False, verbose=False, n_contexts=4, **evals)


def test_a_table_and_json_are_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(runs, save=False)
    show_evaluations(found)
    lines = capsys.readouterr().out.splitlines()
    assert f"{runs}/a" in lines[0]
    assert any(line.startswith("explained_variance ") and line.count(" ± ") == 2 for line in lines)
    assert any(line.split()[:4] == ["ce_loss_without_sae", "CE", "without", "an"] for line in lines)
    assert lines[-1].startswith("128 of 128 tokens of 4 contexts of 32 tokens of ")
    assert lines[-1].endswith("held out from training; model fake; ± standard error by bootstrap over contexts")
    show_evaluations(next(iter(found.values())), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [*told] == [f"{runs}/a"]
    assert told[f"{runs}/a"]["errors"]["l0"] > 0


def test_files_are_told_and_histograms_stand_on_a_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(runs / "a")
    file = runs / "a" / "sae" / "evals.json"
    assert found.file == file
    show_evaluations(found)
    assert capsys.readouterr().out.splitlines()[-1] == f"Written: {file}"
    assert re.search(r'"counts": \[\d+, .*, \d+\],$', file.read_text(), re.MULTILINE)
    assert json.loads(file.read_text()) == found.to_dict()


def test_fewer_contexts_than_were_asked_for_are_a_warning(runs: Path) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"the held-out text fills \d+ contexts of 32 tokens, and 900 were asked for"
    ):
        found = evaluated(runs / "a", FakeBackend(), n_contexts=900, save=False)
    assert len(found.contexts) < 900


def test_a_wrong_width_is_found_before_the_text_is_read(runs: Path) -> None:
    sae = saekit.SAE.from_dict({"name": "standard", "d_in": 5, "d_sae": 16})
    with pytest.raises(ConfigError, match="the SAE expects 5 there"):
        evaluated(sae, FakeBackend(), model=FakeBackend(), site=SITE, dataset="/nowhere/text.jsonl")


def test_natural_mistakes_get_near_names(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"n_context: is no argument, .* Did you mean 'n_contexts'"):
        evaluated(runs / "a", n_context=3)
    with pytest.raises(ConfigError, match=r"top_1: is no argument, .* Did you mean 'top1'"):
        evaluated(runs / "a", top_1=True)
    with pytest.raises(SAEFormatError, match=rf"no file or folder {runs}/aa, .* Did you mean '{runs}/a'"):
        evaluated(f"{runs}/aa")
    sae = saekit.SAE.load(runs / "a", plugins=manager())
    stated = attrs.evolve(sae.info, metadata={**sae.info.metadata, "context_size": "abc"})
    sae.info = stated
    with pytest.raises(ConfigError, match=r"dataset.context_size: is 'abc' in the SAE's metadata, expected a whole"):
        evaluated(sae, FakeBackend(), save=False, dataset=DOCUMENTS)
    for name in ("", "a\nb"):
        with pytest.raises(ConfigError, match="saes: have a name .*, which tables cannot show"):
            saekit.compare({name: runs / "a", "b": runs / "b"}, plugins=manager(), verbose=False)


def test_a_given_text_is_drawn_by_the_seed(runs: Path) -> None:
    documents = [{"text": f"{index} {document['text']}"} for index, document in enumerate(DOCUMENTS * 8)]
    found = [evaluated(runs / "a", FakeBackend(), dataset=documents, seed=seed, save=False) for seed in (0, 0, 1)]
    first, again, other = (one.about["contexts_digest"] for one in found)
    assert first == again != other


def test_saes_of_other_texts_have_tables_of_their_own(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one(name: str, digest: str) -> Evaluation:
        about = {"sae": name, "contexts_digest": digest, "model": "fake", "n_contexts": 2, "context_size": 4}
        return Evaluation(values={"l0": 3.0}, about=about | {"dataset": digest})

    found = Evaluations({name: one(name, digest) for name, digest in (("a", "x"), ("b", "y"), ("c", "x"))})
    assert [[*part] for part in found.by_text()] == [["a", "c"], ["b"]]
    assert found._repr_html_().count("<table") == 2
    show_evaluations(found)
    told = capsys.readouterr().out
    assert told.count("l0   l0") == 2
    assert "Numbers of one table cannot be compared with those of another" in told
    show_evaluations(Evaluations({name: found[name] for name in "ac"}))
    assert "cannot be compared" not in capsys.readouterr().out


def test_one_text_for_all_is_what_was_held_out_from_any(runs: Path) -> None:
    own = saekit.SAE.load(runs / "a", plugins=manager())
    path = str(runs / "text.jsonl")
    foreign = saekit.SAE.from_dict({"name": "topk", "d_in": own.d_in, "d_sae": 16, "k": 4})
    packing = {name: value for name, value in own.info.metadata.items() if "token" in name or name == "context_size"}
    known = {**packing, "prepend_bos": own.info.metadata["prepend_bos"], "dataset_path": path}
    known.pop("training_tokens")
    foreign.info = attrs.evolve(foreign.info, sites=own.info.sites, metadata=known, provenance={"loader": "another"})
    saes = {"own": own, "foreign": foreign}
    given: dict[str, Any] = {"plugins": manager(), "model": FakeBackend(), "n_contexts": 4, "n_bootstrap": 20}
    with pytest.raises(ConfigError, match="held_out True and False"):
        saekit.compare(saes, verbose=False, **given)
    found = saekit.compare(saes, dataset=path, verbose=False, **given)
    assert found.about["held_out"] is True


def test_an_eval_is_named_on_the_command_line_with_its_options() -> None:
    table = {"name": "downstream", "kl": True}
    assert evals_of(["reconstruction", '{name="downstream",kl=true}']) == ["reconstruction", table]
    assert evals_of(None) == DEFAULT_EVALS
    with pytest.raises(
        ConfigError, match=r"--evals: is '{name=downstream}', which is no table of TOML; expected a key"
    ):
        evals_of(["{name=downstream}"])
