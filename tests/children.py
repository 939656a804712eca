"""Runs in processes of their own, forked from a server that has imported everything once."""

import multiprocessing
import os

from forked import LIBRARIES

from ghost_dist.config_file import config_tree

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*LIBRARIES, "ghost_dist.pipeline.recover"])  # and no running Ray


def child(config, log, again=None, *, on_cluster=False):
    """A process, not started yet, that runs ``recover``; what it says is in the file ``log``."""
    return _SERVER.Process(target=_run, args=(config_tree(config), str(log), again, on_cluster))


def _run(tree, log, again, on_cluster):
    import torch

    from ghost_dist.config_file import config_from_tree

    if on_cluster:
        from ghost_dist.cluster.session import recover_on_cluster as recover
    else:
        from ghost_dist.pipeline.recover import recover

    torch.set_num_threads(1)
    # A file, not the terminal: a killed writer must not garble what pytest prints.
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    recover(config_from_tree(tree), again=again)
