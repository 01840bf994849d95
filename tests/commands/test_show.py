"""``saekit show``: whatever a folder holds is told, and what to type next; torch is not imported for it."""

from __future__ import annotations

import io
import json
import webbrowser
from pathlib import Path

import pytest
from rich.console import Console
from support.bad_forms import FORMS, good
from support.command import cli
from support.written import records, write_run, write_sweep

import saekit
from saekit.commands.show import show
from saekit.errors import PlaceError, SAEFormatError, StorageError
from saekit.files.storage import locked
from saekit.reports import draw_pictures
from saekit.saved import SAEFiles


def shown(folder: Path, *, draw: bool = False, open_it: bool = False) -> str:
    console = Console(width=1000, file=io.StringIO(), record=True)
    show(folder, console, draw=draw, open_it=open_it)
    return console.export_text()


def rest(text: str, title: str) -> list[str]:
    """The lines of a part at the end, as ``pictures``."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(title))
    found = [lines[first][10:].strip()]
    for line in lines[first + 1 :]:
        if not line.startswith(" " * 10):
            break
        found.append(line[10:].strip())
    return found


def test_a_finished_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = shown(folder)
    assert text.startswith(f"{folder}: finished\n")
    assert "standard, 1,024 features on blocks.1.hook_resid_post of saekit/tiny-python\n" in text
    assert rest(text, "pictures") == [f"none; saekit show {folder} --draw makes them of the metrics as they are now"]
    assert rest(text, "features") == [f"none were collected; saekit features {folder} does"]
    assert rest(text, "next") == [
        f"features       saekit features {folder}",
        f"dashboard      saekit dashboard {folder}",
        f"in Python      sae = saekit.SAE.load('{folder}/sae')",
        f"train longer   saekit train --resume {folder} training.training_tokens=200000 "
        "--allow training.training_tokens",
        f"one like it    saekit plan {folder}/config.toml",
    ]
    assert not list(folder.glob("curves*"))
    assert rest(shown(folder, draw=True), "pictures")[0].startswith(f"{folder}/curves.png (")
    (folder / "features").mkdir()
    (folder / "features" / "manifest.json").write_text("{}")
    (folder / "dashboard.html").write_text("")
    assert rest(shown(folder), "features") == [
        f"collected in {folder}/features",
        f"a dashboard: {folder}/dashboard.html",
    ]
    assert f"features       saekit features {folder}" not in rest(shown(folder), "next")
    (folder / "dashboard.html").unlink()
    (folder / "features" / "manifest.json").unlink()
    (folder / "features.txt").write_text("feature 3: «def»\n\x1b[31mred\n" + "more\n" * 90)
    features = rest(shown(folder), "features")
    assert features[:2] == ["feature 3: «def»", "\\x1b[31mred"]
    assert features[-1] == f"... 32 lines more in {folder}/features.txt"
    (folder / "features.html").write_text("")
    assert rest(shown(folder), "features")[-1] == f"as a page: {folder}/features.html"


def given(run: Path, *kinds: str) -> Path:
    """``run``, with what came from memory."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"in_memory": [*kinds]}))
    return run


def test_what_came_from_memory_is_in_what_to_type_next(tmp_path: Path) -> None:
    run = given(write_run(tmp_path / "run"), "dataset", "model")
    both = "--model MODEL --dataset DATASET"
    text = shown(run)
    assert rest(text, "features") == [f"none were collected; saekit features {run} {both} does"]
    assert rest(text, "next") == [
        f"features       saekit features {run} {both}",
        f"dashboard      saekit dashboard {run} {both}",
        f"in Python      sae = saekit.SAE.load('{run}/sae')",
        f"train longer   saekit.resume('{run}', overrides=['training.training_tokens=200000'], "
        "allow=['training.training_tokens'], dataset=..., model=...)",
        f"one like it    saekit plan {run}/config.toml model.name=MODEL dataset.path=DATASET",
    ]
    (run / "features").mkdir()
    (run / "features" / "manifest.json").write_text("{}")
    assert rest(shown(run), "next")[0] == f"dashboard      saekit dashboard {run} --model MODEL", "it has its text"
    stopped = given(write_run(tmp_path / "stopped", end="interrupted"), "dataset")
    assert rest(shown(stopped), "next")[0] == f"go on with it  saekit.resume('{stopped}', dataset=...)"


def test_of_a_run_without_a_model_nothing_is_said_that_needs_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    record = json.loads((run / "run.json").read_text()) | {"model": ""}
    (run / "run.json").write_text(json.dumps(record))
    text = shown(run)
    assert "saekit features" not in text
    assert "saekit dashboard" not in text
    assert rest(text, "next")[0].startswith("in Python")


@pytest.mark.parametrize("end", ["interrupted", "failed", "diverged"])
def test_a_run_that_ended_early(tmp_path: Path, end: str) -> None:
    folder = write_run(tmp_path / "a run", records(40, of=100), end=end, reason="why", sae=False)
    text = shown(folder)
    assert text.startswith(f"{folder}: {end}: why\n")
    assert "40,000 of 100,000 tokens" in text
    assert rest(text, "next") == [
        f"go on with it  saekit train --resume '{folder}'",
        f"one like it    saekit plan '{folder}/config.toml'",
    ]


