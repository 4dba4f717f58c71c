"""Writing a store to cloud storage: shards are written here, one at a time, and moved there; the index arrives last."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from OpenSciDraw.errors import UserError
from OpenSciDraw.store.remote import PATIENT, THREADS, Patience, Remote, modified, version_of
from OpenSciDraw.store.remote_files import default_cache
from OpenSciDraw.store.shard import KINDS, index_path, what_is_damaged
from OpenSciDraw.utils.files import locked, parse_json


class Staging:
    """A local folder that stands for a store in cloud storage while it is encoded.

    `folder` has an index for each whole shard that is there (so that resuming knows what it holds), and no shards.

    Raises:
        UserError: as Remote; no right to read there.
    """

    def __init__(self, url: str, cache_dir: str | Path | None, patience: Patience = PATIENT):
        self.remote = Remote(url, patience)
        root = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.folder = root / "staging" / hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        self.refresh()

    def refresh(self) -> None:
        """Make the indices here those that are there: shards of other machines are known from then on.

        One process of a machine does it, the others wait. Raises UserError when an index cannot be fetched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "versions.json"
        with locked(self.folder / "lock"):
            before: dict[str, str] = parse_json(known.read_text()) if known.exists() else {}
            after: dict[str, str] = {}
            for kind in KINDS:
                after |= self._refresh(kind, before)
            known.write_text(json.dumps(after))

    def _refresh(self, kind: str, before: dict[str, str]) -> dict[str, str]:
        entries = self.remote.entries(kind)
        here = self.folder / kind
        here.mkdir(parents=True, exist_ok=True)
        whole = {n: version_of(e) for n, e in entries.items() if n.endswith(".index.arrow") and _shard_of(n) in entries}
        for index in here.glob("*.index.arrow"):
            if index.name not in whole and not (here / _shard_of(index.name)).exists():  # else it is on its way
                index.unlink()
        after = {f"{kind}/{name}": version for name, version in whole.items()}
        todo = [name for name, version in after.items() if before.get(name) != version or what_is_damaged(self.folder / name)]

        def fetch(name: str) -> None:
            building = self.folder / f"{name}.tmp"
            building.write_bytes(self.remote.read(name))
            written = modified(entries[name.partition("/")[2]])
            os.utime(building, (written, written))  # `encode` compares pictures that changed after it
            os.replace(building, self.folder / name)

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(fetch, todo))
        except OSError as error:
            raise UserError(f"{self.remote.url}: an index cannot be fetched: {error}.") from error
        return after

    def has(self, shard: Path) -> bool:
        """Whether a shard (its path here) is there, whole."""
        return index_path(shard).exists() and not shard.exists()  # one that lies here has not been moved yet

    def shards(self, kind: str) -> list[Path]:
        """The paths here of all whole shards there."""
        indices = sorted((self.folder / kind).glob("*.index.arrow"))
        return [shard for index in indices if self.has(shard := index.with_name(_shard_of(index.name)))]

    def publish(self, shard: Path) -> None:
        """Move a shard that was written here (`write_shard`) there; its index stays here too. Raises OSError."""
        name = shard.relative_to(self.folder).as_posix()
        index = index_path(shard)
        self.remote.remove(index.relative_to(self.folder).as_posix())  # of a shard that is written anew
        self.remote.write(shard, name)
        self.remote.write(index, index.relative_to(self.folder).as_posix())
        shard.unlink()

    def publish_file(self, file: Path) -> None:
        """Copy another file of `folder` there (rejected.jsonl). Raises OSError."""
        self.remote.write(file, file.relative_to(self.folder).as_posix())


def _shard_of(index: str) -> str:
    return index.removesuffix(".index.arrow") + ".parquet"
