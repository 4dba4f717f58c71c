"""`scienceflow`: one thin function per stage. Everything heavy is imported inside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from OpenSciDraw import __version__
from OpenSciDraw.bench.options import add_options as add_bench_options
from OpenSciDraw.captions.options import add_options as add_caption_options
from OpenSciDraw.errors import UserError, run_command
from OpenSciDraw.illustrate.options import add_options as add_illustrate_options
from OpenSciDraw.quiet import start_logging
from OpenSciDraw.utils.options import count as _count
from OpenSciDraw.utils.options import share as _share
from OpenSciDraw.vectorize.options import add_options as add_vectorize_options

FORMATS = ("diffusers", "comfyui", "both")
Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 2 something to mend in what was given, other codes as the command says."""
    arguments = build_parser().parse_args(argv)
    start_logging()
    command: Command = arguments.command
    return run_command(lambda: command(arguments))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scienceflow",
        description="Papers -> figures -> encoded samples -> a trained adapter -> figures and numbers.",
        epilog="A run in two commands: scienceflow encode CONFIG.py; scienceflow train CONFIG.py",
    )
    parser.add_argument("--version", action="version", version=f"scienceflow {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_config_commands(commands)
    _add_result_commands(commands)
    studio = _command(commands, "studio", _studio, "a page in the browser: data, runs, pictures (on this machine alone)")
    studio.add_argument("folder", nargs="?", default=".", metavar="FOLDER", help="of figures, stores and runs (default: here)")
    studio.add_argument("--port", type=_count, metavar="N", help="default: the first free one from 8899")
    return parser


def _add_config_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    config = _command(commands, "config", _config, "print the resolved config and where each value was set")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="Python config file")
    config.add_argument("--schema", action="store_true", help="print every key: type, unit, default, meaning")
    _add_overrides(config)

    prepare = _command(commands, "prepare", _prepare, "papers' LaTeX sources -> figures with captions (continues where it stopped)")
    prepare.add_argument("sources", nargs="+", metavar="SOURCE", help="e-prints, bulk archives, LaTeX projects, or folders of them")
    prepare.add_argument("--out", required=True, metavar="DIR", help="folder for figures, reasons, data card and contact sheet")
    _add_engine(prepare)
    _add_overrides(prepare, "dpi=300 min_side=256 limits.seconds=60")

    meaning = "captions for figures, by a vision-language model (continues where it stopped; 1: some are missing)"
    add_caption_options(_command(commands, "caption", _caption, meaning))

    encode = _command(commands, "encode", _encode, "figures -> encoded samples on disk (continues where it stopped)")
    encode.add_argument("config", metavar="CONFIG", help="Python config file")
    _add_engine(encode)
    _add_overrides(encode)

    verify = _command(commands, "verify", _verify, "check encoded samples and decode some of them to pictures")
    verify.add_argument("target", metavar="CONFIG_OR_STORE", help="Python config file, or a folder of encoded samples")
    verify.add_argument("--samples", type=_count, default=16, metavar="N", help="pictures to decode (default: 16)")
    verify.add_argument("--out", metavar="DIR", help="folder for the pictures (default: verify/ in the store)")
    _add_overrides(verify)

    repack = _command(commands, "repack", _repack, "rewrite encoded data of another layout as a store (continues where it stopped)")
    repack.add_argument("source", metavar="SOURCE", help="folder of encoded data: an older layout, fat row groups, or a store")
    repack.add_argument("out", metavar="OUT", help="folder of the new store")
    repack.add_argument("--config", metavar="CONFIG", help="config that declares the model of data that do not say theirs")
    repack.add_argument("--samples_per_shard", type=_count, default=1024, metavar="N", help="rows of a shard (default: 1024)")
    _add_overrides(repack)

    plan = _command(commands, "plan", _plan, "memory, FLOPs, time and disk of a run, before anything loads (3: does not fit)")
    plan.add_argument("config", metavar="CONFIG", help="Python config file")
    plan.add_argument("--gpu", default="H100-80GB", metavar="NAME", help="kind of GPU (default: H100-80GB; a wrong name lists all)")
    plan.add_argument("--gpus", type=_count, default=1, metavar="N", help="how many of them (default: 1)")
    plan.add_argument("--engine", default="ddp", metavar="WAY", help="ddp, fsdp2, zero2 or zero3 (default: ddp)")
    plan.add_argument("--mfu", type=_share, default=0.2, metavar="SHARE", help="share of peak speed reached (default: 0.2)")
    plan.add_argument("--json", action="store_true", help="as JSON")
    _add_overrides(plan)

    doctor = _command(commands, "doctor", _doctor, "what this machine has, what is missing, and what to do about it")
    doctor.add_argument("config", nargs="?", metavar="CONFIG", help="Python config file, to check what it needs as well")
    _add_overrides(doctor)

    train = _command(commands, "train", _train, "train (the same command resumes a run)")
    train.add_argument("config", metavar="CONFIG", help="Python config file")
    _add_overrides(train)


