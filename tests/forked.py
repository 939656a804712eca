"""A stand-in for ``python`` that has torch and transformers imported already.

Importing them takes six seconds of a core, and the suite starts hundreds of processes: the reload
check of every run, the ranks of every cluster. :func:`forked_python` gives an executable that
takes a script, ``-m`` or ``-c`` as ``python`` does. What it runs is a process of its own, with the
caller's files, folder and environment, forked from a server that has done nothing but import; a
signal that ends the executable ends it too. Neither ghost_dist nor ray is imported in the server,
and it has no threads.

    python forked.py serve SOCKET          # the server; it ends with its standard input
    python forked.py ask SOCKET ...        # what the executable does
"""

import atexit
import contextlib
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

LIBRARIES = (
    "accelerate",
    "jinja2",
    "pydantic",
    "rich.progress",
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.convert_slow_tokenizer",
    "transformers.generation",
    "transformers.integrations.hub_kernels",
    "transformers.modeling_layers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.tokenization_utils_tokenizers",
    "yaml",
    "zarr",
)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Forked(NamedTuple):
    """The executable, and the process that all others are children of."""

    program: Path
    pid: int


class Changed:
    """A module with other values under some of its names; for a single module that imports it."""

    def __init__(self, module, **values):
        self.__dict__.update(values, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextlib.contextmanager
def forked_python():
    """Run the server."""
    with tempfile.TemporaryDirectory() as folder:  # a short path: the socket lies there
        socket_path = Path(folder, "socket")
        with started_server(socket_path) as pid:
            yield Forked(asking_program(socket_path, Path(folder, "python")), pid)


def asking_program(socket_path, program):
    """Write the executable."""
    asking = [sys.executable, "-I", "-S", __file__, "ask", str(socket_path)]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(asking)} "$@"\n')
    program.chmod(0o755)
    return program


@contextlib.contextmanager
def started_server(socket_path, python=sys.executable, prefix=()):
    """The server's process id; ``prefix``: a command that runs it elsewhere, by exec."""
    command = [*prefix, str(python), __file__, "serve", str(socket_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as server:
        while not socket_path.exists():
            assert server.poll() is None, "the server of forked processes has ended"
            time.sleep(0.05)
        try:
            yield server.pid
        finally:
            server.stdin.close()


def ask(path, arguments):
    """Have the server run it, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        content = json.dumps(request).encode()
        socket.send_fds(server, [len(content).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(content)
        pid = int.from_bytes(server.recv(8), "big")
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = server.recv(8)
    code = os.waitstatus_to_exitcode(int.from_bytes(status, "big")) if status else -signal.SIGKILL
    if code >= 0:
        sys.exit(code)
    if -code in FORWARDED:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def serve(path):
    """Answer until the standard input ends; in a forked process, the request to run."""
    import gc
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    # A table of a thousand patterns, which loading the first model makes.
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path + ".new")
        listener.listen(64)
        os.rename(path + ".new", path)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        running = set()
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    for process in running:
                        os.kill(process.pid, signal.SIGKILL)
                    return None
                if key.fileobj is not listener:
                    # Both ends may have come in the same turn.
                    if key.data in running:
                        running.remove(key.data)
                        _finish(key.data, selector, killed=key.fileobj is key.data.client)
                    continue
                client, _ = listener.accept()
                request, files = _receive(client)
                if request is None:
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for number, file in enumerate(files):
                        os.dup2(file, number)
                for file in files:
                    os.close(file)
                if pid == 0:
                    os.setpgid(0, 0)  # Ray kills the whole group of a worker that has ended
                    client.close()
                    for process in running:
                        process.client.close()
                        os.close(process.end)
                    return request
                process = _Process(pid, client, os.pidfd_open(pid))
                running.add(process)
                selector.register(process.end, selectors.EVENT_READ, process)
                selector.register(client, selectors.EVENT_READ, process)
                with contextlib.suppress(OSError):  # killed already: that is its end, too
                    client.sendall(pid.to_bytes(8, "big"))


class _Process(NamedTuple):
    pid: int
    client: socket.socket
    end: int


def _finish(process, selector, *, killed):
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    _, status = os.waitpid(process.pid, 0)
    with contextlib.suppress(OSError):
        process.client.sendall(status.to_bytes(8, "big"))
    selector.unregister(process.end)
    selector.unregister(process.client)
    os.close(process.end)
    process.client.close()


def _receive(client):
    """The request and its files; None if the executable was killed before it had said it all."""
    header, files, _, _ = socket.recv_fds(client, 8, 3)
    size, content = int.from_bytes(header, "big"), b""
    while len(header) == 8 and len(content) < size:
        part = client.recv(size - len(content))
        if not part:
            break
        content += part
    if len(header) < 8 or len(content) < size:
        for file in files:
            os.close(file)
        return None, ()
    return json.loads(content), files


def run(request):
    """What ``python`` does with these arguments, in this folder and environment."""
    wanted = request["environment"]
    # Not cleared first: Ray finds the place of a process's title by its first variable.
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({k: v for k, v in wanted.items() if os.environ.get(k) != v})
    os.chdir(request["folder"])
    _change_what_was_read_at_import()
    sys.path.pop(0)  # the folder of this file
    try:
        _interpret(request["arguments"])
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    # What follows in Python, too; but not clearing away what was imported, which takes longer than
    # most of what is run.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _interpret(arguments):
    isolated = False
    while arguments[0] in ("-I", "-u"):
        isolated |= arguments[0] == "-I"
        arguments = arguments[1:]
    if not isolated:
        named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [path for path in named if path and path not in sys.path]
    if arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        if not isolated:
            sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _change_what_was_read_at_import():
    import random

    import transformers.dynamic_module_utils
    import transformers.utils.hub

    random.seed()
    if cache := os.environ.get("HF_MODULES_CACHE"):
        transformers.utils.hub.HF_MODULES_CACHE = cache
        transformers.dynamic_module_utils.HF_MODULES_CACHE = cache


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    elif (given := serve(sys.argv[2])) is not None:
        run(given)
