#!/usr/bin/env bash
# Sets up ScienceFlow for FLUX.2-klein (and Qwen-Image: it is the same environment). Safe to run again: what is there is kept.
#
#   bash env_setup/init_flux2_env.sh [CONFIG.py]
#
# With conda on the PATH: an environment named $SCIENCEFLOW_ENV (default: scienceflow).
# Without: a virtual environment in .venv of this repository.
#   SCIENCEFLOW_EXTRAS   extras to install, comma-separated (default: dev)
#   PYTHON               interpreter for the virtual environment (default: python3; 3.10 or newer)
# Ends with `scienceflow doctor [CONFIG.py]`: exit code 2 when something is left to mend.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="${SCIENCEFLOW_ENV:-scienceflow}"
extras="${SCIENCEFLOW_EXTRAS:-dev}"
cd "$repository"

if command -v conda >/dev/null 2>&1; then
    if ! conda run -n "$environment" python -c "" >/dev/null 2>&1; then
        conda create --yes --name "$environment" python=3.11 pip
    fi
    python=(conda run --no-capture-output -n "$environment" python)
    activate="conda activate $environment"
else
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then # none, or one that was broken off half-way
        "${PYTHON:-python3}" -m venv .venv
    fi
    python=(.venv/bin/python)
    activate="source .venv/bin/activate"
fi

"${python[@]}" - <<'CHECK'
import sys
if sys.version_info < (3, 10):
    sys.exit(f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed. Set PYTHON=python3.11 and delete .venv.")
CHECK
"${python[@]}" -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -e ".[${extras}]"

echo "Next: $activate"
echo
"${python[@]}" -m OpenSciDraw.cli doctor "$@"
