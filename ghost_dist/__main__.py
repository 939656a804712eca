"""``python -m ghost_dist``: the same as the ``ghost-dist`` command."""

from ghost_dist.cli import main

if __name__ == "__main__":
    main()
