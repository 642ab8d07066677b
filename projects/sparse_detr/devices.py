"""Where to compute and in which precision: names as configs and flags have them."""

from __future__ import annotations

import contextlib
import logging
import time

import torch

from .errors import UserError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str, key: str = "device") -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device; ``key`` is what the message calls it.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name if name != "auto" else "cuda" if gpus else "cpu")
    except RuntimeError:
        raise UserError(f"{key}={name}: expected auto, cuda, cuda:0 or cpu") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        seen = f"torch sees {gpus} GPUs" if gpus else "torch sees no GPU"
        raise UserError(f"{key}={name}, but {seen}: pass {key}=cpu")
    return device


def resolve_dtype(name: str | torch.dtype, device: torch.device, key: str = "dtype") -> torch.dtype:
    """The precision of that name for prediction on ``device``; "auto" is bfloat16 where the hardware
    multiplies in it, else float32, and is told in the log.

    Raises:
        UserError: there is no such precision, or not on this device; ``key`` is what the message calls it.
    """
    dtype = name if isinstance(name, torch.dtype) else DTYPES.get(name)
    if name == "auto":
        dtype = torch.bfloat16 if multiplies_in_bfloat16(device) else torch.float32
        logger.info("%s=auto: %s on this %s", key, str(dtype).removeprefix("torch."), device.type)
    if dtype not in DTYPES.values():
        raise UserError(f"{key}={name}: expected auto, {', '.join(DTYPES)}")
    assert dtype is not None
    if dtype == torch.float16 and device.type != "cuda":
        raise UserError(f"{key}=float16 needs a GPU, but the device is {device}: use bfloat16 or auto")
    return dtype


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for it; elsewhere it is computed by way of float32, and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        found = torch.cpu.get_capabilities()
        return any(found.get(unit, False) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def mixed_precision(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """``torch.autocast`` to ``dtype``; float32 is none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def clock(device: torch.device) -> float:
    """Seconds, of work that ``device`` has done: a GPU is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
