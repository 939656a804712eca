#!/usr/bin/env bash
# The documentation site: writes the reference tables from the code, then builds build/site.
#
#   bash launch/docs.sh              # build/site/index.html; any warning fails
#   bash launch/docs.sh serve        # http://127.0.0.1:8000, built again at every change
extras=docs
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python launch/reference.py
exec python -m mkdocs "${1:-build}" --strict --config-file .mkdocs.yml
