"""Keys that other tools use for what has another name here, and where a key of another table belongs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

RENAMED: dict[str, str] = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr", "base_lr", "init_lr"), "train.learning_rate"),
    **dict.fromkeys(("optim", "optimizer_name", "optimizer_type"), "train.optimizer"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler_type", "lr_schedule"), "train.schedule"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "max_epochs", "epoch"), "train.epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "train_steps", "num_training_steps", "iters"), "train.steps"),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "gradient_clip_val", "gradient_clipping", "clip_grad_norm"), "train.clip"),
    **dict.fromkeys(("eval_steps", "eval_every", "eval_interval", "val_check_interval"), "train.evaluate_every"),
    **dict.fromkeys(("save_steps", "save_every", "checkpoint_steps", "save_interval"), "train.checkpoint_every"),
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), "train.patience"),
    **dict.fromkeys(("metric_for_best_model", "best_metric", "eval_metric"), "train.metric"),
    **dict.fromkeys(("use_gradient_checkpointing", "activation_checkpointing"), "train.gradient_checkpointing"),
    **dict.fromkeys(("random_seed", "random_state", "data_seed", "manual_seed"), "train.seed"),
    **dict.fromkeys(("num_virtual_tokens", "prompt_length", "soft_prompt_length", "n_tokens", "num_tokens"), "prompt.length"),
    **dict.fromkeys(("prompt_tuning_init", "initialization", "initializer"), "prompt.init"),
    **dict.fromkeys(("prompt_tuning_init_text", "initial_text"), "prompt.init_text"),
    **dict.fromkeys(
        ("model_name_or_path", "model_name", "base_model", "model_id", "pretrained_model_name_or_path", "base", "model_path"),
        "model.path",
    ),
    **dict.fromkeys(("torch_dtype", "precision"), "model.dtype"),
    **dict.fromkeys(("train_file", "train_data", "dataset", "dataset_name", "data_path", "data_files"), "data.train"),
    **dict.fromkeys(
        ("validation_file", "eval_file", "dev", "valid", "val", "eval", "val_set_size", "validation_split", "eval_data"),
        "data.validation",
    ),
    **dict.fromkeys(("test_file", "test_data", "test_size", "test_split"), "data.test"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "max_length", "max_input_length", "cutoff_len", "sequence_len",
                     "block_size"), "data.max_tokens"),
    **dict.fromkeys(("truncation", "truncation_side"), "data.truncate"),
    **dict.fromkeys(("classes", "class_names", "label_names", "label_list", "id2label", "classes_"), "data.labels"),
    **dict.fromkeys(("output_dir", "output_path", "save_dir", "checkpoint_dir", "out_dir", "storage_path"), "compute.storage"),
    **dict.fromkeys(("num_workers", "world_size", "nproc_per_node", "num_processes", "n_workers"), "compute.workers"),
    **dict.fromkeys(("ray_address", "cluster"), "compute.address"),
    **dict.fromkeys(("run_name", "experiment_name"), "name"),
    **dict.fromkeys(("tracking_uri", "mlflow_uri", "mlflow_tracking_uri"), "tracking.uri"),
    **dict.fromkeys(("num_trials", "n_trials", "num_samples"), "search.trials"),
    **dict.fromkeys(("zero_stage", "deepspeed_stage"), "zero.stage"),
    **dict.fromkeys(("max_tokens_per_answer", "max_completion_tokens"), "serve.max_new_tokens"),
}  # fmt: skip
"""Key of transformers, TRL, PEFT, Axolotl, LLaMA-Factory, OpenPrompt, Lightning or Ray -> the same setting here."""

ADVICE: dict[str, str] = {
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), "write train.warmup, a fraction of the steps"),
    "warmup_ratio": "write train.warmup",
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_batch_size", "total_batch_size", "global_batch_size"),
        "write train.batch_size, the rows of a step summed over all workers",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate_grad_batches", "grad_accum"),
        "write train.micro_batch_size, the rows of one pass on a worker",
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size"),
        "it has no counterpart, an evaluation takes as many rows as a step",
    ),
    **dict.fromkeys(
        (
            "text_column",
            "input_column",
            "prompt_template",
            "dataset_text_field",
            "text_field",
            "prompt_column",
            "source_column",
        ),
        'write the column in braces in data.input, for example "{text}"',
    ),
    **dict.fromkeys(
        ("label_column", "target_column", "label_field", "response_column", "output_column", "completion_column"),
        'write the column in braces in data.target, for example " {label}"',
    ),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "devices"), "write compute.workers and compute.gpus_per_worker"),
    **dict.fromkeys(("fp16", "bf16", "half"), 'write model.dtype = "bfloat16"'),
    "load_in_8bit": 'write model.quantization = "int8"',
    "load_in_4bit": 'it has no counterpart; a base can be stored in 8 bits with model.quantization = "int8"',
    **dict.fromkeys(("report_to", "logging_steps"), "it has no counterpart, every step is recorded in MLflow"),
    "save_total_limit": "it has no counterpart, only the newest checkpoints are kept",
    "resume_from_checkpoint": "use the option --resume",
    **dict.fromkeys(("deepspeed", "fsdp"), "it has no counterpart, DeepSpeed is set up from [zero]"),
    **dict.fromkeys(("packing", "group_by_length"), "it has no counterpart, rows are computed without padding"),
    **dict.fromkeys(("peft_type", "task_type"), "it has no counterpart, a soft prompt is what is trained"),
}
"""What to do where one key of another tool does not correspond to one key here."""


TABLES: dict[str, str] = {
    **dict.fromkeys(("training", "trainer", "training_arguments", "optimizer", "optim", "hyperparameters"), "train"),
    **dict.fromkeys(("dataset", "datasets", "task", "template"), "data"),
    **dict.fromkeys(("peft", "soft_prompt", "prompt_tuning"), "prompt"),
    **dict.fromkeys(("deepspeed", "zero_optimization"), "zero"),
    **dict.fromkeys(("tune", "hpo", "sweep"), "search"),
    **dict.fromkeys(("server", "serving", "inference"), "serve"),
    **dict.fromkeys(("mlflow", "logging"), "tracking"),
    **dict.fromkeys(("ray", "cluster", "resources", "scaling"), "compute"),
}
"""Table of other tools -> the table here."""


def advice(key: str, where: str, keys: Iterable[str], is_table: bool) -> str | None:
    """The end of an error about an unknown key that is known elsewhere; None if it is not.

    `where`: the table that contains the key ("" for the top of the file); `keys`: every dotted key of an experiment;
    `is_table`: the key's value is a table.
    """
    plain = re.sub(r"[-\s]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)).lower().lstrip("_")
    if is_table:
        return f"did you mean [{TABLES[plain]}]?" if not where and plain in TABLES else None
    known = list(keys)
    here = [dotted.rpartition(".")[2] for dotted in known if dotted.rpartition(".")[0] == where]
    if plain in here:
        return None  # only the spelling differs
    if plain in ADVICE:
        return ADVICE[plain]
    if plain in RENAMED:
        return f"did you mean {RENAMED[plain]}?"
    if difflib.get_close_matches(plain, here, cutoff=0.85):
        return None
    there = [dotted for dotted in known if dotted.rpartition(".")[2] == plain]
    # Most keys of [search] list values for a setting of the same name.
    there.sort(key=lambda dotted: dotted.startswith(("search.", "serve.")))
    return f"did you mean {there[0]}?" if there else None
