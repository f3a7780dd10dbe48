"""rm_scale: train reward models from a laptop to many GPU nodes. Importing it must stay free of torch (tested)."""

__version__ = "0.1.0"
