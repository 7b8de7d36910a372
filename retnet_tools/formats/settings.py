"""Reads the configuration that a format stores, value by value, and leaves no key of it unexplained.

A format declares the keys that it reads, those that may hold one value only, those that cannot touch the mathematics,
and older names. Any other key must be neutral (None, False, 0 or empty): what it would have meant nobody here knows.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from retnet_tools.errors import InputError, UsageError, did_you_mean

Choice = TypeVar("Choice")

MAX_COUNT, MAX_NUMBER, MAX_SHOWN = 1 << 20, sys.float_info.max, 60


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Only:
    """A key that must hold one of these values, or be absent; `expected` says for the error what they mean."""

    values: tuple[Any, ...]
    expected: str


@dataclass(frozen=True)
class Keys:
    """The configuration keys of a format.

    Attributes:
        read: keys whose values `Settings` gives.
        only: keys that select a kind of model of which one is supported.
        inert: keys that cannot touch the mathematics of a trained model.
        aliases: from older names to those of `read`.
    """

    read: frozenset[str]
    only: Mapping[str, Only] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """A format's own configuration as stored, read by name and type. A value of None counts as absent.

    Every reader raises `InputError` for a value of another type, and for one that is absent and has no default.

    Attributes:
        origin: whose configuration it is, for errors.
        values: by the format's present names.
        keys: what the format declares; a key that is read without being declared is a fault of the reader.
        given: the older names under which values stand in the document, by present name.
    """

    origin: str
    values: Mapping[str, Any]
    keys: Keys | None = None
    given: Mapping[str, str] = field(default_factory=dict)
    _consulted: set[str] = field(default_factory=set, compare=False, repr=False)
    _assumed: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def declared(cls, origin: str, document: Mapping[str, Any], keys: Keys, ignored: Collection[str] = ()) -> Settings:
        """The settings of a stored document, every key of which is known, neutral, or ignored as the user says.

        Raises:
            InputError: a key that is not known or holds what is not supported, or two names of one key that differ.
            UsageError: a key to be ignored that the format reads.
        """
        for name in ignored:
            if name in keys.read | keys.aliases.keys():
                raise UsageError(f"--ignore-key {name}", f"a key that {origin} does not read", "correct its value")
        values = {name: value for name, value in document.items() if name not in ignored}
        given: dict[str, str] = {}
        for old, new in keys.aliases.items():
            value = values.pop(old, None)
            if value is None:
                continue
            given.setdefault(new, old)
            if values.get(new) not in (None, value):
                shown = f"{old} = {reprlib.repr(value)} and {new} = {reprlib.repr(values[new])}"
                two = "one value, since they are two names of one setting"
                raise InputError(f"the {origin} configuration has {shown}", two, "correct it")
            values[new] = value
        settings = cls(origin, values, keys, given)
        for name, value in values.items():
            settings._explain(keys, name, value)
        return settings

    def _explain(self, keys: Keys, name: str, value: Any) -> None:
        only = keys.only.get(name)
        if only is not None and value is not None and value not in only.values:
            raise self.wrong(name, value, only.expected, "this kind of model is not supported")
        if only is None and name not in keys.read | keys.inert and not _is_neutral(value):
            hint, ignore = did_you_mean(name, keys.read), f"--ignore-key {name[:MAX_SHOWN]}"
            action = f"{hint} or {ignore}" if hint else f"where it does not change the model, add {ignore}"
            raise self.wrong(name, value, "only keys that this format knows", action)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer, below a bound that keeps schedules of its length small."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= MAX_COUNT:
            raise self.wrong(name, value, f"a positive integer, at most {MAX_COUNT}")
        return value

    def size(self, name: str, default: int) -> int:
        """A size of the model, for which the format's code has a default; that it is taken is noted."""
        if not self.has(name):
            self._assumed[name] = default
        return self.count(name, default)

    def number(self, name: str, default: float) -> float:
        """A number that is not negative."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
            raise self.wrong(name, value, "a number >= 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value; 0 and 1 are read as one."""
        value = self._value(name, default)
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def choice(self, name: str, choices: Mapping[str, Choice], default: str) -> Choice:
        """What one of these words stands for."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}", "other kinds are not supported")
        return choices[value]

    def raw(self, name: str) -> Any:
        """The value as it is stored; None where it is absent."""
        if self.keys is not None and name not in self.keys.read and name not in self.keys.only:
            raise AssertionError(f"the reader of {self.origin} does not declare {name!r}")
        self._consulted.add(name)
        return self.values.get(name)

    def has(self, name: str) -> bool:
        """Whether there is a value, other than None."""
        return self.raw(name) is not None

    def notes(self) -> list[str]:
        """Sizes that the configuration leaves to the format's code, and keys that do nothing in this model: one note
        each."""
        read = frozenset() if self.keys is None else self.keys.read
        assumed = [f"{name} is not in the configuration: {default} assumed" for name, default in self._assumed.items()]
        return assumed + [
            f"{self.given.get(name, name)} = {reprlib.repr(value)} in the configuration does nothing in this model"
            for name, value in self.values.items()
            if name in read and name not in self._consulted and not _is_neutral(value)
        ]

    def wrong(self, name: str, value: Any, expected: str, action: str = "correct it") -> InputError:
        """The error for a value that cannot be."""
        shown = self.given.get(name, name)[:MAX_SHOWN]
        return InputError(f"the {self.origin} configuration has {shown} = {reprlib.repr(value)}", expected, action)

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise InputError(f"the {self.origin} configuration has no {name}", "every size of the model", "add it")
        return default if value is None else value


def _is_neutral(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float | str | list | tuple | dict) and not value)


# Keys that cannot touch the mathematics of a trained model, whichever format they stand in.
# What trainers keep among hyperparameters and command lines, and what made an object of theirs.
TRAINING = words(
    """
    _class_path _instantiator _target_ accelerator accumulate_grad_batches activation_dropout adam_beta1 adam_beta2
    adam_betas adam_eps adam_epsilon attention_dropout batch_size beta1 beta2 betas bf16 block_size
    checkpoint_activations checkpoint_dir clip_grad compile context_length data data_dir data_path dataset dataset_name
    ddp ddp_rank decay_steps deepspeed device devices drop_path_rate dropout early_stopping_patience epochs
    eval_interval eval_iters eval_steps experiment_name fp16 fsdp global_batch_size grad_clip
    gradient_accumulation_steps gradient_checkpointing gradient_clip_val hidden_dropout hidden_dropout_prob init_std
    initializer_range learning_rate local_rank log_dir log_every log_every_n_steps log_interval logging_steps lr
    lr_decay lr_decay_iters lr_scheduler max_epochs max_grad_norm max_iters max_length max_lr max_seq_len max_seq_length
    max_steps micro_batch_size min_lr mixed_precision monitor num_epochs num_gpus num_nodes num_train_epochs num_workers
    offload_activations optimizer out_dir output_dir per_device_batch_size precision project resume run_name save_dir
    save_every save_interval save_steps scheduler seed seq_len seq_length sequence_length steps strategy tokenizer
    tokenizer_name tokenizer_path total_steps train_batch_size train_data train_path use_wandb val_batch_size
    val_check_interval val_data val_path wandb wandb_project warmup warmup_iters warmup_ratio warmup_steps weight_decay
    workers world_size z_loss_coeff
    """
)

# What transformers' PretrainedConfig writes or takes for itself, generation settings included (they are read with the
# tokenizer), and what people put beside it: lengths, which a RetNet does not have, dropout, how to load it. Not
# is_encoder_decoder, add_cross_attention, pruned_heads and the like: they would change a model.
HUGGING_FACE = TRAINING | words(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _from_model_config
    _name_or_path architectures attn_implementation attn_pdrop auto_map bad_words_ids base_model_pp_plan
    base_model_tp_plan begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout custom_pipelines decoder_start_token_id device_map diversity_penalty do_sample dtype
    early_stopping embd_pdrop embed_dropout encoder_no_repeat_ngram_size eos_token_id epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty finetuning_task force_words_ids forced_bos_token_id forced_eos_token_id
    guidance_scale id2label is_decoder keys_to_ignore_at_inference label2id length_penalty license loss_type
    low_cpu_mem_usage max_new_tokens max_position_embeddings max_sequence_length min_length min_new_tokens
    model_max_length model_type n_ctx n_positions no_repeat_ngram_size num_assistant_tokens num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_past output_retentions output_scores
    pad_token_id penalty_alpha prefix problem_type remove_invalid_values renormalize_logits repetition_penalty
    resid_dropout resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class tokenizer_file top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version trust_remote_code typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    use_flash_attention_2 vocab_file
    """
)

