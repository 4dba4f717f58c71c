"""What is drawn and compared: prompts with sizes, and what is known of the picture that each asks for.

`load_examples` reads

    drawn:COUNT[:…]                 figures of the drawing program: their captions, exact truth and the pictures themselves
    a folder, .csv, .parquet …      figures with captions, as `encode.figures` (figures/listing.py); a folder of `scienceflow
                                    draw` has its truth in truth.jsonl
    a .jsonl of prompts             one object a line; keys below

Keys of a line of prompts: `prompt` (or caption, text), `width` and `height` (px; together, or left to the model), `id`
(a text or a number; else the line's number), `source_image` (or source_images …: pictures to edit, then the prompt is the
instruction) with `edit_bboxes`, `rubric` (an object: what a judge looks for), `truth` (an object, as
drawn/figure.py writes it), and the path of a reference picture from the list's folder: `reference` (or image, file_name,
path, image_path). Other keys are passed over. A .jsonl in which no line has `width`, `rubric`, `truth` or `reference`, and
that names pictures, is a list of figures.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.buckets import best_bucket, fitted, in_bucket
from OpenSciDraw.figures.edits import REFERENCE_COLUMNS, Boxes, boxes_in, named_in
from OpenSciDraw.figures.listing import DrawnRef, FigureRef, FileRef, RejectedFigure, list_figures, load_figure
from OpenSciDraw.figures.rows import resolve
from OpenSciDraw.figures.sources import jsonl_rows

_LOG = logging.getLogger("OpenSciDraw")
_IMAGE_KEYS = ("reference", "image", "file_name", "path", "image_path")
_PROMPT_KEYS = ("prompt", "caption", "text")
_OWN_KEYS = frozenset(("width", "height", "rubric", "truth", "reference"))  # those that a list of figures does not have
_TRUTH_FILE = "truth.jsonl"
_MAX_SIDE = 16384
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]{0,119}", re.ASCII)
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Example:
    """A prompt, the size in pixels to draw it at, and what the picture is compared with (None: nothing of the kind).

    Of an edit the prompt is the instruction, `sources` are the pictures that it starts from, fitted into buckets of `resolution`
    (None: as they are), and `edit_boxes` the places that it changes: x0, y0, x1, y1 in pixels of width x height.
    """

    id: str
    prompt: str
    width: int
    height: int
    truth: dict[str, Any] | None = None
    reference: FigureRef | Path | Image.Image | None = None
    rubric: dict[str, Any] | None = None
    sources: tuple[FigureRef, ...] = ()
    edit_boxes: tuple[tuple[float, float, float, float], ...] = ()
    resolution: int | None = None

    def source_images(self) -> list[Image.Image]:
        """The pictures that the edit starts from, as training shows them. Raises RejectedFigure when one cannot be read."""
        pictures = [load_figure(source) for source in self.sources]
        return [fitted(picture, self.resolution) for picture in pictures] if self.resolution is not None else pictures

    def reference_image(self) -> Image.Image | None:
        """The reference, upright RGB. Raises RejectedFigure when it cannot be read."""
        if isinstance(self.reference, Image.Image):
            return self.reference.convert("RGB")
        if isinstance(self.reference, Path):
            return load_figure(FileRef(self.id, self.prompt, str(self.reference), self.reference.stat().st_size, 0))
        return None if self.reference is None else load_figure(self.reference)


def picture_name(identity: str) -> str:
    """The file of an example's picture: its id and '.png'; ids that are no plain names end in a hash of themselves."""
    if _PLAIN_NAME.fullmatch(identity):
        return f"{identity}.png"
    plain = re.sub(r"[^A-Za-z0-9.+=-]+", "_", identity).strip("._")[:80]
    return f"{plain}-{blake2b(identity.encode(), digest_size=6).hexdigest()}.png"


def find_picture(folder: Path, identity: str) -> Path:
    """The picture of an example in a folder that someone else filled; where there is none, the file that should be there.

    An id that is itself the path of a picture ('plots/a.png') also names that file, with this ending or another.
    """
    stems = [identity]
    if Path(identity).suffix.lower() in _SUFFIXES:
        stems.append(identity[: identity.rindex(".")])
    names = [picture_name(identity), *(stem + suffix for stem in stems for suffix in ("", *_SUFFIXES))]
    inside = [folder / name for name in names if not name.startswith("/") and ".." not in Path(name).parts]
    return next((path for path in inside if path.is_file()), inside[0])


