"""A stock model as one GGUF file of the architecture glm4moe: what llama.cpp and what is built on it run.

The tokenizer is copied from a GGUF of the dense model: llama.cpp has its own words for tokenizers, which its own
converter knows. Everything else is written from the weights, under the names of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedModel

from moefy.checkpoint import written_file
from moefy.errors import MoefyError
from moefy.export.base import Exporter
from moefy.sources.gguf_file import is_gguf, read_gguf

#: Types of matrices, by name: as GGUF calls the tensor's and the file's.
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_ARCH = gguf.MODEL_ARCH.GLM4_MOE
# llama.cpp makes room for as many operations, and aborts the process where a graph has more: 8 for each tensor, and at
# least 1,024. A layer has 54 and two for each expert of a token, by bisection; with biases, and with normalised queries
# and keys, some more.
_ROOM, _LEAST_ROOM, _LAYER, _BIASED, _NORMALISED = 8, 1024, 54, 2, 4
Progress = Callable[[int, int], None]


def write(
    made: PreTrainedModel,
    out: Path,
    tokenizer: Any,
    *,
    like: Path | None = None,
    weights: str = "q8_0",
    progress: Progress | None = None,
) -> None:
    """Write the file; `like` is a GGUF with the tokenizer, `weights` the type of matrices (of TYPES).

    `progress(done, total)` counts bytes. MoefyError if llama.cpp's glm4moe lacks something that the model has.
    """
    like = check(like, weights)
    vocabulary = _vocabulary(like, made.config.vocab_size)
    tensors = list(_tensors(made, *TYPES[weights][:1]))
    _check_room(made.config, len(tensors))
    with written_file(out) as partial:
        writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[_ARCH])
        _add_metadata(writer, made.config, like, TYPES[weights][1])
        for field in vocabulary:
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=item)
        sizes = [_size(tensor, kind) for _, tensor, kind in tensors]
        for (name, tensor, kind), size in zip(tensors, sizes, strict=True):
            writer.add_tensor_info(name, list(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for (_, tensor, kind), size in zip(tensors, sizes, strict=True):
                writer.write_tensor_data(quantize(tensor.float().cpu().numpy(), kind))
                done += size
                if progress:
                    progress(done, sum(sizes))
        finally:
            writer.close()


def check(like: Path | None = None, weights: str = "q8_0") -> Path:
    """MoefyError, before anything is loaded, unless `like` is a whole GGUF file and `weights` a type."""
    if weights not in TYPES:
        raise MoefyError(f"There is no type {weights!r}; use one of {', '.join(TYPES)}.")
    if like is None:
        raise MoefyError("A GGUF needs a tokenizer in llama.cpp's form; name a GGUF of the dense model with --like.")
    if not is_gguf(like):
        raise MoefyError(f"{like} is no GGUF file; name a GGUF of the dense model with --like.")
    read_gguf(like)
    return like


def _check_room(config: Any, tensors: int) -> None:
    """MoefyError for more experts a token than llama.cpp's graph has room for."""
    layers, routed = config.num_hidden_layers, config.num_hidden_layers - config.first_k_dense_replace
    each = _LAYER + _BIASED * bool(config.attention_bias) + _NORMALISED * bool(config.use_qk_norm)
    room = (max(_LEAST_ROOM, _ROOM * tensors) - layers * each) // (2 * routed)
    active, size = config.num_experts_per_tok, config.moe_intermediate_size
    if active <= room:
        return
    neurons = size * (config.n_routed_experts + config.n_shared_experts)
    larger = next(m for m in range(-(-size * active // room), neurons + 1) if neurons % m == 0)
    raise MoefyError(
        f"llama.cpp would abort: in a model of {layers} such layers it has room for {room} experts a token, and this "
        f"one runs {active}; convert with a larger --expert-size (such as {larger}), or write a directory."
    )


def _vocabulary(like: Path, size: int) -> list[Any]:
    """The fields of a GGUF that are its tokenizer; MoefyError unless it has one of the model's size."""
    fields = read_gguf(like).fields
    tokens = fields.get("tokenizer.ggml.tokens")
    found = len(tokens.data) if tokens is not None else 0
    if found != size:
        raise MoefyError(f"{like} has a tokenizer of {found} tokens, and the model {size}; name one that fits.")
    return [field for name, field in fields.items() if name.startswith("tokenizer.")]


def _add_metadata(writer: gguf.GGUFWriter, config: Any, like: Path, file_type: int) -> None:
    head = config.head_dim
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(like.stem)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    _add_rope(writer, config.rope_parameters, head)


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head: int) -> None:
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    if kind != "linear":
        raise MoefyError(f"Rotary positions of the type {kind} are not written to a GGUF; write a directory instead.")
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(rope["factor"])


def _tensors(made: PreTrainedModel, kind: Any) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, values (views where possible) and type of every tensor, in the order of the model."""
    names = gguf.get_tensor_name_map(_ARCH, made.config.num_hidden_layers)
    state = made.state_dict()
    if torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        del state["lm_head.weight"]  # llama.cpp takes the embedding then
    for key, tensor in state.items():
        for part, values in _parts(key, tensor):
            stem, _, ending = part.rpartition(".")
            name = names.get_name(stem)
            if name is None:
                raise MoefyError(f"llama.cpp's glm4moe has no tensor for {key}; write the directory instead.")
            # Routers stay in float32: their scores are near ties by design.
            plain = values.ndim == 1 or ".mlp.gate." in f".{part}"
            yield f"{name}.{ending}", values, gguf.GGMLQuantizationType.F32 if plain else _fitting(values, kind)


def _parts(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What GGUF keeps apart: the experts' gates and up-projections, and the router's bias under a name of its own."""
    stem, _, last = key.rpartition(".")
    match last:
        case "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            return [(f"{stem}.gate_proj.weight", gate), (f"{stem}.up_proj.weight", up)]
        case "down_proj":
            return [(f"{key}.weight", tensor)]
        case "e_score_correction_bias":
            return [(f"{stem}.e_score_correction.bias", tensor)]
    return [(key, tensor)]


def _fitting(tensor: Tensor, kind: Any) -> Any:
    """The type, or float16 for rows that are no whole blocks of it."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _size(tensor: Tensor, kind: Any) -> int:
    return int(np.prod(quant_shape_to_byte_shape(tuple(tensor.shape), kind)))


EXPORTER = Exporter(write, "GGUF file", is_gguf, ".gguf", ("like", "weights"), check)
