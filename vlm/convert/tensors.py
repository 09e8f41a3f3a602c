"""Named tensors on disk: read one at a time, written shard by shard, so that a model never lies in memory twice."""

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlm.errors import UserError, first_line

SINGLE = "model.safetensors"
ZIP = b"PK\x03\x04"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
Shape = tuple[int, ...]
# told after each shard: its number, how many there are, and the bytes of all shards written
Progress = Callable[[int, int, int], None]


class Tensors(Protocol):
    """Tensors by name. `shapes` is known without reading any of them."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def read(self, name: str) -> torch.Tensor: ...


class SafetensorsFiles:
    """The tensors of safetensors files, mapped into memory and read when asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shapes: dict[str, Shape] = {}
        self._home: dict[str, Path] = {}
        for path in paths:
            with opened(path) as file:
                for name in list(file.keys()):
                    if name in self._home:
                        raise UserError(f"{path}: holds {name}, and so does {self._home[name].name}")
                    self._home[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        # opened anew each time: a mapped file's pages count as memory of the process until it is closed
        with opened(self._home[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


class PickledTensors:
    """The tensors of one .bin or .pt file. Nothing but tensors and plain containers is ever unpickled."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                zipped = file.read(len(ZIP)) == ZIP  # torch before 1.6 wrote bare pickles, which can't be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except pickle.UnpicklingError:
            raise UserError(f"{path}: holds more than tensors, and such a pickle is never loaded") from None
        except Exception as error:  # torch fails in many ways on broken files
            raise UserError(f"{path}: no checkpoint that can be read safely ({first_line(error)})") from None
        if isinstance(loaded, dict) and isinstance(loaded.get("model_state_dict"), dict):
            loaded = loaded["model_state_dict"]
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
        ):
            raise UserError(f"{path}: not a mapping of names to tensors")
        if odd := [name for name, tensor in loaded.items() if tensor.layout != torch.strided]:
            raise UserError(f"{path}: {odd[0]} is a sparse tensor, and plain ones are needed; save it with to_dense()")
        self._tensors: dict[str, torch.Tensor] = loaded
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in loaded.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class Joined:
    """Several sources as one; a name that two of them have is the last one's."""

    def __init__(self, sources: Sequence[Tensors]) -> None:
        self._home = {name: source for source in sources for name in source.shapes}
        self.shapes: dict[str, Shape] = {name: home.shapes[name] for name, home in self._home.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._home[name].read(name)


class Renamed:
    """A source under other names; `names`: new name -> its own. What isn't named is left out."""

    def __init__(self, source: Tensors, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)
        self.shapes: dict[str, Shape] = {new: source.shapes[old] for new, old in names.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(self._names[name])


class Floats(Renamed):
    """A source under other names, of whose tensors each must hold floating-point numbers: UserError when one is read
    that doesn't."""

    def __init__(self, source: Tensors, names: Mapping[str, str], where: str) -> None:
        super().__init__(source, names)
        self._where = where

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{self._where}: {self._names[name]} holds {kind}, and floating-point numbers are needed")
        return tensor


class InMemory:
    """Tensors that are there already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as transformers chooses them: the one of the common name, or those that
    its index names (UserError where one is missing), or, without either, all. Others beside them are no part of it."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    return index_files(folder, INDEX) if (folder / INDEX).is_file() else sorted(folder.glob("*.safetensors"))


def index_files(folder: Path, name: str) -> list[Path]:
    """The files that an index of tensors names."""
    index = folder / name
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not an index of tensors (no weight_map in it)") from None
    if not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"{index}: not an index of tensors (its weight_map must give each a file's name)")
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise UserError(f"{folder}: {name} names {file}, which is not there")
    return [folder / file for file in files]


def opened(path: Path) -> Any:
    """safe_open, its many errors as one sentence."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the weights are cut off or broken ({first_line(error)})") from None


@dataclass(frozen=True)
class Shard:
    name: str
    tensors: tuple[str, ...]


def plan_shards(shapes: Mapping[str, Shape], itemsize: int, limit: int) -> list[Shard]:
    """Tensors in their order, cut into files of about `limit` bytes (a larger tensor is a file of its own)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_here = torch.Size(shape).numel() * itemsize
        if groups[-1] and size + bytes_here > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += bytes_here
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    total = len(groups)
    return [Shard(f"model-{n:05}-of-{total:05}.safetensors", tuple(group)) for n, group in enumerate(groups, 1)]


def write_tensors(folder: Path, source: Tensors, progress: Progress, limit: int = SHARD_BYTES) -> None:
    """Writes shards and their index, one shard in memory at a time; each tensor keeps its number format."""
    shards = plan_shards(source.shapes, 4, limit)
    total = 0
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        held = {name: source.read(name).detach().contiguous() for name in shard.tensors}
        save_file(held, folder / shard.name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in held.values())
        where.update(dict.fromkeys(shard.tensors, shard.name))
        del held
        progress(number, len(shards), total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
