"""What a loader of saved SAEs promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.abilities import ConvertsConfigs, KnowsParts, WritesSAEs
from saekit.defaults import DEFAULT_ARCHITECTURE
from saekit.errors import PluginFailedError, SAEFormatError, SaekitError
from saekit.pretrained.exporting import export
from saekit.pretrained.load import load_sae
from saekit.pretrained.made import made_from
from saekit.reasons import error_text
from saekit.saved import PretrainedSAE, SAEFiles
from saekit.testing.checks.check import Checks, Fault, NotTried, Subject, must
from saekit.testing.checks.numbers import must_agree, must_be_equal, seeded
from saekit.testing.checks.sae_files import cut_off, with_other_tensors, without

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.sae import SAEModule

CHECKS = Checks()
_CLOSE = 1e-5
_FOREIGN: Mapping[str, Mapping[str, bytes]] = {
    "an empty folder": {},
    "a model": {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"\x08\0\0\0\0\0\0\0{}      "},
    "notes": {"README.md": b"# Notes\n", "notes.txt": b"", "sub/data.csv": b"a,b\n1,2\n"},
    "pictures": {"one.png": b"\x89PNG", "two.jpg": b"\xff\xd8"},
}


@CHECKS.add
def build(subject: Subject) -> None:
    """It is built from its options, and keeps to its protocol."""
    subject.build()


@CHECKS.add
def detects(subject: Subject) -> None:
    """``detects`` is above 0 of its own folders and of no foreign one, by names and small files of JSON alone."""
    loader = subject.build()
    for what, files in _FOREIGN.items():
        score = _score(loader, SAEFiles(what, frozenset(files), _small_json(_written(subject.place / what, files))))
        must(not score, f"detects takes {what} for its own: {', '.join(files) or 'no files'}")
    for folder in subject.folders:
        own = SAEFiles.in_folder(folder)
        seen = SAEFiles(own.place, own.names, _small_json(folder), address=own.address, repo=own.repo)
        must(_score(loader, seen), f"detects does not know {', '.join(sorted(own.names))}")


def _score(loader: Any, files: SAEFiles) -> float:
    found = loader.detects(files)
    ok = isinstance(found, bool | int | float) and 0 <= found <= 1
    must(ok, f"detects returns {found!r}, expected true, false or a number from 0 to 1")
    return float(found)


def _small_json(folder: Path) -> Callable[[str], Path]:
    def path(name: str) -> Path:
        if not name.endswith(".json"):
            raise Fault(f"detects reads {name!r}; it judges by names and small files of JSON alone")
        return folder / name

    return path


def _written(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@CHECKS.add
def refuses_foreign_folders(subject: Subject) -> None:
    """``load`` of what is no SAE of its format is an error of saekit's."""
    loader = subject.build()
    for what, files in _FOREIGN.items():
        folder = _written(subject.place / what, files)
        made = _read(partial(loader.load, SAEFiles.in_folder(folder)), f"there is {what}")
        must(made is None, f"load makes an SAE of {what}")


def _folders(subject: Subject) -> tuple[Path, ...]:
    if not subject.folders:
        raise NotTried(f"no SAE of its format is given: folders={{{subject.item.entry.name!r}: ...}}")
    return subject.folders


def _loaded(subject: Subject, folder: Path) -> SAEModule:
    return load_sae(SAEFiles.in_folder(folder), loader=subject.options, plugins=subject.plugins)


@CHECKS.add
def loads(subject: Subject) -> None:
    """An SAE of its format is read, the same each time, and can be used; its files stay as they are."""
    for folder in _folders(subject):
        before = _contents(folder)
        read = subject.build().load(SAEFiles.in_folder(folder))
        must(isinstance(read, PretrainedSAE), f"load returns {type(read).__name__}, expected a PretrainedSAE")
        sae = _loaded(subject, folder)
        x = _inputs(sae)
        output = sae(x)
        must(output.isfinite().all(), f"the SAE in {folder} makes outputs that are no finite numbers")
        must_be_equal("the SAE, loaded again,", _everything(_loaded(subject, folder)), _everything(sae))
        must(_contents(folder) == before, f"load changes the files of {folder}")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _everything(sae: SAEModule) -> dict[str, Tensor]:
    tensors = {name: value.detach() for name, value in sae.state_dict().items()}
    return tensors if sae.log_sparsity is None else {**tensors, "log_sparsity": sae.log_sparsity}


