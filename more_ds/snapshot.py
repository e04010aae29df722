"""A checkpoint in memory, and its way to the disk, on which no rank is spoken to: training may go on meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG, OPTIMIZER, STATE, name_of, rotate, to_json, write_folder
from more_ds.errors import TrainingError


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in memory: nothing that training does from here on changes it.

    Attributes:
        step: optimizer steps taken.
        tensors: of the adapter's file, whole, on the CPU.
        config: what `adapter_config.json` will be.
        moments: of the optimizer's file.
        record: of the state's file.
    """

    step: int
    tensors: Mapping[str, Tensor]
    config: bytes
    moments: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def write(self, folder: Path, *, keep: int = 2, protect: Iterable[Path] = ()) -> Path:
        """Write it, then remove old ones. On one rank, in any thread.

        It is read back and compared with what is in memory before it is put in place, and before any other is removed.

        Args:
            folder: of the checkpoints.
            keep: how many of the newest checkpoints stay.
            protect: checkpoints that stay in any case.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError, ValueError, TrainingError: it cannot be written, or a number in it is not finite. The checkpoints
                before are unharmed.
        """
        check_finite({**self.tensors, **self.moments})
        contents = {
            ADAPTER: bytes_of(dict(self.tensors), {"format": "pt"}),
            ADAPTER_CONFIG: self.config,
            OPTIMIZER: bytes_of(dict(self.moments), {"format": "pt"}),
            STATE: to_json(self.record),
        }
        path = folder / name_of(self.step)
        write_folder(path, contents, self._check)
        rotate(folder, keep, protect)
        return path

    def _check(self, written: Mapping[str, bytes]) -> None:
        check_tensors(written[ADAPTER], self.tensors)
        check_tensors(written[OPTIMIZER], self.moments)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse numbers that training cannot go on from.

    Raises:
        TrainingError: some are not finite; names a tensor.
    """
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise TrainingError(f"{len(broken)} tensors are not finite, e.g. {broken[0]}; lower the learning rate")


def check_tensors(content: bytes, live: Mapping[str, Tensor]) -> None:
    """Compare the bytes of a file with the tensors it was made of.

    Raises:
        TrainingError: some differ, are missing, left over or empty; names one.
    """
    found = tensors_from(content)  # nosec B614  # safetensors' load, not torch's
    wrong = [name for name in live if name not in found or not torch.equal(found[name], live[name])]
    wrong += [name for name in found if name not in live or found[name].numel() == 0]
    if wrong:
        raise TrainingError(f"{len(wrong)} tensors were not saved as they are, e.g. {wrong[0]}; check the disk")
