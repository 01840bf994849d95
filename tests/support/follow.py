"""Follow a page of the documentation to the letter.

:func:`script_of` makes one program of its Python blocks and its commands, in the order in which they stand there, as
somebody who reads it would run them.  What only a network has is replaced by something like it, and runs from the
command line, of which no page says how long they take, are made short.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import signal
import socket
import threading
import time
import tomllib
import urllib.request
import warnings
import webbrowser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import saekit_plugins

if TYPE_CHECKING:
    from saekit.config import PluginChoice
    from saekit.plugins.manager import PluginManager

TOKENIZER = Path(saekit_plugins.__file__).parent / "backends" / "tiny_python"
ROOT = Path(__file__).parents[2]
RUNNER_CONFIG = ROOT / "tests" / "golden_runner_configs" / "standard.json"
LOCAL = {
    "gpt2-small": "saekit/tiny-python",
    "tokenizer=gpt2": f"tokenizer={TOKENIZER}",
    "blocks.8.": "blocks.1.",
    "owner/texts": "texts.jsonl",
    "num_proc=8": "num_proc=2",
    "context_size=256": "context_size=64",
    "gpt2-small-residual": """laptop 'sae={name="standard", d_sae=64}'""",
    "gemma-2-2b-topk": "laptop",
    "2304x16384": "16x512",
}
"""Text of a command, and what stands for it: with no network, with a small model."""
SHORT = [
    "training.training_tokens=6000", "training.train_batch_size_tokens=512", "training.verbose=false",
    "evals.n_contexts=4", "training.lr_warm_up_steps=1", "training.lr_decay_steps=1",
]  # fmt: skip
NEEDED = "activations.source.refill=needed"
"""No forward of what a short run would throw away: 65,536 activations fill the buffer."""
UNDRAWN = {"pictures": False}
SPARING: dict[str, dict[str, Any]] = {
    "activations": {"source": {"name": "live", "refill": "needed"}},
    "evals": {"n_contexts": 16},
}
"""Options of runs from Python where their page does not name them: no forward that is thrown away, fewer measured."""
SHORTER = {
    "train": [*SHORT, "reports.pictures=false"], "demo": [*SHORT, "sae.l1_warm_up_steps=1"],
    "plan": SHORT, "cache": SHORT, "cache verify": [],
    "eval": ["--n-contexts", "16"], "compare": ["--n-contexts", "8"],
    "pretokenize": ["max_contexts=400"], "features": ["--n-contexts", "24"],
    "bench": ["--seconds", "0.2", "--size", "16x512"],
    "bench-synthetic": ["--steps", "3", "--l0", "1", "--correlated", "0", "--superposition", "2"],
}  # fmt: skip


@attrs.frozen
class Block:
    """One fenced block."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```", source, re.M | re.S)
    return [Block(match[1], match[2], source.count("\n", 0, match.start(2)) + 1) for match in found]


