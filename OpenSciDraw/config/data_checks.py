"""What must agree between the keys of a config that say which data are read, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from OpenSciDraw.utils.files import carries_credentials

if TYPE_CHECKING:
    from OpenSciDraw.config.checks import Problem
    from OpenSciDraw.config.schema import Config

FIGURE_DATASET = "FigureDataset"  # figures encoded while training; every other dataset reads encoded rows
SOURCES_DATASET = "MixedSources"  # of several stores, each with its share
MIXED_DATASET = "ArXiVParquetDatasetV4"  # of figures and edits in two folders
GROUP_DATASET = "PreferenceGroups"  # of winners with their losers
BUCKET_SAMPLERS = ("ArXiVMixScaleBatchSampler", *(f"DistributedBucketSampler{end}" for end in ("", "V2", "V3")))


def data_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    data, name = config.dataset, config.train_iteration_func_name
    online = data.type == FIGURE_DATASET
    if config.use_parquet_dataset == online:
        message = f"{config.use_parquet_dataset} contradicts dataset.type = {data.type!r}. Set it to {not online}."
        found.append((("use_parquet_dataset", "dataset.type"), message))
    elif name.endswith("_train_iteration_func" if config.use_parquet_dataset else "_func_parquet"):
        message = f"{name!r} does not go with dataset.type = {data.type!r} ('_parquet' = encoded rows). Leave it out."
        found.append((("train_iteration_func_name", "dataset.type"), message))
    if online and data.figures is None:
        found.append(
            (
                ("dataset", "dataset.type"),
                "FigureDataset needs figures: dataset = dict(..., figures='my_figures/').",
            )
        )
    if online and config.text == "stored":
        found.append((("text", "dataset.type"), "FigureDataset has no stored text. Set text = 'online'."))
    if not online and data.type != SOURCES_DATASET and "base_dir" not in data.model_fields_set:
        found.append((("dataset",), "base_dir is missing: dataset = dict(type=..., base_dir='/path/to/data')."))
    if data.is_remote and carries_credentials(data.location):  # its value is not printed
        found.append((("dataset",), "base_dir: the address carries credentials. They belong into the environment: docs/remote.md."))
    if not online and (data.figures or data.resolution):
        message = f"only for {FIGURE_DATASET}; to encode figures beforehand set encode = dict(figures=...)."
        found.append((("dataset.figures" if data.figures else "dataset.resolution", "dataset.type"), message))
    if data.num_workers not in (None, config.dataloader_num_workers):
        message = f"{data.num_workers}, but dataloader_num_workers = {config.dataloader_num_workers}. Set one of them."
        found.append((("dataset.num_workers", "dataloader_num_workers"), message))
    if config.data_sampler.batch_size not in (None, config.train_batch_size):
        message = (
            f"{config.data_sampler.batch_size}, but train_batch_size = {config.train_batch_size}. Set one of them."
        )
        found.append((("data_sampler.batch_size", "train_batch_size"), message))
    return found


def captions_problems(config: Config) -> list[Problem]:
    encode, keys = config.encode, ("encode.caption_weights", "encode.caption_column")
    columns = encode.caption_column if isinstance(encode.caption_column, list) else []
    if encode.caption_weights and len(encode.caption_weights) != len(columns):
        message = f"{len(encode.caption_weights)} weights for {len(columns)} columns. Name as many in caption_column, as a list."
        return [(keys, message)]
    if encode.caption_weights and not any(encode.caption_weights):
        return [(keys, "no column has a weight above 0: no caption would be trained on. Give one.")]
    return []


def sources_problems(config: Config) -> list[Problem]:
    data = config.dataset
    found: list[Problem] = []
    if (data.type == SOURCES_DATASET) != bool(data.sources):
        return [(("dataset.sources", "dataset.type"), f"sources go with dataset.type = {SOURCES_DATASET!r}. Set both, or neither.")]
    labels = [source.label for source in data.sources]
    if len(set(labels)) < len(labels):
        found.append((("dataset.sources",), f"two sources are called {max(labels, key=labels.count)!r}. Give each a name."))
    shares = [source.share is not None for source in data.sources]
    if any(shares) and not all(shares):
        found.append((("dataset.sources",), "some sources have a share and some have none. Give all a share, or repeats alone."))
    if any(source.share is not None and source.repeats != 1 for source in data.sources):
        found.append((("dataset.sources",), "share and repeats of one source: the share decides alone. Leave repeats out."))
    refused = {"dataset.parquet_base_path": data.parquet_base_path, "dataset.num_train_examples": data.num_train_examples}
    for name in (name for name, value in refused.items() if value and data.sources):
        found.append(((name, "dataset.sources"), f"does not act on several sources. Leave {name} out."))
    if data.sources and data.is_remote:
        found.append((("dataset.base_dir", "dataset.type"), f"{SOURCES_DATASET} reads folders of this machine. Copy them."))
    if data.sources and config.data_sampler.type not in BUCKET_SAMPLERS:
        found.append((("data_sampler.type", "dataset.type"), f"{SOURCES_DATASET} has its own. Leave it out."))
    if config.dataset.keeps_base and config.pretrained_lora_ckpt_path and not config.fuse_pretrained_lora:
        message = "keep_base keeps what the model predicts without the adapter. Set fuse_pretrained_lora = True: then it counts."
        found.append((("pretrained_lora_ckpt_path", "dataset.sources"), message))
    return found


def mixed_problems(config: Config) -> list[Problem]:
    data, names = config.dataset, ("gen_parquet_path", "edit_parquet_path", "quality_filter")
    given = [name for name in names if getattr(data, name) is not None]
    if data.type != MIXED_DATASET and given:
        keys = (*(f"dataset.{name}" for name in given), "dataset.type")
        return [(keys, f"only for {MIXED_DATASET}. Set dataset.type, or leave it out.")]
    if data.type == MIXED_DATASET and data.gen_parquet_path is None and data.edit_parquet_path is None:
        return [(("dataset.type",), f"{MIXED_DATASET} needs gen_parquet_path, edit_parquet_path, or both: where are the data?")]
    if data.type == MIXED_DATASET and data.is_remote:
        return [(("dataset.base_dir", "dataset.type"), f"{MIXED_DATASET} reads folders of this machine. Copy the data here.")]
    return []
