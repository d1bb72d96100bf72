"""Converted models as transformers sees them: a model type of their own, loadable by the Auto classes.

A converted LlamaForCausalLM becomes a MoefyLlamaForCausalLM with a MoefyLlamaConfig, subclasses made
here, whose `model_type` is "moefy". So `save_pretrained`, `from_pretrained`, `generate` and peft work
as they are, and the Auto classes of a transformers without moefy refuse the directory instead of
silently re-initialising the FFNs that they do not find. (A class that is named, such as
LlamaForCausalLM.from_pretrained, does not look at the type: it warns and makes random FFNs.)
"""

from __future__ import annotations

import copy
import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from moefy.errors import MoefyError
from moefy.moe import MoEFFN, moe_layers
from moefy.packed import keeps
from moefy.quiet import quiet_transformers
from moefy.routers import ROUTERS, Router
from moefy.sites import bamboo, base_model_type, find_sites, text_config
from moefy.types import LayerSpec
from moefy.version import __version__

MODEL_TYPE = "moefy"
# A class may be known to several Auto classes; these are the ones that people know.
_COMMON = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
# Where the Auto classes find what reads images and sound, if a checkpoint's own files do not name it.
_PROCESSORS = (PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING, FEATURE_EXTRACTOR_MAPPING)


class MoefyConfig(PretrainedConfig):
    """What AutoConfig finds for model_type "moefy"; reading it gives a subclass of the source's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not MoefyConfig:
            return super().from_dict(config_dict, **kwargs)
        base = config_dict.get("base_model_type")
        if not base or not isinstance(config_dict.get("moefy"), Mapping):
            raise MoefyError("This config.json has the model type moefy but lacks base_model_type or moefy.")
        layer_specs(config_dict["moefy"])
        if base not in CONFIG_MAPPING:
            raise MoefyError(
                f"This transformers ({transformers.__version__}) has no model type {base!r}, which this config.json "
                f"names as base_model_type; use a newer one, or correct it."
            )
        return config_class(CONFIG_MAPPING[base]).from_dict(config_dict, **kwargs)


def layer_specs(record: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """The shapes of the converted FFNs by dotted name, from a config's `moefy`; MoefyError if they are damaged."""
    layers = record.get("layers")
    if not layers or not isinstance(layers, Mapping):
        raise MoefyError("This config.json does not say how its FFNs were converted (moefy.layers); copy it again.")
    return {name: _spec(name, spec) for name, spec in layers.items()}


def _spec(name: str, stored: Any) -> LayerSpec:
    kinds: dict[str, Any] = {"int": int, "bool": bool, "str": str, "str | None": (str, NoneType)}
    known = {field.name: kinds[str(field.type)] for field in fields(LayerSpec)}
    wrong = f"The config.json of this converted model is damaged or newer than this moefy, for {name} has"
    given = stored if isinstance(stored, Mapping) else {}
    for key, value in given.items():
        mixed = isinstance(value, bool) and known.get(key) is int  # Python takes true for 1
        if mixed or not isinstance(value, known.get(key, ())) or (isinstance(value, int) and value < 0):
            raise MoefyError(f"{wrong} {key}: {value!r}; copy it again.")
    try:
        spec = LayerSpec(**given)
    except TypeError:
        raise MoefyError(f"{wrong} not all that it should ({', '.join(given) or 'nothing'}); copy it again.") from None
    if spec.top_k > spec.experts or (spec.most and not spec.top_k <= spec.most <= spec.experts):
        raise MoefyError(f"{wrong} top_k {spec.top_k} and most {spec.most} of {spec.experts} experts; copy it again.")
    if spec.router not in (None, *ROUTERS) or spec.activation not in ACT2FN:
        raise MoefyError(f"{wrong} the router {spec.router!r} and the activation {spec.activation!r}; copy it again.")
    return spec