def commands_of(block: Block) -> list[str]:
    """The command lines of a block, those that go on in the next line put together, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def longer(run: str) -> list[str]:
    """What makes a run that is finished one that can go on, as one that was stopped would."""
    config = tomllib.loads(Path(run, "config.toml").read_text(encoding="utf-8"))
    return [
        f"training.training_tokens={config['training']['training_tokens'] + 1}",
        "--allow",
        "training.training_tokens",
    ]


def run_command(line: str) -> None:
    """A line that begins with ``saekit``, in this process."""
    from saekit.cli import app

    for remote, local in LOCAL.items():
        line = (
            re.sub(rf"{re.escape(remote)}(?![\w-])", local, line) if remote[-1] != "." else line.replace(remote, local)
        )
    words = shlex.split(line, comments=True)[1:]
    target = Path(words.pop(words.index(">") + 1)) if ">" in words else None
    words = [word for word in words if word != ">"]
    if "--resume" in words:
        words += longer(words[words.index("--resume") + 1])
    else:
        words += SHORTER.get(" ".join(words[:2]), SHORTER.get(words[0], []))
        if words[0] in ("train", "demo") and "activations.source=" not in line:
            words.append(NEEDED)
    words += ["--port", "0"] if "--serve" in words else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_looked_at_once())
        stack.enter_context(_made_short())
        if target is not None:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(target.open("w"))))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*wrong site, scale or model")  # it is made short
        code = app(words, standalone_mode=False)
    assert not code, f"{line}: exit code {code}"


@contextlib.contextmanager
def _looked_at_once() -> Iterator[None]:
    """Dashboards that are served are looked at, and then somebody presses Ctrl-C."""
    from saekit.commands import serving

    real = serving.serve

    def serve(served: Any, opened: socket.socket, **options: Any) -> None:
        def look() -> None:
            with urllib.request.urlopen(f"http://127.0.0.1:{opened.getsockname()[1]}/sae/0/feature/0.json") as answer:
                assert json.load(answer)["index"] == 0
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=look).start()
        real(served, opened, **options)

    serving.serve = serve
    try:
        yield
    finally:
        serving.serve = real


@contextlib.contextmanager
def _made_short() -> Iterator[None]:
    """The demo looks for features in little text, and a plan times a few batches."""
    from saekit.commands import demo
    from saekit.planning import rehearsal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_CONTEXTS", 48)
        patch.setattr(demo, "_CONTEXTS_SHOWN", 16)
        patch.setattr(rehearsal, "_SECONDS", 0.05)
        yield


def prepare(folder: Path) -> None:
    """What pages take for granted: a configuration, some text; and a browser, which shall not really open."""
    webbrowser.open = lambda *_, **__: True
    (folder / "run.toml").write_text('[sae]\nname = "standard"\nd_sae = 64\n', encoding="utf-8")
    shutil.copyfile(RUNNER_CONFIG, folder / "runner_cfg.json")
    texts = [{"text": f"def f{n}(x):\n    return x + {n}\n" * 20} for n in range(200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")


def serve(folder: Path) -> None:
    """A Hub on loopback, with the SAEs that pages load from the real one: small, and of the model that ships here."""
    import numpy as np
    from safetensors.numpy import save_file
    from support.fake_hub import fake_hub

    _served.append(served := fake_hub(folder))  # until the process ends
    hub = served.__enter__()
    random = np.random.default_rng(0)
    for place in HUB:
        home = folder / "models" / place
        home.mkdir(parents=True)
        config = {"model_name": "saekit/tiny-python", "hook_name": "blocks.1.hook_resid_post", "d_in": 128, "d_sae": 64}
        (home / "cfg.json").write_text(json.dumps(config | {"sae_lens_version": "3.0.0", "activation_fn_str": "relu"}))
        shapes = {"W_enc": (128, 64), "b_enc": (64,), "W_dec": (64, 128), "b_dec": (128,)}
        tensors = {name: random.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
        save_file(tensors, home / "sae_weights.safetensors")
    hub.use(pytest.MonkeyPatch(), folder / "home")
    from saekit.commands import looking

    real = looking.backend_of

    def backend_of(about: Mapping[str, Any], kind: object, plugins: PluginManager) -> PluginChoice | None:
        """As GPT-2 is loaded, the model in its place cannot be: it is as it was saved."""
        return real({**about, "model_from_pretrained_kwargs": {}}, kind, plugins)

    looking.backend_of = backend_of


HUB = [
    "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre",
    "jbloom/GPT2-Small-SAEs-Reformatted/blocks.9.hook_resid_pre",
    "owner/saes/layer_8",
    "owner/saes/layer_9",
    "owner/saes@v1/layer_8",
]
"""Repositories, branches and folders of what :func:`serve` has."""
_served: list[object] = []


def sparing(config: Any, **also: Any) -> Any:
    """A dict of options, or each of several, with what :data:`SPARING` says of options that it does not name.

    ``also`` is said, too; several have no pictures.
    """
    if not isinstance(config, dict):
        return [sparing(one, reports=UNDRAWN) for one in config] if isinstance(config, list) else config
    return config | {section: options | config.get(section, {}) for section, options in (SPARING | also).items()}


def watch(results: Path, whole: bool, drawn: bool) -> None:
    """From now on, note in the file ``results`` what comes of each training: how long it took, how well SAEs do.

    What is not ``whole`` is as :func:`sparing` makes it, and what is not ``drawn`` has no pictures.
    """
    if not drawn:
        SPARING["reports"] = UNDRAWN
    started, found = time.monotonic(), list[dict[str, Any]]()
    import saekit

    # Pages train on fewer tokens here, after which thresholds may not have settled.
    warnings.filterwarnings("ignore", "(.*: )?on held-out text .* are active on a token", RuntimeWarning)

    def watched(train: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            wall, processor = time.monotonic(), time.process_time()
            result = train(*arguments, **named)
            alone = {"sae": result} if hasattr(result, "metrics") else result.results
            found.append({
                "seconds": time.monotonic() - wall,
                "processor": time.process_time() - processor,
                "since_start": time.monotonic() - started,
                "explained_variance": [one.metrics.get("evals/explained_variance") for one in alone.values()],
            })  # fmt: skip
            results.write_text(json.dumps(found), encoding="utf-8")
            return result

        return run

    train, grid = saekit.train, saekit.grid
    if not whole:
        saekit.train = lambda cfg, **named: train(sparing(cfg), **named)  # type: ignore[assignment]
        saekit.grid = lambda cfg, axes: grid(sparing(cfg, reports=UNDRAWN), axes)  # type: ignore[assignment]
    saekit.train, saekit.resume = watched(saekit.train), watched(saekit.resume)  # type: ignore[assignment]


def script_of(page: Path, results: Path) -> str:
    """The page as a program, to be run in an empty folder with the tests' folder on the path.

    README's runs from Python are as they are printed, to the last option.  Pages that show a run's pictures draw those
    of single runs from Python.  A block that begins with ``# NAME.toml`` is that file.
    """
    blocks, parts = blocks_of(page), []
    for block in blocks:
        if block.language == "toml" and (named := re.match(r"# (\S+\.toml)\n", block.text)):
            parts.append(f"Path({named[1]!r}).write_text({block.text!r}, encoding='utf-8')\n")
    for block in blocks:
        if block.language == "python":
            parts.append(block.text)
        elif block.language in ("console", "sh"):
            parts += [f"run_command({command!r})\n" for command in commands_of(block) if command.startswith("saekit ")]
    first = "from pathlib import Path\nfrom support.follow import prepare, run_command, serve, watch\n"
    if any("from_pretrained(" in part or "from_hub(" in part for part in parts):
        first += "import tempfile\nserve(Path(tempfile.mkdtemp()))\n"
    drawn = "curves.png" in page.read_text(encoding="utf-8")
    watched = f"watch(Path({str(results)!r}), whole={page == ROOT / 'README.md'}, drawn={drawn})\n"
    return "".join([first, "prepare(Path())\n", watched, *parts])
