"""Packages that only some corpora need: loaded when such a corpus is read, and named in one line when missing.

pyarrow takes 0.3 s to import and datasets a second; a run on text files should not wait for either.
"""

import importlib
from types import ModuleType

from megascale_moe.config import ConfigError


def load_extra(module: str, purpose: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{purpose} needs the package {package!r}, which cannot be imported ({error}); pip install {package}"
        ) from error
