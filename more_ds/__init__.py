"""more_ds: one model, many tasks, a mixture of low-rank experts, on DeepSpeed.

Importing the package touches no GPU, no network and no process group. Its methods are registered with PEFT in every
process that imports both, in whatever order; one that needs tasks and metrics alone never loads torch.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

# bitsandbytes, which PEFT imports, warns on some CPUs about an optional kernel package; its fallback is what we want.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from more_ds.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from more_ds.tuners import MoreConfig, MoreModel

__version__ = "0.1.0"
__all__ = ["MoreConfig", "MoreModel", "UserError", "__version__"]


class _WithPeft(MetaPathFinder):
    """Imports our methods right after PEFT, which they register with."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module("more_ds.tuners")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module("more_ds.tuners")
else:
    sys.meta_path.insert(0, _WithPeft())


def __getattr__(name: str) -> Any:
    if name in ("MoreConfig", "MoreModel"):
        return getattr(importlib.import_module("more_ds.tuners"), name)
    raise AttributeError(f"module 'more_ds' has no attribute {name!r}")
