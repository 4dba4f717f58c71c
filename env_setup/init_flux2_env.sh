#!/usr/bin/env bash
# Sets up ScienceFlow for FLUX.2-klein. Safe to run again: what is there is kept.
#
#   bash env_setup/init_flux2_env.sh
#
# With conda on the PATH: an environment named $SCIENCEFLOW_ENV (default: scienceflow).
# Without: a virtual environment in .venv of this repository.
#   SCIENCEFLOW_EXTRAS   extras to install, comma-separated (default: dev)
#   PYTHON               interpreter for the virtual environment (default: python3; 3.10 or newer)
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
    if [[ ! -x .venv/bin/python ]]; then
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
"${python[@]}" -m pip install --disable-pip-version-check --upgrade-strategy only-if-needed -e ".[${extras}]"
"${python[@]}" -m OpenSciDraw.cli --version
"${python[@]}" - <<'CHECK'
import torch
gpus = torch.cuda.device_count()
print(f"torch {torch.__version__}, {gpus} CUDA GPU(s)" + ("" if gpus else ": the tiny configs run on the CPU"))
CHECK

echo
echo "Ready. Next: $activate"
if [[ -z "${HF_TOKEN:-}" ]]; then
    echo "FLUX.2-klein-base-9B is gated: accept its licence on the hub, then run \`hf auth login\` (or set HF_TOKEN)."
    echo "FLUX.2-klein-base-4B and the embedded model need no login."
fi
