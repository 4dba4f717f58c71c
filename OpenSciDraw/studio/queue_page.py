"""The page of the queue and of new runs: configs, the form, what starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from OpenSciDraw.errors import UserError
from OpenSciDraw.studio import forms
from OpenSciDraw.studio.calls import Call, Given, Page
from OpenSciDraw.studio.devices import devices
from OpenSciDraw.studio.recipes import RECIPES
from OpenSciDraw.studio.runs import queue_training
from OpenSciDraw.studio.state import Studio


def queue(studio: Studio, given: Given) -> Any:
    """Jobs, the newest first, and the devices that they run on."""
    jobs = studio.queue.jobs()
    described = [asdict(job) | {"state": asdict(studio.queue.state(job))} for job in reversed(jobs)]
    return {"jobs": described, "devices": [asdict(device) | {"busy": device.is_busy} for device in devices()]}


def log(studio: Studio, given: Given) -> Any:
    job = studio.queue.job(given.whole("number"))
    return {"number": job.number, "text": studio.queue.log(job.number)}


def stop(studio: Studio, given: Given) -> Any:
    studio.queue.stop(number := given.whole("number"))
    return {"number": number}


def again(studio: Studio, given: Given) -> Any:
    return {"number": studio.queue.again(given.whole("number")).number}


def remove(studio: Studio, given: Given) -> Any:
    studio.queue.remove(number := given.whole("number"))
    return {"number": number}


# -- configs --------------------------------------------------------------------------------------------
def configs(studio: Studio, given: Given) -> Any:
    """What a new run can start from."""
    recipes = [{"base": f"{forms.RECIPE}{name}", "title": recipe.title} for name, recipe in RECIPES.items()]
    saved = [{"base": studio.places.name(path), "title": studio.places.name(path)} for path in studio.places.configs()]
    return {"recipes": recipes, "saved": saved, "root": str(studio.places.root)}


def schema(studio: Studio, given: Given) -> Any:
    return forms.fields()


def values(studio: Studio, given: Given) -> Any:
    """The values of a config, as the form shows them."""
    try:
        return forms.values_of(studio.places, given.text("base"))
    except (ValueError, OSError) as error:
        raise UserError(f"{given.text('base')}: {error}. A config here holds values alone, and code in it is not run.") from error


def for_figures(studio: Studio, given: Given) -> Any:
    """Changes that make a config train on figures of the folder under a name: where they lie, and where store and run go."""
    name, root = forms.named(given.text("name")), studio.places.root
    source = studio.places.inside(given.text("source"))
    places = {"encode.figures": source, "dataset.base_dir": root / "stores", "model_output_dir": root / "runs" / name}
    return {key: str(path) for key, path in places.items()} | {"dataset.parquet_base_path": name, "run_name": name}


def for_run(studio: Studio, given: Given) -> Any:
    """Changes that give a config's run a folder of its own under a name."""
    name = forms.named(given.text("name"))
    return {"model_output_dir": str(studio.places.root / "runs" / name), "run_name": name}


def check(studio: Studio, given: Given) -> Any:
    """What is wrong with a config, in the words of the command line; nothing where it can be used."""
    try:
        config = forms.checked(studio.places, given.text("base"), given.table("changes"))
    except UserError as error:
        return {"problems": str(error).splitlines()}
    return {"problems": [], "run": config.model_output_dir, "steps": config.max_train_steps}


def save(studio: Studio, given: Given) -> Any:
    """Write configs/NAME.py."""
    config = forms.checked(studio.places, given.text("base"), given.table("changes"))
    return {"config": studio.places.name(forms.save(studio.places, given.text("name"), config))}


def start(studio: Studio, given: Given) -> Any:
    """Queue what a config asks for: `encode` where its store is not there, then `train`."""
    config = studio.places.config(given.text("config"))
    studio.places.require_inside(config)
    before = None
    if config.use_parquet_dataset and config.encode.figures is not None and given.text("encode", "yes") == "yes":
        store = Path(config.dataset.location)
        title = f"encode {studio.places.name(store) if studio.places.root in store.parents else store}"
        before = studio.queue.add("encode", [], title, config=config).number
    try:
        job = queue_training(studio, config, after=before)
    except UserError:
        if before is not None:
            studio.queue.remove(before)
        raise
    return {"jobs": [number for number in (before, job.number) if number is not None]}


def of_run(studio: Studio, given: Given) -> Any:
    """Queue `evaluate`, `report` or `export` of a run."""
    command, folder = given.text("command"), studio.places.run(given.text("run"))
    if command not in ("evaluate", "report", "export"):
        raise UserError(f"{command!r:.40}: a run can be given to evaluate, report or export.")
    name = studio.places.name(folder)
    job = studio.queue.add(command, [str(folder)], f"{command} {name}", run=name)
    return {"jobs": [job.number]}


def difference(studio: Studio, given: Given) -> Any:
    """What differs between two configs."""
    one, other = (forms.values_of(studio.places, given.text(name)) for name in ("one", "other"))
    return forms.differences(one, other)


PAGE = Page("Queue", "queue.js", [
    Call("GET", "/api/queue", queue), Call("GET", "/api/queue/log", log), Call("POST", "/api/queue/stop", stop),
    Call("POST", "/api/queue/again", again), Call("POST", "/api/queue/remove", remove), Call("POST", "/api/queue/of_run", of_run),
    Call("GET", "/api/configs", configs), Call("GET", "/api/configs/schema", schema), Call("GET", "/api/configs/values", values),
    Call("GET", "/api/configs/for_figures", for_figures), Call("GET", "/api/configs/for_run", for_run),
    Call("POST", "/api/configs/check", check), Call("POST", "/api/configs/save", save),
    Call("POST", "/api/configs/start", start), Call("GET", "/api/configs/diff", difference),
])  # fmt: skip
