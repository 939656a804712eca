"""Hosts on one kernel: namespaces for network and mounts, a clock and a disk of their own, Ray.

They have one file system in common. A link can be cut, which is a partition: both sides live and
neither hears of the other. The clock of a host is shifted for all of its processes, by a library
that is loaded before others. For root.
"""

import contextlib
import functools
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from forked import asking_program, started_server
from shared_files import do, freeze, hold, mounted

# Ray finds a silent node after 30 s by default, most of which a test would wait.
NODE_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TMPDIR": "/tmp",  # /tmp/ray is the host's own disk, wherever TMPDIR is
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
# As `ray`, whose workers are forked processes: a rank would import torch for seconds.
RAY = """
import sys
import ray._private.services
from forked import Changed
ray._private.services.sys = Changed(sys, executable=sys.argv.pop(1))
from ray.scripts.scripts import cli
cli()
"""
# What time(2), gettimeofday and clock_gettime say, shifted by the seconds in a mapped file; and
# until when a condition is waited for, by that clock (others count from the start of the machine).
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *offset;
static long shift(void) {
  if (!offset) {
    int file = open(getenv("CLOCK_OFFSET"), O_RDONLY);
    offset = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    close(file);
  }
  return *offset;
}
static int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
__attribute__((constructor)) static void begin(void) {
  shift();
  wait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
  if (!wait) wait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
}
int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                           const struct timespec *until) {
  struct timespec real = *until;
  if (real.tv_sec > 1000000000) real.tv_sec -= shift();
  return wait(condition, mutex, &real);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  int result = syscall(SYS_clock_gettime, clock, now);
  if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += shift();
  return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  int result = syscall(SYS_gettimeofday, now, zone);
  now->tv_sec += shift();
  return result;
}
time_t time(time_t *out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}
"""
LEFT = """
import json, ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
groups = ray.util.placement_group_table().values()
print("held", json.dumps([one["state"] for one in groups if one["state"] != "REMOVED"]))
"""


ip = functools.partial(do, "ip")


@contextlib.contextmanager
def three_hosts():
    """A head without ranks and two workers of one rank each; skipped where none can be made."""
    name = f"gd{os.getpid() % 100000}"
    try:
        do("cc", "--version")
        ip("link", "add", name, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no hosts can be made here (root, iproute2 and a C compiler needed): {error}")
    with tempfile.TemporaryDirectory() as folder:  # a short path: Ray's sockets lie below it
        hosts = Hosts(name, Path(folder))
        try:
            hosts.begin()
            yield hosts
        finally:
            hosts.end()


class Hosts:
    """The cluster that :class:`test_chaos.Chaos` hits, with links that can be cut."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        self.net = f"10.{os.getpid() % 200 + 20}.77"
        self.address = f"{self.net}.10:6379"
        self._stack = contextlib.ExitStack()
        self._nodes, self._logs, self._forked, self._numbers = {}, {}, {}, {}
        self.shared = folder / "shared"  # the file system in common

    def begin(self):
        library, source = self.folder / "clock.so", self.folder / "clock.c"
        source.write_text(CLOCK)
        do("cc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl")
        if not self._stack.enter_context(mounted(self.shared)):
            pytest.skip("no file system can be mounted here (root and mkfs.ext4 needed)")
        Path("/tmp/ray").mkdir(exist_ok=True)
        ip("addr", "add", f"{self.net}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")
        for host in range(3):
            space = self.space(host)
            ip("netns", "add", space)
            self._stack.callback(ip, "netns", "del", space)
            ip("-n", space, "link", "set", "lo", "up")
            self.plug_in(host, 10 + host)
            socket = self.folder / f"socket{host}"
            self.set_clock(host, (7200, 0, -86400)[host])
            clock = [f"{name}={value}" for name, value in self.clock(host).items()]
            server = started_server(socket, prefix=("ip", "netns", "exec", space, "env", *clock))
            pid = self._stack.enter_context(server)
            self._forked[host] = asking_program(socket, self.folder / f"python{host}"), pid
            disk = "size=64m,mode=1777"
            do(*self.inside(host), "mount", "-t", "tmpfs", "-o", disk, "ray", "/tmp/ray")
        for host in range(3):
            self.start_node(host)
            self.wait_for_node(host)

    def end(self):
        for host in list(self._nodes):
            self.kill_node(host)
        for host in self._numbers:  # a namespace that is deleted takes its link along, but later
            ip("link", "del", f"{self.name}h{host}")
        self._stack.close()
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", self.name)

    def space(self, host):
        return f"{self.name}-{host}"

    def inside(self, host):
        """What runs a command on the host, by exec."""
        return "nsenter", "-t", str(self._forked[host][1]), "--net", "--mount"

    def clock(self, host):
        """Variables with which a program has the host's clock."""
        library, offset = self.folder / "clock.so", self.folder / f"clock{host}"
        return {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(offset)}

    def set_clock(self, host, seconds):
        """Put it forward, or back, for what will run there: Ray's own timers stop at a jump."""
        offset = self.folder / f"clock{host}"
        with offset.open("r+b" if offset.exists() else "wb") as file:
            file.write(struct.pack("q", seconds))

    def fill(self, host):
        """No byte is left on its disk, where Ray has its files, until what this returns runs."""
        full = "dd if=/dev/zero of=/tmp/ray/full bs=64k || test -s /tmp/ray/full"
        do(*self.inside(host), "sh", "-c", full)
        return functools.partial(do, *self.inside(host), "rm", "/tmp/ray/full")

    def hold(self, host, late_s=0.0):
        """As :func:`shared_files.hold`, for this host alone."""
        return hold(self.shared, late_s, self.inside(host))

    def freeze(self):
        return freeze(self.shared)

    def plug_in(self, host, number):
        """Give the host a link, and the address that ends with ``number``."""
        link, space = f"{self.name}h{host}", self.space(host)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", link, "master", self.name, "up")
        ip("-n", space, "addr", "add", f"{self.net}.{number}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        # Without a route to elsewhere Ray takes its own address for 127.0.0.1.
        ip("-n", space, "route", "add", "default", "via", f"{self.net}.1")
        self._numbers[host] = number

    def cut(self, host):
        ip("link", "set", f"{self.name}h{host}", "down")

    def mend(self, host):
        ip("link", "set", f"{self.name}h{host}", "up")

    def come_back(self, host, number=None, clock_s=None):
        """The host comes back with another address or clock, and a node of its own."""
        self.kill_node(host)
        if number is not None:
            ip("link", "del", f"{self.name}h{host}")
            self.plug_in(host, number)
        if clock_s is not None:
            self.set_clock(host, clock_s)
        self.start_node(host)

    def start_node(self, host):
        role = (
            ["--head", "--port=6379", "--include-dashboard=false"]
            if host == 0
            else [f"--address={self.address}"]
        )
        self._logs[host] = self.folder / f"node{host}-{time.monotonic()}.log"
        log = self._stack.enter_context(self._logs[host].open("wb"))
        self._nodes[host] = subprocess.Popen(
            [
                *(*self.inside(host), sys.executable, "-c", RAY),
                *(str(self._forked[host][0]), "start", "--block", "--disable-usage-stats"),
                "--object-store-memory=83886080",
                f"--node-ip-address={self.net}.{self._numbers[host]}",
                *role,
            ],
            env={
                **os.environ,
                **NODE_ENVIRONMENT,
                **self.clock(host),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def wait_for_node(self, host):
        """Until Ray runs there. It gives up after 30 s, which a busy machine takes: then again."""
        for _ in range(3):
            node = self._nodes[host]
            while node.poll() is None:
                if b"Ray runtime started" in (said := self._logs[host].read_bytes()):
                    return
                time.sleep(0.3)
            self.kill_node(host)
            self.start_node(host)
        raise AssertionError(said.decode()[-2000:])

    def kill_node(self, host):
        """Everything on the host: its Ray processes and the ranks that they started."""
        node = self._nodes.pop(host)
        space = subprocess.run(
            ["ip", "netns", "pids", self.space(host)], check=True, capture_output=True, text=True
        )
        server = self._forked[host][1]
        for pid in map(int, space.stdout.split()):
            if pid != server:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        node.wait()

    def python(self, host, *arguments, **options):
        """A process on a host, forked from its server."""
        return subprocess.Popen([str(self._forked[host][0]), *arguments], **options)

    @property
    def servers(self):
        """Processes that those of Ray's workers are children of."""
        return {pid for _, pid in self._forked.values()}

    def held_groups(self):
        """States of placement groups that are not removed."""
        asked = self.python(0, "-c", LEFT, self.address, stdout=subprocess.PIPE, text=True)
        said = asked.communicate(timeout=300)[0]
        held = [line[5:] for line in said.splitlines() if line.startswith("held ")]
        assert len(held) == 1, f"said {said!r}, ended with {asked.returncode}"
        return json.loads(held[0])

    def survives(self, host, seconds=20):
        """Whether the node is still up some time after its link was."""
        try:
            self._nodes[host].wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False
