#!/usr/bin/env bash
# What CI checks: formatting, lints, types, tests.
#
#   bash launch/test.sh                          # everything; the aim is 15 minutes on 2 cores
#   bash launch/test.sh --quick                  # all but the tests that need a model; the aim is a minute
#   bash launch/test.sh tests/solver -x          # pytest with these arguments, at once
#   bash launch/test.sh -m gpu                   # on a machine with an NVIDIA GPU
#   bash launch/test.sh -m chaos_nightly         # hundreds of injected faults
extras=dev
[ "${1:-}" != --quick ] || extras='test'
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Hundreds of processes are started: what one has compiled the next one has.
unset PYTHONDONTWRITEBYTECODE

# Most tests use one thread. One more process than two cores have: that of the Ray cluster waits for
# half of its time. How they share the files is in tests/conftest.py.
# A process that dies ends the suite: with another in its place, the groups of the dead one may never
# be given out, and pytest waits for them.
shared=(--dist loadgroup --no-loadscope-reorder --max-worker-restart=0)
often="not gpu and not chaos_nightly"

if [ "${1:-}" = --quick ]; then
  shift
  ruff check .
  ruff format --check .
  types=$(mktemp)
  trap 'rm -f "$types"' EXIT
  mypy >"$types" 2>&1 & # beside the tests: without its cache it takes a quarter of a minute
  mypy=$!
  tests=0
  python -m pytest -n 2 "${shared[@]}" -m "$often and not model" --durations=5 "$@" || tests=$?
  wait "$mypy" || tests=1
  cat "$types"
  exit "$tests"
fi

# The report is opened in a browser where playwright and a Chromium can be had; elsewhere those tests
# are skipped and say why.
if ! python -c 'import playwright, axe_playwright_python' 2>/dev/null; then
  python -m pip install --quiet 'playwright>=1.50' 'axe-playwright-python>=0.1.4' || echo "note: no playwright, the report's browser tests are skipped"
fi
if [ $# -eq 0 ]; then
  ruff check .
  ruff format --check .
  mypy
  set -- -n 3 "${shared[@]}" -m "$often"
fi
exec python -m pytest "$@"
