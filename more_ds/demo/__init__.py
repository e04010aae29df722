"""The embedded default: nine generated tasks and a tiny backbone, made on the spot and cached.

Nothing is downloaded. The first call to `prepare` takes about a minute, later ones none.
"""

from more_ds.demo.cache import DemoPaths, prepare

__all__ = ["DemoPaths", "prepare"]
