#!/usr/bin/env bash
# Everything CI checks: formatting, lints, types, tests. Arguments go to pytest.
#
#   bash launch/test.sh                          # the normal suite, under 25 minutes on 2 cores
#   bash launch/test.sh -m gpu                   # on a machine with an NVIDIA GPU
#   bash launch/test.sh -m chaos_nightly         # hundreds of injected faults
extras=dev
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# The report is opened in a browser where playwright and a Chromium can be had; elsewhere those tests
# are skipped and say why.
if ! python -c 'import playwright, axe_playwright_python' 2>/dev/null; then
  python -m pip install --quiet 'playwright>=1.50' 'axe-playwright-python>=0.1.4' || echo "note: no playwright, the report's browser tests are skipped"
fi
ruff check .
ruff format --check .
mypy
if [ $# -eq 0 ]; then
  # Two processes, since most tests use one thread; how they share the files is in tests/conftest.py.
  set -- -m "not gpu and not chaos_nightly" -n 2 --dist loadgroup --no-loadscope-reorder
fi
exec python -m pytest "$@"
