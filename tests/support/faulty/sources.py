"""Activation sources that break a promise each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from support.faulty.case import cases

from saekit import Batch

COUNT = itertools.count()


class Numbers:
    """Random rows that follow from the seed and the number of the batch; nothing is wrong with it."""

    def __init__(self, config: Any, *, stream: Any) -> None:
        self.stream, self.at, self.seed = stream, 0, stream.seed

    def __iter__(self) -> Numbers:
        return self

    def drawn(self, n: int) -> dict[Any, Any]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.at)
        return {site: torch.randn(n, width, generator=generator) for site, width in self.stream.widths.items()}

    def __next__(self) -> Batch:
        rows = self.drawn(self.stream.batch_size)
        self.at += 1
        return Batch(rows)

    def peek(self) -> Mapping[Any, Any]:
        return self.drawn(10)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        pass


class Small(Numbers):
    def drawn(self, n: int) -> dict[Any, Any]:
        return super().drawn(n - 1)


class Unseeded(Numbers):
    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        self.seed = next(COUNT)


class Eager(Numbers):
    def peek(self) -> Mapping[Any, Any]:
        return next(self).activations


class Behind(Numbers):
    def state_dict(self) -> dict[str, Any]:
        return {"at": max(self.at - 1, 0)}


class Alive(Numbers):
    """Its state is its own memory."""

    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        self.state: dict[str, Any] = {}

    def __next__(self) -> Batch:
        batch = super().__next__()
        self.state["at"] = self.at
        return batch

    def state_dict(self) -> dict[str, Any]:
        self.state["at"] = self.at
        return self.state


class Reading(Numbers):
    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        stream.contexts  # noqa: B018 - opens the text


class Unlocked(Numbers):
    def __next__(self) -> Batch:
        def forward() -> None:
            self.stream.backend.run(torch.ones(1, 4, dtype=torch.long), read={"hook_embed"})

        thread = threading.Thread(target=forward, name="mine")
        thread.start()
        thread.join()
        return super().__next__()


class Lasting(Numbers):
    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        threading.Thread(target=threading.Event().wait, args=[1.0], name="mine", daemon=True).start()


class Boasting(Numbers):
    @property
    def widths(self) -> dict[Any, int]:
        return dict.fromkeys(self.stream.sites, 100)


class Unstated(Numbers):
    @property
    def source_forwards(self) -> Any:
        return {"contexts": 16}


class Large(Numbers):
    def memory_bytes(self) -> Any:
        return "much"


class Forgetful(Numbers):
    """Its recipe is of another batch."""

    def recipe_size(self) -> tuple[int, int]:
        return 8, 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at + self.stream.keeps_recipe}


def broken(config: Any, *, stream: Any) -> Any:
    raise KeyError("rows")


class Halved(Numbers):
    """Says that it shares rows, and gives the same in each process."""

    shares_rows = True

    def __next__(self) -> Batch:
        self.at += 1
        return Batch(self.drawn(self.stream.own.batch_size))


class Dropping(Numbers):
    """Reads its part of the text, and where it is one of several, not to the end."""

    shares_rows = True

    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        read = stream.own.contexts.take(10**4)
        left_out = 30 * (stream.processes - 1)
        self.tokens, self.documents = (
            torch.from_numpy(of[: of.size - left_out]) for of in (read.tokens.ravel(), read.documents.ravel())
        )

    def __next__(self) -> Batch:
        n = self.stream.own.batch_size
        part = slice(self.at * n, (self.at + 1) * n)
        if not len(self.tokens[part]):
            raise StopIteration
        self.at += 1
        rows = {site: some + self.stream.process for site, some in self.drawn(len(self.tokens[part])).items()}
        return Batch(rows, tokens=self.tokens[part], documents=self.documents[part])


class Numbered(Numbers):
    """Knows nothing of other processes, and draws by its own number."""

    def __init__(self, config: Any, *, stream: Any) -> None:
        super().__init__(config, stream=stream)
        self.seed += stream.process


CASES = cases(
    "activation_sources",
    {
        "build": ("failed in build: KeyError: 'rows'", broken),
        "batches": (r"batch 0 has rows of shape \[23, 8\] at .*, expected \[24, 8\]", Small),
        "seeds": ("batches of the same seed, 0, .*: other numbers", Unseeded),
        "peek": (r"batches after peek\(\), 0, .*: other numbers", Eager),
        "state": ("batches from a state after 1, 0, .*: other numbers", Behind),
        "recipe": ("batches from a state with a recipe after 0, 0, .*: other numbers", Forgetful),
        "state_stays": ("a state, after the source went on,, at: found 6, expected 2", Alive),
        "exhaustion": ("it reads the text, which is read once, and has given 300 batches of 24 and no end", Reading),
        "two_processes": ("it says shares_rows, and batch 0 has the same rows in both processes", Halved),
        "model_lock": (r"its thread \['mine'\] runs the model without stream.model_lock", Unlocked),
        "close": (r"after close\(\) there is still the thread mine", Lasting),
        "widths": ("it states the width 100 of blocks.0.hook_resid_post, and gives rows of 8", Boasting),
        "forwards": ("source_forwards is {'contexts': 16}, expected saekit.abilities.SourceForwards", Unstated),
        "memory": ("memory_bytes is 'much', expected a whole number", Large),
    },
) + cases(
    "activation_sources",
    {"text_is_needed": ("it opens the text, and its entry says needs_text=False", Reading)},
    needs_text=False,
)
