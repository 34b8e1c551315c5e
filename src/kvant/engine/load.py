"""From a model's name and options to a running engine: the one place where all parts meet."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from kvant.cache.sizing import CacheSize, free_memory, size_for_bytes, size_for_tokens
from kvant.config import EngineConfig, parse_bytes
from kvant.engine.engine import Engine, Model
from kvant.errors import ConfigError
from kvant.formats import KVSpec, is_auto
from kvant.formats.auto import choose_preset
from kvant.kernels import check_backend, make_backend, make_memory
from kvant.loading.checkpoint import Checkpoint, Progress, load_weights
from kvant.loading.resolve import resolve_model
from kvant.loading.tokenizer import Tokenizer
from kvant.models.config import DecoderConfig
from kvant.models.cpu import CPUOps
from kvant.models.decoder import Decoder, DecoderWeights
from kvant.models.ops import Ops, TorchOps

_log = logging.getLogger("kvant")

__all__ = [
    "LoadedModel",
    "OpenModel",
    "cache_size",
    "load_model",
    "open_checkpoint",
    "open_model",
    "share_cores",
    "start_model",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """An engine, and what its users need beside it."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    config: DecoderConfig
    kv_spec: KVSpec
    cache: CacheSize


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a ``.gguf`` file or a Hugging Face folder without reading its weights.

    Raises:
        ModelError: it is damaged or of an unsupported architecture.
    """
    if path.is_dir():
        from kvant.loading.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    from kvant.loading.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)


def cache_size(
    config: EngineConfig, spec: KVSpec, model: DecoderConfig, memory: int | None = None
) -> CacheSize:
    """The KV cache that the options ask for; ``memory`` replaces the memory found free. On a GPU
    it leaves what a step needs.

    Raises:
        ConfigError: it would not hold a page, or not fit into the free memory.
    """
    device, shape = _device(config), model.kv_shape
    free = memory or _free_memory(device)
    needed = _workspace(config, model, device)
    if needed and free <= needed:
        raise ConfigError(
            f"a step needs up to {_gib(needed)} and {_gib(free)} of GPU memory are free, which "
            "leaves none for a KV cache; lower max_prefill_token_num or max_batch_size, or take a "
            "smaller model"
        )
    if config.kv_tokens is not None:
        size = size_for_tokens(spec, shape, config.kv_tokens, config.max_batch_size)
    else:
        budget = (
            parse_bytes(config.kv_memory)
            if config.kv_memory is not None
            else min(int(config.cache_max_entry_count * free), free - needed)
        )
        size = size_for_bytes(spec, shape, budget, config.max_batch_size)
    if size.nbytes > free - needed:
        whose = "" if device is None else " of GPU memory"
        step, lower = "", ""
        if needed:
            step = f", of which a step needs up to {_gib(needed)}"
            lower = ", lower max_prefill_token_num"
        raise ConfigError(
            f"the KV cache would take {_gib(size.nbytes)} and {_gib(free)}{whose} are free{step}; "
            f"give less with kv_memory or kv_tokens{lower}, or take a smaller KV format"
        )
    return size


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _workspace(config: EngineConfig, model: DecoderConfig, device: torch.device | None) -> int:
    """Bytes of a GPU's memory that steps need beside weights and cache."""
    if device is None or device.type == "cpu":
        return 0
    from kvant.models.workspace import workspace_bytes

    return workspace_bytes(
        model,
        _dtype(config),
        max_step_tokens=config.max_prefill_token_num,
        max_batch_size=config.max_batch_size,
        longest=config.session_len or model.max_positions,
        graphs=not config.eager_mode,
    )


def _device(config: EngineConfig) -> torch.device | None:
    """The GPU that computes, or what stands for it; None if the backend is another."""
    if check_backend(config.backend) != "triton":
        return None
    from kvant.kernels.triton.pool import find_device

    return find_device()


def _free_memory(device: torch.device | None) -> int:
    """Bytes that a KV cache could take where it is computed with."""
    if device is None or device.type == "cpu":
        return free_memory()
    from kvant.kernels.triton import pool

    return pool.free_memory(device)


def _session_len(config: EngineConfig, model: DecoderConfig, cache: CacheSize) -> int:
    """The longest sequence: as asked or trained, but never more than the pool holds."""
    if config.session_len is None:
        return min(model.max_positions, cache.num_tokens)
    if config.session_len > cache.num_tokens:
        raise ConfigError(
            f"session_len={config.session_len} does not fit a KV cache of {cache.num_tokens} "
            "tokens; lower it or give the cache more with kv_memory or kv_tokens"
        )
    stretched = model.rope.kind in ("dynamic", "yarn", "linear")
    if config.session_len > model.max_positions and not stretched:
        raise ConfigError(
            f"session_len={config.session_len} exceeds the model's context of "
            f"{model.max_positions} tokens; lower it"
        )
    return config.session_len