@CHECKS.add
def saves(subject: Subject) -> None:
    """What it read can be saved by saekit and loaded again, with the same outputs."""
    for number, folder in enumerate(_folders(subject)):
        sae: Any = _loaded(subject, folder)
        sae.save(subject.place / f"saved-{number}")
        again = load_sae(SAEFiles.in_folder(subject.place / f"saved-{number}"), plugins=subject.plugins)
        x = _inputs(sae)
        must_be_equal("the outputs, saved and loaded again,", again(x), sae(x))


def _read(load: Callable[[], Any], what: str) -> Any:
    """What ``load`` makes, or None where it refuses as it should."""
    try:
        return load()
    except PluginFailedError as error:  # by its own code
        raise Fault(f"of a folder in which {what} it raises {error.__cause__!r}, expected a SAEFormatError") from error
    except SaekitError:
        return None
    except Exception as error:
        raise Fault(f"of a folder in which {what} it raises {error!r}, expected a SAEFormatError") from error


def _refused_or_the_same(subject: Subject, whole: Mapping[str, Tensor], damaged: Iterator[tuple[str, Path]]) -> None:
    for what, folder in damaged:
        sae = _read(partial(_loaded, subject, folder), what)
        if sae is None:
            continue
        found = _everything(sae)
        try:
            must_be_equal("the SAE", {name: found.get(name) for name in whole}, whole)
        except Fault:
            raise Fault(f"of a folder in which {what} it makes another SAE, expected a SAEFormatError") from None


@CHECKS.add
def refuses_damaged_files(subject: Subject) -> None:
    """A file that is cut off is refused with an error of saekit's; one that is missing raises no other."""
    for folder in _folders(subject):
        _refused_or_the_same(subject, _everything(_loaded(subject, folder)), cut_off(folder, subject.place))
        for what, copy in without(folder, subject.place):
            _read(partial(_loaded, subject, copy), what)


@CHECKS.add
def refuses_no_numbers(subject: Subject) -> None:
    """Weights that hold NaN are refused, and not made into others."""

    def spoilt(value: Tensor) -> Tensor:
        if value.is_floating_point():  # whole numbers cannot be NaN
            value.view(-1)[-1] = float("nan")
        return value

    for folder in _folders(subject):
        whole = _everything(_loaded(subject, folder))
        damaged = with_other_tensors(folder, subject.place, spoilt)
        _refused_or_the_same(subject, whole, ((f"{what} holds NaN", copy) for what, copy in damaged))


@CHECKS.add
def refuses_wrong_shapes(subject: Subject) -> None:
    """Weights of another shape, or of which one is missing, are refused."""

    def shorter(value: Tensor) -> Tensor:
        return value[:-1].clone() if value.ndim and len(value) > 1 else value.repeat(2)

    for folder in _folders(subject):
        whole = _everything(_loaded(subject, folder))
        damaged = with_other_tensors(folder, subject.place, shorter)
        _refused_or_the_same(subject, whole, ((f"{what} has another shape", copy) for what, copy in damaged))
        for what, copy in with_other_tensors(folder, subject.place, lambda value: None):
            _read(partial(_loaded, subject, copy), f"{what} is missing")


