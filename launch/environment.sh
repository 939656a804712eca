# Sourced by the other scripts: makes the virtual environment .venv of this checkout and installs
# the package with the given extras into it. torch goes first and by its exact version, so that pip
# takes the CPU build where there is no NVIDIA GPU and never pulls gigabytes of CUDA by accident.
#
#   extras=dev; source launch/environment.sh   # without extras: leave the variable unset
#
# PYTHON=python3.12 chooses the interpreter; GHOST_DIST_VENV=DIR another place for the environment.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${extras:-}
venv=${GHOST_DIST_VENV:-.venv}
torch=torch==2.13.0

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: ghost_dist needs Python 3.11 or 3.12; found $(python3 --version 2>&1). Set PYTHON=..." >&2
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1

if ! python -c 'import torch' 2>/dev/null; then
  index=()
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "installing torch for CUDA"
  else
    echo "installing torch for the CPU (no NVIDIA GPU found)"
    cpu=https://download.pytorch.org/whl/cpu
    # Only where it can be reached: behind a mirror the default index decides.
    if python - "$cpu" <<'PY' 2>/dev/null; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5)
PY
      index=(--index-url "$cpu" --extra-index-url https://pypi.org/simple)
    fi
  fi
  python -m pip install --quiet "${index[@]}" "$torch"
fi

# What is installed only grows: a script adds its extras to those that others have asked for, and
# nothing is installed again when scripts are used by turns.
stamp="$venv/.ghost-dist-installed"
project="$(cksum <pyproject.toml) $PWD"
installed=$(sed -n 2p "$stamp" 2>/dev/null || true)
wanted=$(
  python - "$installed,$extras" <<'PY'
import re, sys, tomllib

with open("pyproject.toml", "rb") as file:
    table = tomllib.load(file)["project"]["optional-dependencies"]
todo, found = sys.argv[1].split(","), set()
while todo:  # an extra may name others
    name = todo.pop()
    if name in table and name not in found:
        found.add(name)
        for own in re.findall(r"ghost_dist\[(.*?)\]", " ".join(table[name])):
            todo += own.split(",")
print(",".join(sorted(found)))
PY
)
if [ "$(sed -n 1p "$stamp" 2>/dev/null)" != "$project" ] || [ "$wanted" != "$installed" ]; then
  echo "installing ghost_dist${wanted:+[$wanted]}"
  python -m pip install --quiet --editable ".${wanted:+[$wanted]}"
  printf '%s\n' "$project" "$wanted" >"$stamp"
fi
