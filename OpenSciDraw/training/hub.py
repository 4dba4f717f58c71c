"""The final weights on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from OpenSciDraw.config import Config

_LOG = logging.getLogger("OpenSciDraw")


def push_to_hub(config: Config, weights: Path) -> None:
    """Upload the final weights (a file or a folder) to `hub_model_id`; a failed upload is reported and loses nothing.

    The token comes from the environment (HF_TOKEN) or `hub_token`, and is never printed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=config.hub_token or os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(str(config.hub_model_id), exist_ok=True)
        if weights.is_dir():
            api.upload_folder(folder_path=weights, path_in_repo=weights.name, repo_id=str(config.hub_model_id))
        else:
            api.upload_file(path_or_fileobj=weights, path_in_repo=weights.name, repo_id=str(config.hub_model_id))
    except (HfHubHTTPError, OSError) as error:
        _LOG.error("push_to_hub: %s was not uploaded (%s). On this machine all is whole: %s", config.hub_model_id, error, weights)
        return
    _LOG.info("uploaded %s to %s", weights.name, config.hub_model_id)
