"""A run's state in checkpoints: what is saved, written while training goes on, and read again by a run that is resumed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from OpenSciDraw.config import Config
from OpenSciDraw.errors import UserError
from OpenSciDraw.models.base import DTYPES
from OpenSciDraw.parallel import sharding
from OpenSciDraw.training import checkpoint, resuming
from OpenSciDraw.training.build import Run
from OpenSciDraw.training.finite import FiniteCheck
from OpenSciDraw.training.hub import push_to_hub
from OpenSciDraw.training.run_log import RunLog
from OpenSciDraw.training.snapshot import Snapshot
from OpenSciDraw.utils.background import Background
from OpenSciDraw.utils.files import naming_full_disk
from OpenSciDraw.utils.tensor_files import FULL_FOLDER
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.files import EMA_FOLDER, LORA_FILE, OLD_POLICY_FOLDER, load_tree, save_tree

_LOG = logging.getLogger("OpenSciDraw")


class SavedRun(Run):
    """A run with its place in the work (optimizer steps and micro-steps) and its checkpoints."""

    log: RunLog

    def __init__(self, config: Config):
        super().__init__(config)
        self.step, self.micro_step, self.saved_step = 0, 0, 0
        self.finite = FiniteCheck()
        self.writer, self.snapshot, self._said_no_memory = Background(), Snapshot(), False
        self._resume()

    def save_checkpoint(self) -> None:
        """One checkpoint of this step: every rank gives its part; a thread of rank 0 writes copies of it while training goes on.

        Where there is no memory for copies, or DeepSpeed holds the state, it is written piece by piece while training waits.
        """
        self.finite.settle()
        self.saved_step = self.step
        start, write = time.perf_counter(), self.accelerator.is_main_process
        content = self._content()
        self.writer.wait()  # for the checkpoint before: its copies' memory is used again
        if self._can_copy(content):
            copies = self.snapshot.take(content, write)
            if write:
                self.writer.submit(self._write_checkpoint, self.step, copies, self._state(), write)
        else:
            self._write_checkpoint(self.step, content, self._state(), write)
            self.accelerator.wait_for_everyone()
        self.log.exclude_time(time.perf_counter() - start)

    def _content(self) -> dict[str, Any]:
        """The tensors and values of a checkpoint, as they are now."""
        scaler = self.accelerator.scaler
        state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return {"weights": self._weights(), "state": state | ({"scaler": scaler.state_dict()} if scaler else {})}

    def _can_copy(self, content: Any) -> bool:
        """Whether every rank can go on while rank 0 writes copies."""
        fits = self.zero is None and self.snapshot.fits(content)
        if not fits and self.zero is None and not self._said_no_memory:
            self._said_no_memory = True
            _LOG.warning("no memory for copies of a checkpoint's state: training waits while checkpoints are written")
        if self.accelerator.num_processes == 1:
            return fits
        count = self.accelerator.reduce(torch.tensor(float(fits), device=self.accelerator.device), reduction="sum")
        return int(count.item()) == self.accelerator.num_processes

    def _write_checkpoint(self, step: int, content: dict[str, Any], state: dict[str, Any], write: bool) -> None:
        self.snapshot.arrived()
        with checkpoint.CheckpointWriter(self.output_dir, step, write) as folder:
            self._save_weights(folder, content["weights"], write)
            save_tree(folder / "optimizer", content["state"], write)
            if write:
                (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))
        if write:
            checkpoint.delete_old(self.output_dir, self.config.checkpoints_total_limit)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """What is saved of the model, by the folder's name: what trains, and its average in `ema/`."""
        transformer = self.accelerator.unwrap_model(self.model.transformer)
        sets: dict[str, Mapping[str, Tensor]] = {"": self.parameters}
        if self.average is not None:
            sets[EMA_FOLDER] = self.average.tensors
        if self.rounds is not None:
            sets[OLD_POLICY_FOLDER] = self.rounds.old.tensors
        return {name: trainable.values_to_save(transformer, values, self.config) for name, values in sets.items()}

    def _save_weights(
        self, folder: Path, sets: Mapping[str, Mapping[str, Tensor]], write: bool, dtype: torch.dtype | None = None
    ) -> None:
        transformer = self.accelerator.unwrap_model(self.model.transformer)
        for name, values in sets.items():
            trainable.save_weights(self.model, transformer, values, folder / name, self.config, write, dtype)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "micro_step": self.micro_step,
            "sampler": (self.rounds and self.rounds.began) or self.sampler.state_dict(),
            "settings": resuming.settings(self.config),
            "effective_batch": self.effective_batch,
            "mixed_precision": self.config.mixed_precision,
            "parameters": list(self.parameters),
            "optimizer": type(self.optimizer.optimizer).__name__,
            "reference": None if self.reference is None else self.reference.identity,
        }

    def _resume(self) -> None:
        if self.resume_from is None:
            return
        folder, state = self.resume_from, self._saved
        options = resuming.options_of(self.optimizer)
        (rate,) = {group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups}
        if state["parameters"] != list(self.parameters):
            counts = f"{len(state['parameters'])} tensors, this config {len(self.parameters)}"
            raise UserError(f"{folder} trained {counts}: check lora_layers and rank.")
        optimizer = type(self.optimizer.optimizer).__name__
        if state["optimizer"] != optimizer:
            raise UserError(f"{folder} was trained by {state['optimizer']}, this config asks for {optimizer}: set it back.")
        if state["mixed_precision"] != self.config.mixed_precision:
            was = state["mixed_precision"]
            now = self.config.mixed_precision
            raise UserError(f"{folder} was trained with mixed_precision = {was!r}, not {now!r}: set it back.")
        if self.reference is not None:
            self.reference.require_same(state.get("reference"), folder)
        self.sampler.load_state_dict(state["sampler"])
        if self.zero is None:
            trainable.load_weights(self.parameters, folder, self.config)
        if self.average is not None:
            self._resume_average(folder)
        if self.rounds is not None:
            self._resume_old_policy(folder)
        trees = load_tree(folder / "optimizer", self._part_of_state)
        self.optimizer.load_state_dict(trees["optimizer"])
        self.schedule.load_state_dict(trees["schedule"])
        resuming.follow_config(self.optimizer, self.schedule, options, rate)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(trees["scaler"])
        self.step = self.saved_step = state["step"]
        self.micro_step = state["micro_step"]
        if self.zero:
            self.optimizer.resume_at(self.step, self.step * self.config.gradient_accumulation_steps)
        _LOG.info("resumed from %s at step %d", folder, self.step)
        for line in resuming.said(self.changed, self.step):
            _LOG.warning("%s", line)
        if state["effective_batch"] != self.effective_batch:
            _LOG.warning("the effective batch was %d and is %d now", state["effective_batch"], self.effective_batch)

    def _resume_average(self, folder: Path) -> None:
        assert self.average is not None
        if not (folder / EMA_FOLDER).is_dir():
            raise UserError(f"{folder} holds no average (it was saved with use_ema = False). Set use_ema = False.")
        trainable.load_weights(self.average.tensors, folder / EMA_FOLDER, self.config)

    def _resume_old_policy(self, folder: Path) -> None:
        assert self.rounds is not None
        if not (folder / OLD_POLICY_FOLDER).is_dir():
            raise UserError(
                f"{folder} was not trained on rewards, so it cannot go on with them. Start a new run from its weights: with "
                "pretrained_full_ckpt_path, or pretrained_lora_ckpt_path and fuse_pretrained_lora = True."
            )
        trainable.load_weights(self.rounds.old.tensors, folder / OLD_POLICY_FOLDER, self.config)

    def _part_of_state(self, keys: tuple[Any, ...], source: Any, shape: tuple[int, ...]) -> Tensor | None:
        """Optimizer state of a dealt parameter is dealt as it is: this rank reads its own rows."""
        if keys[:2] != ("optimizer", "state"):
            return None
        return sharding.deal(source, shape, list(self.parameters.values())[keys[2]])

    def finish(self) -> None:
        """The final weights into model_output_dir itself: a LoRA in fp32, all weights in mixed_precision's type or fp32."""
        config, write = self.config, self.accelerator.is_main_process
        with naming_full_disk(self.output_dir, checkpoint.FULL_DISK):
            dtype = torch.float32 if config.upcast_before_saving else DTYPES[config.mixed_precision]
            final = {name: values for name, values in self._weights().items() if name != OLD_POLICY_FOLDER}
            self._save_weights(self.output_dir, final, write, dtype)
        if write and config.push_to_hub:
            push_to_hub(config, self.output_dir / (LORA_FILE if self.layers else FULL_FOLDER))
        self.accelerator.wait_for_everyone()
