"""ScienceFlow: figures -> encoded samples -> a trained adapter -> figures and numbers."""

__version__ = "0.4.0"
