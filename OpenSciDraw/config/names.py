"""Second spellings of config keys, and keys of existing configs that do nothing here."""

from __future__ import annotations

ALIASES = {
    "dataset_cfg": "dataset",
    "sampler_cfg": "data_sampler",
    "train_iteration_func": "train_iteration_func_name",
    "validation_func": "validation_func_name",
    "wandb_project": "tracker_name",
    "tracker_project_name": "tracker_name",
    "tracker_run_name": "run_name",
    "log_steps": "logging_steps",
    "output_dir": "model_output_dir",
    "log_with": "report_to",
    "init_weights_path": "pretrained_full_ckpt_path",
    "policy_init_path": "pretrained_full_ckpt_path",
}
# Keys of existing configs that do nothing here, with what to say beside that.
RETIRED = dict.fromkeys(
    (
        "device", "dtype", "layer_weighting", "pos_embedding", "decoder_arch", "cache_latents", "train_gpus_num",
        "pin_memory", "dataset_parquet_path", "from_hf_hub", "cache_latents_to_disk", "cache_text_embeddings_to_disk",
        "model_dir", "model_path", "model_name_or_path", "debug_mode", "num_validation_images", "verbose_logging",
    ),
    "",
) | {
    "ema_on_gpu": "The average lies where the trained weights do.",
    "vae_scale_factor": "It is the VAE's own.",
    "validation_vae_path": "Validation decodes with the model's VAE.",
    "dataset.vae_scaling_factor": "Latents are normalised as the model's VAE says.",
    "data_sampler.dataset": "The sampler gets the config's dataset.",
    "wandb_api_key": "Secrets belong in the environment: run `wandb login` or set WANDB_API_KEY, and delete it here.",
    "dataset.debug_mode": "Use dataset.num_train_examples to train on fewer rows.",
    "dataset.is_main_process": "It follows from the launch.",
    "data_sampler.num_replicas": "It follows from the launch.",
    "data_sampler.rank": "It follows from the launch.",
}  # fmt: skip
