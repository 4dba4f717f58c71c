#!/usr/bin/env bash
# Sets up ScienceFlow for Qwen-Image: the same environment as for FLUX.2-klein.
#
#   bash env_setup/init_qwen25_env.sh
#
# Training Qwen-Image arrives in a later version. Until then model_type = "QwenImage" is refused.
set -euo pipefail

bash "$(dirname "${BASH_SOURCE[0]}")/init_flux2_env.sh"
echo "Note: this version trains FLUX.2-klein. Training Qwen-Image arrives in a later version."
