"""A run's parts, built in the order that keeps the memory peak low: model, data, prompts, transformer, optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from OpenSciDraw.config import Config
from OpenSciDraw.datasets.ahead import BatchReader, Numbered, ReadAhead
from OpenSciDraw.datasets.batch import Batch
from OpenSciDraw.datasets.mixed_sources import MixedSources
from OpenSciDraw.errors import UserError
from OpenSciDraw.evaluation.drawing import source_images
from OpenSciDraw.inference.pictures import encode_prompt, pictures_to_edit
from OpenSciDraw.models.base import DTYPES, FigureModel, build_model
from OpenSciDraw.parallel import sharding, zero
from OpenSciDraw.registry import DATASETS, SAMPLERS, TRAIN_ITERATION_FUNCS, VALIDATION_FUNCS
from OpenSciDraw.store.contract import Contract
from OpenSciDraw.train_iteration_funcs.flow_matching import LossOutput, Place, flow_matching_loss
from OpenSciDraw.training import checkpoint, resuming, trackers
from OpenSciDraw.training.compile_trial import compile_blocks, may_compile
from OpenSciDraw.training.launch import build_accelerator
from OpenSciDraw.training.memory.activations import set_checkpointing
from OpenSciDraw.training.memory.offload import BlockOffload
from OpenSciDraw.training.old_policy import OldPolicy
from OpenSciDraw.training.optimizers import choice as optim
from OpenSciDraw.training.reference import Reference
from OpenSciDraw.training.rounds import Rounds
from OpenSciDraw.training.stopping import ShieldedWorker, StopSignals
from OpenSciDraw.training.token_routing import TokenRouting
from OpenSciDraw.training.validation_model import ValidationModel
from OpenSciDraw.utils.files import parse_json
from OpenSciDraw.validation_funcs.evaluate_examples import examples_in_training
from OpenSciDraw.validation_funcs.sample_prompts import PromptSet
from OpenSciDraw.weights import trainable
from OpenSciDraw.weights.adapters import Adapters
from OpenSciDraw.weights.average import WeightAverage
from OpenSciDraw.weights.files import list_checkpoints
from OpenSciDraw.weights.fp8 import use_fp8_products
from OpenSciDraw.weights.precision import autocast_type, cast_inputs, compute_throughout
from OpenSciDraw.weights.quantization import quantization_config
from OpenSciDraw.weights.start import load_pretrained, load_pretrained_adapter

_LOG = logging.getLogger("OpenSciDraw")
Objective = Callable[[FigureModel, Batch, Place, Config, Tensor], LossOutput]


class Run:
    """What a run consists of. `SavedRun` adds its state in files, `Training` what the loop does with it."""

    def __init__(self, config: Config):
        self.config = config
        self.signals, self.ending = StopSignals(), torch.multiprocessing.Event()
        self.output_dir = Path(config.model_output_dir)
        self.resume_from = checkpoint.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
        there = list_checkpoints(self.output_dir)
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
        files = [[given] if isinstance(given, str) else given or [] for given in config.validation_images]
        self.validation_images = [pictures_to_edit(paths, self.model, config.encode, "validation_images") for paths in files]
        self._build_data()
        self._encode_prompts()
        self._build_transformer()

    def _compare_settings(self) -> dict[str, tuple[Any, Any]]:
        """What the config changes in a run that goes on, before anything loads; checkpoints before 0.5.0 do not say."""
        if self.resume_from is None:
            return {}
        self._saved = parse_json((self.resume_from / "trainer_state.json").read_text())
        return resuming.changes(self._saved["settings"], self.config, self.resume_from) if "settings" in self._saved else {}

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
        if self.zero and (config.needs_reference or config.trains_rewards):
            name = f"train_iteration_func_name = {config.train_iteration_func_name!r}"
            key = "a source with keep_base" if config.dataset.keeps_base else name
            raise UserError(
                f"{key} does not go with DeepSpeed (accelerate's file "
                "asks for it), whose engine runs no other policy beside the one that trains. Use an FSDP2 or DDP file."
            )
        if self.zero:  # it flattens parameters, which these cannot work on
            refused |= {"validation_model": config.validation_model is not None}
            refused |= {"use_ema": config.use_ema, "optimizer": config.optimizer != "AdamW", "use_8bit_adam": config.use_8bit_adam,
                        "master_weights": config.master_weights != "fp32",
                        "adapter_type": config.adapter_type != "lora"}  # fmt: skip
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
        if self.dataset.has_edits and not self.model.edits:
            raise UserError(
                f"{self.dataset.where} holds edits, and the pipeline of {config.model_type} takes no pictures to edit. Choose a "
                "model that edits (Flux2Klein), or figures without references."
            )
        if self.dataset.has_edits and self.model.text_sees_pictures and config.text == "online" and config.use_parquet_dataset:
            raise UserError(
                f"{self.dataset.where} holds edits, and the text encoder of {config.model_type} reads the pictures that they start "
                "from, which a store does not keep as pixels. Set text = 'stored' and encode it, or dataset.type = 'FigureDataset'."
            )
        if self.dataset.is_described and self.objective is not flow_matching_loss:
            _LOG.warning("%s: masks and weights of figures act in flow matching alone, not in %s", self.dataset.where,
                         config.train_iteration_func_name)  # fmt: skip
        if config.mask_outside_weight and not self.dataset.is_described:
            raise UserError(
                f"mask_outside_weight = {config.mask_outside_weight:g}, and no figure of {self.dataset.where} has a mask. Leave it "
                "out, or encode the figures with their masks (docs/mixing-data.md)."
            )
        self.held_out = self.dataset.held_out(config.held_out_examples)
        keep = torch.ones(len(self.dataset), dtype=torch.bool)
        keep[torch.from_numpy(self.held_out)] = False
        rows = keep.nonzero().flatten().numpy()
        sampler, lengths = config.data_sampler, self.dataset.text_lengths()
        if config.dataset.keeps_base and self.objective is not flow_matching_loss:
            raise UserError(
                f"train_iteration_func_name = {config.train_iteration_func_name!r} does not know keep_base (a source of "
                "dataset.sources): flow matching alone does. Leave keep_base out, or train_iteration_func_name."
            )
        self.sampler = (self.dataset.sampler if isinstance(self.dataset, MixedSources) else SAMPLERS.get(sampler.type))(
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
        if online or prompts or empty is None or (config.trains_rewards and negative):
            self.model.load_text_encoder()
            sees = self.model.text_sees_pictures  # else the pictures of examples are read one by one, when they are drawn
            images = [*(self.validation_images or [[]] * shown)]
            images += [source_images(self.model, example) if sees else [] for example in examples]
            rows = [encode_prompt(self.model, prompt, edited) for prompt, edited in zip(prompts, images, strict=True)]
            rows += [encode_prompt(self.model, prompt) for prompt in (negative, "")]
            negatives = [encode_prompt(self.model, negative, edited) if edited else rows[-2] for edited in images]
            self.prompts = PromptSet(
                prompts[:shown], rows[:shown], rows[-2], examples, rows[shown:-2], self.validation_images,
                negatives if sees else [],
            )  # fmt: skip
            empty = rows[-1] if empty is None else empty
            self._check_contract(self.dataset.contract)  # again: a text encoder that was just fetched has a fingerprint now
            if not online:
                self.model.free_text_encoder()
        else:
            self.prompts = PromptSet([], [], empty)
        self.empty_text = empty.to(self.model.device)
        self.validation_model: ValidationModel | None = None
        if config.validation_model is not None:
            self.validation_model = ValidationModel(config, self.model, self.accelerator)
            if self.accelerator.is_main_process:
                self.validation_model.encode_prompts(self.model, self.prompts)

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
            load_pretrained(model, start)
        self.layers = trainable.make_trainable(model.transformer, config)
        if config.fp8_products:
            _LOG.info("8-bit float products in %d frozen layers", use_fp8_products(model.transformer, accelerator.device))
        if config.offload:
            self.offload = BlockOffload(model.transformer, accelerator.device, config.resident_blocks)
        if config.token_routing.share:
            TokenRouting(model, model.transformer, config.token_routing)
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
        self.reference = Reference(model, config, accelerator, self.sharding) if config.needs_reference else None
        self.parameters = trainable.trainable_parameters(accelerator.unwrap_model(model.transformer))
        load_pretrained_adapter(model, self.parameters, start)
        if self.validation_model is not None and accelerator.is_main_process:
            self.validation_model.load()
        # gradient, copy in bf16, averages, optimizer: not there yet when "auto" looks what is free
        each = 4 + 2 + 4 * config.use_ema + 8 * config.trains_rewards + optim.optimizer_bytes(config)
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
        self.rounds: Rounds | None = None
        if config.trains_rewards:
            old = OldPolicy(model, self.parameters, config.reward, accelerator)
            self.rounds = Rounds(config, model, old, self.prompts.negative)

    def _ask_for_compiling(self) -> bool:
        """One process of each machine tries, the others read what it found."""
        config, accelerator = self.config, self.accelerator
        with accelerator.local_main_process_first():
            compiles = may_compile(config, self.model, config.max_train_steps, self.sharding is None and self.zero is None)
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
        zero.set_masters(self.parameters, saved)
        return made
