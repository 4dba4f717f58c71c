"""Train. `python train_OpenSciDraw_loop.py CONFIG.py [--cfg_options key=value …]`, or by `accelerate launch`.

This file is the loop alone; OpenSciDraw/training/build.py builds what it uses. To resume, run the same command.
Exit codes: 0 done, 1 the loss was not finite, 2 something to mend in the config or data, 75 stopped by a signal after a checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from OpenSciDraw.errors import run_command
from OpenSciDraw.quiet import start_logging

if TYPE_CHECKING:  # it loads torch, which --help need not
    from OpenSciDraw.training.run import Training


def train(run: Training) -> int:
    """The loop, with its progress bar and trackers closed whatever ends it. Returns the exit code."""
    from OpenSciDraw.training.run import EXIT_PREEMPTED
    from OpenSciDraw.training.stopping import StopRequest

    with run.signals, run.log, run.writer:  # the writer's end is the end of its last checkpoint
        try:
            return loop(run)
        except StopRequest:  # between two steps, or in a validation, which the resumed run owes
            if run.step > run.saved_step:
                run.save_checkpoint()
            return EXIT_PREEMPTED
        finally:
            run.ending.set()


def loop(run: Training) -> int:
    """Batches -> loss -> step, with validation and checkpoints at their cadence. Returns the exit code."""
    from OpenSciDraw.training.optimizers.choice import effective_rate
    from OpenSciDraw.training.run import EXIT_PREEMPTED

    config, accelerator = run.config, run.accelerator
    if run.owes_validation():
        run.validate()
    for batch in run.batches():
        with accelerator.accumulate(run.model.transformer):
            output = run.forward_backward(batch)
            run.finite.note("Loss", output.loss, output, batch, run.step)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = run.clip_gradients()
                if accelerator.scaler is None:  # fp16's scaler skips such a step itself and lowers its scale
                    run.finite.note("Gradient norm", grad_norm, output, batch, run.step)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.micro_step += 1
        run.log.micro_step(output)
        if not accelerator.sync_gradients:
            continue
        run.end_step()
        run.log.optimizer_step(run.step, config.logging_steps, effective_rate(run.optimizer), grad_norm, run.bad_rows)
        stop = run.must_stop()
        if stop or run.step % config.checkpointing_steps == 0 or run.step == run.total_steps:
            run.save_checkpoint()
        if stop:
            return EXIT_PREEMPTED
        if run.step % config.validation_steps == 0 or run.step == run.total_steps:
            run.validate()
    run.finish()
    return 0


def main(argv: Sequence[str] | None = None, fixed: Sequence[str] = ()) -> int:
    """Train; `fixed` options (key=value) win over those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="Python config file")
    parser.add_argument("--cfg_options", nargs="*", default=[], metavar="KEY=VALUE", help="override config keys")
    arguments = parser.parse_args(argv)
    start_logging()
    try:
        return run_command(lambda: _main(arguments.config, [*arguments.cfg_options, *fixed]))
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _main(path: str, options: Sequence[str]) -> int:
    from OpenSciDraw.config import load_config

    config = load_config(path, options)
    from OpenSciDraw.training.startup import quick_imports, unused_libraries
    from OpenSciDraw.utils.sole_user import sole_run

    with sole_run(config.model_output_dir):
        with quick_imports(unused_libraries(config)):
            from OpenSciDraw.registry import MODELS
            from OpenSciDraw.training.run import Training

            MODELS.get(config.model_type)  # its classes of diffusers and transformers

        run = Training(config)
        run.signals.ends_process = True
        code = train(run)
        del run  # before the collection below
        gc.collect()  # sharded modules that outlive their process group made torch 2.13 abort at exit, once in ten
    return code


if __name__ == "__main__":
    sys.exit(main())
