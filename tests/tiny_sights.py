"""Tiny random models whose FFNs are spread over their layers, or all in parts: of images, and of two towers."""

from __future__ import annotations

from typing import Any

import torch

from tiny_base import BOTH_HALVES, IMAGE, LAYERS, NEURONS, TEXT, TOWER, WIDTH, More, by_class, shaped, with_more

_SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "mlp_ratio": 1.5,
}
_CLAP = {
    "hidden_size": WIDTH,
    "patch_embeds_hidden_size": 16,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "window_size": 4,
    "spec_size": 32,
    "num_mel_bins": 8,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "mlp_ratio": 1.5,
}
_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8] * 4,
    "depths": [1] * 4,
    "out_features": ["stage4"],
}
_DETECTION = {
    **BOTH_HALVES,
    "num_queries": 5,
    "backbone_config": _RESNET,
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
}
_PICTURES = shaped(pixel_values=(3, 16, 16))
_LARGER = shaped(pixel_values=(3, 64, 64))
_VIDEO = shaped(pixel_values=(2, 3, 16, 16))
_WORDS_AND_VIDEO = shaped({"input_ids": (12,)}, pixel_values=(2, 3, 16, 16))


def _towers(name: str, sites: int = 4, text: Any = None, vision: Any = None, **changes: Any) -> More:
    """A model that compares texts with images."""
    return by_class(
        f"{name}Model",
        "image-text",
        sites,
        text_config={**TOWER, **(text or {})},
        vision_config={**IMAGE, **(vision or {})},
        **changes,
    )


def _patches(batch: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_attention_mask": torch.ones(batch, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * batch),
    }


