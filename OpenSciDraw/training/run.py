"""Everything that the training loop needs, built in the order that keeps the memory peak low."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from OpenSciDraw.config import Config, save_config
from OpenSciDraw.datasets.ahead import BatchReader, Numbered
from OpenSciDraw.datasets.arxiv_parquet import ReadAhead
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.errors import UserError
from OpenSciDraw.flow import keyed_generator
from OpenSciDraw.models.base import DTYPES, FigureModel, build_model
from OpenSciDraw.parallel import sharding, zero
from OpenSciDraw.parallel.launch import build_accelerator
from OpenSciDraw.registry import DATASETS, SAMPLERS, TRAIN_ITERATION_FUNCS, VALIDATION_FUNCS
from OpenSciDraw.store.table import Contract
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place
from OpenSciDraw.training import resuming, trackers
from OpenSciDraw.training.compile_trial import compile_blocks, may_compile
from OpenSciDraw.training.finite import Arriving, FiniteCheck
from OpenSciDraw.training.memory.activations import set_checkpointing
from OpenSciDraw.training.memory.offload import BlockOffload
from OpenSciDraw.training.memory.out_of_memory import out_of_memory
from OpenSciDraw.training.run.optimizers import choice as optim
from OpenSciDraw.training.run_log import RunLog, device_name, save_session
from OpenSciDraw.training.snapshot import Snapshot
from OpenSciDraw.training.stopping import ShieldedWorker, StopRequest, StopSignals
from OpenSciDraw.utils.background import Background
from OpenSciDraw.utils.files import naming_full_disk, parse_json
from OpenSciDraw.utils.versions import versions
from OpenSciDraw.validation_funcs.evaluate_examples import examples_in_training
from OpenSciDraw.validation_funcs.held_out_loss import held_out_loss
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet
from OpenSciDraw.weights import checkpoint, trainable
from OpenSciDraw.weights.adapters import Adapters
from OpenSciDraw.weights.average import WeightAverage
from OpenSciDraw.weights.fp8 import use_fp8_products
from OpenSciDraw.weights.precision import autocast_type, cast_inputs, compute_throughout
from OpenSciDraw.weights.quantization import quantization_config, unquantized

_LOG = logging.getLogger("OpenSciDraw")
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: stopped by a signal after a checkpoint; run the same command again
Objective = Callable[[FigureModel, Batch, Place, Config, Tensor], LossOutput]


class Training:
    """One run: model, data, optimizer, log and place, and what the loop does with them."""

    def __init__(self, config: Config):
        self.config = config
        self.signals, self.ending = StopSignals(), torch.multiprocessing.Event()
        self.output_dir = Path(config.model_output_dir)
        self.resume_from = checkpoint.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
        there = checkpoint.list_checkpoints(self.output_dir)
        if there and self.resume_from is None:
            raise UserError(
                f"{self.output_dir} holds {len(there)} checkpoint(s) of an earlier run and resume_from_checkpoint is None. "
                "Set resume_from_checkpoint = 'latest' to go on, or choose another model_output_dir."
            )
        self.changed = self._compare_settings()
        if not int(os.environ.get("RANK", 0)):
            trackers.require_trackers(config)
        self.model = build_model(config)  # before the process group: in one, transformers saves an embedded model on rank 0 alone
        self.sharding, self.zero = sharding.take_request(), zero.take_request()
        self._check_sharding()
        self.accelerator = build_accelerator(config, autocast_type(config, self.model))
        self._prepare_torch()
        self.model.device = self.accelerator.device
        self.model.load_vae()
        self._check_sizes()
        self.objective: Objective = TRAIN_ITERATION_FUNCS.get(config.train_iteration_func_name)
        self.validator = VALIDATION_FUNCS.get(config.validation_func_name)
        self._build_data()
        self._encode_prompts()
        self._build_transformer()
        self.step, self.micro_step, self.saved_step = 0, 0, 0
        self._bad: dict[str, str] = {}
        self.finite = FiniteCheck()
        self.writer, self.snapshot, self._said_no_memory = Background(), Snapshot(), False
        self._reserved = False
        self._stop_flag: Arriving | None = None
        self._window: list[tuple[Batch, Place]] = []  # micro-steps of the optimizer step that is being taken
        self._resume()
        self._open_log()

    def _compare_settings(self) -> dict[str, tuple[Any, Any]]:
        """What the config changes in a run that goes on, before anything loads; checkpoints before 0.5.0 do not say."""
        if self.resume_from is None:
            return {}
        self._saved = parse_json((self.resume_from / "trainer_state.json").read_text())
        return resuming.changes(self._saved["settings"], self.config, self.resume_from) if "settings" in self._saved else {}

    # -- building -----------------------------------------------------------------------------
    def _prepare_torch(self) -> None:
        set_seed(self.config.seed)
        torch.backends.cuda.matmul.allow_tf32 = self.config.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.config.allow_tf32
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def _check_sharding(self) -> None:
        config = self.config
        refused = {
            "mixed_precision": config.mixed_precision == "fp16", "fuse_pretrained_lora": config.fuse_pretrained_lora,
            "quantization": config.quantization is not None, "offload": config.offload,
            "bnb_quantization_config_path": config.bnb_quantization_config_path is not None,
            "offload_optimizer": config.offload_optimizer, "fp8_products": config.fp8_products,
        }  # fmt: skip
        if self.zero:  # it flattens parameters, which these cannot work on
            refused |= {"use_ema": config.use_ema, "optimizer": config.optimizer != "AdamW", "use_8bit_adam": config.use_8bit_adam,
                        "master_weights": config.master_weights != "fp32"}  # fmt: skip
        found = [name for name, is_set in refused.items() if is_set]
        if (self.sharding or self.zero) and found:
            values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in found)
            way = "FSDP2" if self.sharding else "DeepSpeed"
            raise UserError(f"{way} (accelerate's file asks for it) does not go with {values}. Change these, or use a DDP file.")

    def _check_sizes(self) -> None:
        multiple = self.model.pixel_multiple
        wrong = [size for size in self.config.resolution_list if size[0] % multiple or size[1] % multiple]
        if wrong:
            raise UserError(f"resolution_list: {wrong}: this model draws sides that are multiples of {multiple} px.")

    def _build_data(self) -> None:
        config, place = self.config, self.accelerator
        dataset_class = DATASETS.get(config.dataset.type)
        self.dataset = dataset_class(**config.dataset_arguments())
        self._check_contract(self.dataset.contract)
        self.held_out = self.dataset.held_out(config.held_out_examples)
        keep = torch.ones(len(self.dataset), dtype=torch.bool)
        keep[torch.from_numpy(self.held_out)] = False
        rows = keep.nonzero().flatten().numpy()
        sampler, lengths = config.data_sampler, self.dataset.text_lengths()
        self.sampler = SAMPLERS.get(sampler.type)(
            self.dataset.bucket_of[rows], rows=rows, lengths=None if lengths is None else lengths[rows],
            batch_size=config.train_batch_size, num_replicas=place.num_processes, rank=place.process_index,
            drop_last=sampler.drop_last, shuffle=sampler.shuffle, seed=config.seed if sampler.seed is None else sampler.seed,
        )  # fmt: skip
        workers = config.dataloader_num_workers
        order: Any = self.sampler
        if config.dataset.is_remote and config.dataset.read_ahead_batches:
            order = ReadAhead(self.sampler, workers, config.dataset.read_ahead_batches)
        self.order = Numbered(order)
        self.loader: DataLoader[Batch] = DataLoader(
            BatchReader(self.dataset, config.seed), batch_size=None, sampler=self.order, num_workers=workers,
            persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
            pin_memory=place.device.type == "cuda", worker_init_fn=ShieldedWorker(self.ending),
        )  # fmt: skip
        if place.is_main_process:
            self.sampler.log_size()

    def _check_contract(self, found: Contract | None) -> None:
        wanted, where = self.model.contract(), self.config.dataset.location
        parts = ("latents", "text") if self.config.text == "stored" else ("latents",)
        if found is not None:
            wanted.require(found, parts, where)
        elif self.config.use_parquet_dataset:
            declared = self.config.dataset.contract
            wanted.require_declared(declared or {})
            _LOG.warning(
                "%s carries no contract: nothing but widths and shapes could be checked against this model. %s", where,
                f"Taken on the config's word: {declared}." if declared else "Declare dataset.contract to state how it was made.",
            )  # fmt: skip

    def _encode_prompts(self) -> None:
        """Text encoder -> prompts -> free, before the transformer takes the memory; kept when captions are encoded online."""
        config, empty = self.config, self.dataset.empty_text()
        examples = examples_in_training(config)
        prompts, shown = [*config.validation_prompts, *(example.prompt for example in examples)], len(config.validation_prompts)
        negative = config.negative_prompt or ""
        online = config.text == "online" or not config.use_parquet_dataset
        if online or prompts or empty is None:
            self.model.load_text_encoder()
            rows = [self.model.encode_prompts([prompt])[0].cpu() for prompt in [*prompts, negative, ""]]
            self.prompts = PromptSet(prompts[:shown], rows[:shown], rows[-2], examples, rows[shown:-2])
            empty = rows[-1] if empty is None else empty
            self._check_contract(self.dataset.contract)  # again: a text encoder that was just fetched has a fingerprint now
            if not online:
                self.model.free_text_encoder()
        else:
            self.prompts = PromptSet([], [], empty)
        self.empty_text = empty.to(self.model.device)

    def _build_transformer(self) -> None:
        """Weights -> what trains -> spread over the devices -> optimizer, schedule, average."""
        config, model, accelerator = self.config, self.model, self.accelerator
        start = config  # whose weights to start from a run that goes on has no use for
        if self.resume_from is not None:
            names = ("pretrained_lora_ckpt_path", "pretrained_full_ckpt_path")
            start = config.model_copy(update={name: None for name in names if not resuming.is_base(name, config)})
        self._compiles = self._ask_for_compiling()  # before the weights: the trial needs memory of the device too
        dtype = DTYPES[config.mixed_precision] if self.zero else trainable.loading_dtype(config)  # DeepSpeed makes its own masters
        if self.sharding:
            model.transformer = model.empty_transformer(dtype)
        else:
            model.load_transformer(quantization_config(config, model), torch.device("cpu") if config.offload else None, dtype)
            trainable.load_pretrained(model.transformer, start)
        self.layers = trainable.make_trainable(model.transformer, config)
        if config.fp8_products:
            _LOG.info("8-bit float products in %d frozen layers", use_fp8_products(model.transformer, accelerator.device))
        if config.offload:
            self.offload = BlockOffload(model.transformer, accelerator.device, config.resident_blocks)
        if self._compiles:
            compile_blocks(model.transformer)
        if self.sharding:
            sharding.shard(model.transformer, self.sharding, accelerator.device, DTYPES[config.mixed_precision])
            cast_inputs(model.transformer, DTYPES[config.mixed_precision])
            if config.use_lora:
                Adapters(model.transformer, model.shared_inputs, None)
            trainable.fill(model, start)
        elif not self.zero:
            self.copies = compute_throughout(model, model.transformer, config)
            sharding.leave_to_each_rank(model.transformer)
            model.transformer = accelerator.prepare(model.transformer)
        self.parameters = trainable.trainable_parameters(accelerator.unwrap_model(model.transformer))
        trainable.load_pretrained_adapter(self.parameters, start)
        # gradient, copy in bf16, average, optimizer: not there yet when "auto" looks what is free
        each = 4 + 2 + 4 * config.use_ema + optim.optimizer_bytes(config)
        still_to_come = int(each * sum(sharding.local(p).numel() for p in self.parameters.values()))
        inner = accelerator.unwrap_model(model.transformer)
        self.activations = set_checkpointing(inner, config, accelerator.device, still_to_come)
        model.transformer.train()
        self.effective_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        optimizer = optim.build_optimizer(config, self.parameters.values(), self.effective_batch)
        self.optimizer: Any = self._zero_engine(optimizer) if self.zero else accelerator.prepare(optimizer)
        epochs, limits = config.num_train_epochs, [config.max_train_steps]
        if epochs is not None:
            limits.append(max(1, epochs * len(self.sampler) // config.gradient_accumulation_steps))
        self.total_steps = min(limit for limit in limits if limit is not None)
        self.schedule = optim.build_schedule(config, self.optimizer.optimizer, self.total_steps)
        self.average: WeightAverage | None = None
        if config.use_ema:
            self.average = WeightAverage(self.parameters, config.ema_decay, config.ema_steps, config.ema_update_after_step)

    def _ask_for_compiling(self) -> bool:
        """One process of each machine tries, the others read what it found."""
        config, accelerator = self.config, self.accelerator
        alone = self.sharding is None and self.zero is None
        with accelerator.local_main_process_first():
            compiles = may_compile(config, self.model, config.max_train_steps, alone)
        if compiles:
            torch._dynamo.config.suppress_errors = True  # what fails to compile during the run runs eagerly
        return compiles

    def _zero_engine(self, optimizer: torch.optim.Optimizer) -> zero.ZeroOptimizer:
        """DeepSpeed's engine around the transformer; it is made with the weights that a resumed run goes on with."""
        assert self.zero is not None
        if self.resume_from is not None:
            trainable.load_weights(self.parameters, self.resume_from, self.config)
        saved = {name: p.detach().clone() for name, p in self.parameters.items()} if self.resume_from else {}
        made = zero.ZeroOptimizer(self.model.transformer, self.parameters, optimizer, self.config, self.zero)
        self.model.transformer = made.engine
        if saved:
            zero.set_masters(self.parameters, saved)
        return made

    def _open_log(self) -> None:
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.output_dir / "config.py")
            save_session(self.output_dir, self._session())
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
                self.model.transformer_class, f"LoRA on {len(self.layers)} layers" if self.layers else "all weights",
                trained / 1e6, str(next(iter(self.parameters.values())).dtype).removeprefix("torch."),
                len(self.dataset) - len(self.held_out), len(self.held_out),
            )  # fmt: skip
            _LOG.info(
                "effective batch %d = %d a rank x %d accumulated x %d rank(s)%s, %s; steps %d to %d",
                self.effective_batch, config.train_batch_size, config.gradient_accumulation_steps,
                accelerator.num_processes, self._spread(), config.mixed_precision, self.step, self.total_steps,
            )  # fmt: skip

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

    # -- the loop's verbs ----------------------------------------------------------------------
    def batches(self) -> Iterator[Batch]:
        """This rank's batches from the resumed place on, epoch after epoch, until the last step is done."""
        while self.step < self.total_steps:
            self.order.first = self.micro_step
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

    def owes_validation(self) -> bool:
        """Whether this step's validation is due and has not been done, by this run or before it was resumed."""
        due = self.step % self.config.validation_steps == 0 or self.step == self.total_steps
        return due and not (self.step and self.log.has_event("validated", self.step))

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
        if values:
            self.log.metrics(self.step, values)
        self.log.event("validated", self.step)
        self.log.exclude_time(time.perf_counter() - start)

    # -- state ---------------------------------------------------------------------------------
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
            checkpoint.save_tree(folder / "optimizer", content["state"], write)
            if write:
                (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))
        if write:
            checkpoint.delete_old(self.output_dir, self.config.checkpoints_total_limit)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """What is saved of the model, by the folder's name: what trains, and its average in `ema/`."""
        transformer = self.accelerator.unwrap_model(self.model.transformer)
        sets: dict[str, Mapping[str, Tensor]] = {"": self.parameters}
        if self.average is not None:
            sets[checkpoint.EMA_FOLDER] = self.average.tensors
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
            "sampler": self.sampler.state_dict(),
            "settings": resuming.settings(self.config),
            "effective_batch": self.effective_batch,
            "mixed_precision": self.config.mixed_precision,
            "parameters": list(self.parameters),
            "optimizer": type(self.optimizer.optimizer).__name__,
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
        self.sampler.load_state_dict(state["sampler"])
        if self.zero is None:
            trainable.load_weights(self.parameters, folder, self.config)
        if self.average is not None:
            self._resume_average(folder)
        trees = checkpoint.load_tree(folder / "optimizer", self._part_of_state)
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
        if not (folder / checkpoint.EMA_FOLDER).is_dir():
            raise UserError(f"{folder} holds no average (it was saved with use_ema = False). Set use_ema = False.")
        trainable.load_weights(self.average.tensors, folder / checkpoint.EMA_FOLDER, self.config)

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
            self._save_weights(self.output_dir, self._weights(), write, dtype)
        if write and config.push_to_hub:
            push_to_hub(config, self.output_dir / (checkpoint.LORA_FILE if self.layers else checkpoint.FULL_FOLDER))
        self.accelerator.wait_for_everyone()


def push_to_hub(config: Config, weights: Path) -> None:
    """Upload the final weights (a file or a folder) to `hub_model_id`; a failed upload is reported and loses nothing.

    The token comes from the environment (HF_TOKEN) or `hub_token`, and is never printed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=config.hub_token or os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(str(config.hub_model_id), exist_ok=True)
        if weights.is_dir():
            api.upload_folder(folder_path=weights, path_in_repo=weights.name, repo_id=str(config.hub_model_id))
        else:
            api.upload_file(path_or_fileobj=weights, path_in_repo=weights.name, repo_id=str(config.hub_model_id))
    except (HfHubHTTPError, OSError) as error:
        _LOG.error("push_to_hub: %s was not uploaded (%s). On this machine all is whole: %s", config.hub_model_id, error, weights)
        return
    _LOG.info("uploaded %s to %s", weights.name, config.hub_model_id)
