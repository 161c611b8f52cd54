"""A checkpoint → a GGUF file, block by block. The gguf library (extra `gguf`) writes the header, this file the tensors.

Architectures: Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE, Mixtral as "llama" with experts, Qwen3-Next and Qwen3.5. What
llama.cpp's graph of an architecture cannot express is refused by the field's name.
"""

import dataclasses
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_moe_jax.config import DTypeLike, ModelConfig
from qwen_moe_jax.config.checks import dtype_name
from qwen_moe_jax.errors import CheckpointError, ConfigError
from qwen_moe_jax.huggingface.checkpoint import open_checkpoint, problems_of, require_no_problems
from qwen_moe_jax.huggingface.convert import abstract_model
from qwen_moe_jax.huggingface.fields import read_json
from qwen_moe_jax.huggingface.gguf.metadata import add_metadata, architecture_of
from qwen_moe_jax.huggingface.gguf.tensors import gguf_tensors
from qwen_moe_jax.huggingface.gguf.tokenizer import Vocabulary, read_vocabulary
from qwen_moe_jax.huggingface.hub import local_folder
from qwen_moe_jax.huggingface.peft import merged, open_adapter
from qwen_moe_jax.huggingface.tensors import hub_parameters
from qwen_moe_jax.huggingface.unused_fields import say_once
from qwen_moe_jax.storage.prefetch import prefetch
from qwen_moe_jax.storage.progress import bytes_bar
from qwen_moe_jax.storage.tensor import StoredTensor, blocks
from qwen_moe_jax.text_files import read_text

if TYPE_CHECKING:
    import gguf

_DTYPES = ("float32", "bfloat16", "float16")
_BLOCK, _ALIGNMENT = 64 << 20, 32
#: What every GGUF file begins with.
_MAGIC = b"GGUF"


def export_gguf(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    adapter: str | PathLike[str] | None = None,
    verify: bool = False,
    replace: bool = False,
) -> None:
    """Writes a checkpoint as one GGUF file, under a temporary name that is renamed when it is complete.

    Args:
        source: a folder that `from_pretrained` reads, or a name on the Hub.
        target: the file.
        dtype: of the matrices: float32, bfloat16 or float16; None keeps the checkpoint's. Vectors and routers are
            float32.
        adapter: a folder of low-rank adapters in PEFT's layout, added to the weights.
        verify: read the file back with the gguf library, and compare every tensor bit for bit.
        replace: replace a GGUF file that is there; a file of another kind is never replaced.

    Raises:
        ConfigError: the gguf library is missing; a model that llama.cpp's architectures cannot express.
        CheckpointError: the folder does not load; the file is there, or differs from what was written.
    """
    target = Path(target).absolute()
    target = Path(target).absolute()
    _require_target(target, replace=replace)
    _require_library()
    dtype = None if dtype is None else dtype_name("dtype", dtype)
    checkpoint = open_checkpoint(local_folder(source, drop_mtp=True), drop_mtp=True)
    architecture = architecture_of(checkpoint)
    require_no_problems(checkpoint.folder, problems_of(checkpoint, hub_parameters(abstract_model(checkpoint))))
    if adapter is not None:
        checkpoint = merged(checkpoint, open_adapter(adapter, checkpoint.config))
    matrices = dtype or checkpoint.config.dtype or "float32"
    if matrices not in _DTYPES:
        raise ConfigError(f"dtype={matrices} is not supported in GGUF: expected one of {', '.join(_DTYPES)}.")
    config = dataclasses.replace(checkpoint.config, dtype=matrices)
    interleaved = architecture == "llama"
    tensors = gguf_tensors(checkpoint.tensors, config, matrices, interleaved=interleaved)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        _write_header(partial, architecture, config, checkpoint.folder, tensors)
        _append_tensors(partial, tensors)
        if verify:
            _require_same(partial, target, tensors)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _require_target(target: Path, *, replace: bool) -> None:
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder: expected the name of a file, as model.gguf.")
    if not target.exists():
        return
    with target.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise CheckpointError(f"{target} is there and is no GGUF file: give another name, or delete it.")
    if not replace:
        raise CheckpointError(f"{target} is there, and is not replaced unasked: with --replace (replace=True) it is.")


def _require_library() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ConfigError(
            "GGUF files are written with the gguf library, which is not installed: pip install gguf (the extra `gguf`)."
        ) from None


def _write_header(
    path: Path, architecture: str, config: ModelConfig, folder: Path, tensors: Mapping[str, StoredTensor]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(None, architecture)
    add_metadata(writer, config, folder)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    if isinstance(vocabulary, str):
        say_once(f"{folder}: the GGUF file has no tokenizer: {vocabulary}.")
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, vocabulary, config, folder)
    kinds = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16}
    kinds["bfloat16"] = gguf.GGMLQuantizationType.BF16
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.uint16), tensor.nbytes, kinds[tensor.dtype])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add_vocabulary(writer: "gguf.GGUFWriter", vocabulary: Vocabulary, config: ModelConfig, folder: Path) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id:
        writer.add_eos_token_id(config.eos_token_id[0])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    writer.add_add_bos_token(bool(settings.get("add_bos_token", vocabulary.model == "llama")))
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _append_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Each tensor begins at a multiple of the alignment behind the header."""
    parts = (
        (tensor, block, number == 0)
        for tensor in tensors.values()
        for number, block in enumerate(blocks(tensor.shape, np.dtype(tensor.dtype).itemsize, _BLOCK))
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    with open(path, "ab") as file, bytes_bar(f"Writing {path.name}", total) as advance:

        def read(part) -> tuple[np.ndarray, bool]:
            tensor, block, begins = part
            return tensor.read(block), begins

        for values, begins in prefetch(read, parts):
            if begins:
                file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(values.reshape(-1).view(np.uint8).data)
            advance(values.nbytes)
        file.write(bytes(-file.tell() % _ALIGNMENT))


def _require_same(path: Path, shown: Path, tensors: Mapping[str, StoredTensor]) -> None:
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    wrong = sorted(tensors.keys() ^ found.keys())
    for name in tensors.keys() & found.keys():
        stored, at = found[name].data.reshape(-1).view(np.uint8), 0
        for block in blocks(tensors[name].shape, np.dtype(tensors[name].dtype).itemsize, _BLOCK):
            values = tensors[name].read(block).reshape(-1).view(np.uint8)
            if stored[at : at + values.size].tobytes() != values.tobytes():
                wrong.append(name)
                break
            at += values.size
    if wrong:
        raise CheckpointError(
            f"{shown}: what was written differs from the checkpoint in {len(wrong)} tensors ({', '.join(wrong[:5])}); "
            "the file is not there. Check the disk, and write again."
        )