TOWERS = {
    "altclip": _towers("AltCLIP", projection_dim=16),
    "chinese_clip": _towers("ChineseCLIP", text={"pad_token_id": None}),  # whose row transformers makes zero again
    "clipseg": _towers("CLIPSeg", projection_dim=16),
    "owlvit": _towers("OwlViT"),
    "owlv2": _towers("Owlv2"),
    "aimv2": _towers("Aimv2", projection_dim=16),
    "tipsv2": _towers("Tipsv2", vision={"mlp_ratio": 1.5}),
    "siglip2": by_class(
        "Siglip2Model",
        with_more(shaped({"input_ids": (12,)}, pixel_values=(16, 48)), _patches),
        4,
        text_config={**TOWER, "projection_size": WIDTH},
        vision_config={**LAYERS, "patch_size": 4, "num_patches": 16},
    ),
    "groupvit": _towers(
        "GroupViT",
        9,
        vision={
            "depths": [1, 1, 1],
            "num_group_tokens": [8, 4, 0],
            "num_output_groups": [8, 4, 0],
            "assign_mlp_ratio": [0.5, 1.5],
        },
    ),
    "xclip": by_class(
        "XCLIPModel",
        _WORDS_AND_VIDEO,
        7,
        text_config=TOWER,
        vision_config={
            **IMAGE,
            "num_frames": 2,
            "mit_hidden_size": 24,
            "mit_intermediate_size": NEURONS,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 4,
        },
        projection_dim=24,
        prompt_num_attention_heads=4,
    ),
    "videoprism": by_class(
        "VideoPrismClipModel",
        shaped({"input_ids": (12,)}, pixel_values_videos=(2, 3, 16, 16)),
        5,
        text_config=TOWER,
        vision_config={
            **IMAGE,
            "num_frames": 2,
            "tubelet_size": [1, 4, 4],
            "num_spatial_layers": 1,
            "num_temporal_layers": 1,
            "num_auxiliary_layers": 1,
        },
    ),
    "flava": by_class(
        "FlavaModel", "image-text", 6, text_config=TEXT, image_config=IMAGE, multimodal_config=LAYERS, **LAYERS
    ),
    "bridgetower": by_class(
        "BridgeTowerModel",
        "image-text",
        8,
        hidden_size=96,
        num_attention_heads=4,
        num_hidden_layers=2,
        text_config={**TEXT, "hidden_size": 96},
        vision_config={"hidden_size": 96, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
    ),
    "clap": by_class(
        "ClapModel",
        shaped({"input_ids": (12,)}, input_features=(1, 40, 8)),
        4,
        text_config=TEXT,
        audio_config=_CLAP,
        projection_dim=16,
    ),
    # With embeddings of patches: it shuffles those that it makes.
    "vilt": by_class(
        "ViltForQuestionAnswering",
        with_more(
            shaped({"input_ids": (12,)}, image_embeds=(17, WIDTH)),
            lambda batch: {"pixel_mask": torch.ones(batch, 17, dtype=torch.long)},
        ),
        **TEXT,
        image_size=16,
        patch_size=4,
        num_labels=3,
    ),
}
_HIERA = {
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4] * 4,
    "global_attention_blocks": [3],
    "window_positional_embedding_background_size": [4, 4],
    "mlp_ratio": 1.5,
    "hidden_size": 16,
}
IMAGES = {
    "dpt": by_class("DPTModel", _PICTURES, **IMAGE, is_hybrid=False, backbone_out_indices=[0, 1]),
    "timesformer": by_class("TimesformerModel", _VIDEO, **IMAGE, num_frames=2),
    "videomae": by_class(
        "VideoMAEForPreTraining",
        with_more(_VIDEO, lambda batch: {"bool_masked_pos": torch.arange(16).expand(batch, 16) < 10}),
        4,
        **IMAGE,
        num_frames=2,
        tubelet_size=2,
        decoder_hidden_size=WIDTH,
        decoder_intermediate_size=NEURONS,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
    ),
    "cvt": by_class(
        "CvtForImageClassification",
        _LARGER,
        6,
        embed_dim=[12, 12, 24],
        num_heads=[1, 1, 2],
        depth=[1, 2, 3],
        mlp_ratio=[2.0] * 3,
        num_labels=3,
    ),
    "convnext": by_class(
        "ConvNextForImageClassification", _PICTURES, hidden_sizes=[12, 24], depths=[1, 1], num_stages=2, num_labels=3
    ),
    "dinov3_convnext": by_class("DINOv3ConvNextModel", _LARGER, hidden_sizes=[12, 24], depths=[1, 1]),
    "donut-swin": by_class("DonutSwinModel", _PICTURES, **_SWIN),
    "maskformer-swin": by_class("MaskFormerSwinModel", _PICTURES, **_SWIN),
    "swin2sr": by_class("Swin2SRForImageSuperResolution", _PICTURES, **{**_SWIN, "patch_size": 1}),
    "mobilevit": by_class(
        "MobileViTForImageClassification",
        _LARGER,
        9,
        hidden_sizes=[24] * 3,
        neck_hidden_sizes=[8] * 6 + [24],
        image_size=64,
        num_labels=3,
        initializer_range=0.5,
    ),
    "pvt": by_class(
        "PvtForImageClassification",
        _LARGER,
        4,
        depths=[1] * 4,
        hidden_sizes=[12, 12, 24, 24],
        mlp_ratios=[2] * 4,
        num_attention_heads=[1, 1, 2, 2],
        image_size=64,
        num_labels=3,
    ),
    "qwen3_vl_vision": by_class(
        "Qwen3VLVisionModel",
        lambda batch, generator: {
            "hidden_states": torch.randn(16 * batch, 96, generator=generator),
            "grid_thw": torch.tensor([[1, 4, 4]] * batch),
        },
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        depth=2,
        num_heads=4,
        patch_size=4,
        out_hidden_size=WIDTH,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
    "sam2_hiera_det_model": by_class("Sam2HieraDetModel", _LARGER, 5, **_HIERA),
    "table-transformer": by_class("TableTransformerModel", _LARGER, 4, **_DETECTION),
    "dab-detr": by_class("DabDetrModel", _LARGER, 4, **{**_DETECTION, "hidden_size": WIDTH}),
    # Its backbone has a row and its decoder none.
    "maskformer": by_class(
        "MaskFormerModel",
        _LARGER,
        6,
        backbone_config={
            **_SWIN,
            "image_size": 64,
            "depths": [1] * 4,
            "num_heads": [2] * 4,
            "model_type": "swin",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        decoder_config={**BOTH_HALVES, "model_type": "detr", "num_queries": 5},
        fpn_feature_size=WIDTH,
        mask_feature_size=WIDTH,
    ),
}