# The options of fairseq's trainer, which stand beside those of the model in the files of its older releases.
FAIRSEQ = HUGGING_FACE | words(
    """
    adaptive_input_factor add_bos_token aim_repo aim_run_hash all_gather_list_size amp amp_batch_retries amp_init_scale
    amp_scale_window average_sync azureml_logging base_sublayers batch_read_ahead batch_size_valid beam beam_mt
    best_checkpoint_metric block_lr block_momentum bmuf bos bpe broadcast_buffers bucket_cap_mb buffer_size checkpoint
    checkpoint_shard_count checkpoint_suffix clip_norm combine_valid_subsets common common_eval constraints
    context_window continue_once cpu cpu_offload criterion curriculum data_buffer_size dataset_impl ddp_backend
    ddp_comm_hook debug_param_names decoding_format device_id dict_file disable_validation distributed_backend
    distributed_init_method distributed_no_spawn distributed_num_procs distributed_port distributed_rank
    distributed_training distributed_world_size distributed_wrapper diverse_beam_groups diverse_beam_strength
    diversity_rate ema ema_decay ema_fp32 ema_seed_model ema_start_update ema_update_freq empty_cache_freq
    end_learning_rate eos eos_token eval_lm fast_stat_sync final_lr_scale find_unused_parameters finetune_from_model
    fix_batches_to_gpus fixed_validation_seed force_anneal fp16_adam_stats fp16_init_scale fp16_no_flatten_grads
    fp16_scale_tolerance fp16_scale_window fp32_reduce_scatter freq_weighted_replacement future_target gen_subset
    generation global_sync_iter gradient_as_bucket_view grouped_shuffling heartbeat_timeout hold_steps
    ignore_prefix_size ignore_unused_valid_subsets include_target_tokens init_lr_scale input interactive
    iter_decode_eos_penalty iter_decode_force_max_iter iter_decode_max_iter iter_decode_with_beam
    iter_decode_with_external_reranker keep_best_checkpoints keep_interval_updates keep_interval_updates_pattern
    keep_last_epochs label_smoothing lazy_load leave_unmasked_prob lenpen lenpen_mt lm_path lm_weight
    load_checkpoint_on_all_dp_ranks localsgd_frequency log_file log_format lr_patience lr_period_updates lr_shrink
    lr_threshold mask_multiple_length mask_prob mask_stdev mask_whole_words match_source_len max_epoch max_len_a
    max_len_a_mt max_len_b max_len_b_mt max_sentences max_sentences_valid max_source_positions max_target_positions
    max_tokens max_tokens_valid max_update max_valid_steps maximize_best_checkpoint_metric memory_efficient_bf16
    memory_efficient_fp16 min_len min_loss_scale model_overrides model_parallel_size nbest no_beamable_mm no_early_stop
    no_epoch_checkpoints no_last_checkpoints no_progress_bar no_reshard_after_forward no_save no_save_optimizer_state
    no_seed_provided not_fsdp_flatten_parameters nprocs_per_node num_shards on_cpu_convert_precision optimization
    optimizer_overrides output_dictionary_size output_word_probs output_word_stats pad pad_to_fixed_bsz
    pad_to_fixed_length pad_to_max_length past_target path patience phase_ratio pipeline_balance pipeline_checkpoint
    pipeline_chunks pipeline_decoder_balance pipeline_decoder_devices pipeline_devices pipeline_encoder_balance
    pipeline_encoder_devices pipeline_model_parallel plasma_path post_process power prefix_size print_alignment
    print_step profile quiet random_token_prob raw_text remove_source_sentinel remove_target_sentinel replace_unk
    report_accuracy required_batch_size_multiple required_seq_len_multiple reset_dataloader reset_logging
    reset_lr_scheduler reset_meters reset_optimizer restore_file results_path retain_dropout retain_dropout_modules
    retain_iter_history sacrebleu sample_break_mode sampling sampling_topk sampling_topp save_interval_updates
    score_reference scoring self_target sentence_avg shard_id shorten_data_split_list shorten_method shrink_min
    skip_invalid_size_inputs_valid_test skip_remainder_batch slowmo_base_algorithm slowmo_momentum softmax_batch
    span_length spm_model stop_min_lr stop_time_hours store_ema suppress_crashes t_mult task tensorboard_logdir
    threshold_loss_scale tokens_per_sample total_num_update tpu train_subset unk unkpen unnormalized
    update_epoch_batch_itr update_freq update_ordered_indices_seed use_bmuf use_nbm use_old_adam use_plasma_view
    use_sharded_state user_dir valid_subset validate_after_updates validate_interval validate_interval_updates
    warmup_init_lr warmup_iterations warmup_updates write_checkpoints_asynchronously zero_sharding
    """
)