def test_a_run_that_is_at_work(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [], end=None, sae=False)
    with locked(folder):
        text = shown(folder)
        assert text.startswith(f"{folder}: running\n")
        assert "nothing was logged yet" in text
        assert rest(text, "next")[0] == f"watch it       saekit watch {folder}"


def test_a_broken_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", end=None, sae=False)
    (folder / "config.toml").write_text("= 3")
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\0\n{}\n" + (folder / "metrics.jsonl").read_bytes()[:3000])
    text = shown(folder)
    assert f"broken: {folder}/config.toml cannot be read: " in text
    assert "an SAE\n" in text
    assert "explained variance" in text
    assert rest(text, "next") == [f"watch it       saekit watch {folder}"], "it has written a moment ago"
    (folder / "run.json").write_text("nothing")
    with pytest.raises(PlaceError, match=r"run.json cannot be read: JSONDecodeError"):
        shown(folder)


def test_lines_of_the_metrics_that_are_no_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00 nothing\n[1]\n")
    assert "broken: 2 lines of the metrics are no records\n" in shown(folder)


def test_a_sweep(tmp_path: Path) -> None:
    points = {"0_l1=1": {"sae": {"l1_coefficient": 1.0}}, "1_l1=9": {"sae": {"l1_coefficient": 9.0}}}
    folder = write_sweep(tmp_path / "sweep", points)
    draw_pictures(folder)
    text = shown(folder)
    assert [path.partition(" (")[0] for path in rest(text, "pictures")] == [
        f"{folder}/summary.png", f"{folder}/summary.html"
    ]  # fmt: skip
    assert (
        rest(shown(given(folder, "dataset")), "next")[-2] == f"compare them   saekit compare {folder} --dataset DATASET"
    )
    assert rest(text, "next")[-2:] == [
        f"compare them   saekit compare {folder}",
        f"look at one    saekit show {folder}/0_l1=1  # the highest CE recovered, 0.966, at an L0 of 124.8, "
        "where all have 17.27 to 124.8: compare SAEs of one L0",
    ]
    assert "l1_coefficient" in text
    assert shown(folder / "0_l1=1").startswith(f"{folder}/0_l1=1: finished\n")
    metrics = folder / "0_l1=1" / "metrics.jsonl"
    worse = [json.loads(line) for line in metrics.read_text().splitlines()]
    worse[-1]["evals/ce_recovered"] = -1.0
    metrics.write_text("".join(json.dumps(record) + "\n" for record in worse))
    assert rest(shown(folder), "next")[-1].startswith(
        f"look at one    saekit show {folder}/1_l1=9  # the highest CE recovered, "
    )


def test_of_saes_of_about_one_l0_nothing_is_added(tmp_path: Path) -> None:
    points = {f"{n}": {"sae": {"l1_coefficient": 1.0 + n / 20}} for n in range(2)}
    text = shown(write_sweep(tmp_path / "sweep", points))
    assert rest(text, "next")[-1].endswith("/0  # the highest CE recovered, 0.966, at an L0 of 124.8")


