"""The fields of PEFT's adapter_config.json: which matter, which do not, which are refused."""

from lorasb_runtime.importing.peft_tensors import MERGE_FIRST

# Fields that change what the adapter computes beyond B A, and the way out.
REFUSED: dict[str, str] = {
    "use_dora": MERGE_FIRST,
    "kasa_config": MERGE_FIRST,
    "monteclora_config": MERGE_FIRST,
    "use_bdlora": MERGE_FIRST,
    "use_qalora": "serve it on the quantized model that it was trained for",
    "alora_invocation_tokens": "it acts on some tokens only; serve it where aLoRA is known",
    "arrow_config": "it is a router over adapters; import those one by one",
    "layer_replication": "it repeats layers; merge it with PEFT into a model of its own",
    "target_parameters": "it changes stacked experts; merge it with PEFT into its base model",
    "lora_bias": "train with lora_bias=False",
    "modules_to_save": "train without modules_to_save",
    "trainable_token_indices": "train without trainable_token_indices",
}
CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion, which makes a LoRA of it"
# Beginnings of init_lora_weights that change the base model's weights in training.
MUTATING_INITS = {
    "pissa": CONVERT,
    "olora": CONVERT,
    "corda": CONVERT,
    "lora_ga": CONVERT,
    "loftq": MERGE_FIRST,
}
# Fields that say nothing about what the saved tensors mean, of LoRA, AdaLoRA and TinyLoRA.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
        "fan_in_fan_out",
        "bias",
        "r",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "runtime_config",
        "qalora_group_size",
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "u",
        "weight_tying",
        "projection_seed",
        "save_projection",
        "init_v_bound",
        "init_weights",
        "tinylora_dropout",
    }
)
