"""Where a model's files come from, and what to do when they cannot be loaded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from: a hub id, a local folder, or `embedded:NAME`."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)  # never printed

    def resolve(self) -> ModelSource:
        """Replace an `embedded:` name by the folder that holds it; check that a local path exists."""
        if self.name.startswith("embedded:"):
            from OpenSciDraw.models.embedded import embedded_folder

            return replace(self, name=str(embedded_folder(self.name.removeprefix("embedded:"))), revision=None)
        looks_local = self.name.startswith((".", "/", "~")) or self.name.count("/") != 1
        folder = Path(self.name).expanduser()
        if folder.exists():
            if not (folder / "model_index.json").exists():
                raise UserError(
                    f"pretrained_model_name_or_path = {self.name!r} is a folder without model_index.json. "
                    "Expected a diffusers model folder (transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."
                )
            return replace(self, name=str(folder))
        if looks_local:
            raise UserError(
                f"pretrained_model_name_or_path = {self.name!r}: no such folder, and not a hub id (owner/name) "
                "or an embedded:NAME."
            )
        return self

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_dir()


def load_component(cls: Any, source: ModelSource, subfolder: str, **kwargs: Any) -> Any:
    """`cls.from_pretrained` with errors that say what to do.

    Raises:
        UserError: gated repository, missing or wrong token, no network, missing files.
    """
    if not source.is_local:
        kwargs |= {"revision": source.revision, "cache_dir": source.cache_dir, "token": source.token}
    if source.variant is not None:
        kwargs["variant"] = source.variant
    try:
        return cls.from_pretrained(source.name, subfolder=subfolder, **kwargs)
    except OSError as error:  # the hub's HTTP errors are OSErrors too
        raise loading_error(error, source, subfolder) from error


def loading_error(error: OSError, source: ModelSource, part: str) -> UserError:
    """What to do about a component that cannot be loaded."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    where = f"{part}/ of {source.name}" + (f" at revision {source.revision}" if source.revision else "")
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(e) for e in chain).lower()
    if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text or "401" in text or "403" in text:
        return UserError(
            f"Cannot load {where}: the repository is gated or the access token is missing or not allowed.\n"
            f"  1. Open https://huggingface.co/{source.name} and accept its licence.\n"
            "  2. Run `hf auth login` (older: `huggingface-cli login`), or set HF_TOKEN in the environment."
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return UserError(f"Cannot load {where}: no such repository (or it is private: log in, see HF_TOKEN).")
    hint = (
        "The files are not in the local cache and the hub cannot be reached."
        if any(isinstance(e, LocalEntryNotFoundError) for e in chain) or "connect" in text
        else "Check the name, the revision and the folder's files."
    )
    return UserError(f"Cannot load {where}: {hint}\n  {type(error).__name__}: {str(error).splitlines()[0]}")
