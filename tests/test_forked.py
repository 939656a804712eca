"""The stand-in for Python behaves as Python does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.model  # its server imports what models need


@pytest.fixture(params=["python", "forked"])
def program(request):
    """What holds of the one has to hold of the other."""
    if request.param == "python":
        return sys.executable
    return request.getfixturevalue("forked").program


def run(program, *arguments, **options):
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, **options
    )


def test_a_script_has_its_arguments_folder_and_environment(program, tmp_path):
    (tmp_path / "beside.py").write_text("name = 'beside'")
    script = tmp_path / "script.py"
    script.write_text(
        "import beside, os, sys\n"
        "print(beside.name, sys.argv[1:], os.getcwd(), os.environ['OWN'], 'LEFT' in os.environ)\n"
        "sys.exit('it ends')"
    )
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = run(program, script, "a", "-I", cwd=tmp_path, env={**kept, "OWN": "1"})
    assert done.stdout == f"beside ['a', '-I'] {tmp_path} 1 False\n"
    assert (done.returncode, done.stderr) == (1, "it ends\n")
    isolated = run(program, "-I", script, env={**kept, "OWN": "1"})
    assert "No module named 'beside'" in isolated.stderr


def test_code_modules_and_exceptions(program, tmp_path):
    (tmp_path / "own.py").write_text("raise ValueError(__name__)")
    done = run(program, "-m", "own", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: __main__\n")
    assert run(program, "-c", "import sys; print(sys.argv)", "x").stdout == "['-c', 'x']\n"
    elsewhere = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert "ValueError: own" in run(program, "-c", "import own", env=elsewhere).stderr


def test_threads_end_and_what_waits_for_the_end_is_run(program):
    code = (
        "import atexit, sys, threading, time\n"
        "atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('first')\n"
        "sys.exit(0)"
    )
    assert run(program, "-c", code).stdout == "first\nthread\nlast\n"


def test_signals_end_it(program):
    assert run(program, "-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen([program, "-c", code], stdout=subprocess.PIPE) as process:
            pid = int(process.stdout.readline())
            process.send_signal(number)
            assert process.wait(20) == -number
        while Path(f"/proc/{pid}").exists():  # the server sees the end a moment later
            time.sleep(0.01)


def test_libraries_are_there_and_what_is_tested_is_not(forked):
    code = "import sys; print([n in sys.modules for n in ('torch', 'transformers', 'ghost_dist')])"
    assert run(forked.program, "-c", code).stdout == "[True, True, False]\n"
    threads = "import os; print(len(os.listdir('/proc/self/task')))"
    assert run(forked.program, "-c", threads).stdout == "1\n"


def test_many_come_and_go_at_once(forked):
    code = "import os, sys; sys.exit(int(sys.argv[1]))"
    for _ in range(3):
        many = [subprocess.Popen([forked.program, "-c", code, str(n)]) for n in range(16)]
        for process in many[::2]:  # at any moment: while it asks, runs, or has ended
            process.kill()
        for number, process in list(enumerate(many))[1::2]:
            assert process.wait(60) == number
        for process in many[::2]:
            process.wait(60)
    assert run(forked.program, "-c", "print(1)").stdout == "1\n"
