"""tandem-serve: a serving cluster for Tandem Transformers (arXiv 2402.08644).

Importing this package is cheap: it pulls in neither torch, ray, grpc nor vllm.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tandem-serve")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
