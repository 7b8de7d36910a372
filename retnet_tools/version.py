"""The version of the package, which what it writes says."""

__version__ = "0.1.0"
