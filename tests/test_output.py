"""Where a model is written: refused before any work if it cannot be, and never over its own source."""

import os
import shutil
import sys
from pathlib import Path

import pytest

import moefy
import tiny
from moefy.checkpoint import check_output
from moefy.cli.app import main
from moefy.tuning.relufy import save_dense
from words import pydoc_tokenizer


@pytest.fixture(scope="module")
def model():
    made = tiny.tiny("llama")
    recipe = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)
    moefy.convert(made, recipe, [tiny.inputs("llama")])
    return made


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["moefy", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2


# What cannot be written to, and the reason that is given.
UNFIT = {
    "file/sub": "Not a directory",
    "file/sub/deeper": "Not a directory",
    "/proc/nothing/here": "cannot be written",
    "/proc/x": "cannot be written",
    "x" * 250: "File name too long",
    "x" * 300: "File name too long",
    "~nobody-of-that-name/x": "no home directory for '~nobody",
    "circle/x": "circle",
    "zero\0byte": "cannot be used as a path",
}


@pytest.mark.parametrize("out", UNFIT, ids=lambda out: repr(out[:20]))
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_cannot_be_written_is_refused_before_any_work(out, overwrite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(moefy.MoefyError, match=UNFIT[out]) as told:
        check_output(out, overwrite)
    assert "\n" not in str(told.value)
    assert names(tmp_path) == ["circle", "file"]


def test_a_check_leaves_nothing(tmp_path):
    assert check_output(tmp_path / "new" / "deep" / "out") == tmp_path / "new" / "deep" / "out"
    assert not names(tmp_path)


@pytest.mark.parametrize("name", ["a**b", "a[b]", "*", "a?", "deep/er/path", "ünï 日本", "x" * 200])
def test_names_are_taken_as_they_are(name, model, tmp_path):
    beside = tmp_path / name.replace("*", "star").replace("?", "b").replace("[b]", "b")
    beside = beside.with_name(f".{beside.name}.partial-999999999")
    beside.mkdir(parents=True)  # what a pattern might take for this output's
    for _ in range(2):
        moefy.save(model, tmp_path / name, overwrite=True)
    moefy.load(tmp_path / name)
    left = set(names((tmp_path / name).parent)) - {beside.name}
    assert left == {Path(name).name}


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_may_be_a_link(exists, model, tmp_path):
    (tmp_path / "place").mkdir()
    link, real = tmp_path / "link", tmp_path / "place" / "real"
    link.symlink_to(real)
    if exists:
        moefy.save(model, real)
    for _ in range(3):
        moefy.save(model, link, overwrite=True)
        assert names(tmp_path) == ["link", "place"]
        assert names(tmp_path / "place") == ["real"]
        assert link.is_symlink()
    moefy.load(link)


def test_what_a_living_process_writes_is_left_alone(model, tmp_path):
    living, unknown = tmp_path / f".out.partial-{os.getppid()}", tmp_path / ".out.partial-x"
    ended, own = tmp_path / ".out.partial-999999999", tmp_path / f".out.partial-{os.getpid()}"
    for folder in (living, unknown, ended, own):
        folder.mkdir()
    moefy.save(model, tmp_path / "out")
    assert names(tmp_path) == sorted(["out", living.name, unknown.name])


@pytest.mark.parametrize("command", ["convert", "relufy"])
@pytest.mark.parametrize("out", ["source", "source/", "link", "source/../source", "."])
def test_the_source_is_never_overwritten(command, out, dense, tmp_path, monkeypatch, capsys):
    shutil.copytree(dense, tmp_path / "source")
    (tmp_path / "config.json").write_text("{}")  # so that the folder around it could be taken for a model
    (tmp_path / "link").symlink_to("source")
    (tmp_path / "t2t.txt").write_text("a\tb\n")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    options = ["--task", "t2t", "--data", "t2t.txt"] if command == "relufy" else []
    for source in ("source", "link"):
        refused(monkeypatch, command, source, out, "--overwrite", *options)
        assert f"the source {source}, which would be lost" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_save_looks_at_the_source_too(model, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "source")
    with pytest.raises(moefy.MoefyError, match="which would be lost"):
        moefy.save(model, tmp_path / "source", overwrite=True, source=str(tmp_path / "source"))
    moefy.save(model, tmp_path / "source" / "inside", source=str(tmp_path / "source"))
    moefy.save(model, tmp_path / "source", overwrite=True, source="acme/source")


def test_a_dense_model_is_written_whole_too(tmp_path, monkeypatch):
    model, out = tiny.tiny("llama"), tmp_path / "out"
    save_dense(model, pydoc_tokenizer(), out)
    kept = (out / "config.json").read_bytes()

    def fail(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(moefy.MoefyError, match="disk is full"):
        save_dense(model, pydoc_tokenizer(), out)
    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_bytes() == kept
