"""The training loop's verbs: a batch, a micro-step, an optimizer step, a validation, a checkpoint."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from OpenSciDraw.config import Config, save_config
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.errors import UserError
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.parallel import sharding
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place
from OpenSciDraw.training import trackers
from OpenSciDraw.training.finite import Arriving
from OpenSciDraw.training.memory.out_of_memory import out_of_memory
from OpenSciDraw.training.run_log import RunLog, device_name, save_session
from OpenSciDraw.training.state import SavedRun
from OpenSciDraw.training.stopping import StopRequest
from OpenSciDraw.training.validation_model import whole
from OpenSciDraw.training.watch import require_no_worse, values_at_start
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.utils.versions import versions
from OpenSciDraw.validation_funcs.held_out_loss import held_out_loss
from OpenSciDraw.weights.kinds import adapter_name
from OpenSciDraw.weights.quantization import unquantized

_LOG = logging.getLogger("OpenSciDraw")
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; run the same command again


class Training(SavedRun):
    """One run: model, data, optimizer, log and place, and what the loop does with them."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._bad: dict[str, str] = {}
        self._reserved = False
        self._stop_flag: Arriving | None = None
        self._window: list[tuple[Batch, Place]] = []  # micro-steps of the optimizer step that is being taken
        self._open_log()

    def _open_log(self) -> None:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.output_dir / "config.py")
            save_session(self.output_dir, self._session())
            self._list_left_out()
        if accelerator.log_with:
            values = {k: v if isinstance(v, (int, float, str)) else repr(v) for k, v in config.model_dump().items()}
            # secrets are not part of a dumped config
            accelerator.init_trackers(config.tracker_name, values, init_kwargs=trackers.arguments(config))
        accelerator.wait_for_everyone()
        self.log = RunLog(self.output_dir, accelerator, self.total_steps, self.step)
        trained = sum(p.numel() for p in self.parameters.values())
        if accelerator.is_main_process:
            _LOG.info(
                "training %s: %s, %.2f M trained parameters (%s); %d rows (+ %d held out)",
                self.model.transformer_class,
                f"{adapter_name(self.config)} on {len(self.layers)} layers" if self.layers else "all weights", trained / 1e6,
                str(next(iter(self.parameters.values())).dtype).removeprefix("torch."),
                len(self.dataset) - len(self.held_out), len(self.held_out),
            )  # fmt: skip
            _LOG.info(
                "effective batch %d = %d a rank x %d accumulated x %d rank(s)%s, %s; steps %d to %d",
                self.effective_batch, config.train_batch_size, config.gradient_accumulation_steps,
                accelerator.num_processes, self._spread(), config.mixed_precision, self.step, self.total_steps,
            )  # fmt: skip

    def _list_left_out(self) -> None:
        """left_out.jsonl: what of the data is not used, each with the reason."""
        if self.dataset.left_out:
            lines = [json.dumps({"id": row.id, "reason": row.reason}) + "\n" for row in self.dataset.left_out]
            (self.output_dir / "left_out.jsonl").write_text("".join(lines))

    def _session(self) -> dict[str, Any]:
        """What `scienceflow report` tells of this start beside the config; nothing secret is in it."""
        contract = self.dataset.contract
        return {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": self.step, "total_steps": self.total_steps,
            "changed": self.changed, "effective_batch": self.effective_batch, "processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device), "spread": self._spread().strip(" ()") or "one device",
            "trained_parameters": sum(p.numel() for p in self.parameters.values()), "lora_layers": len(self.layers),
            "rows": len(self.dataset), "held_out_rows": len(self.held_out),
            "contract": None if contract is None else parse_json(contract.to_json()), "versions": versions(),
            "set_at": {name: place for name, place in self.config.provenance.items() if place != "default"},
        }  # fmt: skip

    def _spread(self) -> str:
        if self.accelerator.num_processes == 1:
            return ""
        return " (FSDP2)" if self.sharding else f" (ZeRO-{self.zero.stage})" if self.zero else " (DDP)"

    def batches(self) -> Iterator[Batch]:
        """What the loop trains on: the rank's batches, or what is drawn of their prompts."""
        return self._read() if self.rounds is None else self.rounds.of(self, self._read())

    def _read(self) -> Iterator[Batch]:
        """This rank's batches from the resumed place on, epoch after epoch, until the last step is done."""
        while self.step < self.total_steps:
            self.order.first, self.order.epoch = self.micro_step, self.sampler.epoch
            iterator = iter(self.loader)
            while self.step < self.total_steps:
                start = time.perf_counter()
                batch = self._next(iterator)
                if batch is None:
                    self.sampler.set_epoch(self.sampler.epoch + 1)
                    break
                self.log.waited(time.perf_counter() - start)
                self.sampler.position += 1
                self._quarantine(batch)
                yield batch

    def _next(self, iterator: Iterator[Batch]) -> Batch | None:
        """The next batch, None at the end of an epoch. Between two optimizer steps a run on one device stops here at once."""
        between = not self._window
        alone = self.accelerator.num_processes == 1
        try:
            with self.signals.interruptible(alone and between):
                return next(iterator, None)
        except RuntimeError:
            if self.signals.number and alone and between:  # a worker that something else has ended
                raise StopRequest from None
            raise

    def place(self) -> Place:
        """Where the next micro-step stands."""
        return Place(self.config.seed, self.micro_step, self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def bad_rows(self) -> int:
        return len(self._bad)

    def _quarantine(self, batch: Batch) -> None:
        for bad in batch.bad:
            if bad.id not in self._bad:
                self._bad[bad.id] = bad.reason
                _LOG.warning("unreadable row %s left out: %s", bad.id, bad.reason)
                line = json.dumps({"id": bad.id, "reason": bad.reason, "rank": self.accelerator.process_index})
                with (self.output_dir / "quarantine.jsonl").open("a") as file:
                    file.write(line + "\n")
        share = self.config.max_bad_rows_fraction
        if len(self._bad) > (max(1.0, share * len(self.dataset)) if share else 0):  # a small set may have one
            raise UserError(
                f"{len(self._bad)} of {len(self.dataset)} rows cannot be read, more than max_bad_rows_fraction = "
                f"{self.config.max_bad_rows_fraction}. They are listed in {self.output_dir / 'quarantine.jsonl'}."
            )

    def must_stop(self) -> bool:
        """True on every rank, at the same step, once any rank got a signal; several GPUs learn of it a step later."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals.number)
        flag = torch.tensor(float(self.signals.number)).to(self.accelerator.device, non_blocking=True)
        before, self._stop_flag = self._stop_flag, Arriving(self.accelerator.reduce(flag, reduction="sum"))
        asked = self._stop_flag if self._stop_flag.is_here else before
        return asked is not None and bool(asked.read())

    def forward_backward(self, batch: Batch) -> LossOutput:
        """Loss and gradients of one micro-step. One that does not fit is done again with more blocks recomputed: the same bits.

        Raises:
            UserError: it does not fit, and nothing more can be recomputed; says what to change.
        """
        self._window.append((batch, self.place()))
        while True:
            try:
                output = self._micro_step(*self._window[-1])
                break
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            self._make_room(reason)  # outside of except: the error holds the tensors of the pass that failed
        if self.accelerator.sync_gradients:
            self._window.clear()
        return output

    def _micro_step(self, batch: Batch, place: Place) -> LossOutput:
        if self.config.lora_dropout:
            torch.manual_seed(keyed_generator("dropout", *vars(place).values()).initial_seed())
        with self.accelerator.autocast():
            output = self.objective(self.model, batch, place, self.config, self.empty_text)
        if self.zero:
            self.optimizer.backward(output.loss)
        else:
            self.accelerator.backward(output.loss)
        return output

    def _make_room(self, reason: str) -> None:
        """Recompute more from now on; take the accumulation's earlier micro-steps again: the failed one may have left gradients."""
        alone = self.accelerator.num_processes == 1  # several ranks would no longer meet in their collectives
        if not (alone and self.activations is not None and self.activations.recompute_more()):
            raise UserError(out_of_memory(self.config, self.step, reason))
        budget = self.activations.budget_bytes
        kept = f"at most {budget / 1e9:.3g} GB of" if budget else "no"
        _LOG.warning("step %d does not fit (%s): from here on %s activations are kept, the rest is recomputed; "
                     "results are the same bits", self.step, reason, kept)  # fmt: skip
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        for batch, place in self._window[:-1]:
            self._micro_step(batch, place)

    def clip_gradients(self) -> Tensor:
        """Clip to max_grad_norm; returns the norm before. (DeepSpeed takes its step here as well.)"""
        if self.zero:
            return self.optimizer.step_engine()
        if self.sharding:
            return sharding.clip_gradients(self.parameters, self.config.max_grad_norm)
        return self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)

    def end_step(self) -> None:
        """After an optimizer step: the schedule, the count, the average."""
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
        self.step += 1
        self.writer.check()  # a checkpoint that could not be written stops the run here
        if not self._reserved:  # the optimizer's state is there since its first step
            self._reserved = True
            if self.accelerator.is_main_process and self.zero is None:
                self.writer.submit(self.snapshot.reserve, self._content())
        if self.average is not None:
            self.average.update(self.step)
        if self.rounds is not None:
            self.rounds.end_step(self.step)

    def _watch(self, values: dict[str, float]) -> None:
        """Rank 0 has all values; where it stops, the others do, at the same step."""
        problem: UserError | None = None
        if self.accelerator.is_main_process:
            start = values_at_start(self.log.path, self.config.reward.watch)
            try:
                require_no_worse(self.config.reward, start, values, self.step)
            except UserError as error:
                problem = error
        found = torch.tensor(float(problem is not None)).to(self.accelerator.device)
        if self.accelerator.reduce(found, reduction="sum").item():
            raise problem or UserError("rank 0 has stopped: see its message.")

    def owes_validation(self) -> bool:
        """Whether this step's validation is due and has not been done, by this run or before it was resumed."""
        due = self.step % self.config.validation_steps == 0 or self.step == self.total_steps
        return due and not (self.step and self.log.has_event("validated", self.step))

    def _draw_on_validation_model(self) -> None:
        """Every rank gives its part of the adapter; rank 0 draws."""
        if self.validation_model is not None:
            adapter = whole(self.parameters)
            if self.accelerator.is_main_process:
                self.validation_model.draw(adapter, self.step)
            self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Held-out loss and pictures, in the metrics and in validation_images/; a run on one device stops in it at once."""
        self.finite.settle()
        start = time.perf_counter()
        with ExitStack() as weights:
            if self.average and self.config.validate_with_ema:
                weights.enter_context(self.average.applied())
            if self.config.validate_unquantized:
                weights.enter_context(unquantized(self.model, self.config, self.parameters))
            with self.signals.interruptible(self.accelerator.num_processes == 1):  # inside: weights are put back in peace
                values = held_out_loss(self.model, self.dataset, self.held_out, self.config, self.accelerator)
                values |= self.validator(self.model, self.config, self.prompts, self.step, self.accelerator)
                self._draw_on_validation_model()
        if values:
            self.log.metrics(self.step, values)
        if self.rounds is not None:
            self._watch(values)
        self.log.event("validated", self.step)
        self.log.exclude_time(time.perf_counter() - start)
