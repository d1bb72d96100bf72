"""How a command starts: help and mistakes without torch, Ctrl-C at any time, and all of moefy where it is imported."""

import os
import signal
import subprocess
import sys
import time

import pytest

import command
import moefy
from moefy import kernels
from moefy.cli.app import app
from moefy_cli import stops
from native_problem import needs_native

QUICK = [
    (["--version"], 0),
    (["--help"], 0),
    ([], 2),
    (["inspekt"], 2),
    (["eval", "--banana"], 2),
    *(([command.name or command.callback.__name__, "--help"], 0) for command in app.registered_commands),
]


def python(source, *args):
    return subprocess.run([sys.executable, "-c", source, *args], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("args", "code"), QUICK, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_help_and_mistakes_wait_for_no_torch(args, code):
    done = python(
        "import sys, moefy_cli\n"
        "try: moefy_cli.main()\n"
        "finally: print({'torch', 'transformers', 'numpy'} & sys.modules.keys(), file=sys.stderr)",
        *args,
    )
    assert done.returncode == code
    assert done.stderr.endswith("set()\n")


def test_running_the_package_waits_for_no_torch():
    version = [sys.executable, "-X", "importtime", "-m", "moefy", "--version"]
    done = subprocess.run(version, capture_output=True, text=True)
    assert done.stdout == f"moefy {moefy.__version__}\n"
    assert " moefy.cli.app\n" in done.stderr
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_stop_while_a_command_starts_is_a_sentence(module, stop, dense):
    # Asked from within, so that it comes amid the import and not before or after.
    source = (
        "import os, sys, threading, time, moefy_cli\n"
        "def watch():\n"
        f"    while {module!r} not in sys.modules: time.sleep(0.001)\n"
        f"    os.kill(os.getpid(), {int(stop)})\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "moefy_cli.main()\n"
    )
    done = python(source, "eval", str(dense))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.endswith(f"{stops.INTERRUPTED}\n")
    assert "Traceback" not in done.stderr


def test_a_stop_that_is_ignored_stays_ignored():
    source = (
        "import signal, moefy_cli\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "try: moefy_cli.main()\n"
        "finally: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    assert python(source, "--version").stdout.endswith("True\n")


WHOLE = (
    "assert callable(moefy.convert) and callable(moefy.relufy) and moefy.Recipe\n"
    "from transformers import AutoConfig\n"
    "assert 'moefy' in AutoConfig.for_model('moefy').model_type\n"
)


@pytest.mark.parametrize("before", ["import transformers\n", "import moefy.convert\n", "import moefy_cli\n"])
def test_an_import_gives_all_of_moefy(before):
    done = python(f"{before}import moefy\n{WHOLE}")
    assert done.returncode == 0, done.stderr


def test_an_import_by_another_program_gives_all_of_moefy(tmp_path):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "__init__.py").write_text(f"import moefy\n{WHOLE}")
    (tmp_path / "tool" / "__main__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "tool", "-m", "moefy"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_what_a_command_imports_is_all_of_moefy():
    source = "import moefy_cli\ntry: moefy_cli.main()\nexcept SystemExit: pass\nimport moefy\n" + WHOLE
    done = python(source, "eval", "no/such/model")
    assert done.returncode == 0, done.stderr
    assert "There is no model at no/such/model" in done.stderr


def test_ctrl_c_at_any_moment(dense):
    for after in (0.3, 1.5, 3.0):
        long = [sys.executable, "-m", "moefy", "eval", str(dense), "--window", "8", "--windows", "1000000"]
        running = subprocess.Popen(long, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(after)
        running.send_signal(signal.SIGINT)
        shown = running.communicate(timeout=120)[1]
        assert running.returncode == 130, shown
        assert shown.endswith(f"{stops.INTERRUPTED}\n")
        assert "Traceback" not in shown


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_heard_where_python_would_lose_it(stop):
    source = (
        "import signal, time\n"
        "from moefy_cli import stops\n"
        "class Collected:\n"
        "    def __del__(self):\n"
        f"        signal.raise_signal({int(stop)})\n"
        "        time.sleep(0)\n"
        f"if {stop is signal.SIGTERM}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # under nohup
        "stops.raise_on_stop()\n"
        "Collected()\n"
        "print('lost')\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('heard')\n"
    )
    done = python(source)
    assert (done.stdout, done.stderr, done.returncode) == ("lost\nheard\n", "", 0)


def test_a_directory_that_is_gone_is_one_sentence(tmp_path):
    source = "import os, moefy_cli\nos.rmdir(os.getcwd())\nmoefy_cli.main()"
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path / "gone", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "moefy: The current directory is gone; change to one that is there.\n")


def test_a_slow_kernel_is_one_line(dense):
    environment = {**os.environ, "MOEFY_NATIVE": "Off"}  # as good as 0, no or false
    made = dense.parent / "routed"
    done = command.moefy("convert", dense, made, "--recipe", "cmoe", "--window", 32, "--windows", 4)
    assert done.returncode == 0, done.stderr
    generate = [sys.executable, "-m", "moefy", "generate", str(made), "the value", "--tokens", "2"]
    done = subprocess.run(generate, capture_output=True, text=True, env=environment)
    told = "moefy runs on torch, slower: it is turned off with MOEFY_NATIVE=Off."
    assert [line for line in done.stderr.splitlines() if not line.startswith("Loading")] == [told]


def test_a_mistyped_kernel_is_refused_before_anything_is_loaded():
    environment = {**os.environ, "MOEFY_KERNEL": "ntive"}
    mistyped = [sys.executable, "-m", "moefy", "eval", "no/such/model"]
    done = subprocess.run(mistyped, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == (
        "moefy: In MOEFY_KERNEL: There is no kernel 'ntive'; choose one of auto, native, torch, reference, grouped, "
        "masked.\n"
    )


@needs_native
def test_a_mistyped_instruction_set_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("MOEFY_ISA", "avx3")
    done = command.moefy("eval", "no/such/model")
    assert done.returncode == 2
    assert done.stderr.startswith("moefy: MOEFY_ISA=avx3 is none of generic")
    assert done.stderr.count("\n") == 1


def test_a_mistyped_kernel_is_refused_in_a_library_too(monkeypatch):
    monkeypatch.setattr(kernels, "_choice", "ntive")
    for ask in (kernels.native_wanted, lambda: kernels.pick(None, None)):
        with pytest.raises(moefy.MoefyError, match="In MOEFY_KERNEL: There is no kernel 'ntive'"):
            ask()