@CHECKS.add
def missing_part(subject: Subject) -> None:
    """Where it has a ``missing_part``, that is a text or None: None of foreign files, and a text where of files of its
    own, which ``detects`` no longer knows, one is missing."""
    loader = subject.build()
    if not isinstance(loader, KnowsParts):
        raise NotTried("it has none")
    for what in ("notes", "pictures", "an empty folder"):
        said = loader.missing_part(SAEFiles.in_folder(_written(subject.place / what, _FOREIGN[what])))
        must(said is None, f"of {what} it says that {said!r} is missing, expected None")
    for folder in _folders(subject):
        told: list[object] = []
        for _, copy in without(folder, subject.place):
            files = SAEFiles.in_folder(copy)
            if not loader.detects(files):
                told.append(loader.missing_part(files))
        wrong = [said for said in told if said is not None and not isinstance(said, str)]
        must(not wrong, f"it gives {wrong}, expected a text or None")
        if len(told) > 1:  # of one file alone nothing is left to say it by
            must(
                any(told), f"of the files of {folder}, each of which is left out once, it says that nothing is missing"
            )


@CHECKS.add
def writes(subject: Subject) -> None:
    """Where it has a ``write_sae``, what is written and read again is the same SAE: architecture, weights, site,
    features and outputs.  What its format has no place for is a :class:`saekit.errors.SAEFormatError`."""
    if not isinstance(subject.build(), WritesSAEs):
        raise NotTried("it has none")
    refused = []
    for number, (what, name, sae) in enumerate(_to_be_written(subject)):
        home = subject.place / str(number) / name
        home.parent.mkdir()
        try:
            export(sae, home, subject.options, plugins=subject.plugins)
        except PluginFailedError as error:
            raise Fault(f"{error} (of {what})") from error
        except SAEFormatError as error:
            refused.append(f"of {what}: {error}")
            continue
        try:
            again = _loaded(subject, home)
        except Exception as error:
            raise Fault(f"what is written of {what} cannot be read again: {error_text(error)}") from error
        _must_be_the_same(again, sae, f"({what}, written and read again)")
    if len(refused) > number:
        raise NotTried("; ".join(refused))


def _to_be_written(subject: Subject) -> Iterator[tuple[str, str, SAEModule]]:
    """What each is, the name of its folder, by which some formats name the site, and the SAE."""
    import torch

    for folder in subject.folders:
        yield f"the SAE in {folder}", folder.name, _loaded(subject, folder)
    options = {"name": DEFAULT_ARCHITECTURE, "d_in": 8, "d_sae": 16}
    sae = made_from(options, None, 0, "cpu", subject.plugins)
    for name in ("b_enc", "b_dec"):  # which start at zero
        bias = getattr(sae, name).data
        bias.copy_(torch.randn(bias.shape, generator=seeded(len(bias))) / 8)
    yield "an SAE of the default architecture, of no site", "written", sae


def _must_be_the_same(again: SAEModule, sae: SAEModule, where: str) -> None:
    found, expected = (type(one).__qualname__ for one in (again, sae))
    must(found == expected, f"it is a {found}, expected a {expected} {where}")
    lost = [name for name, value in sae.public_tensors().items() if name not in again.public_tensors()]
    must(not lost, f"there is no {', '.join(lost)} {where}")
    for name, value in sae.public_tensors().items():
        must_agree(f"{name} {where}", again.public_tensors()[name].to(value.dtype), value, _CLOSE)
    must(again.info.site == sae.info.site, f"its site is {again.info.site}, expected {sae.info.site} {where}")
    x = _inputs(sae)
    must_agree(f"features {where}", again.encode(x), sae.encode(x), _CLOSE)
    must_agree(f"outputs {where}", again(x), sae(x), _CLOSE)


@CHECKS.add
def converts_configs(subject: Subject) -> None:
    """Where it has a ``convert_config``, that gives None of what is no configuration of its library."""
    loader = subject.build()
    if not isinstance(loader, ConvertsConfigs):
        raise NotTried("it has none")
    for table in ({}, {"model": "gpt2"}, {"learning_rate": 1e-3, "layers": [1, 2], "nothing": None}):
        found = loader.convert_config(table)
        must(found is None, f"of {table} it makes {found!r}, expected None")


def _inputs(sae: SAEModule) -> Tensor:
    """Five rows, or one sequence of them."""
    import torch

    shape = (1, 5, sae.d_in) if sae.reads_sequences else (5, sae.d_in)
    return torch.randn(shape, generator=seeded()).to(sae.dtype)