def _add_result_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sample = _command(commands, "sample", _sample, "draw figures with a trained run")
    sample.add_argument("run", metavar="RUN", help="run folder, one of its checkpoints, or a config (the model before training)")
    sample.add_argument("--base", metavar="MODEL", help="draw the run's adapter on another base of its family: hub id or folder")
    sample.add_argument("--prompt", required=True, nargs="+", metavar="TEXT", help="what to draw; several texts too")
    sample.add_argument("--negative_prompt", metavar="TEXT", help="what to steer away from (default: the config's)")
    sample.add_argument("--image", nargs="+", default=[], metavar="FILE", help="picture to edit (several: all are looked at); the "
                        "prompt is the instruction")  # fmt: skip
    _add_loras(sample)
    sample.add_argument("--width", type=_count, metavar="PX", help="default: as in validation")
    sample.add_argument("--height", type=_count, metavar="PX", help="default: as in validation")
    sample.add_argument("--steps", type=_count, metavar="N", help="sampling steps (default: the config's)")
    sample.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale (default: the config's)")
    sample.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    sample.add_argument("--num", type=_count, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    sample.add_argument("--out", metavar="DIR", help="folder for the pictures (default: samples/ in the run)")
    sample.add_argument("--ema", action="store_true", help="the average of the weights (use_ema) instead of the last ones")

    _add_evaluate(commands)
    _add_prefer(commands)
    bench = _command(commands, "bench", _bench, "SciFormaBench: draw, judge, table by difficulty (continues where it stopped)")
    add_bench_options(bench)
    _add_drawing(bench, "without one, quoted words are read")
    _add_overrides(bench, "evaluate.judge_requests=8")
    meaning = "a paper or a paragraph -> figures, drawn, scored and refined (continues where it stopped)"
    illustrate = _command(commands, "illustrate", _illustrate, meaning)
    add_illustrate_options(illustrate)
    _add_drawing(illustrate, "it scores instead of what is read in the picture")
    _add_overrides(illustrate, "evaluate.judge_timeout=300")
    report = _command(commands, "report", _report, "one HTML page of a run, or of a folder of runs, that needs no network")
    report.add_argument("run", metavar="RUN", help="folder of a run, or a folder with several")
    report.add_argument("--out", metavar="FILE", help="the page (default: report.html in the folder)")

    export = _command(commands, "export", _export, "write trained weights for other programs")
    export.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="run folder, checkpoint, or adapter file of any program")
    export.add_argument("--base", metavar="MODEL", help="the base that the adapter is for, of the same shapes (default: the run's)")
    export.add_argument("--config", metavar="CONFIG", help="config that says the model of a file of another program")
    export.add_argument("--format", choices=FORMATS, help="default: both; of all weights: diffusers")
    export.add_argument("--out", metavar="DIR", help="folder for the files (default: export/ in the run)")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as trained")
    export.add_argument("--ema", action="store_true", help="the average of the weights (use_ema) instead of the last ones")

    _add_weight_commands(commands)
    meaning = "pictures of diagrams -> SVG, TikZ and PowerPoint that can be edited"
    add_vectorize_options(_command(commands, "vectorize", _vectorize, meaning))
    draw = _command(commands, "draw", _draw, "figures drawn by the program, with captions and ground truth")
    draw.add_argument("out", metavar="OUT", help="folder to write to")
    draw.add_argument("--count", type=_count, required=True, metavar="N", help="number of figures")
    draw.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same figures (default: 0)"
    )
    draw.add_argument("--size", type=_count, default=None, metavar="PX", help="longer side (default: 256; small and house: 128)")
    styles = ("rich", "small", "house", "mixed", "mosaic", "letters", "repaint")
    draw.add_argument("--style", choices=styles, help="default: rich, of edits small; edits: all but rich and mixed")
    draw.add_argument("--edits", action="store_true", help="pairs before and after an edit, with instructions")


