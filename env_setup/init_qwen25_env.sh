#!/usr/bin/env bash
# Sets up ScienceFlow for Qwen-Image: the same environment as for FLUX.2-klein, with the same options.
#
#   bash env_setup/init_qwen25_env.sh [CONFIG.py]
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/init_flux2_env.sh" "$@"
