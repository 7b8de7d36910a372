"""Convert, verify, quantize and export Retentive Network (RetNet) checkpoints."""

__version__ = "0.1.0"
