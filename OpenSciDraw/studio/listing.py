"""A source of figures becomes an index: a table of its rows that opens at once, however many there are. Runs in a worker."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.facts import row_facts
from OpenSciDraw.figures.listing import FigureRef, Rejection, RowRef, list_figures
from OpenSciDraw.figures.refs import SpanRef
from OpenSciDraw.utils.files import json_objects, real, unfinished

SCHEMA = pa.schema([
    ("id", pa.string()), ("caption", pa.string()), ("reason", pa.string()), ("bucket", pa.string()), ("tier", pa.string()),
    ("kind", pa.string()), ("length", pa.int32()), ("file", pa.string()), ("column", pa.string()), ("row", pa.int64()),
    ("offset", pa.int64()), ("bytes", pa.int64()), ("changed", pa.int64()), ("made_of", pa.string()), ("captions", pa.int16()),
])  # fmt: skip
_REPORTED = 20_000  # rows between two words on the way


def write_index(report: Callable[[Any], None], root: str, source: str, out: str) -> dict[str, Any]:
    """List `source` (a folder, list or store below `root`) into the file `out`. Returns how many rows it has.

    What leads out of `root` is left out, with that as the reason: pictures that lists name, files behind links.
    """
    path, top = Path(source), Path(root)
    rows, watched = (_store(path) if is_store(path) else _figures(path, top)), watch(path)
    metadata = {b"watched": json.dumps(watched).encode(), b"store": b"1" if is_store(path) else b"0"}
    count, schema = 0, SCHEMA.with_metadata(metadata)
    with unfinished(Path(out)) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == _REPORTED:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                count, batch = count + len(batch), []
                report({"rows": count})
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    return {"rows": count + len(batch)}


def is_store(folder: Path) -> bool:
    return (folder / "figures").is_dir() and any(folder.glob("figures/*.index.arrow"))


def watch(source: Path) -> dict[str, int]:
    """When the folders of a source, its lists and tables were last changed, ns: what shows that figures came or went."""
    if source.is_file():
        return {str(source): source.stat().st_mtime_ns}
    found = {}
    for directory, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found[directory] = os.stat(directory).st_mtime_ns
        for name in names:
            if name.lower().endswith((".jsonl", ".csv", ".parquet", ".arrow", ".tar")):
                found[os.path.join(directory, name)] = os.stat(os.path.join(directory, name)).st_mtime_ns
    return found


# -- figures ------------------------------------------------------------------------------------------
def _figures(source: Path, root: Path) -> Iterator[dict[str, Any]]:
    _refuse_links(source, root)
    refs, rejections = list_figures(source)
    facts, places = row_facts(source), _Inside(root)
    for ref in refs:
        outside = next((of.source for of in (ref, *ref.references, *([ref.mask] if ref.mask else [])) if not places.has(of)), None)
        if outside is not None:
            yield _left_out(Rejection(ref.id, ref.source, f"outside of the studio's folder: {outside}"))
            continue
        tier, kind = facts.get(ref.source, ("", ""))
        bucket = f"{ref.bucket[0]}x{ref.bucket[1]}" if ref.bucket else ""
        yield {
            "id": ref.id, "caption": ref.caption, "reason": "", "bucket": bucket, "tier": tier, "kind": kind,
            "length": len(ref.caption), **_place(ref), "bytes": ref.size_bytes, "changed": ref.changed_ns,
            "made_of": json.dumps([_place(of) | {"bytes": of.size_bytes} for of in ref.references]) if ref.references else "",
            "captions": max(1, len(ref.captions)),
        }  # fmt: skip
    yield from (_left_out(rejection) for rejection in rejections)


class _Inside:
    """Whether figures lie below a folder; each folder of theirs is looked at once."""

    def __init__(self, root: Path):
        self.root = real(root)
        self._known: dict[str, bool] = {}

    def has(self, ref: FigureRef) -> bool:
        file = ref.file if isinstance(ref, (RowRef, SpanRef)) else ref.source
        folder = os.path.dirname(file)
        if folder not in self._known:
            found = real(Path(folder))
            self._known[folder] = found == self.root or self.root in found.parents
        return self._known[folder] and (not os.path.islink(file) or self.root in real(Path(file)).parents)


def _refuse_links(source: Path, root: Path) -> None:
    """Raises UserError where a link in a source leads out of the folder: captions and lists behind it would be read."""
    top = real(root)
    for directory, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *names]:
            path = os.path.join(directory, name)
            if os.path.islink(path) and top not in real(Path(path)).parents:
                raise UserError(f"{path} is a link that leads out of the studio's folder, to {os.path.realpath(path)}. Start the "
                                "studio in a folder that holds both.")  # fmt: skip


def _place(ref: FigureRef) -> dict[str, Any]:
    if isinstance(ref, RowRef):
        return {"file": ref.file, "column": ref.column, "row": ref.row, "offset": -1}
    if isinstance(ref, SpanRef):
        return {"file": ref.file, "column": "", "row": -1, "offset": ref.offset}
    return {"file": ref.source, "column": "", "row": -1, "offset": -1}


def _left_out(rejection: Rejection) -> dict[str, Any]:
    return {"id": rejection.id, "caption": "", "reason": rejection.reason or "?", "bucket": "", "tier": "", "kind": "", "length": 0,
            "file": rejection.source, "column": "", "row": -1, "offset": -1, "bytes": 0, "changed": 0, "made_of": "",
            "captions": 0}  # fmt: skip


# -- stores ---------------------------------------------------------------------------------------------
def _store(folder: Path) -> Iterator[dict[str, Any]]:
    """Figures of a store: `row` is the one in its table; and what encoding rejected."""
    from OpenSciDraw.store.shard import FIGURE_PARTS, open_index
    from OpenSciDraw.store.table import StoreTable

    at = 0
    for shard in sorted((folder / "figures").glob("[0-9]*.index.arrow")):
        for row in open_index(shard)[0].read_all().select(["id", "caption", "bucket_w", "bucket_h"]).to_pylist():
            yield {
                "id": row["id"], "caption": row["caption"], "reason": "", "bucket": f"{row['bucket_w']}x{row['bucket_h']}",
                "tier": "", "kind": "", "length": len(row["caption"]), "file": str(folder), "column": "", "row": at, "offset": -1,
                "bytes": 0, "changed": 0, "made_of": "", "captions": 1,
            }  # fmt: skip
            at += 1
    count = len(StoreTable(folder / "figures", FIGURE_PARTS))
    if count != at:
        raise UserError(f"{folder}: its indices list {at} figures, its table {count}. Run `scienceflow verify {folder}`.")
    rejected = folder / "rejected.jsonl"
    if rejected.is_file():
        for found in json_objects(rejected.read_bytes())[0]:
            yield _left_out(Rejection(str(found.get("id", "")), str(found.get("source", "")), str(found.get("reason", ""))))
