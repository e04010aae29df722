"""A trained adapter with one of its experts switched off, for each: what is the expert worth?"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from more_ds.checkpoint_files import ADAPTER, ADAPTER_CONFIG
from more_ds.errors import UserError

B = ".more_B."


def scaled_adapters(run: Path, output: Path) -> None:
    """Write `expert-1` and so on below `output`: the run's best adapter without that component; `expert-0` has all.

    Component j is the j-th row of A and the j-th column of B, in every map; without the column it adds nothing.

    Raises:
        UserError: the run has no MoRE adapter.
    """
    best = run / "best"
    tensors = load_file(best / ADAPTER) if (best / ADAPTER).is_file() else {}
    ups = [name for name in tensors if B in name]
    if not ups:
        raise UserError(f"{best} holds no MoRE adapter; the experts of another method cannot be scaled")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy2(run / "config.json", output / "config.json")  # says which base model and tasks the adapters belong to
    for component in range(tensors[ups[0]].shape[1] + 1):
        folder = output / f"expert-{component}"
        folder.mkdir(exist_ok=True)
        changed = dict(tensors)
        for name in ups:
            changed[name] = tensors[name].clone()
            changed[name][:, max(component - 1, 0) : component] = 0.0
        save_file(changed, folder / ADAPTER)
        shutil.copy2(best / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
