"""What is printed: help of every command, and names that look like markup."""

import re
import subprocess
import sys
import time

import pytest
import typer
from rich.console import Console

from moefy.cli import console
from moefy.cli.app import app
from moefy.cli.app import main as run_cli
from moefy.construct import CONSTRUCTIONS
from moefy.recipe import RECIPES
from moefy.routers import ROUTERS
from moefy.tasks import TASKS

COMMANDS = sorted(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=lambda c: c[0] if c else "moefy")
def test_help_names_every_option(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moefy", *command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        run_cli()
    shown = capsys.readouterr().out
    assert not stopped.value.code
    found = typer.main.get_command(app)
    for parameter in (found.commands[command[0]] if command else found).params:
        assert parameter.opts[0] in shown
        assert parameter.help


def test_help_names_every_choice_and_no_option_of_another_command():
    commands = typer.main.get_command(app).commands
    helps = {name: {p.opts[0]: p.help for p in command.params} for name, command in commands.items()}
    for option, choices in (("--recipe", RECIPES), ("--construction", CONSTRUCTIONS), ("--router", ROUTERS)):
        for choice in choices:
            assert choice in helps["convert"][option]
    for name in TASKS:
        assert name in helps["eval"]["--task"]
    for name, options in helps.items():
        for option, text in options.items():
            own = re.sub(r"(convert|eval)\b[^.;()]* --[a-z-]+", "", text)
            assert set(re.findall(r"--[a-z][a-z-]*", own)) <= options.keys(), (name, option)


def test_names_are_printed_as_they_are(capsys):
    name = "hf:SET[/config][red] :smile:"
    console.out.print(name)
    console.table(name, [name, "x"], [[name, "1"]])
    assert capsys.readouterr().out.count(name) == 4


def test_a_log_gets_lines_with_an_estimate(monkeypatch, capsys):
    monkeypatch.setattr(console, "EVERY", 0.0)
    with console.progress("Sorting", 9) as update:
        update(3)
        update(6, 12, "more than was thought")
        update(7, 12, label="Merging")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["Sorting: 3 of 9", "Sorting: 6 of 12", "Merging: 7 of 12"]
    assert all(line.endswith(" left") for line in lines)


def test_work_that_is_not_counted_is_a_percentage(capsys):
    with console.progress("Sorting", counted=False) as update:
        update(1, 3)
    assert capsys.readouterr().err.startswith("Sorting: 33%, 0:00:00, about ")


def test_work_that_nobody_counts_has_no_count(capsys):
    with console.progress("Writing"):
        pass
    assert capsys.readouterr().err == "Writing: 0:00:00\n"


def test_a_bar_where_there_is_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, markup=False))
    with console.progress("Sorting [b]", 2) as update:
        update(2)
    assert "Sorting [b]" in capsys.readouterr().err


@pytest.mark.parametrize("show", [console.status, lambda what: console.progress(what, brief=True)])
def test_a_log_is_told_what_takes_its_time_while_it_does(show, monkeypatch, capsys):
    with show("Quick"):
        pass
    assert not capsys.readouterr().err
    monkeypatch.setattr(console, "SOON", 0.01)
    with show("Slow[/b]"):
        shown, end = "", time.monotonic() + 60
        while not shown and time.monotonic() < end:
            time.sleep(0.2)  # what is written while it is read may be lost
            shown = capsys.readouterr().err
        assert shown == "Slow[/b]\n"
    assert not capsys.readouterr().err


def test_a_full_disk_under_the_log_does_not_end_the_work():
    source = (
        "from moefy.cli import console\n"
        "console.EVERY = console.SOON = 0\n"
        "with console.progress('Sorting') as update:\n"
        "    for i in range(3): update(i, 3)\n"
        "with console.status('Saving'): print('done')\n"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_progress_shows_names_as_they_are():
    source = (
        "from moefy.cli import console\n"
        "name = 'a[/config][red] :smile:'\n"
        "with console.status(name): pass\n"
        "with console.progress(name) as update: update(1, 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a[/config][red] :smile:" in done.stderr


def test_nothing_of_a_table_is_cut_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0." * 20
    console.table("layers", ["layer", "share"], [[name, "25 %"]])
    assert name in capsys.readouterr().out
    monkeypatch.setattr(console, "out", Console(force_terminal=True, width=60, color_system=None))
    console.table("layers", ["layer", "share"], [[name, "25 %"]])
    shown = "".join(line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line[:1] == "│")
    assert shown == name
