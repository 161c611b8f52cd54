"""Dequantised values next to those of the libraries that write quantised folders, bit for bit.

    pip install compressed-tensors bitsandbytes     # in an environment of its own, with torch and transformers
    python benchmarks/quantised.py [--autoawq FOLDER]

Each library quantises a random matrix and dequantises it; a folder with its tensors is read by this package. AutoAWQ is
given as its unpacked source, of which one function is used.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qwen_moe_jax.huggingface.files import open_files
from qwen_moe_jax.huggingface.quantised.method import opener_of
from tests.huggingface import quantisers

ROWS, COLUMNS = 96, 256
MATRIX = (np.random.default_rng(0).standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)


def compare(name: str, stored: Mapping[str, torch.Tensor], config: Mapping, theirs: torch.Tensor) -> None:
    """Prints whether this package reads the same values, in the same dtype."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({f"m.{part}": tensor.contiguous() for part, tensor in stored.items()}, f"{folder}/model.safetensors")
        tensors, problems = opener_of({"quantization_config": config}, "config")(open_files(Path(folder)).tensors)
        assert not problems, problems
        ours = tensors["m.weight"].read()
    theirs = theirs.detach().contiguous()
    same_dtype = str(theirs.dtype) == f"torch.{ours.dtype.name}"
    same = same_dtype and theirs.view(torch.uint8).numpy().tobytes() == ours.tobytes()
    print(f"{name:<44}{ours.dtype.name:<10}{'bit for bit' if same else 'DIFFERENT'}")


def compressed_tensors(layout: str, dtype: torch.dtype = torch.bfloat16, **settings) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    own = QuantizationArgs(**settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=own)
    compressor = BaseCompressor.get_value_from_registry(layout)
    weight = torch.from_numpy(MATRIX).to(dtype)
    strategy = settings["strategy"]
    high, wide = {"tensor": (ROWS, COLUMNS), "channel": (1, COLUMNS)}.get(strategy, (1, own.group_size))
    high, wide = own.block_structure or (high, wide)
    blocks = weight.float().reshape(ROWS // high, high, COLUMNS // wide, wide).abs().amax((1, 3))
    given = {"weight": weight}
    if layout.startswith("nvfp4"):
        factor = torch.tensor([448 * 6 / float(weight.abs().max())])
        given |= {
            "weight_scale": (blocks / 6 * factor).to(torch.float8_e4m3fn).to(dtype),
            "weight_global_scale": factor,
        }
    elif layout.startswith("mxfp4"):
        given["weight_scale"] = (2.0 ** torch.floor(torch.log2(blocks / 6) + 1)).to(dtype)
    else:
        largest = 448 if own.type == "float" else (2**own.num_bits - 1) / 2
        given["weight_scale"] = (blocks / largest).to(dtype)
    if strategy == "tensor":
        given["weight_scale"] = given["weight_scale"].reshape(1)
    if not own.symmetric:
        zeros = np.random.default_rng(1).integers(-3, 3, tuple(given["weight_scale"].shape))
        given["weight_zero_point"] = torch.from_numpy(zeros).to(torch.int8)
    stored = compressor.compress(given, scheme)
    theirs = compressor.decompress({name: tensor.clone() for name, tensor in stored.items()}, scheme)["weight"]
    groups = {"group_0": {"weights": json.loads(own.model_dump_json())}}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
    kind = f"{settings.get('type', 'int')}{own.num_bits} {strategy}"
    compare(f"{layout}, {kind}{'' if own.symmetric else ', zero points'}", stored, config, theirs)


def bitsandbytes(kind: str, nested: bool, dtype: torch.dtype) -> None:
    import bitsandbytes as library
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    layer = library.nn.Linear4bit(COLUMNS, ROWS, bias=False, quant_type=kind, compress_statistics=nested)
    given = torch.from_numpy(MATRIX).to(dtype)
    layer.weight = library.nn.Params4bit(given, requires_grad=False, quant_type=kind, compress_statistics=nested)
    layer = layer.to("cpu")
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    name = f"bitsandbytes, {kind}{', nested' if nested else ''}, {dtype}"
    compare(name, layer.state_dict(), config, dequantize_bnb_weight(layer.weight))


def bitsandbytes_int8() -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scales, _ = int8_vectorwise_quant(torch.from_numpy(MATRIX).half())
    stored = {"weight": codes, "SCB": scales}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    compare("bitsandbytes, int8", stored, config, int8_vectorwise_dequant(codes, scales))


def autoawq(folder: Path) -> None:
    functions: dict = {}
    exec((folder / "awq/utils/packing_utils.py").read_text(), functions)
    stored = {name: torch.from_numpy(np.array(part)) for name, part in quantisers.awq(64)("", MATRIX)[0].items()}
    theirs = functions["dequantize_gemm"](stored["qweight"], stored["qzeros"], stored["scales"], 4, 64).T
    compare("AutoAWQ, gemm", stored, {"quant_method": "awq", "bits": 4}, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoawq", type=Path)
    arguments = parser.parse_args()
    for symmetric in (True, False):
        compressed_tensors("int-quantized", num_bits=8, strategy="channel", symmetric=symmetric)
        for bits in (2, 4, 8):
            compressed_tensors("pack-quantized", num_bits=bits, strategy="group", group_size=32, symmetric=symmetric)
        compressed_tensors("pack-quantized", torch.float16, num_bits=4, strategy="channel", symmetric=symmetric)
    for strategy in ("tensor", "channel", "block"):
        block = [32, 64] if strategy == "block" else None
        compressed_tensors("float-quantized", num_bits=8, type="float", strategy=strategy, block_structure=block)
    compressed_tensors("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16)
    compressed_tensors("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32)
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                bitsandbytes(kind, nested, dtype)
    bitsandbytes_int8()
    if arguments.autoawq is not None:
        autoawq(arguments.autoawq)


if __name__ == "__main__":
    main()