def _add_loras(parser: argparse.ArgumentParser) -> None:
    meaning = "adapters of any program, added to the base; with strengths: style.safetensors=0.8"
    parser.add_argument("--lora", nargs="+", default=[], metavar="FILE[=STRENGTH]", help=meaning)


def _add_weight_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = _command(commands, "merge", _merge, "write a base with adapters in it, as all weights")
    merge.add_argument("what", metavar="CONFIG_OR_RUN", help="config of the base, or a run (its adapter is merged too)")
    _add_loras(merge)
    merge.add_argument("--ema", action="store_true", help="the average of the run's weights (use_ema) instead of the last ones")
    extract = _command(commands, "extract", _extract, "an adapter from two sets of weights: the difference to the base, by SVD")
    extract.add_argument("config", metavar="CONFIG", help="config of the base")
    extract.add_argument("tuned", metavar="WEIGHTS", help="folder, hub id or file, as pretrained_full_ckpt_path")
    size = extract.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=_count, metavar="N", help="rank of every layer")
    size.add_argument("--keep", type=_share, metavar="SHARE", help="each layer's smallest rank that keeps this share of the norm")
    extract.add_argument("--layers", metavar="A,B", help="name endings, as lora_layers (default: all layers of the blocks)")
    for parser in (merge, extract):
        parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files")
        parser.add_argument("--format", choices=FORMATS, default="diffusers", help="default: diffusers")
        parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as the base (an adapter: fp32)")


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    meaning = "measure drawn figures: scores with intervals, and a comparison (continues where it stopped)"
    evaluate = _command(commands, "evaluate", _evaluate, meaning)
    what = "run folder or checkpoint, config file (the model before training), or folder of pictures <id>.png"
    evaluate.add_argument("what", metavar="WHAT", help=what)
    evaluate.add_argument("--base", metavar="MODEL", help="another base of the same shapes, on which a run's adapter is drawn")
    evaluate.add_argument("--rebuilt", action="store_true", help="the figures themselves through the VAE: the most to be expected")
    evaluate.add_argument("--compare", metavar="OTHER", help="another evaluation's folder, or a run, config or pictures")
    evaluate.add_argument("--out", metavar="DIR", help="folder for pictures and numbers (default: evaluations/ in the run)")
    evaluate.add_argument("--figures", metavar="SPEC", help="drawn:64:seed=9, figures with captions, or a .jsonl of prompts")
    metrics = "structure, edit, text, distribution, held_out, judge (default: structure)"
    evaluate.add_argument("--metrics", metavar="A,B", help=metrics)
    _add_drawing(evaluate, "adds judge")
    evaluate.add_argument("--features", metavar="DIR", help="distribution: folder of a CLIP or DINO model")
    evaluate.add_argument("--no_arrow_direction", action="store_true", help="judge: an arrow's direction does not count")
    _add_overrides(evaluate, "evaluate.judge_timeout=300")


def _add_prefer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    meaning = "own pictures, scored -> groups of preferences, encoded for dpo and mdpo (continues where it stopped)"
    prefer = _command(commands, "prefer", _prefer, meaning)
    prefer.add_argument("what", metavar="WHAT", help="run folder or checkpoint, or config file (the model before training)")
    prefer.add_argument("--figures", metavar="SPEC", help="drawn:500:seed=31, figures with captions, or a .jsonl of prompts")
    prefer.add_argument("--pictures", type=_count, metavar="N", help="pictures of each prompt (default: 8)")
    prefer.add_argument("--out", metavar="DIR", help="folder for all of it (default: preferences/ in the run)")
    prefer.add_argument("--store", default="store", metavar="NAME", help="name of the store in that folder (default: store)")
    _add_drawing(prefer, "it scores all axes")
    _add_overrides(prefer, "prefer.min_gap=0.3")


