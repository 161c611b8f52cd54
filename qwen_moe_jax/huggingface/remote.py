"""Safetensors files on the Hub of which only the headers are fetched, by HTTP ranges."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from qwen_moe_jax.errors import CheckpointError
from qwen_moe_jax.huggingface.files import INDEX, SINGLE, Files, needed_files, open_indexed
from qwen_moe_jax.huggingface.hub import HubModel, download, explained
from qwen_moe_jax.storage.safetensors_file import read_header

#: Bytes of the first request: most headers are shorter (as in huggingface_hub's `parse_safetensors_file_metadata`).
_FIRST = 100_000
_THREADS, _SECONDS = 8, 30.0
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


class RemoteFile:
    """A file on the Hub, of which ranges are fetched when they are read.

    Attributes:
        path: its name.
        size: bytes.
        fetched: bytes that were fetched.
    """

    def __init__(self, model: HubModel, name: str):
        """Fetches the beginning.

        Raises:
            CheckpointError: the Hub does not give it.
            EntryNotFoundError: (huggingface_hub's) the model has no such file.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.path = PurePosixPath(name)
        self._model = model
        self._url = hf_hub_url(model.name, name, revision=model.revision)
        self._headers = build_hf_headers(token=model.token)
        self.size = self.fetched = 0
        self._first = self._fetch(0, _FIRST)

    def fill(self, data: np.ndarray, position: int) -> None:
        """Fills a uint8 array with the file's bytes from `position` on."""
        wanted = data.size
        if position + wanted <= len(self._first):
            found = self._first[position : position + wanted]
        else:
            found = self._fetch(position, wanted)
        if len(found) < wanted:
            raise CheckpointError(f"{self._model}: {self.path} ends before byte {position + wanted}.")
        data[...] = np.frombuffer(found, np.uint8, wanted)

    def view(self, position: int, size: int) -> np.ndarray:
        """So many bytes from `position` on, all of them fetched."""
        data = np.empty(size, np.uint8)
        self.fill(data, position)
        return data

    def _fetch(self, position: int, count: int) -> bytes:
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        wanted = {**self._headers, "Range": f"bytes={position}-{position + count - 1}"}
        with explained(self._model):
            response = http_backoff("GET", self._url, headers=wanted, timeout=_SECONDS)
            hf_raise_for_status(response)
        total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        self.size = int(total[1]) if total is not None else len(response.content)
        self.fetched += len(response.content)
        return response.content if total is not None else response.content[position : position + count]


def header_folder(model: HubModel) -> Path:
    """The model's folder in the cache, with its configs and the index of its weights."""
    return download(model, ("config.json", "generation_config.json", INDEX))


def remote_files(model: HubModel, folder: Path) -> tuple[Files, int] | None:
    """The tensors of a model on the Hub, and how many bytes of its files were fetched for it.

    Args:
        model: on the Hub.
        folder: its folder in the cache, of `header_folder`.

    Returns:
        None if it has no safetensors, or if all of them are in the folder.

    Raises:
        CheckpointError: the Hub cannot be reached.
    """
    from huggingface_hub.errors import EntryNotFoundError

    model = model.at(folder)
    is_sharded = (folder / INDEX).is_file()
    names = needed_files(folder / INDEX, drop_mtp=False) if is_sharded else [SINGLE]
    if all((folder / name).is_file() for name in names):
        return None

    def opened(name: str) -> RemoteFile | None:
        try:
            return RemoteFile(model, name)
        except EntryNotFoundError:
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        found = {name: file for name, file in zip(names, threads.map(opened, names), strict=True) if file is not None}
    if not is_sharded and not found:
        return None
    if is_sharded:
        files = open_indexed(folder / INDEX, lambda path: read_header(found[path.name]), is_there=found.__contains__)
    else:
        files = Files(*read_header(found[SINGLE]), is_remote=True)
    return files, sum(file.fetched for file in found.values())
