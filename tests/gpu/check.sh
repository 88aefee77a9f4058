#!/usr/bin/env bash
# The first minutes on a GPU: measures what nobody has measured, in at most 8 minutes.  docs/gpu.md
#
#   tests/gpu/check.sh [FOLDER [PART ...]]
#
# FOLDER (default: gpu_check) gets found.json, found.txt and the logs of what failed.  Without a GPU everything
# that can be is run small, in a minute.  Exit code 0 if every part came to its end.
#
# PYTHON   interpreter (default: .venv/bin/python if it is there, or else python3)
# WHEELS   folder of wheels for what that interpreter lacks; for a machine without a network
# BUDGET_S seconds for all of it (default: 480)
set -euo pipefail
[[ ${1:-} != -* ]] || { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0; }
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
[[ -x $PYTHON ]] || PYTHON=python3
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
fi
export PYTHONPATH=$ROOT:$ROOT/tests${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
"$PYTHON" "$ROOT/tests/gpu/check.py" --out "${1:-gpu_check}" --budget "${BUDGET_S:-480}" \
  "${@:2}"
