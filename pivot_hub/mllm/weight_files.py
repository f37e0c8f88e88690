"""Read single tensors of a model's safetensors files, in a folder or on the Hub, without the rest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, HfFileSystem, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils.hub import cached_file

from pivot_hub.encoder.modeling_pivot import refuse_pickles
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.provenance import hub_commit

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# Types of safetensors, see https://huggingface.co/docs/safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # types that no quantisation is behind
LONGEST_HEADER = 100_000_000  # bytes; the same limit as in the safetensors library
Progress = Callable[[int, int], None]  # takes the bytes read, and the bytes to read
GAP, RUN = 1_000_000, 256_000_000  # bytes: tensors that lie closer are read at once, up to a run of this length


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file.

    Args:
        dtype: Type of its values; None for one that torch does not have, such as 4-bit floats.
        shape: Shape.
        start: First byte in the file.
        end: Byte after its last.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFiles:
    """The safetensors files of a model, of which only headers and the tensors asked for are read.

    Args:
        name: Folder or Hub name of the model.
        revision: Revision of the Hub repository.

    Attributes:
        commit: Commit of the Hub repository; None for a folder.
        bytes_read: Bytes read so far, without those of the index.
        total_bytes: Bytes of all weight files.

    Raises:
        CheckpointError: There is no such model, or its weights are not safetensors; the message names the remedy.
    """

    def __init__(self, name: str | Path, revision: str | None = None) -> None:
        self.name, self.commit, self.bytes_read = str(name), None, 0
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self._folder = Path(name) if Path(name).is_dir() else None
        if self._folder is not None:
            try:
                refuse_pickles(self._folder)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            self._sizes = _sizes(self._folder)
        else:
            self.commit, self._sizes = self._list_hub(revision)
        # transformers, too, reads the one file where both are there.
        self._index = None if WHOLE in self._sizes else self._read_index()
        names = set(self._sizes) if self._index is None else set(self._index.values())
        self.total_bytes = sum(self._sizes.get(file, 0) for file in names)

    def _list_hub(self, revision: str | None) -> tuple[str | None, dict[str, int]]:
        """Return commit and sizes of the safetensors files of a Hub repository, or of what the cache has of it."""
        try:
            info = HfApi().model_info(self.name, revision=revision, files_metadata=True)
        except (HfHubHTTPError, OSError, ValueError) as error:
            cached = try_to_load_from_cache(self.name, "config.json", revision=revision)
            if not isinstance(cached, str):
                raise CheckpointError(f"{self.name}: {loading_problem(self.name, error)}.") from error
            self._folder = Path(cached).parent
            return hub_commit(self._folder), _sizes(self._folder)
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or []}
        weights = {file: size for file, size in sizes.items() if file.endswith(".safetensors") and "/" not in file}
        if not weights:
            kind = "only as pickles" if any(file.endswith((".bin", ".pt", ".pth")) for file in sizes) else "not at all"
            raise CheckpointError(
                f"{self.name}: holds weights {kind}; give a revision with safetensors, or convert them where you "
                "trust them."
            )
        return info.sha, weights

    def _read_index(self) -> dict[str, str] | None:
        """Return the file of each tensor as the index says; None where all tensors are in one file."""
        if self._folder is not None:
            path = self._folder / INDEX
            if not path.is_file():
                return None
        else:
            try:
                found = cached_file(self.name, INDEX, revision=self.commit, _raise_exceptions_for_missing_entries=False)
            except LOADING_ERRORS as error:
                raise CheckpointError(f"{self.name}: {loading_problem(self.name, error)}.") from error
            if found is None:
                return None
            path = Path(found)
        try:
            index = json.loads(path.read_text())["weight_map"]
            return {str(key): str(file) for key, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.name}: {INDEX} is damaged; download it again.") from error

    def keys(self) -> list[str]:
        """List the names of all tensors."""
        if self._index is not None:
            return list(self._index)
        return [key for file in self._whole_files() for key in self._header(file)]

    def _whole_files(self) -> list[str]:
        """List the files that hold the weights where there is no index."""
        return [WHOLE] if WHOLE in self._sizes else sorted(f for f in self._sizes if f.startswith("model"))

    def describe(self, keys: Iterable[str]) -> dict[str, StoredTensor]:
        """Return type and shape of tensors by their names; only headers are read.

        Raises:
            CheckpointError: A file is missing or damaged, or does not hold what the index says.
        """
        return {key: stored for _, tensors in self._by_file(keys).items() for key, stored in tensors.items()}

    def _by_file(self, keys: Iterable[str]) -> dict[str, dict[str, StoredTensor]]:
        """Group tensors by their file, each file's in the order of their bytes."""
        grouped: dict[str, dict[str, StoredTensor]] = {}
        for key in keys:
            if self._index is None:
                file = next((f for f in self._whole_files() if key in self._header(f)), None)
            else:
                file = self._index.get(key)
            if file is None or file not in self._sizes:
                raise CheckpointError(
                    f"{self.name}: {file or key} is missing; the download stopped half-way, run it again."
                )
            header = self._header(file)
            if key not in header:
                raise CheckpointError(
                    f"{self.name}: {INDEX} says that {key} is in {file}, which does not hold it; download both again."
                )
            grouped.setdefault(file, {})[key] = header[key]
        return {f: dict(sorted(tensors.items(), key=lambda kv: kv[1].start)) for f, tensors in grouped.items()}

    def read(self, keys: Iterable[str], progress: Progress = lambda done, total: None) -> dict[str, Any]:
        """Read tensors by their names.

        Args:
            keys: Names of the tensors.
            progress: Function that is called after each read, with the bytes read and the bytes to read.

        Raises:
            CheckpointError: A file is missing, cut off or damaged, or the Hub is out of reach.
        """
        tensors: dict[str, Any] = {}
        files = self._by_file(keys)
        total = sum(entry.end - entry.start for stored in files.values() for entry in stored.values())
        done = 0
        for file, stored in files.items():
            for key, entry in stored.items():
                if entry.dtype is None:
                    raise CheckpointError(f"{self.name}: {key} is stored in a type that torch does not have.")
                if entry.end == entry.start:
                    tensors[key] = torch.empty(entry.shape, dtype=entry.dtype)
            with self._open(file) as opened:
                for run in _runs({k: entry for k, entry in stored.items() if entry.end > entry.start}):
                    start, end = stored[run[0]].start, max(stored[key].end for key in run)
                    content = bytearray(self._read_range(opened, file, start, end))
                    done += sum(stored[key].end - stored[key].start for key in run)
                    progress(done, total)
                    for key in run:
                        entry = stored[key]
                        values = torch.frombuffer(content, dtype=torch.uint8)[entry.start - start : entry.end - start]
                        # A copy of its own, so that no tensor keeps the bytes of its neighbours in memory.
                        tensors[key] = values.clone().view(entry.dtype or torch.uint8).reshape(entry.shape)
        return tensors

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._headers:
            if file not in self._sizes:
                raise CheckpointError(f"{self.name}: {file} is missing; the download stopped half-way, run it again.")
            with self._open(file) as opened:
                length = int.from_bytes(self._read_range(opened, file, 0, 8), "little")
                if not 2 <= length <= min(LONGEST_HEADER, self._sizes[file] - 8):
                    raise CheckpointError(f"{self.name}: {file} is not a whole safetensors file; download it again.")
                text = self._read_range(opened, file, 8, 8 + length)
            try:
                self._headers[file] = _parse(text, 8 + length, self._sizes[file])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise CheckpointError(
                    f"{self.name}: the header of {file} is damaged ({error}); download it again."
                ) from error
        return self._headers[file]

    def _open(self, file: str) -> AbstractContextManager[Any]:
        """Open a file for reading ranges: in the folder, in the Hub's cache, or on the Hub."""
        if self._folder is not None:
            return (self._folder / file).open("rb")
        cached = try_to_load_from_cache(self.name, file, revision=self.commit)
        if isinstance(cached, str):
            return Path(cached).open("rb")
        try:
            opened: AbstractContextManager[Any] = HfFileSystem().open(
                f"{self.name}@{self.commit}/{file}", "rb", cache_type="none", size=self._sizes[file]
            )
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise CheckpointError(f"{self.name}: {file}: {loading_problem(self.name, error)}.") from error
        return opened

    def _read_range(self, opened: Any, file: str, start: int, end: int) -> bytes:
        try:
            opened.seek(start)
            content: bytes = opened.read(end - start)
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise CheckpointError(f"{self.name}: {file}: {loading_problem(self.name, error)}.") from error
        if len(content) != end - start:
            raise CheckpointError(f"{self.name}: {file} is cut off; download it again.")
        self.bytes_read += len(content)
        return content


