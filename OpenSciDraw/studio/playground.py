"""The page of pictures: drawn from any run, checkpoint or base, by several seeds and strengths; edited; read; kept."""

from __future__ import annotations

import secrets
import shlex
import threading
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response

from OpenSciDraw.errors import UserError
from OpenSciDraw.figures.decode import RejectedFigure, decode_picture
from OpenSciDraw.studio import forms
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.places import OWN
from OpenSciDraw.studio.recipes import RECIPES
from OpenSciDraw.studio.run_state import read_bounded
from OpenSciDraw.studio.runs import checkpoints
from OpenSciDraw.studio.state import Studio
from OpenSciDraw.utils.files import make_folder, parse_json, unfinished, write_json

_MOST_SEEDS, _MOST_STRENGTHS, _MOST_SHOWN = 16, 8, 60
_SETTINGS = "settings.json"


def targets(studio: Studio, given: Given) -> Any:
    """What can draw: runs with weights and their checkpoints, saved configs and recipes as bases."""
    found = []
    for folder in studio.places.runs():
        name = studio.places.name(folder)
        if any(folder.glob("*.safetensors")) or (folder / "transformer").is_dir() or checkpoints(folder):
            found.append({"target": name, "title": name, "kind": "run"})
            steps = [(f"{name}/{step}", f"{name}, {step}") for step in checkpoints(folder)]
            found += [{"target": target, "title": title, "kind": "checkpoint"} for target, title in steps]
    bases = [(f"{forms.RECIPE}{name}", recipe.title) for name, recipe in RECIPES.items()]
    bases += [(studio.places.name(path), f"base of {studio.places.name(path)}") for path in studio.places.configs()]
    return [*found, *({"target": target, "title": title, "kind": "base"} for target, title in bases)]


def upload(studio: Studio, given: Given) -> Any:
    """A picture from the visitor's disk: decoded, and kept as PNG under the hash of its file."""
    try:
        picture = decode_picture(given.body)
    except RejectedFigure as error:
        raise UserError(f"The picture cannot be used: {error}") from error
    name = blake2b(given.body, digest_size=16).hexdigest()
    with unfinished(make_folder(studio.places.own / "uploads") / f"{name}.png") as part:
        picture.save(part, "PNG")
    return {"image": f"upload:{name}", "width": picture.width, "height": picture.height}


def image_file(studio: Studio, name: str) -> Path:
    """A picture to edit: 'upload:HASH', 'drawn:ID:NUMBER', or a file in the folder."""
    kind, _, rest = name.partition(":")
    if kind == "upload" and rest.isalnum():
        path = studio.places.own / "uploads" / f"{rest}.png"
    elif kind == "drawn":
        identity, _, number = rest.partition(":")
        path = _drawn(studio, identity) / f"{int(number) if number.isdecimal() else -1}.png"
    else:
        path = studio.places.inside(name)
    if not path.is_file():
        raise UserError(f"There is no picture {name!r:.200}.")
    return path


# -- drawing -----------------------------------------------------------------------------------------
def draw(studio: Studio, given: Given) -> Any:
    """Begin to draw; the pictures arrive one after another, as the event `work` says."""
    target, prompt = given.text("target"), given.text("prompt").strip()
    if not prompt:
        raise UserError("Say what to draw: the prompt is empty.")
    path = forms.base_file(studio.places, target)
    base = given.text("base", "").strip()
    if base and Path(base).expanduser().exists() and not studio.places.has(Path(base).expanduser()):
        raise UserError(f"base = {base!r}: outside of the studio's folder. Draw from it in a shell: scienceflow sample --base.")
    seeds = [int(seed) for seed in given.numbers("seeds", _MOST_SEEDS, 0, 2**53)]
    strengths = given.numbers("strengths", _MOST_STRENGTHS, -4, 4)
    asked: dict[str, Any] = {
        "prompt": prompt, "seeds": seeds, "strengths": strengths, "base": base, "ema": given.text("ema", "") == "yes",
        "negative": given.text("negative", "").strip() or None,
        "images": [str(image_file(studio, name)) for name in given.texts("images", 8)],
        "width": given.whole("width", 0, 0, 4096) or None, "height": given.whole("height", 0, 0, 4096) or None,
        "steps": given.whole("steps", 0, 0, 500) or None,
        "guidance": given.number("guidance", high=100) if given.text("guidance", "") else None,
    }  # fmt: skip
    identity = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)
    folder = make_folder(studio.places.own / "drawn" / identity)
    names, command = given.texts("images", 8), _command(path, asked)
    shown = {"id": identity, "target": target, "time": time.time(), "names": names, "command": command}
    settings = asked | shown | {"state": "waiting", "pictures": []}
    write_json(folder / _SETTINGS, settings)
    studio.drawing[identity] = settings
    threading.Thread(target=_work, args=(studio, str(path), asked, settings, folder), daemon=True, name="drawing").start()
    return {"id": identity}