def _add_drawing(parser: argparse.ArgumentParser, judging: str) -> None:
    """How pictures of prompts are drawn and scored; `judging` says what a judge is for."""
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first prompts")
    parser.add_argument("--steps", type=_count, metavar="N", help="sampling steps (default: the config's)")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale (default: the config's)")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the noise (default: 0)")
    parser.add_argument("--batch_size", type=_count, metavar="N", help="pictures drawn at once (default: 8)")
    parser.add_argument("--ema", action="store_true", help="the average of the weights (use_ema) instead of the last ones")
    parser.add_argument("--reader", choices=("rapidocr", "tesseract"), help="program that reads text (default: rapidocr)")
    parser.add_argument("--judge", metavar="URL", help=f"OpenAI-compatible endpoint of a vision-language model; {judging}")
    parser.add_argument("--judge_model", metavar="NAME", help="the model's name there")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, command: Command, meaning: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _add_engine(parser: argparse.ArgumentParser) -> None:
    meaning = "this machine, or a Ray cluster (default: local)"
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help=meaning)


def _add_overrides(parser: argparse.ArgumentParser, example: str = "train_batch_size=2 dataset.num_workers=4") -> None:
    parser.add_argument(
        "--cfg_options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=f"override keys: {example}"
    )


# -- the stages --------------------------------------------------------------------------------
def _config(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.config import load_config
    from OpenSciDraw.config.text import format_config, schema_table

    if not arguments.schema and arguments.config is None:
        raise UserError("scienceflow config needs a config file (or --schema for the table of all keys).")
    if arguments.schema:
        print(schema_table(), end="")
    if arguments.config is not None:
        print(format_config(load_config(arguments.config, arguments.cfg_options, complete=False)), end="")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.prepare import pipeline

    return pipeline.main(arguments)


def _caption(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.captions import run as caption

    return caption.main(arguments)


def _encode(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.config import load_config

    config = load_config(arguments.config, arguments.cfg_options)
    from OpenSciDraw.encode import run as encode

    return encode.main(config, arguments.engine)


def _repack(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.encode.repack import main

    return main(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.target.endswith(".py"):  # refused here, before torch is imported
        from OpenSciDraw.config import load_config

        load_config(arguments.target, arguments.cfg_options)
    from OpenSciDraw.encode import verify

    return verify.verify_main(arguments.target, arguments.samples, arguments.out, arguments.cfg_options)


def _plan(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.planning.plan import main

    return main(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.planning.doctor import main

    return main(arguments)


def _train(arguments: argparse.Namespace) -> int:
    import train_OpenSciDraw_loop

    options = ["--cfg_options", *arguments.cfg_options] if arguments.cfg_options else []
    return train_OpenSciDraw_loop.main([arguments.config, *options])


def _sample(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.inference import sample

    return sample.main(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.reporting import run as report

    return report.main(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.evaluation import run as evaluate

    return evaluate.main(arguments)


def _prefer(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.preferences import run as prefer

    return prefer.main(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.bench import run as bench

    return bench.main(arguments)


def _illustrate(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.illustrate import run as illustrate

    return illustrate.main(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.inference import export

    return export.main(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.inference.merge import merge_main

    return merge_main(arguments)


def _extract(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.inference.merge import extract_main

    return extract_main(arguments)


def _vectorize(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.vectorize import run as vectorize

    return vectorize.main(arguments)


def _studio(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.studio import server

    return server.main(arguments)


def _draw(arguments: argparse.Namespace) -> int:
    from OpenSciDraw.drawn.folders import write_drawn_edits, write_drawn_figures

    style = arguments.style or ("small" if arguments.edits else "rich")
    if arguments.edits:
        if arguments.size not in (None, 128):
            raise UserError(f"--size {arguments.size}: edits have 128 x 128 px. Leave it out.")
        write_drawn_edits(arguments.out, arguments.count, arguments.seed, style)
    else:
        size = arguments.size or (256 if style == "rich" else 128)
        write_drawn_figures(arguments.out, arguments.count, arguments.seed, size, style)
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
