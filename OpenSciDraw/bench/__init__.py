"""A benchmark's prompts and rubrics → pictures, judgements, and a table by difficulty and axis.

May use: utils, config, figures, inference, evaluation, reporting.
"""
