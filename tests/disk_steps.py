"""A disk on which every step that changes a folder can be counted, refused, or be the last one.

Python tells its audit hooks of every file that is opened, made, renamed or removed, before it is
done. What compiled code writes by itself is not among them; that ends in a rename of Python's.
"""

import contextlib
import errno
import os
import re
import sys
import threading
from pathlib import Path

from ghost_dist.errors import GhostDistError

_CREATING = {"open", "os.mkdir", "os.link"}
_CHANGING = {*_CREATING, "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watchers = []


class Killed(BaseException):
    """The process has died: nothing catches it, and nothing can be tidied up any more."""


class Watcher:
    """The steps below a folder; from number ``last``, or one not in ``known``, on they raise.

    Attributes
    ----------
    steps
        Kind and place of each, without what differs from run to run.
    failed
        Whether that step was reached.
    """

    def __init__(self, folder, last=None, known=None, full=False):
        self._folder, self._last, self._known, self._full = str(folder), last, known, full
        self._lock = threading.Lock()
        self.steps, self.failed = [], False

    def __call__(self, event, args):
        if event not in _CHANGING or (event == "open" and not args[2] & _WRITING):
            return
        path = _path_of(event, args)
        if path is None or not f"{path}/".startswith(f"{self._folder}/"):
            return
        if self._full and event not in _CREATING:
            return
        with self._lock:
            step = (event, _without_names(path.removeprefix(self._folder)))
            self.steps.append(step)
            new = self._known is not None and step not in self._known
            self.failed = self.failed or new or len(self.steps) == self._last
        if self.failed:
            if self._full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            raise Killed(path)


@contextlib.contextmanager
def watched(folder, last=None, known=None, *, full=False):
    """Watch a folder; with ``full`` only steps that need space count, and raise ``OSError``."""
    if not _watchers:
        sys.addaudithook(lambda event, args: [watch(event, args) for watch in _watchers[-1]])
        _watchers.append([])
    watcher = Watcher(Path(folder).absolute(), last, known, full)
    _watchers.append([watcher])
    try:
        yield watcher
    finally:
        _watchers.remove([watcher])


def stop_at_every_kind(folder, command, *, full=False):
    """Call ``command`` until it is done; each call but the last stops at a kind of its own.

    So every state that a stop may leave is one that a command went on from.
    """
    known = set()
    while True:
        with watched(folder, known=known, full=full) as watcher:
            try:
                command()
            except (Killed, OSError, GhostDistError):
                if not watcher.failed:
                    raise
            else:
                assert not watcher.failed
                return known
        known |= set(watcher.steps)


def each_kind(steps):
    """Number, from 1, of the first and the last step of each kind."""
    first, last = {}, {}
    for number, step in enumerate(steps, 1):
        first.setdefault(step, number)
        last[step] = number
    return sorted({*first.values(), *last.values()})


def _path_of(event, args):
    if isinstance(args[0], int) or args[0] is None:  # a descriptor: its opening was seen
        return None
    path = os.fsdecode(args[0])
    if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # rmtree names what is in a folder
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
    return os.path.abspath(path)


def _without_names(path):
    """One array is like another, and so is one range, one span, one attempt."""
    path = re.sub(r"\b\d+\b", "N", re.sub(r"[0-9a-f]{32}", "ID", path))
    return re.sub(r"/ID/N/.*?(?=/c$|/c/|/zarr|$)", "/ID/ARRAY", path)