def test_a_saved_sae(tmp_path: Path) -> None:
    table = {
        "architecture": "topk", "d_sae": 4096, "d_in": 768, "dtype": "float32",
        "metadata": {"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "context_size": 128},
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(table))
    lines = shown(tmp_path).splitlines()
    assert lines[0] == f"{tmp_path}: an SAE"
    assert [line.split() for line in lines[2:-2]] == [
        ["architecture", "topk"], ["features", "4,096"], ["width", "768"], ["site", "blocks.8.hook_resid_pre"],
        ["model", "gpt2-small"], ["context", "size", "128"], ["type", "float32"],
    ]  # fmt: skip
    assert lines[-1].endswith(f"sae = saekit.SAE.load('{tmp_path}')")
    own = {"architecture": "saekit:transcoder", "inputs": [{"hook_name": "a"}], "targets": [{"hook_name": "b"}]}
    (tmp_path / "cfg.json").write_text(json.dumps(table | {"saekit": own}))
    assert ["site", "a", "and", "b"] in [line.split() for line in shown(tmp_path).splitlines()]
    for data, told in (("{", "cannot be read"), ("[]", "holds list, expected an object")):
        (tmp_path / "cfg.json").write_text(data)
        with pytest.raises(StorageError, match=told):
            shown(tmp_path)


@pytest.mark.parametrize("name", sorted({*FORMS} - {"qwen_scope", "llama_scope_r1_distill"}))
def test_an_sae_of_another_library(tmp_path: Path, name: str) -> None:
    """Whatever ``SAE.load`` loads without an option."""
    kind = "transcoders" if name == "gemma_2_transcoder" else "res"
    folder = good(FORMS[name], tmp_path / f"gemma-scope-2b-pt-{kind}")
    sae = saekit.SAE.load(folder)
    text = shown(folder)
    lines = [line.split() for line in text.splitlines()]
    assert ["features", f"{sae.d_sae:,}"] in lines
    assert ["architecture", sae.info.architecture] in lines
    assert sae.info.sites is None or sae.info.sites.inputs[0].hook_name in text
    assert f"sae = saekit.SAE.load({str(folder)!r})" in text
    if name != "saekit":
        assert f"format         {sae.info.provenance['loader']}: " in text
        assert f"saekit saes convert {folder} FOLDER --to saekit" in text


def test_one_file_of_weights_and_what_is_damaged(tmp_path: Path) -> None:
    folder = good(FORMS["goodfire"], tmp_path)
    file = folder / FORMS["goodfire"].weights
    assert "site           blocks.19.hook_resid_post" in shown(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SAEFormatError, match="it is cut off"):
        shown(folder)
    with pytest.raises(PlaceError, match="folders of runs; it looks like a folder of .* lacks ae.pt besid"):
        shown(_without(good(FORMS["dictionary_learning"], tmp_path / "b"), "ae.pt"))


def test_a_mistyped_folder_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what lies deep below it taken for what it is."""
    good(FORMS["dictionary_learning"], tmp_path / "above/deep/a/b/c/d")
    (tmp_path / "above/deep/.cache/1/2/3/4/5/6").mkdir(parents=True)
    text = shown(tmp_path / "above/deep")
    assert "format         saekit:dictionary_learning: " in text, "as deep as formats are"
    assert "files          a/b/c/d/ae.pt, a/b/c/d/config.json" in text
    many = tmp_path / "many/.git"
    many.mkdir(parents=True)
    for number in range(2000):
        (many / str(number)).touch()
    monkeypatch.setattr(SAEFiles, "at", None)  # nothing is read
    for place in (tmp_path / "above", tmp_path / "many"):
        with pytest.raises(PlaceError, match="nor are there folders of runs; .* give its own folder: below this one"):
            shown(place)


def _without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def test_several_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", records(10), end="interrupted")
    write_sweep(tmp_path / "three", {"a": {}, "b": {"training": {"lr": 0.5}}})
    (tmp_path / "four").mkdir()
    (tmp_path / "four/run.json").write_text("?")
    text = shown(tmp_path)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line and line[0] not in " ─"}
    assert lines["one"][-5:] == ["100,000", "0.812", "31.5", "0.943", "finished"]
    assert lines["two"][-1] == "interrupted"
    assert lines["three"][1:6] == ["a", "sweep", "of", "2", "SAEs"]
    assert lines["four"] == ["four", "broken"]


def test_what_is_none_of_that(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step-5").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-5/checkpoint.json").write_text("{}")
    (tmp_path / "file").write_text("")
    for place, told in (
        ("nothing", "nothing is not there; give a run folder"),
        ("file", "file is a file, not a folder"),
        ("run", r"there is neither a run \(run.json\) nor an SAE \(cfg.json\) in .*run"),
        ("run/checkpoints/step-5", f"is a checkpoint; saekit show {tmp_path}/run shows its run"),
    ):
        with pytest.raises(PlaceError, match=told):
            shown(tmp_path / place)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(PlaceError, match="is not a run folder, so there are no pictures to open"):
        shown(tmp_path, open_it=True)


def test_of_long_metrics_the_end_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(200))
    filler = json.dumps({"step": 1, "why": "x" * 1000}) + "\n"
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1, "evals/of_long_ago": 3.0}\n' + filler * 5000 + metrics.read_text())
    text = shown(folder)
    assert "of_long_ago" not in text, "more than four megabytes before"
    assert "200 steps" in text


def test_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or len(opened) < 2)
    folder = write_run(tmp_path / "run")
    shown(folder, open_it=True)
    assert opened == [(folder / "curves.html").as_uri()], "which it has drawn before"
    assert "no browser was found; the picture is" in shown(folder, open_it=True)
    assert "there is no picture to open: nothing was logged" in shown(write_run(tmp_path / "empty", []), open_it=True)


def test_on_the_command_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(2000))
    assert f"{folder}: finished" in cli("show", folder, watch=True).stdout
    wrong = cli("show", tmp_path / "nothing", check=2, watch=True).stderr
    assert wrong.startswith("error: ")
    assert "is not there" in wrong
    drawn = cli("show", folder, "--draw").stdout
    assert "curves.html (" in drawn


def test_it_draws_a_real_run_of_another_process(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        saekit.dump_config(
            saekit.load_config(
                {
                    "dataset": {"context_size": 32},
                    "sae": {"name": "standard", "d_sae": 64},
                    "training": {"training_tokens": 2000, "train_batch_size_tokens": 500, "log_frequency": 1},
                    "evals": {"n_contexts": 2},
                    "checkpoints": {"folder": str(tmp_path), "name": "run"},
                }
            )
        )
    )
    cli("train", tmp_path / "run.toml")
    text = cli("show", tmp_path / "run", watch=True).stdout
    assert "2,000 tokens of saekit/python-stdlib, 4 steps" in text
    assert "dead features" in text
    assert "of 64" in text
