"""The files beside the weights in a Hugging Face directory of Qwen2.5-Omni, made from a configuration."""

from __future__ import annotations

import json
from typing import Any


def official_json(config: Any) -> dict[str, Any]:
    """config.json as Qwen2.5-Omni's release has it: the thinker inside, rotary settings in the old fields."""
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    rope = dict(text.rope_parameters)
    theta = rope.pop("rope_theta")
    text_fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "hidden_act max_position_embeddings rms_norm_eps use_sliding_window tie_word_embeddings"
    )
    vision_fields = (
        "depth hidden_size intermediate_size num_heads hidden_act in_channels patch_size temporal_patch_size "
        "spatial_merge_size window_size fullatt_block_indexes out_hidden_size"
    )
    audio_fields = (
        "num_mel_bins d_model encoder_layers encoder_attention_heads encoder_ffn_dim activation_function "
        "max_source_positions n_window output_dim"
    )
    thinker_fields = (
        "position_id_per_seconds seconds_per_chunk audio_token_index image_token_index video_token_index "
        "audio_start_token_id audio_end_token_id vision_start_token_id vision_end_token_id pad_token_id "
        "user_token_id"
    )

    def fields(source: Any, names: str) -> dict[str, Any]:
        return {name: getattr(source, name) for name in names.split()}

    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        **fields(config, thinker_fields),
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            **fields(text, text_fields),
            "tie_word_embeddings": config.tie_word_embeddings,
            "rope_theta": theta,
            "rope_scaling": {**rope, "type": rope.get("rope_type", "default")},
        },
        "vision_config": {"model_type": "qwen2_5_omni_vision_encoder", **fields(vision, vision_fields)},
        "audio_config": {"model_type": "qwen2_5_omni_audio_encoder", **fields(audio, audio_fields)},
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "thinker_config": thinker,
    }


def processor_json(config: Any) -> dict[str, Any]:
    """preprocessor_config.json: Whisper's features and Qwen2-VL's images in one object, as released."""
    from crab_edge.features import FeatureConfig

    features = FeatureConfig()
    vision = config.vision_config
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.audio_config.num_mel_bins,
        "n_fft": features.n_fft,
        "hop_length": features.hop,
        "sampling_rate": features.sample_rate,
        "chunk_length": 300,
        "dither": 0.0,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": features.mean,
        "image_std": features.std,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }


def synthetic_tokenizer(config: Any) -> Any:
    """A `tokenizers.Tokenizer` with the configuration's number of ids and its special tokens in their places.

    A few thousand merges are learnt from the tasks' own texts and plain English; the ids above them decode
    to words that no text encodes to.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    from crab_edge.model.config import PAD_TOKEN, TOKENS

    special = {getattr(config, attribute): token for attribute, token in TOKENS.items()}
    special[config.pad_token_id] = PAD_TOKEN
    first = min(special)
    split = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    blank = Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    blank.train_from_iterator(_texts(), trainer)
    learnt = json.loads(blank.to_str())["model"]
    vocab: dict[str, int] = dict(sorted(learnt["vocab"].items(), key=lambda entry: entry[1]))
    number = 0
    while len(vocab) < first:
        vocab.setdefault(f"Ġid{number}", len(vocab))
        number += 1
    merges = [tuple(merge) for merge in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = blank.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(special.get(i, f"<|extra_{i}|>"), special=True, normalized=False)
            for i in range(first, max(special) + 1)
        ]
    )
    return tokenizer


def _texts() -> list[str]:
    from crab_edge.features import QWEN_SYSTEM_PROMPT
    from crab_edge.tasks import all as all_tasks
    from crab_edge.training.tokenizer import plain_english

    return [QWEN_SYSTEM_PROMPT, *(task.instruction for task in all_tasks()), *plain_english()]
