"""The hub out of reach: asked once, quietly; what is cached still loads, and what is not is a sentence."""

import os
import socketserver
import subprocess
import sys
import threading

import pytest
from huggingface_hub import HfApi, constants

import tiny
from extras import extra
from moefy.errors import MoefyError, MoefyWarning
from moefy.sources import hub, texts
from moefy.sources import models as sources
from words import pydoc_tokenizer

datasets = extra("datasets")


@pytest.fixture
def asked(monkeypatch):
    """A hub that is out of reach, and what it was asked for."""
    names = []

    def repo_info(self, name, **options):
        names.append(name)
        raise ConnectionError("No way there.\nThe details.")

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return names


def test_a_data_set_that_is_not_cached_is_a_sentence(asked, monkeypatch):
    def load_dataset(*_, **__):
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
        raise ValueError("is not cached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MoefyError, match=r"data set 'acme/set:dev' \(No way there\), and it is not in the cache; "):
        list(texts.hub_rows("acme/set:dev"))
    assert asked == ["acme/set"]
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_data_set_that_is_cached_or_a_folder_is_read(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "words"}])
    assert texts.read_text("hf:acme/set") == "words"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert texts.read_text("hf:folder") == "words"
    assert asked == ["acme/set"]


def test_what_the_hub_gives_may_fail_otherwise(monkeypatch):
    monkeypatch.setattr(hub, "failure", lambda *_: None)

    def load_dataset(*_, **__):
        assert not constants.HF_HUB_OFFLINE
        raise ValueError("Unknown split.\nDetails.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MoefyError, match=r"^The data set 'acme/set' cannot be read: Unknown split\.$"):
        list(texts.hub_rows("acme/set"))


def test_of_a_data_set_as_large_as_the_web_no_more_is_read_than_can_be_used(monkeypatch):
    monkeypatch.setattr(hub, "failure", lambda *_: None)
    monkeypatch.setattr(texts, "HUB_CHARACTERS", 100)
    given = []

    def load_dataset(*_, streaming=False, **__):
        assert streaming
        for number in range(10**9):
            given.append(number)
            yield {"text": "w" * 30}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.warns(MoefyWarning, match="'acme/web' is read to its character 120"):
        assert texts.read_text("hf:acme/web") == "\n\n".join(["w" * 30] * 4)
    assert given == [0, 1, 2, 3]
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_model_that_is_not_cached_is_a_sentence(asked):
    with pytest.raises(MoefyError, match=r"the hub does not give a model of that name \(No way there\)\."):
        sources.load_source("acme/no-such-model")
    assert asked == ["acme/no-such-model"]


def cached(tmp_path, **files):
    """A hub's cache with acme/tiny in it."""
    place = tmp_path / "hub" / "models--acme--tiny"
    tiny.tiny("llama").save_pretrained(place / "snapshots" / "1")
    pydoc_tokenizer().save_pretrained(place / "snapshots" / "1")
    for name, text in files.items():
        (place / "snapshots" / "1" / f"{name}.json").write_text(text)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1")
    return {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def refused():
    """A hub that hangs up on everybody: its address, and what it was asked, as a list that grows."""
    calls = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self):
            calls.append(self.request.recv(200))

    with socketserver.TCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
        server.shutdown()


def test_a_cached_model_loads_without_a_network(tmp_path, refused):
    address, calls = refused
    environment = {**cached(tmp_path), "HF_ENDPOINT": address}
    done = subprocess.run(
        [sys.executable, "-m", "moefy", "generate", "acme/tiny", "the value", "--tokens", "2"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.splitlines()) <= {"Loading acme/tiny"}  # said where that takes its time
    # Of the packages' own way, to ask for every file and to wait between several tries, it took 146 s.
    assert len([call for call in calls if b"acme/tiny" in call]) == 1


def test_a_processor_comes_along_from_the_hub(tmp_path):
    files = {"preprocessor_config": '{"size": 3}', "video_preprocessor_config": "{}", "chat_template": "{ }"}
    environment = cached(tmp_path, **files)
    options = ["--recipe", "cmoe", "--experts", "6", "--window", "32", "--windows", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "moefy", "convert", "acme/tiny", str(tmp_path / "out"), *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    for name, text in files.items():
        assert (tmp_path / "out" / f"{name}.json").read_text() == text
    assert not (tmp_path / "out" / "processor_config.json").exists()
