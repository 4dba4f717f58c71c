"""The page of data: figure folders, lists and stores; a grid of each; captions, edited into a new revision; plans."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.responses import Response

from OpenSciDraw.config import save_config
from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.found import PICTURES
from OpenSciDraw.figures.revisions import revise_captions
from OpenSciDraw.figures.sources import LIST_NAMES
from OpenSciDraw.studio import forms, saved
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.figures_index import Filter, Index
from OpenSciDraw.studio.run_state import read_bounded
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.files import parse_json, real

_ROWS = 500  # of one answer
_LOOKED_AT = 20_000  # entries of a folder, to tell what it is


def sources(studio: Studio, given: Given) -> Any:
    """Stores, folders of figures and revisions of lists, by their places in the folder."""
    found: list[dict[str, str]] = []
    taken: list[Path] = []
    for folder in studio.places.folders():
        if any(parent in folder.parents for parent in taken):
            continue
        kind, lists = _kind_of(folder)
        if kind and (folder != studio.places.root or kind == "figures"):
            found.append({"name": studio.places.name(folder), "kind": kind})
        found += [{"name": studio.places.name(folder / name), "kind": "list"} for name in lists]
        if kind and folder != studio.places.root:
            taken.append(folder)
    return found


def _kind_of(folder: Path) -> tuple[str, list[str]]:
    """'store', 'figures' or '', and the revisions of lists in it."""
    if any(folder.glob("figures/*.index.arrow")):
        return "store", []
    kind, lists = "", []
    with os.scandir(folder) as entries:
        for _, entry in zip(range(_LOOKED_AT), entries, strict=False):
            name = entry.name.lower()
            ending = os.path.splitext(name)[1]
            if ending in PICTURES or name in LIST_NAMES or ending in (".parquet", ".tar"):
                kind = kind or ("" if name.startswith(".") else "figures")
            if ".revision-" in name and ending == ".jsonl":
                lists.append(entry.name)
    return kind, sorted(lists)


def opened(studio: Studio, given: Given) -> Any:
    """Whether a source is listed, else how far; with statistics."""
    source = studio.places.inside(given.text("source"))
    index = studio.indices.get(source, anew=given.text("anew", "") == "yes")
    if isinstance(index, int):
        return {"ready": False, "rows": index}
    return {"ready": True, "store": index.is_store, **index.statistics()}


def _index(studio: Studio, given: Given) -> Index:
    return studio.indices.now(studio.places.inside(given.text("source")))


def rows(studio: Studio, given: Given) -> Any:
    """Some rows of what a filter lets through, and how many there are in all."""
    wanted = Filter(
        given.text("bucket", ""), given.text("tier", ""), given.text("kind", ""), given.text("text", ""),
        given.whole("shortest", 0), given.whole("longest", 0), given.text("out", "") == "yes", given.text("reason", ""),
    )  # fmt: skip
    index, first = _index(studio, given), given.whole("first", 0)
    found = index.rows(wanted)
    shown = index.take(found[first : first + given.whole("count", 100, 1, _ROWS)], ["id", "caption", "reason", "changed"])
    for row in shown:
        row["caption"] = row["caption"][:300]
    return {"total": len(found), "rows": shown}


def figure(studio: Studio, given: Given) -> Any:
    """All of one row."""
    index, number = _index(studio, given), given.whole("row")
    row = index.row(number)
    made_of = parse_json(row["made_of"]) if row["made_of"] else []
    original = _original(studio, row) if index.is_store and not row["reason"] else None
    shown = {name: row[name] for name in ("id", "caption", "reason", "bucket", "tier", "kind", "length", "captions", "changed")}
    place = "" if index.is_store else row["file"].removeprefix(f"{studio.places.root}/")
    more = {"row": number, "place": place, "made_of": len(made_of), "store": index.is_store, "original": original is not None}
    return shown | more


def picture(studio: Studio, given: Given) -> Any:
    """A figure, a store's latents decoded, the figure that they were encoded from, or a picture that an edit began with."""
    index, number, which = _index(studio, given), given.whole("row"), given.text("which", "figure")
    row, size = index.row(number), given.text("size", "thumb")
    if which.startswith("source"):
        made_of = parse_json(row["made_of"]) if row["made_of"] else []
        if not which[6:].isdecimal() or int(which[6:]) >= len(made_of):
            raise UserError(f"{row['id']} has no picture {which!r:.40}.")
        row = made_of[int(which[6:])]
    elif index.is_store:
        found = _original(studio, row)
        row = _decoded(studio, row, number) if which == "latent" or found is None else found
    if not studio.places.has(Path(row["file"])):
        raise UserError("This picture is not in the studio's folder.")
    return Response(studio.thumbnails.get(row, size), media_type="image/webp", headers={"Cache-Control": "private, max-age=86400"})


