"""A file system in common that answers late or not at all, held by the kernel. For root.

A hold (fanotify) keeps every open back, of those who see the file system through one mount: a host,
where hosts have mounts of their own. A freeze keeps back all writes; who waits cannot be killed.
"""

import contextlib
import subprocess
import sys

# Every open below a mount waits for an answer of this process: it comes late, or once it ends.
HOLD = """
import ctypes, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
held = libc.fanotify_init(4, os.O_RDONLY)  # FAN_CLASS_CONTENT
what = ctypes.c_uint64(0x10000 | 0x40000000)  # FAN_OPEN_PERM | FAN_ONDIR
if libc.fanotify_mark(held, 0x11, what, -100, sys.argv[1].encode()):  # FAN_MARK_ADD, _MOUNT
    sys.exit(os.strerror(ctypes.get_errno()))
print("held", flush=True)
late = float(sys.argv[2])
while late:
    file = struct.unpack("IBBHQii", os.read(held, 24))[5]  # one event at a time
    time.sleep(late)
    os.write(held, struct.pack("iI", file, 1))  # FAN_ALLOW
    os.close(file)
time.sleep(1e6)
"""


def do(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def mounted(folder):
    """A file system of 1 GB mounted on a new folder; None where none can be."""
    disk = folder.with_name("disk")
    with disk.open("wb") as file:
        file.truncate(1 << 30)
    folder.mkdir()
    try:
        do("mkfs.ext4", "-q", disk)
        do("mount", "-o", "loop", disk, folder)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        do("umount", folder)


def hold(folder, late_s=0.0, inside=()):
    """Opens take so long, 0: until it is let go, by the function that this returns.

    ``inside``: a command that runs another one where the mount is that of a host.
    """
    holding = subprocess.Popen(
        [*inside, sys.executable, "-c", HOLD, str(folder), str(late_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holding.stdout.readline() == "held\n"

    def let_go():
        with holding:
            holding.kill()

    return let_go


def freeze(folder):
    """Nothing is written until the function that this returns is called."""
    do("fsfreeze", "--freeze", folder)
    return lambda: do("fsfreeze", "--unfreeze", folder)
