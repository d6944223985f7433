"""Operators, one per file, and the bundles that a model is built with. Installed as `lumi.kernels`."""
