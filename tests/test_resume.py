"""A conversion that was cut off goes on from the layers that are done, to the same bits, and holds one at a time."""

import errno
import gc
import importlib
import shutil
import subprocess
import sys
import weakref

import pytest
import torch

import moefy
import tiny
from command import run
from moefy.conversion import budgets, resume
from moefy.errors import MoefyWarning
from moefy.measure.target import smallest_budget, split_held_out
from moefy.moe import moe_layers
from moefy.recipe import DEFAULT
from moefy.sites import find_sites
from test_target import batches as counting_batches
from test_target import trained

CONVERT = importlib.import_module("moefy.convert")  # the name moefy.convert is the function's
PLAIN = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)
FULL = moefy.Recipe.of(DEFAULT, budget=0.6, expert_size=2)


def windows(family, count=6):
    return [tiny.inputs(family, seed=s, length=24) for s in range(count)]


def convert(family, recipe, state, dtype=torch.float32, after=None):
    """A model of this family, converted; with `after`, cut off when so many layers are done. And its report."""
    model, done = tiny.tiny(family).to(dtype), []

    def progress(_, total, name):
        done.append(name)
        if after is not None and len([n for n in done if not n.startswith("measuring")]) == after:
            raise KeyboardInterrupt

    return model, moefy.convert(model, recipe, windows(family), state=state, progress=progress)


@pytest.fixture
def made(monkeypatch):
    """The names of the layers that are converted rather than taken from the state."""
    names, real = [], CONVERT.convert_layer
    monkeypatch.setattr(CONVERT, "convert_layer", lambda *a: (names.append(a[0].entry_name), real(*a))[1])
    return names


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("family", "recipe", "dtype"),
    [
        ("llama", FULL, torch.float32),
        ("llama", FULL, torch.bfloat16),
        ("bert", PLAIN, torch.float32),
        ("t5-v1.1", FULL, torch.float32),
        ("apertus", PLAIN, torch.float32),  # its activation has parameters
        ("mixtral", FULL, torch.float32),
        ("llama", moefy.Recipe.of(PLAIN, router="random"), torch.float32),
        ("llama", moefy.Recipe.of(PLAIN, router="oracle"), torch.float32),
        ("llama", moefy.Recipe.of("slim", budget=0.5), torch.float32),
    ],
)
def test_what_was_cut_off_ends_with_the_bits_of_what_was_not(family, recipe, dtype, made, tmp_path):
    whole, report = convert(family, recipe, tmp_path / "whole", dtype)
    every = list(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        convert(family, recipe, tmp_path / "parts", dtype, after=1)
    again, repeated = convert(family, recipe, tmp_path / "parts", dtype)
    assert made == every  # each once, in both runs together
    assert same(whole, again)
    assert again.config.moefy == whole.config.moefy
    assert [layer.error for layer in repeated.layers] == [layer.error for layer in report.layers]


def test_keeping_layers_changes_nothing(tmp_path):
    kept, _ = convert("llama", PLAIN, tmp_path)
    plain, _ = convert("llama", PLAIN, None)
    assert same(kept, plain)


def test_what_is_measured_is_kept_too(monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert("llama", FULL, tmp_path, after=1)
    for name in ("output_metrics", "loss_curve"):
        monkeypatch.setattr(budgets, name, lambda *_, **__: pytest.fail("measured again"))
    convert("llama", FULL, tmp_path)


@pytest.mark.parametrize("other", ["recipe", "calibration", "model", "type", "config"])
def test_another_conversion_starts_its_own(other, made, tmp_path):
    convert("llama", PLAIN, tmp_path)
    made.clear()
    model, recipe, batches = tiny.tiny("llama"), PLAIN, windows("llama")
    match other:
        case "recipe":
            recipe = moefy.Recipe.of(PLAIN, seed=1)
        case "calibration":
            batches = windows("llama", 5)
        case "model":
            model.model.embed_tokens.weight.data[0, 0] += 1
        case "type":
            model.bfloat16()
        case "config":
            model.config.rms_norm_eps = 1e-3
    moefy.convert(model, recipe, batches, state=tmp_path)
    assert len(made) == len(find_sites(tiny.tiny("llama")))


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_a_damaged_layer_is_made_anew(damage, made, tmp_path):
    whole, _ = convert("llama", FULL, tmp_path)
    names = list(made)
    file = next(tmp_path.rglob(f"{names[1]}.safetensors"))
    before = file.read_bytes()
    file.unlink()  # the model above is mapped from it
    file.write_bytes(before[:-1] if damage is None else damage)
    made.clear()
    again, _ = convert("llama", FULL, tmp_path)
    assert made == names[1:2]
    assert same(whole, again)


@pytest.mark.parametrize("why", ["full", "no folder", "cleared"])
def test_where_nothing_can_be_kept_it_is_said_once_and_goes_on(why, made, monkeypatch, tmp_path):
    whole, _ = convert("llama", PLAIN, None)
    every, real, state = list(made), resume.save_file, tmp_path / "state"

    def full(tensors, file, **options):
        if why == "full" and every[1] in str(file):
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, **options)
        if why == "cleared":
            shutil.rmtree(state)

    if why == "no folder":
        state.write_text("")
    monkeypatch.setattr(resume, "save_file", full)
    with pytest.warns(MoefyWarning, match=r"cannot keep more of what is done in .*state") as said:
        again, _ = convert("llama", PLAIN, state)
    assert len(said) == 1
    assert same(whole, again)
    left = [file.name for file in state.rglob("*") if file.is_file()]
    assert left == ([f"{every[0]}.safetensors"] if why == "full" else [])
    if why == "full":
        monkeypatch.setattr(resume, "save_file", real)
        made.clear()
        assert same(whole, convert("llama", PLAIN, state)[0])
        assert made == every[1:]


def test_a_folder_that_takes_nothing_is_said_once(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.warns(MoefyWarning, match="No space left on device") as said:
        convert("llama", FULL, tmp_path)
    assert len(said) == 1


def test_weights_in_buffers_make_another_model(tmp_path):
    """DeepSeek-V3's experts are chosen by one."""
    found = []
    for state in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        model = tiny.tiny("deepseek_v3")
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias") and len(found) > 0:
                buffer.copy_(torch.linspace(0, 2, len(buffer)))
        moefy.convert(model, PLAIN, windows("deepseek_v3"), state=state)
        found.append(model)
    assert same(found[1], found[2])
    assert not same(found[0], found[1])


def test_converted_layers_are_mapped_from_their_files(tmp_path):
    model, _ = convert("llama", FULL, tmp_path)
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file if str(tmp_path) in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for moe in moe_layers(model).values():
        for tensor in moe.state_dict().values():
            assert not tensor.numel() or any(low <= tensor.data_ptr() < high for low, high in ranges)
    moefy.save(model, tmp_path / "out")
    assert same(moefy.load(tmp_path / "out"), model)


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "gpt2"])
@pytest.mark.parametrize("repair", [0.0, 0.5])
def test_dense_weights_go_as_soon_as_the_pass_is_through_them(family, repair):
    model, alive = tiny.tiny(family), []
    downs = [s.owner.get_submodule(s.family.down).weight for s in find_sites(model)]
    weights = [weakref.ref(w) for w in downs]
    del downs

    def progress(*_):
        gc.collect()
        alive.append([ref() is not None for ref in weights])

    moefy.convert(model, moefy.Recipe.of(PLAIN, refit=True, repair=repair), windows(family), progress=progress)
    for i, now in enumerate(alive):
        assert not any(now[:i]), i  # that of the layer itself may still be in use


