"""The fake Hub, through the real huggingface_hub and datasets libraries in a process of their own."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.fake_hub import FakeHub, fake_hub

START = """
import json
from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

api = HfApi()
tokens = Dataset.from_dict({"tokens": [[i, i + 1] for i in range(20)]})

def error(function, *args, **options):
    try:
        return function(*args, **options)
    except Exception as problem:
        return type(problem).__name__ + ": " + " ".join(str(problem).split())
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """An empty Hub."""
    with fake_hub(tmp_path / "hub") as hub:
        yield hub


def run(hub: FakeHub, tmp_path: Path, code: str, token: str | None = "hf_fake") -> list:
    """The list ``found`` that the code makes in a process that uses the Hub."""
    result, script = tmp_path / "result.json", START + code + "\njson.dump(found, open('result.json', 'w'))"
    environment = hub.environment(tmp_path / "home", token)
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def files(folder: Path) -> list[str]:
    """The paths of the files of a repository."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_ranges(hub: FakeHub, tmp_path: Path) -> None:
    (folder := tmp_path / "hub/models/somebody/model").mkdir(parents=True)
    (folder / "x").write_bytes(bytes(range(100)))

    def read(wanted: str) -> tuple[int, str | None, bytes]:
        with closing(http.client.HTTPConnection(hub.url.removeprefix("http://"))) as connection:
            connection.request("GET", "/somebody/model/resolve/main/x", headers={"Range": wanted})
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Range"), answer.read()

    assert read("bytes=10-19") == (206, "bytes 10-19/100", bytes(range(10, 20)))
    assert read("bytes=90-") == read("bytes=90-200") == (206, "bytes 90-99/100", bytes(range(90, 100)))
    assert read("bytes=100-") == (416, "bytes */100", b"")


PUSH = """
first = tokens.push_to_hub("somebody/tokens", private=True).oid
again = tokens.push_to_hub("somebody/tokens", private=True).oid
fewer = tokens.select(range(6)).push_to_hub("somebody/tokens", num_shards=2).oid
api.upload_file(path_or_fileobj=b'{"a": 1}', path_in_repo="saekit.json", repo_id="somebody/tokens", repo_type="dataset")
tokens.push_to_hub("somebody/tokens", revision="a/branch")
api.create_repo("somebody/model")
api.upload_file(path_or_fileobj=bytes(1000), path_in_repo="a/weights.bin", repo_id="somebody/model")
api.delete_file("a/weights.bin", "somebody/model")
found = [first, again, fewer]
found += [load_dataset("somebody/tokens", split="train", revision=r).num_rows for r in (None, first, "a/branch")]
"""


@pytest.mark.slow
def test_pushes_are_files(hub: FakeHub, tmp_path: Path) -> None:
    *commits, main, first, branch = run(hub, tmp_path, PUSH)
    assert commits[0] == commits[1] != commits[2], "the second push had nothing to send"
    assert (main, first, branch) == (6, 20, 20)
    repository = tmp_path / "hub/datasets/somebody/tokens"
    shards = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert files(repository) == [".gitattributes", "README.md", *shards, "saekit.json"]
    assert files(repository.with_name("tokens@a%2Fbranch")) == [
        ".gitattributes", "README.md", "data/train-00000-of-00001.parquet", "saekit.json"
    ]  # fmt: skip
    assert (repository / "saekit.json").read_text() == '{"a": 1}'
    assert files(tmp_path / "hub/models/somebody/model") == [".gitattributes"]
    assert hub.private == {"datasets/somebody/tokens"}


READ = """
streamed = load_dataset("somebody/tokens", split="train", streaming=True)
loaded = load_dataset("somebody/tokens", split="train")
path = hf_hub_download("somebody/tokens", "saekit.json", repo_type="dataset")
with HfFileSystem().open("datasets/somebody/tokens/data/train.parquet", block_size=64) as file:
    file.seek(-4, 2)
    found = [list(streamed)[3], loaded[3], json.load(open(path)), file.read().decode()]
found += [error(hf_hub_download, "somebody/tokens", "no.json", repo_type="dataset")]
found += [error(hf_hub_download, "somebody/tokens", "saekit.json", repo_type="dataset", revision="no")]
found += [error(hf_hub_download, "somebody/no", "saekit.json", repo_type="dataset")]
found += [error(load_dataset, "somebody/no", split="train")]
found += [error(load_dataset, "somebody/tokens", split="no", streaming=flag) for flag in (True, False)]
"""


@pytest.mark.slow
def test_reads_files_that_nobody_pushed(hub: FakeHub, tmp_path: Path) -> None:
    from datasets import Dataset

    repository = tmp_path / "hub/datasets/somebody/tokens"
    (repository / "data").mkdir(parents=True)
    Dataset.from_dict({"tokens": [[i] * 500 for i in range(2000)]}).to_parquet(repository / "data/train.parquet")
    (repository / "saekit.json").write_text('{"a": 1}')
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: data/train.parquet\n---\n"
    )
    streamed, loaded, manifest, end, *errors = run(hub, tmp_path, READ)
    assert streamed == loaded == {"tokens": [3] * 500}
    assert manifest == {"a": 1}
    assert end == "PAR1"
    assert [x.partition(":")[0] for x in errors[:4]] == [
        "RemoteEntryNotFoundError", "RevisionNotFoundError", "RepositoryNotFoundError", "DatasetNotFoundError"
    ]  # fmt: skip
    assert errors[4] == "ValueError: Bad split: no. Available splits: ['train']"
    assert errors[5] == "ValueError: Unknown split \"no\". Should be one of ['train']."


NO_TOKEN = """
found = [error(tokens.push_to_hub, "somebody/new", private=True)]
found += [error(api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="somebody/open", repo_type="dataset")]
found += [error(hf_hub_download, f"somebody/{name}", "x.txt", repo_type="dataset") for name in ("secret", "open")]
"""


@pytest.mark.slow
def test_without_a_token(hub: FakeHub, tmp_path: Path) -> None:
    for name in ("open", "secret"):
        (folder := tmp_path / "hub/datasets/somebody" / name).mkdir(parents=True)
        (folder / "x.txt").write_text("x")
    hub.private.add("datasets/somebody/secret")
    push, upload, secret, path = run(hub, tmp_path, NO_TOKEN, token=None)
    assert push.startswith("HfHubHTTPError: Client error '401 Unauthorized'")
    assert push.endswith("Invalid username or password.")
    assert upload.startswith("RepositoryNotFoundError: 401 Client Error.")
    assert secret.startswith("RepositoryNotFoundError: 401 Client Error.")
    assert Path(path).read_text() == "x"
    assert files(tmp_path / "hub/datasets") == ["somebody/open/x.txt", "somebody/secret/x.txt"]
