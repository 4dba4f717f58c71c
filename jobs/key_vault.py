"""Azure ML: run a command with secrets of a key vault in its environment; they are never printed.

    KEY_VAULT_URL=https://NAME.vault.azure.net python jobs/key_vault.py HF_TOKEN WANDB_API_KEY -- COMMAND …

A vault's names have hyphens: HF_TOKEN is read from the secret HF-TOKEN. The job's identity must be allowed to read them.
Without KEY_VAULT_URL the command runs as it is.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> None:
    names, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    vault = os.environ.get("KEY_VAULT_URL")
    if vault:
        from azure.identity import DefaultAzureCredential
        from azure.keyvault.secrets import SecretClient

        client = SecretClient(vault, DefaultAzureCredential())
        for name in names:
            os.environ[name] = client.get_secret(name.replace("_", "-")).value or ""
    os.execvp(command[0], command)


if __name__ == "__main__":
    if "--" not in sys.argv:
        sys.exit(__doc__)
    main(sys.argv[1:])
