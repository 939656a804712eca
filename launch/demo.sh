#!/usr/bin/env bash
# From a fresh clone to a recovered model: makes .venv, installs, runs 'ghost-dist demo'.
# Needs git, Python 3.11 or 3.12 and pip. Arguments go to the demo: launch/demo.sh --out RUN
case "$*" in *--model*) extras=real ;; esac # what reads the weights of others than the shipped one
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec ghost-dist demo "$@"