@cache
def config_class(base: Any) -> Any:
    """The config class of converted models of one architecture, known to every Auto class that knows `base`."""
    made = type(f"Moefy{base.__name__}", (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
    for auto in vars(modeling_auto).values():
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None:
            model = None
            with suppress(ValueError):  # it names a class that transformers does not have
                model = auto._model_mapping.get(base, None)
            if isinstance(model, type):
                auto.register(made, model_class(model, made), exist_ok=True)
    with quiet_transformers():
        for processors in _PROCESSORS:
            with suppress(ImportError):  # of a package that images or sound take
                if base in processors:
                    processors.register(made, processors[base], exist_ok=True)
    return made


@cache
def model_class(base: Any, config: Any) -> Any:
    """The class of converted models of one architecture and head."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(config, *args, **kwargs)
        mount_empty(self)
        _initialise(self)  # transformers has done so for what was there before

    def initialize_weights(self: PreTrainedModel) -> None:
        try:
            super(made, self).initialize_weights()
        except AttributeError:  # BridgeTower's looks for the matrices of FFNs
            with _as_custom_code(self):
                super(made, self).initialize_weights()
        _initialise(self)

    def is_custom_code(cls: Any) -> bool:
        """As of the dense class: of custom code transformers initialises no module without tensors of its own, such as
        Falcon-H1's body, which fills buffers of its layers that no file has."""
        return bool(getattr(base, "is_custom_code", bool)())

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super(made, cls).from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        own_memory(model)
        for moe in moe_layers(model).values():
            moe.trainable(bool(moe.experts_up.requires_grad))
        return loaded

    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if any(moe.is_int8 for moe in moe_layers(self).values()):  # before a file is written
            raise MoefyError(
                "Experts in int8 cannot be saved; save the model as it was, and pack it once it is loaded."
            )
        super(made, self).save_pretrained(*args, **kwargs)

    def apply(self: PreTrainedModel, fn: Any, recurse: bool = True) -> PreTrainedModel:
        for moe in moe_layers(self).values():  # before anything is moved
            if moe.is_int8 and not keeps(fn, moe.experts_up.dtype):
                moe.unpack()  # which says that it cannot
        return super(made, self)._apply(fn, recurse)

    members = {
        "_apply": apply,
        "save_pretrained": save_pretrained,
        "__init__": __init__,
        "initialize_weights": initialize_weights,
        "is_custom_code": classmethod(is_custom_code),
        "from_pretrained": classmethod(from_pretrained),
        "__module__": __name__,
        "config_class": config,
    }
    made = type(f"Moefy{_known(base).__name__}", (base,), members)
    _share_renamings(base, made)
    return made


@contextmanager
def _as_custom_code(model: Any) -> Iterator[None]:
    model.is_custom_code = lambda: True
    try:
        yield
    finally:
        del model.is_custom_code


@torch.no_grad()
def _initialise(model: PreTrainedModel) -> None:
    """Random FFNs for a new model (`from_config`), as transformers makes linear layers; what is loaded stays."""
    std = getattr(text_config(model.config), "initializer_range", None) or 0.02
    for module in model.modules():
        if isinstance(module, (MoEFFN, Router)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if not getattr(tensor, "_is_hf_initialized", False):
                    tensor.normal_(0, std) if tensor.is_floating_point() and tensor.ndim > 1 else tensor.zero_()
            if isinstance(module, MoEFFN) and not getattr(module.neurons, "_is_hf_initialized", False):
                module.neurons.copy_(torch.arange(module.spec.neurons))


def __getattr__(name: str) -> Any:
    """The classes made here by name: so models and configs pickle as dense ones do, for spawned processes."""
    own = name.removeprefix("Moefy")
    base = getattr(transformers, own, None) or getattr(bamboo, own, None) if own != name else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base, config_class(base.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _share_renamings(base: Any, made: Any) -> None:
    """Let a converted class read the names that transformers stores its base's weights by.

    They are looked up by class or model type: GPT-NeoX saves its lm_head as embed_out, and would not find it again.
    """
    for name in (base.__name__, base.config_class.model_type):
        renamings = get_checkpoint_conversion_mapping(name)
        if renamings is not None:
            register_checkpoint_conversion_mapping(made.__name__, renamings, overwrite=True)
            return


def own_memory(model: PreTrainedModel) -> None:
    """Copy weights out of the mapped file, each to the start of a cache line, and give the file's pages back.

    transformers leaves weights mapped from the file, at any address. Matrix products round differently on
    memory that does not start on a cache line (by an ulp, on x86), so a reloaded model would not repeat the
    bits of the one that was saved. And the mapping stays resident beside the packed copy: SmolLM2 held 2.0
    times its weights, 1.0 times without it.
    """
    mapped = _mapped_files()
    for tensor in (*model.parameters(), *model.buffers()):
        start, size = (tensor.data_ptr(), tensor.nbytes) if tensor.device.type == "cpu" else (0, 0)
        from_file = any(low <= start < high for low, high in mapped)
        if size and (from_file or start % 64):
            tensor.data = tensor.data.clone()
            if from_file:
                _release_pages(start, size)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files but no libraries (Linux; elsewhere none).

    By any name: the hub's cache calls safetensors files by their hash.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(maxsplit=5) for line in lines]
    files = [f for f in fields if len(f) == 6 and f[5].startswith("/") and not f[5].startswith("/dev/")]
    ranges = [f[0].split("-") for f in files if ".so" not in Path(f[5]).name]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def _release_pages(start: int, size: int) -> None:
    """Drop whole pages of a file mapping from memory; a later access would read the file again."""
    page = mmap.PAGESIZE
    low, high = -(-start // page) * page, (start + size) // page * page
    if high > low:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), mmap.MADV_DONTNEED)


def mount_empty(model: PreTrainedModel) -> None:
    """Replace the dense FFNs of a fresh model by empty MoEFFNs of the shapes that its config names."""
    if moe_layers(model):
        return  # transformers' generic heads make their body by its config's class: it has mounted its own
    layers = layer_specs(getattr(model.config, "moefy", {}))
    for site in find_sites(model):
        # A model loaded without its head names its layers without the head's prefix.
        spec = layers.get(site.entry_name) or _by_suffix(layers, site.entry_name)
        if spec is not None:
            moe = MoEFFN(spec, dtype=site.owner_dtype)
            # Without weights to try, an FFN that no row names may be taken for one of another activation.
            known = replace(site, family=replace(site.family, fixed_activation=spec.activation))
            for part in (moe, *moe.children()):
                if hasattr(part, "act"):  # its learned parameters have the type of the dense one's
                    part.act = known.read().act()
            site.mount(moe.requires_grad_(False))


def _by_suffix(layers: Mapping[str, LayerSpec], name: str) -> LayerSpec | None:
    found = [spec for full, spec in layers.items() if full.endswith(f".{name}") or name.endswith(f".{full}")]
    return found[0] if len(found) == 1 else None


def mark_converted(model: Any, specs: Mapping[str, LayerSpec], record: dict[str, Any]) -> None:
    """Give a model whose FFNs have been replaced its converted class and config, in place."""
    config = model.config
    base_type, base_config, base_model = base_model_type(config), type(config), type(model)
    config.__class__ = config_class(base_config)
    config.base_model_type = base_type
    config.architectures = [base_model.__name__]
    config.moefy = {"versions": versions(), **record, "layers": {n: asdict(s) for n, s in specs.items()}}
    config.dtype = model.dtype
    model.__class__ = model_class(base_model, type(config))
    model.config = config


def _known(model_class: Any) -> Any:
    """The class by which a checkpoint names a model: of a user's subclass the one that others have, too."""
    for known in model_class.__mro__:
        name = known.__name__
        if not name.endswith("PreTrainedModel") and known in (getattr(transformers, name, 0), getattr(bamboo, name, 0)):
            return known
    return model_class


def auto_class(name: str) -> str:
    """The Auto class that loads a class of transformers by its name with its own head; AutoModel if none does."""
    found: list[str] = []
    for auto in vars(modeling_auto).values():
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None:
            known = {model.__name__ for model in auto._model_mapping._extra_content.values() if isinstance(model, type)}
            for classes in auto._model_mapping._model_mapping.values():
                known |= {*classes} if isinstance(classes, tuple) else {classes}
            found += [auto.__name__] if name in known else []
    # Those that people know first; what is for pretraining knows others' classes too.
    order = [*_COMMON, *sorted({*found} - {"AutoModelForPreTraining"}), "AutoModelForPreTraining"]
    return next((auto for auto in order if auto in found), "AutoModel")


def base_class(model: PreTrainedModel) -> Any:
    """The transformers class that a converted model was made from."""
    return next(c for c in type(model).__mro__ if c.__module__ != __name__)


def check_named(model: PreTrainedModel) -> None:
    """MoefyError if transformers has no class by the name of a model's: what is saved of it could not be loaded."""
    known = _known(base_class(model))
    if getattr(transformers, known.__name__, None) is not known and getattr(bamboo, known.__name__, None) is not known:
        raise MoefyError(
            f"transformers knows no class {known.__name__} by its name, so a converted one could not be loaded; "
            f"convert the model that it is a part of, or a class of transformers."
        )


def bare_model(model: PreTrainedModel, sizes: Mapping[str, int] | None = None) -> PreTrainedModel:
    """A new dense model of the source's class on a converted model's memory, without weights (on meta) in its FFNs.

    `sizes` are changes to its config, such as {"intermediate_size": 768} or {"text_config.intermediate_size": 768}.
    """
    base = base_class(model)
    # Not the class's own kind of config: EXAONE's model class is Llama's.
    kind: Any = next(c for c in type(model.config).__mro__ if c.__module__ != __name__)
    config = kind.from_dict({**model.config.to_dict(), "model_type": model.config.base_model_type})
    del config.moefy, config.base_model_type
    for attribute, size in (sizes or {}).items():
        part, _, last = attribute.rpartition(".")
        setattr(config_value(config, part), last, size)
    with torch.device("meta"):
        bare = base._from_config(config, dtype=model.dtype)
    own = bare.state_dict().keys()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in own}, strict=False, assign=True)
    bare.tie_weights()
    _take_computed(bare, model)
    if getattr(model, "generation_config", None) is not None:
        bare.generation_config = copy.deepcopy(model.generation_config)
    return bare


def _take_computed(bare: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give a model on meta what another of its kind has computed when it was made and does not store: frequencies."""
    modules = dict(model.named_modules())
    for name, module in bare.named_modules():
        if name not in modules:  # of an FFN
            continue
        for mine, given in ((module._buffers, modules[name]._buffers), (vars(module), vars(modules[name]))):
            for key, value in mine.items():
                if isinstance(value, torch.Tensor) and value.is_meta and key in given:
                    mine[key] = given[key]


def config_value(config: Any, path: str) -> Any:
    """What is at a dotted path below a config, 0 if nothing; at "" the config itself."""
    for name in path.split(".") if path else ():
        config = getattr(config, name, 0)
    return config


def versions() -> dict[str, str]:
    """Versions that decide a conversion's numbers."""
    return {"moefy": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def register() -> None:
    """Make the Auto classes know converted models; called once by `import moefy`."""
    AutoConfig.register(MODEL_TYPE, MoefyConfig, exist_ok=True)
    bamboo.register()
