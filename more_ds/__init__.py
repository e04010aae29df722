"""more_ds: one model, many tasks, a mixture of low-rank experts, on DeepSpeed.

Importing the package registers its methods with PEFT, and touches no GPU, no network and no process group.
"""

from __future__ import annotations

import logging

# bitsandbytes, which PEFT imports, warns on some CPUs about an optional kernel package; its fallback is what we want.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from more_ds.errors import UserError  # noqa: E402
from more_ds.tuners import MoreConfig, MoreModel  # noqa: E402

__version__ = "0.1.0"
__all__ = ["MoreConfig", "MoreModel", "UserError", "__version__"]