def load_examples(
    spec: str, limit: int | None = None, resolution: int | None = None, image_column: str | None = None,
    caption_column: str | Sequence[str] | None = None, where: Mapping[str, Any] | None = None, reference_column: str | None = None,
) -> list[Example]:  # fmt: skip
    """The examples of `spec` (see the module), the first `limit` of them, in an order that depends on the source alone.

    Figures in files are drawn at the size of their bucket at `resolution`, or where that is None at their own size.
    Columns and `where` as for `list_figures`.

    Raises:
        UserError: the source is missing or of no known kind, holds nothing usable, or a line of prompts is wrong.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".jsonl" and path.is_file():
        rows = list(_json_lines(path))
        if _is_prompts(rows):
            return _unique(path, [_prompt_example(path, number, row, resolution) for number, row in rows[:limit]])
    refs, rejected = list_figures(spec, image_column, caption_column, limit, None, where, reference_column)
    if rejected:
        first = rejected[0]
        _LOG.warning("%s: %d figures cannot be used; the first: %s: %s", spec, len(rejected), first.id, first.reason)
    drawn = [ref for ref in refs if isinstance(ref, DrawnRef)]
    if drawn:
        return [drawn_example(ref) for ref in drawn]
    return _figure_examples(spec, refs, resolution)


def drawn_example(ref: DrawnRef) -> Example:
    """The example of a figure that the program draws; it is drawn now, for its truth."""
    truth = ref.draw().truth
    size = truth["width"], truth["height"]
    return Example(ref.id, ref.caption, *size, truth, ref, sources=ref.references, edit_boxes=ref.edit_boxes)


def _figure_examples(spec: str, refs: list[FigureRef], resolution: int | None) -> list[Example]:
    """Every figure is opened once for its size; one that cannot be opened is no reference, and is named."""
    truths = _truths(Path(spec).expanduser())

    def example(ref: FigureRef) -> Example | str:
        try:
            width, height = load_figure(ref).size
        except RejectedFigure as error:
            return f"{ref.id}: {error}"
        truth = truths.get(ref.id) or truths.get(ref.id.rpartition(".")[0])
        boxes, fit_at = ref.edit_boxes, None if truth is not None else resolution
        if fit_at is not None:  # boxes of a truth are in pixels of the figure as it is
            bucket = best_bucket(width, height, fit_at)
            boxes = tuple(in_bucket(box, (width, height), bucket) for box in boxes)
            width, height = bucket.width, bucket.height
        return Example(
            ref.id, ref.caption, width, height, truth, ref, sources=ref.references, edit_boxes=boxes, resolution=fit_at,
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        found = list(tqdm(pool.map(example, refs), total=len(refs), desc="figures", unit="figure"))
    unreadable = [text for text in found if isinstance(text, str)]
    if unreadable:
        _LOG.warning("%s: %d figures cannot be read; the first: %s", spec, len(unreadable), unreadable[0])
    examples = [item for item in found if isinstance(item, Example)]
    if not examples:
        raise UserError(f"{spec}: none of {len(refs)} figures can be read. The first: {unreadable[0]}")
    return examples


def _truths(source: Path) -> dict[str, dict[str, Any]]:
    """Ground truth by id, where `scienceflow draw` wrote it beside the figures."""
    file = source / _TRUTH_FILE
    if not source.is_dir() or not file.is_file():
        return {}
    return {str(row["id"]): row for _, row in _json_lines(file) if "id" in row}


# -- lists of prompts ------------------------------------------------------------------------------
def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty."""
    try:
        for number, row in jsonl_rows(path):
            if isinstance(row, RejectedFigure):
                raise UserError(f"{path}:{number}: {row}. Mend this line.")
            yield number, row
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _is_prompts(rows: list[tuple[int, dict[str, Any]]]) -> bool:
    keys = {key for _, row in rows for key in row}
    return bool(keys & _OWN_KEYS) or not keys & set(_IMAGE_KEYS)


def _prompt_example(path: Path, number: int, row: dict[str, Any], resolution: int | None) -> Example:
    where = f"{path}:{number}"
    prompt = next((row[key] for key in _PROMPT_KEYS if key in row), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt = {prompt!r:.80}. A line needs a text under {', '.join(_PROMPT_KEYS)}.")
    truth, rubric = row.get("truth"), row.get("rubric")
    for key, value in (("truth", truth), ("rubric", rubric)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{where}: {key} = {value!r:.80}. It must be an object {{…}}.")
    width, height = _size(where, row, resolution)
    identity = row.get("id", f"{number:05d}")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or str(identity).strip() == "":
        raise UserError(f"{where}: id = {identity!r}. It must be a text or a number, or be left out.")
    sources, boxes = _sources(where, path, row)
    reference = next((row[key] for key in _IMAGE_KEYS if row.get(key)), None)
    file = path.parent / str(reference) if reference is not None else None
    if file is not None and not file.is_file():
        raise UserError(f"{where}: there is no reference picture {file}. Correct the path or leave it out.")
    fit_at = resolution if sources else None
    return Example(str(identity), prompt.strip(), width, height, truth, file, rubric, sources, boxes, fit_at)


def _sources(where: str, path: Path, row: dict[str, Any]) -> tuple[tuple[FigureRef, ...], Boxes]:
    """The pictures that a line's prompt edits, and the boxes of the edit."""
    try:
        named = next((names for key in REFERENCE_COLUMNS if (names := named_in(row.get(key)))), [])
        files, boxes = [resolve(path.parent, name) for name in named], boxes_in(row)
    except RejectedFigure as error:
        raise UserError(f"{where}: {error}.") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{where}: there is no picture to edit {missing[0]}. Correct the path or leave it out.")
    return tuple(FileRef(file.name, "", str(file), file.stat().st_size, 0) for file in files), boxes


def _size(where: str, row: dict[str, Any], resolution: int | None) -> tuple[int, int]:
    width, height = (row.get(key) for key in ("width", "height"))
    if width is None and height is None:
        if resolution is None:
            raise UserError(f"{where}: no width and height, and no model to take them from. Add both, in pixels.")
        return resolution, resolution
    for key, value in (("width", width), ("height", height)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SIDE:
            raise UserError(f"{where}: {key} = {value!r}. Give width and height as whole numbers of pixels, 1 to {_MAX_SIDE}.")
    assert isinstance(width, int) and isinstance(height, int)
    return width, height


def _unique(path: Path, examples: list[Example]) -> list[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise UserError(f"{path}: two lines have the id {example.id!r}. Pictures are kept under their ids: give each its own.")
        seen.add(example.id)
    if not examples:
        raise UserError(f"{path} holds no prompts.")
    return examples
