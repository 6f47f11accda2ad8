"""Names that other trainers, and older recipes, give to the settings of a recipe."""

_ROW = "batch.row_tokens, the tokens of one packed row"
_ANSWERS = "settled: answers alone train, but for messages of weight 0"
_NAMES = {
    "model.prompt_format": "chat_template template chat_template_path",
    "model.activation_checkpointing": "recompute gradient_checkpointing",
    "model.start": "model_name_or_path base_model pretrained model_name",
    "model.tokenizer": "tokenizer_name_or_path",
    'model.compute = "bfloat16"': "bf16 precision",
    "model.compute": "torch_dtype dtype",
    'model.quantize = "nf4"': "load_in_4bit",
    'model.quantize = "int8"': "load_in_8bit",
    "data.train": "datasets dataset dataset_name train_file data_path",
    "data.validation": "eval_dataset validation_file test_datasets",
    "data.validation, rows of their own": "val_set_size",
    "data.max_length": "seq_length max_seq_length max_seq_len sequence_len cutoff_len seq_len",
    "data.max_length, of prompt and answer": "max_prompt_length",
    "data.over_long": "truncation_side truncate",
    "data.cross_documents": "reset_attention_mask",
    "the map of a source": "dataset_text_field",
    _ANSWERS: "assistant_only_loss completion_only_loss train_on_inputs roles_to_train",
    "optimizer.learning_rate": "lr learning_rate",
    "optimizer.min_learning_rate": "min_lr min_lr_rate cosine_min_lr_ratio",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type lr_decay_style",
    "optimizer.warmup_steps": "warmup warmup_ratio warmup_iters num_warmup_steps lr_warmup_steps "
    "lr_warmup_fraction",
    "optimizer.moments": "optim",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd",
    "optimizer.clip_norm": "max_grad_norm gradient_clipping grad_clip clip_grad gradient_clip_val max_norm",
    "batch.global_size": "batch_size global_batch_size train_batch_size gbs",
    "batch.global_size, which is whole whatever fits in a row": "gradient_accumulation_steps",
    _ROW: "micro_batch_size per_device_train_batch_size micro_train_batch_size mbs "
    "per_device_eval_batch_size eval_batch_size packing sample_packing padding_free",
    "batch.ramp": "rampup_batch_size",
    "run.epochs": "num_train_epochs num_epochs max_epochs",
    "run.max_steps": "num_steps train_iters lr_decay_iters",
    "run.directory": "output_dir checkpoint_dir run_name",
    "run.save_every": "save_steps save_interval save_strategy",
    "run.keep_checkpoints": "save_total_limit",
    "run.validate_every": "eval_steps val_check_interval eval_strategy evaluation_strategy eval_interval",
    'run.result = "best"': "load_best_model_at_end",
    "run.metric": "metric_for_best_model",
    "run.early_stop_after": "early_stopping_patience",
    "the same command again": "resume_from_checkpoint",
    "run.log": "logging report_to wandb_project",
    "every step, in metrics.jsonl": "logging_steps log_interval",
    "adapter.kind": "peft_type adapter_type",
    "adapter.rank": "lora_r r adapter_dim",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules lora_target_modules",
    'adapter.targets = ["all"]': "lora_target_linear",
    "adapter.modules_to_save": "lora_modules_to_save",
    "preference.beta": "ref_policy_kl_penalty",
    "preference.loss": "loss_type preference_loss",
    "preference.sft_weight": "rpo_alpha sft_loss_weight",
    "preference.preference_weight": "preference_loss_weight",
    "preference.average_logprobs": "preference_average_log_probs",
    "parallel.data": "fsdp deepspeed",
    "parallel.tensor": "tensor_model_parallel_size",
    "parallel.pipeline": "pipeline_model_parallel_size",
    "not to be had": "neftune_noise_alpha label_smoothing label_smoothing_factor reference_free fp16",
}
# In the table that says how answers are drawn.
_ROLLOUTS = {
    "group_size": "num_generations n_samples_per_prompt num_generations_per_prompt rollout_n n",
    "max_new_tokens": "max_completion_length max_response_length generate_max_len",
    "num_prompts": "rollout_batch_size num_prompts_per_step",
    "inner_epochs": "num_iterations ppo_epochs",
    "rewards": "reward_funcs",
    "rewards, each with its weight": "reward_weights",
    "unfinished": "mask_truncated_completions",
    "servers": "use_vllm vllm_mode vllm_server_host vllm_server_base_url",
}
_POLICY_GRADIENT = {
    "algorithm": "adv_estimator advantage_estimator",
    "kl_coefficient": "beta kl_coef init_kl_coef kl_loss_coef ref_policy_kl_penalty "
    "reference_policy_kl_penalty",
    "clip_low": "epsilon eps_clip clip_ratio clip_ratio_low cliprange ratio_clip_min ratio_eps",
    "clip_high": "epsilon_high clip_ratio_high ratio_clip_max",
    "critic.value_clip": "value_clip cliprange_value",
    "advantage": "scale_rewards",
    "ratio": "importance_sampling_level",
    "loss_over": "loss_type loss_agg_mode",
    "discount": "gamma",
    "gae_decay": "lam lambd gae_lambda",
    "entropy_bonus": "entropy_coeff",
}


def _by_name(names: dict[str, str], table: str = "") -> dict[str, str]:
    return {name: table + ours for ours, several in names.items() for name in several.split()}


def synonyms(table: str) -> dict[str, str]:
    """What others call a setting -> what it is here, for the stage with this table."""
    found = _by_name(_NAMES)
    if table == "preference":
        found |= _by_name(_ROLLOUTS, "preference.rollouts.")
    if table == "policy_gradient":
        found |= _by_name(_ROLLOUTS | _POLICY_GRADIENT, "policy_gradient.")
    return found