def test_the_search_for_a_budget_goes_on_too(made, tmp_path):
    torch.manual_seed(0)
    model = trained()
    kept, held_out = split_held_out(counting_batches(12))
    recipe = moefy.Recipe.of(DEFAULT, expert_size=2)
    first = smallest_budget(model, recipe, kept, held_out, 0.1, state=tmp_path)
    assert made
    made.clear()
    again = smallest_budget(model, recipe, kept, held_out, 0.1, state=tmp_path)
    assert not made
    assert again[2] == first[2]
    assert same(again[0], first[0])


def test_the_command_goes_on_when_it_is_repeated(made, dense, monkeypatch, capsys, tmp_path):
    args = ["convert", str(dense), str(tmp_path / "out"), "--window", "32", "--windows", "4", "--active", "0.6"]
    real = CONVERT.convert_layer

    def cut(*a):
        if len(made) == 1:
            raise KeyboardInterrupt
        return real(*a)

    with monkeypatch.context() as patch:
        patch.setattr(CONVERT, "convert_layer", cut)
        assert run(monkeypatch, *args) == 130
    shown = capsys.readouterr().err.replace("\n", " ")
    assert f"Repeat the command to go on, or remove what is done: {tmp_path / '.out.converting'}." in shown
    assert [file.name for file in tmp_path.iterdir()] == [".out.converting"]
    done = len(made)
    monkeypatch.setattr("moefy.cli.convert.ROOM", float("inf"))  # what is there takes room
    assert run(monkeypatch, *args) == 0, capsys.readouterr().err
    assert len(made) == len(set(made)) > done
    shown = capsys.readouterr()
    assert "What an earlier run has left in" in shown.err
    assert f"{len(made)}, {done} of them before" in shown.out
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_failure_says_what_it_leaves(made, dense, monkeypatch, capsys, tmp_path):
    def full(*_, **__):
        raise moefy.MoefyError("The disk is full.")

    args = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "cmoe", "--experts", "6", "--window", "32"]
    with monkeypatch.context() as patch:
        patch.setattr("moefy.checkpoint.save", full)
        assert run(monkeypatch, *args) == 2
    shown = capsys.readouterr().err
    assert f"repeat the command to go on, or remove what is done: {tmp_path / '.out.converting'}." in shown
    assert shown.endswith("moefy: The disk is full.\n")
    made.clear()
    assert run(monkeypatch, *args) == 0
    assert not made


def test_without_room_beside_the_output_nothing_is_kept(dense, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("moefy.cli.convert.ROOM", float("inf"))
    options = ["--recipe", "cmoe", "--experts", "6", "--window", "32", "--windows", "2"]
    assert run(monkeypatch, "convert", str(dense), str(tmp_path / "new" / "out"), *options) == 0
    assert "too full to keep layers" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out"]


def test_two_processes_do_not_convert_to_one_output(made, dense, monkeypatch, capsys, tmp_path):
    args = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "cmoe", "--experts", "6", "--window", "32"]
    state = tmp_path / ".out.converting"
    program = (
        "import fcntl, os, sys; folder = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(folder, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    state.mkdir()
    other = subprocess.Popen([sys.executable, "-c", program, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        assert run(monkeypatch, *args) == 2
        assert "Another process is converting to" in capsys.readouterr().err
        assert state.exists()
        assert not made
    finally:
        other.communicate()
    assert run(monkeypatch, *args) == 0  # the other one is gone, and with it its claim
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_mistake_before_the_first_layer_leaves_nothing(dense, monkeypatch, capsys, tmp_path):
    args = ["convert", str(dense), str(tmp_path / "out"), "--recipe", "cmoe", "--experts", "7", "--window", "32"]
    assert run(monkeypatch, *args) == 2
    assert "what is done" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