def _sizes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_size for f in folder.glob("*.safetensors") if f.is_file()}


def _parse(text: bytes, offset: int, size: int) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Args:
        text: The header, JSON.
        offset: First byte of the tensors in the file.
        size: Size of the file in bytes.
    """
    tensors = {}
    for key, entry in json.loads(text).items():
        if key == "__metadata__":
            continue
        dtype, shape = DTYPES.get(str(entry["dtype"])), tuple(map(int, entry["shape"]))
        start, end = (offset + int(place) for place in entry["data_offsets"])
        fits = dtype is None or end - start == math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or not offset <= start <= end or not fits:
            raise ValueError(f"{key} has another size than its shape")
        if end > size:
            raise ValueError(f"{key} ends after the file")
        tensors[key] = StoredTensor(dtype, shape, start, end)
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
    for (_, before), (key, entry) in pairwise(ordered):
        if entry.start < before.end:
            raise ValueError(f"{key} overlaps another tensor")
    return tensors


def widest_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """Return the narrowest type that holds the values of floating-point tensors of different types; float32 of none."""
    widest: torch.dtype | None = None
    for dtype in {entry.dtype for entry in stored}:
        if dtype in FLOATS:
            widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return torch.float32 if widest is None else widest


def _runs(stored: dict[str, StoredTensor]) -> list[list[str]]:
    """Join neighbouring tensors of one file, which are in the order of their bytes, into runs that are read at once."""
    runs: list[list[str]] = []
    for key, entry in stored.items():
        last = stored[runs[-1][-1]] if runs else None
        if last is not None and entry.start - last.end <= GAP and entry.end - stored[runs[-1][0]].start <= RUN:
            runs[-1].append(key)
        else:
            runs.append([key])
    return runs