def _decoded(studio: Studio, row: dict[str, Any], number: int) -> dict[str, Any]:
    """The decoded latents of a row of a store, as a file of the cache."""
    store = Path(row["file"])
    stamp = max(path.stat().st_mtime_ns for path in (store / "figures").glob("*.index.arrow"))
    file = studio.latents / f"{blake2b(repr((str(store), number, stamp)).encode(), digest_size=12).hexdigest()}.png"
    if not file.is_file():
        studio.look.ask("decode", store=str(store), row=number, out=str(file))
    size = file.stat().st_size
    return {"id": row["id"], "file": str(file), "column": "", "row": -1, "offset": -1, "bytes": size, "changed": stamp}


def _original(studio: Studio, row: dict[str, Any]) -> dict[str, Any] | None:
    """The figure that a row of a store was encoded from, by a config here that names store and figures; None where none does."""
    source = studio.figures_of(real(Path(row["file"])), lambda: _figures_of_stores(studio))
    if source is None:
        return None
    index = studio.indices.get(source)
    number = None if isinstance(index, int) else index.row_of(row["id"])
    return None if number is None or isinstance(index, int) else index.row(number)


def _figures_of_stores(studio: Studio) -> dict[Path, Path]:
    """Of each store that a config here names, the figures that it says they are of."""
    found: dict[Path, Path] = {}
    for file in [*studio.places.configs(), *sorted(studio.queue.folder.glob("[0-9]*/config.py"))]:
        try:
            values = forms.leaves(saved.values(read_bounded(file)))
        except ValueError:
            continue
        figures, base = values.get("encode.figures"), values.get("dataset.base_dir", ".")
        if not isinstance(figures, str) or figures.startswith("drawn:"):
            continue
        place, store = Path(figures).expanduser(), Path(str(base)) / str(values.get("dataset.parquet_base_path", ""))
        if place.exists() and studio.places.has(place):
            found[real(store)] = place
    return found


def revise(studio: Studio, given: Given) -> Any:
    """Captions, edited into a new revision of the list; what was there stays as it is."""
    source = studio.places.inside(given.text("source"))
    made = revise_captions(source, given.table("captions"))
    keys = {key: value for key, value in made.keys.items()}
    return {"source": studio.places.name(made.path), "changed": made.changed, "keys": keys}


def plan(studio: Studio, given: Given) -> Any:
    """Memory, time and disk of a config on this machine."""
    config, file = forms.checked(studio.places, given.text("base"), given.table("changes")), studio.places.own / "plan.py"
    save_config(config, file)
    return studio.look.ask("plan", config=str(file), root=str(studio.places.root))


PAGE = Page("Data", "data.js", [
    Call("GET", "/api/data/sources", sources), Call("GET", "/api/data/open", opened), Call("GET", "/api/data/rows", rows),
    Call("GET", "/api/data/figure", figure), Call("GET", "/api/data/picture", picture),
    Call("POST", "/api/data/revise", revise), Call("POST", "/api/plan", plan),
])  # fmt: skip
