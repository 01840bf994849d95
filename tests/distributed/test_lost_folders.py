"""Where the run folder of several processes is lost, no other is made: the processes know of one alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saekit.distributed import World
from saekit.distributed.group import Group
from saekit.runs import run
from saekit.runs.folder import RunFolderLostError


class Two(Group):
    size = 2


def test_it_is_raised_before_the_others_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(enough: float) -> Path:
        raise RunFolderLostError("it is gone")

    def rescue(folder: Path) -> Path:
        raise AssertionError("a folder that nobody else knows of")

    monkeypatch.setattr(run, "rescue_folder", rescue)
    session: Any = SimpleNamespace(world=World(Two(), Two()))
    record: Any = SimpleNamespace(folder=tmp_path)
    saving: Any = SimpleNamespace(save=save)
    with pytest.raises(RunFolderLostError, match="it is gone"):
        run._saved(session, record, saving, 0.0)