def _command(path: Path, asked: dict[str, Any]) -> str:
    """The same in a shell. Its strength is the trained one."""
    words = ["scienceflow", "sample", str(path), "--prompt", asked["prompt"], "--seed", str(asked["seeds"][0])]
    numbers = [name for name in ("steps", "guidance", "width", "height") if asked[name] is not None]
    words += [word for name in numbers for word in (f"--{name}", str(asked[name]))]
    words += ["--negative_prompt", asked["negative"]] if asked["negative"] is not None else []
    words += ["--base", asked["base"]] if asked["base"] else []
    words += ["--image", *asked["images"]] if asked["images"] else []
    return shlex.join([*words, *(["--ema"] if asked["ema"] else [])])


def _work(studio: Studio, target: str, asked: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    def said(progress: dict[str, Any]) -> None:
        if "picture" in progress:
            settings["pictures"] = [*settings["pictures"], progress]
        settings["state"] = progress.get("state", "drawing")

    try:
        settings |= {"done": studio.draw.ask("draw", said, target=target, out=str(folder), **asked), "state": "done"}
    except UserError as error:
        settings |= {"state": "failed", "error": str(error)}
    write_json(folder / _SETTINGS, settings)
    studio.drawing.pop(settings["id"], None)


def stop(studio: Studio, given: Given) -> Any:
    """End what is being drawn, and forget the loaded model."""
    studio.draw.stop()
    return {}


def _drawn(studio: Studio, identity: str) -> Path:
    folder = studio.places.own / "drawn" / identity
    if not identity.replace("-", "").isalnum() or not folder.is_dir():
        raise UserError(f"There is no drawing {identity!r:.80}.")
    return folder


def _settings(studio: Studio, identity: str) -> dict[str, Any]:
    now = studio.drawing.get(identity)
    if now is not None:
        return dict(now)
    found: dict[str, Any] = parse_json(read_bounded(_drawn(studio, identity) / _SETTINGS))
    if found.get("state") not in ("done", "failed"):
        found |= {"state": "failed", "error": "The studio ended while this was drawn."}
    return found


def drawn(studio: Studio, given: Given) -> Any:
    """What was drawn, the newest first, with its settings."""
    folder = studio.places.own / "drawn"
    names = sorted((path.parent.name for path in folder.glob(f"*/{_SETTINGS}")), reverse=True)[:_MOST_SHOWN]
    return [_settings(studio, name) for name in names]


def picture(studio: Studio, given: Given) -> Any:
    file = image_file(studio, f"drawn:{given.text('id')}:{given.whole('number')}")
    return FileResponse(file, media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})


def read(studio: Studio, given: Given) -> Any:
    """What the structure metric sees in a drawn picture, or in one to edit."""
    return studio.look.ask("read", file=str(image_file(studio, given.text("image"))))


def preview(studio: Studio, given: Given) -> Any:
    """A picture to edit, as it will be given to the model but for its size."""
    path = image_file(studio, given.text("image"))
    if OWN in path.parts:
        return FileResponse(path, media_type="image/png")
    status = path.stat()
    row = {"file": str(path), "column": "", "row": -1, "offset": -1, "bytes": status.st_size, "changed": status.st_mtime_ns}
    return Response(studio.thumbnails.get(row, "whole"), media_type="image/webp")


PAGE = Page("Playground", "playground.js", [
    Call("GET", "/api/playground/targets", targets), Call("POST", "/api/playground/draw", draw),
    Call("POST", "/api/playground/stop", stop), Call("GET", "/api/playground/drawn", drawn),
    Call("GET", "/api/playground/picture", picture), Call("GET", "/api/playground/read", read),
    Call("GET", "/api/playground/preview", preview), Call("POST", "/api/upload", upload),
])  # fmt: skip
