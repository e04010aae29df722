"""The embedded default: nine generated tasks and a tiny backbone, made on the spot and cached.

Nothing is downloaded. The first call to `prepare` takes about a minute, later ones none.
"""

from more_ds.demo.cache import DemoPaths, prepare, prepare_data
from more_ds.pretrain.tokenizer import Kind

MODELS: dict[str, Kind] = {"demo": "llama", "demo-t5": "t5"}
"""Name under which a backbone is asked for -> its kind."""

__all__ = ["MODELS", "DemoPaths", "prepare", "prepare_data"]
