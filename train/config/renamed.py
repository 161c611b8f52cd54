"""Keys that a TOML file or a command line may not have: renamed ones, and those of the Python API alone."""

#: Old `section.key` → new.
RENAMED: dict[str, str] = {
    "data.folder": "data.path",
    "data.sources.folder": "data.sources.path",
    "execution.drop": "execution.drop_policy",
    "loss.balance": "loss.load_balancing_type",
    "loss.balance_coef": "loss.router_aux_loss_coef",
    "loss.z_coef": "loss.z_loss_coef",
    "loss.router_z_coef": "loss.router_z_loss_coef",
    "loss.balancing_bias_rate": "loss.router_bias_update_rate",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.moment_dtype": "optimizer.mu_dtype",
    "run.folder": "run.output_dir",
    "run.steps": "run.max_steps",
    "run.init_from": "run.model_name_or_path",
    "run.accumulation_steps": "run.gradient_accumulation_steps",
    "run.log_every": "run.logging_steps",
    "run.eval_every": "run.eval_steps",
    "run.checkpoint_every": "run.save_steps",
    "run.keep_checkpoints": "run.save_total_limit",
    "run.sample_every": "run.sample_steps",
}

#: Fields of the package's config classes that are set in Python alone, and what to write instead.
API_ONLY: dict[str, str] = {
    **{
        f"execution.{field}": f"dataclasses.replace(config.execution, {field}=…)"
        for field in (
            "min_capacity",
            "capacity_by",
            "grouped_matmul",
            "routing",
            "eval_capacity_factor",
            "attention_block",
        )
    },
    "execution.sharding": "a [sharding] table",
    **{f"lora.{field}": f"dataclasses.replace(config.lora, {field}=…)" for field in ("rank_pattern", "alpha_pattern")},
    **{
        f"sharding.{field}": f"dataclasses.replace(config.execution, sharding=ShardingRules({field}=…))"
        for field in ("vocab", "heads", "ffn")
    },
}
