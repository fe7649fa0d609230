"""Golden vectors: what the published code computes with weights and inputs that a rule makes from their names.

`tests/golden/*.json` describe a case (official state-dict keys and shapes, input, outputs), `*.npz` hold the outputs. A value depends on
nothing but (salt, name, shape): Philox's raw 64-bit stream, keyed with a hash of the name, integer sums, and IEEE arithmetic.
"""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def cases(prefix: str) -> list[str]:
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}*.json"))


def unit_noise(name: str, shape: list[int], salt: int = 0) -> np.ndarray:
    """Mean 0, variance 1: the sum of four 16-bit uniforms."""
    key = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "little")
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.random.Philox(key=key).random_raw(max(count, 1))[:count]
    total = sum(((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    return ((total - 131070) / 37837.2271866).reshape(shape)


def weight(key: str, shape: list[int], dtype: str) -> Tensor:
    """Value of the official state-dict entry `key`; the last parts of the key set its scale."""
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    noise = unit_noise(key, shape)
    if leaf in ("running_mean", "bias"):
        noise = 0.1 * noise
    elif leaf == "running_var":
        noise = 1.0 + 0.25 * np.abs(noise)
    elif leaf == "rpe_table":
        noise = 0.5 * noise
    elif len(shape) <= 1:
        noise = 1.0 + 0.1 * noise
    else:
        damped = "conv_offset_q.3." in key or "pos_embed" in key
        sharp = any(part in key for part in ("qkv", "proj_q", "proj_k"))
        gain = 0.3 if damped else 2.0 if sharp else 1.0
        noise = gain * noise / float(np.prod(shape[1:], dtype=np.int64)) ** 0.5
    return torch.from_numpy(noise.astype("float32").astype(dtype))


def image(name: str, shape: list[int], salt: int) -> Tensor:
    """Coarse 8x8 blocks plus half-strength noise, (B, C, H, W) float32."""
    batch, channels, height, width = shape
    coarse = unit_noise("coarse:" + name, [batch, channels, 8, 8], salt)
    rows, cols = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    return torch.from_numpy((coarse[:, :, rows][:, :, :, cols] + 0.5 * unit_noise("fine:" + name, shape, salt)).astype("float32"))


@functools.lru_cache(maxsize=2)
class Golden:
    def __init__(self, case: str) -> None:
        self.meta = json.loads((FOLDER / f"{case}.json").read_text())
        self.arrays = np.load(FOLDER / f"{case}.npz")

    @functools.cached_property
    def state_dict(self) -> dict[str, Tensor]:
        """The synthetic checkpoint, with the published names and shapes, checked against its recorded hash."""
        tensors = {key: weight(key, shape, dtype) for key, shape, dtype, _ in self.meta["state_dict"]}
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()
        assert digest == self.meta["weights"]["sha256_of_all_tensors_in_order"]
        return tensors

    def input(self) -> Tensor:
        spec = self.meta["input"]
        if "salts" in spec:
            return torch.cat([image(spec["name"], [1, *spec["shape"][1:]], salt) for salt in spec["salts"]])
        return image(spec["name"], spec["shape_nchw"], spec["salt"])

    def cotangent(self) -> Tensor:
        spec = self.meta["cotangent"]
        return image(spec["name"], spec["shape_nchw"], spec["salt"])

    def error(self, name: str, got: Tensor, precision: str = "") -> float:
        """Worst error of an array against the recorded one, relative to its standard deviation (or norm, for the sum over everything)."""
        recorded = self.meta["outputs"][name]
        value = got.detach().double().numpy()
        assert list(value.shape) == recorded["shape"]
        limit = recorded["subsample_limit"]
        flat = np.ascontiguousarray(value).reshape(-1)
        part = flat[:: max(1, flat.size // limit) | 1] if limit else value
        probe = abs(float((value * unit_noise("probe", value.shape)).sum()) - recorded["probe"])
        # Gradients that are zero in exact arithmetic (key biases) are compared absolutely.
        std, norm = (1.0, 1.0) if recorded["l2"] < 1e-8 else (recorded["std"], recorded["l2"])
        return max(float(np.abs(part - self.arrays[name + precision]).max()) / std, probe / norm)

    def noise(self, name: str) -> float:
        """Error of the published code's own float32 run, in the units of `error`."""
        recorded = self.meta["outputs"][name]
        return recorded["official_fp32_vs_fp64_max_abs"] / recorded["std"]