def share_cores(num_threads: int | None) -> int:
    """One pool of busy threads for the process: torch's OpenMP, which the cpu backend works on
    too. numpy's BLAS, which the reference backend uses for small products, keeps to the calling
    thread. Returns the number of threads, by default torch's.

    Raises:
        ConfigError: there are fewer cores.
    """
    cores = os.cpu_count() or 1
    if num_threads is not None and num_threads > cores:
        raise ConfigError(f"num_threads={num_threads} exceeds the {cores} cores of this machine")
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    threadpool_limits(limits=1, user_api="blas")
    return torch.get_num_threads()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model found and understood, its weights not read yet."""

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @property
    def config(self) -> DecoderConfig:
        """Its shape."""
        return self.checkpoint.config

    def weights(self, config: EngineConfig, progress: Progress | None = None) -> DecoderWeights:
        """Read the weights as ``config`` says; errors as in :func:`load_model`."""
        args = config.weight_dtype, _ops(config), progress
        return load_weights(self.checkpoint, _dtype(config), *args)


def _dtype(config: EngineConfig) -> torch.dtype:
    device = _device(config)
    if device is not None:
        from kvant.models.gpu import choose_dtype

        return choose_dtype(config.dtype, device)
    # On a CPU bfloat16 is the fast 16-bit type, whatever the checkpoint was saved in.
    found: torch.dtype = getattr(torch, "bfloat16" if config.dtype == "auto" else config.dtype)
    return found


def _kv_spec(config: EngineConfig, model: DecoderConfig) -> KVSpec:
    """The KV formats asked for, where 16 bits are those of the model's dtype."""
    dtype = str(_dtype(config)).removeprefix("torch.")
    return replace(config, dtype=dtype).kv_spec(model.architecture)


def _threads(config: EngineConfig) -> int:
    return config.num_threads or torch.get_num_threads()


def _ops(config: EngineConfig) -> Ops:
    """Who computes what is not attention."""
    device = _device(config)
    if device is not None:
        from kvant.models.gpu import GPUOps

        return GPUOps(device, _dtype(config))
    if check_backend(config.backend) == "cpu":
        return CPUOps(_threads(config))
    return TorchOps(_dtype(config))


def _decoder(
    config: EngineConfig, model: DecoderConfig, weights: DecoderWeights, longest: int
) -> Model:
    """The model over its weights, for contexts of up to ``longest`` tokens."""
    device = _device(config)
    if device is None:
        return Decoder(model, weights, _ops(config), longest=longest)
    from kvant.models.gpu import GPUDecoder
    from kvant.models.graphs import CudaCapture

    capture = None if config.eager_mode or device.type == "cpu" else CudaCapture()
    return GPUDecoder(model, weights, device, longest=longest, capture=capture)


def open_model(name: str, config: EngineConfig) -> OpenModel:
    """The first part of :func:`load_model`: whatever can be refused before weights are read."""
    check_backend(config.backend)
    share_cores(config.num_threads)
    path = resolve_model(name, revision=config.revision, download_dir=config.download_dir)
    checkpoint = open_checkpoint(path)
    model = checkpoint.config
    check_backend(config.backend, model.head_dim)
    _kv_spec(config, model).check(model.kv_shape)
    if is_auto(config.kv):
        choice = choose_preset(model.architecture)
        _log.warning("kv=auto: %s, %s", choice.preset, choice.reason)
    return OpenModel(name=name, checkpoint=checkpoint, tokenizer=checkpoint.tokenizer())


def start_model(opened: OpenModel, weights: DecoderWeights, config: EngineConfig) -> LoadedModel:
    """The last part of :func:`load_model`: an engine. Several engines, each with its own KV
    format and pool, may share the weights of a model."""
    model = opened.config
    spec = _kv_spec(config, model)
    spec.check(model.kv_shape)
    size = cache_size(config, spec, model)
    session_len = _session_len(config, model, size)
    step_tokens = config.max_prefill_token_num
    pages = size.num_pages, size.num_recent
    memory = make_memory(config.backend, spec, model.kv_shape, *pages, step_tokens)
    backend = make_backend(config.backend, memory, _threads(config))
    engine = Engine(
        _decoder(config, model, weights, session_len),
        backend,
        memory,
        vocab_size=model.vocab_size,
        session_len=session_len,
        max_batch_size=config.max_batch_size,
        max_step_tokens=step_tokens,
        prefix_caching=config.enable_prefix_caching,
        check=config.check,
    )
    return LoadedModel(
        name=opened.name,
        engine=engine,
        tokenizer=opened.tokenizer,
        config=model,
        kv_spec=spec,
        cache=size,
    )


def load_model(name: str, config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Find, read and start a model.

    Args:
        name: see :func:`kvant.loading.resolve.resolve_model`.
        config: the engine's options.
        progress: called with (layers read, layers in all).

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: the options do not fit it or the machine.
    """
    opened = open_model(name, config)
    return start_model(opened, opened.weights(config, progress), config)
