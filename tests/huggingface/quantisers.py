"""Matrices quantised by plain formulas: the tensors that a library writes, and the numbers that they stand for.

Each function takes a name and a float32 matrix [out, in], and returns ({last part of the name: array}, the numbers).
"""

import json

import ml_dtypes
import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
NF4 = np.array(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0], np.float32)  # fmt: skip


def grouped(matrix, bits, group, dtype, symmetric, order=None):
    """Codes [out, in], scales and zero points [out, groups] of round-to-nearest, and the group of each column."""
    rows, columns = matrix.shape
    groups = np.arange(columns) // group if order is None else order
    top, count = 2**bits - 1, columns // group
    scale, zero = np.empty((rows, count), dtype), np.empty((rows, count), np.int64)
    codes = np.empty(matrix.shape, np.int64)
    for g in range(count):
        part = matrix[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale[:, g] = ((high - low) / top).astype(dtype)
        step = scale[:, g].astype(np.float32)
        zero[:, g] = (top + 1) // 2 if symmetric else np.clip(np.round(-low / step), 0, top)
        codes[:, groups == g] = np.clip(np.round(part / step[:, None]) + zero[:, g : g + 1], 0, top)
    numbers = (codes - zero[:, groups]).astype(dtype) * scale[:, groups]
    assert numbers.dtype == dtype
    return codes, scale, zero, groups, numbers


def words(codes, bits, axis, order=None):
    """Codes in 32-bit words along an axis, one word after the other; `order[i]` is the code of the i-th place."""
    each = 32 // bits
    moved = np.moveaxis(codes, axis, -1)
    moved = np.pad(moved, ((0, 0), (0, -moved.shape[1] % each)))
    out = np.zeros((moved.shape[0], moved.shape[1] // each), np.uint64)
    for word in range(out.shape[1]):
        for place in range(each):
            code = moved[:, word * each + (place if order is None else order[place])]
            out[:, word] |= code.astype(np.uint64) << np.uint64(place * bits)
    return np.moveaxis(out.astype(np.uint32).view(np.int32), -1, axis)


def gptq(bits=4, group=16, symmetric=True, act_order=False, version=1, dtype="float16"):
    def quantise(name, matrix):
        columns = matrix.shape[1]
        order = np.random.default_rng(3).permutation(np.arange(columns) // group) if act_order else None
        codes, scale, zero, groups, numbers = grouped(matrix, bits, group, np.dtype(dtype), symmetric, order)
        stored = words(zero.T, bits, 1)
        if version == 1:  # as GPTQModel: one less, from the whole word
            ones = sum(1 << place for place in range(0, 32, bits))
            stored = (stored.view(np.uint32) - np.uint32(ones)).view(np.int32)
        parts = {"qweight": words(codes.T, bits, 0), "qzeros": stored, "scales": scale.T, "g_idx": groups.astype("i4")}
        return parts, numbers

    return quantise


def awq(group=16, dtype="float16"):
    def quantise(name, matrix):
        codes, scale, zero, _, numbers = grouped(matrix, 4, group, np.dtype(dtype), symmetric=False)
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {
            "qweight": words(codes.T, 4, 1, order),
            "qzeros": words(zero.T, 4, 1, order),
            "scales": scale.T,
        }, numbers

    return quantise


def packed_integers(bits=4, group=16, symmetric=True, dtype="bfloat16"):
    """compressed-tensors' pack-quantized."""

    def quantise(name, matrix):
        size = group or matrix.shape[1]
        codes, scale, zero, _, numbers = grouped(matrix, bits, size, np.dtype(dtype), symmetric)
        shape = np.array(matrix.shape, np.int64)
        parts = {"weight_packed": words(codes, bits, 1), "weight_scale": scale, "weight_shape": shape}
        return parts | ({} if symmetric else {"weight_zero_point": words(zero, bits, 0)}), numbers

    return quantise


def plain_integers(group=None, dtype="bfloat16", symmetric=True):
    """compressed-tensors' int-quantized: int8 by row."""

    def quantise(name, matrix):
        codes, scale, zero, _, numbers = grouped(matrix, 8, group or matrix.shape[1], np.dtype(dtype), symmetric)
        parts = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale}
        return parts | ({} if symmetric else {"weight_zero_point": (zero - 128).astype(np.int8)}), numbers

    return quantise


def float8(by, dtype="bfloat16", block=(16, 16)):
    """compressed-tensors' float-quantized: a scale for the matrix, each row, or each block."""

    def quantise(name, matrix):
        rows, columns = matrix.shape
        size = {"tensor": (rows, columns), "channel": (1, columns), "block": block}[by]
        grid = [-(-rows // size[0]), -(-columns // size[1])]
        scale = np.empty(grid, dtype)
        spread = np.empty(matrix.shape, dtype)
        for i, j in np.ndindex(*grid):
            part = np.s_[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            scale[i, j] = np.abs(matrix[part]).max() / 448
            spread[part] = scale[i, j]
        codes = (matrix / spread.astype(np.float32)).astype(ml_dtypes.float8_e4m3fn)
        parts = {"weight": codes, "weight_scale": scale.reshape(1) if by == "tensor" else scale}
        return parts, (codes.astype(np.float32) * spread.astype(np.float32)).astype(dtype)

    return quantise


def fp4_codes(values):
    nearest = np.abs(np.abs(values)[..., None] - FP4).argmin(-1)
    return (nearest + 8 * (values < 0)).astype(np.uint8)


def fp4_numbers(codes):
    return np.where(codes >= 8, -FP4[codes % 8], FP4[codes % 8]).astype(np.float32)


def fp4_bytes(codes):
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def nvfp4(kind):
    """compressed-tensors' nvfp4-pack-quantized, or ModelOpt's NVFP4."""

    def quantise(name, matrix):
        rows, columns = matrix.shape
        blocks = matrix.reshape(rows, columns // 16, 16)
        factor = np.float32(448 * 6 / np.abs(matrix).max())
        scale = (np.abs(blocks).max(-1) / 6 * factor).astype(ml_dtypes.float8_e4m3fn)
        whole = scale.astype(np.float32) / factor
        if kind == "modelopt":
            whole = scale.astype(np.float32) * np.float32(1 / factor)
        codes = fp4_codes(blocks / np.maximum(whole, 1e-30)[..., None])
        numbers = (fp4_numbers(codes) * whole[..., None]).reshape(matrix.shape)
        packed = fp4_bytes(codes.reshape(matrix.shape))
        if kind == "modelopt":
            second = np.array(1 / factor, np.float32)
            parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": second}
            return parts, numbers
        parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": np.array([factor], np.float32)}
        return parts, numbers.astype("bfloat16")

    return quantise


def mx_parts(matrix):
    """Codes [..., in / 32, 32], exponents [..., in / 32] and numbers of MXFP4."""
    blocks = matrix.reshape(*matrix.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.maximum(np.abs(blocks).max(-1), 1e-30) / 6)) + 1
    codes = fp4_codes(blocks / 2.0 ** exponent[..., None])
    numbers = (fp4_numbers(codes) * 2.0 ** exponent[..., None]).reshape(matrix.shape)
    return codes, (exponent + 127).astype(np.uint8), numbers.astype("bfloat16")


def mxfp4(name, matrix):
    """compressed-tensors' mxfp4-pack-quantized."""
    codes, exponents, numbers = mx_parts(matrix)
    return {"weight_packed": fp4_bytes(codes.reshape(matrix.shape)), "weight_scale": exponents}, numbers


def four_bits(nested=False, size=64, dtype="bfloat16", storage="uint8"):
    """bitsandbytes' nf4."""

    def quantise(name, matrix):
        flat = matrix.reshape(-1)
        blocks = np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
        absmax = np.abs(blocks).max(1).astype(np.float32)
        codes = np.abs((blocks / absmax[:, None])[..., None] - NF4).argmin(-1).reshape(-1)[: len(flat)]
        state = {"quant_type": "nf4", "blocksize": size, "dtype": dtype, "shape": list(matrix.shape)}
        parts = {}
        if nested:
            offset = float(absmax.mean())
            table = np.linspace(-1, 1, 256).astype(np.float32)
            second = np.abs(absmax - np.float32(offset)).max().reshape(1)
            nearest = np.abs((absmax - np.float32(offset))[:, None] / second - table).argmin(1).astype(np.uint8)
            absmax = table[nearest] * second + np.float32(offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts = {"weight.nested_absmax": second, "weight.nested_quant_map": table}
        numbers = NF4[codes] * np.repeat(absmax, size)[: len(flat)]
        pairs = np.pad(codes, (0, len(codes) % 2)).astype(np.uint8)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts |= {
            "weight": ((pairs[0::2] << 4) | pairs[1::2]).view(storage)[:, None],
            "weight.absmax": nearest if nested else absmax,
            "weight.quant_map": NF4,
            "weight.quant_state.bitsandbytes__nf4": text,
        }
        return parts, numbers.reshape(matrix.shape).astype(dtype)

    return quantise


def rows_of_int8(name, matrix):
    """bitsandbytes' int8."""
    scale = np.abs(matrix).max(1).astype(np.float32)
    codes = np.round(matrix * (127 / scale)[:, None]).astype(np.int8)
    numbers = codes.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)
    return {"weight": codes, "SCB": scale, "weight_format": np.array(0, np.uint8)}, numbers
