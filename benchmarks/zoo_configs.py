"""Tiny configurations of transformers and diffusers, of every kind but causal language models.

Each is what a config.json holds; SEQ_LEN names sequence lengths other than 16 (an image's placeholders take more).
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_TEXT: Config = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=60)
_ENCODER: Config = {**_TEXT, "max_position_embeddings": 40}
_VISION: Config = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)
_IMAGE: Config = {**_VISION, "num_hidden_layers": 1}
_WAVES: Config = dict(
    **{key: value for key, value in _TEXT.items() if key != "vocab_size"}, vocab_size=12, conv_dim=[8, 8],
    conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, classifier_proj_size=8, pad_token_id=0,
)  # fmt: skip
_QUIET: Config = dict(  # no dropout and no masking in time
    hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
    final_dropout=0.0, mask_time_prob=0.0, mask_feature_prob=0.0,
)  # fmt: skip
_LLAMA: Config = dict(model_type="llama", **_TEXT, num_key_value_heads=2, max_position_embeddings=64)
_PAIR: Config = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                     decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60,
                     pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
_RESIDUAL: Config = dict(model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                         layer_type="basic", out_features=["stage2"])  # fmt: skip
_STAGED: Config = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=32)
_CLIP_TOWERS: Config = dict(
    text_config=dict(**_ENCODER, eos_token_id=2, bos_token_id=1, pad_token_id=0), vision_config=_IMAGE, projection_dim=8
)


def _made(architecture: str, model_type: str, *parts: Config, **more: Any) -> Config:
    merged: Config = {"model_type": model_type, "architectures": [architecture]}
    for part in parts:
        merged.update(part)
    return {**merged, **more}


HF: dict[str, Config] = {
    # speech and sound
    "whisper": _made("WhisperForConditionalGeneration", "whisper", _PAIR, num_mel_bins=8, max_source_positions=12,
                     max_target_positions=16),
    "speech_to_text": _made("Speech2TextForConditionalGeneration", "speech_to_text", _PAIR, input_feat_per_channel=8,
                            input_channels=1, conv_channels=16, max_source_positions=40, max_target_positions=16),
    "moonshine": _made("MoonshineForConditionalGeneration", "moonshine", hidden_size=16, intermediate_size=24,
                       vocab_size=60, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
                       encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=0,
                       decoder_start_token_id=1, bos_token_id=1, eos_token_id=2),
    "wav2vec2_ctc": _made("Wav2Vec2ForCTC", "wav2vec2", _WAVES, _QUIET),
    "hubert_ctc": _made("HubertForCTC", "hubert", _WAVES, _QUIET),
    "wav2vec2_bert_ctc": _made("Wav2Vec2BertForCTC", "wav2vec2-bert", _TEXT, feature_projection_input_dim=8,
                               layerdrop=0.0, pad_token_id=0, mask_time_prob=0.0,
                               conv_depthwise_kernel_size=5, conformer_conv_dropout=0.0),
    "wav2vec2_sound": _made("Wav2Vec2ForSequenceClassification", "wav2vec2", _WAVES, _QUIET),
    "hubert_sound": _made("HubertForSequenceClassification", "hubert", _WAVES, _QUIET),
    "wavlm_frames": _made("WavLMForAudioFrameClassification", "wavlm", _WAVES, _QUIET, num_buckets=8,
                          max_bucket_distance=16),
    "wavlm_speaker": _made("WavLMForXVector", "wavlm", _WAVES, _QUIET, num_buckets=8, max_bucket_distance=16,
                           tdnn_dim=[8, 8], tdnn_kernel=[3, 1], tdnn_dilation=[1, 1], xvector_output_dim=8),
    "unispeech_ctc": _made("UniSpeechForCTC", "unispeech", _WAVES, _QUIET),
    "spectrogram": _made("ASTForAudioClassification", "audio-spectrogram-transformer", _VISION, max_length=16,
                         num_mel_bins=8, patch_size=4, frequency_stride=4, time_stride=4),
    "whisper_sound": _made("WhisperForAudioClassification", "whisper", _PAIR, num_mel_bins=8,
                           max_source_positions=12, classifier_proj_size=8),
    # images
    "vit": _made("ViTForImageClassification", "vit", _IMAGE),
    "resnet": _made("ResNetForImageClassification", "resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                    image_size=16),
    "convnext": _made("ConvNextForImageClassification", "convnext", _STAGED),
    "swin": _made("SwinForImageClassification", "swin", embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2,
                  image_size=16, patch_size=2, drop_path_rate=0.0),
    "masked_image": _made("ViTForMaskedImageModeling", "vit", _IMAGE, encoder_stride=4),
    "segformer": _made("SegformerForSemanticSegmentation", "segformer", _STAGED, num_attention_heads=[1, 2, 2, 2],
                       decoder_hidden_size=8, drop_path_rate=0.0, classifier_dropout_prob=0.0),
    "upernet": _made("UperNetForSemanticSegmentation", "upernet", hidden_size=8, auxiliary_in_channels=16,
                     auxiliary_channels=8, image_size=32, pool_scales=[1, 2], backbone_config=dict(
                         model_type="convnext", **{**_STAGED, "depths": [1, 1, 1, 1]},
                         out_features=["stage1", "stage2", "stage3", "stage4"])),
    "depth": _made("GLPNForDepthEstimation", "glpn", _STAGED, num_attention_heads=[1, 2, 2, 2],
                   decoder_hidden_size=8, drop_path_rate=0.0),
    "yolos": _made("YolosForObjectDetection", "yolos", _VISION, image_size=[8, 8], num_detection_tokens=5),
    "detr": _made("DetrForObjectDetection", "detr", _PAIR, num_queries=5, use_timm_backbone=False, dropout=0.0,
                  use_pretrained_backbone=False, backbone=None, image_size=32, backbone_config=_RESIDUAL),
    "swin2sr": _made("Swin2SRForImageSuperResolution", "swin2sr", embed_dim=8, depths=[2], num_heads=[2],
                     window_size=4, image_size=8, upscale=2, drop_path_rate=0.0),
    "videomae": _made("VideoMAEForVideoClassification", "videomae", _VISION, num_frames=4, tubelet_size=2),
    "timesformer": _made("TimesformerForVideoClassification", "timesformer", _IMAGE, num_frames=2),
    # images and text
    "clip": _made("CLIPModel", "clip", _CLIP_TOWERS),
    "siglip": _made("SiglipModel", "siglip", _CLIP_TOWERS),
    "llava": _made("LlavaForConditionalGeneration", "llava", text_config=_LLAMA, image_token_index=59,
                   vision_config=dict(model_type="clip_vision_model", **_VISION)),
    "paligemma": _made("PaliGemmaForConditionalGeneration", "paligemma", projection_dim=16, image_token_index=59,
                       text_config=dict(model_type="gemma", **_TEXT, num_key_value_heads=1, head_dim=8),
                       vision_config=dict(model_type="siglip_vision_model", **_IMAGE, vision_use_head=False)),
    "gemma3": _made("Gemma3ForConditionalGeneration", "gemma3", mm_tokens_per_image=4, image_token_index=59,
                    text_config=dict(model_type="gemma3_text", **_TEXT, num_key_value_heads=1, head_dim=8,
                                     sliding_window=8),
                    vision_config=dict(model_type="siglip_vision_model", **{**_IMAGE, "image_size": 16},
                                       vision_use_head=False)),
    "internvl": _made("InternVLForConditionalGeneration", "internvl", image_token_id=59, text_config=_LLAMA,
                      vision_config=dict(model_type="internvl_vision", **{**_IMAGE, "image_size": [8, 8],
                                         "patch_size": [4, 4]}), projector_hidden_act="gelu"),
    "idefics3": _made("Idefics3ForConditionalGeneration", "idefics3", image_token_id=59, scale_factor=2,
                      text_config=_LLAMA, vision_config=dict(model_type="idefics3_vision", **_IMAGE)),
    "blip2": _made("Blip2ForConditionalGeneration", "blip-2", num_query_tokens=3, image_token_index=59,
                   vision_config=_IMAGE, qformer_config=dict(**_ENCODER, encoder_hidden_size=16, layer_norm_eps=0.01),
                   text_config=dict(model_type="opt", hidden_size=16, ffn_dim=24, num_hidden_layers=1, vocab_size=60,
                                    num_attention_heads=2, word_embed_proj_dim=16, max_position_embeddings=40)),
    # text encoders with heads
    "bert_sentence": _made("BertForSequenceClassification", "bert", _ENCODER, num_labels=3),
    "roberta_tokens": _made("RobertaForTokenClassification", "roberta", _ENCODER),
    "distilbert_answers": _made("DistilBertForQuestionAnswering", "distilbert", dim=16, hidden_dim=24, n_layers=1,
                                n_heads=2, vocab_size=60, max_position_embeddings=40),
    "electra_choices": _made("ElectraForMultipleChoice", "electra", _ENCODER, embedding_size=8),
    "llama_sentence": _made("LlamaForSequenceClassification", "llama", _LLAMA, num_labels=3),
    # time series
    "patchtst": _made("PatchTSTForPrediction", "patchtst", num_input_channels=2, context_length=16, patch_length=4,
                      patch_stride=4, d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24,
                      prediction_length=4, loss="mse", positional_dropout=0.0),
    "patchtst_classes": _made("PatchTSTForClassification", "patchtst", num_input_channels=2, context_length=16,
                              patch_length=4, patch_stride=4, d_model=16, num_hidden_layers=1, ffn_dim=24,
                              num_attention_heads=2, num_targets=3, use_cls_token=True),
    "patchtsmixer": _made("PatchTSMixerForPrediction", "patchtsmixer", num_input_channels=2, context_length=16,
                          patch_length=4, patch_stride=4, d_model=8, num_layers=1, prediction_length=4),
    "timesfm": _made("TimesFmModelForPrediction", "timesfm", hidden_size=16, intermediate_size=24, head_dim=8,
                     num_hidden_layers=1, num_attention_heads=2, context_length=16, horizon_length=8, patch_length=8),
}  # fmt: skip
SEQ_LEN: dict[str, int] = {"clip": 8, "siglip": 8}


def _diffusers(class_name: str, **settings: Any) -> Config:
    return {"_class_name": class_name, **settings}


_LEVELS: Config = dict(block_out_channels=[8, 8], layers_per_block=1, norm_num_groups=4, sample_size=8)
_HEADS: Config = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)
DIFFUSERS: dict[str, Config] = {
    "unet2d": _diffusers("UNet2DModel", **_LEVELS, attention_head_dim=4,
                         down_block_types=["DownBlock2D", "AttnDownBlock2D"],
                         up_block_types=["AttnUpBlock2D", "UpBlock2D"]),
    "unet2d_condition": _diffusers("UNet2DConditionModel", **_LEVELS, attention_head_dim=2, cross_attention_dim=8,
                                   down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                                   up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]),
    "sdxl": _diffusers("UNet2DConditionModel", **_LEVELS, attention_head_dim=2, cross_attention_dim=8,
                       addition_embed_type="text_time", addition_time_embed_dim=4,
                       projection_class_embeddings_input_dim=32, use_linear_projection=True,
                       down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                       up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"]),
    "autoencoder": _diffusers("AutoencoderKL", **_LEVELS, down_block_types=["DownEncoderBlock2D"] * 2,
                              up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=2),
    "dit": _diffusers("DiTTransformer2DModel", **_HEADS, sample_size=4, num_embeds_ada_norm=8, in_channels=4,
                      norm_num_groups=4),
    "pixart": _diffusers("PixArtTransformer2DModel", **_HEADS, sample_size=4, cross_attention_dim=16,
                         caption_channels=8, norm_num_groups=4),
    "flux": _diffusers("FluxTransformer2DModel", **{**_HEADS, "num_layers": 1}, num_single_layers=1, in_channels=4,
                       joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=[2, 2, 4]),
    "sd3": _diffusers("SD3Transformer2DModel", **_HEADS, sample_size=4, in_channels=4, out_channels=4,
                      joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=4),
    "auraflow": _diffusers("AuraFlowTransformer2DModel", sample_size=4, num_mmdit_layers=1, num_single_dit_layers=1,
                           attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
                           caption_projection_dim=16, pos_embed_max_size=4),
    "sana": _diffusers("SanaTransformer2DModel", **{**_HEADS, "num_layers": 1}, in_channels=4, out_channels=4,
                       num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
                       caption_channels=8, sample_size=4),
    "wan": _diffusers("WanTransformer3DModel", **{**_HEADS, "attention_head_dim": 12, "num_layers": 1}, in_channels=4,
                      out_channels=4, text_dim=8, freq_dim=8, ffn_dim=24),
}  # fmt: skip
OVERRIDES: dict[str, Config] = {
    "flux": dict(latent_height=2, latent_width=2),
    "wan": dict(latent_frames=2, latent_height=4, latent_width=4),
}
for _name in DIFFUSERS:
    SEQ_LEN[_name] = 6
